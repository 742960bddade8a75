"""A pool too small for its requests, random priorities, and a slow store: nothing stalls, and every reply is right.

The daemon runs in a thread of this process, so that it can be told that the engine computes as slowly as a large model:
behind this tiny one no read would ever pay. KVKERN_SOAK_ROUNDS sets the rounds; `make soak` takes 300.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from kvkern.config import RemoteConfig
from kvkern.node import protocol as p
from kvkern.node.client.admin_client import AdminClient
from kvkern.node.daemon.node_config import NodeConfig
from kvkern.remote.cost_model import CostModel
from tests.integrations.vllm.engine import BLOCK_TOKENS, Engine, prompt
from tests.node import conftest as node
from tests.node.conftest import eventually, served
from tests.remote.fault_proxy import redis_behind_proxy
from tests.remote.required_servers import need

ROUNDS = int(os.environ.get("KVKERN_SOAK_ROUNDS", "6"))
KINDS = ("ngram", "plain") if ROUNDS >= 100 else ("ngram",)

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(300 + 20 * ROUNDS)]

STALL_S = 20.0  # no token for so long while requests wait
DELAYS_S = 0.0, 0.02, 0.1  # of the store, for each 64 KiB and way; a chunk has 40 KiB
PREFILL_TOKENS_S = 20.0  # of the engine, as far as the daemon knows
POOL_BLOCKS = 24  # one of them is vLLM's null block
MODEL_TOKENS = (POOL_BLOCKS - 1) * BLOCK_TOKENS
REPLY_TOKENS = 4
LOADED_BLOCKS = 10

folder = node.folder


class Requests:
    """Requests of one engine, with priorities. Fails the test if no token comes for STALL_S."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._count = 0

    def run(self, texts: list[list[int]], priorities: list[int]) -> list[tuple[int, ...]]:
        """Return the replies of `texts`, which arrive at once."""
        llm = self._engine.llm.llm_engine
        numbers: dict[str, int] = {}
        for number, (text, priority) in enumerate(zip(texts, priorities, strict=True)):
            self._count += 1
            numbers[f"{self._count}"] = number
            llm.add_request(
                f"{self._count}", {"prompt_token_ids": text}, self._engine.params(REPLY_TOKENS), priority=priority
            )
        replies: list[tuple[int, ...]] = [()] * len(texts)
        last_s = time.monotonic()
        while llm.has_unfinished_requests():
            for output in llm.step():
                number, tokens = numbers[output.request_id.split("-")[0]], tuple(output.outputs[0].token_ids)
                if len(tokens) > len(replies[number]):
                    last_s = time.monotonic()
                replies[number] = tokens
            assert time.monotonic() - last_s < STALL_S, self._state()
        return replies

    def _state(self) -> str:
        scheduler = self._engine.scheduler
        waiting = [f"{r.request_id} {r.status.name} {r.num_prompt_tokens}" for r in scheduler.waiting]
        running = [f"{r.request_id} {r.num_computed_tokens} of {r.num_prompt_tokens}" for r in scheduler.running]
        free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        return f"no token for {STALL_S} s: running {running}, waiting {waiting}, {free} free blocks"


def repeating(length: int, seed: int) -> list[int]:
    """A prompt whose second half repeats its first: n-gram speculation has something to propose."""
    half = prompt(-(-length // 2), seed)
    return (half + half)[:length]


def stored_prompts() -> list[list[int]]:
    rng = random.Random(1)
    texts = [(prompt, repeating)[i % 2](rng.randint(300, 700), 900 + i) for i in range(10)]
    texts.append(prompt(MODEL_TOKENS - REPLY_TOKENS, 950))  # it needs the whole pool
    texts.append(prompt(LOADED_BLOCKS * BLOCK_TOKENS, 951))
    return texts


def texts_of_a_round(rng: random.Random, stored: list[list[int]]) -> list[list[int]]:
    """16 prompts. Half of them are stored; the others begin like a stored one, or are new."""
    texts = [stored[-2], stored[-1], *rng.sample(stored[:-2], 6)]
    texts.append(
        prompt((POOL_BLOCKS - LOADED_BLOCKS) * BLOCK_TOKENS - 16, rng.randrange(1 << 30))
    )  # too long by a block
    while len(texts) < 16:
        head = rng.choice(stored)[: rng.randrange(0, 300)]
        texts.append(head + prompt(rng.randint(300, 700) - len(head), rng.randrange(1 << 30)))
    rng.shuffle(texts)
    return texts


def stat_of(socket: Path) -> dict[str, Any]:
    with AdminClient(socket) as admin:
        (row,) = admin.ask(p.Stat(1))
    return row


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_pool_and_a_slow_store(
    llama: str, tmp_path: Path, folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("redis", program="redis-server", module="redis")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setattr(CostModel, "note_prefill", lambda self, *_: setattr(self, "prefill_tokens_s", PREFILL_TOKENS_S))
    options: dict[str, Any] = {"num_gpu_blocks_override": POOL_BLOCKS, "max_model_len": MODEL_TOKENS}
    if kind == "ngram":  # it asks for blocks ahead of the tokens
        options["speculative_config"] = {
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1,
        }  # fmt: skip
    rng, stored = random.Random(kind), stored_prompts()
    with redis_behind_proxy(tmp_path) as (_redis, proxy):
        remote = RemoteConfig(f"redis://127.0.0.1:{proxy.port}", "all")
        config = NodeConfig(folder / "s", 2 << 20, arena_dir=tmp_path, remote=remote)  # a quarter of the stored prompts
        with (
            served(config),
            Engine(llama, kvkern_options={"socket": str(config.socket)}, **options) as engine,
        ):
            requests = Requests(engine)
            expected = {}
            for text in stored:
                expected[tuple(text)] = requests.run([text], [0])[0]
                engine.settle()
                eventually(lambda: stat_of(config.socket)["remote_queue_chunks"] == 0, "the writes")
            for number in range(ROUNDS // len(KINDS)):
                proxy.delay_s = rng.choice(DELAYS_S)
                texts = texts_of_a_round(rng, stored)
                replies = requests.run(texts, [rng.randrange(4) for _ in texts])
                for text, reply in zip(texts, replies, strict=True):
                    assert len(reply) == REPLY_TOKENS
                    assert reply == expected.get(tuple(text), reply), f"round {number}, {len(text)} tokens"
                if rng.random() < 0.5:
                    engine.reset_native()
            proxy.heal()
            engine.settle()
            eventually(lambda: stat_of(config.socket)["leases"] == 0, "the end of every lease")
            stat = stat_of(config.socket)
            print(stat)
            assert stat["hit_chunks"] > 0
            assert stat["remote_hit_chunks"] > 0
            assert stat["faults"] == stat["bad_chunks"] == 0
