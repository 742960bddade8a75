"""How much the demo asks: enough on a fast machine, within its time on a slow one, and as the phases really ask it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

for _module in ("tokenizers", "torch"):
    pytest.importorskip(_module, reason="the demo's packages are not installed: pip install kvkern[demo]")

from kvkern.demo import model, phases, sizing  # noqa: E402
from kvkern.demo.messages import Answer, Plan  # noqa: E402
from kvkern.demo.preconditions import ModelFacts, NotReadyError  # noqa: E402
from tests.demo.fake_engine import FakeEngine, play  # noqa: E402

SMALL = ModelFacts.of(model.SMALL.hf_config())
SMOLLM2 = ModelFacts(
    layers=30, heads=9, kv_heads=3, head_dim=64, hidden=576, intermediate=1536, context_tokens=8192
)  # fmt: skip


@pytest.mark.parametrize(
    ("gflops", "dtype", "longest"),
    [
        ((1100.0, 150.0), "bfloat16", 8000),  # AVX-512 with bfloat16
        ((500.0, 120.0), "bfloat16", 4000),
        ((8.0, 150.0), "float32", 2000),
        ((0.3, 24.0), "float32", 1000),  # AVX2 alone: bfloat16 is emulated
    ],
)
def test_a_usual_machine_gets_a_plan_that_ends_in_time(gflops: tuple[float, float], dtype: str, longest: int) -> None:
    speed = sizing.Speed(*gflops)
    assert speed.dtype == dtype
    left_s = sizing.LIMIT_S - 40
    plan, seconds = sizing.choose(SMOLLM2, SMALL, sizing.Machine.guess(speed), left_s)
    assert plan.long_tokens == longest
    assert 60 < seconds <= sizing.USED_SHARE * left_s


def test_slower_machines_never_get_more() -> None:
    times_s = []
    for gflops in (1000.0, 300.0, 100.0, 50.0, 10.0, 1.0):
        machine = sizing.Machine(gflops * 1e9)
        plan, _ = sizing.choose(SMOLLM2, SMALL, machine, 420.0)
        times_s.append(sizing.estimate_s(plan, SMOLLM2, SMALL, sizing.Machine(100e9)))
    assert times_s == sorted(times_s, reverse=True)
    assert len(set(times_s)) == len(sizing.PLANS)


def test_a_machine_too_slow_for_any_plan_gets_the_smallest_and_its_time() -> None:
    plan, seconds = sizing.choose(SMOLLM2, SMALL, sizing.Machine(1e9), 420.0)
    assert plan == sizing.PLANS[-1]
    assert seconds > 420.0


def test_a_short_context_bounds_the_plan() -> None:
    def chosen(context_tokens: int) -> Plan:
        facts = ModelFacts(4, 6, 2, 64, 384, 1024, context_tokens)
        return sizing.choose(facts, SMALL, sizing.Machine(1e12), 420.0)[0]

    assert [chosen(context).long_tokens for context in (8192, 4096, 2048, 1024)] == [8000, 4000, 2000, 1000]
    with pytest.raises(NotReadyError, match="context has 512 tokens; the demo asks for prompts of at least 1,004"):
        chosen(512)


@pytest.mark.parametrize("plan", sizing.PLANS)
def test_every_plan_overflows_the_pool_that_holds_its_longest_sequence(plan: Plan) -> None:
    assert plan.longest_tokens <= plan.pool_tokens - 2 * plan.block_tokens
    blocks = plan.overcommit_prompts * (plan.short_tokens // plan.block_tokens)
    assert blocks * plan.block_tokens > 1.2 * plan.pool_tokens
    if plan.mix is not None and not plan.mix_on_small_model:
        assert sizing.longest(plan.mix) <= plan.longest_tokens


@pytest.mark.parametrize("plan", sizing.PLANS)
def test_the_estimate_counts_what_the_phases_ask(plan: Plan) -> None:
    answers: list[Answer] = []
    kept: set[tuple[str, tuple[int, ...]]] = set()
    for phase in ("vllm", "kvkern", "first", "second", "again"):
        engine = FakeEngine(
            kvkern=phase != "vllm",
            kept=set() if phase in ("vllm", "kvkern") else kept,
            block_tokens=plan.block_tokens,
            pool_blocks=plan.pool_tokens // plan.block_tokens,
        )
        answers += [event for event in play(phase, engine, plan) if isinstance(event, Answer)]
    counted = list(sizing._requests(plan))
    assert _computed(answers) == pytest.approx(sum(prompt - cached for cached, prompt, _ in counted), rel=0.03)
    replies = sum(len(answer.tokens) for answer in answers)
    assert replies == pytest.approx(sum(reply for _, _, reply in counted), rel=0.03)


def test_the_remote_estimate_counts_what_the_phases_ask() -> None:
    plan, kept = sizing.PLANS[2], set[tuple[str, tuple[int, ...]]]()
    answers: list[Answer] = []
    for phase in ("computed", "first", "remote"):
        engine = FakeEngine(
            kvkern=phase != "computed",
            kept=set() if phase == "computed" else kept,
            block_tokens=plan.block_tokens,
            pool_blocks=plan.pool_tokens // 32,
        )
        answers += [event for event in play(phase, engine, plan) if isinstance(event, Answer)]
    counted = list(sizing._remote_requests(plan))
    assert len(counted) == len(answers)
    assert _computed(answers) == sum(prompt - cached for cached, prompt, _ in counted)


def test_a_float32_engine_tells_how_fast_the_others_will_be() -> None:
    speed = sizing.Speed(bfloat16_gflops=400.0, float32_gflops=100.0)
    machine = sizing.Machine.guess(speed).measured(50e9, 20.0, speed)
    assert (machine.flops_per_s, machine.start_s, machine.dtype_nbytes) == (200e9, 20.0, 2)


def test_the_product_is_measured_in_both_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    speed = sizing.measure()
    assert speed is not None
    assert min(speed) > 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sizing.measure() is None


def _computed(answers: Sequence[Answer]) -> int:
    return sum(answer.prompt_tokens - answer.cached_tokens for answer in answers)


def test_all_phases_are_counted() -> None:
    known = {"vllm", "kvkern", "float32", "first", "second", "again", "computed", "remote", "lru", "grit"}
    assert set(phases.PHASES) == known
