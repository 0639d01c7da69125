"""What goes wrong in a world: each seed has some kinds of trouble, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from lmcache.wire import messages as m

from .kernel import Process

if TYPE_CHECKING:
    from .world import World

GB = 1 << 30
HARMLESS = ("damage pool", "damage disk", "clear", "limit", "memory full")
"""Kinds of trouble in which every conversation goes on."""

KINDS = (
    "kill engine",
    "kill worker",
    "stop engine",
    "stop core",
    "kill core",
    "core dies in a write",
    "end core",
    "kill service",
    "stop service",
    "break connection",
    "break line of service",
    "clock of core",
    "clock of engine",
    "damage pool",
    "damage disk",
    "clear",
    "limit",
    "memory full",
)


class Chaos:
    """Draws the trouble of a world, and makes it."""

    def __init__(self, world: World) -> None:
        self.counts: Counter[str] = Counter()
        self.has_lost_messages = False
        self.has_hurt_tiers = False
        self.has_damage = False  # bytes change by themselves somewhere
        self._world = world
        random = world.kernel.random
        self._is_over = False
        calm = random.random() < 0.1
        self._kinds = [] if calm else [kind for kind in KINDS if random.random() < 0.3]
        self._every_s = random.choice([0.03, 0.1, 0.3]) * max(1.0, 2 * world.pace_s)
        self._stops_s = random.choice([0.5, 5.0, 45.0])
        network = world.network.faults
        if not calm and random.random() < 0.25:
            network.drop = random.choice([0.0, 0.01, 0.05])
            network.duplicate = random.choice([0.0, 0.02])
            network.reorder = random.choice([0.0, 0.05])
            network.slow = random.choice([0.0, 0.01])
            network.disconnect = random.choice([0.0, 0.005])
        if not network.is_lossy() and random.random() < 0.4:  # those need whole frames
            world.network.room_bytes = random.choice([None, 50, 150, 400])
            network.partial = random.choice([0.02, 0.2])
        tiers, disk = world.tier_faults, world.disk.faults
        if not calm and random.random() < 0.6:
            tiers.fail, tiers.slow = random.choice([0.0, 0.1]), random.choice([0.0, 0.1, 0.4])
            tiers.hang, tiers.flip = random.choice([0.0, 0.02, 0.1]), random.choice([0.0, 0.1])
        if not calm and random.random() < 0.5:
            disk.read_error, disk.write_error = random.choice([0.0, 0.02]), random.choice([0.0, 0.02])
            disk.short, disk.slow = random.choice([0.0, 0.1]), random.choice([0.0, 0.02])
            disk.hang = random.choice([0.0, 0.001, 0.01])
            if random.random() < 0.3:
                world.disk.capacity_bytes = random.choice([20, 60]) * 4096
        self.has_damage = tiers.flip > 0
        self.has_lost_messages = network.is_lossy() or network.disconnect > 0
        self.may_end_conversations = bool(
            self.has_lost_messages or network.slow or set(self._kinds).difference(HARMLESS)
        )
        self.has_hurt_tiers = (
            bool(
                tiers.fail
                or tiers.slow
                or tiers.hang
                or tiers.flip
                or disk.read_error
                or disk.write_error
                or disk.slow
                or disk.hang
            )
            or world.disk.capacity_bytes < GB
        )

    def begin(self) -> None:
        """From now on things go wrong; the pool's memory comes into being meanwhile."""
        self._later()
        self._grow()

    def end(self) -> None:
        """No more trouble: who was stopped goes on, disk and network are well."""
        world = self._world
        self._is_over = True
        for process in world.kernel.processes:
            process.stopped_until = None
        for faults in (world.network.faults, world.tier_faults, world.disk.faults):
            for name in vars(faults):
                if name != "slow_s":
                    setattr(faults, name, 0.0)
        world.disk.capacity_bytes = 1 << 40
        world.files.writes_left = None

    def _grow(self) -> None:
        world = self._world
        if world.core.is_alive and not world.core.is_stopped():
            world.core.grow(4096 * world.kernel.random.randint(1, 8))
        if not (world.core.is_alive and world.core.cache.pool.is_complete):
            world.kernel.after(0.01, "the pool grows", self._grow)

    def _later(self) -> None:
        if self._kinds:
            delay_s = self._world.kernel.random.expovariate(1 / self._every_s)
            self._world.kernel.after(delay_s, "trouble", self._make)

    def _make(self) -> None:
        if self._is_over:
            return
        kind = self._world.kernel.random.choice(self._kinds)
        action: Callable[[], None] = getattr(self, "_" + kind.replace(" ", "_"))
        self._world.kernel.trace(f"trouble: {kind}")
        self.counts[kind] += 1
        action()
        self._later()

    # --- engines

    def _living(self) -> list[int]:
        return [number for number, engine in enumerate(self._world.engines) if engine.process.is_alive]

    def _replace(self, number: int) -> None:
        world = self._world
        world.engines[number].kill()
        world.kernel.after(world.kernel.random.uniform(0.05, 0.5), "engine starts", self._start_engine)

    def _start_engine(self) -> None:
        if not self._is_over:
            self._world.start_engine()

    def _kill_engine(self) -> None:
        if living := self._living():
            self._replace(self._world.kernel.random.choice(living))

    def _kill_worker(self) -> None:
        """One rank dies; the rest of its engine goes down a moment later."""
        world = self._world
        if living := self._living():
            number = world.kernel.random.choice(living)
            world.kernel.random.choice(world.engines[number].workers).process.kill()
            world.kernel.after(world.kernel.random.uniform(0.0, 0.3), "engine goes down", lambda: self._replace(number))

    def _stop_engine(self) -> None:
        world = self._world
        if living := self._living():
            engine = world.engines[world.kernel.random.choice(living)]
            self._stop(world.kernel.random.choice([process for process in engine.processes if process.is_alive]))

    def _stop(self, process: Process) -> None:
        if not process.is_stopped():
            process.stop(self._world.kernel.random.uniform(0.0, self._stops_s))

    def _clock_of_engine(self) -> None:
        world = self._world
        if living := self._living():
            engine = world.engines[world.kernel.random.choice(living)]
            for process in engine.processes:
                process.skew_s += world.kernel.random.uniform(0.0, self._stops_s)

    # --- the server

    def _stop_core(self) -> None:
        if self._world.core.is_alive:
            self._stop(self._world.core)

    def _kill_core(self) -> None:
        if self._world.core.is_alive:
            self._world.core.kill()
        self._start_again()

    def _start_again(self) -> None:
        """The service process of a dead core goes a moment later; then somebody starts the server again."""
        world, random = self._world, self._world.kernel.random
        service, core = world.service, world.core
        if service is not None:
            world.kernel.after(random.uniform(0.0, 0.3), "service ends with its core", service.process.kill)

        def start() -> None:
            if world.core is core:
                world.start_core()
                self._grow()

        world.kernel.after(random.uniform(0.3, 2.0), "server starts", start)

    def _core_dies_in_a_write(self) -> None:
        world, random = self._world, self._world.kernel.random
        if world.core.is_alive:
            world.files.kill_at(random.randint(0, 6), random.randint(0, 600))
            world.core.at_exit.append(self._start_again)

    def _end_core(self) -> None:
        """SIGTERM."""
        if self._world.core.is_alive:
            self._world.core.signal()
            self._world.core.at_exit.append(self._start_again)

    def _clock_of_core(self) -> None:
        self._world.core.skew_s += self._world.kernel.random.uniform(0.0, self._stops_s)

    def _memory_full(self) -> None:
        world = self._world
        former, world.files.free_bytes = world.files.free_bytes, 0

        def end() -> None:
            world.files.free_bytes += former

        world.kernel.after(world.kernel.random.uniform(0.0, 1.0), "memory is free again", end)

    def _damage_pool(self) -> None:
        """Bytes of chunks that lie in L1 change under everybody's hands."""
        world, random = self._world, self._world.kernel.random
        if not world.core.is_alive:
            return
        index = world.core.cache._index
        if index.by_key:
            entry = random.choice(list(index.by_key.values()))
            offset = index.offset[random.choice(index.slots(entry))]
            world.files.damage(world.watch.inode, offset + random.randrange(4096), random)
            world.watch.damaged.add((world.watch.inode, offset))
            self.has_hurt_tiers = self.has_damage = True

    # --- the service

    def _kill_service(self) -> None:
        if self._world.service is not None:
            self._world.service.process.kill()

    def _stop_service(self) -> None:
        service = self._world.service
        if service is not None and service.process.is_alive:
            self._stop(service.process)
            self.has_hurt_tiers = True

    def _damage_disk(self) -> None:
        told = self._world.disk.damage()
        if told:
            self._world.kernel.trace(told)
            self.has_hurt_tiers = self.has_damage = True

    def _clear(self) -> None:
        self._ask(m.Clear(0))

    def _limit(self) -> None:
        world, random = self._world, self._world.kernel.random
        salt = random.choice(world.salts)
        limit = random.choice([None, 0, 6, 20])
        self.has_hurt_tiers = True
        if world.service is None or not world.core.is_alive:
            world.limits.pop(salt, None)
            return
        request = m.Limit(0, salt=salt, limit_gb=None if limit is None else limit * 4096 / GB)
        self._ask(request)

    def _ask(self, request: m.Request) -> None:
        service = self._world.service
        if service is not None and service.process.is_alive:
            former = self._world.kernel.process
            self._world.kernel.process = service.process
            service.process.spawn(service.ask(request))
            self._world.kernel.process = former

    def _break_line_of_service(self) -> None:
        """Its conversations have ended, so that it lets go of the core and attaches anew."""
        service = self._world.service
        if service is not None:
            for stream in [stream for stream in self._world.network.streams if stream.process is service.process]:
                self.has_lost_messages = True
                stream.sever()

    def _break_connection(self) -> None:
        self.has_lost_messages = True
        self._world.network.break_one()
