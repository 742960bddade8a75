"""Judges the answers: did kvkern load anything, and are its answers those that vLLM itself gives?

    any dtype kvkern's answer == native hit's answer for the same prompt at the same cached length, bit for bit
    float32   recompute == native hit == kvkern hit: tokens equal, log-probabilities within FLOAT32_TOLERANCE
    policies  for the same requests GRIT loads at least as many tokens as LRU
    remote    for every request, the second node's daemon read all loaded tokens from the remote store

Knows answers; knows nothing of engines. A comparison that could not be made counts as failed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from .messages import Answer

FLOAT32_TOLERANCE = 1e-4  # of a log-probability: recompute sums in another order than a hit does
NODE_CASES = ("second_engine", "daemon_restart", "engine_restart")
LOADED_CASES = ("kvkern_hit", "overcommit_kvkern", "kvkern_recheck", "kvkern_hit_float32", *NODE_CASES)
POLICY_CASES = ("overcommit_lru", "overcommit_grit")  # turns that come back; `<case>_new`: all other prompts
NATIVE_CASES = ("native_hit", "check", *(f"{case}_native" for case in NODE_CASES))


@dataclass(frozen=True)
class Finding:
    """One check over many answers."""

    name: str
    num_compared: int
    problems: tuple[str, ...]  # empty when the check holds
    figures: str = ""  # measured values, shown whether the check holds or not

    @property
    def ok(self) -> bool:
        return self.num_compared > 0 and not self.problems

    def line(self) -> str:
        if not self.num_compared:
            return f"{self.name}: nothing to compare"
        figures = f"; {self.figures}" if self.figures else ""
        if self.ok:
            return f"{self.name}: {self.num_compared} of {self.num_compared}{figures}"
        return f"{self.name}: {len(self.problems)} of {self.num_compared} failed; first: {self.problems[0]}{figures}"


def check_answers(answers: Sequence[Answer], dtype: str = "bf16", *, policies: bool = True) -> list[Finding]:
    """Return every check of the answers' tokens and log-probabilities, in the order in which they are shown.

    `dtype` is that of all engines but the float32 one. Without `policies` no engine had an arena that is too small.
    """
    documents = _against_native(f"{dtype}, kvkern hit = native hit", answers, ("kvkern_hit",))
    overcommit = _against_native(
        f"{dtype}, kvkern hit = native hit, prompts beyond the pool", answers, ("overcommit_kvkern",)
    )
    recheck = _against_native(f"{dtype}, kvkern hit = native hit, conversation", answers, ("kvkern_recheck",))
    titles = ("another engine's chunks", "after the daemon was killed", "a restarted engine")
    node = [
        _against_native(f"{dtype}, {title} = native hit", answers, (case,))
        for title, case in zip(titles, NODE_CASES, strict=True)
    ]
    return [
        documents,
        overcommit,
        recheck,
        *([_against_native_overcommitted(answers, dtype)] if policies else []),
        *node,
        _without_daemon(answers),
        _across_engines(answers, dtype),
        _in_float32(answers, "native_hit_float32"),
        _in_float32(answers, "kvkern_hit_float32"),
    ]


def check_loaded(answers: Sequence[Answer]) -> Finding:
    """Check that kvkern loaded tokens for every answer that is shown as kvkern's."""
    asked = [answer for answer in answers if answer.case in LOADED_CASES]
    empty = [f"{_describe(answer)} loaded nothing" for answer in asked if not answer.cached_tokens]
    empty += [f"no {case} loaded a token" for case in LOADED_CASES if not _any_loaded(asked, case)]
    return Finding("tokens were loaded", len(asked), tuple(empty))


def check_remote(answers: Sequence[Answer], dtype: str = "bf16") -> list[Finding]:
    """Return every check of the demo with a remote store. The last one compares tokens and log-probabilities."""
    ours = [answer for answer in answers if answer.case == "remote"]
    empty = [f"{_describe(answer)} loaded nothing" for answer in ours if not answer.loaded_tokens]
    elsewhere = [
        f"{_describe(answer)} loaded {answer.loaded_tokens} tokens, of which the store gave {answer.remote_tokens}"
        for answer in ours
        if answer.remote_tokens < answer.loaded_tokens
    ]
    elsewhere += [
        f"{_describe(answer)} found {answer.cached_tokens} tokens before any node had computed them"
        for answer in answers
        if answer.case in ("fill", "recompute") and answer.cached_tokens
    ]
    equal = _against_native(f"{dtype}, another node's chunks = native hit", answers, ("remote",))
    return [
        Finding("tokens were loaded", len(ours), tuple(empty), _median_times(answers)),
        Finding("all of them through the remote store", len(ours), tuple(elsewhere)),
        equal,
    ]


def _median_times(answers: Sequence[Answer]) -> str:
    """Return the median TTFTs of each prompt length for which all three cases were measured."""
    lines = []
    for length in sorted({answer.prompt_tokens for answer in answers}):
        times_s = [
            [answer.ttft_s for answer in answers if answer.case == case and answer.prompt_tokens == length]
            for case in ("remote", "native_hit", "recompute")
        ]
        if all(times_s):
            ours_s, native_s, computed_s = map(median, times_s)
            lines.append(
                f"{length:,} tokens in {ours_s:.3f} s, {ours_s / native_s:.2f}x of a native hit and "
                f"{computed_s / ours_s:.1f}x faster than computing"
            )
    return "; ".join(lines)


