"""`lmcache bench tier`: options and report; joined to `lmcache bench` by the entry-point group lmcache.commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from lmcache.benchmark.command import DURATION_S_MAX, GB, INTERRUPTED, WIDTH, BenchCommand, be_quiet, operation_rows
from lmcache_cli.errors import CommandError, Interrupted, UsageFault
from lmcache_cli.render import Entry, Failure, Report, Section

if TYPE_CHECKING:
    from lmcache.benchmark.tier_cleanup import Leftovers, Site
    from lmcache.benchmark.tier_passes import TierResults

TITLE = "Tier Bench Result"
PASSES = 5
PASSES_MAX = 10_000
L1_BYTES_MIN, L1_PASSES = 64 << 20, 4
"""L1 of the private server: room for several passes, so that its window of writes is half a pass."""

MOVES = ("store", "write", "promote", "retrieve")
OPERATIONS = ("store", "write", "lookup", "miss", "promote", "retrieve")
_KEYS = (
    "tier",
    "duration_s",
    "num_passes",
    "chunks",
    *(f"{name}.{key}" for name in OPERATIONS for key in ("num_operations", "latency_ms")),
    *(f"{name}.throughput_gb_per_s" for name in MOVES),
    "failures",
)


@dataclass(frozen=True)
class _Outcome:
    """All that the report tells."""

    shown: Mapping[str, Any]  # the tier in ``/status``
    results: TierResults
    left: Leftovers


@click.command("tier", cls=BenchCommand, title=TITLE, keys=_KEYS)
@click.option("--l2-adapter", metavar="JSON", help="The tier, as `lmcache server` takes it, or @FILE with its JSON.")
@click.option("--l2-path", metavar="DIR", help="Instead: a file tier in a folder of its own inside this one.")
@click.option("--l2-size-gb", type=float, metavar="N", help="Room that --l2-path may take.")
@click.option(
    "--passes", "num_passes", type=click.IntRange(1, PASSES_MAX), help=f"How many passes.  [default: {PASSES}]"
)
@click.option(
    "--duration",
    metavar="SECONDS",
    type=click.FloatRange(0, DURATION_S_MAX, min_open=True),
    help="Instead: begin no further pass after this time, or after 32 GB.",
)
@click.option(
    "--num-tokens", type=click.IntRange(1), default=4096, show_default=True, help="Tokens that one pass stores."
)
@click.option(
    "--bytes-per-token",
    type=click.IntRange(1),
    default=131072,
    show_default=True,
    help="KV of one token; the default is Llama 3 8B's in 16 bits.",
)
@click.option("--chunk-size", type=click.IntRange(1, 65536), default=256, show_default=True, help="Tokens in a chunk.")
def bench_tier(
    l2_adapter: str | None,
    l2_path: str | None,
    l2_size_gb: float | None,
    num_passes: int | None,
    duration: float | None,
    num_tokens: int,
    bytes_per_token: int,
    chunk_size: int,
) -> Report:
    """Store, look up and load through one tier below L1, and check every byte.

    Starts a server of its own with that tier, on free ports of this machine, and is the one engine of it. A pass stores
    chunks that nobody has stored before, waits until the tier has them all, empties L1, looks the chunks up until they
    are back from the tier, retrieves them and compares every byte; then it looks up prompts that nobody stored. 1 GB =
    2^30 bytes; "write" is from L1's first acknowledgement until the tier's last.

    What was stored is removed at the end. A tier in a folder gets one of its own inside it; any other store may push
    out what others keep there when it is full, as it would under a server.

    Exit status 1 when a byte was wrong, the tier cannot be used, or no pass was completed; 130 after ctrl-C.
    """
    from lmcache.benchmark.tier_cleanup import Site

    options = _tier(l2_path, l2_size_gb, l2_adapter)
    _check(num_passes, duration, num_tokens, bytes_per_token, chunk_size)
    be_quiet()
    site = Site(options)
    if num_passes is None and duration is None:
        num_passes = PASSES
    outcome = _run(site, num_passes, duration, num_tokens, bytes_per_token, chunk_size)
    click.get_current_context().meta[INTERRUPTED] = outcome.results.is_interrupted
    return make_report(outcome.shown, outcome.results, outcome.left)


def _run(
    site: Site,
    num_passes: int | None,
    duration: float | None,
    num_tokens: int,
    bytes_per_token: int,
    chunk_size: int,
) -> _Outcome:
    import json

    from lmcache.benchmark.passes import Unattached
    from lmcache.benchmark.tier_cleanup import Leftovers
    from lmcache.benchmark.tier_passes import TierRunner
    from lmcache.benchmark.tier_server import PrivateServer, ServerFailed

    l1_bytes = max(L1_BYTES_MIN, L1_PASSES * num_tokens * bytes_per_token)
    keys: list[bytes] = []
    left = Leftovers(0, 0)
    try:
        with PrivateServer(["--l2-adapter", json.dumps(site.options)], l1_bytes / GB, chunk_size) as server:
            shown = server.wait_tier()
            _check_room(shown, num_tokens * bytes_per_token)
            runner = TierRunner(server, num_tokens, bytes_per_token)
            keys = runner.results.keys
            try:
                runner.measure(num_passes, duration)
            finally:
                runner.close()
    except Unattached as error:
        raise (UsageFault if error.is_usage else CommandError)(str(error)) from None
    except ServerFailed as error:
        raise CommandError(str(error)) from None
    finally:
        left = site.clean(keys)
    return _Outcome(shown, runner.results, left)


def make_report(shown: Mapping[str, Any], results: TierResults, left: Leftovers) -> Report:
    """The report; failed when a byte was wrong, the tier was stuck, or no pass was completed."""
    shape = results.shape
    overview = [
        Entry("tier.type", "Tier", shown["type"]),
        Entry("tier.backend", "Backend", shown["backend"]),
        Entry("tier.place", "Place", shown["base_path"]),
        Entry("duration_s", "Duration (s)", results.elapsed_s),
        Entry("num_passes", "Passes completed", results.num_passes),
        Entry("num_failures", "Passes failed", results.failures.total()),
        Entry("num_passes_compared", "Passes compared byte by byte", results.num_compared),
        Entry("chunk_size", "Chunk size (tokens)", shape.chunk_tokens),
        Entry("tokens_per_pass", "Tokens per pass", shape.num_tokens),
        Entry("bytes_per_token", "Bytes per token", shape.token_bytes),
        Entry("bytes_per_pass", None, shape.pass_bytes),
    ]
    sections = [
        Section(overview),
        Section(_chunks(results, left), "Chunks"),
        Section(operation_rows("store", results.store_s, shape.pass_bytes), "Store (a pass, until L1 has it)"),
        Section(operation_rows("write", results.write_s, shape.pass_bytes), "Write (a pass, until the tier has it)"),
        Section(operation_rows("lookup", results.lookup_s), "Lookup (until the first answer)"),
        Section(operation_rows("miss", results.miss_s), "Lookup of what nobody stored (until the last answer)"),
        Section(operation_rows("promote", results.promote_s, shape.pass_bytes), "Promote (a pass, tier to L1)"),
        Section(operation_rows("retrieve", results.retrieve_s, shape.pass_bytes), "Retrieve (a pass, L1 to engine)"),
        Section([Entry("failures", None, {})]),
    ]
    if results.failures:
        causes = sorted(results.failures.items())
        sections.append(Section([Entry(f"failures.{cause}", cause, count) for cause, count in causes], "Failures"))
    return Report(TITLE, WIDTH, sections, failure=_failure(results))


def _chunks(results: TierResults, left: Leftovers) -> list[Entry]:
    return [
        Entry("chunks.num_stored", "Stored", results.num_stored),
        Entry("chunks.num_kept", "... which the tier took", results.num_kept),
        Entry("chunks.num_refused", "... which it had no room for", results.num_refused),
        Entry("chunks.num_missing", "Taken and not given back", results.num_missing),
        Entry("chunks.num_spoiled", "Spoiled in the tier", results.num_spoiled),
        Entry("chunks.num_wrong", "Checksum failures at retrieve", results.num_wrong_chunks),
        Entry("chunks.num_wrong_passes", "Passes with wrong bytes", results.num_wrong_passes),
        Entry("chunks.num_call_failures", "Failed calls of the tier", results.num_call_failures),
        Entry("chunks.num_timeouts", "Calls beyond their deadline", results.num_timeouts),
        Entry("chunks.num_removed", "Removed from the tier afterwards", left.num_removed),
        Entry("chunks.num_left", "Left in the tier", left.num_left),
        Entry("chunks.left_reason", None, left.reason),
    ]


def _failure(results: TierResults) -> Failure | None:
    num_wrong = results.num_wrong_chunks + results.num_wrong_passes + results.num_spoiled
    if num_wrong:
        return Failure(
            "wrong_bytes",
            f"{results.num_spoiled} objects came back spoiled from the tier, {results.num_wrong_chunks} chunks failed "
            f"their checksum, {results.num_wrong_passes} passes retrieved wrong bytes",
        )
    if results.is_interrupted:
        return Failure(Interrupted.code, "interrupted")
    if results.stuck is not None:
        return Failure(CommandError.code, results.stuck)
    if not results.num_passes:
        causes = ", ".join(f"{cause} ({count})" for cause, count in sorted(results.failures.items()))
        return Failure(CommandError.code, f"no pass was completed: {causes}")
    return None


def _tier(path: str | None, size_gb: float | None, adapter: str | None) -> Mapping[str, object]:
    """The options of the one tier, checked as a server would. Raises UsageFault."""
    from lmcache.errors import ConfigError
    from lmcache.server.tier_options import read_tiers
    from lmcache.tiers import make_tier

    try:
        tiers = read_tiers(path, size_gb, [] if adapter is None else [adapter])
        if len(tiers) != 1:
            raise UsageFault("give either --l2-adapter, or --l2-path with --l2-size-gb")
        make_tier(tiers[0])
    except ConfigError as error:
        raise UsageFault(str(error)) from None
    return tiers[0]


def _check_room(shown: Mapping[str, Any], pass_bytes: int) -> None:
    """Raises UsageFault for a tier that cannot hold what one pass stores."""
    capacity_bytes = shown["max_capacity_bytes"]
    if capacity_bytes is not None and capacity_bytes <= pass_bytes:
        raise UsageFault(f"the tier takes {capacity_bytes} bytes, a pass {pass_bytes} and a little more: too few")


def _check(
    num_passes: int | None, duration: float | None, num_tokens: int, bytes_per_token: int, chunk_size: int
) -> None:
    """Raises UsageFault for options that do not go together."""
    from lmcache.benchmark.passes import PASS_BYTES_MAX

    if num_passes is not None and duration is not None:
        raise UsageFault("give either --passes or --duration")
    if num_tokens * bytes_per_token > PASS_BYTES_MAX:
        raise UsageFault(f"--num-tokens times --bytes-per-token is at most {PASS_BYTES_MAX} bytes")
    if num_tokens % chunk_size:
        raise UsageFault(f"--num-tokens must be a multiple of --chunk-size, {chunk_size}")
