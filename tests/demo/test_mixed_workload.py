"""The demo's overcommitted arena: its requests, the chunks that production policies keep of them, and the verdicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean

import msgspec
import pytest

pytest.importorskip("tokenizers", reason="the demo's packages are not installed: pip install kvkern[demo]")

from kvkern.arena.file import ArenaSpec
from kvkern.arena.slots import SlotGeometry
from kvkern.demo import mixed_workload, model, run, verdict
from kvkern.demo.messages import Answer, MixedWorkload
from kvkern.kernels.checksum import ROW_NBYTES
from tests.demo.fake_engine import PLAN, FakeArena, all_answers, play, policy_engine

MIX = MixedWorkload()
SEEDS = range(10)


def seeded(seed: int) -> MixedWorkload:
    return msgspec.structs.replace(MIX, seed=seed)


# --- requests


@pytest.mark.parametrize("seed", SEEDS)
def test_requests_match_their_description(seed: int) -> None:
    drawn = mixed_workload.requests(seeded(seed))
    assert drawn == mixed_workload.requests(seeded(seed))
    lengths = mixed_workload.final_lengths(drawn)
    chunks = sum(tokens // MIX.chunk_tokens for tokens in lengths.values())
    assert 0 <= chunks - MIX.times * MIX.arena_chunks < MIX.document_tokens[1] // MIX.chunk_tokens
    documents = [request for request in drawn if request.source.startswith("document")]
    assert len({request.source for request in documents}) == len(documents)
    assert len({request.prompt_id for request in drawn}) == len(drawn)
    last: dict[str, mixed_workload.Request] = {}
    for request in drawn:
        if request.turn:
            before = last[request.source]
            assert request.turn == before.turn + 1
            assert MIX.turn_tokens[0] <= request.num_tokens - before.num_tokens <= MIX.turn_tokens[1]
        last[request.source] = request


def test_other_seeds_give_other_requests() -> None:
    assert len({tuple(mixed_workload.requests(seeded(seed))) for seed in SEEDS}) == len(SEEDS)


def test_the_arena_holds_exactly_the_mixs_arena_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.preconditions, "kv_nbytes_per_token", lambda folder, dtype_nbytes: dtype_nbytes * 6 << 10)
    layers = model.ModelConfig().num_layers
    geometry = SlotGeometry(MIX.chunk_tokens * (12 << 10) + layers * ROW_NBYTES, layers)
    spec = ArenaSpec.for_capacity(geometry, int(run.arena_capacity(tmp_path, MIX, "bfloat16")), bytes(32))
    assert spec.num_slots == MIX.arena_chunks


# --- what the policies keep


def loaded_tokens(policy: str, mix: MixedWorkload) -> int:
    events = play(policy, policy_engine(policy, mix), msgspec.structs.replace(PLAN, mix=mix))
    cases = verdict.POLICY_CASES
    return sum(event.loaded_tokens for event in events if isinstance(event, Answer) and event.case in cases)


def test_grit_loads_more_than_lru_whatever_the_order() -> None:
    """From a cold start, by the classes of production."""
    gains = [loaded_tokens("grit", seeded(seed)) / loaded_tokens("lru", seeded(seed)) for seed in SEEDS]
    assert min(gains) > 1, gains
    assert mean(gains) > 1.25, gains


def test_of_a_plain_loop_lru_keeps_nothing_and_grit_a_quarter() -> None:
    """A loop over four times the arena's chunks: no policy can hit more than a quarter."""
    chunks, prompt_chunks, rounds = MIX.arena_chunks, 24, 10
    loop = [[(name, (end,)) for end in range(prompt_chunks)] for name in map(str, range(4 * chunks // prompt_chunks))]
    rates = {}
    for policy in ("lru", "grit"):
        arena, hits = FakeArena(policy, chunks), 0
        for chain in loop * rounds:
            hits += sum(chunk in arena.kept for chunk in chain)
            arena.use(chain, 0.3)
        rates[policy] = hits / (len(loop) * prompt_chunks * (rounds - 1))
    assert rates["lru"] == 0
    assert 0.2 < rates["grit"] <= 0.25


# --- the native answers, and the verdicts


def test_the_sample_is_held_again_without_kvkern() -> None:
    answers = [event for event in play("grit", policy_engine("grit", PLAN.mix)) if isinstance(event, Answer)]
    native = {answer.prompt_id: answer for answer in answers if answer.case == "overcommit_grit_native"}
    assert len({prompt_id.partition("/")[0] for prompt_id in native}) == PLAN.mix.natives
    assert all(answer.loaded_tokens == 0 for answer in native.values())
    ours = [answer for answer in answers if answer.case == "overcommit_grit" and answer.prompt_id in native]
    assert any(answer.loaded_tokens for answer in ours)
    assert all(answer.cached_tokens == native[answer.prompt_id].cached_tokens for answer in ours)


Change = Callable[[Answer], Answer]


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        ("overcommit_grit", lambda a: msgspec.structs.replace(a, loaded_tokens=0, cached_tokens=0), "GRIT loaded 0"),
        ("overcommit_grit", lambda a: msgspec.structs.replace(a, loaded_tokens=0), "tokens in vLLM's own cache"),
        ("overcommit_lru_new", lambda a: msgspec.structs.replace(a, prompt_tokens=7), "asked for different prompts"),
    ],
)
def test_policy_faults_are_found(case: str, change: Change, says: str) -> None:
    answers = [change(answer) if answer.case == case else answer for answer in all_answers()]
    finding = verdict.check_policies(answers)
    assert not finding.ok
    assert any(says in problem for problem in finding.problems)
    assert "hit ratio" in finding.line()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: None if a.case == "overcommit_lru_native" else a, "no overcommit_lru has a native answer"),
        (
            lambda a: msgspec.structs.replace(a, loaded_tokens=16) if a.case == "overcommit_grit_native" else a,
            "loaded something",
        ),
        (lambda a: msgspec.structs.replace(a, tokens=(1,)) if a.case == "overcommit_grit" else a, "gave other tokens"),
    ],
)
def test_loads_that_are_not_proven_right_are_found(change: Callable[[Answer], Answer | None], says: str) -> None:
    answers = [kept for answer in all_answers() if (kept := change(answer)) is not None]
    failed = [finding for finding in verdict.check_answers(answers) if not finding.ok]
    assert [finding.name for finding in failed] == ["bf16, kvkern hit = native hit, arena overcommitted"]
    assert says in failed[0].line()
