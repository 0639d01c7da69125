"""What is counted, each name once: plain integers in the core, Prometheus families in the service.

Counters only grow; ``lmcache_mp_<name>_total`` is how Prometheus sees one, ``lmcache_mp_<name>`` a gauge.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PREFIX = "lmcache_mp_"


def _of(meaning: str) -> Any:
    return field(default=0, metadata={"help": meaning})


@dataclass(slots=True)
class Counters:
    """Events since the core started."""

    lookups: int = _of("Lookups answered; repetitions for the same request are left out")
    lookup_requested_tokens: int = _of("Tokens whose chunks were looked up")
    lookup_hit_tokens: int = _of("Tokens of the prefixes that were found")
    leases: int = _of("Leases granted to lookups")
    retrieves: int = _of("Leases released by their owner")
    reserved_chunks: int = _of("Extents granted to writers")
    full_chunks: int = _of("Chunks not admitted because the pool was full")
    stores: int = _of("Reservations committed")
    stored_chunks: int = _of("Extents committed")
    aborts: int = _of("Reservations given back unpublished")
    evicted_chunks: int = _of("Entries evicted to make room")
    quarantined_chunks: int = _of("Entries taken out because their bytes failed the check at use")
    promotions: int = _of("Prompts looked for in the tiers below L1")
    abandoned_promotions: int = _of("Promotions that nobody waited for any more")
    lost_chunks: int = _of("Entries that no tier got: they left L1 before, or are too large to be pinned")
    adopted_chunks: int = _of("Entries taken over from the server before this one")
    expired_leases: int = _of("Leases that ended by their time")
    expired_reservations: int = _of("Reservations that ended by their time")
    shortened_lookups: int = _of("Lookups answered shorter because of the cap on leased bytes")
    attaches: int = _of("Processes that attached")
    detaches: int = _of("Attached processes that ended")
    attach_refusals: int = _of("Processes that were not let in")
    requests: int = _of("Well-formed requests received")
    refused: int = _of("Requests answered with a typed refusal")
    malformed: int = _of("Frames that were not understood")
    unsent: int = _of("Answers dropped because their receiver did not read, or was gone from tcp")
    reopened_doors: int = _of("Times that all tcp connections were ended because they filled memory")
    faults: int = _of("Requests that failed by a fault of the server")
    http_refused: int = _of("HTTP requests turned away for want of a token, a role or a local origin")
    service_restarts: int = _of("Restarts of the service process")


@dataclass(slots=True)
class Gauges:
    """How things stand now."""

    l1_memory_usage_bytes: int = _of("Bytes of L1 that hold or await a chunk")
    l1_memory_total_bytes: int = _of("Bytes of L1")
    l1_memory_ready_bytes: int = _of("Bytes of L1 whose memory exists already")
    l1_memory_leased_bytes: int = _of("Bytes of L1 pinned by leases")
    l1_usage_ratio: float = _of("Used bytes over total bytes of L1")
    l1_chunks: int = _of("Entries of the index")
    unwritten_chunks: int = _of("Entries that wait to be written to the tiers below L1")
    attached_processes: int = _of("Processes attached now")
    active_sessions: int = _of("Leases and reservations held now")
    uptime_seconds: float = _of("Seconds since the core started")
