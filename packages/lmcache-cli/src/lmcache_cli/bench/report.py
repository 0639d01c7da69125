"""What is printed of a run's summary: rows for people, and all of it in JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmcache_cli.bench.summary import HIT, KEYS, LIST_NAMES, REQUESTED, STATISTICS
from lmcache_cli.render import Entry, Failure, Report, Section

_WIDTH = 56


def report(summary: Mapping[str, Any]) -> Report:
    """What is printed. The JSON form holds the whole summary; the terminal form the rows that people look for."""
    everything = Section([Entry(key, None, summary[key]) for key in KEYS])
    lists = [
        *_items("Failures", "failures", summary["failures"], lambda f: [("num", f["cause"]), ("message", "Example")]),
        *_items("Notes", "notes", summary["notes"], lambda _: [("message", "Note")]),
    ]
    title = f"Engine Benchmark Result ({summary['workload']})"
    return Report(title, _WIDTH, [everything, *_shown(summary), *lists], LIST_NAMES, _failure(summary))


def _failure(summary: Mapping[str, Any]) -> Failure | None:
    num = summary["num_requests"]
    if summary["is_interrupted"]:
        return Failure("interrupted", "interrupted; the report is on what was done so far")
    if num["failed"]:
        first = summary["failures"][0]
        return Failure(
            "requests_failed",
            f"{num['failed']} of {num['ok'] + num['failed']} requests failed, most of them ({first['num']}) with "
            f"{first['cause']}: {first['message']}",
        )
    if not num["ok"]:
        return Failure("nothing_measured", "no request came to its end, so nothing was measured")
    return None


def _items(
    heading: str,
    name: str,
    items: Sequence[Mapping[str, Any]],
    rows: Callable[[Mapping[str, Any]], list[tuple[str, str]]],
) -> list[Section]:
    """One section an item, under one heading."""
    sections = []
    for index, item in enumerate(items):
        labels = dict(rows(item))
        entries = [Entry(key, labels.get(key), value) for key, value in item.items()]
        sections.append(Section(entries, None if index else heading, name))
    return sections


def _shown(summary: Mapping[str, Any]) -> list[Section]:
    """The rows of the terminal form."""
    sections = [
        _section(summary, "Configuration", _CONFIGURATION, is_always_shown=False),
        _section(summary, "Results", _results(summary)),
        *(_section(summary, label, [(f"{key}.{s}", _LABELS[s]) for s in STATISTICS]) for key, label in _LATENCIES),
    ]
    if summary["rate"]["asked_per_s"] is not None:
        behind = summary["rate"]["is_behind"]
        rows = _section(summary, "Request Rate", _RATE)
        flag = Entry("rate.is_behind", "Fell behind", behind, {True: "yes", False: "no"}.get(behind))
        sections.append(Section([*rows.entries, flag], rows.label))
    if summary["goodput"] is not None:
        limits = ", ".join(f"{metric} <= {limit:g} ms" for metric, limit in summary["goodput"]["limits_ms"].items())
        rows = _section(summary, "Goodput", _GOODPUT)
        asked = Entry("goodput.limits_ms", "Limits", summary["goodput"]["limits_ms"], limits)
        sections.append(Section([asked, *rows.entries], rows.label))
    cold = [(key, label) for key, label in _COLD if _at(summary, key.rsplit(".", 1)[0])["num"]]
    if len(cold) > 1:
        sections.append(_section(summary, "Cold against Warm, TTFT (ms)", cold))
    sections.append(_section(summary, "Cache", _CACHE + (_SERVER if summary["server"] is not None else [])))
    if summary["loop_lag_ms"] is not None:
        sections.append(_section(summary, "Lateness of the Benchmark Itself (ms)", _LAG))
    return sections


def _results(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows of the results; below the unsent requests those of the reasons that there were."""
    rows = []
    for row in _RESULTS:
        rows.append(row)
        if row[0] == "num_requests.unsent":
            rows += [(f"unsent.{key}", label) for key, label in _UNSENT.items() if summary["unsent"][key]]
    return rows


