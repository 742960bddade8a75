"""Fills in vLLM's transfer configuration from the published deployment's variables, before vLLM checks its options.

`EngineArgs.create_engine_config` is wrapped: every way to start an engine calls it, in the front end, and vLLM hands the
result to all processes of the engine. It imports nothing of the adapter.

    no --kv-transfer-config, both switches on    KvkernConnector, with the options that the variables say
    AIBrixOffloadingConnector..., unless this    KvkernConnector, with the options that AIBRIX_KV_CACHE_OL_* say
    vLLM has it, or a module path says where
    anything else                                what the user has written; the variables have no effect
"""

from __future__ import annotations

import math
import os
from functools import wraps
from typing import Any

from ..config import Config
from ..config.engine import used_by_engine
from ..config.options import BY_NAME, Reader
from ..config.published import Deployment, Family, merged, read, switched_on
from ..config.sources import Rank, Setting, gather
from ..errors import ConfigError
from ..observability.logs import LogFormat, set_up_engine

CONNECTOR = "KvkernConnector"
MODULE = "kvkern.integrations.vllm"
OPTIONS_KEY = "kvkern"
REPLACED = "AIBrixOffloadingConnector"  # and what follows, such as V1Type3
_CPU_BLOCK_TOKENS = 128  # vLLM's default on CPUs
_CPU_BLOCK_UNIT = 32  # of which a block is a multiple there


def wrap_engine_args() -> None:
    """Let every engine's configuration be filled in. Idempotent, and raises nothing."""
    from vllm.engine.arg_utils import EngineArgs

    original = getattr(EngineArgs, "create_engine_config", None)
    if original is None or getattr(original, "fills_in_kvkern", False):
        return

    @wraps(original)
    def filling_in(args: Any, *more: Any, **named: Any) -> Any:
        origin = fill_in(args)
        config = original(args, *more, **named)
        if origin is not None:
            refuse_chunk_size(int(origin.value), config.cache_config.block_size, origin.origin.name)
        return config

    filling_in.fills_in_kvkern = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = filling_in


def fill_in(args: Any) -> Setting | None:
    """Set `kv_transfer_config` of vLLM's EngineArgs if the variables ask for it. Returns the size of chunks that they set.

    Raises ConfigError for a variable with a value that cannot be honoured.
    """
    log = _logger()
    on, line = switched_on(os.environ)
    if on or line or str(_connector_of(args.kv_transfer_config)).startswith(REPLACED):
        set_up_engine(_log_format())
    if line:
        log.warning("kvkern: %s", line)
    replaced = _stands_for_kvkern(args.kv_transfer_config, log)
    if not on and not replaced:
        return None
    family = Family.OFFLOADING if replaced else Family.VINEYARD
    if not replaced and (other := _other_choice(args)):
        log.info("kvkern: %s counts, and the variables of %s have no effect", other, family)
        return None
    said = read(os.environ, family)
    for note in said.notes:
        log.info("kvkern: %s", note)
    options = _options(said, family)
    from vllm.config import KVTransferConfig

    args.kv_transfer_config = KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path=MODULE,
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={OPTIONS_KEY: {name: setting.value for name, setting in options.items()}},
    )
    shown = (f"{name}={_shown(name, setting)} ({setting.origin.name})" for name, setting in options.items())
    log.info("kvkern: %s switches the cache on: %s", family, ", ".join(shown) or "nothing but KVKERN_* variables")
    _fix_hash_seed(log)
    chunk = options.get("chunk_tokens")
    if chunk is not None:
        _choose_block_size(args, int(chunk.value), log)
    return chunk


def _log_format() -> LogFormat:
    """Return how kvkern's lines are written. A mistake in the variables or the file is told later, if kvkern is used."""
    try:
        settings = gather(Reader.ENGINE, {}, "the variables")
    except ConfigError:
        return "text"
    return "json" if "log_format" in settings and settings["log_format"].value == "json" else "text"


