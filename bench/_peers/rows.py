"""Judges answers and makes rows. Knows numbers; knows no system and starts nothing.

A row named ttft_hit exists only if every measured request was a load. Four checks say so:
    vLLM's own prefix cache was empty, and vLLM counts all reusable tokens as the connector's
    vLLM did not take back the promise (a failed load is recomputed and then counts as not cached)
    the median is below MAX_OF_RECOMPUTE of the time of computing the same number of tokens in the same engine
    if the system keeps a log of loads, it has as many loads of that size
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

MAX_OF_RECOMPUTE = 0.5
Row = dict[str, object]
Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """The result of one system's answers."""

    rows: list[Row]
    problems: list[str]  # each says why a row is missing, or what is wrong with a row


def engine_verdict(
    base: Row,  # system, version and the other fields of each of its rows
    answers: Sequence[Answer],
    loads_logged: Sequence[int] | None,  # tokens of each load in the system's own log; None: it keeps no log
) -> Verdict:
    """Return the rows of one engine, shortest prompts first."""
    rows: list[Row] = []
    problems: list[str] = []
    for tokens in sorted({answer["prompt_tokens"] for answer in answers if answer["case"] == "reference"}):
        group = [answer for answer in answers if answer["prompt_tokens"] == tokens]
        recomputed, reference = _with_case(group, "ttft_recompute"), _with_case(group, "reference")[0]
        native, hits = _with_case(group, "ttft_native_hit"), _with_case(group, "ttft_hit")
        if any(answer["cached_tokens"] for answer in recomputed):
            problems.append(f"{tokens} tokens: prompts that nobody has seen were hit")
            continue
        rows.append(_row(base, "ttft_recompute", recomputed))
        if _cached(native) != {(reference["cached_tokens"], 0)}:
            problems.append(f"{tokens} tokens: native hits reused {sorted(_cached(native))}")
            continue
        rows.append(_row(base, "ttft_native_hit", native))
        asked = [*hits, *_with_case(group, "first_ttft_hit")]
        wrong = _why_not_loaded(hits, len(asked), reference, _ttft_s(recomputed), loads_logged)
        if wrong:
            problems.append(f"{tokens} tokens: no ttft_hit, {wrong}")
            continue
        row = _row(base, "ttft_hit", hits) | {
            "ratio_native_hit": median(
                ours["ttft_s"] / theirs["ttft_s"] for ours, theirs in zip(hits, native, strict=True)
            ),
            "tokens_equal": all(answer["tokens"] == reference["tokens"] for answer in asked),
            "logprobs_equal": all(answer["logprobs"] == reference["logprobs"] for answer in asked),
        }
        rows.append(row)
        differing = [what for what in ("tokens", "logprobs") if not row[f"{what}_equal"]]
        problems += [f"{tokens} tokens: loads gave other {what} than a native hit" for what in differing]
    return Verdict(rows, problems)


def _with_case(answers: Sequence[Answer], case: str) -> list[Answer]:
    return [answer for answer in answers if answer["case"] == case]


def _cached(answers: Sequence[Answer]) -> set[tuple[int, int]]:
    """Return the distinct pairs (reused tokens, loaded tokens)."""
    return {(answer["cached_tokens"], answer["loaded_tokens"]) for answer in answers}


def _ttft_s(answers: Sequence[Answer]) -> float:
    return median(answer["ttft_s"] for answer in answers)


def _why_not_loaded(
    hits: Sequence[Answer], num_asked: int, reference: Answer, recompute_s: float, loads_logged: Sequence[int] | None
) -> str | None:
    """Return why these hits were not all loads, or None if they were."""
    expected = reference["cached_tokens"]
    for answer in hits:
        if answer["cached_tokens"] != expected or answer["loaded_tokens"] != expected:
            return (
                f"{answer['loaded_tokens']} tokens were promised and {answer['cached_tokens']} reused, "
                f"a native hit reuses {expected}"
            )
    if _ttft_s(hits) > MAX_OF_RECOMPUTE * recompute_s:
        return f"{_ttft_s(hits):.3f} s is too near the {recompute_s:.3f} s of computing"
    if loads_logged is not None and (logged := list(loads_logged).count(expected)) < num_asked:
        return f"its log has {logged} loads of {expected} tokens, {num_asked} were asked for"
    return None


def _row(base: Row, case: str, answers: Sequence[Answer]) -> Row:
    times_s = [answer["ttft_s"] for answer in answers]
    return {
        **base,
        "case": case,
        "prompt_tokens": answers[0]["prompt_tokens"],
        "ttft_s": median(times_s),
        "ttft_min_s": min(times_s),
        "ttft_max_s": max(times_s),
        "cached_tokens": answers[0]["cached_tokens"],
        "loaded_tokens": answers[0]["loaded_tokens"],
        "runs": len(answers),
    }


def library_rows(base: Row, measured: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the rows of one library. A measurement is one size with the seconds of each run."""
    rows: list[Row] = []
    for one in measured:
        memcpy_gb_s = one["memcpy_nbytes"] / median(one["memcpy_s"]) / 1e9
        for case in ("store", "retrieve"):
            gb_s = one["nbytes"] / median(one[f"{case}_s"]) / 1e9
            row: Row = {**base, "case": case, "tokens": one["tokens"], "gb_s": gb_s, "memcpy_gb_s": memcpy_gb_s}
            row |= {"gb_s_max": one["nbytes"] / min(one[f"{case}_s"]) / 1e9, "ratio_memcpy": gb_s / memcpy_gb_s}
            row |= {"round_trip_equal": one["round_trip_equal"]}
            rows.append(row | {"threads": one["threads"], "runs": len(one["store_s"])})
    return rows


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with ratio_kvkern: above 1, kvkern is better. It is None where kvkern has no such row.

    rates: kvkern's gb_s over theirs.    times: their ttft_s over kvkern's.
    ttft_hit also gets ratio_kvkern_paired: their ratio_native_hit over kvkern's. Load that slowed one whole engine cancels out.
    """
    ours = {_key(row): row for row in rows if row["system"] == "kvkern"}
    return [row | _ratios(ours.get(_key(row)), row) for row in rows]


def _key(row: Row) -> tuple[object, ...]:
    return row["case"], row.get("prompt_tokens"), row.get("tokens"), row.get("pages")


def _ratios(ours: Row | None, row: Row) -> Row:
    if "gb_s" in row:
        return {"ratio_kvkern": _quotient(ours, row, "gb_s")}
    ratios: Row = {"ratio_kvkern": _quotient(row, ours, "ttft_s")}
    if row["case"] == "ttft_hit":
        ratios["ratio_kvkern_paired"] = _quotient(row, ours, "ratio_native_hit")
    return ratios


def _quotient(over: Row | None, under: Row | None, name: str) -> float | None:
    if over is None or under is None:
        return None
    return _number(over[name]) / _number(under[name])


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)
