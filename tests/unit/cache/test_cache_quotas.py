"""Accounts of tenants and the order of those with a limit."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmcache.cache.evict.lru import LRU
from lmcache.cache.quotas import Quotas

TENANTS = [bytes([number]) * 16 for number in range(4)]


def quotas_of(tenants: dict[int, bytes]) -> Quotas:
    return Quotas(LRU(), tenants.__getitem__)


def test_bytes_are_counted_for_every_tenant_and_those_without_any_are_forgotten() -> None:
    quotas = quotas_of({})
    quotas.add(TENANTS[0], 5)
    quotas.add(TENANTS[1], 7)
    quotas.add(TENANTS[0], 1)
    quotas.subtract(TENANTS[1], 7)
    assert quotas.tenant_bytes() == {TENANTS[0]: 6}
    assert (quotas.used_bytes(TENANTS[0]), quotas.used_bytes(TENANTS[1])) == (6, 0)


def test_a_tenant_is_over_only_above_its_limit_and_never_without_one() -> None:
    quotas = quotas_of({})
    quotas.add(TENANTS[0], 10)
    assert not quotas.is_over(TENANTS[0], 1 << 60)
    quotas.set_limit(TENANTS[0], 12)
    assert quotas.limit_of(TENANTS[0]) == 12
    assert not quotas.is_over(TENANTS[0], 2)
    assert quotas.is_over(TENANTS[0], 3)
    assert not quotas.is_over(TENANTS[1], 1 << 60)
    quotas.set_limit(TENANTS[0], None)
    assert quotas.limit_of(TENANTS[0]) is None
    assert not quotas.is_over(TENANTS[0], 1 << 60)


def test_a_limit_of_nothing_lets_nothing_in() -> None:
    quotas = quotas_of({})
    quotas.set_limit(TENANTS[0], 0)
    assert quotas.is_over(TENANTS[0], 1)


def test_a_limit_on_a_tenant_that_holds_entries_finds_their_order() -> None:
    tenants = {entry: TENANTS[entry % 2] for entry in range(1, 9)}
    quotas = quotas_of(tenants)
    for tenant in tenants.values():
        quotas.add(tenant, 1)
    quotas.insert(range(1, 9))
    quotas.touch([3, 1])
    quotas.set_limit(TENANTS[1], 100)
    assert list(quotas.victims_of(TENANTS[1])) == [5, 7, 3, 1]
    assert list(quotas.victims()) == [2, 4, 5, 6, 7, 8, 3, 1]


def test_changing_a_limit_keeps_the_order() -> None:
    quotas = quotas_of(dict.fromkeys(range(1, 4), TENANTS[0]))
    quotas.set_limit(TENANTS[0], 100)
    quotas.insert([1, 2, 3])
    quotas.touch([1])
    quotas.set_limit(TENANTS[0], 50)
    assert list(quotas.victims_of(TENANTS[0])) == [2, 3, 1]


class Life(RuleBasedStateMachine):
    """Quotas against one ordered dictionary a tenant."""

    def __init__(self) -> None:
        super().__init__()
        self.tenants: dict[int, bytes] = {}
        self.quotas = quotas_of(self.tenants)
        self.order: OrderedDict[int, None] = OrderedDict()
        self.limited: set[bytes] = set()

    @rule(entries=st.sets(st.integers(1, 40), min_size=1), tenant=st.sampled_from(TENANTS))
    def insert(self, entries: set[int], tenant: bytes) -> None:
        new = [entry for entry in entries if entry not in self.order]
        for entry in new:
            self.tenants[entry] = tenant
            self.quotas.add(tenant, entry)
            self.order[entry] = None
        self.quotas.insert(new)

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        entries = data.draw(st.lists(st.sampled_from(sorted(self.order)), max_size=8))
        self.quotas.touch(entries)
        for entry in entries:
            self.order.move_to_end(entry)

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(sorted(self.order)))
        self.quotas.remove(entry)
        self.quotas.subtract(self.tenants[entry], entry)
        del self.order[entry]

    @rule(tenant=st.sampled_from(TENANTS), is_set=st.booleans())
    def limit(self, tenant: bytes, is_set: bool) -> None:
        self.quotas.set_limit(tenant, 5 if is_set else None)
        (self.limited.add if is_set else self.limited.discard)(tenant)

    @invariant()
    def orders_and_accounts_agree(self) -> None:
        assert list(self.quotas.victims()) == list(self.order)
        for tenant in TENANTS:
            own = [entry for entry in self.order if self.tenants[entry] == tenant]
            assert self.quotas.used_bytes(tenant) == sum(own)
            if tenant in self.limited:
                assert list(self.quotas.victims_of(tenant)) == own


TestTheOrdersOfTenantsAreThatOfTheWholeCache = Life.TestCase
TestTheOrdersOfTenantsAreThatOfTheWholeCache.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("num_limits", [1, 1000])
def test_limits_that_come_and_go_leave_nothing_behind(num_limits: int) -> None:
    quotas = quotas_of({1: TENANTS[0]})
    quotas.insert([1])
    for number in range(num_limits):
        tenant = number.to_bytes(16, "big")
        quotas.set_limit(tenant, 1)
        quotas.set_limit(tenant, None)
    assert len(quotas._orders) == 2
    assert not quotas._numbers
    quotas.remove(1)
