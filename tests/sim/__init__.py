"""Deterministic simulation: the real code of the server, its cascade and its clients in one process, under one seed.

Reading order: ``kernel.py`` (time, processes, choice of the next step), ``network.py`` (ZMQ, and which faults there
are), ``sockets.py`` (unix sockets), ``memory.py`` (the pool and its files), ``disk.py`` (what a file tier stores on),
``standins.py`` (which names of which modules are replaced), ``server.py``, ``engine.py`` (who lives in the world),
``world.py`` (one seed), ``checks.py`` (what must hold), ``books.py`` (whether counters tell what happened),
``mutations.py`` (planted bugs).
"""
