"""The core's list of prompts that the cascade looks for in the tiers, and who waits for them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from lmcache.system import Clock, Entropy
from lmcache.wire.messages import PROMOTION_PATIENCE_S
from lmcache.wire.orders import Wanted

PROMOTIONS_MAX = 1024
"""Promotions under way; beyond it a lookup is answered with what L1 holds."""

PROMOTION_S_MAX = 30.0


@dataclass(slots=True)
class Promotion:
    """One question of one client."""

    owner: int
    started_at: float
    asked_at: float
    is_over: bool = False


class Promotions:
    """A promotion lives while its owner asks; after its end it waits for the owner's last question."""

    def __init__(self, clock: Clock, entropy: Entropy) -> None:
        self.news: deque[Wanted] = deque()
        self.cancelled: list[int] = []
        self.num_started = 0
        self.num_abandoned = 0
        self._clock = clock
        self._entropy = entropy
        self._by_id: dict[int, Promotion] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def start(self, owner: int, keys: bytes, world_size: int) -> int | None:
        """Have these chunks looked for; None where too many promotions are under way."""
        if len(self._by_id) >= PROMOTIONS_MAX:
            return None
        number = int.from_bytes(self._entropy.token(8), "little") >> 1
        if not number or number in self._by_id:
            return None
        now = self._clock.now()
        self._by_id[number] = Promotion(owner, now, now)
        self.news.append(Wanted(number, world_size, keys))
        self.num_started += 1
        return number

    def is_running(self, owner: int, number: int) -> bool:
        """Whether to ask again; False when it is over, or is not this owner's."""
        promotion = self._by_id.get(number)
        if promotion is None or promotion.owner != owner:
            return False
        if promotion.is_over:
            del self._by_id[number]
            return False
        promotion.asked_at = self._clock.now()
        return True

    def give_up(self, owner: int, number: int) -> bool:
        """Its owner waits no more; False where there is nothing to give up."""
        promotion = self._by_id.get(number)
        if promotion is None or promotion.owner != owner:
            return False
        self._forget(number)
        return True

    def end(self, number: int) -> None:
        """The cascade is done with it."""
        promotion = self._by_id.get(number)
        if promotion is not None:
            promotion.is_over = True

    def end_all(self) -> None:
        """There is no cascade any more."""
        self.news.clear()
        self.cancelled.clear()
        for promotion in self._by_id.values():
            promotion.is_over = True

    def drop_owner(self, owner: int) -> None:
        """A client is gone."""
        for number in [number for number, promotion in self._by_id.items() if promotion.owner == owner]:
            self._forget(number)

    def sweep(self) -> float | None:
        """Give up what nobody asks for any more; seconds until the next one may be."""
        if not self._by_id:
            return None
        now = self._clock.now()
        first: float | None = None
        for number, promotion in list(self._by_id.items()):
            ends = min(promotion.asked_at + PROMOTION_PATIENCE_S, promotion.started_at + PROMOTION_S_MAX)
            if ends <= now:
                self.num_abandoned += not promotion.is_over
                self._forget(number)
            elif first is None or ends < first:
                first = ends
        return None if first is None else first - now

    def _forget(self, number: int) -> None:
        if not self._by_id.pop(number).is_over:
            self.cancelled.append(number)