def _options(said: Deployment, family: Family) -> dict[str, Setting]:
    """Return the options of the published variables that count beside KVKERN_* and the file. Raises ConfigError."""
    where = f"the variables of {family}"
    settings = merged(gather(Reader.ENGINE, {}, where), said.settings)
    if "socket" not in settings and "capacity" not in settings:
        raise ConfigError(
            f"{where} do not say where the cache is. Name the node's daemon, for example KVKERN_SOCKET=/run/kvkern.sock (or "
            f"AIBRIX_LLM_KV_CACHE_SOCKET); or give this engine a cache of its own: KVKERN_CAPACITY, such as 8GiB"
        )
    Config.from_settings(settings, where)
    used = used_by_engine(settings, where)
    return {name: setting for name, setting in used.items() if setting.origin.rank in (Rank.DEFAULT, Rank.PUBLISHED)}


def _shown(name: str, setting: Setting) -> Any:
    return "***" if BY_NAME[name].secret else setting.value


def _connector_of(given: Any, field: str = "kv_connector") -> Any:
    return given.get(field) if isinstance(given, dict) else getattr(given, field, None)


def _stands_for_kvkern(given: Any, log: Any) -> bool:
    """Return True if the transfer configuration names the samples' connector, and vLLM does not have it."""
    name = str(_connector_of(given))
    if not name.startswith(REPLACED):
        return False
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if _connector_of(given, "kv_connector_module_path") or name in KVConnectorFactory._registry:
        log.info("kvkern: --kv-transfer-config names %s, which is installed here, so kvkern leaves it alone", name)
        return False
    log.info(
        "kvkern: vLLM has no connector %s and no module path says where it is, so KvkernConnector takes its place", name
    )
    return True


def _other_choice(args: Any) -> str:
    """Return what the user has written himself, for the log. Empty: nothing that excludes kvkern's connector."""
    if _connector_of(args.kv_transfer_config) is not None:
        return f"--kv-transfer-config with {_connector_of(args.kv_transfer_config)}"
    return "--kv-offloading-size" if getattr(args, "kv_offloading_size", None) else ""


def _fix_hash_seed(log: Any) -> None:
    """Let all engines of the node name blocks alike: releases before 0.32 do so only with PYTHONHASHSEED."""
    from vllm.v1.core import kv_cache_utils

    if not hasattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED") and os.environ.get("PYTHONHASHSEED", "random") == "random":
        os.environ["PYTHONHASHSEED"] = "0"
        log.info("kvkern: PYTHONHASHSEED is set to 0, so that engines of this vLLM name blocks alike")


def _choose_block_size(args: Any, chunk_tokens: int, log: Any) -> None:
    """On CPUs, where vLLM's default block is too long for the published chunk, choose a block that fits it."""
    from vllm.platforms import current_platform

    if args.block_size is not None or not current_platform.is_cpu() or not chunk_tokens % _CPU_BLOCK_TOKENS:
        return
    fitting = math.gcd(chunk_tokens, _CPU_BLOCK_TOKENS)
    if not fitting % _CPU_BLOCK_UNIT:
        args.block_size = fitting
        log.info(
            "kvkern: vLLM's block is set to %d tokens, so that a chunk of %d tokens is a whole number of blocks. Its default "
            "on CPUs is %d; --block-size sets it",
            fitting,
            chunk_tokens,
            _CPU_BLOCK_TOKENS,
        )


def refuse_chunk_size(
    chunk_tokens: int,
    block_tokens: int,
    name: str,  # of the option or variable
) -> None:
    """Raise ConfigError if a chunk is no whole number of blocks."""
    from vllm.platforms import current_platform

    if not chunk_tokens % block_tokens:
        return
    fits = -(-chunk_tokens // block_tokens) * block_tokens
    if current_platform.is_cpu() and chunk_tokens % _CPU_BLOCK_UNIT:
        remedy = (
            f"On CPUs vLLM's blocks are multiples of {_CPU_BLOCK_UNIT} tokens: set it to such a number, or to {fits}"
        )
    else:
        remedy = f"Set it to {fits}, or start vLLM with a --block-size that divides {chunk_tokens}"
    raise ConfigError(
        f"{name} is {chunk_tokens}, which is no multiple of vLLM's block size of {block_tokens} tokens. {remedy}"
    )


def _logger() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.kvkern")
