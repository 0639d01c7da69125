"""The connection's side of a measured request: every arrival is timed before it is looked at.

Pieces of text that are read at once have one arrival time, that of the last of them. Where the socket knows how long
ago that was (see ``stamped``), the time is that of the arrival, else that of the reading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lmcache_cli import failures
from lmcache_cli.bench import http1, sse
from lmcache_cli.bench.base import Failure
from lmcache_cli.errors import ServerError

STREAM_BYTES_MAX = 256 << 20
PLAIN_BYTES_MAX = 256 << 10  # kept of an answer that is no stream, for the words in it
RECEIVE_BYTES = 64 << 10
FAREWELL_S = 0.1  # how long the end of the body is waited for once the answer has come to its end

Clock = Callable[[], float]
Age = Callable[[], float]


class Exchange(asyncio.BufferedProtocol):
    """One request and its answer on one connection; takes times, reads what arrived, knows when it is over.

    Args:
        silence_s: after so many seconds without an event it is given up.
        clock: a monotonic clock in seconds.
        age_s: how many seconds ago what was read last had arrived.

    Attributes:
        ended: the failure, or None for a proper end.
        end_s: arrival of the last byte that counts, once ``ended`` is set.
        text_s, text, usage: as in ``base.Outcome``, so far.
    """

    def __init__(self, url: str, silence_s: float, clock: Clock, age_s: Age) -> None:
        self._url = url
        self._silence_s = silence_s
        self._clock = clock
        self._age_s = age_s
        self._arrived_s = 0.0  # the latest arrival, at first the sending
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))  # a view: asyncio's TLS cuts it, and must not cut a copy
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
        self._progress_s = self._arrived_s = sent_s = self._clock()
        self._transport.write(message)
        self._watch = self._loop.call_later(self._silence_s, self._check_silence)
        return sent_s

    async def close(self) -> None:
        """Leave the connection; after a proper end only when the engine, too, has come to its own.

        Does not raise when the task is cancelled: all that is measured is there.
        """
        try:
            if self.ended.done() and not self.ended.cancelled() and self.ended.result() is None:
                await asyncio.wait([self._body_ended], timeout=FAREWELL_S)
        except asyncio.CancelledError:
            pass
        finally:
            if self._watch is not None:
                self._watch.cancel()
            if self._transport is not None:
                self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """As asyncio calls it: where to put what arrives."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """As asyncio calls it: something arrived."""
        age_s = self._age_s()  # before the clock, so that what delays this process in between makes nothing earlier
        now_s = self._arrived_s = max(self._clock() - age_s, self._arrived_s)
        self._num_bytes += nbytes
        try:
            for piece in self._response.feed(bytes(self._buffer[:nbytes])):
                if not self.ended.done():
                    self._read_body(piece, now_s)
        except http1.NotHttp:
            self._end(now_s, *_cause(failures.not_http(self._url)))
        except http1.HttpFault as fault:
            self._end(now_s, "bad_answer", f"the answer of {self._url} cannot be read: {fault}")
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
            silent = failures.timed_out(self._url, self._silence_s)
            message = f"{self._url} fell silent for {self._silence_s:g} s" if self._num_events else str(silent)
            self._end(now_s, silent.code, message)
        else:
            self._watch = self._loop.call_later(left_s, self._check_silence)

    def _end(self, now_s: float, cause: str = "", message: str = "") -> None:
        if not self.ended.done():
            self.end_s = now_s
            self.ended.set_result(Failure(cause, message) if cause else None)


def _cause(error: ServerError) -> tuple[str, str]:
    return error.code, str(error)
