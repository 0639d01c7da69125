"""The two forms of a report."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest

from lmcache_cli import render
from lmcache_cli.render import Entry, Failure, Report, Section


def lines(*entries: Entry, width: int = 30, title: str = "T", **kwargs: Any) -> list[str]:
    return render.to_terminal(Report(title, width, [Section(entries)], **kwargs)).splitlines()


@pytest.mark.parametrize("width", [30, 31, 48, 49])
@pytest.mark.parametrize("title", ["", "a", "ab", "Ping KV Cache", "x" * 60])
def test_headings_are_centred_as_str_center_does(width: int, title: str) -> None:
    assert lines(width=width, title=title) == [f" {title} ".center(width, "="), "=" * width]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "N/A"),
        (1, "1"),
        (1.0, "1.00"),
        (1234567.891, "1234567.89"),
        (float("nan"), "N/A"),
        (float("inf"), "N/A"),
        (True, "True"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("é", "é"),
        ("\ud800", "\\ud800"),
    ],
)
def test_values_are_shown_on_one_line(value: Any, shown: str) -> None:
    assert lines(Entry("k", "K", value))[1] == f"K:{shown:>28}"


def test_wide_characters_take_two_columns() -> None:
    assert lines(Entry("k", "K", "模型"))[1] == "K:" + " " * 24 + "模型"
    assert lines(Entry("k", "K", "e\u0301"))[1] == "K:" + " " * 27 + "e\u0301"


def test_long_values_overflow_uncut() -> None:
    assert lines(Entry("k", "K", "x" * 80))[1] == "K: " + "x" * 80


def test_entries_without_a_label_are_for_scripts_only() -> None:
    report = Report("T", 30, [Section([Entry("a", "A", 1), Entry("b", None, [1, float("nan")])])])
    assert len(render.to_terminal(report).splitlines()) == 3
    assert json.loads(render.to_json(report))["metrics"] == {"a": 1, "b": [1, None]}


def test_json_places_entries_by_path_and_lists_last() -> None:
    item = Section([Entry("n", "N", 1)], label="Item", list_name="items")
    report = Report("T", 30, [item, Section([Entry("a.b", "B", "é"), Entry("c", "C", None)])], ("none", "items"))
    text = render.to_json(report)
    assert text.isascii()
    assert json.dumps(json.loads(text)["metrics"]) == json.dumps(
        {"a": {"b": "é"}, "c": None, "none": [], "items": [{"n": 1}]}
    )


def test_a_failure_is_part_of_the_document() -> None:
    report = Report("T", 30, failure=Failure("timeout", "too late"))
    assert json.loads(render.to_json(report))["error"] == {"code": "timeout", "message": "too late"}


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


REPORT = Report("T", 30, [Section([Entry("s", "Status", "OK"), Entry("u", "URL", "x" * 200)])])


def test_a_terminal_gets_colour_and_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = Screen()
    render.write(REPORT, "terminal", screen)
    assert "\x1b[32mOK\x1b[0m" in screen.getvalue()
    import re

    assert re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue()) == render.to_terminal(REPORT)


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_can_be_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    screen = Screen()
    render.write(REPORT, "terminal", screen)
    assert screen.getvalue() == render.to_terminal(REPORT)


def test_json_is_never_coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = Screen()
    render.write(REPORT, "json", screen)
    assert screen.getvalue() == render.to_json(REPORT)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_real_terminal_sees_colour() -> None:
    import pty
    import subprocess

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lmcache_cli", "ping", "kvcache", "--url", "http://127.0.0.1:1"]
    with open(ours, "rb", buffering=0) as screen, open(theirs, "wb", buffering=0) as stdout:
        import os

        env = {**os.environ, "TERM": "xterm-256color"}
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=env, timeout=60)
        seen = screen.read(4096)
    assert done.returncode == 1
    assert b"\x1b[1;31mFAIL\x1b[0m" in seen
