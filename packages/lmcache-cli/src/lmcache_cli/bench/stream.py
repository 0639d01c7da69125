"""One request to the engine, measured: sent over a connection of its own, every arrival timed as early as can be.

A connection is opened for each request, before its clock starts: name, TCP and TLS are outside the measured time, and
no request waits behind the bytes of another one. Nothing is retried unless asked for, and a request that was retried is
measured from its first send, so that retries cannot flatter it.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lmcache_cli import api, failures, urls
from lmcache_cli.bench import http1, sse
from lmcache_cli.bench.base import CANCELLED, Failure, Outcome, Request
from lmcache_cli.bench.exchange import Clock, Exchange
from lmcache_cli.bench.stamped import StampedSocket
from lmcache_cli.errors import ServerError, UsageFault
from lmcache_cli.target import Target

if TYPE_CHECKING:
    import ssl

BACK_OFF_S = 0.5  # before the first retry; doubled for each further one
BACK_OFF_S_MAX = 8.0


def check(target: Target) -> None:
    """Whether ``target`` can be measured; ask before a run.

    Raises:
        UsageFault: its certificates cannot be read, or it is reached through a proxy.
    """
    if (proxy := urls.proxy_for(target.url)) is not None:
        host = urlsplit(target.url).hostname
        via = urlsplit(proxy if "://" in proxy else f"http://{proxy}").hostname or "a proxy"
        raise UsageFault(
            f"{target.url} would be reached through the proxy {via}, which would be measured too: set no_proxy={host}"
        )
    _trust(target)


async def measure(
    target: Target,
    request: Request,
    *,
    model: str,
    body_extras: Mapping[str, Any] | None = None,
    due_s: float | None = None,
    retries: int = 0,
    clock: Clock = time.perf_counter,
) -> Outcome:
    """Send ``request`` and measure the answer; whatever happens to it is in the outcome.

    Args:
        body_extras: further keys of the body, such as `ignore_eos`.
        due_s: when it should have been sent; None: when it is.
        retries: how often a request that got no text because of a refused connection, a 429 or a 5xx is sent again.
        clock: a monotonic clock in seconds.

    Returns:
        The outcome; when the task is cancelled, one whose failure is ``CANCELLED``, with what was measured until then.

    Raises:
        UsageFault: as ``check``; nothing was sent.
    """
    check(target)
    body = json.dumps(
        {
            "model": model,
            "messages": list(request.messages),
            "max_tokens": request.output_tokens_max,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **(body_extras or {}),
        }
    ).encode()
    attempt = _Attempt(target, body, clock)
    first_s: float | None = None
    num_attempts = 0
    failure: Failure | None
    while True:
        num_attempts += 1
        try:
            failure = await attempt.run()
        except asyncio.CancelledError:
            failure = Failure(CANCELLED, "it was given up, since the run ended")
        first_s = attempt.sent_s if first_s is None else first_s
        if num_attempts > retries or not _is_retried(failure, attempt):
            break
        attempt = _Attempt(target, body, clock)
        try:
            await asyncio.sleep(min(BACK_OFF_S * 2 ** (num_attempts - 1), BACK_OFF_S_MAX))
        except asyncio.CancelledError:
            failure = Failure(CANCELLED, "it was given up before it was sent again, since the run ended")
            break
    usage = attempt.usage
    return Outcome(
        request,
        due_s=first_s if due_s is None else due_s,
        sent_s=first_s,
        end_s=attempt.end_s,
        text_s=tuple(attempt.text_s),
        text="".join(attempt.text),
        prompt_tokens=usage.prompt_tokens,
        output_tokens=usage.output_tokens,
        cached_tokens=usage.cached_tokens,
        num_attempts=num_attempts,
        failure=failure,
    )


def _is_retried(failure: Failure | None, attempt: _Attempt) -> bool:
    if failure is None or attempt.text_s:
        return False
    return failure.cause in ("unreachable", "http_429") or failure.cause.startswith("http_5")


def _trust(target: Target) -> ssl.SSLContext | None:
    if not target.url.startswith("https:"):
        return None
    return _context(target.cacert, target.insecure)


@functools.lru_cache(maxsize=4)
def _context(cacert: str | None, insecure: bool) -> ssl.SSLContext:
    # made once: reading the system's authorities takes 20 ms, during which nothing else would be timed
    return Target("https://localhost", cacert=cacert, insecure=insecure).ssl_context()


class _Attempt:
    """One sending of a request, and what has come back so far.

    Attributes:
        sent_s: just before the first byte was handed to the socket; without a connection, when one was first tried.
        end_s: arrival of the last byte that counts, or when it was given up.
    """

    def __init__(self, target: Target, body: bytes, clock: Clock) -> None:
        self._target = target
        self._url = f"{target.url}{api.ENGINE_PATH_CHAT}"
        self._message = http1.post(self._url, target.all_headers(), body)
        self._clock = clock
        self.sent_s = self.end_s = clock()
        self.text_s: list[float] = []
        self.text: list[str] = []
        self.usage = sse.Usage(None, None, None)

    async def run(self) -> Failure | None:
        """Connect, send, read to the end; None when that was a proper end."""
        try:
            exchange = await asyncio.wait_for(self._connect(), self._target.timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            return self._given_up(failures.timed_out(self._url, self._target.timeout_s))
        except OSError as error:  # ssl.SSLError is one
            return self._given_up(failures.unreachable(self._url, error))
        except asyncio.CancelledError:
            self.end_s = self._clock()
            raise
        try:
            self.sent_s = exchange.send(self._message)
            failure = await exchange.ended
            self.end_s = exchange.end_s
        except asyncio.CancelledError:
            self.end_s = self._clock()
            raise
        finally:
            self.text_s, self.text, self.usage = exchange.text_s, exchange.text, exchange.usage
            await exchange.close()
        return failure

    def _given_up(self, error: ServerError) -> Failure:
        self.end_s = self._clock()
        return Failure(error.code, str(error))

    async def _connect(self) -> Exchange:
        loop = asyncio.get_running_loop()
        parts = urlsplit(self._url)
        host = parts.hostname or ""
        context = _trust(self._target)
        sock = await _connected(loop, host, parts.port or (80 if context is None else 443))
        try:
            _, exchange = await loop.create_connection(
                lambda: Exchange(self._url, self._target.timeout_s, self._clock, sock.age_s),
                sock=sock,
                ssl=context,
                server_hostname=None if context is None else host,
            )
        except BaseException:
            sock.close()
            raise
        return exchange


async def _connected(loop: asyncio.AbstractEventLoop, host: str, port: int) -> StampedSocket:
    """A connection to the first address of ``host`` that takes one; `localhost` has two.

    Raises:
        OSError: none does; its text is the system's own.
    """
    failed: OSError | None = None
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = StampedSocket(family, kind, protocol)
        try:
            sock.setblocking(False)
            sock.ask_for_stamps()
            await loop.sock_connect(sock, address)
            return sock
        except OSError as error:
            sock.close()
            # asyncio's text names the address once more and hides the system's reason
            failed = OSError(error.errno, os.strerror(error.errno)) if error.errno else error
        except BaseException:
            sock.close()
            raise
    raise failed or OSError(f"{host} has no address")
