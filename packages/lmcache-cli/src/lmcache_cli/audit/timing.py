"""Can a tenant feel, by the time of an answer, that another has asked the same? A test with a control.

Three kinds of samples, in random order: a prompt that another tenant has stored, one that nobody has asked, and one
that the same tenant has stored. Before each of them a prompt is stored, so that the engine has done the same. The third
kind is the control: only where it can be told from the second by as many samples do the first two prove anything.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lmcache_cli.audit.statistics import Separation, separation
from lmcache_cli.audit.tenants import FAIL, INCONCLUSIVE, PASS, TIMING, Check, Tenants
from lmcache_cli.verify.greedy import new_salt

OTHERS = "others"
UNSEEN = "unseen"
OWN = "own"

P_SUSPECT = 0.01
"""Below: told apart. The test is then made once more with new samples: chance alone fails one audit in 20,000."""

P_CONTROL = 0.001
_WARM_UP = 3


def check(tenants: Tenants, num_samples: int) -> Check:
    """Take ``num_samples`` of each kind and judge them.

    Raises:
        ServerError: engine or server does not answer.
    """
    _sample(tenants, (OWN, UNSEEN, OTHERS) * _WARM_UP)
    times, leaked = _sample(tenants, (OTHERS, UNSEEN, OWN) * num_samples)
    if leaked:
        return Check(TIMING, FAIL, "another tenant's prompt was served from its cache", {"num_samples": num_samples})
    control = separation(times[OWN], times[UNSEEN])
    found = separation(times[OTHERS], times[UNSEEN])
    figures = _figures(times, found, control, num_samples)
    if control.p_value >= P_CONTROL or control.auc > 0.5:
        detail = (
            "a tenant's own stored prompts are not told from unseen ones, so that the test shows nothing: "
            "use longer prompts or more samples"
        )
        return Check(TIMING, INCONCLUSIVE, detail, figures)
    if found.p_value >= P_SUSPECT:
        return Check(TIMING, PASS, _not_separable(found, control), figures)
    again, leaked = _sample(tenants, (OTHERS, UNSEEN) * num_samples)
    second = separation(again[OTHERS], again[UNSEEN])
    figures = {**figures, "p_value_again": second.p_value, "auc_again": second.auc}
    if leaked or (second.p_value < P_SUSPECT and (second.auc < 0.5) == (found.auc < 0.5)):
        detail = (
            f"another tenant's stored prompts answer {abs(found.shift):.2f} ms "
            f"{'earlier' if found.shift < 0 else 'later'} than unseen ones (p = {found.p_value:.2g}, and again "
            f"{second.p_value:.2g})"
        )
        return Check(TIMING, FAIL, detail, figures)
    return Check(TIMING, PASS, f"{_not_separable(second, control)}; a first suspicion was chance", figures)


def _not_separable(found: Separation, control: Separation) -> str:
    return (
        f"another tenant's stored prompts and unseen ones are not separable (p = {found.p_value:.2g}); "
        f"own ones are (p = {control.p_value:.1g})"
    )


def _sample(tenants: Tenants, kinds: Sequence[str]) -> tuple[dict[str, list[float]], bool]:
    """(milliseconds by kind, whether a hit of another tenant's prompt was reported)."""
    times: dict[str, list[float]] = {kind: [] for kind in (OTHERS, UNSEEN, OWN)}
    leaked = False
    for kind in tenants.shuffled(kinds):
        salt = new_salt()
        stored = tenants.stored(salt)
        prompt = tenants.unseen() if kind == UNSEEN else stored
        answer = tenants.ask(prompt, salt if kind == OWN else new_salt())
        leaked = leaked or (kind != OWN and bool(answer.cached_tokens))
        times[kind].append(answer.seconds * 1e3)
    return times, leaked


def _figures(
    times: Mapping[str, Sequence[float]], found: Separation, control: Separation, num_samples: int
) -> dict[str, Any]:
    return {
        "num_samples": num_samples,
        "p_value": found.p_value,
        "auc": found.auc,
        "auc_low": found.auc_low,
        "auc_high": found.auc_high,
        "shift_ms": found.shift,
        "control_p_value": control.p_value,
        "control_auc": control.auc,
        "control_shift_ms": control.shift,
        **{f"{kind}_median_ms": statistics.median(times[kind]) for kind in (OTHERS, UNSEEN, OWN)},
    }
