"""The numbers of one run: the content of `summary.json`.

Definitions, the same everywhere:

- A percentile p of n sorted values lies at position (n - 1) * p / 100, linearly between its two neighbours.
- Latencies are those of successful requests; TTFT, TPOT and end-to-end latency are ``base.Outcome``'s, one value a
  request; ITL is the time between two successive arrivals of text, all gaps of all requests together.
- Throughput is what successful requests read and wrote, over the time from the first send to the last byte of any.
- A number that was not measured, or that the engine did not report for every request that it is about, is None.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from lmcache_cli.bench.base import CANCELLED, UNSENT_REASONS, Outcome, Run
from lmcache_cli.errors import UsageFault

VERSION = 1
GOODPUT_METRICS = ("ttft", "tpot", "itl", "e2e")
KEYS = (  # of the report in JSON, for the document of a run that could not be carried out
    *("version", "workload", "model", "started_at", "ended_at", "is_interrupted", "config", "plan", "pacing", "sizing"),
    *("versions", "host", "estimate", "duration_s", "num_requests", "unsent", "warmup", "attempts", "tokens"),
    *("throughput", "rate"),
    *("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "ttft_cold_ms", "ttft_warm_ms", "ttft_warmup_ms"),
    *("goodput", "cache", "server", "loop_lag_ms"),
)
LIST_NAMES = ("failures", "notes")

FOUND_COLD_MAX = 0.5
"""Share of first-time prompts that may be cached: a system prompt that they share is, from the second one on."""

STATISTICS = ("mean", "p50", "p90", "p99", "max")
_BEHIND_RATIO = 0.95  # sent more slowly than this share of the schedule
LAG_P99_MS_MAX = 5.0
"""What the times of a run may be off by; see docs/bench.md."""
_BEHIND_S = 0.1  # or a tenth of the requests later than this
HIT, REQUESTED = "lookup_hit_tokens", "lookup_requested_tokens"


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The percentile (see above) of values in ascending order, at least one."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def statistics(values: Iterable[float]) -> dict[str, float | None]:
    """{mean, p50, p90, p99, max}; all None where there are no values."""
    ordered = sorted(values)
    if not ordered:
        return dict.fromkeys(STATISTICS)
    middle = {f"p{p}": rounded(percentile(ordered, p)) for p in (50, 90, 99)}
    return {"mean": rounded(math.fsum(ordered) / len(ordered)), **middle, "max": rounded(ordered[-1])}


def rounded(value: float) -> float:
    """``value`` with nine digits: what was measured has no more."""
    return float(f"{value:.9g}")


def ratio(part: float | None, whole: float | None) -> float | None:
    """``part / whole``; None where either is unknown or the whole is 0."""
    return None if part is None or not whole else rounded(part / whole)


def gaps_ms(outcome: Outcome) -> list[float]:
    """Milliseconds between successive arrivals of text."""
    times = outcome.text_s
    return [(after - before) * 1e3 for before, after in itertools.pairwise(times)]


def values_ms(outcome: Outcome) -> dict[str, float | None]:
    """TTFT, TPOT and end-to-end latency of one request; ITL as the mean of its gaps."""
    gaps = gaps_ms(outcome)
    return {
        "ttft": _ms(outcome.ttft_s),
        "tpot": _ms(outcome.tpot_s),
        "itl": math.fsum(gaps) / len(gaps) if gaps else None,
        "e2e": _ms(outcome.e2e_s),
    }


def is_cancelled(outcome: Outcome) -> bool:
    """Whether the run was ended while the request was in flight: it neither succeeded nor failed."""
    return outcome.failure is not None and outcome.failure.cause == CANCELLED


def parse_goodput(text: str) -> dict[str, float]:
    """Limits in ms by metric, of text such as `ttft:500 tpot:50` (separated by spaces or commas).

    Raises:
        UsageFault: it does not read like that.
    """
    limits: dict[str, float] = {}
    for word in text.replace(",", " ").split():
        name, colon, number = word.partition(":")
        if not colon or name not in GOODPUT_METRICS:
            raise UsageFault(
                f"--goodput does not know '{word}': it takes METRIC:MS with {', '.join(GOODPUT_METRICS)}, "
                "as in 'ttft:500 tpot:50'"
            )
        if name in limits:
            raise UsageFault(f"--goodput names {name} twice")
        try:
            limits[name] = float(number)
        except ValueError:
            limits[name] = math.nan
        if not (math.isfinite(limits[name]) and limits[name] > 0):
            raise UsageFault(f"--goodput: '{number}' is not a number of milliseconds above 0")
    if not limits:
        raise UsageFault("--goodput names no limit; write for example 'ttft:500 tpot:50'")
    return limits


def summarise(run: Run, goodput: Mapping[str, float] | None) -> dict[str, Any]:
    """The content of `summary.json`: JSON values only, times in the units that the keys name.

    Args:
        goodput: limits in ms by metric, see ``parse_goodput``.
    """
    ok = [o for o in run.outcomes if o.failure is None]
    failed = [o for o in run.outcomes if o.failure is not None and not is_cancelled(o)]
    duration_s = run.duration_s
    input_tokens, output_tokens = _sum(o.prompt_tokens for o in ok), _sum(o.output_tokens for o in ok)
    both = None if input_tokens is None or output_tokens is None else input_tokens + output_tokens
    num_attempts = sum(o.num_attempts for o in run.outcomes)
    summary: dict[str, Any] = {
        "version": VERSION,
        "workload": run.config.get("workload"),
        "model": run.model,
        "started_at": run.started_at,
        "ended_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "is_interrupted": run.is_interrupted,
        "config": dict(run.config),
        "plan": _plan(run),
        "pacing": asdict(run.pacing),
        "sizing": run.sizing,
        "versions": dict(run.versions),
        "host": {**this_host(), **run.host},
        "estimate": None if run.estimate is None else asdict(run.estimate),
        "duration_s": None if duration_s is None else rounded(duration_s),
        "num_requests": {
            "ok": len(ok),
            "failed": len(failed),
            "cancelled": len(run.outcomes) - len(ok) - len(failed),
            "unsent": sum(run.unsent.values()),
        },
        "unsent": {reason: run.unsent.get(reason, 0) for reason in UNSENT_REASONS},
        "warmup": {"ok": _num_ok(run.warmup), "failed": len(run.warmup) - _num_ok(run.warmup)},
        "attempts": {"total": num_attempts, "retries": num_attempts - len(run.outcomes)},
        "tokens": {"input": input_tokens, "output": output_tokens},
        "throughput": {
            "requests_per_s": ratio(len(ok), duration_s),
            "input_tokens_per_s": ratio(input_tokens, duration_s),
            "output_tokens_per_s": ratio(output_tokens, duration_s),
            "total_tokens_per_s": ratio(both, duration_s),
        },
        "rate": _rate(run),
        **_latencies(ok, run.warmup),
        "goodput": None if goodput is None else _goodput(ok, len(ok) + len(failed), duration_s, goodput),
        "cache": _cache(ok, input_tokens),
        "server": _server(run),
        "loop_lag_ms": _loop_lag(run),
        "failures": _failures(failed),
    }
    firsts = [o for o in (*run.warmup, *ok) if o.failure is None and o.request.is_first]
    return {**summary, "notes": _notes(summary, firsts)}


def this_host() -> dict[str, Any]:
    """What the numbers were taken on: the machine that sent the requests."""
    return {
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _sum(values: Iterable[int | None]) -> int | None:
    """The sum; None when one is unknown, or when there are none."""
    known = list(values)
    return None if not known or None in known else sum(value or 0 for value in known)


def _num_ok(outcomes: Sequence[Outcome]) -> int:
    return sum(o.failure is None for o in outcomes)


def _plan(run: Run) -> dict[str, Any]:
    return {**asdict(run.plan), "documents": dict(run.plan.documents)}


def _latencies(ok: Sequence[Outcome], warmup: Sequence[Outcome]) -> dict[str, Any]:
    each = [values_ms(o) for o in ok]
    firsts = [o for o in warmup if o.failure is None and o.request.is_first]
    found: dict[str, Any] = {f"{m}_ms": statistics(_known(v[m] for v in each)) for m in ("ttft", "tpot")}
    found["itl_ms"] = statistics(gap for o in ok for gap in gaps_ms(o))
    found["e2e_ms"] = statistics(_known(v["e2e"] for v in each))
    for name, some in (
        ("cold", [o for o in ok if o.request.is_first]),
        ("warm", [o for o in ok if not o.request.is_first]),
        ("warmup", firsts),
    ):
        values = _known(_ms(o.ttft_s) for o in some)
        found[f"ttft_{name}_ms"] = {"num": len(values), **statistics(values)}
    return found


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _rate(run: Run) -> dict[str, Any]:
    """Of the open loop: the rate asked for, that of the schedule made from it (random with `poisson`), and that of the
    sends: requests before the last moment of the schedule, over the time to it."""
    keys = ("asked_per_s", "scheduled_per_s", "achieved_per_s", "is_behind")
    if run.pacing.rate_per_s is None or not run.outcomes:
        return {**dict.fromkeys(keys), "asked_per_s": run.pacing.rate_per_s, "lateness_ms": statistics([])}
    first_due, last_due = min(o.due_s for o in run.outcomes), max(o.due_s for o in run.outcomes)
    num_before = sum(o.due_s < last_due for o in run.outcomes) or None
    first_sent = min(o.sent_s for o in run.outcomes)
    last_sent = min(o.sent_s for o in run.outcomes if o.due_s == last_due)
    scheduled, achieved = ratio(num_before, last_due - first_due), ratio(num_before, last_sent - first_sent)
    lateness_ms = statistics((o.sent_s - o.due_s) * 1e3 for o in run.outcomes)
    share = ratio(achieved, scheduled)
    is_slow = share is not None and share < _BEHIND_RATIO
    is_late = (lateness_ms["p90"] or 0.0) > _BEHIND_S * 1e3
    rates = (run.pacing.rate_per_s, scheduled, achieved, is_slow or is_late)
    return {**dict(zip(keys, rates, strict=True)), "lateness_ms": lateness_ms}


def _goodput(
    ok: Sequence[Outcome], num_ended: int, duration_s: float | None, limits: Mapping[str, float]
) -> dict[str, Any]:
    """Requests that kept every limit. `itl` is about a request's longest gap. A request without text keeps no limit on
    `ttft`; one of a single token has no TPOT, and keeps any. The share is of all that ended, failures included."""
    is_known = "tpot" not in limits or all(o.output_tokens is not None for o in ok)
    good = sum(all(_keeps(o, metric, limit) for metric, limit in limits.items()) for o in ok) if is_known else None
    return {
        "limits_ms": dict(limits),
        "num_requests": good,
        "requests_per_s": ratio(good, duration_s),
        "share": ratio(good, num_ended),
    }


def _keeps(outcome: Outcome, metric: str, limit_ms: float) -> bool:
    if metric == "itl":
        return max(gaps_ms(outcome), default=0.0) <= limit_ms
    value = values_ms(outcome)[metric]
    return metric != "ttft" if value is None else value <= limit_ms


def _cache(ok: Sequence[Outcome], input_tokens: int | None) -> dict[str, Any]:
    """What the engine says it did not compute. Engines leave the number out where it is 0, so once one request has it,
    it counts as 0 for the others."""
    reported = [o.cached_tokens for o in ok if o.cached_tokens is not None]
    cached = sum(reported) if reported else None
    return {"cached_tokens": cached, "share": ratio(cached, input_tokens), "num_reporting": len(reported)}


def _server(run: Run) -> dict[str, Any] | None:
    if run.server_before is None or run.server_after is None:
        return None
    before, after = ({k: v for k, v in c.items() if math.isfinite(v)} for c in (run.server_before, run.server_after))
    changes = {key: after[key] - before[key] for key in after if key in before}
    delta: dict[str, float | None] = {REQUESTED: None, HIT: None, **changes}
    return {
        "before": before,
        "after": after,
        "delta": delta,
        "hit_ratio": ratio(delta.get(HIT), delta.get(REQUESTED)),
    }


def _loop_lag(run: Run) -> dict[str, Any] | None:
    found = run.loop_lag
    if found is None:
        return None
    return {"num": found.num, "p50": found.p50_ms, "p99": found.p99_ms, "max": rounded(found.max_ms)}


def _failures(failed: Sequence[Outcome]) -> list[dict[str, Any]]:
    counts = Counter(o.failure.cause for o in failed if o.failure is not None)
    examples = {o.failure.cause: o.failure.message for o in reversed(failed) if o.failure is not None}
    return [{"cause": cause, "num": num, "message": examples[cause]} for cause, num in counts.most_common()]


def _notes(summary: Mapping[str, Any], firsts: Sequence[Outcome]) -> list[dict[str, str]]:
    """What a reader of the numbers has to know; ``firsts`` are the requests that nothing had been sent for before."""
    notes: dict[str, str] = {}
    num, rate = summary["num_requests"], summary["rate"]
    if summary["is_interrupted"]:
        notes["interrupted"] = (
            f"the run was interrupted: the numbers are of the {num['ok'] + num['failed']} requests that had ended"
        )
    if rate["is_behind"]:
        achieved = "N/A" if rate["achieved_per_s"] is None else f"{rate['achieved_per_s']:.2f}"
        notes["fell_behind"] = (
            f"the load fell behind: {achieved} requests/s were sent where {rate['asked_per_s']:g} were asked for, "
            f"a tenth of them more than {rate['lateness_ms']['p90']:.0f} ms late"
        )
    lag_ms = summary["loop_lag_ms"]
    if lag_ms is not None and lag_ms["p99"] > LAG_P99_MS_MAX:
        notes["ran_late"] = (
            f"the benchmark itself ran late, by {lag_ms['p99']:.1f} ms or more one time in a hundred and at most "
            f"{lag_ms['max']:.0f} ms, so times may be untrue by as much: give it a core of its own, or less load"
        )
    if num["ok"] and None in summary["tokens"].values():
        notes["no_usage"] = "the engine did not report the tokens of every request, so what depends on them is unknown"
    if summary["warmup"]["failed"]:
        notes["warmup_failed"] = (
            f"{summary['warmup']['failed']} requests of the warm-up failed: what they were to fill may have been cold"
        )
    if sum(o.cached_tokens or 0 for o in firsts) > FOUND_COLD_MAX * sum(o.prompt_tokens or 0 for o in firsts):
        notes["not_cold"] = (
            "most of what was sent for the first time was in a cache already, as after a run with the same seed: what "
            "is called cold here was not"
        )
    return [{"code": code, "message": message} for code, message in notes.items()]
