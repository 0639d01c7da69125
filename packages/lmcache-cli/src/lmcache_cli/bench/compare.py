"""Two runs of the same requests, compared request by request.

A request counts where it succeeded in both runs. Its difference is B's time minus A's; the mean of the differences has
a 95 % interval from a bootstrap over the pairs (percentiles of the means of resamples, seeded, so that the same runs
give the same interval). The interval is about these requests in these two runs: what changes from run to run on the
same machine is not in it. Throughput is one number a run, so it has a difference and no interval.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from lmcache_cli.bench.base import Outcome
from lmcache_cli.bench.rundir import StoredRun
from lmcache_cli.bench.summary import is_cancelled, percentile, ratio, rounded, values_ms
from lmcache_cli.errors import UsageFault
from lmcache_cli.render import Entry, Failure, Report, Section

_TITLE = "Engine Benchmark Comparison (B against A)"
METRICS = {
    "ttft": "Time to First Token (ms)",
    "tpot": "Time per Output Token (ms)",
    "itl": "Inter-Token Latency, Mean of a Request (ms)",
    "e2e": "End-to-End Latency (ms)",
}
KEYS = (
    *("a", "b", "pairs", "threshold_percent"),
    *(f"{metric}_ms" for metric in METRICS),
    *("throughput", "worse", "is_worse"),
)
LIST_NAMES = ("notes",)

_WIDTH = 64
_RESAMPLES_MAX = 10_000
_DRAWS_MAX = 10_000_000  # half a second of pure Python
_SEED = 42
_DIGITS = 6  # nanoseconds, in ms: what is smaller is the noise of the arithmetic
_PAIRS_MIN = 10  # below this an interval means little
_FREE = frozenset(  # settings that are how and where a run was made, not what was asked
    (
        *("version", "engine_url", "lmcache_url", "model", "output_dir", "timeout", "retries", "goodput", "cacert"),
        *("insecure", "header", "headers", "kv_cache_volume", "tokens_per_gb_kvcache", "lmcache_timeout"),
    )
)
_PACING = frozenset(("concurrency", "request_rate", "arrival", "max_duration"))


def compare(a: StoredRun, b: StoredRun, threshold_percent: float) -> dict[str, Any]:
    """What differs, as JSON values.

    Raises:
        UsageFault: the runs did not ask the same.
    """
    _check(a, b)
    of_a, of_b = ({o.request.id: o for o in run.outcomes if not is_cancelled(o)} for run in (a, b))
    common = [name for name in of_a if name in of_b]
    if not common:
        raise UsageFault(f"{a.path} and {b.path} have no request in common")
    pairs = [(of_a[i], of_b[i]) for i in common if of_a[i].failure is None and of_b[i].failure is None]
    result: dict[str, Any] = {
        "a": _about(a),
        "b": _about(b),
        "pairs": {
            "num": len(pairs),
            "failed_in_a": sum(of_a[i].failure is not None for i in common),
            "failed_in_b": sum(of_b[i].failure is not None for i in common),
            "only_in_a": len(of_a) - len(common),
            "only_in_b": len(of_b) - len(common),
        },
        "threshold_percent": threshold_percent,
        **{f"{metric}_ms": _metric(metric, pairs, threshold_percent) for metric in METRICS},
        "throughput": {
            key: _change(_throughput(a, key), _throughput(b, key)) for key in ("requests_per_s", "output_tokens_per_s")
        },
    }
    more_failed = 100 * (result["pairs"]["failed_in_b"] - result["pairs"]["failed_in_a"]) / len(common)
    result["worse"] = [metric for metric in METRICS if result[f"{metric}_ms"]["is_beyond_threshold"]]
    if more_failed > threshold_percent:
        result["worse"].append("failures")
    result["is_worse"] = bool(result["worse"])
    return {**result, "notes": _notes(a, b, result)}


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean; None for less than two values."""
    num = len(differences)
    if num < 2:
        return None
    draw = random.Random(_SEED).choices
    num_resamples = max(1000, min(_RESAMPLES_MAX, _DRAWS_MAX // num))
    means = sorted(sum(draw(differences, k=num)) / num for _ in range(num_resamples))
    return percentile(means, 2.5), percentile(means, 97.5)


def report(result: Mapping[str, Any]) -> Report:
    """What is printed; exit 1 where B is worse beyond the threshold."""
    pairs = result["pairs"]
    sections = [
        Section([Entry(key, None, result[key]) for key in KEYS]),
        Section(
            [
                Entry("a.path", "A", result["a"]["path"]),
                Entry("b.path", "B", result["b"]["path"]),
                Entry("a.workload", "Workload", result["a"]["workload"]),
            ],
            "Runs",
        ),
        Section(
            [
                Entry("pairs.num", "Compared, successful in both", pairs["num"]),
                Entry("pairs.failed_in_a", "Failed in A", pairs["failed_in_a"]),
                Entry("pairs.failed_in_b", "Failed in B", pairs["failed_in_b"]),
                Entry("pairs.only_in_a", "Only in A", pairs["only_in_a"]),
                Entry("pairs.only_in_b", "Only in B", pairs["only_in_b"]),
            ],
            "Requests",
        ),
        *(_section(f"{metric}_ms", label, result[f"{metric}_ms"]) for metric, label in METRICS.items()),
        Section(
            [
                Entry(f"throughput.{key}", label, result["throughput"][key], _shown_change(result["throughput"][key]))
                for key, label in (("requests_per_s", "Requests/s"), ("output_tokens_per_s", "Output tokens/s"))
            ],
            "Throughput, without an Interval",
        ),
        *(
            Section(
                [Entry("code", None, note["code"]), Entry("message", "Note", note["message"])],
                None if index else "Notes",
                "notes",
            )
            for index, note in enumerate(result["notes"])
        ),
    ]
    return Report(_TITLE, _WIDTH, sections, LIST_NAMES, _failure(result))


def _check(a: StoredRun, b: StoredRun) -> None:
    for key in sorted({*a.config, *b.config} - _FREE - _PACING, key=lambda k: (k != "workload", k)):
        if a.config.get(key) != b.config.get(key):
            raise UsageFault(
                f"the runs cannot be compared: {key} is {a.config.get(key)!r} in {a.path} and "
                f"{b.config.get(key)!r} in {b.path}"
            )
    documents = [(run.summary or {}).get("plan", {}).get("documents") for run in (a, b)]
    if None not in documents and documents[0] != documents[1]:
        raise UsageFault(
            f"the runs cannot be compared: {a.path} was made of {documents[0]} and {b.path} of {documents[1]} "
            "(see --kv-cache-volume and --tokens-per-gb-kvcache)"
        )


def _about(run: StoredRun) -> dict[str, Any]:
    summary = run.summary or {}
    keys = ("model", "started_at", "versions")
    return {"path": run.path, "workload": run.config.get("workload"), **{key: summary.get(key) for key in keys}}


def _metric(metric: str, pairs: Sequence[tuple[Outcome, Outcome]], threshold_percent: float) -> dict[str, Any]:
    values = [(values_ms(a)[metric], values_ms(b)[metric]) for a, b in pairs]
    known = [(a, b) for a, b in values if a is not None and b is not None]
    if not known:
        keys = ("mean_a", "mean_b", "difference", "low", "high", "percent", "verdict")
        return {"num": 0, **dict.fromkeys(keys), "is_beyond_threshold": False}
    mean_a, mean_b = (math.fsum(side) / len(known) for side in zip(*known, strict=True))
    bounds = interval([round(b - a, _DIGITS) for a, b in known])
    verdict = "no difference shown"
    if bounds is not None and (bounds[0] > 0 or bounds[1] < 0):
        verdict = "worse" if bounds[0] > 0 else "better"
    return {
        "num": len(known),
        "mean_a": rounded(mean_a),
        "mean_b": rounded(mean_b),
        "difference": rounded(mean_b - mean_a),
        "low": None if bounds is None else rounded(bounds[0]),
        "high": None if bounds is None else rounded(bounds[1]),
        "percent": _percent(mean_a, mean_b),
        "verdict": verdict,
        "is_beyond_threshold": verdict == "worse"
        and bounds is not None
        and bounds[0] > mean_a * threshold_percent / 100,
    }


def _throughput(run: StoredRun, key: str) -> float | None:
    """From the requests themselves, so that a run without its end has it too."""
    ok = [o for o in run.outcomes if o.failure is None]
    if not ok:
        return None
    seconds = max(o.end_s for o in run.outcomes) - min(o.sent_s for o in run.outcomes)
    if key == "requests_per_s":
        return ratio(len(ok), seconds)
    tokens = [o.output_tokens for o in ok if o.output_tokens is not None]
    return ratio(sum(tokens), seconds) if len(tokens) == len(ok) else None


def _change(a: float | None, b: float | None) -> dict[str, float | None]:
    return {
        "a": a,
        "b": b,
        "difference": None if a is None or b is None else rounded(b - a),
        "percent": _percent(a, b),
    }


def _percent(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None or not a else rounded(100 * (b - a) / a)


def _notes(a: StoredRun, b: StoredRun, result: Mapping[str, Any]) -> list[dict[str, str]]:
    notes = {}
    if result["a"]["model"] != result["b"]["model"]:
        notes["models_differ"] = f"A asked model {result['a']['model']}, B {result['b']['model']}"
    changed = sorted(key for key in _PACING if a.config.get(key) != b.config.get(key))
    if changed:
        shown = ", ".join(f"{key} {a.config.get(key)} and {b.config.get(key)}" for key in changed)
        notes["pacing_differs"] = f"the load was not the same in A and B: {shown}"
    if result["pairs"]["num"] < _PAIRS_MIN:
        notes["few_pairs"] = f"{result['pairs']['num']} requests are few: the intervals are too narrow"
    for name, run in (("A", a), ("B", b)):
        if run.summary is None or run.summary.get("is_interrupted"):
            notes[f"unfinished_{name.lower()}"] = f"run {name} did not come to its end"
    return [{"code": code, "message": message} for code, message in notes.items()]


def _failure(result: Mapping[str, Any]) -> Failure | None:
    if not result["is_worse"]:
        return None
    said = []
    for metric in result["worse"]:
        if metric == "failures":
            said.append(f"failed requests {result['pairs']['failed_in_b']} against {result['pairs']['failed_in_a']}")
        else:
            found = result[f"{metric}_ms"]
            said.append(f"{metric} {found['percent']:+.1f} %, {found['low']:.2f} ms or more")
    return Failure("worse", f"B is worse by more than {result['threshold_percent']:g} %: {', '.join(said)}")


def _section(key: str, label: str, found: Mapping[str, Any]) -> Section:
    low, high, percent = found["low"], found["high"], found["percent"]
    bounds = None if low is None else f"{low:+.2f} to {high:+.2f}"
    return Section(
        [
            Entry(f"{key}.mean_a", "Mean of A", found["mean_a"]),
            Entry(f"{key}.mean_b", "Mean of B", found["mean_b"]),
            Entry(f"{key}.difference", "Difference", found["difference"], _signed(found["difference"])),
            Entry(f"{key}.low", "95 % interval", low, bounds),
            Entry(f"{key}.percent", "Difference (%)", percent, _signed(percent)),
            Entry(f"{key}.verdict", "B is", found["verdict"]),
        ],
        label,
    )


def _signed(value: float | None) -> str | None:
    return None if value is None else f"{value:+.2f}"


def _shown_change(change: Mapping[str, float | None]) -> str | None:
    if change["percent"] is None:
        return "N/A"
    return f"{change['a']:.2f} -> {change['b']:.2f} ({change['percent']:+.1f} %)"
