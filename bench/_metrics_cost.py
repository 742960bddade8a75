"""What metrics cost: the same work with and without them, in turns. Knows no command line.

acquire   what the daemon's thread does for one acquire of CHUNKS cached chunks and its release, from frame to frame
step      a step of a real vLLM engine with an embedded cache, statistics on. Prompts of the pool and of kvkern, stores and
          decodes take turns. What is counted is the time inside kvkern's metrics, calls of the meter, the part of the measured
          cache beyond the cache itself, and the export, as a share of the step. Beside it the times of whole steps with and
          without metrics, in turns, whose ratio varies by more than a hundredth from one run to the next
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

from _node import CHUNKS, GIVE_UP_S, Pages
from node import CLIENTS, Clients

from kvkern.arena.slots import PAGE
from kvkern.metrics import Unobserved
from kvkern.node.daemon.node_config import NodeConfig
from kvkern.node.daemon.observed_sessions import ObservedSessions
from kvkern.node.daemon.server import Server
from kvkern.node.daemon.sessions import Sessions

Row = dict[str, object]
MEASURED = ("acquire_soon", "reserve", "commit_soon")  # what ObservedCache measures


def ratios(with_metrics: Callable[[], float], without: Callable[[], float], rounds: int) -> tuple[float, float, float]:
    """Return medians: with over without of a round, and both times. The two take turns, and turns in who is first."""
    both: list[tuple[float, float]] = []
    for number in range(rounds):
        if number % 2:
            both.append((with_metrics(), without()))
        else:
            bare = without()
            both.append((with_metrics(), bare))
    return median(a / b for a, b in both), median(a for a, _ in both), median(b for _, b in both)


# -- an acquire ------------------------------------------------------------------------------------------------------------


class ServedHere:
    """A daemon in a thread of this process, whose metrics can be switched while clients use it."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "socket"
        nbytes = PAGE + 4 * CLIENTS * CHUNKS * Pages(1).geometry.slot_nbytes
        self.server = Server(NodeConfig(self.path, nbytes, arena_dir=Path(folder)))
        self._ready, self._loop, self._tid = threading.Event(), asyncio.new_event_loop(), 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        if not self._ready.wait(GIVE_UP_S):
            raise RuntimeError("the daemon did not start; its errors are above")

    def _run(self) -> None:
        self._tid = threading.get_native_id()
        self._loop.run_until_complete(self.server.run(self._ready.set))

    def observe(self, metrics: bool) -> None:
        """Count from now on, or not."""
        state = self.server.sessions
        assert state is not None
        state.cache.observer = self.server.meter if metrics else Unobserved()
        state.__class__ = ObservedSessions if metrics else Sessions

    def cpu_s(self) -> float:
        """Return the CPU time of the daemon's thread so far."""
        return int(Path(f"/proc/self/task/{self._tid}/schedstat").read_text().split()[0]) / 1e9

    def close(self) -> None:
        """End the daemon."""
        self._loop.call_soon_threadsafe(self.server.stop)
        self._thread.join()


def acquire(rounds: int, round_s: float) -> Row:
    """Return the row `metrics_acquire`: CPU time of the daemon's thread for an acquire with its release."""
    p50_us: dict[bool, list[float]] = {True: [], False: []}
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix=f"kvkern-{os.getuid()}-bench-metrics-") as folder,
        closing(ServedHere(folder)) as node,
        closing(Clients(node.path, CLIENTS, 1)) as clients,
    ):
        clients.ask("store")

        def run(metrics: bool) -> float:
            node.observe(metrics)
            before_s = node.cpu_s()
            taken = [one for client in clients.ask("acquire", round_s) for one in client]
            p50_us[metrics].append(1e6 * median(taken))
            return (node.cpu_s() - before_s) / len(taken)

        run(True)
        ratio, on_s, off_s = ratios(lambda: run(True), lambda: run(False), rounds)
        counted = node.server.meter.at_once.counts
    return {
        "case": "metrics_acquire", "ratio": ratio, "clients": CLIENTS, "chunks": CHUNKS, "daemon_cpu_us": 1e6 * on_s,
        "without_cpu_us": 1e6 * off_s, "p50_us": median(p50_us[True]), "without_p50_us": median(p50_us[False]),
        "counted": sum(counted), "rounds": rounds,
    }  # fmt: skip


# -- a step ----------------------------------------------------------------------------------------------------------------


class Clock:
    """Adds up the time that is spent in functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


class Clocked:
    """An object of which some methods are timed; with no names, all."""

    def __init__(self, inner: Any, clock: Clock, names: tuple[str, ...] = ()) -> None:
        self._inner, self._clock, self._names = inner, clock, names

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if callable(found) and (not self._names or name in self._names):
            found = self._clock.around(found)
            setattr(self, name, found)  # the next call finds it at once
        return found


class Silent:
    """A meter that counts nothing and sends nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _nothing


