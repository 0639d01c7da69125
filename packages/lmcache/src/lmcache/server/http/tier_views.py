"""Tiers as the HTTP API shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmcache.cache.quarantine import NAMED_MAX
from lmcache.server import report
from lmcache_cli import api

if TYPE_CHECKING:
    from lmcache.cascade.run import TierState


def adapter(state: TierState) -> api.L2Adapter:
    """One entry of ``/status``."""
    usage, tier = state.usage, state.tier
    free_slots = None
    if usage.num_slots is not None and usage.num_objects is not None:
        free_slots = usage.num_slots - usage.num_objects
    return api.L2Adapter(
        is_healthy=state.is_up,
        type=tier.kind,
        name=state.name,
        reason=state.problem,
        backend=tier.backend,
        base_path=tier.place,
        stored_object_count=usage.num_objects,
        pool_size=usage.num_slots,
        pool_free_slots=free_slots,
        current_size_bytes=usage.used_bytes,
        max_capacity_bytes=usage.capacity_bytes,
    )


def with_quarantined(found_at_use: Sequence[dict[str, Any]], states: Sequence[TierState]) -> list[dict[str, Any]]:
    """The last chunks that were not what was stored, at use (from the core) or at promotion, the newest first."""
    found = list(found_at_use)
    for state in states:
        for each in state.quarantined:
            found.append(api.to_json(report.quarantined(each, "promotion", state.name)))
    return sorted(found, key=lambda each: float(each["age_s"]))[:NAMED_MAX]
