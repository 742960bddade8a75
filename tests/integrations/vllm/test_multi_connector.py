"""kvkern inside vLLM's MultiConnector: whichever connector serves a prompt, its tokens are right, and so is what is stored."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkern.integrations.vllm.manager import PIN_STEPS
from tests.integrations.vllm.engine import prompt
from tests.integrations.vllm.multi_engine import MultiEngine, same
from tests.integrations.vllm.other_connectors import FAIL, HOLD

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", params=[False, True], ids=["kvkern second", "kvkern first"])
def running(
    request: pytest.FixtureRequest, llama: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MultiEngine]:
    with MultiEngine(llama, tmp_path_factory.mktemp("prompts"), request.param) as engine:
        yield engine


@pytest.fixture
def multi(running: MultiEngine) -> Iterator[MultiEngine]:
    running.reset_everything()
    running.forget_other()
    yield running
    running.settle()
    assert running.accounted()  # no pin and no reservation is left


def test_each_connector_serves_what_the_other_lacks(multi: MultiEngine) -> None:
    text = prompt(300, 1)
    computed, native = multi.one(text), multi.one(text)
    multi.forget_other()
    hit = multi.without_native(text)
    multi.reset_everything()
    multi.forget_other()
    first = multi.one(text)
    multi.reset_everything()
    other = multi.one(text)
    assert [r.cached_tokens for r in (computed, native, hit, first, other)] == [0, 288, 288, 0, 288]
    assert same(hit, native)
    assert same(other, native)
    assert same(native, computed)


def test_what_the_other_connector_loads_is_stored_under_its_own_tokens(multi: MultiEngine) -> None:
    text = prompt(310, 2)
    computed = multi.one(text)
    multi.reset_everything()
    assert multi.one(text).cached_tokens == 288  # from the other one
    multi.settle()
    multi.forget_other()
    hit = multi.without_native(text)
    assert hit.cached_tokens == 288
    assert same(hit, computed)
    longer = text + prompt(100, 3)
    extended = multi.without_native(longer)
    assert extended.cached_tokens == 288
    multi.reset_everything()
    multi.forget_other()
    assert same(multi.one(longer), extended)


def test_both_have_a_prompt_at_different_lengths(multi: MultiEngine) -> None:
    head = prompt(160, 4)
    text = head + prompt(200, 5)
    computed = multi.one(text)
    multi.reset_everything()
    folders = set(multi.folder.iterdir())
    multi.one(head + prompt(40, 6))  # kvkern has the head only, the other one both prompts
    for folder in set(multi.folder.iterdir()) - folders:
        shutil.rmtree(folder)
    multi.settle()
    reply = multi.without_native(text)
    assert reply.cached_tokens in (160, 352)  # the first connector with anything is taken
    assert same(reply, computed)
    multi.forget_other()
    assert same(multi.without_native(text), computed)


def test_what_waits_for_slots_is_stored_when_the_request_has_ended(
    multi: MultiEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other connector knows no KV groups, and vLLM then reports the end of a request by another method."""
    text = prompt(300, 7)
    with monkeypatch.context() as patch:
        patch.setattr(multi.cache, "room", lambda _wanted: 0)
        computed = multi.one(text)
        multi.llm.llm_engine.step()  # in which vLLM offers the chunks of the ended request
    multi.forget_other()
    hit = multi.without_native(text)
    assert hit.cached_tokens == 288
    assert same(hit, computed)


def test_a_failed_load_of_the_other_connector_is_not_stored(multi: MultiEngine) -> None:
    """kvkern has planned the store of these blocks when vLLM learns that they hold nothing usable."""
    text = prompt(300, 8)
    computed = multi.one(text)
    multi.reset_everything()
    (multi.folder / FAIL).touch()
    recomputed = multi.one(text)
    assert same(recomputed, computed)
    multi.settle()
    multi.forget_other()
    again = multi.without_native(text)
    assert again.cached_tokens == 0  # vLLM's own blocks may be wrong, so nothing more is stored
    assert same(again, computed)
    multi.reset_everything()
    multi.forget_other()
    multi.one(text)
    multi.forget_other()
    hit = multi.without_native(text)
    assert hit.cached_tokens == 288
    assert same(hit, computed)


