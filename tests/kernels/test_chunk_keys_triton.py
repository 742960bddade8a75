"""Key version 1 on the device: the published vectors and ragged batches, in Triton's interpreter and on a GPU.

One compression takes the interpreter 50 ms. So batches hold many sequences side by side, and start close to segment ends.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from blake3 import blake3

from kvkern.kernels.chain_state import ChainState
from kvkern.kernels.chunk_keys import chunk_keys, extend_keys, extend_keys_batch
from kvkern.kernels.errors import LayoutError
from kvkern.kernels.target import require_triton_device

VECTORS = json.loads((Path(__file__).parent.parent / "data" / "keys_vectors.json").read_text())
ROOT = bytes(range(32))
PIECE_CHUNKS = 9
interpret = pytest.mark.interpret
gpu = pytest.mark.gpu


@pytest.fixture(autouse=True, params=[pytest.param("cpu", marks=interpret), pytest.param("cuda", marks=gpu)])
def device(request: pytest.FixtureRequest) -> str:
    assert require_triton_device() == request.param
    return str(request.param)


def name_of(vector: dict[str, Any]) -> str:
    return str(vector["root_material_utf8"])


def tokens_of(count: int, seed: int = 0) -> npt.NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint32)


def state_at(chunks: int, chunk_tokens: int, seed: int) -> ChainState:
    """Return the state of a sequence with a root of its own that already has `chunks` chunks."""
    root = blake3(bytes([seed])).digest()
    return extend_keys(ChainState.start(root), tokens_of(chunks * chunk_tokens, seed), chunk_tokens, backend="ref")[1]


def check_batch(
    states: list[ChainState],
    sequences: list[npt.NDArray[np.uint32]],
    chunk_tokens: int,
    extras: list[dict[int, bytes]] | None = None,
) -> None:
    keys, after = extend_keys_batch(states, sequences, chunk_tokens, extras, "triton")
    want, want_after = extend_keys_batch(states, sequences, chunk_tokens, extras, "ref")
    for i, (mine, theirs) in enumerate(zip(keys, want, strict=True)):
        np.testing.assert_array_equal(mine, theirs, err_msg=f"sequence {i}")
    assert after == want_after


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=name_of)
def test_vectors(vector: dict[str, Any]) -> None:
    """Hash pieces of the sequence side by side. Each piece must end in the state that the next one started from."""
    size, root = vector["chunk_tokens"], bytes.fromhex(vector["root"])
    tokens = np.array(vector["tokens"], np.uint32)
    pieces = [tokens[at : at + PIECE_CHUNKS * size] for at in range(0, len(tokens), PIECE_CHUNKS * size)]
    starts = [ChainState.start(root)]
    for piece in pieces:
        starts.append(extend_keys(starts[-1], piece, size, backend="ref")[1])
    keys, ends = extend_keys_batch(starts[:-1], pieces, size, backend="triton")
    assert ends == starts[1:]
    whole = np.concatenate(keys)
    assert whole.shape == (vector["num_keys"], 32)
    assert blake3(whole.tobytes()).hexdigest() == vector["all_keys_blake3"]
    if len(whole):
        assert (whole[0].tobytes().hex(), whole[-1].tobytes().hex()) == (vector["first"], vector["last"])


@pytest.mark.parametrize("vector", [v for v in VECTORS["vectors"] if v["num_keys"] in (0, 1, 5)], ids=name_of)
def test_short_vectors_in_one_piece(vector: dict[str, Any]) -> None:
    keys = chunk_keys(bytes.fromhex(vector["root"]), vector["tokens"], vector["chunk_tokens"], backend="triton")
    assert len(keys) == vector["num_keys"]
    assert blake3(keys.tobytes()).hexdigest() == vector["all_keys_blake3"]


def test_extra_vector() -> None:
    extra = VECTORS["extra"]
    root = bytes.fromhex(VECTORS["namespaces"][extra["namespace"]]["root"])
    keys = chunk_keys(root, extra["tokens"], 16, {0: bytes.fromhex(extra["extra"])}, "triton")
    assert keys[0].tobytes().hex() == extra["key"]


@pytest.mark.parametrize("chunk_tokens", [1, 3, 16, 17, 33])
def test_ragged_batches(chunk_tokens: int) -> None:
    """Empty sequences, partial chunks, starts at and beside segment ends, more sequences than a warp has lanes."""
    starts = [0, 0, 1, 126, 127, 128, 129, 255, 256, 383] * 4
    chunks = [0, 3, 2, 1, 2, 3, 0, 3, 1, 2, 0, 0, 1] * 4
    states = [state_at(start, chunk_tokens, seed) for seed, start in enumerate(starts)]
    sequences = [tokens_of(count * chunk_tokens, seed + 99) for seed, count in enumerate(chunks[: len(states)])]
    check_batch(states, sequences, chunk_tokens)


@pytest.mark.parametrize("chunk_tokens", [3, 16])
def test_rows_of_sequences_that_end_in_partial_chunks(chunk_tokens: int, device: str) -> None:
    """Keys of sequence b start at row cu_tokens[b] // chunk_tokens. Rows of no whole chunk keep their bytes."""
    from kvkern.kernels import chunk_keys_triton

    lengths = [chunk_tokens * 2 + 1, chunk_tokens - 1, 0, chunk_tokens * 3 - 1, chunk_tokens, 1, chunk_tokens + 1, 2]
    states = [state_at(start, chunk_tokens, start) for start in (0, 127, 5, 126, 255, 0, 128, 1)]
    cu_tokens = np.concatenate([[0], np.cumsum(lengths)])
    tokens = tokens_of(int(cu_tokens[-1]))
    keys = torch.full((len(tokens) // chunk_tokens + 1, 32), 0xA5, dtype=torch.uint8, device=device)
    after = chunk_keys_triton.extend_keys(
        chunk_keys_triton.DeviceStates.upload(states, device), torch.from_numpy(tokens.view(np.int32)).to(device),
        torch.from_numpy(cu_tokens).to(device), chunk_tokens, keys,
    ).download([state.root for state in states])  # fmt: skip
    want = np.full(keys.shape, 0xA5, np.uint8)
    for b, state in enumerate(states):
        mine, end = extend_keys(state, tokens[cu_tokens[b] : cu_tokens[b + 1]], chunk_tokens, backend="ref")
        want[cu_tokens[b] // chunk_tokens :][: len(mine)] = mine
        assert after[b] == end
    np.testing.assert_array_equal(keys.cpu().numpy(), want)


def test_tensors_that_do_not_fit_are_refused(device: str) -> None:
    """int64 tokens would be read as twice as many int32 tokens, and only the first half would be hashed."""
    from kvkern.kernels import chunk_keys_triton

    states = chunk_keys_triton.DeviceStates.upload([ChainState.start(ROOT)], device)
    good: dict[str, Any] = {
        "tokens": torch.zeros(32, dtype=torch.int32, device=device), "cu_tokens": torch.tensor([0, 32], device=device),
        "chunk_tokens": 16, "keys": torch.zeros((2, 32), dtype=torch.uint8, device=device),
    }  # fmt: skip
    rows, extras = (
        torch.zeros(2, dtype=torch.int32, device=device),
        torch.zeros((1, 32), dtype=torch.uint8, device=device),
    )
    for bad, message in (
        ({"tokens": torch.zeros(32, dtype=torch.int64, device=device)}, "tokens is torch.int64"),
        ({"tokens": torch.zeros((32, 2), dtype=torch.int32, device=device)[:, 0]}, "tokens is .* strides"),
        ({"cu_tokens": torch.tensor([0, 32], dtype=torch.int32, device=device)}, "cu_tokens is torch.int32"),
        ({"keys": good["keys"][:1]}, r"expected contiguous uint8, \[>= 2, 32\]"),
        ({"extras": extras}, "go together"),
        ({"extras": extras, "extra_rows": rows[:1]}, "extra_rows is"),
    ):
        with pytest.raises(LayoutError, match=message):
            chunk_keys_triton.extend_keys(states, **{**good, **bad})


def test_sequences_over_several_segments() -> None:
    states = [state_at(start, 1, start) for start in (0, 5, 127)]
    check_batch(states, [tokens_of(count, count) for count in (300, 130, 128)], 1)


def test_no_sequences_and_no_chunks() -> None:
    assert extend_keys_batch([], [], 16, backend="triton") == ([], [])
    start = ChainState.start(ROOT)
    keys, after = extend_keys_batch([start, start], [[], [1, 2, 3]], 16, backend="triton")
    assert [k.shape for k in keys] == [(0, 32), (0, 32)]
    assert after == [start, start]


@pytest.mark.parametrize("chunk_tokens", [4, 16, 248])
def test_extras_of_some_chunks(chunk_tokens: int) -> None:
    """Extras also work for a chunk in the middle of a growing sequence. Indices outside the call are ignored."""
    states = [state_at(start, chunk_tokens, seed) for seed, start in enumerate((0, 127, 3))]
    sequences = [tokens_of(3 * chunk_tokens, seed) for seed in range(3)]
    extras = [{0: b"a" * 32, 2: b"b" * 32, 3: b"c" * 32}, {128: b"d" * 32, 0: b"e" * 32}, {}]
    check_batch(states, sequences, chunk_tokens, extras)


@pytest.mark.parametrize("chunk_tokens", [255, 257, 513, 770])
def test_trees_of_leaves(chunk_tokens: int) -> None:
    check_batch([ChainState.start(ROOT)], [tokens_of(chunk_tokens)], chunk_tokens)


@pytest.mark.parametrize(("chunk_tokens", "extras", "limit"), [(1025, None, 1024), (249, {0: bytes(32)}, 248)])
def test_chunks_that_are_too_long(chunk_tokens: int, extras: Any, limit: int) -> None:
    with pytest.raises(LayoutError, match=rf"chunk_tokens is {chunk_tokens}.*\[1, {limit}\]"):
        extend_keys(ChainState.start(ROOT), tokens_of(chunk_tokens), chunk_tokens, extras, "triton")


@gpu
def test_three_launches_and_no_synchronisation() -> None:
    """A stream under capture refuses every synchronisation, so a capture proves that there is none."""
    from kvkern.kernels import chunk_keys_triton

    states = chunk_keys_triton.DeviceStates.upload([ChainState.start(ROOT)] * 2, "cuda")
    tokens = torch.from_numpy(tokens_of(4096).view(np.int32)).cuda()
    cu_tokens = torch.tensor([0, 1000, 4096], device="cuda")
    keys = torch.zeros((256, 32), dtype=torch.uint8, device="cuda")
    chunk_keys_triton.extend_keys(states, tokens, cu_tokens, 16, keys)  # compiles
    keys.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chunk_keys_triton.extend_keys(states, tokens, cu_tokens, 16, keys)
    graph.replay()
    want = chunk_keys(ROOT, tokens_of(4096)[1000:], 16)
    np.testing.assert_array_equal(keys[1000 // 16 : 1000 // 16 + len(want)].cpu().numpy(), want)
