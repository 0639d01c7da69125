"""The accounts of a tier against the plainest possible ones."""

from __future__ import annotations

import sys
from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from lmcache.tiers.base import Share
from lmcache.tiers.catalog import Catalog

KEYS = [bytes([index]) * 32 for index in range(12)]
TENANTS = [bytes([index]) * 16 for index in range(3)]
CAPACITY = 40

keys, tenants = st.sampled_from(KEYS), st.sampled_from(TENANTS)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), keys, st.integers(1, 15), tenants),
        st.tuples(st.just("put"), keys, st.integers(1, 60), tenants, st.none() | st.integers(1, 40), st.booleans()),
        st.tuples(st.sampled_from(["remove", "touch", "demote", "hold", "release"]), keys),
    ),
    max_size=60,
)


class Plain:
    """The same in an ordered dictionary, oldest first."""

    def __init__(self) -> None:
        self.objects: OrderedDict[bytes, tuple[int, bytes]] = OrderedDict()
        self.held: set[bytes] = set()

    def total(self, tenant: bytes | None = None) -> int:
        return sum(size for size, owner in self.objects.values() if tenant in (None, owner))

    def reserve(self, key: bytes, num_bytes: int, share: Share) -> list[bytes] | None:
        left = OrderedDict(self.objects)
        before, owner = left.pop(key, (0, b""))
        held = self.held | {key}
        out: list[bytes] = []
        growth = max(0, num_bytes - before)

        def sum_of(tenant: bytes | None) -> int:
            return sum(size for size, other in left.values() if tenant in (None, other))

        if share.limit_bytes is not None:
            own = share.tenant
            base = before if owner == own else 0
            for other in list(left):
                if base + sum_of(own) + max(0, num_bytes - base) <= share.limit_bytes:
                    break
                if left[other][1] == own and other not in held:
                    out.append(other)
                    del left[other]
            if base + sum_of(own) + max(0, num_bytes - base) > share.limit_bytes:
                return None
        for other in list(left):
            if sum_of(None) + before + growth <= CAPACITY:
                break
            if other not in held:
                out.append(other)
                del left[other]
        return out if sum_of(None) + before + growth <= CAPACITY else None


@given(steps)
def test_the_catalog_does_what_an_ordered_dictionary_would(steps: list[tuple[object, ...]]) -> None:
    catalog, plain = Catalog(CAPACITY), Plain()
    for step in steps:
        match step:
            case ("add", bytes(key), int(num_bytes), bytes(tenant)):
                catalog.add(key, num_bytes, tenant)
                plain.objects.pop(key, None)
                plain.objects[key] = (num_bytes, tenant)
            case ("put", bytes(key), int(num_bytes), bytes(tenant), limit, bool(stored)):
                share = Share(tenant, limit if isinstance(limit, int) else None)
                victims = catalog.reserve(key, num_bytes, share)
                wanted = plain.reserve(key, num_bytes, share)
                assert (None if victims is None else [victim.key for victim in victims]) == wanted
                plain.held.discard(key)
                if victims is None:
                    continue
                for victim in victims:
                    assert plain.objects.pop(victim.key)[0] == victim.num_bytes
                catalog.settle(key, stored)
                if stored:
                    plain.objects.pop(key, None)
                    plain.objects[key] = (num_bytes, tenant)
            case ("remove", bytes(key)):
                catalog.remove(key)
                plain.objects.pop(key, None)
            case ("touch" | "demote" as verb, bytes(key)):
                (catalog.touch if verb == "touch" else catalog.demote)(key)
                if key in plain.objects:
                    plain.objects.move_to_end(key, last=verb == "touch")
            case ("hold" | "release" as verb, bytes(key)):
                (catalog.hold if verb == "hold" else catalog.release)(key)
                (plain.held.add if verb == "hold" else plain.held.discard)(key)
        assert catalog.num_bytes == plain.total()
        assert len(catalog) == len(plain.objects)
        assert [catalog.size(key) for key in KEYS] == [plain.objects.get(key, (0,))[0] for key in KEYS]
        owners = {owner for _, owner in plain.objects.values()}
        assert catalog.tenant_bytes() == {tenant: plain.total(tenant) for tenant in owners}
    free = [key for key in plain.objects if key not in plain.held]
    catalog.capacity_bytes = 0
    assert [victim.key for victim in catalog.surplus(sys.maxsize)] == free


def test_what_is_on_its_way_takes_room_until_it_is_settled() -> None:
    catalog = Catalog(10)
    share = Share(TENANTS[1], 8)
    assert catalog.reserve(KEYS[0], 6, share) == []
    assert catalog.reserve(KEYS[1], 3, share) is None
    assert catalog.reserve(KEYS[1], 5, Share(TENANTS[2])) is None
    assert catalog.reserve(KEYS[2], 2, share) == []
    catalog.settle(KEYS[0], False)
    assert catalog.reserve(KEYS[1], 6, share) == []
    catalog.settle(KEYS[1], True)
    catalog.settle(KEYS[2], True)
    assert catalog.tenant_bytes() == {TENANTS[1]: 8}


def test_a_forgotten_catalog_is_as_new() -> None:
    catalog = Catalog(10)
    for key in KEYS[:3]:
        catalog.add(key, 3, TENANTS[0])
    catalog.clear()
    assert (len(catalog), catalog.num_bytes, catalog.tenant_bytes()) == (0, 0, {})
    catalog.add(KEYS[0], 4, TENANTS[1])
    assert catalog.tenant_bytes() == {TENANTS[1]: 4}
