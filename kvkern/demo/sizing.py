"""Chooses the engines' dtype and how much the demo asks, so that it ends within LIMIT_S on this machine.

    dtype     bfloat16, unless this CPU multiplies float32 matrices faster: without AVX-512 it emulates bfloat16
    plan      the largest of PLANS that the model's context holds and whose estimate fits into the time that is left
    estimate  engines * start + sum over requests of (operations / rate + reply tokens * step)

Knows arithmetic and one matrix product; starts no engine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from . import mixed_workload
from .messages import MixedWorkload, Plan
from .preconditions import ModelFacts, NotReadyError

LIMIT_S = 480.0  # of the whole demo
USED_SHARE = 0.85  # of the time left that an estimate may take: estimates are too low where other programs run
PRODUCT_S = 0.05
ROUNDS = 6  # the best one counts: other programs make a product slower, never faster
START_S = 25.0  # an engine's start and end, before one was seen
WARM_AND_END_S = 6.0  # of an engine whose kernels an earlier one has compiled
NODE_ENGINES, POLICY_ENGINES, OWN_ENGINES, REMOTE_ENGINES = 3, 2, 2, 3
ENGINE_SHARE = 0.6  # of the product's speed that an engine reaches
STEP_S = 0.012  # of a reply's token, beside reading the weights
READ_NBYTES_PER_S = 8e9
REQUEST_S = 0.03
KEPT_SHARE = 0.2  # of the mixed workload's tokens that the worse policy loads

PLANS = (
    Plan(),
    Plan(
        short_tokens=1000, long_tokens=4000, long_runs=2, pairs=7, turn_tokens=250, turn_reply_tokens=30, node_pairs=4,
        block_tokens=64, pool_tokens=128 * 64, mix_on_small_model=True,
    ),
    Plan(
        short_tokens=500, long_tokens=2000, long_runs=2, pairs=5, overcommit_prompts=12, turn_tokens=125, turn_reply_tokens=24,
        node_pairs=3, block_tokens=32, pool_tokens=80 * 32, mix_on_small_model=True,
    ),
    Plan(
        short_tokens=250, long_tokens=1000, long_runs=1, pairs=3, overcommit_prompts=10, turns=3, turn_tokens=80,
        turn_reply_tokens=16, node_pairs=2, reply_tokens=4, block_tokens=32, pool_tokens=44 * 32, mix_on_small_model=True,
    ),
    Plan(
        short_tokens=250, long_tokens=1000, long_runs=1, pairs=3, overcommit_prompts=8, turns=3, turn_tokens=80,
        turn_reply_tokens=16, node_pairs=2, reply_tokens=4, block_tokens=32, pool_tokens=44 * 32, mix=None,
    ),
)  # fmt: skip


class Speed(NamedTuple):
    """What this CPU's matrix products reach, in 1e9 floating-point operations per second."""

    bfloat16_gflops: float
    float32_gflops: float

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.bfloat16_gflops >= self.float32_gflops else "float32"

    @property
    def gflops(self) -> float:
        """Return the speed in the chosen dtype."""
        return max(self)


GPU = Speed(1e6, 1e5)  # stands for a GPU: the largest plan fits


@dataclass(frozen=True)
class Machine:
    """How fast engines are here, in the chosen dtype."""

    flops_per_s: float
    start_s: float = START_S
    dtype_nbytes: int = 2

    @classmethod
    def guess(cls, speed: Speed) -> Machine:
        """Return what the product promises, before an engine has run."""
        return cls(ENGINE_SHARE * speed.gflops * 1e9, dtype_nbytes=nbytes_of(speed.dtype))

    def measured(self, float32_flops_per_s: float, start_s: float, speed: Speed) -> Machine:
        """Return what a float32 engine has shown. Other dtypes are as much faster as their product is."""
        rate = float32_flops_per_s * speed.gflops / speed.float32_gflops
        return Machine(rate, start_s, self.dtype_nbytes)


def nbytes_of(dtype: str) -> int:
    return {"bfloat16": 2, "float32": 4}[dtype]


