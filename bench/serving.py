"""Measures kvkern's overhead where it cannot help: eight streams of new prompts, with and without kvkern.

    both engines stay up and are idle except in their own turns; a round is one turn each, in alternating order
    a turn: 8 clients, each with a few requests in a row; replies differ in length, so prefills meet other clients' tokens
    ratio = median over rounds of (with kvkern) / (without), so a slow minute of the machine slows both sides

    proof = afterwards vLLM empties its own prefix cache and is asked the last round's prompts again. With kvkern it must
            reuse tokens, and without it must not

The 99th percentile is computed per round, too. Over all rounds pooled it is the percentile of the machine's worst minute,
whichever engine had its turn then; the row gives that ratio as well. A hit within a round, or no reuse afterwards, is an
error and gives no figure.
Targets: throughput at least 0.97 times that of vLLM alone, 99th percentile of the inter-token latency at most 1.05 times.
Every stored token counts as overhead here. The demo measures hits.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from _common import option_parser, print_row, write_json

from kvkern.demo import engine_process, model, run
from kvkern.demo.engine import engine_kwargs, kvkern_transfer_config
from kvkern.demo.messages import EngineSpec
from kvkern.demo.prompts import PromptLibrary
from kvkern.demo.standalone_engine import FORGET_LIMIT_S, EngineBusyError, still_in_use

CASES = {"vllm": None, "vllm_kvkern": "2GiB"}  # case -> kvkern's capacity; None: vLLM alone
MIN_RATIO_THROUGHPUT = 0.97
MAX_RATIO_ITL_P99 = 1.05
Row = dict[str, object]


@dataclass(frozen=True)
class Workload:
    """One turn. Both engines get the same prompts and reply lengths."""

    clients: int = 8
    requests_per_client: int = 2
    prompt_tokens: int = 512
    reply_tokens: int = 64  # reply length of client 0
    reply_step_tokens: int = 8  # each further client's replies are longer by this

    def replies(self) -> list[int]:
        return [self.reply_tokens + self.reply_step_tokens * client for client in range(self.clients)]

    def total_tokens(self) -> int:
        return self.requests_per_client * (self.clients * self.prompt_tokens + sum(self.replies()))

    def prompts(self, library: PromptLibrary) -> list[list[list[int]]]:
        """Return, per client, the prompts that it sends one after the other. All prompts differ."""
        return [library.documents(self.requests_per_client, self.prompt_tokens) for _ in range(self.clients)]


@dataclass
class Turn:
    """One engine's measurements in one round."""

    wall_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)  # times between consecutive outputs of one stream
    cached_tokens: int = 0  # prompt tokens that were not computed

    def tok_s(self, workload: Workload) -> float:
        return workload.total_tokens() / self.wall_s


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


