"""How long the measured requests will take: from the pacing where that decides, else from the first ones that end.

A closed loop takes as long as the engine needs. What is sent before it tells too little: texts are sized, and documents
warmed up, with requests of one output token, one at a time. So it is known once as many measured requests have ended as
are in flight at a time, and at least ``ENDED_MIN``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lmcache_cli.bench.base import Estimate, Outcome, Pacing, Plan

ENDED_MIN = 3


def before(pacing: Pacing, plan: Plan) -> Estimate:
    """What is known before anything is sent."""
    limit_s, rate, num = pacing.duration_s, pacing.rate_per_s, plan.num_requests
    if rate is not None and num is not None and num / rate <= (math.inf if limit_s is None else limit_s):
        return Estimate(num / rate, "rate", f"{num} requests at {rate:g}/s")
    if limit_s is not None:
        return Estimate(limit_s, "duration", "at most; nothing is sent after that")
    ended = _num_needed(pacing)
    if num is None or num <= ended:
        return Estimate(None, "none", "nothing; all requests are sent at once")
    return Estimate(None, "none", f"nothing; known after {ended} requests")


def after(pacing: Pacing, plan: Plan, outcomes: Sequence[Outcome]) -> Estimate | None:
    """What the first measured ``outcomes`` tell of a closed loop; None where they are not exactly as many as it takes,
    one of them failed, or the pacing has decided already."""
    num, ended = plan.num_requests, _num_needed(pacing)
    if pacing.concurrency is None or pacing.duration_s is not None or num is None or not ended == len(outcomes) < num:
        return None
    if any(outcome.failure is not None for outcome in outcomes):
        return None
    mean_s = math.fsum(outcome.e2e_s for outcome in outcomes) / ended
    reason = f"{num} requests, {pacing.concurrency} in flight, if each takes {mean_s:.3g} s as the first {ended} did"
    return Estimate(num * mean_s / pacing.concurrency, "first_requests", reason)


def _num_needed(pacing: Pacing) -> int:
    return max(pacing.concurrency or 1, ENDED_MIN)