def _nothing(*_: object) -> None:
    return None


class Steps:
    """A vLLM engine in this process whose kvkern can be told to count nothing."""

    def __init__(self, folder: str) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM, SamplingParams

        from kvkern.integrations.vllm import kv_transfer_config
        from kvkern.integrations.vllm.connector import KvkernConnector

        self._clocks = meter, measured, inside, export = Clock(), Clock(), Clock(), Clock()
        build = KvkernConnector.build_prom_metrics

        def timed_export(*args: Any, **kwargs: Any) -> Any:
            metrics: Any = build(*args, **kwargs)
            metrics.observe = export.around(metrics.observe)
            return metrics

        KvkernConnector.build_prom_metrics = timed_export
        self._params = SamplingParams(max_tokens=8, temperature=0, detokenize=False, ignore_eos=True)
        self._llm: Any = LLM(
            _model(folder), kv_transfer_config=kv_transfer_config("64MiB"), dtype="float32", block_size=32,
            num_gpu_blocks_override=80, kv_cache_memory_bytes=64 << 20, max_model_len=1024, max_num_batched_tokens=256,
            max_num_seqs=8, enforce_eager=True, skip_tokenizer_init=True, distributed_executor_backend="mp", seed=0,
            disable_log_stats=False,
        )  # fmt: skip
        self._manager: Any = self._llm.llm_engine.engine_core.engine_core.scheduler.connector._manager
        observed, self._bare = self._manager._cache, self._manager._cache.inner
        observed.inner = Clocked(self._bare, inside, MEASURED)
        self._loud = Clocked(self._manager.meter, meter), Clocked(observed, measured, MEASURED)
        self.sent = 0  # values that vLLM has fetched
        take = self._manager.meter.take
        self._manager.meter.take = lambda: self._count(take())
        self._round = 0
        self.loud_s = 0.0  # of rounds with metrics

    @property
    def metrics_s(self) -> float:
        """The time inside metrics so far."""
        meter, measured, inside, export = (clock.seconds for clock in self._clocks)
        return meter + measured - inside + export

    def reset(self) -> None:
        """Forget what was measured so far."""
        self.loud_s = 0.0
        for clock in self._clocks:
            clock.seconds = 0.0

    def run(self, metrics: bool) -> float:
        """Return the seconds of a step: a batch of prompts that are new, in the pool, or in kvkern alone."""
        manager = self._manager
        meter, cache = self._loud if metrics else (Silent(), self._bare)
        manager.meter = manager._counts.meter = meter
        manager._cache = manager._counts._cache = cache
        self._round += 1
        prompts = [
            {"prompt_token_ids": self._prompt(seed)} for seed in (0, 1, 2, 3, 1000 + self._round, 2000 + self._round)
        ]
        for one in prompts:
            self._llm.llm_engine.add_request(str(time.perf_counter_ns()), one, self._params)
        steps, began = 0, time.perf_counter()
        while self._llm.llm_engine.has_unfinished_requests():
            self._llm.llm_engine.step()
            steps += 1
        took = time.perf_counter() - began
        self.loud_s += took if metrics else 0.0
        return took / steps

    def _count(self, stats: Any) -> Any:
        self.sent += 0 if stats is None else len(stats.data["data"])
        return stats

    @staticmethod
    def _prompt(seed: int) -> list[int]:
        return [3 + (seed * 7919 + 31 * at + at * at) % 500 for at in range(200)]

    def close(self) -> None:
        """End the engine."""
        self._llm.llm_engine.engine_core.shutdown()


def _model(folder: str) -> str:
    """Write a small Llama with random weights."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        intermediate_size=1024, max_position_embeddings=4096,
    )  # fmt: skip
    hf.AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    return folder


def step(rounds: int) -> Row:
    """Return the row `metrics_step`."""
    with tempfile.TemporaryDirectory() as folder:
        engine = Steps(folder)
        try:
            for metrics in (True, False) * 3:
                engine.run(metrics)
            engine.reset()
            ratio, on_s, off_s = ratios(lambda: engine.run(True), lambda: engine.run(False), rounds)
        finally:
            engine.close()
    return {
        "case": "metrics_step", "ratio": engine.loud_s / (engine.loud_s - engine.metrics_s), "whole_steps_ratio": ratio,
        "ms": 1e3 * on_s, "without_ms": 1e3 * off_s, "metrics_us": 1e6 * on_s * engine.metrics_s / engine.loud_s,
        "counted": engine.sent, "rounds": rounds,
    }  # fmt: skip
