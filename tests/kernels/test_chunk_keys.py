"""Key version 1 against its published vectors, on both CPU backends, hashed at once and in pieces."""

from __future__ import annotations

import array
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkern.kernels.chain_state import ChainState
from kvkern.kernels.chunk_keys import Backend, Tokens, adopt_keys, as_tokens, chunk_keys, extend_keys
from kvkern.kernels.chunk_keys_ref import SEGMENT_CHUNKS
from kvkern.kernels.errors import LayoutError

VECTORS = json.loads((Path(__file__).parent.parent / "data" / "keys_vectors.json").read_text())
BACKENDS: tuple[Backend, ...] = ("numba", "ref")
ROOT = bytes(range(32))
both = pytest.mark.parametrize("backend", BACKENDS)


def tokens_of(count: int, seed: int = 0) -> npt.NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint32)


@both
@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda v: v["root_material_utf8"])
def test_vectors(vector: dict[str, Any], backend: Backend) -> None:
    root = blake3(vector["root_material_utf8"].encode(), derive_key_context="kvkern chunk key v1").digest()
    assert root.hex() == vector["root"]
    keys = chunk_keys(root, vector["tokens"], vector["chunk_tokens"], backend=backend)
    assert keys.shape == (vector["num_keys"], 32)
    assert keys.dtype == np.uint8
    assert blake3(keys.tobytes()).hexdigest() == vector["all_keys_blake3"]
    if len(keys):
        assert (keys[0].tobytes().hex(), keys[-1].tobytes().hex()) == (vector["first"], vector["last"])


@pytest.mark.parametrize("space", VECTORS["namespaces"], ids=lambda v: v["fields"]["model"])
@both
def test_namespace_vectors(space: dict[str, Any], backend: Backend) -> None:
    root, size = bytes.fromhex(space["root"]), int(space["fields"]["chunk_tokens"])
    want = space["keys_of_range_tokens"]
    keys = chunk_keys(root, range(size * len(want)), size, backend=backend)
    assert [k.tobytes().hex() for k in keys] == want
    engine_key = bytes.fromhex(space["engine_hash"]) + space["engine_group"].to_bytes(4, "big")
    assert [k.hex() for k in adopt_keys(root, [engine_key])] == [space["adopted_key"]]


@both
def test_extra_vector(backend: Backend) -> None:
    extra = VECTORS["extra"]
    root = bytes.fromhex(VECTORS["namespaces"][extra["namespace"]]["root"])
    keys = chunk_keys(root, extra["tokens"], 16, {0: bytes.fromhex(extra["extra"])}, backend)
    assert keys[0].tobytes().hex() == extra["key"]


@both
@pytest.mark.parametrize("chunk_tokens", [1, 3, 16, 256, 257])
def test_growing_at_every_boundary_equals_the_whole(chunk_tokens: int, backend: Backend) -> None:
    """Cut the sequence anywhere, also at segment ends (chunk 128, 256) and inside a chunk, which is then hashed again."""
    chunks = 260 if chunk_tokens < 16 else 5
    tokens = tokens_of((chunks + 1) * chunk_tokens - 1)
    whole, end = extend_keys(ChainState.start(ROOT), tokens, chunk_tokens, backend=backend)
    assert len(whole) == chunks
    cuts = [0, 1, 2, 127, 128, 129, 255, 256, 257, chunks] if chunks > 5 else range(chunks + 1)
    for cut in cuts:
        head, state = extend_keys(ChainState.start(ROOT), tokens[: cut * chunk_tokens], chunk_tokens, backend=backend)
        assert state.num_chunks == cut
        tail, last = extend_keys(state, tokens[cut * chunk_tokens :], chunk_tokens, backend=backend)
        np.testing.assert_array_equal(np.concatenate([head, tail]), whole)
        assert last == end


@settings(max_examples=60)
@given(st.integers(1, 40), st.lists(st.integers(0, 90), max_size=6), st.integers(0, 5), st.data())
def test_any_cut_on_any_backend(chunk_tokens: int, steps: list[int], rest: int, data: st.DataObject) -> None:
    tokens = tokens_of(sum(steps) * chunk_tokens + rest % chunk_tokens, seed=len(steps))
    whole = chunk_keys(ROOT, tokens, chunk_tokens, backend="ref")
    state, at, parts = ChainState.start(ROOT), 0, [np.zeros((0, 32), np.uint8)]
    for i, step in enumerate(steps):
        stop = len(tokens) if i == len(steps) - 1 else at + step * chunk_tokens
        keys, state = extend_keys(state, tokens[at:stop], chunk_tokens, backend=data.draw(st.sampled_from(BACKENDS)))
        parts.append(keys)
        at += step * chunk_tokens
    np.testing.assert_array_equal(np.concatenate(parts), whole)


