"""Encryption at rest: what a store sees, what somebody who writes to the store can do, and how keys come and go."""

from __future__ import annotations

import asyncio
import os
import secrets
import struct
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import HANG_S, Options, Use
from making import KIB, MIB, Made, Pool, same

from lmcache.errors import TierError
from lmcache.tiers import objects
from lmcache.tiers.base import Share, Tier, Usage
from lmcache.tiers.objects import PAGE_BYTES, Header, NoObject, Seal
from lmcache.tiers.sealed import Buffers

ANYBODY = Share(bytes(16))
ONE, OTHER = secrets.token_hex(32), secrets.token_hex(32)

Change = Callable[[Header], Header]


def key_file(path: Path, *keys: str) -> dict[str, str]:
    """The option ``seal`` with these keys in a file."""
    path.unlink(missing_ok=True)
    path.touch(0o600)
    path.write_text("".join(f"{key}\n" for key in keys))
    return {"key_file": str(path)}


@pytest.fixture
def plain(tmp_path: Path) -> Options:
    """Options of a tier in a folder, not sealed."""
    return {"type": "file", "base_path": str(tmp_path / "objects"), "capacity_gb": 0.25}


@pytest.fixture
def sealed(tmp_path: Path, plain: Options) -> Options:
    """The same, sealed with the key ``ONE``."""
    return {**plain, "seal": key_file(tmp_path / "one", ONE)}


def file_of(options: Options, key: bytes) -> Path:
    """Where a tier in a folder has an object."""
    return Path(options["base_path"]) / "1" / key.hex()[:2] / key.hex()


def stored(use: Use[Any], options: Options, *mades: Made) -> None:
    """Put objects, and close the tier."""

    async def work(tier: Tier) -> None:
        for made in mades:
            assert await tier.put(made.key, made.parts, Share(made.tenant))

    use(options, work)


def read(use: Use[Any], options: Options, key: bytes, parts: list[memoryview]) -> tuple[bool, list[int], Usage]:
    """Outcome of a get, and what is said of the key and of the tier afterwards."""

    async def work(tier: Tier) -> tuple[bool, list[int], Usage]:
        found = await tier.get(key, parts)
        return found, await tier.contains([key]), await tier.usage()

    answer: tuple[bool, list[int], Usage] = use(options, work)
    return answer


def is_spoiled(use: Use[Any], options: Options, key: bytes, parts: list[memoryview]) -> bool:
    """Whether a get brings what no caller can take for an object, so that the cascade removes it."""
    found, _, _ = read(use, options, key, parts)
    with pytest.raises(NoObject):
        objects.decode(parts[0])
    return found


def forge(path: Path, change: Change) -> None:
    """Rewrite the header of a stored object, as somebody does who knows the format, and not the key."""
    data = bytearray(path.read_bytes())
    before = objects.decode(data)
    after = objects.encode(change(before))
    assert after != bytes(data[: len(after)])
    data[: len(after)] = after
    path.write_bytes(data)


def sealed_with(header: Header, **changes: bytes) -> Header:
    """A header whose seal has other fields."""
    assert header.seal is not None
    return replace(header, seal=replace(header.seal, **changes))


def flipped(data: bytes) -> bytes:
    """With one bit the other way."""
    return bytes([data[0] ^ 1]) + data[1:]


# --- what the store sees


