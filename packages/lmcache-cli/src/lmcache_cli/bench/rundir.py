"""The folder of one run: written while it goes on, read back to compare runs.

`config.json` is there before the first request, `requests.jsonl` gets a line as each request ends, `summary.json` and
`report.html` come at the end, each as a whole or not at all. Every document (every line of `requests.jsonl`) has a
`version`. Times in `requests.jsonl` are seconds since the first send of the run, warm-up included. Prompts and answers
are not stored, only their sizes: they are large, seeded prompts can be made again, and answers may be confidential.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lmcache_cli.bench.base import BenchError, Failure, Outcome, Request
from lmcache_cli.errors import CommandError, UsageFault

VERSION = 1
CONFIG, REQUESTS, SUMMARY, PAGE = "config.json", "requests.jsonl", "summary.json", "report.html"
WARMUP, MEASURED = "warmup", "measured"

_DOCUMENT_BYTES_MAX = 16 << 20
_REQUESTS_BYTES_MAX = 1 << 30
_NAMES_MAX = 1000


class RunFolder:
    """A fresh folder for one run, named after its workload and the time.

    Args:
        output_dir: where it is made; made too if it does not exist.
        workload: a name that can stand in a path.
        config: written to `config.json` at once.

    Attributes:
        path: of the folder.

    Raises:
        UsageFault: it cannot be written; nothing is left behind.
    """

    def __init__(self, output_dir: str, workload: str, config: Mapping[str, Any]) -> None:
        self._start_s: float | None = None
        self._problem: OSError | None = None
        try:
            os.makedirs(output_dir, exist_ok=True)
            self.path = _fresh(Path(output_dir), workload)
            try:
                _replace(self.path / CONFIG, _json({**config, "version": VERSION}))
                # unbuffered: what was recorded is with the system, whatever becomes of this process
                self._requests = open(self.path / REQUESTS, "xb", buffering=0)  # noqa: SIM115
            except OSError:
                _remove(self.path)
                raise
        except (OSError, ValueError) as error:
            raise UsageFault(f"cannot write --output-dir {output_dir}: {_reason(error)}") from error

    def record(self, outcome: Outcome, phase: str) -> None:
        """Append a request that has ended; ``phase`` is WARMUP or MEASURED. A problem is kept for ``finish``.

        The first one recorded sets the zero of all times, so one that was sent before it and ends later has negative
        ones (``load_run`` mends that).
        """
        if self._problem is not None:
            return
        if self._start_s is None:
            self._start_s = outcome.sent_s
        try:
            self._append(_line(outcome, phase, self._start_s))
        except OSError as error:
            self._problem = error

    def finish(
        self,
        warmup: Sequence[Outcome],
        outcomes: Sequence[Outcome],
        summary: Mapping[str, Any],
        page: Callable[[], str],
    ) -> CommandError | None:
        """Write the documents of the end, all that can be written.

        `requests.jsonl` is written once more, exactly from the first send on, unless that would put at risk what is
        there; ``page`` makes the HTML.

        Returns:
            One sentence on what could not be written, or None.
        """
        with contextlib.suppress(OSError):
            self._requests.close()
        sent_s = [o.sent_s for o in (*warmup, *outcomes)]
        start_s = min(sent_s, default=0.0)
        lines = [(o, WARMUP) for o in warmup] + [(o, MEASURED) for o in outcomes]
        documents: list[tuple[str, Callable[[], bytes]]] = [
            (SUMMARY, lambda: _json(summary)),
            (REQUESTS, lambda: b"".join(_line(o, phase, start_s) for o, phase in lines)),
            (PAGE, lambda: page().encode("utf-8", "backslashreplace")),
        ]
        lost: dict[str, OSError] = {}
        for name, content in documents:
            try:
                _replace(self.path / name, content())
            except OSError as error:
                lost[name] = error
        if self._problem is None:
            lost.pop(REQUESTS, None)  # it is complete as it was appended
        if not lost:
            return None
        names = " and ".join(lost)
        return BenchError(f"cannot write {names} in {self.path}: {_reason(next(iter(lost.values())))}")

    def close(self) -> None:
        """Give up without an end: what was recorded stays."""
        with contextlib.suppress(OSError):
            self._requests.close()

    def _append(self, line: bytes) -> None:
        size = self._requests.tell()
        left = memoryview(line)
        try:
            while left:
                left = left[self._requests.write(left) :]
        except OSError:
            self._requests.truncate(size)  # whole lines only
            raise


@dataclass(frozen=True)
class StoredRun:
    """A run as its folder has it.

    Attributes:
        summary: None when the run did not come to its end.
        warmup, outcomes: with times since the first send, and without messages and texts.
    """

    path: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    warmup: Sequence[Outcome]
    outcomes: Sequence[Outcome]


def load_run(path: str) -> StoredRun:
    """Read a run folder.

    A last line that was cut off is left out; keys that are not known are ignored.

    Raises:
        UsageFault: it is no run folder, or one of its files cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageFault(f"{path} is not the folder of a run")
    config = _document(folder / CONFIG)
    if config is None:
        raise UsageFault(f"{path} is not the folder of a run: it has no {CONFIG}")
    phases: dict[str, list[Outcome]] = {WARMUP: [], MEASURED: []}
    for phase, outcome in _outcomes(folder / REQUESTS):
        phases[phase].append(outcome)
    return StoredRun(path, config, _document(folder / SUMMARY), phases[WARMUP], phases[MEASURED])


