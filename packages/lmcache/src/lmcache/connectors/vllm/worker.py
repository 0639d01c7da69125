"""The worker's half of the connector: hands orders to the copying threads, and vLLM their results in one consistent
view."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmcache.connectors.copier import CopyWorker, LoadJob, Outcome, StoreJob
from lmcache.connectors.vllm.metadata import Load, StepMetadata, StepReport
from lmcache.transfer.plan import NOT_WRITTEN


@dataclass
class StepResults:
    """What ended since the last step. vLLM asks for it in pieces, which must agree: an error that came a step after its
    load's completion would find the blocks already shared."""

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    bad_blocks: set[int] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)  # among ``received``: vLLM computes the whole request
    report: StepReport = field(default_factory=StepReport)


class WorkerHalf:
    """Jobs of one rank. ``copier`` is None where nothing can be copied (the layout was refused): loads then fail,
    stores end at once, and the scheduler's half is told so by the same reports.

    Args:
        rank: among the ranks that hold different KV.
        writes: False for a rank whose KV another one stores, too.
        states: copies the states of recurrent layers, where the model has such.
        fails_whole: a load that failed is reported as such, not by its bad blocks. Several block tables have ids in
            common, so vLLM takes no block ids there; and where it keeps a window only, what comes before a bad block
            is not there to go on from.
    """

    def __init__(
        self,
        copier: CopyWorker | None,
        rank: int,
        world_size: int,
        writes: bool,
        fails_whole: bool = False,
        states: CopyWorker | None = None,
    ) -> None:
        self._copier = copier
        self._states = states
        self._rank = rank
        self._world_size = world_size
        self._writes = writes
        self._fails_whole = fails_whole
        self._requests: dict[int, str] = {}  # store jobs under way
        self._loads: dict[int, Load] = {}
        self._parts: dict[int, int] = {}  # loads -> how many of chunks and state are under way
        self._failures: dict[int, dict[bool, Outcome]] = {}  # of these loads: of the chunks (False), the state (True)
        self._open: dict[str, int] = {}  # request id -> its store jobs under way
        self._closing: set[str] = set()
        self._ended: list[Outcome] = []
        self.results = StepResults()

    def before_forward(self, step: StepMetadata) -> None:
        """Blocks of the marked stores are about to be overwritten."""
        if step.marked and self._copier is not None:
            self._copier.mark(step.marked)

    def start_loads(self, step: StepMetadata) -> None:
        """Begin this step's loads."""
        for load in step.loads:
            self._loads[load.job] = load
            self._parts[load.job] = 1 if load.state is None else 2
            self._start_load(load, self._copier)
            if load.state is not None:
                # A state is written whole: there is no part of it that the request has already.
                has_place = NOT_WRITTEN not in load.state.blocks
                self._start_load(load.state, self._states if has_place else None)

    def _start_load(self, load: Load, copier: CopyWorker | None) -> None:
        if copier is None:
            self._ended.append(Outcome(load.job, is_load=True))
            return
        mine = slice(self._rank, None, self._world_size)
        copier.load(LoadJob(load.job, load.server, load.keys, load.blocks, load.offsets[mine], load.checksums[mine]))

    def start_stores(self, step: StepMetadata) -> None:
        """Begin this step's stores; call after the forward, whose blocks they read."""
        for store in step.stores:
            self._requests[store.job] = store.request_id
            self._open[store.request_id] = self._open.get(store.request_id, 0) + 1
            copier = self._states if store.of_states else self._copier
            if copier is None or not self._writes:
                self._ended.append(Outcome(store.job, is_load=False))
            else:
                copier.store(StoreJob(store.job, store.keys, store.blocks, store.salt, store.namespace))
        self._closing.update(step.closing)

    def collect(self) -> StepResults:
        """Everything that ended until now; kept in ``results`` for vLLM's other questions of the same step."""
        results = StepResults()
        ended, self._ended = self._ended, []
        for outcome in [*ended, *(self._copier.take_outcomes() if self._copier else ())]:
            self._end(outcome, results, of_states=False)
        for outcome in self._states.take_outcomes() if self._states else ():
            self._end(outcome, results, of_states=True)
        results.sent = {request_id for request_id in self._closing if request_id not in self._open}
        self._closing -= results.sent
        self.results = results
        return results

    def _end(self, outcome: Outcome, results: StepResults, of_states: bool) -> None:
        if outcome.is_load:
            self._end_load_part(outcome, results, of_states)
            return
        results.report.ended[outcome.id] = 1
        request_id = self._requests.pop(outcome.id)
        self._open[request_id] -= 1
        if not self._open[request_id]:
            del self._open[request_id]

    def _end_load_part(self, outcome: Outcome, results: StepResults, of_states: bool) -> None:
        load = self._loads[outcome.id]
        if not outcome.loaded:
            self._failures.setdefault(outcome.id, {})[of_states] = outcome
        self._parts[outcome.id] -= 1
        if self._parts[outcome.id]:
            return
        del self._loads[outcome.id], self._parts[outcome.id]
        results.report.ended[outcome.id] = 1
        results.received.add(load.request_id)
        for is_state, failure in self._failures.pop(outcome.id, {}).items():
            if self._fails_whole:
                results.failed.add(load.request_id)
            else:
                results.bad_blocks.update(self._bad_blocks(load, failure))
            if not failure.failed:
                results.report.unable.add(outcome.id)
            elif is_state:
                results.report.failed_states.add(outcome.id)
            else:
                results.report.failed[outcome.id] = set(failure.failed)

    def _bad_blocks(self, load: Load, outcome: Outcome) -> set[int]:
        per_chunk = len(load.blocks) * self._world_size // len(load.offsets)
        num_chunks = len(load.blocks) // per_chunk
        bad: set[int] = set()
        for chunk in outcome.failed or range(num_chunks):
            bad.update(load.blocks[chunk * per_chunk : (chunk + 1) * per_chunk])
        return bad - {NOT_WRITTEN}

    def close(self) -> None:
        """Let running copies end, then detach."""
        for copier in (self._copier, self._states):
            if copier is not None:
                copier.close()
