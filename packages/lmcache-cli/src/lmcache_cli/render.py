"""One model of a result, two forms of it: a terminal table of fixed width, and JSON. The only door to rich.

Terminal: the title centred in `=`, then the entries as `LABEL:` and the value, right-aligned to the width, sections
headed by their label centred in `-`, a last line of `=`. None is N/A, floats have two decimals, values that are too
long overflow (they are never cut). What a server sent is shown on one line and cannot steer the terminal: every
unprintable character is escaped. Colour appears only where stdout is a terminal and NO_COLOR is unset, and rich is
imported only there. JSON: {"title", "metrics"[, "error"]}; an entry's key is its dotted path below "metrics".
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

FORMATS = ("terminal", "json")

_STYLES = {"OK": "green", "FAIL": "bold red", "UNHEALTHY": "bold red"}


@dataclass(frozen=True)
class Entry:
    """One value.

    Attributes:
        key: dotted path in the JSON form (`latency.ttft_ms`); in a section of a list, path inside that item.
        label: what people read; None keeps the entry out of the terminal form.
        value: plain JSON value; None means that it is not known.
        text: terminal form of the value, where it differs from the plain one.
    """

    key: str
    label: str | None
    value: Any
    text: str | None = None


@dataclass(frozen=True)
class Section:
    """Entries shown together.

    Attributes:
        label: heading; None shows the entries without one.
        list_name: key of the JSON list that this section becomes one item of; None puts the entries below "metrics".
    """

    entries: Sequence[Entry]
    label: str | None = None
    list_name: str | None = None


@dataclass(frozen=True)
class Failure:
    """Why the exit status is not 0: a code for scripts, a sentence for people."""

    code: str
    message: str


@dataclass(frozen=True)
class Report:
    """The result of one command.

    Attributes:
        width: columns of the terminal form.
        flush_right: whether each value ends at the width; else all begin in one column, where the widest just fits.
        list_names: JSON lists that are present even when no section belongs to them; they come after all other keys.
    """

    title: str
    width: int
    sections: Sequence[Section] = ()
    list_names: Sequence[str] = field(default=())
    failure: Failure | None = None
    flush_right: bool = True


def render(report: Report, form: str) -> str:
    """The report as text without colour, with a final newline. ``form`` is one of FORMATS."""
    return to_json(report) if form == "json" else to_terminal(report)


def to_json(report: Report, indent: int | None = 2) -> str:
    """JSON form (on one line where ``indent`` is None); numbers that JSON cannot hold (NaN, infinities) become null."""
    metrics: dict[str, Any] = {}
    lists: dict[str, list[Any]] = {name: [] for name in report.list_names}
    for section in report.sections:
        target: dict[str, Any] = metrics
        if section.list_name is not None:
            target = {}
            lists.setdefault(section.list_name, []).append(target)
        for entry in section.entries:
            *parents, key = entry.key.split(".")
            place = target
            for parent in parents:
                place = place.setdefault(parent, {})
            place[key] = _finite(entry.value)
    document: dict[str, Any] = {"title": report.title, "metrics": {**metrics, **lists}}
    if report.failure is not None:
        document["error"] = {"code": report.failure.code, "message": report.failure.message}
    return json.dumps(document, indent=indent, allow_nan=False) + "\n"


def to_terminal(report: Report) -> str:
    """Terminal form without colour."""
    return "".join(f"{head}{value}\n" for head, value, _ in _lines(report))


def write(report: Report, form: str, stream: TextIO) -> None:
    """Write the report to ``stream``, in colour where people read it."""
    if form == "terminal" and _wants_colour(stream):
        from rich.console import Console
        from rich.text import Text

        text = Text()
        for head, value, style in _lines(report):
            text.append(head, "bold" if not value else "").append(value, style).append("\n")
        Console(file=stream, highlight=False).print(text, end="", soft_wrap=True)
    else:
        stream.write(render(report, form))


def one_line(text: str) -> str:
    """``text`` with every unprintable character escaped, so that it stays on its line and steers no terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _lines(report: Report) -> Iterator[tuple[str, str, str]]:
    """Every line as (head, value, style of the value); headings have no value."""
    yield _centred(report.title, "=", report.width), "", ""
    shown = [_shown(entry) for section in report.sections for entry in section.entries if entry.label is not None]
    widest = max(map(_cells, shown), default=0)
    for section in report.sections:
        if section.label is not None:
            yield _centred(section.label, "-", report.width), "", ""
        for entry in section.entries:
            if entry.label is not None:
                value = _shown(entry)
                gap = report.width - _cells(entry.label) - 1 - (_cells(value) if report.flush_right else widest)
                yield f"{entry.label}:{' ' * max(gap, 1)}", value, _STYLES.get(value, "")
    yield "=" * report.width, "", ""


def _shown(entry: Entry) -> str:
    value = _finite(entry.value) if entry.text is None else entry.text
    if value is None:
        return "N/A"
    return one_line(f"{value:.2f}" if isinstance(value, float) else str(value))


def _centred(text: str, fill: str, width: int) -> str:
    """As str.center does it, but by terminal cells."""
    text = f" {one_line(text)} "
    gap = max(width - _cells(text), 0)
    left = gap // 2 + (gap & width & 1)
    return f"{fill * left}{text}{fill * (gap - left)}"


def _cells(text: str) -> int:
    """Columns that ``text`` takes on a terminal: two for wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1 for c in text
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value


def _wants_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
