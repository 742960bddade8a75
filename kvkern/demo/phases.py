"""The measurements, one function per engine. Knows prompts and an engine; prints nothing and judges nothing.

vllm      pass 1 over 16 documents (recompute), pass 2 over the same (overcommit_native), long documents
kvkern    pass 1 (fill), pass 2 (overcommit_kvkern), then per document: (forget, kvkern_hit, native_hit) x pairs
float32   recompute, native hit and kvkern hit of the same prompt, where all three must agree
first     computes documents through a daemon, and stays up
second    another engine beside it: (forget, second_engine, native hit) x pairs; kills the daemon; the same as daemon_restart
again     a new engine when both are gone: the same as engine_restart
computed  of the remote demo: short and long document, forgotten before each (recompute)
remote    an engine of another node, whose memory is emptied before each: (forget, remote, native hit) x pairs
lru, grit the requests of mixed.py, four times what the arena holds; vLLM forgets before each, so only kvkern can have it
both bf16 engines hold the same conversation; with kvkern vLLM forgets it before every turn
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Protocol

import msgspec

from . import mixed_workload, supervised_daemon
from .messages import BLOCK_TOKENS, Answer, Plan, Progress
from .prompts import PromptLibrary


class EngineVerbs(Protocol):
    """The part of `Engine` that phases need."""

    def ask(
        self, case: str, prompt_id: str, prompt: list[int], reply_tokens: int, salt: str | None = None
    ) -> Answer: ...
    def forget(self) -> None: ...


Emit = Callable[[Answer | Progress], None]
Prompts = dict[str, list[int]]
Turn = tuple[Answer, list[int]]  # and its prompt


class MeasuredEngine:
    """Asks an engine and passes every answer on."""

    def __init__(
        self,
        engine: EngineVerbs,
        library: PromptLibrary,
        plan: Plan,
        emit: Emit,
        socket: str | None = None,  # of the engine's daemon
        salt: str | None = None,
    ) -> None:
        self.engine, self.library, self.plan, self.emit = engine, library, plan, emit
        self.socket, self.salt = Path(socket or ""), salt
        self.overcommit = self._documents("overcommit", plan.overcommit_prompts, plan.short_tokens)
        self.long = self._documents("long", plan.long_runs, plan.long_tokens)
        self.turns = [library.document(plan.turn_tokens) for _ in range(plan.turns)]
        self.short = self._documents("short", 1, plan.short_tokens)

    def ask(
        self, case: str, prompt_id: str, prompt: list[int], reply_tokens: int | None = None, salt: str | None = None
    ) -> Answer:
        answer = self.ask_quietly(case, prompt_id, prompt, reply_tokens, salt)
        self.emit(answer)
        return answer

    def ask_quietly(
        self, case: str, prompt_id: str, prompt: list[int], reply_tokens: int | None = None, salt: str | None = None
    ) -> Answer:
        """The answer is the caller's to pass on."""
        return self.engine.ask(case, prompt_id, prompt, reply_tokens or self.plan.reply_tokens, salt or self.salt)

    def ask_all(self, case: str, prompts: Prompts) -> list[Answer]:
        """Ask every prompt once, in order, for one token: only the time counts."""
        tokens = len(next(iter(prompts.values())))
        answers = [self.ask(case, prompt_id, prompt, 1) for prompt_id, prompt in prompts.items()]
        ttft_s = median(answer.ttft_s for answer in answers)
        self.say(f"{case}: {len(answers)} x {tokens:,} tokens, median {ttft_s:.2f} s to the first token")
        return answers

    def say(self, text: str) -> None:
        self.emit(Progress(text))

    def _documents(self, kind: str, count: int, num_tokens: int) -> Prompts:
        return {f"{kind}-{index}": self.library.document(num_tokens) for index in range(count)}


def vllm_alone(desk: MeasuredEngine) -> None:
    """What vLLM does without kvkern: every forgotten prompt is computed again."""
    desk.ask_all("recompute", desk.overcommit)
    desk.ask_all("overcommit_native", desk.overcommit)
    desk.ask_all("recompute", desk.long)
    _converse(desk, "turn_vllm", forget=False)


def vllm_with_kvkern(desk: MeasuredEngine) -> None:
    """What is loaded instead, and the native hit of the same cached length beside it."""
    desk.ask_all("fill", desk.overcommit)
    for prompt_id, prompt in desk.overcommit.items():
        desk.ask("overcommit_kvkern", prompt_id, prompt)
        desk.ask("check", prompt_id, prompt)
    desk.say(f"overcommit_kvkern: {len(desk.overcommit)} x {desk.plan.short_tokens:,} tokens asked again")
    _hit_pairs(desk, desk.short)
    _hit_pairs(desk, dict(list(desk.long.items())[:1]))
    _converse(desk, "turn_kvkern", forget=True)


