"""The demo without an engine: model, prompts, phases, verdicts, report and chart. A fake vLLM answers the phases."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import msgspec
import pytest
from rich.console import Console

for _module in ("matplotlib", "safetensors", "tokenizers", "torch"):
    pytest.importorskip(_module, reason="the demo's packages are not installed: pip install kvkern[demo]")

from kvkern.demo import corpus, engine_process, messages, model, preconditions, prompts, report, run, verdict  # noqa: E402
from kvkern.demo.messages import Answer, Done, EngineSpec, Job, Progress, Ready  # noqa: E402
from kvkern.demo.prompts import PromptLibrary  # noqa: E402
from tests.demo.fake_engine import PLAN, FakeEngine, Prefix, all_answers, play, policy_engine  # noqa: E402

TINY = model.ModelConfig(
    hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=512,
    max_tokens=16384,
)  # fmt: skip


def model_folder(folder: Path, **fields: object) -> None:
    """Fill the folder with what the demo looks for before it starts an engine."""
    (folder / "config.json").write_text(json.dumps(TINY.hf_config() | fields))
    for name in ("tokenizer.json", "model.safetensors"):
        (folder / name).touch()


def quiet() -> run.PhaseClock:
    return run.PhaseClock(Console(file=io.StringIO(), width=110))


def printed(clock: run.PhaseClock) -> str:
    assert isinstance(clock.console.file, io.StringIO)
    return clock.console.file.getvalue()


# --- model and prompts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a model of two layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "TRAIN_CHARS", 100_000)
        patch.setattr(prompts, "TEXT_CHARS", 100_000)
        yield model.ensure(TINY, tmp_path_factory.mktemp("models"))


def test_model_has_the_weights_its_config_promises(tiny: Path) -> None:
    from safetensors import safe_open

    config = json.loads((tiny / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    with safe_open(tiny / "model.safetensors", framework="pt") as weights:
        shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    assert len(shapes) == 2 * 9 + 3
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (512, 32)
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (32, 32)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (16, 32)
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (32, 48)


def test_model_is_built_once_and_nothing_half_built_stays(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_write", lambda config, folder: pytest.fail("built again"))
    assert model.ensure(TINY, tiny.parent) == tiny
    assert [path.name for path in tiny.parent.iterdir()] == [TINY.name()]


def test_model_that_cannot_be_written_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(config: model.ModelConfig, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        model.ensure(TINY, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_models_of_other_shapes_or_seeds_never_share_a_folder() -> None:
    configs = [model.ModelConfig(), TINY, model.ModelConfig(seed=21), model.ModelConfig(init_std=0.04)]
    assert len({config.name() for config in configs}) == len(configs)


def test_prompts_have_exactly_the_asked_tokens_and_a_first_block_of_their_own(tiny: Path) -> None:
    library = PromptLibrary.from_model(tiny)
    documents = [*library.documents(20, 300), *library.documents(7, 129)]
    assert [len(document) for document in documents] == [300] * 20 + [129] * 7
    assert all(0 <= token < TINY.vocab_size for document in documents for token in document)
    assert len({tuple(document[:128]) for document in documents}) == len(documents)
    assert PromptLibrary.from_model(tiny).documents(20, 300) == documents[:20]  # as another process cuts them


def test_library_says_when_the_text_is_used_up() -> None:
    library = PromptLibrary(list(range(10)))
    assert library.document(10) == list(range(10))
    with pytest.raises(prompts.OutOfText, match="1 tokens asked, 0 left"):
        library.document(1)


def test_corpus_is_the_same_text_each_time_and_never_longer() -> None:
    assert corpus.text(5000) == corpus.text(70_000)[:5000]
    assert len(corpus.text(70_000)) == 70_000


# --- phases


def test_vllm_alone_computes_again_what_its_pool_has_lost() -> None:
    answers = [event for event in play("vllm", FakeEngine(kvkern=False)) if isinstance(event, Answer)]
    by_case = _by_case(answers)
    assert {case: len(group) for case, group in by_case.items()} == {
        "recompute": 5 + 2, "overcommit_native": 5, "turn_vllm": 3,
    }  # fmt: skip
    assert {answer.cached_tokens for answer in by_case["recompute"] + by_case["overcommit_native"]} == {0}
    assert [answer.prompt_id for answer in by_case["overcommit_native"]] == [f"overcommit-{i}" for i in range(5)]


def test_kvkern_loads_the_whole_reusable_prefix_and_every_load_has_its_native_hit() -> None:
    answers = [event for event in play("kvkern", FakeEngine(kvkern=True)) if isinstance(event, Answer)]
    by_case = _by_case(answers)
    assert len(by_case["kvkern_hit"]) == len(by_case["native_hit"]) == 2 * PLAN.pairs
    assert len(by_case["overcommit_kvkern"]) == PLAN.overcommit_prompts
    for ours, native in zip(by_case["kvkern_hit"], by_case["native_hit"], strict=True):
        assert ours.loaded_tokens == ours.cached_tokens == native.cached_tokens == (ours.prompt_tokens - 1) // 16 * 16
        assert native.loaded_tokens == 0
    assert all(answer.loaded_tokens == 96 for answer in by_case["overcommit_kvkern"])


def test_engines_of_a_node_load_what_the_first_has_computed() -> None:
    by_case = _by_case(all_answers())
    for case in ("second_engine", "daemon_restart", "engine_restart"):
        assert len(by_case[case]) == 2 * PLAN.node_pairs
        assert all(answer.loaded_tokens == (answer.prompt_tokens - 1) // 16 * 16 for answer in by_case[case])
    assert [answer.cached_tokens for answer in by_case["daemon_gone"]] == [0]


def test_both_engines_hold_the_same_conversation() -> None:
    by_case = _by_case(all_answers())
    alone, ours = by_case["turn_vllm"], by_case["turn_kvkern"]
    assert [(turn.prompt_id, turn.prompt_tokens, turn.tokens) for turn in alone] == [
        (turn.prompt_id, turn.prompt_tokens, turn.tokens) for turn in ours
    ]
    assert [turn.prompt_tokens for turn in ours] == [40, 100, 160]  # what the user adds, and each reply


def test_phases_report_progress() -> None:
    lines = [event.text for event in play("float32", FakeEngine(kvkern=True)) if isinstance(event, Progress)]
    assert len(lines) == PLAN.float32_prompts


def _by_case(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.case, []).append(answer)
    return groups


# --- verdicts


def test_a_right_engine_passes_every_check() -> None:
    answers = all_answers()
    findings = [verdict.check_loaded(answers), verdict.check_policies(answers), *verdict.check_answers(answers)]
    assert [finding.line() for finding in findings if not finding.ok] == []
    assert all(f": {finding.num_compared} of {finding.num_compared}" in finding.line() for finding in findings)


def test_wrong_tokens_after_a_load_are_found_everywhere() -> None:
    findings = verdict.check_answers(all_answers(wrong_when_loaded=True))
    failed = {finding.name for finding in findings if not finding.ok}
    assert failed == {finding.name for finding in findings} - {
        "float32, native hit = recompute", "an engine whose daemon is gone computes and answers",
    }  # fmt: skip
    assert "gave other tokens than" in findings[0].line()


def test_nothing_loaded_is_a_failure_though_the_tokens_are_right() -> None:
    finding = verdict.check_loaded(all_answers(kvkern=False))
    assert not finding.ok
    assert "no kvkern_hit loaded a token" in finding.problems


def test_no_answers_at_all_are_a_failure() -> None:
    for finding in [verdict.check_loaded([]), verdict.check_policies([]), *verdict.check_answers([])]:
        assert not finding.ok, finding.name


Change = Callable[[Answer], Answer]


def _other_logprob(answer: Answer, by: float) -> Answer:
    (token, logprob), *rest = answer.logprobs[0]
    return msgspec.structs.replace(answer, logprobs=(((token, logprob + by), *rest), *answer.logprobs[1:]))


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        ("kvkern_hit", lambda answer: _other_logprob(answer, 1e-6), "log-probabilities up to 1e-06 off"),
        (
            "kvkern_hit",
            lambda answer: msgspec.structs.replace(answer, cached_tokens=16),
            "reused 16 tokens, vLLM itself 96",
        ),
        ("kvkern_hit", lambda answer: msgspec.structs.replace(answer, prompt_id="nobody"), "has no native answer"),
        (
            "kvkern_hit_float32",
            lambda answer: _other_logprob(answer, 1e-3),
            "log-probabilities up to 0.001 off recompute",
        ),
        ("turn_kvkern", lambda answer: msgspec.structs.replace(answer, tokens=(1,)), "other tokens than turn_vllm"),
    ],
)
def test_one_changed_answer_fails_exactly_one_check(case: str, change: Change, says: str) -> None:
    answers = all_answers()
    index = next(index for index, answer in enumerate(answers) if answer.case == case)
    answers[index] = change(answers[index])
    failed = [finding for finding in verdict.check_answers(answers) if not finding.ok]
    assert [len(finding.problems) for finding in failed] == [1]
    assert says in failed[0].line()


def test_float32_tolerates_another_order_of_summation() -> None:
    answers = [
        _other_logprob(answer, 1e-5) if answer.case == "kvkern_hit_float32" else answer for answer in all_answers()
    ]
    assert all(finding.ok for finding in verdict.check_answers(answers))


# --- report and chart


def test_rows_are_medians_in_the_tables_order() -> None:
    answers = all_answers()
    rows = report.rows(answers)
    assert [(row.case, row.prompt_tokens, row.runs) for row in rows] == [
        ("recompute", 100, 5), ("native_hit", 100, 3), ("kvkern_hit", 100, 3),
        ("second_engine", 100, 2), ("engine_restart", 100, 2), ("daemon_restart", 100, 2),
        ("recompute", 256, 2), ("native_hit", 256, 3), ("kvkern_hit", 256, 3),
        ("second_engine", 256, 2), ("engine_restart", 256, 2), ("daemon_restart", 256, 2),
        ("overcommit_native", 100, 5), ("overcommit_kvkern", 100, 5),
        ("overcommit_lru", 122, 22), ("overcommit_grit", 122, 22),
    ]  # fmt: skip
    hits = [answer for answer in answers if answer.case == "kvkern_hit" and answer.prompt_tokens == 256]
    assert rows[8].ttft_s == median(answer.ttft_s for answer in hits)
    assert (rows[8].cached_tokens, rows[8].loaded_tokens) == (240, 240)
    assert (rows[7].cached_tokens, rows[7].loaded_tokens) == (240, 0)


def test_table_compares_with_computing_and_with_the_native_hit() -> None:
    console = Console(file=io.StringIO(), width=110)
    console.print(report.table(report.rows(all_answers())))
    assert isinstance(console.file, io.StringIO)
    lines = {line.split("  ")[0].strip(): line.split() for line in console.file.getvalue().splitlines()}
    assert lines["overcommit, kvkern"][-2:] == ["7.4x", "5"]  # 100 / (4 + 9.6)
    assert [cell for cell in lines["kvkern hit"] if cell.endswith("x")] == ["6.4x", "2.50x"]  # 256 / 40, 40 / 16


def test_conclusion_writes_json_as_designed_and_a_chart(tmp_path: Path) -> None:
    options = run.Options(json_path=tmp_path / "deep" / "demo.json", workdir=tmp_path)
    clock, setup = quiet(), run.Setup(tmp_path, PLAN)
    assert run._conclude(options, all_answers(), clock, setup) == run.EXIT_OK
    written = json.loads((tmp_path / "deep" / "demo.json").read_text())
    assert {"cpu", "threads", "gpu", "commit", "versions"} <= set(written["meta"])
    assert written["engine"].startswith("vllm ")
    assert written["tokens_equal"] is True
    assert [row["case"] for row in written["rows"]] == [row.case for row in report.rows(all_answers())]
    for row in written["rows"]:
        assert {"case", "prompt_tokens", "loaded_tokens", "ttft_s", "runs"} <= set(row)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "the demo passed" in printed(clock)


@pytest.mark.parametrize("flags", [{"wrong_when_loaded": True}, {"kvkern": False}])
def test_a_demo_that_does_not_hold_says_so_and_exits_with_1(tmp_path: Path, flags: dict[str, bool]) -> None:
    options = run.Options(json_path=tmp_path / "demo.json", chart_path=tmp_path / "here.png", workdir=tmp_path)
    clock, setup = quiet(), run.Setup(tmp_path, PLAN)
    assert run._conclude(options, all_answers(**flags), clock, setup) == run.EXIT_WRONG
    assert "FAIL" in printed(clock)
    written = json.loads((tmp_path / "demo.json").read_text())
    assert not all(check["ok"] for check in written["checks"])
    assert written["tokens_equal"] is all(check["ok"] for check in written["checks"][2:])
    assert (tmp_path / "here.png").exists()


# --- the whole, and its engine processes


class FakeDaemon:
    """Replaces the daemon that run.py starts."""

    capacities: list[str] = []  # noqa: RUF012

    def __init__(self, capacity: str, log: Path) -> None:
        self.capacities.append(capacity)
        self.socket = log.with_name("node.sock")

    def __enter__(self) -> FakeDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_demo_runs_its_engines_with_the_asked_capacity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[EngineSpec] = []
    kept: set[Prefix] = set()
    monkeypatch.setattr(FakeDaemon, "capacities", [])
    monkeypatch.setattr(run.supervised_daemon, "Daemon", FakeDaemon)
    model_folder(tmp_path)

    def fake(job: Job, logs: engine_process.Logs) -> Iterator[messages.Event]:
        started.append(job.engine)
        shared = job.engine.kvkern_socket is not None
        engine = FakeEngine(kvkern=job.engine.kvkern_capacity is not None or shared, kept=kept if shared else set())
        if job.engine.kvkern_policy is not None:
            engine = policy_engine(job.engine.kvkern_policy, job.plan.mix)
        yield from play(job.phase, engine, job.plan)
        if job.until is not None:
            yield Ready()
            assert Path(job.until).exists(), "the first engine was told to end before the second was done"
        yield Done(start_s=0.0)

    monkeypatch.setattr(engine_process, "run", fake)
    assert run.demo(run.Options(model=tmp_path, workdir=tmp_path, capacity="1GiB"), PLAN) == run.EXIT_OK
    assert PLAN.mix is not None
    small = run.arena_capacity(tmp_path, PLAN.mix, "bfloat16")
    assert [(spec.dtype, spec.kvkern_capacity, spec.kvkern_policy, spec.kvkern_socket is None) for spec in started] == [
        ("float32", "1GiB", None, True), ("bfloat16", None, None, True), ("bfloat16", "1GiB", None, True),
        ("bfloat16", small, "lru", True), ("bfloat16", small, "grit", True), *3 * [("bfloat16", None, None, False)],
    ]  # fmt: skip
    assert FakeDaemon.capacities == ["1GiB"]
    assert {engine.model for engine in started} == {str(tmp_path)}
    kv_nbytes_per_token = 2 * 2 * 2 * 8 * 2  # keys and values, layers, heads, dim, bf16
    assert {engine.kv_pool_nbytes for engine in started[1:]} == {PLAN.pool_tokens * kv_nbytes_per_token}
    assert started[0].kv_pool_nbytes == run.FLOAT32_TOKENS * 2 * kv_nbytes_per_token


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (engine_process.EngineFailed("the vllm engine ended"), run.EXIT_ENGINE),
        (KeyboardInterrupt(), run.EXIT_INTERRUPTED),
    ],
)
def test_an_engine_that_dies_and_an_interrupt_have_codes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, code: int
) -> None:
    def fake(job: Job, logs: engine_process.Logs) -> Iterator[messages.Event]:
        yield Progress("up")
        raise failure

    monkeypatch.setattr(engine_process, "run", fake)
    model_folder(tmp_path)
    assert run.demo(run.Options(model=tmp_path, workdir=tmp_path), PLAN) == code


def test_a_missing_precondition_is_reported_before_an_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_process, "run", lambda job, logs: pytest.fail("started an engine"))
    options = run.Options(model=tmp_path, workdir=tmp_path)
    assert run.demo(options, PLAN) == run.EXIT_NOT_READY
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    assert run.demo(options, PLAN) == run.EXIT_NOT_READY
    (tmp_path / "config.json").write_text(json.dumps(TINY.hf_config()))
    assert run.demo(options, PLAN) == run.EXIT_NOT_READY
    (tmp_path / "tokenizer.json").touch()
    assert run.demo(options, PLAN) == run.EXIT_NOT_READY
    model_folder(tmp_path, max_position_embeddings=320)
    assert run.demo(options, PLAN) == run.EXIT_NOT_READY
    monkeypatch.setattr(preconditions, "PACKAGES", ("sys", "no_such_package"))
    assert run.demo(options, PLAN) == run.EXIT_NOT_READY
    printed = capsys.readouterr().out
    for words in (
        "has no config.json",
        "does not describe an attention model: KeyError('num_attention_heads')",
        "has no tokenizer.json",
        "has no weights: the demo looks for *.safetensors and *.bin",
        "context has 320 tokens; the demo asks for prompts of at least 1,004",
        "These packages of the demo are not installed: no_such_package. Run",
    ):
        assert words in printed


def test_engines_are_sized_by_the_model(tmp_path: Path) -> None:
    def spec(config: dict[str, object]) -> EngineSpec:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return run.engine_spec(tmp_path)

    small = spec(model.ModelConfig().hf_config())
    assert (small.kv_pool_nbytes, small.max_model_tokens) == (127 * 128 * 12 << 10, run.MAX_MODEL_TOKENS)
    large = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    nested = spec({"text_config": large | {"max_position_embeddings": 8192}})
    assert (nested.kv_pool_nbytes, nested.max_model_tokens) == (127 * 128 * 128 << 10, 8192)
    gpt2 = spec({"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024})
    assert (gpt2.kv_pool_nbytes, gpt2.max_model_tokens) == (127 * 128 * 36 << 10, 1024)


def test_messages_survive_the_pipe_bit_for_bit() -> None:
    job = Job("vllm", EngineSpec(model="none", kv_pool_nbytes=1), PLAN, until="/tmp/enough")
    answer = _other_logprob(FakeEngine(kvkern=True).ask("fill", "short-0", list(range(100)), 3), 1 / 3)
    assert messages.decode_event(messages.encode(answer)) == answer
    assert messages.decode_job(messages.encode(job)) == job
    assert messages.encode(answer).count(b"\n") == 1


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: only root can make a folder of another user")
def test_a_workdir_that_another_user_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All users share the folder of temporary files. What the demo builds and logs does not go to whoever took the name."""
    workdir = tmp_path / "kvkern-demo-0"
    workdir.mkdir()
    os.chown(workdir, 7002, 7002)
    monkeypatch.setattr(run, "default_workdir", lambda: workdir)
    model_folder(tmp_path)
    assert run.demo(run.Options(model=tmp_path, workdir=workdir), PLAN) == run.EXIT_NOT_READY
    assert (
        "belongs to uid 7002, who has taken the name of this user's workdir; give --workdir" in capsys.readouterr().out
    )
    assert list(workdir.iterdir()) == []
