"""Turns answers into rows, a table and JSON. Knows answers and where they were measured; measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from rich import box
from rich.table import Table

from .messages import Answer

# case -> the case that it is compared with, in the table's order
CASES = {
    "recompute": None,
    "native_hit": "recompute",
    "kvkern_hit": "recompute",
    "second_engine": "recompute",
    "engine_restart": "recompute",
    "daemon_restart": "recompute",
    "remote": "recompute",
    "overcommit_native": None,
    "overcommit_kvkern": "overcommit_native",
    "overcommit_lru": None,
    "overcommit_grit": "overcommit_lru",
}
POLICY_CASES = ("overcommit_lru", "overcommit_grit")  # one row each, over prompts of all lengths
HEADINGS = ("prompt\ntokens", "reused\ntokens", "loaded\ntokens", "TTFT\ns", "times\nfaster", "of native\nhit", "runs")
CAPTION = (
    "reused: tokens not computed. loaded: those of them that came from kvkern. times faster: than computing. overcommit: more "
    "prompts than vLLM's pool holds. second engine to daemon: loads, through the node's daemon, of chunks that another engine "
    "process computed. 4x arena: turns that come back when requests have four times as many chunks as kvkern's arena; times "
    "faster: than with LRU."
)
REMOTE_CAPTION = (
    "reused: tokens not computed. loaded: those of them that came from kvkern. times faster: than computing. another node: an "
    "engine whose daemon had nothing in memory and read it from the remote store, where the first node's daemon had written it."
)
NODE_CASES = ("second_engine", "engine_restart", "daemon_restart")
# case -> the native hits that were measured beside it, in the same engine
NATIVE = {"kvkern_hit": "native_hit", "remote": "native_hit"} | {case: f"{case}_native" for case in NODE_CASES}
TITLES = {
    "recompute": "recompute",
    "native_hit": "native hit",
    "kvkern_hit": "kvkern hit",
    "second_engine": "second engine",
    "engine_restart": "engine restarted",
    "daemon_restart": "daemon killed, back",
    "remote": "another node, remote",
    "overcommit_native": "overcommit, vLLM",
    "overcommit_kvkern": "overcommit, kvkern",
    "overcommit_lru": "4x arena, LRU",
    "overcommit_grit": "4x arena, GRIT",
}


@dataclass(frozen=True)
class Row:
    """One case at one prompt length."""

    case: str
    prompt_tokens: int  # median, where lengths differ
    cached_tokens: int  # median; tokens from vLLM's own cache and from kvkern
    loaded_tokens: int  # median; those of them that came from kvkern
    ttft_s: float  # median
    ttft_min_s: float
    ttft_max_s: float
    runs: int
    native_ttft_s: float | None  # median of the native hits beside the case, in the same engine


def rows(answers: Sequence[Answer]) -> list[Row]:
    """Return one row for each reported case and prompt length, in the table's order."""
    groups: dict[tuple[int, int, int], list[Answer]] = {}
    for answer in answers:
        if answer.case in CASES:
            groups.setdefault(_sort_key(answer), []).append(answer)
    return [_row(groups[key], answers) for key in sorted(groups)]


def _sort_key(answer: Answer) -> tuple[int, int, int]:
    """Return the sort key of the answer's row: section, prompt length, case."""
    order = list(CASES).index(answer.case)
    if answer.case in POLICY_CASES:
        return 2, 0, order
    return int(answer.case.startswith("overcommit")), answer.prompt_tokens, order


def _row(group: Sequence[Answer], answers: Sequence[Answer]) -> Row:
    native_case, length = NATIVE.get(group[0].case), group[0].prompt_tokens
    native_s = [answer.ttft_s for answer in answers if answer.case == native_case and answer.prompt_tokens == length]
    times_s = [answer.ttft_s for answer in group]
    return Row(
        case=group[0].case,
        prompt_tokens=int(median(answer.prompt_tokens for answer in group)),
        cached_tokens=int(median(answer.cached_tokens for answer in group)),
        loaded_tokens=int(median(answer.loaded_tokens for answer in group)),
        ttft_s=median(times_s),
        ttft_min_s=min(times_s),
        ttft_max_s=max(times_s),
        runs=len(group),
        native_ttft_s=median(native_s) if native_s else None,
    )


def table(shown: Sequence[Row]) -> Table:
    """Return the table for the terminal."""
    result = Table(
        title="Time to first token (TTFT), medians",
        caption=REMOTE_CAPTION if any(row.case == "remote" for row in shown) else CAPTION,
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    result.add_column("case", no_wrap=True)
    for heading in HEADINGS:
        result.add_column(heading, justify="right", no_wrap=True)
    by_key = {(row.case, row.prompt_tokens): row for row in shown}
    for row in shown:
        base = by_key.get((CASES[row.case] or "", row.prompt_tokens))
        result.add_row(
            TITLES[row.case],
            f"{row.prompt_tokens:,}",
            f"{row.cached_tokens:,}",
            f"{row.loaded_tokens:,}",
            f"{row.ttft_s:.3f}",
            f"{base.ttft_s / row.ttft_s:.1f}x" if base else "",
            f"{row.ttft_s / row.native_ttft_s:.2f}x" if row.native_ttft_s else "",
            str(row.runs),
            end_section=row.case in ("daemon_restart", "overcommit_kvkern", "remote"),
        )
    return result


def as_dicts(shown: Sequence[Row]) -> list[dict[str, object]]:
    return [asdict(row) for row in shown]
