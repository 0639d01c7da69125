"""Messages between a client and the core: what they are, how they travel, how a process attaches. No cache knowledge.

Reading order: messages.py, codec.py, stream.py, client.py, peer.py, local.py, tcp.py (zmq), poller.py;
unix_listener.py, framing.py, door.py and attach.py (the attach socket).
"""
