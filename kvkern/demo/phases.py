"""The measurements: one function (a phase) per engine. Knows prompts and an engine; prints nothing and judges nothing.

"forget" means that vLLM empties its own prefix cache, so that only kvkern can still have the prompt. Names in parentheses,
except forget, are the cases of the report.

vllm       pass 1 over 16 documents (recompute), pass 2 over the same documents (overcommit_native), then long documents
kvkern     pass 1 (fill), pass 2 (overcommit_kvkern), then per document: (forget, kvkern_hit, native_hit) x pairs
float32    recompute, native hit and kvkern hit of the same prompt, for questions and documents; all three must agree
first      computes documents through a daemon, and stays up
second     another engine on the same daemon: (forget, second_engine, native hit) x pairs. Then it kills the daemon and
           repeats the pairs (daemon_restart)
again      a new engine after both have ended: the same pairs (engine_restart)
computed   remote demo: a short and a long document, forget before each (recompute)
remote     remote demo: an engine of another node, whose daemon's memory is emptied before each pair:
           (forget, remote, native hit) x pairs
lru, grit  the requests of mixed_workload.py, with four times as many chunks as the arena holds; forget before each request

The vllm and kvkern engines also hold the same conversation. The kvkern engine forgets before every turn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Protocol

import msgspec

from . import mixed_workload, supervised_daemon
from .messages import WARM_UP_TOKENS, Answer, MixedWorkload, Plan, Progress
from .prompts import PromptLibrary


class EngineVerbs(Protocol):
    """The methods of `Engine` that phases use."""

    def ask(
        self, case: str, prompt_id: str, prompt: list[int], reply_tokens: int, salt: str | None = None
    ) -> Answer: ...
    def forget(self) -> None: ...


Emit = Callable[[Answer | Progress], None]
Prompts = dict[str, list[int]]
Turn = tuple[Answer, list[int]]  # the answer and its prompt


class MeasuredEngine:
    """Asks an engine and emits every answer. Cuts the plan's documents from the library, in a fixed order."""

    def __init__(
        self,
        engine: EngineVerbs,
        library: PromptLibrary,
        plan: Plan,
        emit: Emit,
        socket: str | None = None,  # socket of the engine's daemon
        salt: str | None = None,
        questions: Prompts | None = None,  # that a person would ask; none for models that do not chat
    ) -> None:
        self.questions = questions or {}
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
        """Ask without emitting the answer. The caller emits it."""
        return self.engine.ask(case, prompt_id, prompt, reply_tokens or self.plan.reply_tokens, salt or self.salt)

    def ask_all(self, case: str, prompts: Prompts) -> list[Answer]:
        """Ask every prompt once, in order, for one token, since only the time to first token counts."""
        tokens = len(next(iter(prompts.values())))
        answers = [self.ask(case, prompt_id, prompt, 1) for prompt_id, prompt in prompts.items()]
        ttft_s = median(answer.ttft_s for answer in answers)
        self.say(f"{case}: {len(answers)} x {tokens:,} tokens, median {ttft_s:.2f} s to the first token")
        return answers

    def say(self, text: str) -> None:
        self.emit(Progress(text))

    def _documents(self, kind: str, count: int, num_tokens: int) -> Prompts:
        return {f"{kind}-{index}": self.library.document(num_tokens) for index in range(count)}


def vllm_alone(measured: MeasuredEngine) -> None:
    """Measure vLLM without kvkern: it computes every forgotten prompt again."""
    measured.ask_all("recompute", measured.overcommit)
    measured.ask_all("overcommit_native", measured.overcommit)
    measured.ask_all("recompute", measured.long)
    _hold_conversation(measured, "turn_vllm", forget=False)


def vllm_with_kvkern(measured: MeasuredEngine) -> None:
    """Measure loads from kvkern, each beside a native hit of the same cached length."""
    measured.ask_all("fill", measured.overcommit)
    for prompt_id, prompt in measured.overcommit.items():
        measured.ask("overcommit_kvkern", prompt_id, prompt)
        measured.ask("check", prompt_id, prompt)
    measured.say(f"overcommit_kvkern: {len(measured.overcommit)} x {measured.plan.short_tokens:,} tokens asked again")
    _hit_pairs(measured, measured.short)
    _hit_pairs(measured, dict(list(measured.long.items())[:1]))
    _hold_conversation(measured, "turn_kvkern", forget=True)