def _fresh(folder: Path, workload: str) -> Path:
    name = f"lmcache-bench-{workload}-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    for number in range(1, _NAMES_MAX):
        path = folder / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise FileExistsError(None, f"{_NAMES_MAX} runs have begun in this second")


def _remove(path: Path) -> None:
    """Remove a folder that has nothing but our files."""
    with contextlib.suppress(OSError):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON, as a whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    _replace(path, _json(document))


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()


def _line(outcome: Outcome, phase: str, start_s: float) -> bytes:
    request, failure = outcome.request, outcome.failure
    text_s = [round(t - start_s, 6) for t in outcome.text_s]
    document = {
        "version": VERSION,
        "id": request.id,
        "phase": phase,
        "group": request.group,
        "is_first": request.is_first,
        "output_tokens_max": request.output_tokens_max,
        "num_prompt_chars": sum(len(message.get("content", "")) for message in request.messages),
        "due_s": round(outcome.due_s - start_s, 6),
        "sent_s": round(outcome.sent_s - start_s, 6),
        "first_s": text_s[0] if text_s else None,
        "end_s": round(outcome.end_s - start_s, 6),
        "prompt_tokens": outcome.prompt_tokens,
        "output_tokens": outcome.output_tokens,
        "cached_tokens": outcome.cached_tokens,
        "num_answer_chars": len(outcome.text),
        "num_attempts": outcome.num_attempts,
        "failure": None if failure is None else {"cause": failure.cause, "message": failure.message},
        "text_s": text_s,
    }
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def _document(path: Path) -> Mapping[str, Any] | None:
    """A JSON object; None when there is no such file."""
    try:
        with open(path, "rb") as file:
            data = file.read(_DOCUMENT_BYTES_MAX + 1)
        if len(data) > _DOCUMENT_BYTES_MAX:
            raise ValueError(f"it is larger than {_DOCUMENT_BYTES_MAX >> 20} MiB")
        document = json.loads(data)
        if not isinstance(document, dict):
            raise ValueError("it is not a JSON object")
        _check_version(document)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageFault(f"cannot read {path}: {_reason(error)}") from error
    return document


def _outcomes(path: Path) -> Iterator[tuple[str, Outcome]]:
    """The requests of a file, with the phase of each, times since the earliest send."""
    found: list[tuple[str, dict[str, Any]]] = []
    try:
        if path.stat().st_size > _REQUESTS_BYTES_MAX:
            raise ValueError(f"it is larger than {_REQUESTS_BYTES_MAX >> 20} MiB")
        with open(path, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):  # else the process that wrote it was stopped in the middle
                    found.append(_fields(json.loads(line)))
    except FileNotFoundError as error:
        raise UsageFault(f"{path.parent} is not the folder of a run: it has no {REQUESTS}") from error
    except OSError as error:
        raise UsageFault(f"cannot read {path}: {_reason(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageFault(f"cannot read {path}: line {len(found) + 1} is not a request ({_reason(error)})") from error
    start_s = min((fields["sent_s"] for _, fields in found), default=0.0)
    for phase, fields in found:
        times = {key: fields[key] - start_s for key in ("due_s", "sent_s", "end_s")}
        yield phase, Outcome(**{**fields, **times, "text_s": tuple(t - start_s for t in fields["text_s"])})


def _fields(line: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Phase and arguments of an Outcome, checked."""
    _check_version(line)
    phase = line["phase"]
    if phase not in (WARMUP, MEASURED) or not isinstance(line["id"], str):
        raise ValueError("no phase or no id")
    failure = line["failure"]
    return phase, {
        "request": Request(
            line["id"], (), _count(line["output_tokens_max"]) or 0, str(line["group"]), line["is_first"] is True
        ),
        **{key: _number(line[key]) for key in ("due_s", "sent_s", "end_s")},
        "text_s": tuple(map(_number, line["text_s"])),
        **{key: _count(line[key]) for key in ("prompt_tokens", "output_tokens", "cached_tokens")},
        "num_attempts": _count(line["num_attempts"]) or 1,
        "failure": None if failure is None else Failure(str(failure["cause"]), str(failure["message"])),
    }


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("a time is not a number")
    return float(value)


def _count(value: Any) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError("a number of tokens is not one")


def _check_version(document: Mapping[str, Any]) -> None:
    version = document.get("version")
    if version != VERSION:
        raise ValueError(f"version {VERSION} is understood, and it has {version}")


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).rstrip(".")
