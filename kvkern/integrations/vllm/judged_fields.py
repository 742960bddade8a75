"""What names KV: every field of vLLM's configuration, judged. tests/integrations/vllm/test_judged_fields.py fails when vLLM
grows a field that is not here. docs/vllm_fields.md is drawn from this table.

    a field is NAMED    if it changes the function that computes KV, or what the bytes of a page mean, and nothing else in the
                        namespace or in a block's hash shows it
    a field is not      if it only changes kernels, order or batches. That changes rounding, as the size of a batch does, and
                        vLLM's own prefix cache mixes such KV too
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any


class Verdict(Enum):
    """Why a field is in the namespace, or why it is not."""

    NAMED = "in the namespace, with its value"
    MODEL = "in the namespace: shows in the weights' fingerprint or in the model's configuration"
    LAYOUT = "in the namespace: shows in dtype, layout, block size or parallel sizes"
    PACKING = "in the namespace: the workers report what they resolved it to"
    HASHED = "in every block hash: tokens, images, prompt embeddings, adapters, salts"
    INSIDE = "holds another class, whose fields are judged there"
    REFUSED = "kvkern refuses every value that would matter"
    TOKENS = "out: decides which tokens a request has, and tokens are hashed"
    AFTER = "out: acts behind the last layer, on logits, sampling, pooling and replies"
    SAME = "out: another way to compute the same function (kernels, batches, memory, placement)"
    DRAFTS = "out: decides which drafts are proposed; only accepted tokens are stored"
    SERVER = "out: runs the server (start, logs, metrics, network, queues)"
    DERIVED = "out: vLLM computes it from other fields"


V = Verdict
JUDGED: dict[str, dict[Verdict, str]] = {
    "VllmConfig": {
        V.INSIDE: "model_config cache_config parallel_config scheduler_config device_config load_config offload_config "
        "attention_config aux_output_config engram_config mamba_config kernel_config lora_config speculative_config "
        "watermark_config structured_outputs_config observability_config logging_config compilation_config "
        "profiler_config watchdog_config kv_transfer_config kv_events_config ec_transfer_config ec_manager_config "
        "reasoning_config "
        "weight_transfer_config",
        V.NAMED: "additional_config",
        V.REFUSED: "diffusion_config",
        V.DERIVED: "quant_config",
        V.SAME: "optimization_level performance_mode",
        V.SERVER: "instance_id shutdown_timeout",
    },
    "ModelConfig": {
        V.NAMED: "model_weights runner convert trust_remote_code dtype code_revision quantization quantization_config "
        "disable_sliding_window model_class_overrides model_impl",
        V.MODEL: "model hf_config hf_text_config word_embeddings_untied_by_checkpoint hf_config_path revision "
        "config_format "
        "hf_overrides seed max_model_len",
        V.TOKENS: "tokenizer tokenizer_mode allowed_local_media_path allowed_media_domains tokenizer_revision "
        "skip_tokenizer_init enable_prompt_embeds generation_config override_generation_config io_processor_plugin "
        "renderer_num_workers",
        V.INSIDE: "multimodal_config pooler_config",
        V.AFTER: "enable_return_routed_experts return_sampling_mask max_logprobs logprobs_mode use_fp64_gumbel "
        "enable_trace_replay logits_processors",
        V.SAME: "enforce_eager disable_cascade_attn enable_nccl_comm_suspend enable_cumem_allocator",
        V.REFUSED: "enable_sleep_mode sleep_preserve_parameter_names sleep_mode_backend sleep_mode_offload_cudagraph",
        V.SERVER: "allow_deprecated_quantization served_model_name hf_token spec_target_max_model_len",
        V.DERIVED: "is_submodel_config",
    },
    # The field quantization_config is named as a whole, with everything that is inside.
    "QuantizationConfigArgs": {V.NAMED: "linear moe ignore targets"},
    "QuantSpec": {V.NAMED: "weight activation"},
    "QuantKey": {V.NAMED: "dtype scale scale2 symmetric"},
    "ScalarType": {V.NAMED: "exponent mantissa signed bias _finite_values_only nan_repr"},
    "ScaleDesc": {V.NAMED: "dtype static group_shape"},
    "PoolerConfig": {
        V.AFTER: "task pooling_type seq_pooling_type tok_pooling_type use_activation enable_flash_late_interaction "
        "dimensions logit_mean logit_sigma step_tag_id returned_token_ids",
        V.TOKENS: "enable_chunked_processing max_embed_len",
    },
    "MultiModalConfig": {
        V.NAMED: "media_io_kwargs mm_processor_kwargs mm_device_do_normalize mm_encoder_attn_dtype "
        "mm_encoder_fp8_scale_path video_pruning_rate video_pruning_method allow_missing_mm_embeddings mm_encoder_only "
        "language_model_only",
        V.HASHED: "mm_hasher_algorithm enable_mm_embeds",
        V.TOKENS: "limit_per_prompt interleave_mm_strings",
        V.SAME: "mm_processor_cache_gb mm_processor_cache_type mm_shm_cache_max_object_size_mb mm_encoder_tp_mode "
        "mm_encoder_attn_backend skip_mm_profiling mm_tensor_ipc mm_ipc_gpu_memory_gb",
        V.SERVER: "mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin",
    },
    "BaseDummyOptions": {V.SAME: "count"},
    "CacheConfig": {
        V.NAMED: "cache_dtype kv_cache_dtype_skip_layers sliding_window mamba_block_size mamba_cache_dtype "
        "mamba_ssm_cache_dtype mamba_cache_mode replayssm_buffer_len use_replayssm use_kda_recoverssm "
        "kv_sharing_fast_prefill swa_bounded_replay",
        V.LAYOUT: "block_size kv_cache_layout prefix_match_unit mamba_page_size_padded skip_page_size_padded "
        "prefix_caching_hash_algo hash_block_size",
        V.SAME: "gpu_memory_utilization num_gpu_blocks_override enable_prefix_caching prefix_cache_retention_interval "
        "enable_mamba_shared_prefix_checkpoint enable_mamba_fine_grained_prefix_cache kv_cache_memory_bytes "
        "kv_offloading_size kv_offloading_backend",
        V.DERIVED: "user_specified_block_size user_specified_mamba_block_size simple_cpu_offload_num_blocks "
        "is_attention_free num_gpu_blocks num_cpu_blocks "
        "effective_attention_block_size kv_cache_size_tokens kv_cache_max_concurrency cache_hit_alignment_tokens "
        "_block_size_resolved",
    },
    "ParallelConfig": {
        V.LAYOUT: "tensor_parallel_size world_size",
        V.REFUSED: "pipeline_parallel_size prefill_context_parallel_size decode_context_parallel_size "
        "dcp_kv_cache_interleave_size dcp_comm_backend dcp_q_replicate cp_kv_cache_interleave_size nnodes node_rank "
        "distributed_executor_backend",
        V.SAME: "is_moe_model enable_hc_sp enable_expert_parallel enable_batch_sharded_sampling "
        "enable_ep_weight_filter "
        "enable_eplb expert_placement_strategy all2all_backend disable_custom_all_reduce enable_shm_tensor_arena "
        "enable_elastic_ep elastic_ep_max_dp_size enable_dbo ubatch_size dbo_decode_token_threshold "
        "dbo_prefill_token_threshold disable_nccl_for_dp_synchronization data_parallel_size data_parallel_size_local "
        "data_parallel_rank data_parallel_rank_local data_parallel_index rank numa_bind numa_bind_nodes numa_bind_cpus "
        "assigned_physical_gpu_ids",
        V.INSIDE: "eplb_config fault_tolerance_config",
        V.SERVER: "data_parallel_master_ip data_parallel_rpc_port dp_sync_interval data_parallel_master_port "
        "data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb max_parallel_loading_workers "
        "ray_workers_use_nsight ray_runtime_env placement_group worker_cls sd_worker_cls worker_extension_cls "
        "master_addr master_port "
        "distributed_timeout_seconds cpu_distributed_timeout_seconds enable_fault_tolerance",
        V.DERIVED: "_data_parallel_master_port_list _coord_store_port _allow_auto_resolve_cp_interleave_size "
        "_api_process_count _api_process_rank",
    },
    "EPLBConfig": {
        V.SAME: "window_size step_interval num_redundant_experts log_balancedness log_balancedness_interval "
        "use_async policy "
        "communicator enable_migration_batching"
    },
    "FaultToleranceConfig": {V.SERVER: "engine_recovery_timeout_sec"},
    "SchedulerConfig": {
        V.SAME: "max_num_batched_tokens max_num_scheduled_tokens max_num_seqs max_num_active_seqs "
        "long_prefill_token_threshold long_prefill_token_threshold_adaptive enable_chunked_prefill "
        "max_num_encoder_input_tokens encoder_cache_size policy disable_chunked_mm_input scheduler_cls "
        "scheduler_reserve_full_isl watermark prefill_schedule_interval async_scheduling",
        V.LAYOUT: "disable_hybrid_kv_cache_manager",
        V.SERVER: "max_num_queued_reqs max_num_queued_tokens stream_interval",
        V.DERIVED: "runner_type is_multimodal_model",
    },
    "DeviceConfig": {V.PACKING: "device device_type"},
    "LoadConfig": {
        V.NAMED: "load_format model_loader_extra_config ignore_patterns",
        V.SAME: "safetensors_load_strategy safetensors_prefetch_num_threads safetensors_prefetch_block_size device "
        "pt_load_map_location",
        V.SERVER: "download_dir use_tqdm_on_load",
    },
    "OffloadConfig": {V.SAME: "offload_backend", V.INSIDE: "uva prefetch"},
    "UVAOffloadConfig": {V.SAME: "cpu_offload_gb cpu_offload_params"},
    "PrefetchOffloadConfig": {V.SAME: "offload_group_size offload_num_in_group offload_prefetch_step offload_params"},
    "AttentionConfig": {
        V.NAMED: "disable_flashinfer_q_quantization use_prefill_query_quantization indexer_kv_dtype "
        "indexer_sparse_logits trtllm_ragged_backend "
        "use_non_causal",
        V.PACKING: "backend minimax_m3_msa_decode_backend backend_per_kind",
        V.REFUSED: "hisparse_config",
        V.SAME: "flash_attn_version flash_attn_max_num_splits_for_cuda_graph tokenspeed_mla_min_split_kv "
        "tq_max_kv_splits_for_cuda_graph use_trtllm_attention mla_prefill_backend sparse_mla_force_mqa "
        "sparse_mla_prefill_workspace_factor flex_attn_block_m flex_attn_block_n flex_attn_q_block_size "
        "flex_attn_kv_block_size indexer_tp_shard_min_rows minimax_m3_indexer_cp",
    },
    "HiSparseConfig": {V.REFUSED: "device_buffer_size eager_host_mirror"},
    "AuxOutputConfig": {V.AFTER: "enable_return_routed_experts max_bytes"},
    "EngramConfig": {V.SAME: "cpu_offload embedding_across_dp dp_shared_memory use_thp"},
    "MambaConfig": {
        V.NAMED: "backend enable_stochastic_rounding",
        V.SAME: "stochastic_rounding_philox_rounds ssu_algorithm",
    },
    "KernelConfig": {
        V.SAME: "enable_flashinfer_autotune enable_rocm_segmented_attn_autotune enable_cutedsl_warmup "
        "enable_jit_warmup "
        "sparse_indexer_topk_backend",
        V.NAMED: "moe_backend linear_backend linear_backend_per_quant monokernel",  # some quantise activations, others do not
        V.INSIDE: "ir_op_priority",
    },
    "IrOpPriorityConfig": {V.SAME: "rms_norm fused_add_rms_norm gelu_and_mul_sparse"},
    "LoRAConfig": {
        V.NAMED: "lora_dtype target_modules enable_tower_connector_lora enable_mixed_moe_lora_format "
        "enable_moe_shared_loras",
        V.HASHED: "default_mm_loras",
        V.SAME: "max_lora_rank max_loras fully_sharded_loras max_cpu_loras specialize_active_lora",
        V.AFTER: "max_lora_cls_labels",
    },
    "SpeculativeConfig": {
        V.MODEL: "model method quantization draft_model_config revision code_revision draft_load_config kv_cache_dtype "
        "max_model_len index_share_for_mtp_iteration parallel_drafting",
        V.PACKING: "attention_backend",
        V.LAYOUT: "draft_tensor_parallel_size tensor_parallel_size draft_parallel_config",
        V.DRAFTS: "num_speculative_tokens disable_padded_drafter_batch disable_eagle_block_drop "
        "use_local_argmax_reduction "
        "use_heterogeneous_vocab prompt_lookup_max prompt_lookup_min num_speculative_tokens_per_batch_size "
        "suffix_decoding_max_tree_depth suffix_decoding_max_cached_requests suffix_decoding_max_spec_factor "
        "suffix_decoding_min_token_prob rejection_sample_method synthetic_acceptance_rates synthetic_acceptance_length "
        "enable_adaptive_verification draft_sample_method dspark_draft_topk draft_lm_head_quantization xpress_topc "
        "fly_window_size fly_entropy_threshold fly_entropy_top_k",
        V.HASHED: "disable_lookahead_block_hashes",  # with a connector, vLLM's hashes never look ahead
        V.SAME: "enforce_eager moe_backend",
        V.DERIVED: "target_model_config target_parallel_config",
    },
    "WatermarkConfig": {
        V.AFTER: "key algorithm alpha context_width deduplicate_contexts deduplicate_contexts_max_history prf "
        "allow_target_only_watermarking"
    },
    "DiffusionConfig": {V.REFUSED: "canvas_length max_denoising_steps"},
    "StructuredOutputsConfig": {
        V.AFTER: "backend disable_any_whitespace disable_additional_properties reasoning_parser "
        "reasoning_parser_plugin "
        "enable_in_reasoning"
    },
    "ObservabilityConfig": {
        V.SERVER: "show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces "
        "per_request_spec_decode_metrics kv_cache_metrics kv_cache_metrics_sample custom_histogram_buckets "
        "cudagraph_metrics enable_layerwise_nvtx_tracing enable_mfu_metrics enable_mm_processor_stats "
        "enable_logging_iteration_details jit_monitor_mode jit_monitor_verbose"
    },
    "LoggingConfig": {V.SERVER: "log_level formatter configure_logging pylogging_config_file"},
    "CompilationConfig": {
        V.SAME: "mode debug_dump_path cache_dir compile_cache_save_format backend custom_ops ir_enable_torch_wrap "
        "splitting_ops compile_mm_encoder cudagraph_mm_encoder encoder_cudagraph_token_budgets "
        "encoder_cudagraph_max_vision_items_per_batch encoder_cudagraph_max_frames_per_batch cudagraph_decoder_replay "
        "decoder_replay_cudagraph_capture_sizes decoder_replay_trim_threshold compile_sizes compile_ranges_endpoints "
        "inductor_compile_config inductor_passes cudagraph_mode cudagraph_num_of_warmups cudagraph_capture_sizes "
        "cudagraph_copy_inputs cudagraph_specialize_lora use_inductor_graph_partition max_cudagraph_capture_size "
        "local_cache_dir fast_moe_cold_start",
        V.INSIDE: "pass_config dynamic_shapes_config",
        V.DERIVED: "enabled_custom_ops disabled_custom_ops traced_files compilation_time encoder_compilation_time "
        "static_forward_context static_all_moe_layers",
    },
    "PassConfig": {
        V.SAME: "enable_sp sp_min_token_num fuse_gemm_comms fuse_norm_quant fuse_act_quant fuse_attn_quant "
        "eliminate_noops fuse_allreduce_rms "
        "enable_qk_norm_rope_fusion fuse_rope_kvcache_cat_mla fuse_act_padding fuse_mla_dual_rms_norm "
        "fuse_rope_kvcache "
        "fuse_qk_norm_rope_kvcache rope_kvcache_fusion_max_token_num fi_allreduce_fusion_max_size_mb"
    },
    "DynamicShapesConfig": {V.SAME: "type evaluate_guards assume_32_bit_indexing"},
    "ProfilerConfig": {
        V.SERVER: "profiler torch_profiler_dir torch_profiler_activities proton_profiler_dir proton_context "
        "proton_data "
        "proton_backend proton_mode proton_hook proton_output_format proton_graph_attribution "
        "torch_profiler_with_stack "
        "torch_profiler_with_flops torch_profiler_use_gzip torch_profiler_dump_cuda_time_total "
        "torch_profiler_record_shapes torch_profiler_with_memory capture_torch_profiler detailed_trace_annotation "
        "ignore_frontend delay_iterations max_iterations warmup_iterations active_iterations wait_iterations"
    },
    "WatchdogConfig": {V.SERVER: "timeout check_interval dump_dir"},
    "KVTransferConfig": {
        V.REFUSED: "kv_role kv_load_failure_policy enable_permute_local_kv",
        V.SERVER: "kv_connector engine_id kv_buffer_device kv_buffer_size kv_rank kv_parallel_size kv_ip kv_port "
        "kv_connector_extra_config kv_connector_module_path",
    },
    "KVEventsConfig": {
        V.SERVER: "enable_kv_cache_events publisher endpoint replay_endpoint buffer_steps hwm max_queue_size topic"
    },
    "ECTransferConfig": {  # embeddings that another engine computed; the image's hash is in the block hash
        V.NAMED: "ec_connector ec_role",
        V.SERVER: "engine_id ec_buffer_device ec_buffer_size ec_rank ec_parallel_size ec_ip ec_port "
        "ec_connector_extra_config "
        "ec_connector_module_path mm_encoder_output_widths",
    },
    "EncoderCacheManagerConfig": {V.SAME: "encoder_cache_manager_cls manager_config"},
    "ReasoningConfig": {
        V.AFTER: "reasoning_parser reasoning_start_str reasoning_end_str _reasoning_start_token_ids "
        "_reasoning_end_token_ids _natural_reasoning_end_token_ids _enabled"
    },
    "WeightTransferConfig": {V.SERVER: "backend"},  # new weights: reset with reset_connector=True
}


def verdicts(class_name: str) -> dict[str, Verdict]:
    """Return the judged fields of a configuration class. Empty for a class that nobody has judged."""
    return {name: verdict for verdict, names in JUDGED.get(class_name, {}).items() for name in names.split()}


def named_values(config: Any) -> dict[str, str]:  # a VllmConfig
    """Return the values of all NAMED fields as text, by class and field. A class that is None in `config` has none.

    A field that nobody has judged, of a vLLM newer than the known ones, is named too: engines share less then, never wrongly.
    """
    found: dict[str, str] = {}
    judged = verdicts(type(config).__name__)
    unjudged = {field.name: Verdict.NAMED for field in fields(config) if field.name not in judged}
    for name, verdict in (judged | unjudged).items():
        value = getattr(config, name, None)  # other versions lack some
        if verdict is Verdict.NAMED and value is not None:
            found[f"{type(config).__name__}.{name}"] = _text(value)
        elif verdict is Verdict.INSIDE and value is not None:
            found |= named_values(value)
    return found


def _text(value: Any) -> str:
    """Return the value in a form that is equal in every process. Sets and mappings are sorted."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(value[key])}" for key in sorted(value, key=str)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(_text, value))) + "}"
    return str(value)
