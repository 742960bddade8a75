"""Engine level: one vLLM after the other, each with another connector, all with the same model, prompts and arguments.

Knows how each connector is configured and which server runs beside it. engine_child.py measures, rows.py judges.
"""

from __future__ import annotations

import re
import shutil
import socket
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from kvkern import __version__
from kvkern.demo import engine_process, preconditions
from kvkern.demo.engine import engine_kwargs
from kvkern.demo.messages import EngineSpec
from kvkern.demo.prompts import PromptLibrary

from . import venvs
from .children import Child, PeerFailed, log_tail, wait_until
from .rows import Row, Verdict, engine_verdict

HERE = Path(__file__).parent
SHM = Path("/dev/shm")
WARM_UP_TOKENS = 256
SILENCE_LIMIT_S = 300.0  # longest wait for a line: an engine's start or one request
SERVER_LIMIT_S = 90.0
CAPACITY_GIB = 2  # capacity of every system's store
BLOCK_TOKENS = 128
# Switches off usage reports of the rivals, and a hash seed that would change keys from run to run.
QUIET = {
    "LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1", "LMCACHE_DISABLE_BANNER": "1", "PYTHONHASHSEED": "0",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How much is asked of each engine."""

    prompt_tokens: tuple[int, ...] = (
        2000,
        8000,
    )  # not a multiple of a block, whose last block a native hit would compute
    documents: int = 3  # computed per length. Three of the longest overwrite the pool, see engine_child.py
    pairs: int = 9
    reply_tokens: int = 8
    reserved_cpus: int | None = None  # CPUs kept free of compute threads; None: as in the demo

    def job(self, model: Path) -> dict[str, Any]:
        """Return the part of the child's job that is the same for every system."""
        library = PromptLibrary.from_model(model)
        warm_up = library.document(WARM_UP_TOKENS)
        lengths = [library.documents(self.documents, tokens) for tokens in self.prompt_tokens]
        return {
            "arguments": engine_kwargs(self.spec(model)),
            "warm_up": warm_up,
            "lengths": lengths,
            "pairs": self.pairs,
            "reply_tokens": self.reply_tokens,
        }

    def spec(self, model: Path) -> EngineSpec:
        """Return a spec with one step per prompt, because ExampleConnector stores only the KV of a prompt's first step."""
        longest = max(self.prompt_tokens)
        pool_blocks = 2 * -(-longest // BLOCK_TOKENS) + 1
        nbytes = pool_blocks * BLOCK_TOKENS * preconditions.kv_nbytes_per_token(model, dtype_nbytes=2)
        return EngineSpec(
            model=str(model),
            kv_pool_nbytes=nbytes,
            block_tokens=BLOCK_TOKENS,
            max_model_tokens=longest + BLOCK_TOKENS,
            max_batched_tokens=longest + BLOCK_TOKENS,
        )

    def environment(self) -> dict[str, str]:
        env = engine_process.environment(verbose=False) | QUIET
        if self.reserved_cpus is not None:
            env["VLLM_CPU_NUM_OF_RESERVED_CPU"] = str(self.reserved_cpus)
        return env


def with_reserved_cpus(plan: Plan, reserved_cpus: int | None) -> Plan:
    return replace(plan, reserved_cpus=reserved_cpus)


@dataclass(frozen=True)
class ReadySystem:
    """A system whose server, if it has one, runs, so that the engine can start."""

    transfer: Mapping[str, Any]  # fields of vLLM's KVTransferConfig
    version: str
    python: str = sys.executable
    loads_logged: Callable[[], list[int] | None] = field(default=lambda: None)  # called after the engine's end


def measure(name: str, plan: Plan, model: Path, workdir: Path, say: Callable[[str], None]) -> Verdict:
    """Run one system's engine from start to end. Raises PeerFailed; leaves no process and no file in shared memory."""
    with SYSTEMS[name](workdir, say) as ready:
        command = [ready.python, str(HERE / "engine_child.py")]
        log = workdir / f"engine-{name}.log"
        answers = []
        with Child(f"the {name} engine", command, plan.environment(), log) as child:
            child.send({**plan.job(model), "transfer": dict(ready.transfer)})
            for row in child.rows(SILENCE_LIMIT_S):
                _report_progress(row, say)
                answers.append(row)
        base: Row = {"system": name, "version": ready.version, "level": "engine"}
        asked = [answer for answer in answers if "ttft_s" in answer]
        return engine_verdict(base, asked, ready.loads_logged())


def _report_progress(row: Mapping[str, Any], say: Callable[[str], None]) -> None:
    if "seconds" in row:
        say(f"  engine up after {row['seconds']:.0f} s")
    elif row["case"] in ("ttft_recompute", "first_ttft_hit"):
        say(f"  {row['case']}: {row['prompt_tokens']:,} tokens, {row['ttft_s']:.2f} s")


@contextmanager
def _kvkern(workdir: Path, say: Callable[[str], None]) -> Iterator[ReadySystem]:
    transfer = {
        "kv_connector": "KvkernConnector",
        "kv_connector_module_path": "kvkern.integrations.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"blocks_per_chunk": 1, "kvkern": {"capacity": f"{CAPACITY_GIB}GiB"}},
    }
    yield ReadySystem(transfer, __version__)


@contextmanager
def _vllm_example(workdir: Path, say: Callable[[str], None]) -> Iterator[ReadySystem]:
    folder = tempfile.mkdtemp(prefix="kvkern-peers-", dir=SHM if SHM.is_dir() else None)
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"shared_storage_path": folder},
    }
    try:
        yield ReadySystem(transfer, _vllm_version())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lmcache_mp(workdir: Path, say: Callable[[str], None]) -> Iterator[ReadySystem]:
    python = str(venvs.ensure(venvs.LMCACHE, workdir, say))
    port, http_port = _free_ports(2)
    shm_name = f"kvkern_peers_{port}"
    log = workdir / "lmcache-server.log"
    arguments = {
        "--host": "127.0.0.1", "--port": port, "--http-host": "127.0.0.1", "--http-port": http_port,
        "--chunk-size": BLOCK_TOKENS, "--l1-size-gb": CAPACITY_GIB, "--eviction-policy": "LRU",
        "--supported-transfer-mode": "engine_driven", "--shm-name": shm_name,  # the default of its CPU device
    }  # fmt: skip
    words = [str(word) for pair in arguments.items() for word in pair]
    command = [python, str(HERE / "lmcache_server_child.py"), *words, "--no-l1-use-lazy"]
    env = (
        engine_process.environment(verbose=False) | QUIET
    )  # its log level stays INFO, for one line per load; rows.py checks them
    transfer = {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
    }
    try:
        with Child("the LMCache server", command, env, log) as server:
            say("  starting the LMCache server")
            wait_until(lambda: _answers(f"http://127.0.0.1:{http_port}/healthcheck"), server, SERVER_LIMIT_S)
            yield ReadySystem(
                transfer, venvs.LMCACHE.version, python, lambda: retrieved_tokens(log.read_text(errors="replace"))
            )
            if not server.alive():
                raise PeerFailed(f"The LMCache server ended during the measurement. {log_tail(log)}")
    finally:
        for left in SHM.glob(f"*{shm_name}*"):  # left by a server that was killed
            left.unlink(missing_ok=True)


SYSTEMS = {"kvkern": _kvkern, "vllm_example": _vllm_example, "lmcache_mp": _lmcache_mp}


def retrieved_tokens(log: str) -> list[int]:
    """Return the number of tokens of each load in the log of an LMCache server."""
    return [int(tokens) for tokens in re.findall(r"Retrieved (\d+) tokens", log)]


def _vllm_version() -> str:
    for package in ("vllm-cpu", "vllm"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def _free_ports(count: int) -> list[int]:
    """Return `count` different ports that were free a moment ago."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in held]
    for sock in held:
        sock.close()
    return ports


def _answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # ignores the environment's proxy
    try:
        with direct.open(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except OSError:  # refused, reset, timed out
        return False
