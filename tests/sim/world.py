"""One world: a server, engines, tiers and what goes wrong, all drawn from a seed."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lmcache.cache.base import Limits
from lmcache.wire.messages import PROMOTION_PATIENCE_S

from .chaos import Chaos
from .checks import Watch, all_gone, at_rest, cascade_at_rest, everything_written, nobody_left, tier_at_rest
from .disk import Disk
from .engine import Engine, Prompts
from .kernel import Kernel, Process, Violation
from .memory import Files, Killed
from .network import Network
from .oracle import Oracle
from .server import ATTACH_PATH, CoreProcess, Geometry
from .sockets import Unix
from .standins import Knocking, Standins
from .tiering import Service, TierFaults, Watched, make
from .worker import Model

STEPS = 1500
SETTLE_STEPS_MAX = 40_000
PAGE = 4096
MODELS = (Model("one", 1, PAGE), Model("two", 2, PAGE * 2 - 100), Model("three", 1, PAGE * 3 - 7))
TIERS = ((), ("memory",), ("file",), ("file",), ("memory", "file"), ("memory", "file"), ("file", "memory"))


@dataclass
class Result:
    """What a seed came to."""

    seed: int
    steps: int = 0
    digest: str = ""
    problem: str | None = None
    lines: list[str] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)


class World:
    """Everything in it is drawn from the seed, also what goes wrong and how often."""

    def __init__(self, seed: int, steps: int = STEPS) -> None:
        self.seed = seed
        self.kernel = Kernel(seed)
        self.steps_max = steps
        self.oracle = Oracle()
        self.network = Network(self.kernel)
        self.files = Files(1 << 30)
        self.disk = Disk(self.kernel)
        self.knocking = Knocking()
        self.standins = Standins(self.kernel, self.network, self.files, self.disk, lambda: self.core)
        self.standins.doors[ATTACH_PATH] = self.knocking
        random = self.kernel.random
        self.tier_kinds = random.choice(TIERS)
        self.tier_faults = TierFaults()
        self.policy = random.choice(("write-through",) * 5 + ("write-back",) * 2 + ("read-only",))
        self.is_roomy = random.random() < 0.5  # no tier ever has to evict
        self.kept: dict[str, dict[bytes, int]] = {}
        self.limits: dict[str, int] = {}
        self.salts = ["", "a", "b"][: random.choice([1, 1, 2, 3])]
        times_s = random.choice([2.0, 30.0])
        self.geometry = Geometry(
            pool_bytes=random.choice([10, 16, 24, 48]) * PAGE,
            policy="LRU",
            persist=self.kernel.chance(0.3),
            limits=Limits(lease_s=times_s, reservation_s=times_s, inline_grow_bytes=random.choice([1, 8, 64]) * PAGE),
            has_tiers=bool(self.tier_kinds) and self.policy != "read-only",
        )
        self.pace_s = random.choice([0.1, 0.3, 3.0])
        self.models = random.sample(MODELS, random.randint(1, 2))
        self.lives = 0
        self.core: CoreProcess
        self.service: Service | None = None
        self.watch: Watch
        self.engines: list[Engine] = []
        self.num_engines = 0
        self.prompts = Prompts(self.kernel, self.salts, families=random.randint(1, 3), chunks=random.randint(3, 7))
        self.chaos = Chaos(self)

    def run(self) -> Result:
        """Run the seed to its end, good or bad."""
        result = Result(self.seed)
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            with self.standins.installed():
                try:
                    self._live()
                except Exception as error:
                    known = isinstance(error, AssertionError)
                    told = f"{type(error).__name__}: {error}"
                    result.problem = told if known else "".join(traceback.format_exception(error))
                finally:
                    self._end()
        finally:
            if was_enabled:
                gc.enable()
        result.steps, result.digest, result.lines = self.kernel.steps, self.kernel.digest(), self.kernel.lines
        result.counts = {
            "accepted": self.oracle.num_accepted,
            "stored": self.oracle.num_stored,
            "slowest_s": round(max((engine.stats.slowest_s for engine in self.engines), default=0.0), 3),
            "promoted": sum(engine.stats.promoted for engine in self.engines),
            "lives": self.lives,
            "kept": sum(map(len, self.kept.values())),
            **self.network.counts,
            **self.chaos.counts,
        }
        return result

    def _live(self) -> None:
        self.start_core()
        for _ in range(self.kernel.random.randint(1, 3)):
            self.start_engine()
        self.chaos.begin()
        while self.kernel.steps < self.steps_max:
            self.step()
        self._settle()

    def step(self) -> None:
        """One step, and a look at what it did."""
        core, turns = self.core, self.core.num_turns
        self.kernel.step()
        if core.num_turns != turns and core.is_alive:
            self.watch.after_turn()

    # --- the end

    def _settle(self) -> None:
        """No more faults: everybody comes to rest, then leaves."""
        kernel = self.kernel
        self.chaos.end()
        self._pass(0.1)
        self._until(
            lambda: self.core.is_alive and not self.core.tiering.is_stopping, 30.0, "the server is started again"
        )
        for engine in self.engines:
            engine.is_ending = True
        self._until(
            lambda: all(engine.is_done for engine in self.engines if engine.process.is_alive), 60.0, "engines end"
        )
        core = self.core
        if self.chaos.has_lost_messages:
            self._pass(max(self.geometry.limits.lease_s, PROMOTION_PATIENCE_S) + 1.0)
        self._pass(1.0, meanwhile=lambda: [engine.idle() for engine in self.engines])
        at_rest(core)
        if not self.chaos.may_end_conversations:
            nobody_left(core)
        if self.geometry.has_tiers and self.policy == "write-through":
            self._drain()
        if self.service is not None and self.service.process.is_alive:
            tiers = self.service.cascade._tiers
            self._until(lambda: all(guarded.is_up for guarded in tiers), 60.0, "all tiers are in use")
            self._until(lambda: not self.service.is_busy(), 120.0, "the cascade has nothing to do")  # type: ignore[union-attr]
            cascade_at_rest(self.service.cascade)
            for guarded in self.service.cascade._tiers:
                tier_at_rest(guarded, self.disk, has_damage=self.chaos.has_damage)
        for engine in self.engines:
            engine.kill()
        self._pass(1.0)
        if self.service is not None and self.service.process.is_alive:
            core.supervisor.is_over = True
            self.service.process.kill()
            self._pass(1.2)  # whether a writer lives is looked at once a second
        all_gone(core)
        kernel.trace("at rest")

    def _drain(self) -> None:
        """Everything that L1 has arrives in the tiers."""
        core = self.core
        self._until(lambda: core.cache.num_unwritten == 0, 120.0, "everything is written")
        self._pass(1.0)
        if self.is_roomy and not self.chaos.has_hurt_tiers and "file" in self.tier_kinds:
            everything_written(core, self.disk)

    def _until(self, holds: Callable[[], bool], seconds: float, what: str) -> None:
        ends = self.kernel.now + seconds
        while not holds():
            if self.kernel.now > ends or self.kernel.steps > self.steps_max + SETTLE_STEPS_MAX:
                raise Violation(f"after {seconds:g} s it has not happened that {what}")
            self.step()

    def _pass(self, seconds: float, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Let time pass."""
        over: list[bool] = []
        self.kernel.after(seconds, "time has passed", lambda: over.append(True))
        while not over:
            meanwhile()
            self.step()

    def _end(self) -> None:
        for process in list(self.kernel.processes):
            process.kill()
        self.files.close()

    # --- who lives here

    def start_core(self) -> None:
        """A server starts, and finds what the one before left."""
        self.lives += 1
        try:
            self.core = CoreProcess(
                self.kernel, self.network, self.files, self.geometry, self.knocking, self._start_service, self.lives
            )
        except Killed:
            self.kernel.after(0.2, "server starts", self.start_core)
            return
        for salt, limit in self.limits.items():
            self.core.cache.quotas.set_limit(self.core.tenants.id_of(salt), limit)
        self.watch = Watch(self.core, self.oracle, self.salts)
        self.watch.after_turn()

    def start_engine(self) -> None:
        """Another engine."""
        self.num_engines += 1
        model = self.kernel.random.choice(self.models)
        self.engines.append(
            Engine(self.kernel, self.oracle, f"engine{self.num_engines}", model, self.prompts, self.pace_s)
        )

    def _start_service(self, process: Process, token: bytes, line: Unix) -> None:
        tiers = []
        capacity = (4000 if self.is_roomy else 60) * PAGE
        for number, kind in enumerate(self.tier_kinds):
            tier: Any = make(kind, capacity, f"/tier{number}")
            tier._catalog.capacity_bytes = capacity
            if kind == "file":
                tier._capacity_bytes = capacity
            name = f"{kind}{number}"
            kept = self.kept.setdefault(name, {})
            if not tier.survives:
                kept.clear()
            tiers.append((name, Watched(self.kernel, self.oracle, tier, self.tier_faults, kept)))
        former = self.kernel.process
        self.kernel.process = process
        self.service = Service(self.kernel, process, token, line, tiers, self.policy)
        self.kernel.process = former


def run_seed(seed: int, steps: int = STEPS) -> Result:
    """Run one seed."""
    return World(seed, steps).run()
