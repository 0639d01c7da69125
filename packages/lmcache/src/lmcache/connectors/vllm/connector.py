"""The class that stock vLLM instantiates, twice: in the scheduler's process and in each worker."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.outputs import KVConnectorOutput

from lmcache.connectors.copier import CopyWorker
from lmcache.connectors.link import Address, Link
from lmcache.connectors.session import SchedulerSession
from lmcache.connectors.vllm.groups import Groups
from lmcache.connectors.vllm.identity import engine_fields
from lmcache.connectors.vllm.metadata import StepMetadata, StepReport
from lmcache.connectors.vllm.ranks import Ranks
from lmcache.connectors.vllm.scheduler import SchedulerHalf
from lmcache.connectors.vllm.states import split_layout
from lmcache.connectors.vllm.tensors import engine_layout, kernel_groups
from lmcache.connectors.vllm.worker import WorkerHalf
from lmcache.errors import LayoutError
from lmcache.keys import namespace
from lmcache.transfer.device import make_engine
from lmcache.transfer.plan import CopyEngine
from lmcache.wire.messages import Register

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

FIRST_ATTACH_S = 1.0
"""How long vLLM's own start, which takes many seconds, may be held so that the first request already finds the
server."""

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    _HIT_SOURCE: Any = CacheHitSource.HOST
except ImportError:  # before vLLM 0.31
    _HIT_SOURCE = None

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

    _CAN_FAIL_WHOLE = True
except ImportError:  # before vLLM 0.32
    _CAN_FAIL_WHOLE = False


class LMCacheMPConnector(KVConnectorBase_V1, SupportsHMA):
    """Reuses KV through an LMCache server on this machine; serves as if it were not there when there is none.

    The name is the one that vLLM has registered: MultiConnector looks connectors up by it. Settings in
    ``kv_connector_extra_config``: ``lmcache.mp.host`` ("tcp://localhost"), ``lmcache.mp.port`` (5555), and
    ``lmcache.load_failure_policy`` ("recompute"; "fail" makes a request whose load fails end in an error).
    """

    if _HIT_SOURCE is not None:
        _cache_hit_source = _HIT_SOURCE

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config or {}
        self._address = Address(
            str(extra.get("lmcache.mp.host", "tcp://localhost")), int(extra.get("lmcache.mp.port", 5555))
        )
        self._ranks = Ranks.of(vllm_config, kv_cache_config)
        self._groups = self._understood_groups(kv_cache_config)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._set_failure_policy(str(extra.get("lmcache.load_failure_policy", "recompute")))
            self._scheduler = self._make_scheduler()

    # --- scheduler's process ------------------------------------------------------------------------------------------

    def _make_scheduler(self) -> SchedulerHalf | None:
        if self._groups is None:
            return None
        try:
            fields = engine_fields(self._vllm_config, self._kv_cache_config)
        except LayoutError as error:
            logger.warning("LMCache does not cache this engine: %s", error)
            return None
        except Exception:
            # An identity that cannot be told (a vLLM whose insides have moved) is a reason not to cache, not to die.
            logger.exception("LMCache does not cache this engine: its identity cannot be told")
            return None
        self._namespace = namespace(fields)
        link = self._link(
            "vllm scheduler",
            want_pool=False,
            registration=lambda chunk: self._register(chunk, "scheduler", namespace=self._namespace),
        )
        ranks = self._ranks
        return SchedulerHalf(SchedulerSession(link), self._namespace, self._groups, ranks.world_size, ranks.num_workers)

    def _set_failure_policy(self, policy: str) -> None:
        """vLLM's default ends a request whose load failed; a cache must never be the reason for that."""
        self._kv_transfer_config.kv_load_failure_policy = policy
        if policy == "recompute" and _inside_multi_connector():
            logger.warning(
                "under MultiConnector vLLM reads its own kv_load_failure_policy: "
                'set "kv_load_failure_policy": "recompute" beside it, or a failed load fails its request'
            )

    def on_new_request(self, request: Request) -> None:
        if self._scheduler is not None:
            self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.match(request, num_computed_tokens) if self._scheduler else (0, False)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._scheduler.build(scheduler_output) if self._scheduler else StepMetadata()

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        report = connector_output.kv_connector_worker_meta
        if self._scheduler is not None and isinstance(report, StepReport):
            self._scheduler.take_report(report)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return (self._scheduler.finished(request, block_ids) if self._scheduler else False), None

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        if self._scheduler is not None:
            self._scheduler.bind(kv_cache_manager)

    def has_pending_block_frees(self) -> bool:
        return self._scheduler is not None and self._scheduler.waits_for_stores

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def reset_cache(self) -> bool | None:
        if self._scheduler is not None:
            self._namespace = self._scheduler.reset()
            self._scheduler.register_again()
        return True

    # --- worker's process ---------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        ranks = self._ranks
        if self._groups is None:
            return
        fails_whole = not self._groups.are_plain
        device = next(iter(kv_caches.values())).device
        try:
            parts = split_layout(engine_layout(self._vllm_config, self._kv_cache_config, kv_caches))
            engines = [None if layout is None else make_engine(layout, device) for layout in parts]
        except LayoutError as error:
            logger.warning("LMCache does not cache this engine: %s", error)
            engines = [None, None]
        # States have a client of their own: the extents of one client have one size.
        names = (f"vllm worker {ranks.rank}", f"vllm worker {ranks.rank}, states")
        device_ids = ranks.device_ids(kv_caches)
        tokens, states = (self._copier(*pair, device_ids) for pair in zip(names, engines, strict=True))
        self._worker = WorkerHalf(tokens, ranks.rank, ranks.world_size, ranks.writes, fails_whole, states)

    def _copier(self, name: str, engine: CopyEngine | None, device_ids: tuple[int, ...]) -> CopyWorker | None:
        if engine is None:
            return None
        layout = engine.layout
        groups = kernel_groups(layout)

        def registration(chunk_tokens: int) -> Register:
            extent_bytes = layout.extent_bytes(chunk_tokens)
            return self._register(chunk_tokens, "worker", extent_bytes, groups=groups, device_ids=device_ids)

        link = self._link(name, want_pool=True, registration=registration)
        return CopyWorker(link, engine, self._ranks.rank, layout.blocks_per_chunk)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self._worker is not None and isinstance(kv_connector_metadata, StepMetadata):
            self._worker.before_forward(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None and self.has_connector_metadata():
            self._worker.start_loads(self._step())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: loads are asynchronous, always."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to save layer by layer: a chunk is stored once its step is over."""

    def wait_for_save(self) -> None:
        if self._worker is not None and self.has_connector_metadata():
            self._worker.start_stores(self._step())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        results = self._worker.collect()
        return results.sent or None, results.received or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        sent, received = self.get_finished(finished_req_ids)
        failed = self._worker.results.failed if self._worker else set()
        return KVConnectorTransferResults(set(sent or ()), set(received or ()), set(failed))

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.results.bad_blocks if self._worker else set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        if self._worker is None or not self._worker.results.report.ended:
            return None
        report, self._worker.results.report = self._worker.results.report, StepReport()
        return report

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()

    # --- both ---------------------------------------------------------------------------------------------------------

    def _step(self) -> StepMetadata:
        step = self._get_connector_metadata()
        assert isinstance(step, StepMetadata)
        return step

    def _link(self, name: str, want_pool: bool, registration: Callable[[int], Register]) -> Link:
        link = Link(self._address, name, want_pool, registration)
        link.wait_first_try(FIRST_ATTACH_S)
        return link

    def _understood_groups(self, kv_cache_config: KVCacheConfig) -> Groups | None:
        """None, said once, where we do not know what a request's blocks are."""
        try:
            groups = Groups.of(kv_cache_config)
            if not groups.are_plain and not _CAN_FAIL_WHOLE:
                raise LayoutError(
                    "sliding windows and hybrid models need a vLLM that lets a load fail as a whole (0.32); "
                    "disable the hybrid KV cache manager"
                )
        except LayoutError as error:
            logger.warning("LMCache does not cache this engine: %s", error)
            return None
        return groups

    def _register(self, chunk_tokens: int, role: str, extent_bytes: int = 0, **more: Any) -> Register:
        assert self._groups is not None
        self._groups.check_chunk(chunk_tokens)
        finest = self._groups.finest_chunk_tokens
        if role == "scheduler" and self._groups.have_states and chunk_tokens > finest:
            logger.warning(
                "states of recurrent layers are kept at the ends of the server's chunks of %d tokens only; "
                "--chunk-size %d would find more of them",
                chunk_tokens,
                finest,
            )
        return Register(
            0,
            role=role,
            model=self._vllm_config.model_config.served_model_name or self._vllm_config.model_config.model,
            engine=f"vllm {vllm.__version__}",
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            extent_bytes=extent_bytes,
            **more,
        )


def _inside_multi_connector() -> bool:
    """MultiConnector hands a child a copy of the configuration and no word of itself; only the call tells."""
    callers = inspect.stack(context=0)[1:6]
    return any(type(caller.frame.f_locals.get("self")).__name__ == "MultiConnector" for caller in callers)
