"""Runs one vLLM engine with one KV connector: measures time to first token of computed, native-hit and loaded prompts.

    per length   compute each document once (ttft_recompute); the connector stores it. Ask the first one again at once: a hit
                 on blocks that the engine itself computed (reference)
    per length   (forget, ttft_hit, ttft_native_hit) x (1 unmeasured + pairs) of the first document

Native hits after a load reuse loaded blocks, so only `reference` can tell whether a load was right. The documents computed
last overwrite the whole KV pool, so a connector that loads nothing cannot find the right bytes still in place.

Any interpreter that has vLLM can run this file. It imports nothing of kvkern and is the same for every system: the engine
is the demo's standalone_engine.py, loaded by its path. Reads one JSON job from stdin and prints one JSON line per request on
stdout. vLLM's own output goes to stderr. Judges nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, ModuleType
from typing import IO, Any

STANDALONE_ENGINE = Path(__file__).resolve().parents[2] / "kvkern" / "demo" / "standalone_engine.py"
SETTLE_S = 1.0  # pause after computing, in which connectors finish stores that they run in the background


def load_by_path(path: Path) -> ModuleType:
    """Import a file that belongs to a package, without importing the package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(engine: Any, job: dict[str, Any], out: IO[str]) -> None:
    """Ask the engine for the prompts that the module's docstring lists. Print every request as one line."""

    def ask(case: str, prompt: list[int]) -> None:
        reply = engine.send(prompt, job["reply_tokens"])
        print(json.dumps({"case": case, **reply._asdict()}), file=out, flush=True)

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


def exit_on_sigterm_or_end_of_stdin() -> None:
    """Let SIGTERM and the end of stdin raise SystemExit. stdin ends when the parent is gone or wants this process to stop."""

    def leave(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the clean-up
        sys.exit(128 + number)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=watch, name="stdin", daemon=True).start()


def take_stdout() -> IO[str]:
    """Return the real stdout, for rows only. All other output goes to stderr. Engine processes do not inherit the stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def open_engine(arguments: dict[str, Any], transfer: dict[str, Any]) -> Any:
    """Return a StandaloneEngine with this connector."""
    from vllm.config import KVTransferConfig

    return load_by_path(STANDALONE_ENGINE).StandaloneEngine(arguments, KVTransferConfig(**transfer))


def main() -> None:
    job = json.loads(sys.stdin.buffer.readline())
    out = take_stdout()
    exit_on_sigterm_or_end_of_stdin()
    started_s = time.monotonic()
    engine = open_engine(job["arguments"], job["transfer"])
    try:
        print(json.dumps({"case": "started", "seconds": time.monotonic() - started_s}), file=out, flush=True)
        measure(engine, job, out)
        print(json.dumps({"case": "done"}), file=out, flush=True)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