def check_policies(answers: Sequence[Answer]) -> Finding:
    """Check that GRIT loads at least as many tokens as LRU from an arena that is too small, and vLLM's own cache has none."""
    lru, grit = ([answer for answer in answers if answer.case in (case, f"{case}_new")] for case in POLICY_CASES)
    problems = [
        f"{_describe(answer)} found {answer.cached_tokens - answer.loaded_tokens} tokens in vLLM's own cache"
        for answer in (*lru, *grit)
        if answer.cached_tokens != answer.loaded_tokens
    ]
    if [(answer.prompt_id, answer.prompt_tokens) for answer in lru] != [
        (answer.prompt_id, answer.prompt_tokens) for answer in grit
    ]:
        problems.append("the two policies were asked for different prompts")
    loaded_lru, loaded_grit = (sum(answer.loaded_tokens for answer in side) for side in (lru, grit))
    if not loaded_lru <= loaded_grit or not loaded_grit:
        problems.append(f"GRIT loaded {loaded_grit:,} tokens, LRU {loaded_lru:,}")
    asked, before = max(sum(answer.prompt_tokens for answer in grit), 1), _upper_bound_tokens(grit)
    figures = (
        f"{loaded_grit:,} and {loaded_lru:,} of {asked:,} tokens, hit ratios {loaded_grit / asked:.3f} and "
        f"{loaded_lru / asked:.3f} of at most {before / asked:.3f}"
    )
    return Finding("arena overcommitted, GRIT loads at least what LRU does", len(grit), tuple(problems), figures)


def _upper_bound_tokens(answers: Sequence[Answer]) -> int:
    """Count the prompts' tokens that the turn before had too. No policy can load more; whole chunks give slightly less."""
    before: dict[str, int] = {}
    total = 0
    for answer in answers:
        source = answer.prompt_id.partition("/")[0]
        total += before.get(source, 0)
        before[source] = answer.prompt_tokens
    return total


def _against_native_overcommitted(answers: Sequence[Answer], dtype: str) -> Finding:
    """Compare the sample of conversations that vLLM repeated without kvkern, with the same parts computed."""
    ours, problems = [], []
    for case in POLICY_CASES:
        native = {answer.prompt_id: answer for answer in answers if answer.case == f"{case}_native"}
        sample = [a for a in answers if a.case == case and a.loaded_tokens and a.prompt_id in native]
        ours += sample
        problems += [problem for answer in sample if (problem := _difference(answer, native[answer.prompt_id]))]
        problems += [f"{_describe(answer)} loaded something" for answer in native.values() if answer.loaded_tokens]
        if not sample:
            problems.append(f"no {case} has a native answer")
    return Finding(f"{dtype}, kvkern hit = native hit, arena overcommitted", len(ours), tuple(problems))


def _without_daemon(answers: Sequence[Answer]) -> Finding:
    asked = [answer for answer in answers if answer.case == "daemon_gone"]
    problems = [
        f"{_describe(answer)} loaded {answer.loaded_tokens} tokens from nowhere"
        for answer in asked
        if answer.loaded_tokens
    ]
    return Finding("an engine whose daemon is gone computes and answers", len(asked), tuple(problems))


def _any_loaded(asked: Iterable[Answer], case: str) -> bool:
    return any(answer.loaded_tokens for answer in asked if answer.case == case)


def _against_native(name: str, answers: Sequence[Answer], cases: tuple[str, ...]) -> Finding:
    native = {answer.prompt_id: answer for answer in answers if answer.case in NATIVE_CASES}
    ours = [answer for answer in answers if answer.case in cases]
    problems = [problem for answer in ours if (problem := _difference(answer, native.get(answer.prompt_id)))]
    return Finding(name, len(ours), tuple(problems))


def _across_engines(answers: Sequence[Answer], dtype: str) -> Finding:
    alone = {answer.prompt_id: answer for answer in answers if answer.case == "turn_vllm"}
    ours = [answer for answer in answers if answer.case == "turn_kvkern"]
    problems = [problem for answer in ours if (problem := _difference(answer, alone.get(answer.prompt_id)))]
    return Finding(f"{dtype}, conversation = the same one without kvkern", len(ours), tuple(problems))


def _difference(ours: Answer, reference: Answer | None) -> str | None:
    if reference is None:
        return f"{_describe(ours)} has no native answer"
    if ours.cached_tokens != reference.cached_tokens:
        return f"{_describe(ours)} reused {ours.cached_tokens} tokens, vLLM itself {reference.cached_tokens}"
    if ours.tokens != reference.tokens:
        return f"{_describe(ours)} gave other tokens than {reference.case}"
    if ours.logprobs != reference.logprobs:
        return f"{_describe(ours)} gave log-probabilities up to {_distance(ours, reference):.2g} off {reference.case}"
    return None


def _in_float32(answers: Sequence[Answer], case: str) -> Finding:
    recomputed = {answer.prompt_id: answer for answer in answers if answer.case == "recompute_float32"}
    ours = [answer for answer in answers if answer.case == case]
    problems = []
    for answer in ours:
        reference = recomputed.get(answer.prompt_id)
        if reference is None or answer.tokens != reference.tokens:
            problems.append(f"{_describe(answer)} gave other tokens than recompute")
        elif (distance := _distance(answer, reference)) > FLOAT32_TOLERANCE:
            problems.append(f"{_describe(answer)} gave log-probabilities up to {distance:.2g} off recompute")
    return Finding(
        f"float32, {case.removesuffix('_float32').replace('_', ' ')} = recompute", len(ours), tuple(problems)
    )


def _distance(ours: Answer, reference: Answer) -> float:
    """Return the largest difference of a log-probability, or infinity if the two answers list different tokens."""
    distance = 0.0
    for mine, theirs in zip(ours.logprobs, reference.logprobs, strict=True):
        by_token = dict(theirs)
        for token, logprob in mine:
            distance = max(distance, abs(logprob - by_token.get(token, float("inf"))))
    return distance


def _describe(answer: Answer) -> str:
    return f"{answer.case} {answer.prompt_id} ({answer.prompt_tokens} tokens)"
