"""The measured prefill speed under both ways of scheduling, with pauses, decode steps and slow first steps."""

from __future__ import annotations

import time
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from kvkern.integrations.vllm.prefill_speed import KEPT_STEPS, LEAST_STEPS, MAX_UNDER_WAY, WARM_UP_STEPS, PrefillSpeed
from tests.integrations.vllm.engine import Engine, prompt

pytestmark = pytest.mark.vllm
SPEED = 1000.0  # tokens/s
DECODE_S = 0.02
Step = tuple[int, int]  # tokens, of prompts


class Device:
    """A device that computes steps one after the other. Its scheduler is one step ahead, or not ahead."""

    def __init__(self, ahead: bool, slow_steps: int = 0) -> None:
        self.now, self.free_at, self.ahead, self.slow_steps = 100.0, 0.0, ahead, slow_steps
        self.prefill = PrefillSpeed(lambda: self.now)
        self.under_way: list[float] = []  # when each ends

    def schedule(self, step: Step) -> None:
        tokens, prompt_tokens = step
        self.now += 0.0001
        self.prefill.step_scheduled(tokens, prompt_tokens)
        seconds = prompt_tokens / SPEED + DECODE_S * (tokens > prompt_tokens)
        if self.slow_steps and prompt_tokens:
            self.slow_steps, seconds = self.slow_steps - 1, 30.0
        self.free_at = max(self.now, self.free_at) + seconds
        self.under_way.append(self.free_at)

    def result(self) -> None:
        self.now = max(self.now, self.under_way.pop(0))
        self.prefill.step_ended()

    def run(self, steps: list[Step]) -> None:
        """Run the steps until the device is idle."""
        for step in steps:
            self.schedule(step)
            if len(self.under_way) > self.ahead:
                self.result()
        while self.under_way:
            self.result()


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize("pause_s", [0.0, 60.0])
def test_the_speed_of_steps_that_are_prompts(ahead: bool, pause_s: float) -> None:
    """A prompt's step and then its reply's steps, repeated: how an engine with few users runs."""
    engine = Device(ahead, slow_steps=WARM_UP_STEPS)
    for count in range(WARM_UP_STEPS + 2 * KEPT_STEPS):
        assert (engine.prefill.tokens_per_s > 0) == (count >= WARM_UP_STEPS + LEAST_STEPS)
        engine.run([(512, 512), (0, 0), (1, 0), (1, 0)])
        engine.now += pause_s
    assert engine.prefill.tokens_per_s == pytest.approx(SPEED, rel=0.01)


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_decodes_are_no_prompts(ahead: bool) -> None:
    engine = Device(ahead)
    engine.run([(256, 0), (1000, 500), (255, 255)] * 20)
    assert engine.prefill.tokens_per_s == 0.0
    engine.run([(1000, 990), (256, 0)] * 20)
    assert engine.prefill.tokens_per_s == pytest.approx(1000 / (990 / SPEED + DECODE_S), rel=0.01)


def test_few_wrong_times_change_nothing() -> None:
    """Wrong times also leave the median again."""
    rng, engine, speeds = Random(1), Device(True), []
    for _ in range(60):
        engine.run([(512, 512), (1, 0)])
        if rng.random() < 0.2:
            engine.free_at += 5.0  # something else has the device
        speeds.append(engine.prefill.tokens_per_s)
    settled = speeds[WARM_UP_STEPS + LEAST_STEPS + 2 :]
    assert all(speed == pytest.approx(SPEED, rel=0.02) for speed in settled)
    assert all(abs(after - before) < 0.05 * SPEED for before, after in pairwise(settled))


def test_an_engine_that_becomes_slower_is_measured_anew() -> None:
    engine = Device(False)
    for tokens in (5120, 512):
        for _ in range(2 * KEPT_STEPS):
            engine.prefill.step_scheduled(tokens, tokens)
            engine.now += 0.5
            engine.prefill.step_ended()
        assert engine.prefill.tokens_per_s == pytest.approx(2 * tokens)


def test_steps_without_an_end_are_bounded() -> None:
    speed = PrefillSpeed()
    speed.step_ended()
    for _ in range(10 * MAX_UNDER_WAY):
        speed.step_scheduled(512, 512)
    assert len(speed._under_way) <= MAX_UNDER_WAY


def test_which_tokens_of_a_step_are_of_prompts() -> None:
    from types import SimpleNamespace

    from kvkern.integrations.vllm import shim

    scheduled = {"prompt": 500, "reply": 1, "guesses": 4, "end of a prompt": 2}
    step: Any = SimpleNamespace(num_scheduled_tokens=scheduled, scheduled_spec_decode_tokens={"guesses": [7, 8, 9]})
    assert shim.count_prompt_tokens(step) == 502


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_a_real_engine(llama: str, ahead: bool) -> None:
    with Engine(llama, async_scheduling=ahead) as engine:
        speed = engine.scheduler.connector._manager.prefill
        for seed in range(8):
            engine.one(prompt(700, 600 + seed))  # steps of 256, 256 and 188 tokens, and of replies
            engine.settle()
        assert not speed._under_way  # every step was paired with its own end
        began = time.monotonic()
        for seed in range(4):
            engine.run([prompt(1000, 700 + seed)], tokens=1)
        plain = 4000 / (time.monotonic() - began)
        assert plain / 3 < speed.tokens_per_s < 10 * plain
