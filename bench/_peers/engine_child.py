"""One vLLM engine with one KV connector: measures time to first token of computed, native-hit and loaded prompts.

    per length   compute each document once (ttft_recompute; the connector stores it); the first one again at once: a hit of
                 blocks that the engine itself computed (reference)
    per length   (forget, ttft_hit, ttft_native_hit) x (1 unmeasured + pairs) of the first document

Native hits after a load reuse what was loaded, so only `reference` can tell whether a load was right. The documents
computed last overwrite the whole KV pool: a connector that loads nothing cannot find the right bytes still in place.

Run by any interpreter that has vLLM: it imports nothing of kvkern and is the same file for every system. Reads one JSON
job on stdin, prints one JSON line per request on stdout; vLLM's own output goes to stderr. Judges nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import IO, Any

TOP_LOGPROBS = 5
FORGET_LIMIT_S = 30.0
SETTLE_S = 1.0  # after computing: connectors that store behind the engine's back are done by then
EXTERNAL_HITS = "vllm:external_prefix_cache_hits"


class Engine:
    """Owns a vLLM engine with its processes until `close()`. One request at a time."""

    def __init__(self, arguments: dict[str, Any], transfer: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        self._llm = LLM(**arguments, kv_transfer_config=KVTransferConfig(**transfer), disable_log_stats=False)
        self._serial = itertools.count()

    def ask(self, prompt: list[int], reply_tokens: int) -> dict[str, Any]:
        """Send one greedy request, wait for its end. The clock starts when vLLM gets the request."""
        promised_before = self._external_hits()
        final, ttft_s = self._run({"prompt_token_ids": prompt}, reply_tokens)
        reply = final.outputs[0]
        return {
            "prompt_tokens": len(prompt),
            "cached_tokens": final.num_cached_tokens or 0,  # vLLM's own and the connector's
            "loaded_tokens": self._external_hits() - promised_before,  # of these, the connector's, by vLLM's counter
            "ttft_s": ttft_s,
            "tokens": list(reply.token_ids),
            "logprobs": [_ranked(position) for position in reply.logprobs],
        }

    def forget(self) -> None:
        """Empty vLLM's own prefix cache; the connector keeps what it has."""
        deadline_s = time.monotonic() + FORGET_LIMIT_S
        while not self._llm.reset_prefix_cache():  # refused while a store still reads blocks
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"vLLM refused to reset its prefix cache for {FORGET_LIMIT_S:.0f} s: blocks in use")
            time.sleep(0.02)

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _run(self, prompt: dict[str, Any], reply_tokens: int) -> tuple[Any, float]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=reply_tokens, ignore_eos=True, logprobs=TOP_LOGPROBS)
        engine = self._llm.llm_engine
        outputs: list[Any] = []
        ttft_s = 0.0
        sent_s = time.perf_counter()
        rendered = self._llm.renderer.render_cmpl([prompt])[0]
        engine.add_request(str(next(self._serial)), rendered, params)
        while engine.has_unfinished_requests():
            outputs += engine.step()
            if outputs and not ttft_s:
                ttft_s = time.perf_counter() - sent_s
        return outputs[-1], ttft_s

    def _external_hits(self) -> int:
        return sum(int(metric.value) for metric in self._llm.get_metrics() if metric.name == EXTERNAL_HITS)


def _ranked(position: dict[int, Any]) -> list[tuple[int, float]]:
    return sorted(((token, entry.logprob) for token, entry in position.items()), key=lambda pair: (-pair[1], pair[0]))


def measure(engine: Engine, job: dict[str, Any], out: IO[str]) -> None:
    """Run the module's plan; every request is one line."""

    def ask(case: str, prompt: list[int]) -> None:
        answer = engine.ask(prompt, job["reply_tokens"])
        print(json.dumps({"case": case, **answer}), file=out, flush=True)

    for num_tokens in (16, 256):  # a process's first requests pay seconds for set-up inside torch and oneDNN
        ask("warm_up", job["warm_up"][:num_tokens])
    for documents in job["lengths"]:
        for index, document in enumerate(documents):
            ask("ttft_recompute", document)
            if index == 0:
                ask("reference", document)
    time.sleep(SETTLE_S)
    for documents in job["lengths"]:
        for case_prefix in ("first_", *[""] * job["pairs"]):
            engine.forget()
            ask(f"{case_prefix}ttft_hit", documents[0])
            ask(f"{case_prefix}ttft_native_hit", documents[0])


def stop_when_told() -> None:
    """SIGTERM becomes SystemExit, and so does the end of stdin: the parent is gone or wants an end."""

    def leave(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # once: what follows is the cleaning up
        sys.exit(128 + number)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=watch, name="stdin", daemon=True).start()


def take_stdout() -> IO[str]:
    """Return the real stdout, for rows only; whatever else prints goes to stderr. Engine processes do not inherit it."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def main() -> None:
    job = json.loads(sys.stdin.buffer.readline())
    out = take_stdout()
    stop_when_told()
    started_s = time.monotonic()
    engine = Engine(job["arguments"], job["transfer"])
    try:
        print(json.dumps({"case": "started", "seconds": time.monotonic() - started_s}), file=out, flush=True)
        measure(engine, job, out)
        print(json.dumps({"case": "done"}), file=out, flush=True)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