def test_blocks_that_vllm_hands_on_before_they_are_computed_again_are_not_stored(
    multi: MultiEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM keeps the blocks of the failed load in its own cache. A second request takes them while the first one computes."""
    text, llm = prompt(700, 12), multi.llm.llm_engine
    computed = multi.one(text)
    multi.reset_everything()
    (multi.folder / FAIL).touch()
    with monkeypatch.context() as patch:
        patch.setattr(multi.scheduler.scheduler_config, "long_prefill_token_threshold", 256)
        llm.add_request("first", {"prompt_token_ids": text}, multi.params())
        multi.steps(lambda: bool(multi.scheduler.running))
        multi.forget_other()
        llm.add_request(
            "busy", {"prompt_token_ids": prompt(320, 13)}, multi.params()
        )  # alone, the first one takes one step
        llm.step()
        llm.add_request("second", {"prompt_token_ids": text}, multi.params())
        llm.step()
        assert sorted(request.num_computed_tokens for request in multi.scheduler.running) == [320, 512, 700]
        multi.steps(lambda: not multi.scheduler.requests)
    multi.settle()
    multi.forget_other()
    assert same(multi.without_native(text), computed)


def test_flipped_bytes_are_misses_and_no_request_fails(multi: MultiEngine) -> None:
    text = prompt(300, 9)
    computed = multi.one(text)
    multi.forget_other()
    assert multi.flip_bytes() >= 9
    again = multi.without_native(text)
    assert again.cached_tokens == 0
    assert same(again, computed)
    multi.settle()
    multi.forget_other()
    assert same(multi.without_native(text), computed)


def test_the_outer_policy_fail_is_refused(llama: str, tmp_path: Path) -> None:
    """The workers refuse it at start, because a failed checksum would fail a request."""
    words = "kv_load_failure_policy of MultiConnector is 'fail', and vLLM reads only this one"
    with pytest.raises(RuntimeError, match=words):
        MultiEngine(llama, tmp_path, kvkern_first=False, policy="fail")


@pytest.fixture(scope="module")
def loading(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MultiEngine]:
    """An engine whose other connector loads between steps, and only when it is let."""
    with MultiEngine(llama, tmp_path_factory.mktemp("prompts"), False, "AsyncConnector") as engine:
        yield engine


def test_a_load_of_the_other_connector_between_steps(loading: MultiEngine) -> None:
    text = prompt(310, 10)
    computed = loading.one(text)
    loading.reset_everything()
    hits = loading.cache.counters.hit_chunks
    loaded = loading.one(text)
    loading.settle()
    assert loading.cache.counters.hit_chunks == hits
    loading.forget_other()
    hit = loading.without_native(text)
    assert [loaded.cached_tokens, hit.cached_tokens] == [288, 288]
    assert same(loaded, computed)
    assert same(hit, computed)
    loading.settle()
    assert loading.accounted()


@pytest.mark.parametrize("kvkern_has_it", [True, False])
def test_an_abort_while_the_other_connector_loads(loading: MultiEngine, kvkern_has_it: bool) -> None:
    """vLLM counts the prompt as computed as soon as the load begins. kvkern stores none of it, and gives its pins up."""
    text = prompt(310, 11 + kvkern_has_it)
    computed = loading.one(text)
    if kvkern_has_it:
        loading.reset_native()
    else:
        loading.reset_everything()
    (loading.folder / HOLD).touch()
    llm = loading.llm.llm_engine
    llm.add_request("aborted", {"prompt_token_ids": text}, loading.params())
    loading.steps(lambda: bool(loading.scheduler.requests))
    for _ in range(PIN_STEPS + 4):
        llm.step()
    (request,) = loading.scheduler.requests.values()
    assert request.status.name == "WAITING_FOR_REMOTE_KVS"
    assert request.num_computed_tokens == 288
    assert loading.accounted()
    llm.abort_request([request.request_id], internal=True)
    llm.step()
    (loading.folder / HOLD).unlink()
    loading.steps(lambda: not loading.scheduler.requests)
    loading.settle()
    assert loading.accounted()
    loading.forget_other()
    again = loading.without_native(text)
    assert again.cached_tokens == (288 if kvkern_has_it else 0)
    assert same(again, computed)
