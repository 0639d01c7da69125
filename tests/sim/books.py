"""An account of its own of what happens in a cache, against which the counters that people see are checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from lmcache.cache.base import State
from lmcache.server.sessions import Sessions

from .kernel import Violation


class Books:
    """Watches the verbs of one life's cache from outside; ``check`` may be called between any two turns of its core."""

    def __init__(self, cache: Any, sessions: Sessions, counters: Any) -> None:
        self.seen: Counter[str] = Counter(adopted=len(cache._index.by_key))
        self._cache = cache
        self._sessions = sessions
        self._counters = counters
        self._is_publishing = False
        self._watch(cache._index, "add", lambda _: self._count("visible"))
        self._watch(cache._leases, "add", lambda _: self._count("leases"))
        self._watch(cache._claims, "add", lambda _: self._count("reservations"))
        self._watch(cache, "release", lambda spoiled: self._count("released", spoiled is not None))
        self._watch(cache, "written", lambda known: self._count("released", known))
        self._watch(cache, "clear", lambda cleared: self._count("cleared", cleared.num_entries))
        self._watch(cache, "reserve", lambda made: self._count("granted", made.states.count(State.GRANTED)))
        self._watch(cache, "commit", self._committed)
        self._watch(cache, "abort", lambda known: self._count("aborts", known))
        publish, drop_owner = cache.publish, cache.drop_owner

        def watched_publish(*arguments: Any, **options: Any) -> Any:
            self._is_publishing = True
            try:
                return publish(*arguments, **options)
            finally:
                self._is_publishing = False

        def watched_drop(owner: Any) -> None:
            self._count("dropped leases", len(cache._leases.of_owner.get(owner, ())))
            self._count("dropped reservations", len(cache._claims.of_owner.get(owner, ())))
            drop_owner(owner)

        cache.publish, cache.drop_owner = watched_publish, watched_drop

    def _watch(self, thing: Any, verb: str, note: Callable[[Any], None]) -> None:
        original = getattr(thing, verb)

        def watched(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            note(result)
            return result

        setattr(thing, verb, watched)

    def _count(self, what: str, number: int = 1) -> None:
        self.seen[what] += number

    def _committed(self, num_extents: int | None) -> None:
        if num_extents is not None:
            self._count("published" if self._is_publishing else "stores")
            self._count("extents of the cascade" if self._is_publishing else "extents of workers", num_extents)

    def check(self) -> None:
        """What came, less what went, is what is there; and each counter says what was seen.

        Raises:
            Violation: it does not.
        """
        usage, seen, counters = self._cache.usage(), self.seen, self._counters
        gone = usage.num_evicted + usage.num_quarantined + seen["cleared"]
        ended = seen["released"] + usage.num_expired_leases + seen["dropped leases"]
        resolved = seen["stores"] + seen["published"] + seen["aborts"]
        resolved += usage.num_expired_reservations + seen["dropped reservations"]
        balances = {
            "chunks": (seen["adopted"] + seen["visible"] - gone, usage.num_entries),
            "leases": (seen["leases"] - ended, usage.num_leases),
            "reservations": (seen["reservations"] - resolved, usage.num_reservations),
            "adopted_chunks": (seen["adopted"], usage.num_adopted),
            "reserved_chunks": (seen["granted"], counters.reserved_chunks),
            "stores": (seen["stores"], counters.stores),
            "stored_chunks": (seen["extents of workers"], counters.stored_chunks),
            "attached processes": (counters.attaches - counters.detaches, len(self._sessions.instances())),
        }
        for name, (expected, told) in balances.items():
            if expected != told:
                raise Violation(f"{name}: {expected} by the account of what happened, {told} by the counters")
        bounds = {
            "lookup_hit_tokens": (counters.lookup_hit_tokens, counters.lookup_requested_tokens),
            "leases": (counters.leases, seen["leases"]),
            "retrieves": (counters.retrieves, seen["released"]),
            "aborts": (counters.aborts, seen["aborts"]),
            "lost_chunks": (usage.num_lost, seen["adopted"] + seen["visible"]),
        }
        for name, (told, most) in bounds.items():
            if told > most:
                raise Violation(f"{name}: the counter says {told}, at most {most} can be")