def measure() -> Speed | None:
    """Multiply matrices for PRODUCT_S in each dtype, in turns, once warm. None where vLLM uses a GPU instead.

    One thread multiplies: threads that wait for one another are many times slower while other programs run. vLLM uses one
    thread for two logical CPUs.
    """
    import torch

    if torch.cuda.is_available():
        return None
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = [[_gflops(dtype) for dtype in (torch.bfloat16, torch.float32)] for _ in range(ROUNDS)]
    finally:
        torch.set_num_threads(num_threads)
    num_cores = max(1, len(os.sched_getaffinity(0)) // 2)
    return Speed(*(num_cores * max(speeds) for speeds in zip(*rounds, strict=True)))


def _gflops(
    dtype: object,  # a torch.dtype
    tokens: int = 64,
    width: int = 1024,
) -> float:
    import torch

    inputs, weights = (torch.ones(rows, width).to(dtype) for rows in (tokens, width))  # type: ignore[call-overload]
    torch.nn.functional.linear(inputs, weights)
    num_products, started_s = 0, time.perf_counter()
    while (took_s := time.perf_counter() - started_s) < PRODUCT_S or not num_products:
        torch.nn.functional.linear(inputs, weights)
        num_products += 1
    return 2 * tokens * width * width * num_products / took_s / 1e9


def choose(
    facts: ModelFacts, small: ModelFacts, machine: Machine, left_s: float, *, remote: bool = False
) -> tuple[Plan, float]:
    """Return the largest plan that fits into `left_s`, or else the smallest one, and its estimate in seconds.

    Raises NotReadyError if the model's context is too short for the smallest plan.
    """
    fitting = [plan for plan in PLANS if plan.longest_tokens <= facts.context_tokens]
    if not fitting:
        raise NotReadyError(
            f"The model's context has {facts.context_tokens:,} tokens; the demo asks for prompts of at least "
            f"{min(plan.longest_tokens for plan in PLANS):,}. Give --model a model with a longer context."
        )
    plan, seconds = fitting[-1], 0.0
    for plan in fitting:
        if plan.mix is not None and not plan.mix_on_small_model and longest(plan.mix) > facts.context_tokens:
            plan = msgspec.structs.replace(plan, mix_on_small_model=True)
        seconds = estimate_s(plan, facts, small, machine, remote=remote)
        if seconds <= USED_SHARE * left_s:
            break
    return plan, seconds


def longest(mix: MixedWorkload) -> int:
    return max(request.num_tokens for request in mixed_workload.requests(mix)) + 1


def estimate_s(plan: Plan, facts: ModelFacts, small: ModelFacts, machine: Machine, *, remote: bool = False) -> float:
    """Estimate how long the engines of the plan take, the float32 engine not included."""
    if remote:
        return REMOTE_ENGINES * machine.start_s + _requests_s(_remote_requests(plan), facts, machine)
    seconds = (OWN_ENGINES + NODE_ENGINES) * machine.start_s + _requests_s(_requests(plan), facts, machine)
    if plan.mix is not None:
        asked = small if plan.mix_on_small_model else facts
        mixed = [(int(KEPT_SHARE * r.num_tokens), r.num_tokens, 1) for r in mixed_workload.requests(plan.mix)]
        seconds += POLICY_ENGINES * (machine.start_s + 1.2 * _requests_s(iter(mixed), asked, machine))
    return seconds


Request = tuple[int, int, int]  # tokens that are cached, tokens of the prompt, tokens of the reply


def _requests_s(requests: Iterator[Request], facts: ModelFacts, machine: Machine) -> float:
    step_s = STEP_S + facts.num_weights * machine.dtype_nbytes / READ_NBYTES_PER_S
    return sum(
        REQUEST_S + (facts.flops(prompt) - facts.flops(cached)) / machine.flops_per_s + reply * step_s
        for cached, prompt, reply in requests
    )


def _requests(plan: Plan) -> Iterator[Request]:
    """Yield what phases.py asks of all engines but the float32 one and those of the mixed workload."""
    short, long = plan.short_tokens, plan.long_tokens
    yield from [(0, short, 1)] * (3 * plan.overcommit_prompts)  # recompute, overcommit_native, fill
    yield from [(0, long, 1)] * plan.long_runs
    yield from _hits(plan, short, 2 * plan.overcommit_prompts)
    yield from [(0, short, 1), (0, long, 1)] * 2  # before the pairs, and of the first engine on the node
    yield from [(0, short, plan.reply_tokens)]  # without the daemon
    for length in (short, long):
        yield from _hits(plan, length, 2 * (plan.pairs + NODE_ENGINES * plan.node_pairs))
    history = 0
    for _ in range(plan.turns):
        prompt = history + plan.turn_tokens
        cached = history // plan.block_tokens * plan.block_tokens
        yield from [(cached, prompt, plan.turn_reply_tokens)] * 2
        yield from _hits(plan, prompt, 2)
        history = prompt + plan.turn_reply_tokens


def _remote_requests(plan: Plan) -> Iterator[Request]:
    for length in (plan.short_tokens, plan.long_tokens):
        yield from [(0, length, 1)] * (plan.long_runs + 1)
        yield from _hits(plan, length, 2 * plan.node_pairs)


def _hits(plan: Plan, length: int, count: int) -> Iterator[Request]:
    cached = (length - 1) // plan.block_tokens * plan.block_tokens
    yield from [(cached, length, plan.reply_tokens)] * count
