"""One request to the engine, measured: sent over a connection of its own, every arrival timed as early as can be.

A connection is opened for each request, before its clock starts: name, TCP and TLS are outside the measured time, and
no request waits behind another one's bytes. What arrives is timed before it is looked at. Pieces of text that arrive
in one segment have one arrival time, which is the truth. Nothing is retried unless asked for, and a request that was
retried is measured from its first send, so that retries cannot flatter it.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lmcache_cli import api, failures, urls
from lmcache_cli.bench import http1, sse
from lmcache_cli.bench.base import Failure, Outcome, Request
from lmcache_cli.errors import ServerError, UsageFault
from lmcache_cli.target import Target

if TYPE_CHECKING:
    import socket
    import ssl

STREAM_BYTES_MAX = 256 << 20
PLAIN_BYTES_MAX = 256 << 10  # kept of an answer that is no stream, for the words in it
RECEIVE_BYTES = 64 << 10
FAREWELL_S = 0.1  # how long the end of the body is waited for once the answer has come to its end
BACK_OFF_S = 0.5  # before the first retry; doubled for each further one
BACK_OFF_S_MAX = 8.0

Clock = Callable[[], float]


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
        The outcome; when the task is cancelled, one whose failure is `cancelled`, with what was measured until then.

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
            failure = Failure("cancelled", "it was given up, since the run ended")
        first_s = attempt.sent_s if first_s is None else first_s
        if num_attempts > retries or not _is_retried(failure, attempt):
            break
        attempt = _Attempt(target, body, clock)
        try:
            await asyncio.sleep(min(BACK_OFF_S * 2 ** (num_attempts - 1), BACK_OFF_S_MAX))
        except asyncio.CancelledError:
            failure = Failure("cancelled", "it was given up before it was sent again, since the run ended")
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

    async def _connect(self) -> _Exchange:
        loop = asyncio.get_running_loop()
        parts = urlsplit(self._url)
        host = parts.hostname or ""
        context = _trust(self._target)
        sock = await _connected(loop, host, parts.port or (80 if context is None else 443))
        try:
            _, exchange = await loop.create_connection(
                lambda: _Exchange(self._url, self._target.timeout_s, self._clock),
                sock=sock,
                ssl=context,
                server_hostname=None if context is None else host,
            )
        except BaseException:
            sock.close()
            raise
        return exchange


async def _connected(loop: asyncio.AbstractEventLoop, host: str, port: int) -> socket.socket:
    """A connection to the first address of ``host`` that takes one; `localhost` has two.

    Raises:
        OSError: none does; its text is the system's own.
    """
    import socket

    failed: OSError | None = None
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
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


class _Exchange(asyncio.BufferedProtocol):
    """The connection's side of an attempt: takes times, reads what arrived, knows when it is over.

    Attributes:
        ended: the failure, or None for a proper end.
    """

    def __init__(self, url: str, silence_s: float, clock: Clock) -> None:
        self._url = url
        self._silence_s = silence_s
        self._clock = clock
        self._buffer = bytearray(RECEIVE_BYTES)
        self._response = http1.Response()
        self._events = sse.Events()
        self._num_events = 0
        self._num_bytes = 0
        self._plain = b""  # the body's beginning, as long as no event was in it
        self._has_finish = False
        self._progress_s = 0.0
        self._transport: asyncio.Transport | None = None
        self._watch: asyncio.TimerHandle | None = None
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._body_ended: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[Failure | None] = loop.create_future()
        self.end_s = 0.0
        self.text_s: list[float] = []
        self.text: list[str] = []
        self.usage = sse.Usage(None, None, None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio calls it."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self, message: bytes) -> float:
        """Hand the whole request over; returns the time just before."""
        assert self._transport is not None
        self._progress_s = sent_s = self._clock()
        self._transport.write(message)
        self._watch = self._loop.call_later(self._silence_s, self._check_silence)
        return sent_s

    async def close(self) -> None:
        """Leave the connection; after a proper end only when the engine, too, has come to its own."""
        try:
            if self.ended.done() and not self.ended.cancelled() and self.ended.result() is None:
                await asyncio.wait([self._body_ended], timeout=FAREWELL_S)
        finally:
            if self._watch is not None:
                self._watch.cancel()
            if self._transport is not None:
                self._transport.abort()

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002
        """As asyncio calls it: where to put what arrives."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """As asyncio calls it: something arrived."""
        now_s = self._clock()
        self._num_bytes += nbytes
        try:
            for piece in self._response.feed(bytes(memoryview(self._buffer)[:nbytes])):
                if not self.ended.done():
                    self._read_body(piece, now_s)
        except http1.HttpFault:
            self._end(now_s, *_cause(failures.not_http(self._url)))
        if self._num_bytes > STREAM_BYTES_MAX:
            self._end(now_s, "bad_answer", f"{self._url} sent more than any answer to this request can hold")
        if self._response.is_complete:
            self._end_of_body(now_s)

    def eof_received(self) -> bool:
        """As asyncio calls it: nothing more will arrive."""
        self._response.end()
        self._end_of_body(self._clock())
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """As asyncio calls it: the connection is gone."""
        self._end_of_body(self._clock())

    def _read_body(self, piece: bytes, now_s: float) -> None:
        if not self._num_events and len(self._plain) < PLAIN_BYTES_MAX:
            self._plain += piece
        if self._response.status == 200:
            try:
                self._read_events(self._events.feed(piece), now_s)
            except sse.EventFault as fault:
                self._end(now_s, *self._of_event(fault))

    def _read_events(self, events: list[tuple[bytes, bytes]], now_s: float) -> None:
        for name, data in events:
            self._num_events += 1
            self._progress_s = now_s
            if data == b"[DONE]":
                self._end_well(now_s)
                return
            delta = sse.read_delta(name, data)
            if delta.has_text:
                self.text_s.append(now_s)
                self.text.append(delta.text)
            if delta.usage is not None:
                self.usage = delta.usage
            self._has_finish = self._has_finish or delta.is_finish

    def _end_of_body(self, now_s: float) -> None:
        """The body has come to its end, or will not come to it any more."""
        if not self._body_ended.done():
            self._body_ended.set_result(None)
        if self.ended.done():
            return
        status = self._response.status
        if status is None:
            self._end(now_s, "cut_short", str(failures.broken_off(self._url)))
        elif status != 200:
            self._end(now_s, *_cause(failures.http_failure(self._url, status, self._plain)))
        else:
            self._end_of_stream(now_s)

    def _end_of_stream(self, now_s: float) -> None:
        try:
            self._read_events(self._events.end() if self._response.is_complete else [], now_s)
        except sse.EventFault as fault:
            self._end(now_s, *self._of_event(fault))
        if self.ended.done():
            return
        if self._has_finish and self._response.is_complete:
            self._end_well(now_s)
        elif self._num_events or not self._response.is_complete:
            self._end(now_s, "cut_short", f"{self._url} ended the stream before its end")
        elif words := failures.server_words(self._plain):
            self._end(now_s, "engine_error", f"{self._url} reported an error: {words}")
        else:
            self._end(now_s, "bad_answer", f"{self._url} did not answer with a stream of events")

    def _end_well(self, now_s: float) -> None:
        if self.text_s:
            self._end(now_s)
        else:
            self._end(now_s, "no_text", f"{self._url} ended its answer without any text")

    def _of_event(self, fault: sse.EventFault) -> tuple[str, str]:
        verb = "reported an error: " if isinstance(fault, sse.EngineError) else ""
        return fault.code, f"{self._url} {verb}{fault}"

    def _check_silence(self) -> None:
        now_s = self._clock()
        left_s = self._progress_s + self._silence_s - now_s
        if left_s <= 0:
            self._end(now_s, *_cause(failures.timed_out(self._url, self._silence_s)))
        else:
            self._watch = self._loop.call_later(left_s, self._check_silence)

    def _end(self, now_s: float, cause: str = "", message: str = "") -> None:
        if not self.ended.done():
            self.end_s = now_s
            self.ended.set_result(Failure(cause, message) if cause else None)


def _cause(error: ServerError) -> tuple[str, str]:
    return error.code, str(error)
