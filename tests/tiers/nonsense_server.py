"""A server that speaks Redis until it is asked for a value, and then says what its first argument names. Run as a
process: prints its port, serves until killed."""

from __future__ import annotations

import socket
import sys
import threading
import time

GOOD = {b"INFO": b"$17\r\nredis_version:7.0\r\n", b"CONFIG": b"*0\r\n", b"DBSIZE": b":0\r\n", b"STRLEN": b":0\r\n"}
SAID = {
    "prose": [b"HTTP/1.1 400 Bad Request\r\n\r\n"],
    "letters-for-a-length": [b"$abc\r\n"],
    "giant-length": [b"$99999999999999\r\n", *[b"x" * 65536] * 64],
    "negative-length": [b"$-7\r\n"],
    "number-for-a-value": [b":5\r\n"],
    "endless-line": [b"$" + b"1" * 65536] * 64,
    "half-a-value": [b"$%d\r\n", b"x" * 1000, None],
    "half-a-value-then-silence": [b"$%d\r\n", b"x" * 1000],
    "value-without-an-end": [b"$%d\r\n", b"%x", b"xxxxxxxx\r\n"],
    "nothing": [],
    "hanging-up": [None],
}


def words(link: socket.socket) -> list[bytes]:
    """The next command."""
    file = link.makefile("rb", buffering=0)
    count = int(file.readline()[1:])
    found = []
    for _ in range(count):
        length = int(file.readline()[1:])
        data = b""
        while len(data) < length + 2:
            data += file.read(length + 2 - len(data)) or b""
        found.append(data[:-2])
    return found


def serve(link: socket.socket, replies: list[bytes | None], value_bytes: int) -> None:
    """One client."""
    try:
        while True:
            verb = words(link)[0].upper()
            if verb not in (b"GET", b"SET"):
                link.sendall(GOOD.get(verb, b"+OK\r\n"))
                continue
            for reply in replies:
                if reply is None:
                    link.close()
                    return
                whole = reply.replace(b"%d", b"%d" % value_bytes).replace(b"%x", b"x" * value_bytes)
                link.sendall(whole)
            while True:
                time.sleep(60)
    except (OSError, ValueError):
        pass  # the client is gone


def main() -> None:
    """``NAME VALUE_BYTES``."""
    replies, value_bytes = SAID[sys.argv[1]], int(sys.argv[2])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            link, _ = listener.accept()
            threading.Thread(target=serve, args=(link, replies, value_bytes), daemon=True).start()


if __name__ == "__main__":
    main()
