"""A fake vLLM that answers the demo's phases, with a fake kvkern in it. Importing it needs `tokenizers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from blake3 import blake3

from kvkern.demo import phases
from kvkern.demo.messages import Answer, MixedWorkload, Plan, Progress
from kvkern.demo.prompts import PromptLibrary
from kvkern.policy import make_policy
from kvkern.policy.base import Use

BLOCK_TOKENS = 16
POOL_BLOCKS = 20
# Four documents of six blocks each evict the first one completely from 20 blocks. One document of 16 blocks fits.
PLAN = Plan(
    short_tokens=100, long_tokens=256, long_runs=2, pairs=3, overcommit_prompts=5, reply_tokens=3,
    turns=3, turn_tokens=40, turn_reply_tokens=20, float32_prompts=2, float32_tokens=100, node_pairs=2,
    block_tokens=BLOCK_TOKENS,
    mix=MixedWorkload(
        chunk_tokens=16, arena_chunks=56, opening_tokens=(64, 128), turn_tokens=(16, 32), document_tokens=(128, 256), natives=2,
    ),
)  # fmt: skip

Prefix = tuple[str, tuple[int, ...]]  # tenant, tokens


class FakeArena:
    """The chunks that kvkern keeps in an arena of `num_chunks`, by a production policy. Its clock is the engine's work."""

    def __init__(self, policy: str, num_chunks: int) -> None:
        self._policy, self._num_chunks = make_policy(policy, num_chunks), num_chunks
        self._chunks: dict[bytes, Prefix] = {}
        self._now_s, self._requests = 0.0, 0
        self.kept: set[Prefix] = set()

    def use(self, chain: Sequence[Prefix], took_s: float) -> None:
        self._requests += 1
        keys = {blake3(repr(prefix).encode()).digest(): prefix for prefix in chain}
        self._policy.access(list(keys), Use(self._now_s, self._requests))
        self._now_s += took_s
        use = Use(self._now_s, self._requests)
        missing = [key for key in keys if key not in self._chunks]
        self._policy.access(list(keys), use)
        self._policy.insert(missing, use)
        self._chunks |= {key: keys[key] for key in missing}
        for key in self._policy.victims(len(self._chunks) - self._num_chunks):
            del self._chunks[key]
        self.kept.clear()
        self.kept.update(self._chunks.values())


@dataclass
class FakeEngine:
    """Answers like vLLM: its pool evicts the least recently used blocks, and kvkern beside it forgets nothing."""

    kvkern: bool
    wrong_when_loaded: bool = False  # True: replies after a load are wrong, as a wrong KV block would make them
    pool: dict[Prefix, None] = field(default_factory=dict)  # whole blocks, oldest first
    kept: set[Prefix] = field(default_factory=set)
    arena: FakeArena | None = None  # used instead of `kept`; it evicts chunks
    block_tokens: int = BLOCK_TOKENS
    pool_blocks: int = POOL_BLOCKS
    loaded_tokens: int = 0  # in all requests so far

    def ask(self, case: str, prompt_id: str, prompt: list[int], reply_tokens: int, salt: str | None = None) -> Answer:
        reusable = self._prefixes(prompt[:-1], salt)  # vLLM computes at least one token
        kept = self.kept if self.arena is None else self.arena.kept
        native = _held(reusable, self.pool)
        cached = max(native, _held(reusable, kept) if self.kvkern else 0)
        wrong = self.wrong_when_loaded and cached > native
        tokens = tuple((sum(prompt) + index + wrong) % 500 for index in range(reply_tokens))
        self.loaded_tokens += cached - native
        ttft_s = 1e-3 * (len(prompt) - native - 0.9 * (cached - native))
        self._remember(self._prefixes([*prompt, *tokens[:-1]], salt), ttft_s)
        return Answer(
            case=case, prompt_id=prompt_id, prompt_tokens=len(prompt), cached_tokens=cached, loaded_tokens=cached - native,
            ttft_s=ttft_s, tokens=tokens,
            logprobs=tuple(((token, -0.5), (token + 1, -2.0)) for token in tokens),
        )  # fmt: skip

    def forget(self) -> None:
        self.pool.clear()

    def _remember(self, prefixes: list[Prefix], took_s: float) -> None:
        for prefix in reversed(prefixes):  # so that the end of a sequence is evicted first
            self.pool.pop(prefix, None)
            self.pool[prefix] = None
        while len(self.pool) > self.pool_blocks:
            del self.pool[next(iter(self.pool))]
        if self.arena is None:
            self.kept.update(prefixes)
        else:
            self.arena.use(prefixes, took_s)

    def _prefixes(self, sequence: Sequence[int], salt: str | None) -> list[Prefix]:
        ends = range(self.block_tokens, len(sequence) + 1, self.block_tokens)
        return [(salt or "", tuple(sequence[:end])) for end in ends]


