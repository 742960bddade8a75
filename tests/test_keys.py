"""Namespaces: the published vectors, and different roots for namespaces that must not share."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkern.errors import ConfigError
from kvkern.kernels.chunk_keys import chunk_keys
from kvkern.keys import Namespace, canonical, derive_root, split_keys, weights_fingerprint

VECTORS = json.loads((Path(__file__).parent / "data" / "keys_vectors.json").read_text())
SPACE = Namespace(model="m", dtype="bfloat16", layout="LBHNC:262144", chunk_tokens=16, weights="abc")


@pytest.mark.parametrize("vector", VECTORS["namespaces"], ids=lambda v: v["fields"]["model"])
def test_canonical_and_root_vectors(vector: dict[str, Any]) -> None:
    assert canonical(vector["fields"]).hex() == vector["canonical"]
    assert derive_root(vector["fields"]).hex() == vector["root"]
    shuffled = dict(reversed(vector["fields"].items()))
    assert derive_root(shuffled).hex() == vector["root"]


def test_a_namespace_gives_the_vectors_root() -> None:
    assert SPACE.fields() == VECTORS["namespaces"][0]["fields"]
    assert SPACE.root.hex() == VECTORS["namespaces"][0]["root"]


@pytest.mark.parametrize("change", [
    {"model": "n"}, {"dtype": "float16"}, {"layout": "x"}, {"chunk_tokens": 32}, {"weights": "abd"}, {"group": 1},
    {"group": None}, {"tp_size": 2}, {"pp_size": 2}, {"salt": "t"}, {"salt": ""}, {"engine_hash": "sha256"},
], ids=repr)  # fmt: skip
def test_every_field_changes_the_root(change: dict[str, Any]) -> None:
    assert replace(SPACE, **change).root != SPACE.root


@pytest.mark.parametrize("change", [
    {"model": ""}, {"dtype": ""}, {"layout": ""}, {"weights": ""}, {"chunk_tokens": 0}, {"chunk_tokens": -1},
], ids=repr)  # fmt: skip
def test_a_namespace_without_identity_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"must not be empty|must be at least 1"):
        replace(SPACE, **change)


def test_text_moved_between_fields_is_another_namespace() -> None:
    """Lengths are part of the encoding, so `ab` + `c` differs from `a` + `bc`."""
    assert canonical({"model": "ab", "salt": "c"}) != canonical({"model": "a", "salt": "bc"})
    assert canonical({"a": "b" + chr(0) * 4}) != canonical({"a": "b", chr(0) * 4: ""})
    assert canonical({}) == b""


@given(*[st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=4)] * 2)
def test_canonical_is_injective(a: dict[str, str], b: dict[str, str]) -> None:
    assert (canonical(a) == canonical(b)) == (a == b)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_split_keys(count: int) -> None:
    keys = chunk_keys(SPACE.root, np.arange(16 * count, dtype=np.uint32), 16)
    assert split_keys(keys) == [k.tobytes() for k in keys]
    assert all(type(k) is bytes and len(k) == 32 for k in split_keys(keys))


def test_split_keys_keeps_zero_bytes() -> None:
    keys = np.zeros((2, 32), dtype=np.uint8)
    keys[1, 0] = 1
    assert split_keys(keys) == [bytes(32), b"\1" + bytes(31)]


def model(folder: Path, files: dict[str, bytes]) -> str:
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return weights_fingerprint(folder)


FILES = {"model-1.safetensors": bytes(range(256)) * 300, "model-2.safetensors": bytes(100), "config.json": b"{}"}


def edited(name: str, at: int) -> dict[str, bytes]:
    data = bytearray(FILES[name])
    data[at] ^= 1
    return {**FILES, name: bytes(data)}


def without(name: str, **more: bytes) -> dict[str, bytes]:
    return {**{k: v for k, v in FILES.items() if k != name}, **more}


@pytest.mark.parametrize("files", [
    pytest.param(edited("model-1.safetensors", 0), id="first byte"),
    pytest.param(edited("model-1.safetensors", 40_000), id="middle byte"),
    pytest.param(edited("model-1.safetensors", 76_799), id="last byte"),
    pytest.param(edited("model-2.safetensors", 50), id="small file"),
    pytest.param({**FILES, "model-2.safetensors": bytes(101)}, id="longer"),
    pytest.param({**FILES, "model-2.safetensors": bytes(99)}, id="shorter"),
    pytest.param({**FILES, "model-2.safetensors": b""}, id="emptied"),
    pytest.param(without("model-2.safetensors"), id="one less"),
    pytest.param({**FILES, "adapter.safetensors": b"1"}, id="one more"),
    pytest.param({**without("model-2.safetensors"), "model-3.safetensors": bytes(100)}, id="renamed"),
    pytest.param({"model-2.safetensors": FILES["model-1.safetensors"], "model-1.safetensors": bytes(100)}, id="swapped"),
    pytest.param({**without("model-2.safetensors"), "model-2.bin": bytes(100)}, id="other suffix"),
])  # fmt: skip
def test_fingerprint_changes_with_any_weight_file(tmp_path: Path, files: dict[str, bytes]) -> None:
    assert model(tmp_path / "a", files) != model(tmp_path / "b", FILES)


def test_fingerprint_is_of_the_weights_alone(tmp_path: Path) -> None:
    first = model(tmp_path / "a", FILES)
    assert first == model(tmp_path / "elsewhere", {**FILES, "config.json": b"[]", "README.md": b"x"})
    assert len(first) == 32
    assert int(first, 16) >= 0


def test_fingerprint_of_large_files_reads_samples(tmp_path: Path) -> None:
    """The samples are at both ends and evenly spaced between them, so a file of gigabytes costs eight reads."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    before = weights_fingerprint(path)
    for at in (0, (3 << 30) - 1, (3 << 30) // 7 * 3):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"x")
        assert weights_fingerprint(path) != before
        before = weights_fingerprint(path)


def safetensors(path: Path, tensors: list[tuple[str, list[int]]], data: bytes, changed_at: int = -1) -> str:
    """Write a file with these tensors and one changed byte of the data. Returns its fingerprint."""
    header = json.dumps({"__metadata__": {"format": "pt"}} | {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]} for name, (begin, end) in tensors
    }).encode()  # fmt: skip
    content = bytearray(data)
    if changed_at >= 0:
        content[changed_at] ^= 1
    path.write_bytes(len(header).to_bytes(8, "little") + header + content)
    return weights_fingerprint(path)


