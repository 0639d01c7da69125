"""`lmcache demo`: server and engine as a user would start them, one long document asked cold, warm and after a restart.

Exit 1 when nothing was reused or an answer differs. Everything runs on free ports of the loopback and is stopped by its
process id; logs lie in a temporary folder, which stays only where something went wrong.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import click

from lmcache_cli.errors import CommandError, ExitStatus

HOST = "127.0.0.1"
DOCUMENT_TOKENS = 4096
QUESTION = "\nQuestion: what does this document say? Answer: "
ANSWER_TOKENS = 24
START_S = 120.0
ANSWER_S = 120.0
STOP_S = 20.0
_POLL_S = 0.05
_LOG_BYTES_SHOWN = 2000


@dataclass(frozen=True)
class Answer:
    """One streamed completion: seconds to its first text, tokens of the prompt, how many were reused, the text."""

    ttft_s: float
    prompt_tokens: int
    cached_tokens: int
    text: str


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
def demo() -> None:
    """Start a server and a small engine, ask the same long document cold and warm, show what was reused.

    Needs no download. Exit status 1: nothing was reused, or an answer differs.
    """
    from lmcache.engine.command import demand_extra

    demand_extra("demo")
    folder = Path(tempfile.mkdtemp(prefix="lmcache-demo-"))
    try:
        _run(folder, Signals())
    except CommandError as error:
        raise CommandError(f"{error}; logs are in {folder}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


class Signals:
    """SIGINT and SIGTERM end the demo by an exception, but never between the start of a process and the code that will
    stop it, nor while that code runs: there they wait for ``release``."""

    def __init__(self) -> None:
        self._held = False
        self._came: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def hold(self) -> None:
        """From now on a signal waits."""
        self._held = True

    def release(self) -> None:
        """From now on a signal raises at once; so does one that waited."""
        self._held = False
        if self._came is not None:
            self._end(self._came)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._came = number
        if not self._held:
            self._end(number)

    def _end(self, number: int) -> None:
        self._came = None
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)


def _run(folder: Path, signals: Signals) -> None:
    rpc_port, http_port, port = map(str, _free_ports(3))
    server = ["server", "--port", rpc_port, "--http-port", http_port, "--l1-size-gb", "1"]
    engine = ["engine", "--port", port, "--lmcache", f"tcp://{HOST}:{rpc_port}"]
    describe = ["describe", "kvcache", "--url", f"http://{HOST}:{http_port}"]
    prompt = document() + QUESTION
    with _running(folder, server, http_port, "/healthcheck", signals):
        with _running(folder, engine, port, "/health", signals):
            cold = _show("computed", ask(port, prompt))
            warm = _show("asked again", ask(port, prompt))
            click.echo(f"$ lmcache {' '.join(describe)}")
            _lmcache(describe)
        with _running(folder, engine, port, "/health", signals):
            restarted = _show("after a restart of the engine", ask(port, prompt))
    if not cold.text == warm.text == restarted.text:
        raise CommandError("an answer differs")
    if cold.cached_tokens or not min(warm.cached_tokens, restarted.cached_tokens):
        raise CommandError("what was to be reused was not, or what was not was")
    click.echo(f"\nthree equal answers, the first token {cold.ttft_s / warm.ttft_s:.0f} times as early when reused")


def document() -> str:
    """A text of DOCUMENT_TOKENS bytes, one token each for the engine's own model; no line of it comes twice."""
    text = ""
    number = 0
    while len(text) < DOCUMENT_TOKENS:
        number += 1
        text += (
            f"{number}. Entry {number * 7919 % 10007} of the log says that machine {number * 104729 % 997} was up.\n"
        )
    return text[:DOCUMENT_TOKENS]


def ask(port: str, prompt: str) -> Answer:
    """Greedy completion, streamed.

    Raises:
        CommandError: the engine did not answer as it should.
    """
    body = {
        "prompt": prompt,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection(HOST, int(port), timeout=ANSWER_S)
    try:
        began = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise CommandError(f"the engine answered {response.status}: {response.read(300).decode(errors='replace')}")
        return _read(response, began)
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise CommandError(f"the engine did not answer: {error or type(error).__name__}") from error
    finally:
        connection.close()


def _read(response: http.client.HTTPResponse, began: float) -> Answer:
    first, text, usage, done = None, "", None, False
    for line in response:
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            done = True
        elif data:
            event = json.loads(data)
            if event["choices"] and event["choices"][0]["text"]:
                first = time.perf_counter() - began if first is None else first
                text += event["choices"][0]["text"]
            usage = event.get("usage") or usage
    if not done or first is None or usage is None:
        raise CommandError("the engine broke its answer off")
    return Answer(first, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], text)


def _show(what: str, answer: Answer) -> Answer:
    click.echo(
        f"  {what:30} {answer.ttft_s * 1000:8.1f} ms to the first token, "
        f"{answer.cached_tokens:5} of {answer.prompt_tokens} tokens reused"
    )
    return answer


@contextlib.contextmanager
def _running(folder: Path, words: list[str], port: str, path: str, signals: Signals) -> Iterator[None]:
    """A command of ours as a process, healthy (``path`` on ``port`` says so); stopped at the end."""
    click.echo(f"$ lmcache {' '.join(words)}")
    began = time.monotonic()
    log = folder / f"{words[0]}.log"
    signals.hold()
    with log.open("ab") as sink:
        # A group of its own: Ctrl-C reaches us alone, and we stop the rest in order.
        # torch leaves a folder of its own where temporary files go: it goes with ours.
        environment = {**os.environ, "TMPDIR": str(folder), "XDG_STATE_HOME": str(folder)}
        process = subprocess.Popen(_command(words), stdout=sink, stderr=sink, env=environment, process_group=0)
    try:
        signals.release()
        while not _healthy(port, path):
            if process.poll() is not None or time.monotonic() - began > START_S:
                said = log.read_text(errors="replace")[-_LOG_BYTES_SHOWN:].strip()
                raise CommandError(f"the {words[0]} did not start: {said or 'it said nothing'}")
            time.sleep(_POLL_S)
        click.echo(f"  healthy after {time.monotonic() - began:.1f} s")
        yield
    finally:
        signals.hold()
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        signals.release()


def _lmcache(words: list[str]) -> None:
    """Run one command of ours and pass its output on.

    Raises:
        CommandError: it failed.
    """
    done = subprocess.run(_command(words), capture_output=True, text=True, timeout=ANSWER_S)
    click.echo(done.stdout, nl=False)
    if done.returncode != ExitStatus.OK:
        raise CommandError(
            f"lmcache {words[0]} failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}"
        )


def _command(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "lmcache_cli", *words]


def _healthy(port: str, path: str) -> bool:
    connection = http.client.HTTPConnection(HOST, int(port), timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_ports(number: int) -> list[int]:
    """Ports of the loopback that nobody has now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
