"""`KvkernConnector`: vLLM's offloading connector with kvkern's spec, and with two of its faults fixed from the outside.

- The stock worker asserts that every load succeeds, so a failed load would kill the engine.
- After a reset the stock scheduler forgets jobs whose memory is still being written.
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

IDLE_WAIT_S = 0.005  # how long an engine with nothing to compute waits for a load before it polls again


class KvkernConnector(shim.OffloadingConnector):
    """Switched on by `kv_connector_module_path="kvkern.integrations.vllm"`; see options.kv_transfer_config."""

    def __init__(
        self, vllm_config: shim.VllmConfig, role: shim.KVConnectorRole, kv_cache_config: shim.KVCacheConfig
    ) -> None:
        refuse_unsupported(vllm_config)
        fill_defaults(vllm_config)
        options = parse_options(vllm_config.kv_transfer_config.kv_connector_extra_config)
        refuse_unshareable(options, vllm_config)
        super().__init__(vllm_config, role, kv_cache_config)
        self._load_requests: dict[int, str] = {}  # worker: load job -> request id
        self._tickets: dict[int, list[int]] = {}  # scheduler: job -> [ticket, ranks that have not finished]
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
        """Remember which request each load belongs to, then start the loads."""
        metadata = self._connector_metadata
        assert isinstance(metadata, shim.OffloadingConnectorMetadata)
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
        done = receiving | failed
        self._load_requests = {job: req for job, req in self._load_requests.items() if req not in done}
        return shim.KVConnectorTransferResults(sending, receiving, failed)

    # -- scheduler ---------------------------------------------------------------------------------------------------

    def on_new_request(self, request: shim.Request) -> None:
        """Give the request to the manager, which needs its block hashes."""
        super().on_new_request(request)
        self._manager.attach_request(request)

    def build_connector_meta(self, scheduler_output: shim.SchedulerOutput) -> shim.KVConnectorMetadata:
        """Remember the ticket of each job of this step."""
        metadata = super().build_connector_meta(scheduler_output)
        assert isinstance(metadata, shim.OffloadingConnectorMetadata)
        for job_id, job in metadata.load_jobs.items():
            assert isinstance(job.src_spec, SlotSpec)
            self._tickets[job_id] = [job.src_spec.ticket, self._world_size]
        for job_id, job in metadata.store_jobs.items():
            assert isinstance(job.dst_spec, SlotSpec)
            self._tickets[job_id] = [job.dst_spec.ticket, self._world_size]
        tokens = scheduler_output.total_num_scheduled_tokens
        self._manager.prefill.step_scheduled(tokens, shim.count_prompt_tokens(scheduler_output))
        idle = tokens == 0
        return StepMetadata(metadata.load_jobs, metadata.store_jobs, metadata.jobs_to_flush, idle)

    def update_connector_output(self, connector_output: shim.KVConnectorOutput) -> None:
        """End the tickets of jobs that all ranks have finished. Includes jobs that vLLM forgot in a reset.

        A request whose load failed is computed, and all its chunks are offered for storing again.
        """
        for req_id in connector_output.failed_recving:
            self._manager.note_failed_load(req_id)
            shim.restart_stores(self, req_id)
        metadata = connector_output.kv_connector_worker_meta
        if isinstance(metadata, shim.OffloadingWorkerMetadata):
            for job_id, count in metadata.completed_jobs.items():
                if (entry := self._tickets.get(job_id)) is not None:
                    entry[1] -= count
                    if entry[1] <= 0:
                        del self._tickets[job_id]
                        self._manager.end_transfer(entry[0])
        super().update_connector_output(connector_output)

    def get_kv_connector_stats(self) -> shim.KVConnectorStats | None:
        """Return vLLM's stats, and end a step's timing: the scheduler calls this once per step whose results have come."""
        if shim.scheduler_manager(self) is not None:
            self._manager.prefill.step_ended()
        return super().get_kv_connector_stats()

    # -- front end ---------------------------------------------------------------------------------------------------

    @classmethod
    def build_prom_metrics(cls, vllm_config: shim.VllmConfig, *args: Any, **kwargs: Any) -> shim.KVConnectorPromMetrics:
        """Fill in the spec's name before vLLM needs it. The front end is a process of its own, without a connector."""
        fill_defaults(vllm_config)
        return super().build_prom_metrics(vllm_config, *args, **kwargs)