def test_no_byte_of_the_content_and_no_checksum_reaches_the_folder(
    sealed: Options, plain: Options, pool: Pool, use: Use[Any], tmp_path: Path
) -> None:
    marker = b"the quick brown fox jumps over "
    made = pool.made(2, 64 * KIB)
    for part in made.parts[1:]:
        part[:] = (marker * (len(part) // len(marker) + 1))[: len(part)]
    checksums = [struct.pack("<Q", checksum) for checksum in objects.decode(made.parts[0]).checksums]

    def seen() -> bytes:
        return b"".join(path.read_bytes() for path in (tmp_path / "objects").rglob("*") if path.is_file())

    stored(use, sealed, made)
    whole = seen()
    assert len(whole) >= made.num_bytes
    assert not any(piece in whole for piece in (marker, marker[:8], *checksums))
    assert ONE.encode() not in whole
    assert bytes.fromhex(ONE) not in whole

    stored(use, plain, made)  # the search above would have found them
    whole = seen()
    assert all(piece in whole for piece in (marker, *checksums))


def test_what_an_adapter_reads_stays_true(sealed: Options, pool: Pool, use: Use[Any]) -> None:
    made = pool.made(3, 100_001, tenant=b"T" * 16)
    stored(use, sealed, made)
    data = file_of(sealed, made.key).read_bytes()
    header, plain = objects.decode(data), objects.decode(made.content[0])
    assert len(data) == header.num_bytes == plain.num_bytes == made.num_bytes
    assert replace(header, seal=None, checksums=plain.checksums) == plain
    assert header.seal is not None
    assert header.checksums != plain.checksums


def test_equal_content_looks_different_each_time(sealed: Options, pool: Pool, use: Use[Any]) -> None:
    made = pool.made(1, 64 * KIB)
    seen = []
    for _ in range(3):
        stored(use, sealed, made)
        seen.append(file_of(sealed, made.key).read_bytes())
    pages = [data[at : at + PAGE_BYTES] for data in seen for at in range(PAGE_BYTES, len(data), PAGE_BYTES)]
    assert len(set(pages)) == len(pages)
    seals = [objects.decode(data).seal for data in seen]
    assert len({seal.salt for seal in seals if seal is not None}) == 3


# --- what somebody who writes to the store can do


CHANGES: dict[str, Change] = {
    "tenant": lambda header: replace(header, tenant=flipped(header.tenant)),
    "namespace": lambda header: replace(header, namespace=flipped(header.namespace)),
    "layout": lambda header: replace(header, layout=flipped(header.layout)),
    "length": lambda header: replace(header, extent_bytes=header.extent_bytes - 1),
    "key": lambda header: replace(header, key=flipped(header.key)),
    "checksum": lambda header: replace(header, checksums=(header.checksums[0] ^ 1, *header.checksums[1:])),
    "checksum order": lambda header: replace(header, checksums=header.checksums[::-1]),
    "salt": lambda header: sealed_with(header, salt=flipped(header.seal.salt if header.seal else b"")),
    "tag": lambda header: sealed_with(header, tag=flipped(header.seal.tag if header.seal else b"")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_header_that_was_rewritten_is_found_out(sealed: Options, pool: Pool, use: Use[Any], name: str) -> None:
    made = pool.made(2, 64 * KIB)
    stored(use, sealed, made)
    if name == "key":  # a file tier itself removes, when it starts, what lies under another name than its own
        path = file_of(sealed, made.key)

        async def work(tier: Tier) -> None:
            assert await tier.put(made.key, made.parts, ANYBODY)
            forge(path, CHANGES[name])
            room = pool.room_for(made)
            assert await tier.get(made.key, room)
            with pytest.raises(NoObject):
                objects.decode(room[0])

        use(sealed, work)
        return
    forge(file_of(sealed, made.key), CHANGES[name])
    assert is_spoiled(use, sealed, made.key, pool.room_for(made))


@pytest.mark.parametrize("at", [0, 1, 4095, 65535, 65536, 131071])
def test_a_bit_of_the_content_that_was_flipped_is_found_out(
    sealed: Options, pool: Pool, use: Use[Any], at: int
) -> None:
    made = pool.made(2, 64 * KIB)
    stored(use, sealed, made)
    path = file_of(sealed, made.key)
    data = bytearray(path.read_bytes())
    data[PAGE_BYTES + at] ^= 0x10
    path.write_bytes(data)
    assert is_spoiled(use, sealed, made.key, pool.room_for(made))


def test_extents_cannot_be_exchanged_within_an_object_or_between_two(
    sealed: Options, pool: Pool, use: Use[Any]
) -> None:
    one, two = pool.made(2, 64 * KIB), pool.made(2, 64 * KIB)
    stored(use, sealed, one, two)
    first, second = (file_of(sealed, made.key) for made in (one, two))
    data, other = first.read_bytes(), second.read_bytes()
    extent = 64 * KIB
    head, left, right = data[:PAGE_BYTES], data[PAGE_BYTES:][:extent], data[PAGE_BYTES + extent :]
    first.write_bytes(head + right + left)
    assert is_spoiled(use, sealed, one.key, pool.room_for(one))
    first.write_bytes(head + left + other[PAGE_BYTES + extent :])
    assert is_spoiled(use, sealed, one.key, pool.room_for(one))
    first.write_bytes(data)
    room = pool.room_for(one)
    assert read(use, sealed, one.key, room)[0]
    assert same(room, one)


def test_an_object_of_another_key_or_tenant_is_not_taken_for_this_one(
    sealed: Options, pool: Pool, use: Use[Any]
) -> None:
    ours, theirs = pool.made(tenant=b"A" * 16), pool.made(tenant=b"B" * 16)
    renamed = replace(objects.decode(theirs.content[0]), key=ours.key, tenant=ours.tenant)

    async def work(tier: Tier) -> None:
        for made in (ours, theirs):
            assert await tier.put(made.key, made.parts, Share(made.tenant))
        path = file_of(sealed, ours.key)
        copy = file_of(sealed, theirs.key).read_bytes()
        for is_relabelled in (False, True):
            path.write_bytes(copy)
            if is_relabelled:
                forge(path, lambda header: replace(header, key=renamed.key, tenant=renamed.tenant))
            room = pool.room_for(ours)
            assert await tier.get(ours.key, room)
            with pytest.raises(NoObject):
                objects.decode(room[0])

    use(sealed, work)


def test_an_object_that_was_cut_off_is_absent(sealed: Options, pool: Pool, use: Use[Any]) -> None:
    made = pool.made(2, 64 * KIB)
    for num_bytes in (0, 100, PAGE_BYTES, made.num_bytes - PAGE_BYTES, made.num_bytes - 1):
        stored(use, sealed, made)
        os.truncate(file_of(sealed, made.key), num_bytes)
        assert read(use, sealed, made.key, pool.room_for(made))[0] is False


def test_a_plain_object_in_a_sealed_tier_is_absent_and_stays_where_it_is(
    sealed: Options, plain: Options, pool: Pool, use: Use[Any]
) -> None:
    made = pool.made(2, 64 * KIB)
    stored(use, plain, made)
    before = file_of(sealed, made.key).read_bytes()
    room = pool.room_for(made)
    found, sizes, usage = read(use, sealed, made.key, room)
    assert (found, sizes) == (False, [0])
    assert usage.problem is not None
    assert "1 not sealed" in usage.problem
    assert file_of(sealed, made.key).read_bytes() == before


def test_a_sealed_object_in_a_plain_tier_tells_what_it_is(
    sealed: Options, plain: Options, pool: Pool, use: Use[Any]
) -> None:
    made = pool.made(2, 64 * KIB)
    stored(use, sealed, made)
    room = pool.room_for(made)
    assert read(use, plain, made.key, room)[0]
    assert objects.decode(room[0]).seal is not None
    assert not any(part == piece for part, piece in zip(room, made.content, strict=True))


# --- keys


def test_an_object_of_another_key_is_absent_counted_and_kept_and_replaced_by_a_put(
    sealed: Options, pool: Pool, use: Use[Any], tmp_path: Path
) -> None:
    made, kept = pool.made(2, 64 * KIB), pool.made(1, 64 * KIB)
    stored(use, sealed, made, kept)
    foreign = {**sealed, "seal": key_file(tmp_path / "other", OTHER)}

    async def work(tier: Tier) -> None:
        for one in (made, kept, made):
            assert await tier.get(one.key, pool.room_for(one)) is False
        assert await tier.contains([made.key, kept.key]) == [0, 0]
        problem = (await tier.usage()).problem
        assert problem is not None
        assert "2 sealed with a key that is not configured" in problem
        assert await tier.put(made.key, made.parts, ANYBODY)
        assert await tier.contains([made.key, kept.key]) == [made.num_bytes, 0]
        assert await tier.get(made.key, room)

    room = pool.room_for(made)
    use(foreign, work)
    assert same(room, made)
    back = pool.room_for(kept)
    assert read(use, sealed, kept.key, back)[0]
    assert same(back, kept)


def test_after_a_rotation_the_new_key_seals_and_the_old_one_still_opens(
    sealed: Options, pool: Pool, use: Use[Any], tmp_path: Path
) -> None:
    old, new = pool.made(2, 64 * KIB), pool.made(2, 64 * KIB)
    stored(use, sealed, old)
    both = {**sealed, "seal": key_file(tmp_path / "both", f"{OTHER}  # of today", "", ONE)}
    only_new = {**sealed, "seal": key_file(tmp_path / "other", OTHER)}
    stored(use, both, new)
    for options, made, is_open in [
        (both, old, True),
        (both, new, True),
        (only_new, new, True),
        (only_new, old, False),
        (sealed, old, True),
        (sealed, new, False),
    ]:
        room = pool.room_for(made)
        assert read(use, options, made.key, room)[0] is is_open
        assert not is_open or same(room, made)


def test_what_is_no_object_of_its_key_is_not_sealed(sealed: Options, pool: Pool, use: Use[Any]) -> None:
    made, other = pool.made(), pool.made()
    already = pool.room_for(made)
    for part, piece in zip(already, made.content, strict=True):
        part[:] = piece
    sealed_header = replace(objects.decode(made.content[0]), seal=Seal(bytes(4), bytes(32), bytes(16)))
    already[0][:] = objects.encode(sealed_header)

    async def work(tier: Tier) -> None:
        for parts in (other.parts, already, pool.room_for(made), [*made.parts, pool.room(PAGE_BYTES)[0]]):
            with pytest.raises(TierError):
                await tier.put(made.key, parts, ANYBODY)
        assert await tier.contains([made.key]) == [0]

    use(sealed, work)


# --- memory


def test_memory_for_sealed_objects_has_a_bound_and_is_used_again() -> None:
    async def work() -> None:
        buffers = Buffers(4 * MIB)
        held = [await buffers.take(MIB) for _ in range(4)]
        waiting = [asyncio.ensure_future(buffers.take(MIB)) for _ in range(2)]
        for _ in range(10):
            await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        buffers.give(held[0])
        assert await waiting[0] is held[0]
        assert not waiting[1].done()
        buffers.give(held[1])
        assert await waiting[1] is held[1]
        for buffer in held:
            buffers.give(buffer)
        assert buffers.free_bytes == 4 * MIB
        # one that is larger than all there is gets its memory when it is alone, and does not keep it
        large = await buffers.take(16 * MIB)
        assert len(large) == 16 * MIB
        assert buffers.free_bytes == 0
        late = asyncio.ensure_future(buffers.take(MIB))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not late.done()
        buffers.give(large)
        assert len(await late) == MIB
        assert buffers.free_bytes == 0

    asyncio.run(asyncio.wait_for(work(), HANG_S))


def test_more_puts_at_a_time_than_there_is_memory_for_all_end(
    sealed: Options, pool: Pool, use: Use[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache.tiers.sealed.BUFFER_BYTES_MAX", MIB)
    mades = [pool.made(1, (1 + index % 3) * 256 * KIB) for index in range(12)]
    rooms = [pool.room_for(made) for made in mades]

    async def work(tier: Tier) -> None:
        calls: list[Awaitable[bool]] = [tier.put(made.key, made.parts, ANYBODY) for made in mades]
        assert all(await asyncio.gather(*calls))
        assert all(await asyncio.gather(*(tier.get(made.key, room) for made, room in zip(mades, rooms, strict=True))))

    use(sealed, work)
    assert all(same(room, made) for room, made in zip(rooms, mades, strict=True))
