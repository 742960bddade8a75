"""`KvkernConnector`: vLLM's offloading connector with kvkern's spec, and with two of its faults fixed from the outside.

- The stock worker asserts that every load succeeds, so a failed load would kill the engine.
- After a reset the stock scheduler forgets jobs whose memory is still being written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...observability.logs import set_up_engine
from ..vllm_metrics_port import serve_metrics
from . import shim
from .adapter_loads import AdapterLoads, watch_adapters
from .adapter_names import AdapterNames
from .content_names import ContentNames
from .manager import KvkernManager
from .namespace import namespace_of, resolve_weights
from .options import (
    fill_chunk_size,
    fill_defaults,
    is_outer,
    parse_options,
    refuse_data_parallel,
    refuse_divided_states,
    refuse_outer,
    refuse_sync_loads,
    refuse_unshareable,
    refuse_unsupported,
)
from .packing import PackingReport, agreed_packing, packing_of_scheduler, packing_of_worker, reported_arenas
from .request_hints import drop_malformed_params
from .stop_reasons import tool_call_ids
from .store_proof import StoreProof
from .transfer_metadata import SlotSpec, StepMetadata
from .versions import warn_of_untested
from .worker import KvkernWorker
from .worker_report import WorkerReport

IDLE_WAIT_S = 0.005  # how long an engine with nothing to compute waits for a load before it polls again


@dataclass(slots=True)
class _Transfer:
    ticket: int
    ranks_left: int  # that have not finished


class KvkernConnector(shim.OffloadingConnector):
    """Switched on by `"kv_connector": "KvkernConnector"`; see options.kv_transfer_config and ../vllm_plugin.py."""

    def __init__(
        self, vllm_config: shim.VllmConfig, role: shim.KVConnectorRole, kv_cache_config: shim.KVCacheConfig
    ) -> None:
        refuse_unsupported(vllm_config)
        refuse_outer(vllm_config, shim.current_config())
        fill_defaults(vllm_config)
        options = parse_options(vllm_config.kv_transfer_config.kv_connector_extra_config)
        refuse_unshareable(options, vllm_config)
        refuse_data_parallel(options, vllm_config)
        fill_chunk_size(vllm_config, kv_cache_config, options)
        handed_over = shim.handed_over_groups(kv_cache_config)
        offload = shim.build_offloading_config(vllm_config, kv_cache_config)
        refuse_divided_states(handed_over, offload.cache.blocks_per_chunk)
        super().__init__(vllm_config, role, kv_cache_config)
        self._load_requests: dict[int, str] = {}  # worker: load job -> request id
        self._transfers: dict[int, _Transfer] = {}  # scheduler: by job
        refuse_sync_loads(shim.sync_load_budget(self))
        self._alone = is_outer(vllm_config, shim.current_config())
        self._reported_packing: str | None = None  # scheduler: how the workers pack their pages
        self._speculates = vllm_config.speculative_config is not None
        self._world_size = vllm_config.parallel_config.world_size
        lora = vllm_config.lora_config
        self._adapters: AdapterLoads | None = None  # worker, if the engine serves LoRA
        if lora is not None and role == shim.KVConnectorRole.WORKER:
            self._adapters = watch_adapters()
        manager = shim.scheduler_manager(self)
        if manager is not None:
            warn_of_untested(shim.VLLM_VERSION, shim.logger)
            self._manager: KvkernManager = manager
            self._content = ContentNames(vllm_config)
            weights = resolve_weights(vllm_config, options)
            windowed = shim.windowed_groups(kv_cache_config, offload)
            self._blocks = blocks = shim.EngineBlocks(self)
            self._proof = StoreProof(
                blocks,
                {group.group_id: group.tokens_per_block for group in offload.groups},
                offload.cache.blocks_per_chunk,
                windowed,
            )
            manager.bind(
                namespace=lambda: namespace_of(vllm_config, offload, options, weights, self._packing()),
                proof=self._proof,
                windowed=windowed,
                handed_over=handed_over,
                tool_calls=tool_call_ids(vllm_config),
                adapters=None if lora is None else AdapterNames(lora, blocks.nothing_cached),
            )

    # -- worker ------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Build the worker, which asks `_adapters` before it copies KV of an adapter."""
        super().register_kv_caches(kv_caches)
        shim.worker_of(self).adapters = self._adapters

    def unregister_kv_caches(self) -> None:
        """Finish all transfers, because vLLM is about to free the memory of the KV cache. vLLM 0.33 calls it for sleep mode."""
        shim.finish_transfers(self)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Remember which request each load belongs to, then start the loads."""
        metadata = self._connector_metadata
        assert isinstance(metadata, shim.OffloadingConnectorMetadata)
        shim.worker_of(self).begin_step()
        if self._adapters is not None and isinstance(metadata, StepMetadata):
            self._adapters.step = metadata.step
        self._load_requests.update((job_id, job.req_id) for job_id, job in metadata.load_jobs.items())
        super().start_load_kv(forward_context, **kwargs)

    def get_transfer_results(self, finished_req_ids: set[str]) -> shim.KVConnectorTransferResults:
        """Return finished transfers, and the requests whose load did not verify. vLLM recomputes those requests."""
        worker: KvkernWorker = shim.worker_of(self)
        if getattr(self._connector_metadata, "idle", False):
            worker.wait_for_loads(IDLE_WAIT_S)
        sending, receiving = self.get_finished(finished_req_ids)
        failed_jobs = worker.take_failed_loads()
        failed = {self._load_requests[job_id] for job_id in failed_jobs if job_id in self._load_requests}
        if self._adapters is not None:
            self._adapters.drop(finished_req_ids)
        done = receiving | failed
        self._load_requests = {job: req for job, req in self._load_requests.items() if req not in done}
        return shim.KVConnectorTransferResults(sending, receiving, failed)

    def build_connector_worker_meta(self) -> shim.OffloadingWorkerMetadata | None:
        """Return what has happened since the last call: each transfer, adapters that vLLM has loaded, a new arena."""
        metadata = super().build_connector_worker_meta()
        news = self._adapters.take_news() if self._adapters is not None else {}
        worker: KvkernWorker = shim.worker_of(self)
        transfers = worker.take_transfers()
        arena = worker.take_arena()
        if metadata is None and not news and not transfers and arena is None:
            return None
        metadata = metadata or shim.OffloadingWorkerMetadata()
        arenas = {} if arena is None else {self._vllm_config.parallel_config.rank: arena}
        return WorkerReport(metadata.completed_jobs, metadata.transfer_stats, news, transfers, arenas)

    def get_handshake_metadata(self) -> shim.KVConnectorHandshakeMetadata | None:
        """Report how this worker's layers pack their pages. Inside MultiConnector the handshake belongs to the others."""
        if not self._alone:
            return None
        packing = packing_of_worker(self._vllm_config, self._kv_cache_config)
        return PackingReport(packing, self._vllm_config.parallel_config.rank, shim.worker_of(self).arena)

    # -- scheduler ---------------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata(self, metadata: dict[int, shim.KVConnectorHandshakeMetadata]) -> None:
        """Take the workers' reports. vLLM calls this before the first request."""
        self._reported_packing = agreed_packing(metadata.values())
        self._manager.ranks.note(reported_arenas(metadata.values()))

    def _packing(self) -> str:
        if self._reported_packing is None:
            self._reported_packing = packing_of_scheduler(self._vllm_config, self._kv_cache_config)
        return self._reported_packing

    def on_new_request(self, request: shim.Request) -> None:
        """Give the request to the manager, which needs its block hashes."""
        drop_malformed_params(request)
        super().on_new_request(request)
        self._manager.attach_request(request, self._content.name(request))

    def get_num_new_matched_tokens(self, request: shim.Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Look up by the request's present hashes: a streaming-input session may have dropped some."""
        shim.drop_stale_state(self, request)
        self._manager.note_engine_hit(request.request_id, num_computed_tokens)
        found: tuple[int | None, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
        self._manager.note_found(request.request_id, found[0] or 0)
        return found

    def request_finished_all_groups(
        self, request: shim.Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Keep the block table for the request's last stores."""
        shim.drop_stale_state(self, request)
        self._proof.note_ended(request, block_ids)
        answer: tuple[bool, dict[str, Any] | None] = super().request_finished_all_groups(request, block_ids)
        return answer

    def request_finished(self, request: shim.Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """As above. vLLM calls this one inside MultiConnector, next to a connector that knows no KV groups."""
        return self.request_finished_all_groups(request, (block_ids,))

    def build_connector_meta(self, scheduler_output: shim.SchedulerOutput) -> shim.KVConnectorMetadata:
        """Plan this step's jobs from what the scheduler holds now, and remember the ticket of each."""
        anew = {data.req_id for data in scheduler_output.scheduled_new_reqs}
        for req_id in scheduler_output.num_scheduled_tokens:
            if (request := self._manager.request(req_id)) is None:
                continue
            goes_on = shim.drop_stale_state(self, request, scheduled_anew=req_id in anew)
            if goes_on and shim.repair_hashes(request):
                shim.drop_stale_state(self, request)
                self._manager.stop_storing(
                    f"a streaming-input session went on, and vLLM {shim.VLLM_VERSION} had named a block by a token that it "
                    f"dropped, so its own cache may hold wrong KV. Use vLLM 0.32 or newer, or reset with reset_connector=True"
                )
            if goes_on and self._speculates:
                self._manager.stop_storing(
                    "a streaming-input session went on in an engine with speculation, where vLLM may take drafts for computed "
                    "tokens. Run sessions on an engine without speculation, or reset with reset_connector=True"
                )
        self._proof.begin_step(scheduler_output)
        metadata = super().build_connector_meta(scheduler_output)
        self._proof.end_step(scheduler_output)
        for req_id, first_chunks in self._manager.take_postponed().items():
            shim.offer_again(self, req_id, first_chunks)
        assert isinstance(metadata, shim.OffloadingConnectorMetadata)
        for job_id, job in metadata.load_jobs.items():
            assert isinstance(job.src_spec, SlotSpec)
            self._transfers[job_id] = _Transfer(job.src_spec.ticket, self._world_size)
        for job_id, job in metadata.store_jobs.items():
            assert isinstance(job.dst_spec, SlotSpec)
            self._transfers[job_id] = _Transfer(job.dst_spec.ticket, self._world_size)
        tokens = scheduler_output.total_num_scheduled_tokens
        self._manager.prefill.step_scheduled(tokens, shim.count_prompt_tokens(scheduler_output))
        idle = tokens == 0
        return StepMetadata(metadata.load_jobs, metadata.store_jobs, metadata.jobs_to_flush, idle, self._manager.step)

    def update_connector_output(self, connector_output: shim.KVConnectorOutput) -> None:
        """End the tickets of jobs that all ranks have finished. Includes jobs that vLLM forgot in a reset.

        A request whose load failed is computed, and all its chunks are offered for storing again.
        """
        if connector_output.invalid_block_ids:
            self._note_invalid_blocks(connector_output.invalid_block_ids)
        for req_id in connector_output.failed_recving:
            self._manager.note_failed_load(req_id)
            shim.restart_stores(self, req_id)
        metadata = connector_output.kv_connector_worker_meta
        if isinstance(metadata, WorkerReport):
            self._manager.note_adapters(metadata.adapters)
            self._manager.ranks.note(metadata.arenas)
            for moved in metadata.transfers:
                self._manager.meter.note_transfer(*moved)
        if isinstance(metadata, shim.OffloadingWorkerMetadata):
            for job_id, count in metadata.completed_jobs.items():
                if (transfer := self._transfers.get(job_id)) is not None:
                    transfer.ranks_left -= count
                    if transfer.ranks_left <= 0:
                        del self._transfers[job_id]
                        self._manager.end_transfer(transfer.ticket)
        super().update_connector_output(connector_output)

    def _note_invalid_blocks(self, block_ids: set[int]) -> None:
        """Store nothing that another connector of MultiConnector failed to load. It says so after a step with such blocks.

        If a block has a name in vLLM's own cache, other requests may have it before it is computed again.
        """
        self._manager.spoil_stores()
        if any(self._blocks.pool_hash(block_id) is not None for block_id in block_ids):
            self._manager.stop_storing(
                "another connector could not load blocks that vLLM's own cache has already, and vLLM may give them to other "
                "requests before it has computed them. Reset with reset_connector=True"
            )

    def get_kv_connector_stats(self) -> shim.KVConnectorStats | None:
        """Return vLLM's stats, and end a step's timing: the scheduler calls this once per step whose results have come."""
        if shim.scheduler_manager(self) is not None:
            self._manager.prefill.step_ended()
        return super().get_kv_connector_stats()

    # -- front end ---------------------------------------------------------------------------------------------------

    @classmethod
    def build_prom_metrics(cls, vllm_config: shim.VllmConfig, *args: Any, **kwargs: Any) -> shim.KVConnectorPromMetrics:
        """Fill in the spec's name before vLLM needs it. The front end is a process of its own, without a connector.

        An engine that starts in the same process later registers its counters anew, as vLLM does with its own.
        """
        options = parse_options(vllm_config.kv_transfer_config.kv_connector_extra_config)
        set_up_engine(options.log_format)
        fill_defaults(vllm_config)
        if options.metrics_port and shim.is_first_front_end(vllm_config):
            serve_metrics(options.metrics_port, shim.metrics_app())
        shim.unregister_metrics("kvkern:")
        return super().build_prom_metrics(vllm_config, *args, **kwargs)