def test_fingerprint_sees_a_change_in_any_one_tensor(tmp_path: Path) -> None:
    """Also between the eight samples of a file: merging an adapter changes only a few tensors."""
    count, nbytes = 100, 40_000
    tensors = [(f"layer.{i}", [i * nbytes, (i + 1) * nbytes]) for i in range(count)]
    data, path = bytes(count * nbytes), tmp_path / "model.safetensors"
    seen = {safetensors(path, tensors, data)}
    for i in range(count):
        seen.add(safetensors(path, tensors, data, changed_at=i * nbytes + 1000))
        seen.add(safetensors(path, tensors, data, changed_at=i * nbytes + nbytes // 2 + 1000))
    assert len(seen) == 1 + 2 * count
    renamed = [("other", tensors[0][1]), *tensors[1:]]
    assert safetensors(path, renamed, data) not in seen


@pytest.mark.parametrize(
    "header", [b"{", b"[]", b'{"a": 1}', b'{"a": {"data_offsets": [1]}}', b'{"a": {"data_offsets": ["x", "y"]}}']
)
def test_fingerprint_of_a_file_that_is_no_safetensors(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    before = weights_fingerprint(path)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(99) + b"x")
    assert weights_fingerprint(path) != before


def test_fingerprint_of_one_file(tmp_path: Path) -> None:
    model(tmp_path / "a", {"model.gguf": b"abc"})
    assert weights_fingerprint(tmp_path / "a" / "model.gguf") == weights_fingerprint(tmp_path / "a")


@pytest.mark.parametrize("files", [{}, {"config.json": b"{}"}], ids=["empty", "no weights"])
def test_without_a_weight_file_the_error_names_the_remedy(tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(ConfigError, match=r"holds no weight file .* set `weights` yourself"):
        model(tmp_path / "a", files)


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        weights_fingerprint(tmp_path / "nowhere")
