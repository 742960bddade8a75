"""Two engines with one `engine_id`, as a Deployment's template gives it, started at the same moment: both hit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.vllm.engine import prompt
from tests.node.conftest import ROOT

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]


def test_engines_of_one_id_keep_apart(llama: str, tmp_path: Path) -> None:
    options = {"engine_id": "x", "capacity": "256MiB", "enable_prefix_caching": False}
    command = [sys.executable, "-m", "tests.integrations.vllm.engine_child", llama, json.dumps(options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    prompts = "".join(f"{json.dumps(prompt(300, seed))}\n" for seed in (1, 2, 3) for _ in range(2))
    engines = []
    for number in range(2):
        log = (tmp_path / f"{number}.log").open("wb")
        engines.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        )
        log.close()
    try:
        for engine in engines:
            assert engine.stdin is not None
            engine.stdin.write(prompts)
            engine.stdin.close()
        for number, engine in enumerate(engines):
            assert engine.stdout is not None
            with engine.stdout:
                lines = [line for line in engine.stdout if line.startswith("reply: {")]
            replies = [json.loads(line.removeprefix("reply: ")) for line in lines[1:]]
            assert [reply["cached_tokens"] for reply in replies] == [0, 288] * 3, (
                tmp_path / f"{number}.log"
            ).read_text()
    finally:
        for engine in engines:
            if engine.poll() is None:
                engine.terminate()
            engine.wait()
