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
        fails_whole: a load that failed is reported as such, not by its bad blocks. Several block tables have ids in
            common, so vLLM takes no block ids there; and where it keeps a window only, what comes before a bad block
            is not there to go on from.
    """

    def __init__(
        self, copier: CopyWorker | None, rank: int, world_size: int, writes: bool, fails_whole: bool = False
    ) -> None:
        self._copier = copier
        self._rank = rank
        self._world_size = world_size
        self._writes = writes
        self._fails_whole = fails_whole
        self._requests: dict[int, str] = {}  # store jobs under way
        self._loads: dict[int, Load] = {}
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
            if self._copier is None:
                self._ended.append(Outcome(load.job, is_load=True))
                continue
            mine = slice(self._rank, None, self._world_size)
            job = LoadJob(load.job, load.server, load.keys, load.blocks, load.offsets[mine], load.checksums[mine])
            self._copier.load(job)

    def start_stores(self, step: StepMetadata) -> None:
        """Begin this step's stores; call after the forward, whose blocks they read."""
        for store in step.stores:
            self._requests[store.job] = store.request_id
            self._open[store.request_id] = self._open.get(store.request_id, 0) + 1
            if self._copier is None or not self._writes:
                self._ended.append(Outcome(store.job, is_load=False))
            else:
                self._copier.store(StoreJob(store.job, store.keys, store.blocks, store.salt, store.namespace))
        self._closing.update(step.closing)

    def collect(self) -> StepResults:
        """Everything that ended until now; kept in ``results`` for vLLM's other questions of the same step."""
        results = StepResults()
        ended, self._ended = self._ended, []
        if self._copier is not None:
            ended += self._copier.take_outcomes()
        for outcome in ended:
            results.report.ended[outcome.id] = 1
            if outcome.is_load:
                self._end_load(outcome, results)
            else:
                request_id = self._requests.pop(outcome.id)
                self._open[request_id] -= 1
                if not self._open[request_id]:
                    del self._open[request_id]
        results.sent = {request_id for request_id in self._closing if request_id not in self._open}
        self._closing -= results.sent
        self.results = results
        return results

    def _end_load(self, outcome: Outcome, results: StepResults) -> None:
        load = self._loads.pop(outcome.id)
        results.received.add(load.request_id)
        if outcome.loaded:
            return
        if self._fails_whole:
            results.failed.add(load.request_id)
        else:
            results.bad_blocks.update(self._bad_blocks(load, outcome))
        if outcome.failed:
            results.report.failed[outcome.id] = set(outcome.failed)
        else:
            results.report.unable.add(outcome.id)

    def _bad_blocks(self, load: Load, outcome: Outcome) -> set[int]:
        per_chunk = len(load.blocks) * self._world_size // len(load.offsets)
        num_chunks = len(load.blocks) // per_chunk
        bad: set[int] = set()
        for chunk in outcome.failed or range(num_chunks):
            bad.update(load.blocks[chunk * per_chunk : (chunk + 1) * per_chunk])
        return bad - {NOT_WRITTEN}

    def close(self) -> None:
        """Let running copies end, then detach."""
        if self._copier is not None:
            self._copier.close()
