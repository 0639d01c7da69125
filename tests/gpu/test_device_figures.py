"""What a GPU's copies reach; figures are printed, bytes are checked. Run alone on an idle machine: nox -s gpu."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from device_engine import ALWAYS_DIRECT, ALWAYS_STAGED, DeviceEngine, llama_layers, sheet  # noqa: E402

from lmcache.transfer import _native  # noqa: E402

ROUNDS = 7
GB = 1e9
WAYS = [pytest.param(ALWAYS_DIRECT, id="direct"), pytest.param(ALWAYS_STAGED, id="staged")]


def median_s(run: Callable[[], None]) -> float:
    """Median of the seconds that the GPU takes from before to after all that ``run`` enqueues and waits for."""
    run()
    spent = []
    for _ in range(ROUNDS):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run()
        torch.cuda.synchronize()
        last.record()
        last.synchronize()
        spent.append(first.elapsed_time(last) / 1000)
    return statistics.median(spent)


def plain_gb_s(num_bytes: int) -> float:
    """What one cudaMemcpyAsync from pinned memory reaches."""
    pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    return num_bytes / GB / median_s(lambda: device.copy_(pinned, non_blocking=True))


@pytest.mark.parametrize("direct_bytes_max", WAYS)
def test_bandwidth_each_way_and_both_at_once(direct_bytes_max: int, capsys: pytest.CaptureFixture[str]) -> None:
    num_chunks = 16
    engine = DeviceEngine(llama_layers(2 * 16 * num_chunks), 16, 2 * num_chunks, direct_bytes_max=direct_bytes_max)
    rows = engine.some_ids(random.Random(1), 2 * num_chunks)
    out, back = torch.cuda.Stream(), torch.cuda.Stream()
    per_plan = min(engine.copier.chunks_max, num_chunks)
    batches = [range(at, min(at + per_plan, num_chunks)) for at in range(0, num_chunks, per_plan)]
    sums: dict[int, int] = {}

    def store() -> None:
        tickets = [(batch, engine.store([rows[i] for i in batch], batch, out)) for batch in batches[:4]]
        for batch, ticket in tickets:
            sums.update(zip(batch, engine.finish(ticket), strict=True))

    def begin_retrieves() -> list[int]:
        targets = [[rows[num_chunks + i] for i in batch] for batch in batches[:4]]
        return [
            engine.retrieve(target, batch, [sums[i] for i in batch], back)
            for batch, target in zip(batches, targets, strict=False)
        ]

    def retrieve() -> None:
        for ticket in begin_retrieves():
            assert all(engine.finish(ticket))

    moved = sum(len(batch) for batch in batches[:4]) * engine.extent_bytes / GB
    one_way, other_way = moved / median_s(store), moved / median_s(retrieve)
    spare = [[num_chunks + i for i in batch] for batch in batches[:4]]

    def both() -> None:
        loads = begin_retrieves()
        stores = [
            engine.store([rows[i] for i in batch], places, out) for batch, places in zip(batches, spare, strict=False)
        ]
        for ticket in loads:
            assert all(engine.finish(ticket))
        for ticket in stores:
            engine.finish(ticket)

    together = 2 * moved / median_s(both)
    plain = plain_gb_s(1 << 28)
    for index in sums:
        assert engine.extent(index).tobytes() == engine.gathered(rows[index])
        assert sums[index] == _native.checksum(engine.extent(index), 0)
    with capsys.disabled():
        print(
            f"\n{torch.cuda.get_device_name()}, 16-token blocks: store {one_way:.1f} GB/s, retrieve {other_way:.1f}, "
            f"both at once {together:.1f}; plain copy from pinned memory {plain:.1f}"
        )


@pytest.mark.parametrize("direct_bytes_max", WAYS)
def test_compute_goes_on_while_a_store_runs(direct_bytes_max: int, capsys: pytest.CaptureFixture[str]) -> None:
    engine = DeviceEngine(llama_layers(64), 16, 4, direct_bytes_max=direct_bytes_max, staging_bytes=128 << 20)
    rows = engine.some_ids(random.Random(2), 4)
    weights = torch.randn(8192, 8192, dtype=torch.float16, device="cuda")
    batch = torch.randn(32, 8192, dtype=torch.float16, device="cuda")
    beside = torch.cuda.Stream()
    results = []

    def decode() -> None:
        results.append((batch @ weights.t() @ weights).float().sum().item())
        for _ in range(200):
            torch.mm(batch, weights)

    def decode_and_store() -> None:
        ticket = engine.store(rows[:2], [0, 1], beside)
        decode()
        engine.finish(ticket)

    alone, with_store = median_s(decode), median_s(decode_and_store)
    assert len(set(results)) == 1
    assert engine.extent(0).tobytes() == engine.gathered(rows[0])
    with capsys.disabled():
        print(f"\ncompute beside a store takes {with_store / alone:.3f} of its time alone ({alone * 1000:.1f} ms)")


def test_break_even_of_the_two_paths(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints, per size of an extent, what 16 of them take each way: DIRECT_BYTES_MAX is where staged becomes faster."""
    lines = []
    for kib in (16, 64, 256, 1024, 4096, 16384):
        times = {}
        for name, limit in (("direct", ALWAYS_DIRECT), ("staged", ALWAYS_STAGED)):
            layers = [sheet((64, 16, 8, 2, kib * 1024 // (16 * 8 * 2)), (0, 1, 2, 3))]
            engine = DeviceEngine(layers, 1, 16, direct_bytes_max=limit, staging_bytes=256 << 20)
            rows = engine.some_ids(random.Random(3), 16)

            def store(engine: DeviceEngine = engine, rows: list[list[int]] = rows) -> None:
                engine.finish(engine.store(rows, range(16), torch.cuda.current_stream()))

            times[name] = median_s(store)
            assert engine.extent(5).tobytes() == engine.gathered(rows[5])
        lines.append(f"{kib:6} KiB: direct {times['direct'] * 1e6:8.0f} us, staged {times['staged'] * 1e6:8.0f} us")
    with capsys.disabled():
        print("\n16 extents of", *lines, sep="\n")
