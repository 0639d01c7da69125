"""An HTTP server that lists an empty bucket, and answers every other request as its first argument names. Run as a
process: prints its port, serves until killed."""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

EMPTY = b'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>'
FACTS = b'ETag: "x"\r\nLast-Modified: Tue, 01 Sep 2026 10:00:00 GMT\r\n'
QUOTA = b"<Error><Code>QuotaExceeded</Code></Error>"
SAID = {
    "prose": b"-ERR unknown command\r\n",
    "nothing": b"",
    "an-error": b"HTTP/1.1 500 Broken\r\nContent-Length: 0\r\n\r\n",
    "giant-length": b"HTTP/1.1 200 OK\r\n" + FACTS + b"Content-Length: 99999999999999\r\n\r\n" + b"x" * 100_000,
    "no-length": b"HTTP/1.1 200 OK\r\n" + FACTS + b"\r\n" + b"x" * 100_000,
    "half-a-body": b"HTTP/1.1 200 OK\r\n" + FACTS + b"Content-Length: %d\r\n\r\n" + b"x" * 1000,
    "half-a-range": b"HTTP/1.1 206 Partial Content\r\n"
    + FACTS
    + b"Content-Range: bytes 0-9/%d\r\nContent-Length: 10\r\n\r\n"
    + b"x" * 10,
    "in-circles": b"HTTP/1.1 307 There\r\nLocation: /kv-cache/x\r\nContent-Length: 0\r\n\r\n",
    "full": b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n" % len(QUOTA) + QUOTA,
    "no-storage": b"HTTP/1.1 507 Insufficient Storage\r\nContent-Length: 0\r\n\r\n",
}


class Handler(BaseHTTPRequestHandler):
    """One connection, closed after its answer."""

    def _answer(self) -> None:
        left = int(self.headers.get("Content-Length") or 0)
        while left > 0:
            left -= len(self.rfile.read(min(left, 65536))) or left
        listing = b"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n" % len(EMPTY) + EMPTY
        said = SAID[sys.argv[1]]
        if b"%d" in said:
            said = said.replace(b"%d", sys.argv[2].encode())
        self.wfile.write(listing if "list-type" in self.path else said)
        self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def main() -> None:
    """``NAME OBJECT_BYTES``."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