class Server:
    """Owns one AsyncLLM until `close()`."""

    def __init__(self, case: str, spec: EngineSpec) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            **engine_kwargs(spec), kv_transfer_config=kvkern_transfer_config(spec), disable_log_stats=True
        )
        self.case = case
        self._engine = AsyncLLM.from_engine_args(arguments)
        self._serial = itertools.count()

    async def turn(self, workload: Workload, prompts: Sequence[Sequence[list[int]]]) -> Turn:
        result = Turn()
        started_s = time.perf_counter()
        await asyncio.gather(
            *(
                self._client(requests, reply_tokens, result)
                for requests, reply_tokens in zip(prompts, workload.replies(), strict=True)
            )
        )
        result.wall_s = time.perf_counter() - started_s
        return result

    async def _client(self, requests: Sequence[list[int]], reply_tokens: int, result: Turn) -> None:
        for prompt in requests:
            last_s: float | None = None
            cached_tokens = 0
            async for output in self._stream(prompt, reply_tokens):
                now_s = time.perf_counter()
                if last_s is not None:
                    result.itl_s.append(now_s - last_s)
                last_s = now_s
                cached_tokens = output.num_cached_tokens or 0
            result.cached_tokens += cached_tokens

    def _stream(self, prompt: list[int], reply_tokens: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0, max_tokens=reply_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        return self._engine.generate({"prompt_token_ids": prompt}, params, f"{self.case}-{next(self._serial)}")

    async def forget(self) -> None:
        """Empty vLLM's own prefix cache. Retries while vLLM refuses because a store still reads blocks."""
        deadline_s = time.monotonic() + FORGET_LIMIT_S
        while not await self._engine.reset_prefix_cache():
            if time.monotonic() > deadline_s:
                raise EngineBusyError(still_in_use())
            await asyncio.sleep(0.02)

    def close(self) -> None:
        self._engine.shutdown()
        del self._engine  # its __del__ needs modules that are gone when Python ends


async def measure(
    servers: Sequence[Server], workload: Workload, library: PromptLibrary, num_rounds: int
) -> list[dict[str, Turn]]:
    """Run one round that does not count, then `num_rounds`. Return one dict of case -> turn per round."""
    rounds = []
    for index in range(num_rounds + 1):
        prompts = workload.prompts(library)
        order = servers if index % 2 else list(reversed(servers))
        turns = {server.case: await server.turn(workload, prompts) for server in order}
        if index:
            rounds.append(turns)
            if hits := {case: turn.cached_tokens for case, turn in turns.items() if turn.cached_tokens}:
                raise RuntimeError(
                    f"New prompts were hit, in tokens: {hits}. Prompts of different rounds must differ: this is a bug."
                )
            print_row({"round": index} | {f"{case} tok_s": turn.tok_s(workload) for case, turn in turns.items()})
    await prove_stored(servers, workload, prompts)
    return rounds


async def prove_stored(servers: Sequence[Server], workload: Workload, prompts: Sequence[Sequence[list[int]]]) -> None:
    """Raise unless the engine with kvkern, and no other, reuses prompts that vLLM's own cache has forgotten."""
    for server in servers:
        await server.forget()
        reused_tokens = (await server.turn(workload, prompts)).cached_tokens
        print_row({"case": server.case, "reused_tokens afterwards": reused_tokens})
        if bool(reused_tokens) != bool(CASES[server.case]):
            expected = "more than 0" if CASES[server.case] else "0"
            raise RuntimeError(
                f"{server.case} reused {reused_tokens} tokens after vLLM's own cache was emptied, expected {expected}. The "
                f"figures are not valid."
            )


def rows(rounds: Sequence[dict[str, Turn]], workload: Workload) -> list[Row]:
    """Return a row per case and the row of ratios."""
    result: list[Row] = [_row(case, [turns[case] for turns in rounds], workload) for case in CASES]
    throughput = [turns["vllm_kvkern"].tok_s(workload) / turns["vllm"].tok_s(workload) for turns in rounds]
    latency = [percentile(turns["vllm_kvkern"].itl_s, 99) / percentile(turns["vllm"].itl_s, 99) for turns in rounds]
    ratios: Row = {"case": "ratio", "concurrency": workload.clients}
    for name, values in (("ratio_throughput", throughput), ("ratio_itl_p99", latency)):
        ratios |= {name: median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
    pooled_s = {case: percentile([gap_s for turns in rounds for gap_s in turns[case].itl_s], 99) for case in CASES}
    ratios["ratio_itl_p99_pooled"] = pooled_s["vllm_kvkern"] / pooled_s["vllm"]
    return [*result, ratios | {"runs": len(rounds)}]


def _row(case: str, turns: Sequence[Turn], workload: Workload) -> Row:
    return {
        "case": case,
        "concurrency": workload.clients,
        "prompt_tokens": workload.prompt_tokens,
        "output_tokens": round(sum(workload.replies()) / workload.clients),  # mean over requests
        "tok_s": median(turn.tok_s(workload) for turn in turns),
        "itl_p50_s": median(percentile(turn.itl_s, 50) for turn in turns),
        "itl_p99_s": median(percentile(turn.itl_s, 99) for turn in turns),
        "runs": len(turns),
    }


def parse() -> argparse.Namespace:
    parser = option_parser(__doc__.splitlines()[0], quick="one short round: for smoke tests, not for figures")
    parser.add_argument("--model", type=Path, help="a model folder to use instead of the demo's")
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds that count (default 7)")
    return parser.parse_args()


async def bench(folder: Path, workload: Workload, num_rounds: int) -> list[Row]:
    library = PromptLibrary.from_model(folder)
    servers: list[Server] = []
    try:
        for case, capacity in CASES.items():
            print(f"starting {case}", flush=True)
            servers.append(Server(case, msgspec.structs.replace(run.engine_spec(folder), kvkern_capacity=capacity)))
        return rows(await measure(servers, workload, library, num_rounds), workload)
    finally:
        for server in servers:
            server.close()


def main() -> None:
    args = parse()
    os.environ.update(engine_process.environment(verbose=False))  # vLLM reads it when it is imported
    workload = Workload(clients=2, requests_per_client=1, reply_tokens=8) if args.quick else Workload()
    folder = args.model or model.ensure(model.ModelConfig(), run.default_workdir())
    measured = asyncio.run(bench(folder, workload, 1 if args.quick else args.rounds))
    for row in measured:
        print_row(row)
    print(f"targets: ratio_throughput >= {MIN_RATIO_THROUGHPUT}, ratio_itl_p99 <= {MAX_RATIO_ITL_P99}", flush=True)
    write_json(args.json, measured)


if __name__ == "__main__":
    main()
