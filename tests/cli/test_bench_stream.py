"""One measured request: how the engine is reached, what HTTP may do to an answer, and when each piece of it arrives.

What engines do to the answer itself is in ``test_bench_answers``, bytes without a socket in ``test_bench_bytes``.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import MODEL, Behaviour, ScriptedEngine

from lmcache_cli.bench.base import CANCELLED, Outcome, Request
from lmcache_cli.bench.http1 import CHUNK_LINE_BYTES_MAX, HEAD_BYTES_MAX
from lmcache_cli.bench.sse import LINE_BYTES_MAX
from lmcache_cli.bench.stream import check, measure
from lmcache_cli.errors import UsageFault
from lmcache_cli.target import Target

REQUEST = Request("r0", [{"role": "user", "content": "how are you"}], 16)
SILENCE_S = 0.4
CHUNKED = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def engine() -> Iterator[ScriptedEngine]:
    with ScriptedEngine() as started:
        yield started


def ask(engine: ScriptedEngine, *behaviours: Behaviour, url: str | None = None, **options: Any) -> Outcome:
    """One request against an engine that behaves like this; ``options`` are the target's."""
    engine.play(*behaviours)
    return asyncio.run(measure(Target(url or engine.url, **options), REQUEST, model=MODEL))


def cause(outcome: Outcome) -> str | None:
    return outcome.failure and outcome.failure.cause


@pytest.mark.skipif(sys.platform != "linux", reason="one clock for all processes")
def test_each_of_many_streams_has_its_own_pieces_none_early_and_none_held_back(engine: ScriptedEngine) -> None:
    texts = [f" t{index}" for index in range(20)]
    engine.play(Behaviour(texts=texts, gap_s=0.02))
    requests = [Request(f"r{index}", [{"role": "user", "content": f"r{index}"}], 20) for index in range(8)]

    async def all_at_once() -> list[Outcome]:
        return await asyncio.gather(*(measure(Target(engine.url), request, model=MODEL) for request in requests))

    outcomes = asyncio.run(all_at_once())
    written = {asked.body["messages"][0]["content"]: asked for asked in engine.asked()}
    assert engine.in_flight_max == 8
    for outcome in outcomes:
        asked = written[outcome.request.id]
        assert (outcome.failure, outcome.text) == (None, "".join(texts))
        assert len(outcome.text_s) == len(asked.text_s)
        assert outcome.sent_s <= asked.arrived_s
        assert all(wrote <= arrived for wrote, arrived in zip(asked.text_s, outcome.text_s, strict=True))
        assert outcome.text_s[0] < asked.text_s[-1]  # a piece does not wait for the end
        assert asked.done_s is not None
        assert asked.done_s <= outcome.end_s


def test_pieces_of_one_segment_have_one_time(engine: ScriptedEngine) -> None:
    times = ask(engine, Behaviour(texts=list("abcdef"), together=3, gap_s=0.05)).text_s
    assert times[0] == times[2] < times[3] == times[5]


def test_a_connection_that_stays_open_after_the_end_is_not_waited_for(engine: ScriptedEngine) -> None:
    assert ask(engine, Behaviour(linger_s=3600)).failure is None


def test_a_silence_shorter_than_the_timeout_is_none(engine: ScriptedEngine) -> None:
    outcome = ask(engine, Behaviour(texts=list("abcd"), first_s=0.3, gap_s=0.3), timeout_s=1.0)
    assert (outcome.failure, outcome.text) == (None, "abcd")


def test_headers_of_the_target_are_sent_once_whatever_their_case(engine: ScriptedEngine) -> None:
    outcome = ask(engine, headers={"authorization": "Bearer secret", "accept": "x/y"})
    (asked,) = engine.asked()
    assert outcome.failure is None
    assert (asked.headers["authorization"], asked.headers["accept"]) == ("Bearer secret", "x/y")
    assert asked.headers["accept-encoding"] == "identity"
    assert asked.headers["user-agent"].startswith("lmcache-cli/")


