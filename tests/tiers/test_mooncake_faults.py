"""What happens to the mooncake tier when its master or a node dies, stops, fills up or comes back."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import signal
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from mooncake_running import Master, free_ports, master, node
from remote_objects import HANG_S, NOBODY, blank, holds, made, opened, size
from stopping import stop

from lmcache.errors import ConfigError, TierError
from lmcache.tiers import make_tier
from lmcache.tiers.base import Share, Tier

pytest.importorskip("mooncake")

TIMEOUT_S = 2.0
"""Of the first tier of this process: the library reads its deadlines once."""


def run(main: Coroutine[Any, Any, None]) -> None:
    """A test's body, which may not hang."""
    asyncio.run(asyncio.wait_for(main, 2 * HANG_S))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Master]:
    with master(tmp_path) as running:
        yield running


def options(store: Master, **more: object) -> dict[str, object]:
    return {"type": "mooncake", "master": store.address, "timeout_s": TIMEOUT_S, **more}


async def stored_at_last(tier: Tier, name: str) -> None:
    """Put objects until the store takes one and gives it back; it may say no or fail while it comes up again."""
    for attempt in range(int(HANG_S * 10)):
        key, parts = made((name, attempt))
        with contextlib.suppress(TierError):
            if await tier.put(key, parts, NOBODY) and await holds(tier, key, parts):
                return
        await asyncio.sleep(0.1)
    pytest.fail("the store did not come back")


async def all_fail(tier: Tier, key: bytes, parts: list[memoryview]) -> None:
    """Every call raises the error that the framework expects."""
    with pytest.raises(TierError, match="master"):
        await tier.contains([key])
    with pytest.raises(TierError, match="master"):
        await tier.get(key, blank(parts))
    with pytest.raises(TierError, match="master"):
        await tier.put(key, parts, NOBODY)
    with pytest.raises(TierError, match="master"):
        await tier.delete([key])


def test_a_killed_master_fails_calls_and_a_new_one_is_joined_without_our_restart(store: Master) -> None:
    async def main() -> None:
        with node(store.address):
            async with opened(options(store)) as tier:
                key, parts = made("before")
                assert await tier.put(key, parts, NOBODY)
                store.kill()
                await all_fail(tier, key, parts)
                store.start()
                await stored_at_last(tier, "after")
                assert await tier.contains([key]) == [0]
                assert not await tier.get(key, blank(parts))

    run(main())


def test_a_stopped_master_fails_calls_and_its_objects_are_there_when_it_goes_on(store: Master) -> None:
    async def main() -> None:
        with node(store.address):
            async with opened(options(store)) as tier:
                key, parts = made("kept")
                assert await tier.put(key, parts, NOBODY)
                store.pause()
                other = made("other")
                await all_fail(tier, *other)
                store.resume()
                await stored_at_last(tier, "after")
                assert await holds(tier, key, parts)

    run(main())


def test_a_node_that_dies_takes_its_objects_along_and_another_takes_new_ones(store: Master) -> None:
    async def main() -> None:
        async with opened(options(store)) as tier:
            key, parts = made("gone")
            with node(store.address):
                assert await tier.put(key, parts, NOBODY)
            with contextlib.suppress(TierError):
                assert not await tier.get(key, blank(parts))
            with node(store.address):
                await stored_at_last(tier, "after")

    run(main())


def test_a_stopped_node_fails_the_transfer_and_gives_whole_objects_when_it_goes_on(store: Master) -> None:
    async def main() -> None:
        with node(store.address) as process:
            async with opened(options(store)) as tier:
                key, parts = made("kept", extent_bytes=4 << 20)
                assert await tier.put(key, parts, NOBODY)
                stop(process.pid)
                room = blank(parts)
                with pytest.raises(TierError, match="node"):
                    await tier.get(key, room)
                left = [bytes(part) for part in room]
                process.send_signal(signal.SIGCONT)
                await stored_at_last(tier, "after")
                assert [bytes(part) for part in room] == left, "a call that was over wrote into its parts"
                assert await holds(tier, key, parts)

    run(main())


def test_open_fails_without_a_master_and_works_when_there_is_one(store: Master) -> None:
    async def main() -> None:
        store.kill()
        tier = make_tier(options(store))
        try:
            for _ in range(3):
                with pytest.raises(TierError, match="cannot be reached: Connection refused"):
                    await tier.open()
            store.start()
            with node(store.address):
                await tier.open()
                await stored_at_last(tier, "first")
        finally:
            await tier.close()

    run(main())