def _section(
    summary: Mapping[str, Any], label: str, rows: Sequence[tuple[str, str]], *, is_always_shown: bool = True
) -> Section:
    entries = []
    for key, name in rows:
        value = _at(summary, key)
        if value is None and not is_always_shown:
            continue
        text = None
        if value is not None and key.endswith(("share", "hit_ratio")):
            text = f"{value:.1%}"
        elif value is not None and key.startswith("server.delta."):
            text = f"{value:.0f}"  # tokens, as a float since counters are
        entries.append(Entry(key, name, value, text))
    return Section(entries, label)


def _at(summary: Mapping[str, Any], path: str) -> Any:
    value: Any = summary
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


_LABELS = {"mean": "Mean", "p50": "P50", "p90": "P90", "p99": "P99", "max": "Max"}
_CONFIGURATION = [
    ("config.engine_url", "Engine URL"),
    ("config.lmcache_url", "LMCache URL"),
    ("model", "Model"),
    ("workload", "Workload"),
    ("pacing.concurrency", "Requests in flight, at most"),
    ("sizing", "Prompt sizes"),
    ("config.seed", "Seed"),
]
_RESULTS = [
    ("num_requests.ok", "Successful requests"),
    ("num_requests.failed", "Failed requests"),
    ("num_requests.cancelled", "Cancelled requests"),
    ("num_requests.unsent", "Unsent requests"),
    ("attempts.retries", "Retries"),
    ("duration_s", "Benchmark duration (s)"),
    ("tokens.input", "Input tokens"),
    ("tokens.output", "Output tokens"),
    ("throughput.requests_per_s", "Request throughput (req/s)"),
    ("throughput.input_tokens_per_s", "Input throughput (tok/s)"),
    ("throughput.output_tokens_per_s", "Output throughput (tok/s)"),
    ("throughput.total_tokens_per_s", "Total throughput (tok/s)"),
]
_UNSENT = {
    "late": "... their time was over",
    "in_flight_max": "... too many in flight",
    "nothing_ready": "... nothing was ready",
    "time_over": "... the duration was over",
    "interrupted": "... interrupted",
}
_LATENCIES = [
    ("ttft_ms", "Time to First Token (ms)"),
    ("tpot_ms", "Time per Output Token (ms)"),
    ("itl_ms", "Inter-Token Latency (ms)"),
    ("e2e_ms", "End-to-End Latency (ms)"),
]
_RATE = [
    ("pacing.arrival", "Arrival"),
    ("rate.asked_per_s", "Asked (req/s)"),
    ("rate.achieved_per_s", "Achieved (req/s)"),
    ("rate.lateness_ms.p90", "P90 lateness (ms)"),
    ("rate.lateness_ms.max", "Max lateness (ms)"),
]
_GOODPUT = [
    ("goodput.num_requests", "Requests within limits"),
    ("goodput.requests_per_s", "Goodput (req/s)"),
    ("goodput.share", "Share of requests"),
]
_COLD = [
    ("ttft_warmup_ms.mean", "Mean, cold (warm-up, one at a time)"),
    ("ttft_cold_ms.mean", "Mean, cold"),
    ("ttft_warm_ms.mean", "Mean, warm"),
    ("ttft_warmup_ms.p50", "P50, cold (warm-up, one at a time)"),
    ("ttft_cold_ms.p50", "P50, cold"),
    ("ttft_warm_ms.p50", "P50, warm"),
]
_CACHE = [("cache.cached_tokens", "Cached tokens (engine)"), ("cache.share", "Share of input tokens")]
_LAG = [(f"loop_lag_ms.{key}", _LABELS[key]) for key in ("p50", "p99", "max")]
_SERVER = [
    (f"server.delta.{REQUESTED}", "Looked up (tokens, server)"),
    (f"server.delta.{HIT}", "Found (tokens, server)"),
    ("server.hit_ratio", "Hit rate (server)"),
]