@pytest.mark.parametrize(
    ("behaviour", "expected", "words"),
    [
        (Behaviour(hang_after=2), "timeout", "fell silent for 0.4 s"),
        (Behaviour(hang_after=-1), "timeout", "did not answer within 0.4 s"),
        (Behaviour(body='{"error": {"message": "no such model"}}'), "engine_error", "reported an error: no such model"),
        (Behaviour(body="event: error\ndata: {}\n\n"), "engine_error", "without saying which"),
        (Behaviour(body=""), "bad_answer", "a stream of events"),
        (Behaviour(body="data: {nope\n\n"), "bad_answer", "an event that is not JSON"),
        (Behaviour(body="data: [1]\n\n"), "bad_answer", "an event that is not a JSON object"),
        (Behaviour(body=f"data: {'[' * 100_000}\n\n"), "bad_answer", "an event that is not JSON"),
        (Behaviour(body=f"data: {'x' * LINE_BYTES_MAX}"), "bad_answer", "longer than any can be"),
        (Behaviour(status=302, body=""), "http_302", "HTTP 302"),
        (Behaviour(raw="HTTP/1.1 nope\r\n\r\n"), "bad_answer", "status line"),
        (Behaviour(raw="HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nxx"), "bad_answer", "compressed"),
        (Behaviour(raw="HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"), "bad_answer", "length is not a number"),
        (Behaviour(raw="HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\ndata: "), "cut_short", "before its end"),
        (Behaviour(raw="HTTP/1.1 200 OK\r\nTransfer-Encoding: br\r\n\r\n"), "bad_answer", "transfer coding"),
        (Behaviour(raw=f"{CHUNKED}-1\r\n"), "bad_answer", "size of a chunk"),
        (Behaviour(raw=f"{CHUNKED}1\r\nabc"), "bad_answer", "longer than its size"),
        (Behaviour(raw=f"{CHUNKED}1;{'x' * CHUNK_LINE_BYTES_MAX}"), "bad_answer", "too long"),
        (Behaviour(raw="HTTP/1.1 101 Switching\r\n\r\n"), "bad_answer", "final status"),
        (Behaviour(raw="HTTP/1.1 100 Continue\r\n\r\n" * 9), "bad_answer", "final status"),
        (Behaviour(raw=f"HTTP/1.1 200 OK\r\nX: {'x' * HEAD_BYTES_MAX}"), "bad_answer", "head is longer"),
    ],
)
def test_what_is_wrong_with_an_answer_is_said(
    engine: ScriptedEngine, behaviour: Behaviour, expected: str, words: str
) -> None:
    outcome = ask(engine, behaviour, timeout_s=SILENCE_S)
    assert cause(outcome) == expected
    assert outcome.failure is not None
    assert words in outcome.failure.message
    assert "\n" not in outcome.failure.message
    assert outcome.end_s >= outcome.sent_s
    assert len(engine.asked()) == 1


def test_an_interim_answer_is_passed_over(engine: ScriptedEngine) -> None:
    event = 'data: {"choices": [{"delta": {"content": "yes"}}]}\n\n'
    raw = f"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n{event}data: [DONE]\n\n"
    outcome = ask(engine, Behaviour(raw=raw))
    assert (outcome.failure, outcome.text) == (None, "yes")


def test_cancelled_before_a_retry_it_says_so(engine: ScriptedEngine) -> None:
    async def run() -> Outcome:
        task = asyncio.ensure_future(measure(Target(engine.url), REQUEST, model=MODEL, retries=9))
        for _ in range(2000):
            await asyncio.sleep(0.01)
            if engine.asked():
                break
        await asyncio.sleep(0.1)
        task.cancel()
        return await task

    engine.play(Behaviour(status=503, body="{}"))
    outcome = asyncio.run(run())
    assert (cause(outcome), outcome.num_attempts) == (CANCELLED, 1)


def test_a_name_with_two_addresses_is_reached_on_the_one_that_answers(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo

    def both(_host: str, *rest: Any, **options: Any) -> list[Any]:
        return [*resolve("::1", *rest, **options), *resolve("127.0.0.1", *rest, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    assert ask(engine, url=f"http://localhost:{engine.port}").failure is None
    nobody = ask(engine, url="http://localhost:1")
    assert nobody.failure is not None
    assert nobody.failure.message == "cannot connect to http://localhost:1: Connection refused"


def test_an_engine_on_ipv6_is_measured() -> None:
    try:
        engine = ScriptedEngine(host="::1")
    except RuntimeError:
        pytest.skip("no IPv6 loopback here")
    with engine:
        assert ask(engine).failure is None
        (asked,) = engine.asked()
    assert asked.headers["host"] == f"[::1]:{engine.port}"


def test_a_proxy_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://user:secret@proxy.example:3128")
    with pytest.raises(UsageFault, match=r"through the proxy proxy\.example.*set no_proxy=engine\.example$") as raised:
        check(Target("http://engine.example:8000"))
    assert "secret" not in str(raised.value)
    check(Target("http://localhost:8000"))
    monkeypatch.setenv("no_proxy", "engine.example")
    check(Target("http://engine.example:8000"))


def test_authorities_that_cannot_be_read_are_a_usage_error() -> None:
    with pytest.raises(UsageFault, match="--cacert"):
        check(Target("https://localhost:8000", cacert="/nowhere.pem"))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEM file with a key and a certificate for this machine, signed by itself; made by openssl."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    key, pem, both = folder / "key.pem", folder / "certificate.pem", folder / "both.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(pem)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    both.write_bytes(key.read_bytes() + pem.read_bytes())
    return both


def test_https_is_measured_where_its_authority_is_known_or_nobody_asks(certificate: Path) -> None:
    texts = [f" t{index}" for index in range(50)]
    with ScriptedEngine(certificate=str(certificate)) as engine:
        for trust in ({"cacert": str(certificate)}, {"insecure": True}):
            # several records in one segment, too: asyncio's TLS hands them over in one buffer
            for together in (1, 7):
                outcome = ask(engine, Behaviour(texts=texts, together=together), **trust)
                assert (outcome.failure, outcome.text) == (None, "".join(texts))
        stranger = ask(engine)
    assert stranger.failure is not None
    assert stranger.failure.cause == "unreachable"
    assert "certificate" in stranger.failure.message


def test_http_asked_of_https_and_the_other_way_is_a_failure(engine: ScriptedEngine, certificate: Path) -> None:
    wrong = ask(engine, url=engine.url.replace("http:", "https:"), insecure=True, timeout_s=SILENCE_S)
    assert cause(wrong) in ("timeout", "unreachable")
    with ScriptedEngine(certificate=str(certificate)) as other:
        assert cause(ask(other, url=other.url.replace("https:", "http:"))) in ("cut_short", "bad_answer")
