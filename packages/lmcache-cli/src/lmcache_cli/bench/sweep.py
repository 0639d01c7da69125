"""Several runs of one workload under growing load: which ones, and one table over all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lmcache_cli.bench import page
from lmcache_cli.errors import UsageFault
from lmcache_cli.render import Entry, Failure, Report, Section

VERSION = 1
DOCUMENT, PAGE = "sweep.json", "sweep.html"
RATE, CONCURRENCY = "rate", "concurrency"
KEYS = ("version", "kind", "workload", "model")
LIST_NAMES = ("points", "notes")

_POINTS_MAX = 100
_WIDTH = 86
_AXES = {RATE: "Rate (req/s)", CONCURRENCY: "In flight"}
_COLUMNS = ("Sent/s", "Done/s", "Tokens/s", "TTFT p50", "TTFT p99", "TPOT p50", "Failed")
_CELLS = (8, 8, 10, 10, 10, 10, 7)


def parse_points(flag: str, text: str, kind: str) -> tuple[float, ...]:
    """The values of `--rates 1,2,4` or `--concurrencies 1,2,4`, in the order given; whole numbers for CONCURRENCY.

    Raises:
        UsageFault: it is no such list.
    """
    values: list[float] = []
    for word in text.split(","):
        try:
            value = float(word) if kind == RATE else int(word)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            wanted = "a number above 0" if kind == RATE else "a whole number above 0"
            raise UsageFault(f"{flag}: '{word.strip()}' is not {wanted}; write for example {flag} 1,2,4")
        if value in values:
            raise UsageFault(f"{flag} names {value:g} twice")
        values.append(value)
    if len(values) > _POINTS_MAX:
        raise UsageFault(f"{flag} names {len(values)} points, more than {_POINTS_MAX}")
    return tuple(values)


def sweep_summary(kind: str, runs: Sequence[tuple[float, str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The content of `sweep.json`.

    Args:
        kind: RATE or CONCURRENCY.
        runs: value, folder and summary of each run, at least one.
    """
    points = [_point(value, folder, summary) for value, folder, summary in runs]
    notes = []
    behind = [f"{p['value']:g}" for p in points if p["is_behind"]]
    if behind:
        message = f"the load fell behind at {', '.join(behind)} requests/s: less was sent than asked for"
        notes.append({"code": "fell_behind", "message": message})
    interrupted = [f"{p['value']:g}" for p in points if p["is_interrupted"]]
    if interrupted:
        notes.append({"code": "interrupted", "message": f"the sweep was interrupted at {interrupted[-1]}"})
    first = runs[0][2]
    return {
        "version": VERSION,
        "kind": kind,
        "workload": first["workload"],
        "model": first["model"],
        "points": points,
        "notes": notes,
    }


def report(sweep: Mapping[str, Any]) -> Report:
    """One row a point."""
    points = [
        Section(
            [
                *(Entry(key, None, value) for key, value in point.items() if key != "value"),
                Entry("value", f"{point['value']:g}", point["value"], _line(_cells(point))),
            ],
            list_name="points",
        )
        for point in sweep["points"]
    ]
    notes = [
        Section([Entry("code", None, note["code"]), Entry("message", "Note", note["message"])], None, "notes")
        for note in sweep["notes"]
    ]
    about = [Entry("version", None, sweep["version"]), Entry("workload", "Workload", sweep["workload"])]
    head = Entry("kind", _AXES[sweep["kind"]], sweep["kind"], _line(_COLUMNS))
    sections = [
        Section([*about, Entry("model", "Model", sweep["model"])]),
        Section([head], "Points, Latencies in ms"),
        *points,
        *notes,
    ]
    return Report(f"Engine Benchmark Sweep ({sweep['workload']})", _WIDTH, sections, LIST_NAMES, _failure(sweep))


def sweep_page(sweep: Mapping[str, Any]) -> str:
    """The page over all points."""
    rows = [(f"{point['value']:g}", *_cells(point)) for point in sweep["points"]]
    return page.sweep_page(sweep, (_AXES[sweep["kind"]], *_COLUMNS), rows)


def _point(value: float, folder: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "value": value,
        "run": folder,
        "num_requests": summary["num_requests"],
        "sent_per_s": summary["rate"]["achieved_per_s"],
        "is_behind": bool(summary["rate"]["is_behind"]),
        "is_interrupted": summary["is_interrupted"],
        "requests_per_s": summary["throughput"]["requests_per_s"],
        "output_tokens_per_s": summary["throughput"]["output_tokens_per_s"],
        "ttft_ms": summary["ttft_ms"],
        "tpot_ms": summary["tpot_ms"],
        "e2e_ms": summary["e2e_ms"],
    }


def _cells(point: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = (
        point["sent_per_s"],
        point["requests_per_s"],
        point["output_tokens_per_s"],
        point["ttft_ms"]["p50"],
        point["ttft_ms"]["p99"],
        point["tpot_ms"]["p50"],
    )
    return (*("N/A" if n is None else f"{n:.2f}" for n in numbers), str(point["num_requests"]["failed"]))


def _line(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, _CELLS, strict=True))


def _failure(sweep: Mapping[str, Any]) -> Failure | None:
    if any(point["is_interrupted"] for point in sweep["points"]):
        return Failure("interrupted", "interrupted; the report is on the points that were begun")
    failed = sum(point["num_requests"]["failed"] for point in sweep["points"])
    if failed:
        return Failure("requests_failed", f"{failed} requests failed in this sweep; the reports of the runs say why")
    if any(not point["num_requests"]["ok"] for point in sweep["points"]):
        return Failure("nothing_measured", "no request came to its end in one of the runs")
    return None
