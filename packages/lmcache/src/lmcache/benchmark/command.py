"""`lmcache bench server`: options and report; joined to `lmcache bench` by the entry-point group lmcache.commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lmcache_cli.commands.base import BaseCommand
from lmcache_cli.errors import CommandError, ExitStatus, Interrupted, Unreachable, UsageFault
from lmcache_cli.render import Entry, Failure, Report, Section

if TYPE_CHECKING:
    from lmcache.benchmark.passes import Results

TITLE = "Server Bench Result"
WIDTH = 64
GB = 1 << 30
DURATION_S_MAX = 3600.0
INTERRUPTED = "lmcache.benchmark.is_interrupted"
LATENCIES = ("mean", "p50", "p90", "p99", "max")
_KEYS = (
    *("server", "duration_s", "num_passes", "num_failures", "num_wrong_chunks", "num_passes_compared"),
    *("num_wrong_passes", "chunk_size", "tokens_per_pass", "bytes_per_token", "bytes_per_pass", "host_memory"),
    *(f"{name}.{key}" for name in ("lookup", "store", "retrieve") for key in ("num_operations", "latency_ms")),
    "store.throughput_gb_per_s",
    "retrieve.throughput_gb_per_s",
    "failures",
)


class BenchCommand(BaseCommand):
    """Ctrl-C ends with a result and 130."""

    def invoke(self, ctx: click.Context) -> int:
        status = super().invoke(ctx)
        return ExitStatus.INTERRUPTED if ctx.meta.get(INTERRUPTED) else status


@click.command("server", cls=BenchCommand, title=TITLE, keys=_KEYS)
@click.option(
    "--rpc-url", metavar="URL", default="tcp://localhost:5555", show_default=True, help="RPC port of the server."
)
@click.option(
    "--duration",
    metavar="SECONDS",
    type=click.FloatRange(0, DURATION_S_MAX, min_open=True),
    default=10.0,
    show_default=True,
    help="Begin no further pass but the last after this time.",
)
@click.option(
    "--num-tokens", type=click.IntRange(1), default=512, show_default=True, help="Tokens that one pass stores."
)
@click.option(
    "--bytes-per-token",
    type=click.IntRange(1),
    default=131072,
    show_default=True,
    help="KV of one token; the default is Llama 3 8B's in 16 bits.",
)
def bench_server(rpc_url: str, duration: float, num_tokens: int, bytes_per_token: int) -> Report:
    """Store and retrieve against a running server of this machine, and check every byte.

    One pass after another: store chunks that nobody has stored before, look them up, retrieve them. Copies, checksums
    and messages are those of a serving engine; the memory is the host's. Throughput is bytes over the time that these
    operations took, 1 GB = 2^30 bytes. Checksums are always verified; of the first and the last pass every byte is
    compared, too. The chunks stay in the server until their room is needed, and displace what was used before them.

    Exit status 1 when a byte was wrong, or when no pass was completed; 130 after ctrl-C, with what was done so far.
    """
    from lmcache.benchmark.passes import PASS_BYTES_MAX, Runner, Unattached
    from lmcache.connectors.link import Address

    if num_tokens * bytes_per_token > PASS_BYTES_MAX:
        raise UsageFault(f"--num-tokens times --bytes-per-token is at most {PASS_BYTES_MAX} bytes")
    be_quiet()
    host, port = _address(rpc_url)
    try:
        runner = Runner(Address(host, port), num_tokens, bytes_per_token)
    except Unattached as error:
        if error.is_usage:
            raise UsageFault(str(error)) from None
        raise Unreachable(str(error)) from None
    try:
        results = runner.run(duration)
        click.get_current_context().meta[INTERRUPTED] = results.is_interrupted
        return make_report(results, rpc_url)
    finally:
        runner.close()


def make_report(results: Results, rpc_url: str) -> Report:
    """The report; failed when a byte was wrong, or no pass was completed."""
    shape = results.shape
    memory = f"{shape.num_blocks} blocks x {shape.num_parts} parts x {shape.part_bytes} B"
    overview = [
        Entry("server", "Server", rpc_url),
        Entry("duration_s", "Duration (s)", results.elapsed_s),
        Entry("num_passes", "Passes completed", results.num_passes),
        Entry("num_failures", "Passes failed", results.failures.total()),
        Entry("num_wrong_chunks", "Checksum failures (chunks)", results.num_wrong_chunks),
        Entry("num_passes_compared", "Passes compared byte by byte", results.num_compared),
        Entry("num_wrong_passes", "... of which had wrong bytes", results.num_wrong_passes),
        Entry("chunk_size", "Chunk size (tokens)", shape.chunk_tokens),
        Entry("tokens_per_pass", "Tokens per pass", shape.num_tokens),
        Entry("bytes_per_token", "Bytes per token", shape.token_bytes),
        Entry("bytes_per_pass", None, shape.pass_bytes),
        Entry("host_memory", "Host memory", memory),
    ]
    sections = [
        Section(overview),
        Section(operation_rows("lookup", results.lookup_s), "Lookup"),
        Section(operation_rows("store", results.store_s, shape.pass_bytes), "Store"),
        Section(operation_rows("retrieve", results.retrieve_s, shape.pass_bytes), "Retrieve"),
        Section([Entry("failures", None, {})]),
    ]
    if results.failures:
        causes = sorted(results.failures.items())
        sections.append(Section([Entry(f"failures.{cause}", cause, count) for cause, count in causes], "Failures"))
    return Report(TITLE, WIDTH, sections, failure=_failure(results))


def percentile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest of the sorted values (there is at least one)."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def operation_rows(name: str, seconds: Sequence[float], num_bytes: int | None = None) -> list[Entry]:
    """Number, percentiles and, where ``num_bytes`` moved each time, the throughput of one kind of operation."""
    ordered = sorted(seconds)
    entries = [Entry(f"{name}.num_operations", "Operations", len(ordered))]
    if num_bytes is not None:
        rate = len(ordered) * num_bytes / sum(ordered) / GB if ordered else None
        entries.append(Entry(f"{name}.throughput_gb_per_s", "Throughput (GB/s)", rate))
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    for kind in LATENCIES:
        value = None
        if ordered:
            value = 1e3 * (sum(ordered) / len(ordered) if kind == "mean" else percentile(ordered, shares[kind]))
        text = None if value is None else f"{value:.3f}"
        entries.append(Entry(f"{name}.latency_ms.{kind}", f"Latency {kind} (ms)", value, text))
    return entries


def _failure(results: Results) -> Failure | None:
    if results.num_wrong_chunks or results.num_wrong_passes:
        return Failure(
            "wrong_bytes",
            f"{results.num_wrong_chunks} chunks failed their checksum, "
            f"{results.num_wrong_passes} passes retrieved wrong bytes",
        )
    if results.is_interrupted:
        return Failure(Interrupted.code, "interrupted")
    if not results.num_passes:
        causes = ", ".join(f"{cause} ({count})" for cause, count in sorted(results.failures.items()))
        return Failure(CommandError.code, f"no pass was completed: {causes}")
    return None


def _address(url: str) -> tuple[str, int]:
    host, colon, port = url.removeprefix("tcp://").rpartition(":")
    if not colon or not host or "/" in host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UsageFault(f"--rpc-url: {url!r} is no address such as tcp://localhost:5555")
    return f"tcp://{host}", int(port)


def be_quiet() -> None:
    """What the client logs is in the report; stderr is for the one line that says why it failed."""
    import logging

    log = logging.getLogger("lmcache")
    log.addHandler(logging.NullHandler())
    log.propagate = False