def float32(desk: MeasuredEngine) -> None:
    """In bf16 vLLM's own prefill differs from its own hits in the last bits; in float32 all three agree."""
    for prompt_id, prompt in list(desk.overcommit.items())[: desk.plan.float32_prompts]:
        desk.ask("recompute_float32", prompt_id, prompt)
        desk.ask("native_hit_float32", prompt_id, prompt)
        desk.engine.forget()
        desk.ask("kvkern_hit_float32", prompt_id, prompt)
        desk.say(f"float32: {len(prompt):,} tokens recomputed, hit natively and loaded")


def first_of_node(desk: MeasuredEngine) -> None:
    """Computes what the others will load."""
    documents = _node_documents(desk)
    for prompt_id, prompt in documents.items():
        desk.ask("fill", prompt_id, prompt, 1)
    chunks = sum(len(prompt) // BLOCK_TOKENS for prompt in documents.values())
    supervised_daemon.wait_for(desk.socket, lambda row: row.get("chunks", 0) >= chunks)
    desk.say(f"{len(documents)} documents computed, {chunks} chunks in the node's cache")


def second_of_node(desk: MeasuredEngine) -> None:
    """Hits what the first has computed; then without a daemon; then with the restarted one."""
    documents = _node_documents(desk)
    _load_pairs(desk, documents, "second_engine", "second_engine_native", desk.plan.node_pairs)
    sessions = supervised_daemon.kill(desk.socket)
    desk.engine.forget()
    prompt_id, prompt = next(iter(documents.items()))
    desk.ask("daemon_gone", prompt_id, prompt)
    desk.say("daemon killed with -9: the engine computes and goes on")
    supervised_daemon.wait_for(desk.socket, lambda row: row.get("sessions", 0) >= sessions)
    _load_pairs(desk, documents, "daemon_restart", "daemon_restart_native", desk.plan.node_pairs)


def again_on_node(desk: MeasuredEngine) -> None:
    """A restarted engine finds what its predecessors computed."""
    _load_pairs(desk, _node_documents(desk), "engine_restart", "engine_restart_native", desk.plan.node_pairs)


def computed(desk: MeasuredEngine) -> None:
    """What the documents cost who has nothing of them."""
    for prompt_id, prompt in _node_documents(desk).items():
        answers = []
        for _ in range(desk.plan.long_runs):
            desk.engine.forget()
            answers.append(desk.ask("recompute", prompt_id, prompt, 1))
        ttft_s = median(answer.ttft_s for answer in answers)
        desk.say(f"recompute: {len(answers)} x {len(prompt):,} tokens, median {ttft_s:.2f} s to the first token")


def other_node(desk: MeasuredEngine) -> None:
    """Loads what the first node has written to the remote store, and has nowhere else."""
    _load_pairs(desk, _node_documents(desk), "remote", "native_hit", desk.plan.node_pairs, partial(_from_remote, desk))
    row = supervised_daemon.stat(desk.socket)
    if late := row["remote_late_chunks"]:
        desk.say(f"{late} chunks came when computing would have been done: the engine had gone on without them")
    if unasked := row["remote_unasked_chunks"]:
        desk.say(f"{unasked} chunks were not asked for: the store was slow to answer, or left a request waiting")
    if gated := row["remote_gated_chunks"]:
        desk.say(f"{gated} chunks were left in the store: it takes longer than computing them")


def _from_remote(desk: MeasuredEngine, case: str, prompt_id: str, prompt: list[int]) -> Answer:
    """Ask when the daemon's memory is empty; the answer tells what the daemon has read from the store for it."""
    supervised_daemon.clear(desk.socket)
    before = supervised_daemon.stat(desk.socket)["remote_hit_chunks"]
    answer = desk.ask_quietly(case, prompt_id, prompt)
    chunks = supervised_daemon.stat(desk.socket)["remote_hit_chunks"] - before
    answer = msgspec.structs.replace(answer, remote_tokens=chunks * BLOCK_TOKENS)
    desk.emit(answer)
    return answer


def _node_documents(desk: MeasuredEngine) -> Prompts:
    return desk.short | dict(list(desk.long.items())[:1])


def _hit_pairs(desk: MeasuredEngine, prompts: Prompts) -> None:
    for prompt_id, prompt in prompts.items():
        desk.ask("fill", prompt_id, prompt, 1)
    _load_pairs(desk, prompts, "kvkern_hit", "native_hit", desk.plan.pairs)


def _load_pairs(
    desk: MeasuredEngine,
    prompts: Prompts,
    case: str,
    native_case: str,
    count: int,
    load: Callable[[str, str, list[int]], Answer] | None = None,  # how it is asked for; None: as anything
) -> None:
    """Ask for each prompt: vLLM forgets, it is loaded, it is hit natively."""
    load = load or desk.ask
    for prompt_id, prompt in prompts.items():
        pairs = []
        for _ in range(count):
            desk.engine.forget()
            pairs.append((load(case, prompt_id, prompt), desk.ask(native_case, prompt_id, prompt)))
        ours_s, native_s = (median(answer.ttft_s for answer in side) for side in zip(*pairs, strict=True))
        title = case.replace("_", " ")
        desk.say(f"{len(pairs)} x {len(prompt):,} tokens: {title} {ours_s:.3f} s, native hit {native_s:.3f} s")


def _converse(desk: MeasuredEngine, case: str, *, forget: bool) -> None:
    history: list[int] = []
    for index, user_tokens in enumerate(desk.turns):
        history = history + user_tokens
        if forget:
            desk.engine.forget()
        answer = desk.ask(case, f"turn-{index}", history, desk.plan.turn_reply_tokens)
        if forget:
            desk.engine.forget()
            desk.ask("kvkern_recheck", f"turn-{index}", history)
            desk.ask("check", f"turn-{index}", history)
        history = history + list(answer.tokens)
    desk.say(f"conversation: {len(desk.turns)} turns, {len(history):,} tokens")


def overcommitted(desk: MeasuredEngine, case: str) -> None:
    """One token a reply: only the time counts, and what was loaded."""
    mix = desk.plan.mix
    drawn = mixed_workload.requests(mix)
    texts = {source: desk.library.document(length) for source, length in mixed_workload.lengths(drawn).items()}
    held: dict[str, list[Turn]] = {}  # by source
    for request in drawn:
        desk.engine.forget()
        prompt = texts[request.source][: request.num_tokens]
        answer = desk.ask(case if request.turn else f"{case}_new", request.prompt_id, prompt, 1)
        held.setdefault(request.source, []).append((answer, prompt))
    again = [answer for turns in held.values() for answer, _ in turns[1:]]
    loaded, ttft_s = sum(answer.loaded_tokens for answer in again), median(answer.ttft_s for answer in again)
    desk.say(f"{case}: {len(drawn)} prompts, {len(again)} came back: {loaded:,} tokens loaded, median {ttft_s:.3f} s")
    plain = [_plain_turns(turns, mix.chunk_tokens) for turns in held.values()]
    for turns in sorted(filter(_num_loaded, plain), key=_num_loaded, reverse=True)[: mix.natives]:
        _hold_natively(desk, f"{case}_native", turns)


def _plain_turns(turns: list[Turn], chunk_tokens: int) -> list[Turn]:
    """The first turns that found all of their history or none of it: vLLM alone can be brought to the same state."""
    plain, known = [], 0
    for answer, prompt in turns:
        if answer.cached_tokens not in (0, known):
            break
        plain.append((answer, prompt))
        known = len(prompt) // chunk_tokens * chunk_tokens
    return plain


def _num_loaded(turns: list[Turn]) -> int:
    return sum(answer.loaded_tokens > 0 for answer, _ in turns)


def _hold_natively(desk: MeasuredEngine, case: str, turns: list[Turn]) -> None:
    """The same turns with the same parts computed, as a tenant whom kvkern has nothing for."""
    salt = ""
    for answer, prompt in turns:
        if not answer.cached_tokens:
            desk.engine.forget()
            salt = f"{case}-{answer.prompt_id}"
        desk.ask(case, answer.prompt_id, prompt, 1, salt)


PHASES: dict[str, Callable[[MeasuredEngine], None]] = {
    "vllm": vllm_alone,
    "kvkern": vllm_with_kvkern,
    "float32": float32,
    "first": first_of_node,
    "second": second_of_node,
    "again": again_on_node,
    "computed": computed,
    "remote": other_node,
    "lru": partial(overcommitted, case="overcommit_lru"),
    "grit": partial(overcommitted, case="overcommit_grit"),
}
