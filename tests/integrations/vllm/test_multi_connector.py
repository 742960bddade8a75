"""kvkern inside vLLM's MultiConnector: whichever connector serves a prompt, its tokens are right, and so is what is stored."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.config import KVTransferConfig

from tests.integrations.vllm.engine import Engine, Reply, prompt
from tests.integrations.vllm.failing_connector import FAIL
from tests.integrations.vllm.server import transfer_config

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


class MultiEngine(Engine):
    """An engine with kvkern and a connector that loads a prompt within a step, and keeps prompts in `folder`."""

    def __init__(self, model: str, folder: Path, kvkern_first: bool, policy: str = "recompute", **options: Any) -> None:
        self.folder = folder
        other = {
            "kv_connector": "FailingConnector", "kv_role": "kv_both",
            "kv_connector_module_path": "tests.integrations.vllm.failing_connector",
            "kv_connector_extra_config": {"shared_storage_path": str(folder)},
        }  # fmt: skip
        children = (
            [transfer_config(capacity="64MiB"), other] if kvkern_first else [other, transfer_config(capacity="64MiB")]
        )
        outer = KVTransferConfig(
            kv_connector="MultiConnector", kv_role="kv_both", kv_load_failure_policy=policy,
            kv_connector_extra_config={"connectors": children},
        )  # fmt: skip
        # the other connector keeps a prompt cut off if it is computed in several steps
        super().__init__(model, capacity=None, kv_transfer_config=outer, max_num_batched_tokens=1024, **options)

    @property
    def manager(self) -> Any:
        (kvkern,) = (child for child in self.scheduler.connector.sub_connectors if hasattr(child, "_manager"))
        return kvkern._manager

    @property
    def cache(self) -> Any:
        return self.manager._cache

    def forget_other(self) -> None:
        """Delete all that the other connector holds, and let its loads succeed."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def without_native(self, text: list[int], tokens: int = 4) -> Reply:
        """Return the reply to a prompt of which vLLM's own cache has nothing."""
        self.reset_native()
        return self.one(text, tokens)


@pytest.fixture(scope="module", params=[False, True], ids=["kvkern second", "kvkern first, async"])
def running(
    request: pytest.FixtureRequest, llama: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MultiEngine]:
    """Both orders. With async scheduling vLLM plans a step before it has the results of the one before."""
    folder = tmp_path_factory.mktemp("prompts")
    with MultiEngine(llama, folder, request.param, async_scheduling=request.param) as engine:
        assert engine.scheduler.scheduler_config.async_scheduling == request.param
        yield engine


@pytest.fixture
def multi(running: MultiEngine) -> Iterator[MultiEngine]:
    running.reset_everything()
    running.forget_other()
    yield running
    running.settle()
    assert running.accounted()  # no pin and no reservation is left


def same(reply: Reply, other: Reply) -> bool:
    return (reply.tokens, reply.logprobs) == (other.tokens, other.logprobs)


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


def test_the_last_chunk_of_a_reply_is_stored(multi: MultiEngine) -> None:
    """The other connector knows no KV groups: vLLM then reports the end of a request by another method."""
    text = prompt(300, 7)
    reply = multi.one(text, 21)  # the last step computes the token at 320
    multi.settle()
    multi.forget_other()
    again = multi.without_native([*text, *reply.tokens, 5, 6, 7])
    assert again.cached_tokens == 320
    multi.reset_everything()
    multi.forget_other()
    assert again.tokens == multi.one([*text, *reply.tokens, 5, 6, 7]).tokens


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
    hit = multi.without_native(text)
    assert same(hit, computed)
    assert hit.cached_tokens == 288  # what was computed in the end is stored


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


def test_the_outer_policy_fail_is_refused(llama: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Before a request: the workers refuse it, because a failed checksum would fail a request."""
    with pytest.raises(Exception, match="WorkerProc initialization failed"):
        MultiEngine(llama, tmp_path, kvkern_first=False, policy="fail")
    out, err = capfd.readouterr()
    assert "kv_load_failure_policy of MultiConnector is 'fail', and vLLM reads only this one" in out + err
