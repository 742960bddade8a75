"""The README's example runs unchanged. The test plays the engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_example_loads_what_it_stored() -> None:
    example = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    prefilled: list[int] = []

    def prefill(tokens: list[int], block_table: list[int]) -> None:
        prefilled.append(len(tokens))
        torch.manual_seed(0)
        for layer in scope["kv"]:
            layer[:, block_table] = torch.randn(2, len(block_table), *layer.shape[2:], dtype=layer.dtype)

    scope: dict[str, Any] = {"tokens": list(range(100)), "block_table": [9, 4, 7, 1, 30, 2, 5], "prefill": prefill}
    code = example[1].replace('"1GiB"', '"64MiB"')
    setup, use = code.split("with cache.match", 1)
    exec(compile(setup, str(README), "exec"), scope)  # noqa: S102
    use = "with cache.match" + use
    exec(compile(use, str(README), "exec"), scope)  # noqa: S102
    stored = [layer[:, scope["block_table"][:6]].clone() for layer in scope["kv"]]
    scope["block_table"] = [11, 12, 13, 14, 15, 16, 17]
    exec(compile(use, str(README), "exec"), scope)  # noqa: S102
    assert prefilled == [100, 4]
    scope |= {"tokens": list(range(96)), "block_table": [31, 32, 33, 34, 35, 36]}
    exec(compile(use, str(README), "exec"), scope)  # noqa: S102
    assert prefilled[2] >= 1  # a prompt of whole cached chunks: an engine still needs the logits of its last token
    scope["tokens"] = list(range(100))
    scope["prefill"] = lambda tokens, table: None
    scope["block_table"] = [21, 22, 23, 24, 25, 26, 27]
    exec(compile(use, str(README), "exec"), scope)  # noqa: S102
    for layer, was in zip(scope["kv"], stored, strict=True):
        assert torch.equal(layer[:, [21, 22, 23, 24, 25, 26]], was)
    scope["cache"].close()