MOST_SEGMENTS = 33  # two rounds of sixteen lanes, and one segment alone
LANE_SIZES = (1, 3, 15, 16, 17, 64, 255, 256)


@cache
def long_sequence(chunk_tokens: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    """Return (tokens, the reference's keys) of MOST_SEGMENTS whole segments. The keys of a prefix are a prefix of these."""
    tokens = tokens_of(MOST_SEGMENTS * SEGMENT_CHUNKS * chunk_tokens, seed=chunk_tokens)
    return tokens, chunk_keys(ROOT, tokens, chunk_tokens, backend="ref")


@pytest.mark.parametrize("chunk_tokens", LANE_SIZES)
def test_any_number_of_lanes(chunk_tokens: int) -> None:
    """Hash 1 to 33 segments, the last one whole, partial or a single chunk. Then go on with ten more chunks."""
    tokens, want = long_sequence(chunk_tokens)
    for segments in range(1, MOST_SEGMENTS + 1):
        for missing in (0, segments * 41 % SEGMENT_CHUNKS, SEGMENT_CHUNKS - 1):
            count = segments * SEGMENT_CHUNKS - missing
            cut = count * chunk_tokens
            keys, state = extend_keys(ChainState.start(ROOT), tokens[:cut], chunk_tokens)
            np.testing.assert_array_equal(keys, want[:count])
            more, _ = extend_keys(state, tokens[cut : cut + 10 * chunk_tokens], chunk_tokens)
            np.testing.assert_array_equal(more, want[count : count + 10])


@pytest.mark.parametrize("chunk_tokens", LANE_SIZES)
@pytest.mark.parametrize("start", [1, 15, 17, 112, 127, 128, 200])
def test_lanes_from_the_middle_of_a_segment(start: int, chunk_tokens: int) -> None:
    tokens, want = long_sequence(chunk_tokens)
    _, state = extend_keys(ChainState.start(ROOT), tokens[: start * chunk_tokens], chunk_tokens, backend="ref")
    for count in (0, 1, 16, 17, 127, 128, 129, 256, 257, 384, 2048, 2200, len(want) - start):
        stop = start + count
        keys, end = extend_keys(state, tokens[start * chunk_tokens : stop * chunk_tokens], chunk_tokens)
        np.testing.assert_array_equal(keys, want[start:stop])
        assert end.num_chunks == stop
        last_end = stop // SEGMENT_CHUNKS * SEGMENT_CHUNKS
        assert end.segment_end == (want[last_end - 1].tobytes() if last_end else ROOT)


@both
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17])
def test_partial_chunks_have_no_key(count: int, backend: Backend) -> None:
    assert chunk_keys(ROOT, tokens_of(count), 16, backend=backend).shape == (count // 16, 32)


@pytest.mark.parametrize("position", [0, 5, 127, 128, 129, 255, 256, 299])
def test_a_key_names_everything_before_it(position: int) -> None:
    """One changed token changes the keys from its chunk on, and only those."""
    tokens = tokens_of(300 * 4)
    changed = tokens.copy()
    changed[position * 4 + 3] ^= 1
    same = (chunk_keys(ROOT, tokens, 4) == chunk_keys(ROOT, changed, 4)).all(axis=1)
    assert same.tolist() == [True] * position + [False] * (300 - position)


def test_keys_are_distinct_even_for_equal_chunks() -> None:
    keys = chunk_keys(ROOT, np.zeros(16 * 400, np.uint32), 16)
    assert len({k.tobytes() for k in keys}) == 400


def test_chunk_size_and_root_change_the_keys() -> None:
    tokens = tokens_of(64)
    a, b = chunk_keys(ROOT, tokens, 16), chunk_keys(bytes(32), tokens, 16)
    assert not (a == b).all(axis=1).any()
    assert not (chunk_keys(ROOT, tokens, 32)[0] == a[1]).all()


@both
def test_extras_keep_equal_placeholders_apart(backend: Backend) -> None:
    tokens = np.zeros(16 * 140, np.uint32)
    plain = chunk_keys(ROOT, tokens, 16, backend=backend)
    one = chunk_keys(ROOT, tokens, 16, {130: b"a" * 32}, backend)
    two = chunk_keys(ROOT, tokens, 16, {130: b"b" * 32}, backend)
    for a, b in ((plain, one), (plain, two), (one, two)):
        assert (a == b).all(axis=1).tolist() == [True] * 130 + [False] * 10
    _, state = extend_keys(ChainState.start(ROOT), tokens[: 16 * 129], 16, backend=backend)
    # indices of extras count from the sequence's start
    grown, _ = extend_keys(state, tokens[16 * 129 :], 16, {130: b"a" * 32}, backend)
    np.testing.assert_array_equal(grown, one[129:])
    ignored = chunk_keys(ROOT, tokens, 16, {999: b"a" * 32}, backend)
    np.testing.assert_array_equal(ignored, plain)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_extras_of_another_size_are_refused(size: int) -> None:
    with pytest.raises(LayoutError, match=f"extra of chunk 0 has {size} bytes, expected 32"):
        chunk_keys(ROOT, tokens_of(16), 16, {0: bytes(size)})


IDS = [0, 1, 151_935, 2**31 - 1, 7] * 13
INPUTS: dict[str, Tokens] = {
    "list": IDS,
    "tuple": tuple(IDS),
    "array": array.array("I", IDS),
    "array of int64": array.array("q", IDS),
    "uint32": np.array(IDS, np.uint32),
    "int32": np.array(IDS, np.int32),
    "int64": np.array(IDS, np.int64),
    "uint64": np.array(IDS, np.uint64),
    "big-endian": np.array(IDS, ">u4"),
    "strided": np.repeat(np.array(IDS, np.uint32), 2)[::2],
    "unaligned": np.frombuffer(b"\0" + np.array(IDS, np.uint32).tobytes(), np.uint8)[1:].view(np.uint32),
    "read-only": np.frombuffer(np.array(IDS, np.uint32).tobytes(), np.uint32),
    "torch": torch.tensor(IDS).numpy(),
    "numpy scalars": [np.int64(i) for i in IDS],
}


@pytest.mark.parametrize("name", INPUTS)
@both
def test_any_container_of_tokens_gives_the_same_keys(name: str, backend: Backend) -> None:
    np.testing.assert_array_equal(
        chunk_keys(ROOT, INPUTS[name], 16, backend=backend),
        chunk_keys(ROOT, np.array(IDS, np.uint32), 16, backend="ref"),
    )


def test_uint32_arrays_are_not_copied() -> None:
    tokens = tokens_of(10)
    assert as_tokens(tokens) is tokens
    assert as_tokens([2**32 - 1]).tolist() == [2**32 - 1]
    assert as_tokens([]).shape == (0,)


def test_a_list_may_hold_anything_with_an_integer_index() -> None:
    class Ids(list[int]):
        pass

    for ids in ([True, 2, np.uint32(3), np.int8(4)], Ids([1, 2, 3, 4]), (1, 2, 3, 4)):
        assert as_tokens(ids).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("bad", [
    pytest.param([1, -1], id="negative"),
    pytest.param([2**32], id="2^32"),
    pytest.param([2**70], id="2^70"),
    pytest.param([1.5], id="float"),
    pytest.param(["1"], id="text"),
    pytest.param("tokens", id="a text"),
    pytest.param([None], id="None"),
    pytest.param(None, id="no sequence"),
    pytest.param([[1, 2], [3, 4]], id="nested"),
    pytest.param(np.array([1, -1]), id="negative array"),
    pytest.param(np.array([2**32]), id="2^32 in an array"),
    pytest.param(np.array([2**63], np.uint64), id="2^63 in an array"),
    pytest.param(np.array([1.0]), id="float array"),
    pytest.param(np.array([True]), id="bool array"),
    pytest.param(np.zeros((2, 2), np.uint32), id="two dimensions"),
    pytest.param(np.uint32(3).reshape(()), id="no dimension"),
])  # fmt: skip
def test_values_that_are_no_tokens_are_refused(bad: Any) -> None:
    with pytest.raises(LayoutError, match=r"token"):
        chunk_keys(ROOT, bad, 1)


@pytest.mark.parametrize(
    "data", [b"\x01\x00\x00\x00\x02\x00\x00\x00", bytearray(8), b"abc"], ids=["bytes", "bytearray", "odd"]
)
def test_bytes_are_tokens_or_refused_but_never_words(data: bytes) -> None:
    """bytes are a Sequence[int]: each byte is one id, or the type is refused."""
    try:
        got = as_tokens(data).tolist()
    except LayoutError:
        return
    assert got == list(data)


@pytest.mark.parametrize("chunk_tokens", [0, -1])
def test_chunk_tokens_below_one(chunk_tokens: int) -> None:
    with pytest.raises(LayoutError, match=f"chunk_tokens is {chunk_tokens}"):
        chunk_keys(ROOT, tokens_of(4), chunk_tokens)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_root_is_32_bytes(size: int) -> None:
    with pytest.raises(LayoutError, match=f"root has {size} bytes"):
        ChainState.start(bytes(size))


@pytest.mark.parametrize("sizes", [
    *(pytest.param([36] * count, id=f"{count} keys") for count in (0, 1, 15, 16, 17, 1000)),
    pytest.param([36] * 20 + [32] + [36] * 20, id="one shorter"),
    pytest.param([35, 37] * 20, id="36 on average"),
    pytest.param([32] * 40, id="all shorter"),
    pytest.param([0, 1, 64, 65, 1024, 5000], id="any"),
])  # fmt: skip
def test_adopted_keys(sizes: list[int]) -> None:
    engine = [np.random.default_rng(i).bytes(size) for i, size in enumerate(sizes)]
    assert adopt_keys(ROOT, engine) == [blake3(key, key=ROOT).digest() for key in engine]


@settings(max_examples=60)
@given(
    st.binary(min_size=32, max_size=32),
    st.one_of(
        st.lists(st.binary(min_size=36, max_size=36), max_size=40), st.lists(st.binary(max_size=80), max_size=20)
    ),
)
def test_any_adopted_keys(root: bytes, engine: list[bytes]) -> None:
    assert adopt_keys(root, engine) == [blake3(key, key=root).digest() for key in engine]


@pytest.mark.parametrize("size", [0, 31, 33])
def test_adopted_keys_need_a_root_of_32_bytes(size: int) -> None:
    with pytest.raises(LayoutError, match=f"root has {size} bytes"):
        adopt_keys(bytes(size), [bytes(36)])


def test_adopted_keys_keep_hash_group_and_root_apart() -> None:
    engine = [h + g for h in (b"a" * 32, b"b" * 32) for g in (bytes(4), b"\0\0\0\1")]
    keys = {*adopt_keys(ROOT, engine), *adopt_keys(bytes(32), engine)}
    assert len(keys) == 8
    assert {len(k) for k in keys} == {32}
    assert adopt_keys(ROOT, []) == []


def run_script(script: str, **env: str) -> str:
    """Run `script` in a process of its own. Returns its standard output."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **env}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr or f"signal {-done.returncode}"
    return done.stdout


def test_nothing_behind_the_tokens_is_read() -> None:
    """The tokens end where readable memory ends. Idle lanes and whole-block loads must not read beyond that."""
    script = """
import ctypes, mmap
import numpy as np
from kvkern.kernels.chunk_keys import chunk_keys
size = 4 << 20
memory = mmap.mmap(-1, size + mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) == 0
words = np.frombuffer(memory, np.uint32, size // 4)
for chunk_tokens in (1, 15, 16, 17, 256):
    for chunks in (1, 17, 128, 300, 2000):
        tokens = words[max(0, len(words) - chunks * chunk_tokens) :]
        assert len(chunk_keys(bytes(32), tokens, chunk_tokens)) > 0
print("alive")
"""
    assert run_script(script) == "alive\n"


@pytest.mark.slow
def test_kernels_are_loaded_not_compiled_again(tmp_path: Path) -> None:
    """A second process finds every kernel in the cache. No kind of input compiles another version."""
    script = """
from numba.core import event
with event.install_recorder("numba:compile") as compiled:
    import numpy as np
    from kvkern.kernels.chunk_keys import adopt_keys, chunk_keys
    read_only = np.frombuffer(bytes(64 * 400), np.uint32)
    for tokens in (read_only, read_only.copy(), read_only[::2], read_only.tolist()):
        for chunk_tokens in (7, 16):
            chunk_keys(bytes(32), tokens, chunk_tokens)
    adopt_keys(bytes(32), [bytes(36)] * 20)
print(len(compiled.buffer))
"""
    counts = [int(run_script(script, NUMBA_CACHE_DIR=str(tmp_path))) for _ in range(2)]
    assert counts[0] > 0
    assert counts[1] == 0
