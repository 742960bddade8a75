"""`KvkernConnector`: vLLM's offloading connector with kvkern's spec, and what the stock one lacks.

The stock worker asserts that no load ever fails and so would kill the engine; a reset makes the stock scheduler forget
jobs whose memory is still being written. Both are handled here, from the outside.
"""

from __future__ import annotations

from typing import Any

from . import shim
from .manager import KvkernManager
from .namespace import namespace_of, resolve_weights
from .options import fill_defaults, parse_options, refuse_unshareable, refuse_unsupported
from .stop_reasons import tool_call_ids
from .transfer_metadata import SlotSpec, StepMetadata
from .worker import KvkernWorker

IDLE_WAIT_S = 0.005  # how long an engine with nothing to compute waits for a load instead of polling for it


class KvkernConnector(shim.OffloadingConnector):
    """Configure with `kv_connector_module_path="kvkern.integrations.vllm"`; see options.kv_transfer_config."""

    def __init__(
        self, vllm_config: shim.VllmConfig, role: shim.KVConnectorRole, kv_cache_config: shim.KVCacheConfig
    ) -> None:
        refuse_unsupported(vllm_config)
        fill_defaults(vllm_config)
        options = parse_options(vllm_config.kv_transfer_config.kv_connector_extra_config)
        refuse_unshareable(options, vllm_config)
        super().__init__(vllm_config, role, kv_cache_config)
        self._load_requests: dict[int, str] = {}  # worker: load job -> request
        self._tickets: dict[int, list[int]] = {}  # scheduler: job -> [ticket, ranks still at it]
        self._world_size = vllm_config.parallel_config.world_size
        manager = shim.scheduler_manager(self)
        if manager is not None:
            self._manager: KvkernManager = manager
            weights = resolve_weights(vllm_config, options)
            offload = shim.build_offloading_config(vllm_config, kv_cache_config)
            manager.bind(
                namespace=lambda: namespace_of(vllm_config, offload, options, weights),
                windowed=shim.windowed_groups(kv_cache_config),
                tool_calls=tool_call_ids(vllm_config),
            )

    # -- worker ------------------------------------------------------------------------------------------------------

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Remember whose loads these are, then start them."""
        metadata = self._connector_metadata
        assert isinstance(metadata, shim.OffloadingConnectorMetadata)
        self._load_requests.update((job_id, job.req_id) for job_id, job in metadata.load_jobs.items())
        super().start_load_kv(forward_context, **kwargs)

    def get_transfer_results(self, finished_req_ids: set[str]) -> shim.KVConnectorTransferResults:
        """Finished loads, and those of them that did not verify: vLLM recomputes these requests."""
        worker: KvkernWorker = shim.worker_of(self)
        if getattr(self._connector_metadata, "idle", False):
            worker.wait_for_loads(IDLE_WAIT_S)
        sending, receiving = self.get_finished(finished_req_ids)
        failed_jobs = worker.take_failed()
        failed = {self._load_requests[job_id] for job_id in failed_jobs if job_id in self._load_requests}
        done = receiving | failed
        self._load_requests = {job: req for job, req in self._load_requests.items() if req not in done}
        return shim.KVConnectorTransferResults(sending, receiving, failed)

    # -- scheduler ---------------------------------------------------------------------------------------------------

    def on_new_request(self, request: shim.Request) -> None:
        """Let the manager see the request's block hashes."""
        super().on_new_request(request)
        self._manager.attach(request)

    def build_connector_meta(self, scheduler_output: shim.SchedulerOutput) -> shim.KVConnectorMetadata:
        """Note which job runs under which ticket."""
        metadata = super().build_connector_meta(scheduler_output)
        assert isinstance(metadata, shim.OffloadingConnectorMetadata)
        for job_id, job in metadata.load_jobs.items():
            assert isinstance(job.src_spec, SlotSpec)
            self._tickets[job_id] = [job.src_spec.ticket, self._world_size]
        for job_id, job in metadata.store_jobs.items():
            assert isinstance(job.dst_spec, SlotSpec)
            self._tickets[job_id] = [job.dst_spec.ticket, self._world_size]
        tokens = scheduler_output.total_num_scheduled_tokens
        self._manager.prefill.began(tokens, shim.prompt_tokens(scheduler_output))
        idle = tokens == 0
        return StepMetadata(metadata.load_jobs, metadata.store_jobs, metadata.jobs_to_flush, idle)

    def update_connector_output(self, connector_output: shim.KVConnectorOutput) -> None:
        """End the tickets of jobs that all ranks have finished, also of jobs vLLM has forgotten in a reset.

        Requests whose load failed are computed, and all their chunks are offered for storing again.
        """
        for req_id in connector_output.failed_recving:
            self._manager.load_failed(req_id)
            shim.restart_stores(self, req_id)
        metadata = connector_output.kv_connector_worker_meta
        if isinstance(metadata, shim.OffloadingWorkerMetadata):
            for job_id, count in metadata.completed_jobs.items():
                if (entry := self._tickets.get(job_id)) is not None:
                    entry[1] -= count
                    if entry[1] <= 0:
                        del self._tickets[job_id]
                        self._manager.finish(entry[0])
        super().update_connector_output(connector_output)

    def get_kv_connector_stats(self) -> shim.KVConnectorStats | None:
        """Asked of the scheduler once for every step whose results have come."""
        if shim.scheduler_manager(self) is not None:
            self._manager.prefill.ended()
        return super().get_kv_connector_stats()

    # -- front end ---------------------------------------------------------------------------------------------------

    @classmethod
    def build_prom_metrics(cls, vllm_config: shim.VllmConfig, *args: Any, **kwargs: Any) -> shim.KVConnectorPromMetrics:
        """The front end runs in another process: it needs the spec's name too."""
        fill_defaults(vllm_config)
        return super().build_prom_metrics(vllm_config, *args, **kwargs)
