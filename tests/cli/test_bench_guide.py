"""The guided setup of `lmcache bench engine`, on a real terminal of 80 and of 60 columns."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import Behaviour, ScriptedEngine

pexpect = pytest.importorskip("pexpect")
pyte = pytest.importorskip("pyte")

ROWS = 60
WAIT_S = 60

Dialogue = Callable[..., Any]


@pytest.fixture(scope="module")
def engine() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(Behaviour(texts=("a ", "b "), output_tokens=2)) as process:
        yield process


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dialogue]:
    """Start `lmcache bench engine WORDS` on a terminal of so many columns."""
    monkeypatch.setenv("TERM", "xterm")
    # given in full: readline sets COLUMNS behind os.environ's back, and that would stand for the terminal's own size
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    started = []

    def start(*words: str, columns: int = 80) -> Any:
        command = ["-m", "lmcache_cli", "bench", "engine", "--output-dir", str(tmp_path / "out"), *words]
        size = (ROWS, columns)
        child = pexpect.spawn(
            sys.executable,
            command,
            dimensions=size,
            encoding="utf-8",
            timeout=WAIT_S,
            cwd=str(tmp_path),
            env=environment,
        )
        started.append(child)
        return child

    yield start
    for child in started:
        child.close(force=True)


def answer(child: Any, prompt: str, line: str) -> None:
    child.expect_exact(prompt)
    child.sendline(line)


def ended(child: Any) -> int:
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus is not None
    return int(child.exitstatus)


@pytest.mark.parametrize("columns", [80, 60])
def test_the_guide_leads_to_a_run_and_no_line_is_wider_than_the_terminal(
    begin: Dialogue, engine: ScriptedEngine, tmp_path: Path, columns: int
) -> None:
    child = begin("-q", columns=columns)
    seen = []
    child.logfile_read = type("Log", (), {"write": lambda _, text: seen.append(text), "flush": lambda _: None})()
    answer(child, "Engine URL [http://localhost:8000]: ", engine.url)
    answer(child, "Number [1]: ", "random-prefill")
    answer(child, "LMCache server URL (or none) [none]: ", "")
    answer(child, "Number [1]: ", "")
    answer(child, "Number [1]: ", "2")
    answer(child, "Tokens of a request [10000]: ", "50")
    answer(child, "Requests [50]: ", "3")
    answer(child, "What now:", "1")
    assert ended(child) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert json.loads((folder / "config.json").read_text())["rp_num_requests"] == 3
    guide = "".join(seen).split("Engine Benchmark Result")[0]
    widths = [len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line.rstrip("\r"))) for line in guide.split("\n")[:-1]]
    assert max(widths) <= columns


def test_every_answer_is_checked_and_asked_again(begin: Dialogue) -> None:
    child = begin("--workload", "random-prefill")
    answer(child, "Engine URL [http://localhost:8000]: ", "localhost:99999")
    child.expect_exact("is not an address")
    answer(child, "Engine URL [http://localhost:8000]: ", "")
    answer(child, "(or none) [none]: ", "http://[::1")
    child.expect_exact("is not an address")
    answer(child, "(or none) [none]: ", "")
    answer(child, "Number [1]: ", "3")
    child.expect_exact("expected a number from 1 to 2.")
    answer(child, "Number [1]: ", "2")
    answer(child, "Model name [the first one it serves]: ", "m")
    answer(child, "[42]: ", "-1")
    child.expect_exact("expected a whole number from 0")
    answer(child, "[42]: ", "7")
    answer(child, "[no]: ", "maybe")
    child.expect_exact("expected yes or no.")
    child.sendintr()
    assert ended(child) == 130


def test_back_returns_to_the_question_before_and_keeps_its_answer(begin: Dialogue) -> None:
    child = begin()
    answer(child, "Engine URL [http://localhost:8000]: ", "localhost:1234")
    answer(child, "Number [1]: ", "<")
    answer(child, "Engine URL [http://localhost:1234]: ", "<")
    answer(child, "Engine URL [http://localhost:1234]: ", "")
    answer(child, "Number [1]: ", "1")
    answer(child, "(or none) [none]: ", "")
    answer(child, "Tokens per GB of KV cache: ", "")
    child.expect_exact("This one has no default.")
    answer(child, "Tokens per GB of KV cache: ", "10")
    child.expect_exact("General settings:")
    answer(child, "Number [1]: ", "<")
    answer(child, "Tokens per GB of KV cache [10]: ", "")
    child.expect_exact("General settings:")
    answer(child, "Number [1]: ", "")
    child.expect_exact("Settings of long-doc-qa:")
    answer(child, "Number [1]: ", "")
    child.expect_exact("What now:")
    answer(child, "Number [1]: ", "quit")
    assert ended(child) == 0


def test_what_was_given_is_not_asked(begin: Dialogue, engine: ScriptedEngine) -> None:
    child = begin("--engine-url", engine.url, "--seed", "9", "--lmcache-url", "http://localhost:1")
    child.expect_exact("Workload:")
    answer(child, "Number [1]: ", "5")
    child.expect_exact("General settings:")
    answer(child, "Number [1]: ", "2")
    answer(child, "Model name [the first one it serves]: ", "")
    child.expect_exact("Generate on after the end of text")
    child.sendeof()
    assert ended(child) == 130


def test_settings_can_be_exported_from_the_guide(begin: Dialogue, engine: ScriptedEngine, tmp_path: Path) -> None:
    child = begin("--engine-url", engine.url)
    answer(child, "Number [1]: ", "5")
    answer(child, "(or none) [none]: ", "")
    answer(child, "Number [1]: ", "")
    answer(child, "Number [1]: ", "")
    child.expect_exact("What now:")
    answer(child, "Number [1]: ", "2")
    answer(child, "File [bench_config.json]: ", "mine.json")
    assert ended(child) == 0
    assert json.loads((tmp_path / "mine.json").read_text())["workload"] == "random-prefill"


@pytest.mark.parametrize("leave", ["sendintr", "sendeof"])
def test_leaving_the_guide_writes_nothing_and_ends_with_130(begin: Dialogue, tmp_path: Path, leave: str) -> None:
    child = begin()
    child.expect_exact("Engine URL")
    getattr(child, leave)()
    assert ended(child) == 130
    assert list(tmp_path.iterdir()) == []


def test_progress_is_redrawn_in_place_on_a_narrow_terminal(begin: Dialogue, engine: ScriptedEngine) -> None:
    words = ("--workload", "random-prefill", "--rp-request-length", "50", "--rp-num-requests", "20", "--format", "json")
    child = begin("--engine-url", engine.url, *words, columns=60)
    child.expect(pexpect.EOF)
    screen = pyte.Screen(60, ROWS * 8)
    pyte.Stream(screen).feed(child.before)
    child.close()
    lines = [line.rstrip() for line in screen.display]
    assert child.exitstatus == 0
    (measuring,) = [line for line in lines if line.startswith("measuring: ")]
    assert measuring.startswith("measuring: [####################] 20/20")
    assert any(re.fullmatch(r"0 in flight, 0 failed, TTFT \d+ ms mean", line) for line in lines)
