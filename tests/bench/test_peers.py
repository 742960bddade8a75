"""The verdicts of bench/peers.py: what counts as a load, and the direction of ratios. Installs, starts and measures nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
BASE: dict[str, object] = {"system": "theirs", "version": "1", "level": "engine"}


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("tokenizers")
    monkeypatch.syspath_prepend(str(BENCH))
    import peers  # as `python bench/peers.py` finds it

    return peers


@pytest.fixture
def rows(peers: ModuleType) -> ModuleType:
    from _peers import rows

    return rows


def answer(case: str, ttft_s: float, cached: int, loaded: int, tokens: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    return {
        "case": case, "prompt_tokens": 2000, "cached_tokens": cached, "loaded_tokens": loaded, "ttft_s": ttft_s,
        "tokens": list(tokens), "logprobs": [[[1, -0.5]]],
    }  # fmt: skip


def engine_answers(**changes: Any) -> list[dict[str, Any]]:
    """Return two pairs of one engine. `changes` apply to every measured hit."""
    hit = answer("ttft_hit", 0.3, 1920, 1920) | changes
    return [
        answer("ttft_recompute", 2.0, 0, 0, (3, 4)), answer("reference", 0.2, 1920, 0),
        answer("first_ttft_hit", 0.9, 1920, 1920), answer("first_ttft_native_hit", 0.2, 1920, 0),
        hit, answer("ttft_native_hit", 0.2, 1920, 0), hit, answer("ttft_native_hit", 0.2, 1920, 0),
    ]  # fmt: skip


def test_loads_make_a_row(rows: ModuleType) -> None:
    verdict = rows.engine_verdict(BASE, engine_answers(), loads_logged=[256, 1920, 1920, 1920])
    assert verdict.problems == []
    by_case = {row["case"]: row for row in verdict.rows}
    assert set(by_case) == {"ttft_recompute", "ttft_native_hit", "ttft_hit"}
    hit = by_case["ttft_hit"]
    assert (hit["ttft_s"], hit["loaded_tokens"], hit["runs"], hit["system"]) == (0.3, 1920, 2, "theirs")
    assert hit["ratio_native_hit"] == pytest.approx(1.5)
    assert hit["tokens_equal"] is hit["logprobs_equal"] is True


@pytest.mark.parametrize(("changes", "logged", "said"), [
    ({"cached_tokens": 0}, None, "1920 tokens were promised and 0 reused"),  # a failed load that was computed instead
    ({"loaded_tokens": 0}, None, "0 tokens were promised"),  # vLLM had not forgotten
    ({"ttft_s": 1.5}, None, "too near"),
    ({}, [1920], "its log has 1 loads of 1920 tokens, 3 were asked for"),
])  # fmt: skip
def test_a_hit_that_was_not_a_load_gets_no_row(
    rows: ModuleType, changes: dict[str, Any], logged: list[int] | None, said: str
) -> None:
    verdict = rows.engine_verdict(BASE, engine_answers(**changes), logged)
    assert [row["case"] for row in verdict.rows] == ["ttft_recompute", "ttft_native_hit"]
    assert len(verdict.problems) == 1
    assert said in verdict.problems[0]


def test_other_tokens_are_reported_with_the_row(rows: ModuleType) -> None:
    verdict = rows.engine_verdict(BASE, engine_answers(tokens=[1, 9]), None)
    assert verdict.rows[-1]["tokens_equal"] is False
    assert "other tokens" in verdict.problems[0]


def test_a_prompt_that_was_not_new_is_no_recompute(rows: ModuleType) -> None:
    answers = engine_answers()
    answers[0]["cached_tokens"] = 128
    verdict = rows.engine_verdict(BASE, answers, None)
    assert verdict.rows == []
    assert "nobody has seen" in verdict.problems[0]


def test_above_one_kvkern_is_better(rows: ModuleType) -> None:
    given = [
        {"system": "kvkern", "case": "store", "tokens": 256, "gb_s": 8.0},
        {"system": "slow", "case": "store", "tokens": 256, "gb_s": 4.0},
        {"system": "slow", "case": "store", "tokens": 512, "gb_s": 4.0},
        {"system": "kvkern", "case": "ttft_hit", "prompt_tokens": 2000, "ttft_s": 0.1, "ratio_native_hit": 1.0},
        {"system": "slow", "case": "ttft_hit", "prompt_tokens": 2000, "ttft_s": 0.3, "ratio_native_hit": 1.5},
    ]
    got = rows.with_ratios(given)
    assert [row["ratio_kvkern"] for row in got] == [1.0, 2.0, None, 1.0, pytest.approx(3.0)]
    assert got[-1]["ratio_kvkern_paired"] == pytest.approx(1.5)


def test_rates_are_compared_on_the_same_pages_only(rows: ModuleType) -> None:
    base = {"case": "store", "tokens": 256}
    ours = [
        base | {"system": "kvkern", "pages": pages, "gb_s": gb_s} for pages, gb_s in (("layers", 8.0), ("blocks", 9.0))
    ]
    got = rows.with_ratios([*ours, base | {"system": "theirs", "pages": "blocks", "gb_s": 3.0}])
    assert [row["ratio_kvkern"] for row in got] == [1.0, 1.0, 3.0]


def test_library_rows(rows: ModuleType) -> None:
    measured = {
        "tokens": 256, "nbytes": 2_000_000_000, "memcpy_nbytes": 1_000_000_000, "threads": 2, "round_trip_equal": True,
        "store_s": [1.0, 0.5, 0.4], "retrieve_s": [0.25] * 3, "memcpy_s": [0.1] * 3,
    }  # fmt: skip
    store, retrieve = rows.library_rows({"system": "kvkern", "version": "1"}, [measured])
    assert (store["case"], store["gb_s"], store["memcpy_gb_s"], store["runs"]) == ("store", 4.0, 10.0, 3)
    assert (retrieve["case"], retrieve["gb_s"], retrieve["ratio_memcpy"]) == ("retrieve", 8.0, 0.8)


def test_arguments(peers: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.parse([]).systems == ("kvkern", "vllm_example", "lmcache_mp", "lmcache_inproc", "aibrix")
    args = peers.parse(["--systems", "aibrix, kvkern", "--level", "library", "--workdir", str(tmp_path), "--quick"])
    assert (args.systems, args.level, args.workdir, args.quick) == (("kvkern", "aibrix"), "library", tmp_path, True)
    with pytest.raises(SystemExit):
        peers.parse(["--systems", "kvkern,mooncake"])
    assert "no system is called 'mooncake'" in capsys.readouterr().err
    with pytest.raises(argparse.ArgumentTypeError):
        peers.parse_systems("")


def test_the_server_log_is_read(peers: ModuleType) -> None:
    from _peers.engines import retrieved_tokens

    log = "\x1b[32mLMCache INFO:\x1b[0m Stored 256 tokens in 0.004 seconds\nINFO: Retrieved 1920 tokens in 0.010 seconds\n"
    assert retrieved_tokens(log) == [1920]


def test_a_child_that_fails_is_named(peers: ModuleType, tmp_path: Path) -> None:
    from _peers.children import Child, PeerFailed

    def run(code: str, silence_s: float = 30.0) -> list[dict[str, Any]]:
        with Child("the child", [sys.executable, "-c", code], {}, tmp_path / "log") as child:
            child.send({"a": 1})
            return list(child.rows(silence_s))

    done = """print('{"case": "done"}', flush=True)"""
    assert run(
        f"""import json, sys; row = json.loads(input()); print(json.dumps(row | {{"case": "x"}})); {done}"""
    ) == [{"a": 1, "case": "x"}]
    with pytest.raises(PeerFailed, match=r"the child ended before it was done\.(.|\n)*out of paper"):
        run("raise SystemExit('out of paper')")
    with pytest.raises(PeerFailed, match="printed nothing for 0 s"):
        run("input(); input()", silence_s=0.2)
    with pytest.raises(PeerFailed, match="not a JSON line"):
        run("print('hello', flush=True); input(); input()")
