"""Draws docs/vllm_fields.md from the table in kvkern/integrations/vllm/judged_fields.py: python docs/list_fields.py"""

from __future__ import annotations

from pathlib import Path

from kvkern.integrations.vllm.judged_fields import JUDGED, Verdict

HEAD = """# What names KV: every field of vLLM's configuration

Two engines share KV only if their namespaces are equal. This page judges each field of vLLM's configuration classes.
`python docs/list_fields.py` draws it from `kvkern/integrations/vllm/judged_fields.py`. It has the fields of all known releases.
A test fails when vLLM grows a field that is not judged. With a vLLM newer than these, such a field is in the namespace.

A field is in the namespace if it changes the function that computes KV, or what the bytes of a page mean. A field that
changes only kernels, order or batches is out: it changes rounding, as the size of a batch does, and vLLM's own prefix cache
mixes such KV too.

Four values are not taken as they are written:
- `max_model_len` is in for models whose KV depends on it: LongRoPE chooses its factors by it, and Llama 4 its temperature.
  It is left out only for architectures known not to read it (`kvkern/integrations/vllm/namespace.py`).
- `seed` is in with `load_format` `dummy`, because it then makes the weights.
- The attention backend is often left to vLLM. The workers report which one every layer got and, on CPUs, for which instruction
  set its pages are packed.
- A draft model's weights are in, because its KV lies in the same blocks. N-gram and suffix speculation have no model, and such
  engines share with engines that do not speculate.

Models with images or other media have more in the namespace: the files `*processor*.json` of the model's folder, and the
versions of transformers, Pillow and torchvision. vLLM names an image by its content and the model's path, whatever these do
to it.

Of the environment, `VLLM_SSM_CONV_STATE_LAYOUT`, `VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT`, `VLLM_MLA_DISABLE` and
`VLLM_USE_V2_MODEL_RUNNER` are in. vLLM's exact version is in.
"""


def page() -> str:
    """Return the page's text."""
    lines = [HEAD]
    for name, by_verdict in JUDGED.items():
        lines += [f"## {name}", "| verdict | fields |", "|---|---|"]
        lines += [
            f"| {verdict.value} | {', '.join(f'`{field}`' for field in by_verdict[verdict].split())} |"
            for verdict in Verdict
            if verdict in by_verdict
        ]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (Path(__file__).parent / "vllm_fields.md").write_text(page())