def test_a_stopped_master_does_not_stop_the_event_loop_of_who_opens(store: Master) -> None:
    async def main() -> None:
        num_ticks = 0

        async def tick() -> None:
            nonlocal num_ticks
            while True:
                await asyncio.sleep(0.01)
                num_ticks += 1

        store.pause()
        tier = make_tier(options(store, timeout_s=1.0))
        ticking = asyncio.create_task(tick())
        try:
            with pytest.raises(TierError, match="cannot be reached"):
                await tier.open()
            assert num_ticks >= 10
        finally:
            ticking.cancel()
            await tier.close()
            store.resume()

    run(main())


def test_a_full_store_says_no_and_keeps_what_it_said_yes_to(store: Master) -> None:
    async def main() -> None:
        with node(store.address, 64 << 20):
            async with opened(options(store)) as tier:
                kept = []
                for index in range(40):
                    key, parts = made(index, extent_bytes=2 << 20)
                    if not await tier.put(key, parts, NOBODY):
                        break
                    kept.append((key, parts))
                else:
                    pytest.fail("64 MiB held 160 MiB")
                assert [await holds(tier, *one) for one in kept].count(True) > 0

    run(main())


def test_a_store_without_nodes_has_no_room(store: Master) -> None:
    async def main() -> None:
        async with opened(options(store)) as tier:
            assert not await tier.put(*made("homeless"), NOBODY)

    run(main())


def test_two_clients_share_one_store(store: Master) -> None:
    async def main() -> None:
        with node(store.address):
            async with opened(options(store)) as first, opened(options(store)) as second:
                key, parts = made("shared")
                assert await first.put(key, parts, NOBODY)
                assert await second.contains([key]) == [size(parts)]
                assert await holds(second, key, parts)
                await second.delete([key])
                assert await first.contains([key]) == [0]

    run(main())


def test_memory_of_this_process_serves_but_does_not_survive(store: Master) -> None:
    async def main() -> None:
        async with opened(options(store, segment_gb=0.0625)) as tier:
            assert not tier.survives
            key, parts = made("here")
            assert await tier.put(key, parts, NOBODY)
            assert await holds(tier, key, parts)
        async with opened(options(store)) as tier:
            assert tier.survives
            with contextlib.suppress(TierError):
                assert not await tier.get(key, blank(parts))

    run(main())


def test_a_tenant_with_a_limit_is_turned_away(store: Master) -> None:
    async def main() -> None:
        with node(store.address):
            async with opened(options(store)) as tier:
                key, parts = made("limited", tenant=b"t" * 16)
                assert not await tier.put(key, parts, Share(b"t" * 16, 1 << 30))

    run(main())


def test_whole_mappings_are_registered_once(store: Master) -> None:
    from lmcache.tiers.mooncake import RegisteredMemory, address_of

    class Recorder:
        """The real store, and what was asked of it."""

        def __init__(self, real: Any) -> None:
            self.real = real
            self.calls: list[tuple[int, int]] = []

        def register_buffer(self, address: int, size: int) -> int:
            self.calls.append((address, size))
            return int(self.real.register_buffer(address, size))

    async def main() -> None:
        async with opened(options(store)) as tier:
            memory = memoryview(mmap.mmap(-1, 1 << 20))
            recorder, registered = Recorder(tier._store), RegisteredMemory()  # type: ignore[attr-defined]
            registered.cover(recorder, [memory[4096:8192], memory[65536:131072]])
            registered.cover(recorder, [memory[:4096]])
            assert recorder.calls == [(address_of(memory), 1 << 20)]

    run(main())


def test_a_process_ends_by_itself_with_a_tier_left_open(store: Master) -> None:
    program = f"""
import asyncio
from lmcache.tiers import make_tier
tier = make_tier({options(store, segment_gb=0.0625)!r})
asyncio.run(tier.open())
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=HANG_S, check=False).returncode == 0


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"master": "localhost"}, "'master' is HOST:PORT"),
        ({"master": "localhost:0"}, "'master' is HOST:PORT"),
        ({"protocol": "ucx"}, "'protocol' is 'tcp' or 'rdma'"),
        ({"replicas": 0}, "'replicas' is 1 to 16"),
        ({"segments": 1}, "unknown option 'segments'"),
    ],
)
def test_wrong_options_are_named(wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_tier({"type": "mooncake", "master": f"127.0.0.1:{free_ports(1)[0]}", **wrong})