def float32(measured: MeasuredEngine) -> None:
    """Ask in float32, where recompute, native hit and kvkern hit agree. In bf16 vLLM's prefill differs from its own hits."""
    plan = measured.plan
    for prompt_id, prompt in measured.questions.items():
        _compute_and_load(measured, prompt_id, prompt, plan.question_reply_tokens)
    for index in range(plan.float32_prompts):
        prompt = measured.library.document(plan.float32_tokens)
        _compute_and_load(measured, f"float32-{index}", prompt, plan.reply_tokens)


def _compute_and_load(measured: MeasuredEngine, prompt_id: str, prompt: list[int], reply_tokens: int) -> None:
    measured.ask("recompute_float32", prompt_id, prompt, reply_tokens)
    measured.ask("native_hit_float32", prompt_id, prompt, reply_tokens)
    measured.engine.forget()
    measured.ask("kvkern_hit_float32", prompt_id, prompt, reply_tokens)
    measured.say(f"float32: {len(prompt):,} tokens recomputed, hit natively and loaded")


def first_of_node(measured: MeasuredEngine) -> None:
    """Compute the documents that the other engines will load."""
    documents = _node_documents(measured)
    for prompt_id, prompt in documents.items():
        measured.ask("fill", prompt_id, prompt, 1)
    chunks = sum(len(prompt) // measured.plan.block_tokens for prompt in documents.values())
    warm_up = max(WARM_UP_TOKENS) // measured.plan.block_tokens  # the other prompts are its beginnings
    supervised_daemon.wait_for(measured.socket, lambda row: row.get("chunks", 0) >= chunks + warm_up)
    measured.say(f"{len(documents)} documents computed, {chunks} chunks in the node's cache")


def second_of_node(measured: MeasuredEngine) -> None:
    """Load the first engine's documents; ask again while the daemon is gone; load again from the restarted daemon."""
    documents = _node_documents(measured)
    _load_pairs(measured, documents, "second_engine", "second_engine_native", measured.plan.node_pairs)
    sessions = supervised_daemon.kill(measured.socket)
    measured.engine.forget()
    prompt_id, prompt = next(iter(documents.items()))
    measured.ask("daemon_gone", prompt_id, prompt)
    measured.say("daemon killed with -9: the engine computes the prompt")
    supervised_daemon.wait_for(measured.socket, lambda row: row.get("sessions", 0) >= sessions)
    _load_pairs(measured, documents, "daemon_restart", "daemon_restart_native", measured.plan.node_pairs)


def again_on_node(measured: MeasuredEngine) -> None:
    """Load what earlier engines of the node computed, from an engine that has just been started."""
    _load_pairs(
        measured, _node_documents(measured), "engine_restart", "engine_restart_native", measured.plan.node_pairs
    )


def computed(measured: MeasuredEngine) -> None:
    """Compute the documents without any cache, for comparison."""
    for prompt_id, prompt in _node_documents(measured).items():
        answers = []
        for _ in range(measured.plan.long_runs):
            measured.engine.forget()
            answers.append(measured.ask("recompute", prompt_id, prompt, 1))
        ttft_s = median(answer.ttft_s for answer in answers)
        measured.say(f"recompute: {len(answers)} x {len(prompt):,} tokens, median {ttft_s:.2f} s to the first token")


def other_node(measured: MeasuredEngine) -> None:
    """Load what the first node wrote to the remote store. No other place has it."""
    _load_pairs(
        measured,
        _node_documents(measured),
        "remote",
        "native_hit",
        measured.plan.node_pairs,
        partial(_from_remote, measured),
    )
    row = supervised_daemon.stat(measured.socket)
    if late := row["remote_late_chunks"]:
        measured.say(f"{late} chunks came too late: the engine had already started to compute them")
    if unasked := row["remote_unasked_chunks"]:
        measured.say(f"{unasked} chunks were not asked for: the store was slow, or it kept another request waiting")
    if gated := row["remote_gated_chunks"]:
        measured.say(f"{gated} chunks were not read from the store: computing them is faster")


def _from_remote(measured: MeasuredEngine, case: str, prompt_id: str, prompt: list[int]) -> Answer:
    """Empty the daemon's memory, then ask. The answer says how many tokens the daemon read from the store for it."""
    supervised_daemon.clear(measured.socket)
    before = supervised_daemon.stat(measured.socket)["remote_hit_chunks"]
    answer = measured.ask_quietly(case, prompt_id, prompt)
    chunks = supervised_daemon.stat(measured.socket)["remote_hit_chunks"] - before
    answer = msgspec.structs.replace(answer, remote_tokens=chunks * measured.plan.block_tokens)
    measured.emit(answer)
    return answer


def _node_documents(measured: MeasuredEngine) -> Prompts:
    return measured.short | dict(list(measured.long.items())[:1])


def _hit_pairs(measured: MeasuredEngine, prompts: Prompts) -> None:
    for prompt_id, prompt in prompts.items():
        measured.ask("fill", prompt_id, prompt, 1)
    _load_pairs(measured, prompts, "kvkern_hit", "native_hit", measured.plan.pairs)


def _load_pairs(
    measured: MeasuredEngine,
    prompts: Prompts,
    case: str,
    native_case: str,
    count: int,
    load: Callable[[str, str, list[int]], Answer] | None = None,  # asks for the load; None: `measured.ask`
) -> None:
    """Repeat `count` times for each prompt: vLLM forgets it, kvkern loads it, vLLM hits it natively."""
    load = load or measured.ask
    for prompt_id, prompt in prompts.items():
        pairs = []
        for _ in range(count):
            measured.engine.forget()
            pairs.append((load(case, prompt_id, prompt), measured.ask(native_case, prompt_id, prompt)))
        ours_s, native_s = (median(answer.ttft_s for answer in side) for side in zip(*pairs, strict=True))
        title = case.replace("_", " ")
        measured.say(f"{len(pairs)} x {len(prompt):,} tokens: {title} {ours_s:.3f} s, native hit {native_s:.3f} s")


def _hold_conversation(measured: MeasuredEngine, case: str, *, forget: bool) -> None:
    history: list[int] = []
    for index, user_tokens in enumerate(measured.turns):
        history = history + user_tokens
        if forget:
            measured.engine.forget()
        answer = measured.ask(case, f"turn-{index}", history, measured.plan.turn_reply_tokens)
        if forget:
            measured.engine.forget()
            measured.ask("kvkern_recheck", f"turn-{index}", history)
            measured.ask("check", f"turn-{index}", history)
        history = history + list(answer.tokens)
    measured.say(f"conversation: {len(measured.turns)} turns, {len(history):,} tokens")


def overcommitted(measured: MeasuredEngine, case: str) -> None:
    """Ask the mixed workload for one token each, since only time and loaded tokens count. Then repeat a sample natively."""
    mix = measured.plan.mix or MixedWorkload()
    drawn = mixed_workload.requests(mix)
    texts = {
        source: measured.library.document(length) for source, length in mixed_workload.final_lengths(drawn).items()
    }
    held: dict[str, list[Turn]] = {}  # by source
    for request in drawn:
        measured.engine.forget()
        prompt = texts[request.source][: request.num_tokens]
        answer = measured.ask(case if request.turn else f"{case}_new", request.prompt_id, prompt, 1)
        held.setdefault(request.source, []).append((answer, prompt))
    again = [answer for turns in held.values() for answer, _ in turns[1:]]
    loaded, ttft_s = sum(answer.loaded_tokens for answer in again), median(answer.ttft_s for answer in again)
    measured.say(
        f"{case}: {len(drawn)} prompts, {len(again)} came back: {loaded:,} tokens loaded, median {ttft_s:.3f} s"
    )
    reproducible = [_reproducible_turns(turns, mix.chunk_tokens) for turns in held.values()]
    for turns in sorted(filter(_num_loaded, reproducible), key=_num_loaded, reverse=True)[: mix.natives]:
        _repeat_natively(measured, f"{case}_native", turns)


def _reproducible_turns(turns: list[Turn], chunk_tokens: int) -> list[Turn]:
    """Return the first turns that found all of their history or none of it. vLLM alone can reach the same cached lengths."""
    plain, known = [], 0
    for answer, prompt in turns:
        if answer.cached_tokens not in (0, known):
            break
        plain.append((answer, prompt))
        known = len(prompt) // chunk_tokens * chunk_tokens
    return plain


def _num_loaded(turns: list[Turn]) -> int:
    return sum(answer.loaded_tokens > 0 for answer, _ in turns)


def _repeat_natively(measured: MeasuredEngine, case: str, turns: list[Turn]) -> None:
    """Ask the same turns under a salt of their own, so that kvkern has nothing and vLLM computes the same parts."""
    salt = ""
    for answer, prompt in turns:
        if not answer.cached_tokens:
            measured.engine.forget()
            salt = f"{case}-{answer.prompt_id}"
        measured.ask(case, answer.prompt_id, prompt, 1, salt)


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
