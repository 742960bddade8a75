"""Namespaces: the published vectors, and different roots for namespaces that must not share."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkern import file_digests
from kvkern.errors import ConfigError
from kvkern.file_digests import FileDigests
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
    {"group": None}, {"tp_size": 2}, {"pp_size": 2}, {"rank": 0}, {"tp_size": 2, "rank": 0}, {"salt": "t"}, {"salt": ""},
    {"engine_hash": "sha256"},
    {"adapter": "abc"},
], ids=repr)  # fmt: skip
def test_every_field_changes_the_root(change: dict[str, Any]) -> None:
    assert replace(SPACE, **change).root != SPACE.root


@pytest.mark.parametrize("change", [
    {"model": ""}, {"dtype": ""}, {"layout": ""}, {"weights": ""}, {"chunk_tokens": 0}, {"chunk_tokens": -1},
], ids=repr)  # fmt: skip
def test_a_namespace_without_identity_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"must not be empty|must be at least 1"):
        replace(SPACE, **change)


@pytest.mark.parametrize("change", [
    {"tp_size": 0}, {"pp_size": -1}, {"rank": 1}, {"rank": -1}, {"tp_size": 2, "pp_size": 2, "rank": 4},
], ids=repr)  # fmt: skip
def test_ranks_that_do_not_exist_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"must be at least 1|make ranks 0 to \d; set all three"):
        replace(SPACE, **change)


def test_every_rank_has_a_root_of_its_own() -> None:
    roots = {replace(SPACE, tp_size=tp, pp_size=pp, rank=rank).root
             for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 2)) for rank in (None, *range(tp * pp))}  # fmt: skip
    assert len(roots) == 4 + 1 + 2 + 2 + 4


@pytest.mark.parametrize("change", [
    {"salt": 5}, {"salt": b"5"}, {"model": 7}, {"weights": None}, {"chunk_tokens": 16.0}, {"chunk_tokens": "16"},
    {"group": True}, {"tp_size": 2.0}, {"rank": 0.0}, {"salt": "\ud800"}, {"model": "\ud800"},
], ids=repr)  # fmt: skip
def test_a_field_of_another_type_is_refused(change: dict[str, Any]) -> None:
    """As text 5 and "5" are equal, so both would name the same KV."""
    with pytest.raises(ConfigError, match=r"of a namespace (has the type|is no valid Unicode)"):
        replace(SPACE, **change)


@pytest.mark.parametrize(
    "change", [{"salt": "hunter2", "model": ""}, {"salt": "hunter2", "tp_size": 0}, {"salt": b"hunter2"}]
)
def test_no_message_shows_a_salt(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        replace(SPACE, **change)
    assert "hunter2" not in str(refused.value)
    assert "hunter2" not in repr(replace(SPACE, salt="hunter2"))


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


@pytest.fixture(autouse=True)
def _no_side_file_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every file for one that was written long ago: its digest is kept at once."""
    monkeypatch.setattr(file_digests, "CLOCKS_APART_S", -1.0)


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


def test_fingerprint_sees_one_changed_row(settled: None, tmp_path: Path) -> None:
    """A new special token changes one row of an embedding, and nothing else."""
    rows, row_nbytes = 32_000, 512 * 2
    path = tmp_path / "model.safetensors"
    header = b'{"embed":{"dtype":"F16","shape":[32000,512],"data_offsets":[0,%d]}}' % (rows * row_nbytes)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * row_nbytes)
    before = weights_fingerprint(path)
    assert weights_fingerprint(path) == before
    with path.open("r+b") as file:
        file.seek(8 + len(header) + 1000 * row_nbytes)
        file.write(b"x")
    assert weights_fingerprint(path) != before


def test_the_second_start_reads_no_weights(settled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The side file keeps the digests. A write that sets the old times again is seen all the same."""
    first = model(tmp_path / "a", FILES)
    assert weights_fingerprint(tmp_path / "a") == first
    monkeypatch.setattr(FileDigests, "_hash", lambda *args: pytest.fail("a weight file was read"))
    assert weights_fingerprint(tmp_path / "a") == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "a" / "model-1.safetensors"
    before = path.stat()
    path.write_bytes(b"x" + FILES["model-1.safetensors"][1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert weights_fingerprint(tmp_path / "a") != first


def test_a_side_file_that_cannot_be_written_is_said(settled: None, tmp_path: Path) -> None:
    model(tmp_path / "a", FILES)
    (tmp_path / "file").touch()
    lines: list[str] = []
    assert weights_fingerprint(tmp_path / "a", lines.append, tmp_path / "file" / "digests.json")
    assert len(lines) == 1
    assert "cannot be written" in lines[0]
    assert "XDG_CACHE_HOME" in lines[0]


def test_lines_of_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvkern.keys.PROGRESS_S", 0.0)
    lines: list[str] = []
    (tmp_path / "model.bin").write_bytes(bytes(3 << 20))
    weights_fingerprint(tmp_path, lines.append)
    assert lines == [f"hashed 0.0 of 0.0 GiB of weights in {tmp_path}"]


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