def _held(prefixes: Sequence[Prefix], store: dict[Prefix, None] | set[Prefix]) -> int:
    held = 0
    for prefix in prefixes:
        if prefix not in store:
            break
        held = len(prefix[1])
    return held


@dataclass
class FakeNode:
    """The daemon as a phase sees it. While it is gone, the engine has only vLLM's own pool."""

    engine: FakeEngine
    caches: bool = True
    remote_hits: int = 0
    _seen_tokens: int = 0
    _empty: bool = False  # True: the next load comes from the remote store

    def kill(self, socket: Path) -> int:
        self.caches, self.engine.kvkern = self.engine.kvkern, False
        return 2

    def clear(self, socket: Path) -> None:
        self._empty = True

    def stat(self, socket: Path) -> dict[str, int]:
        came = self.engine.loaded_tokens - self._seen_tokens
        if self._empty and came:
            self.remote_hits += came // BLOCK_TOKENS
            self._empty = False
        self._seen_tokens += came
        left = {"remote_late_chunks": 0, "remote_unasked_chunks": 2, "remote_gated_chunks": 3}
        return {"remote_hit_chunks": self.remote_hits, **left}

    def wait_for(self, socket: Path, condition: Callable[[dict[str, int]], bool]) -> None:
        assert condition({"chunks": 10**6, "sessions": 2})
        assert not condition({})
        self.engine.kvkern = self.caches


def play(
    phase: str, engine: FakeEngine, plan: Plan = PLAN, questions: dict[str, list[int]] | None = None
) -> list[Answer | Progress]:
    """Run a phase and return everything it emits."""
    events: list[Answer | Progress] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "supervised_daemon", FakeNode(engine, caches=engine.kvkern))
        library = PromptLibrary(list(range(200_000)))
        phases.PHASES[phase](phases.MeasuredEngine(engine, library, plan, events.append, questions=questions))
    return events


def policy_engine(policy: str, mix: MixedWorkload, **flags: bool) -> FakeEngine:
    """Return an engine whose arena holds `mix.arena_chunks`, and whose vLLM pool holds any conversation."""
    arena = FakeArena(policy, mix.arena_chunks)
    return FakeEngine(**{"kvkern": True} | flags, arena=arena, block_tokens=mix.chunk_tokens, pool_blocks=100)


def all_answers(**flags: bool) -> list[Answer]:
    """Return the answers of all engines of a demo. The last three engines share a cache."""
    ours = {"kvkern": True} | flags
    kept: set[Prefix] = set()
    engines = (
        {"vllm": FakeEngine(kvkern=False), "kvkern": FakeEngine(**ours), "float32": FakeEngine(**ours)}
        | {policy: policy_engine(policy, PLAN.mix, **flags) for policy in ("lru", "grit")}
        | {phase: FakeEngine(**ours, kept=kept) for phase in ("first", "second", "again")}
    )
    events = [event for phase, engine in engines.items() for event in play(phase, engine)]
    return [event for event in events if isinstance(event, Answer)]


def remote_answers(**flags: bool) -> list[Answer]:
    """Return the answers of the demo with a remote store, which the two nodes share."""
    ours = {"kvkern": True} | flags
    kept: set[Prefix] = set()
    engines = {"computed": FakeEngine(kvkern=False)} | {
        node: FakeEngine(**ours, kept=kept) for node in ("first", "remote")
    }
    events = [event for phase, engine in engines.items() for event in play(phase, engine)]
    return [event for event in events if isinstance(event, Answer)]
