"""GPU backend of `chunk_keys`: the keys of a ragged batch of sequences in three launches, without a host synchronisation.

    1  one lane per segment:   c_i of its chunks, one after the other                  parallel over segments and sequences
    2  one lane per sequence:  the key at the end of each segment, the parent of the next    one compression per segment
    3  one lane per chunk:     key_i = keyed_hash(parent of its segment, c_i)                           parallel over chunks

Formula in chunk_keys_ref.py. The host knows how many tokens and sequences there are, but not where a sequence ends. So the
kernels compute places from `cu_tokens` by floor divisions. Places never overlap, because floor(a) + floor(b) <= floor(a + b).
With s = cu_tokens[b]: the keys of sequence b start at row s // chunk_tokens, its segments at slot
s // (128 * chunk_tokens) + 2 * b. Rows that belong to no whole chunk keep what they hold.
BLAKE3: https://github.com/BLAKE3-team/BLAKE3-specs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from .chain_state import ChainState
from .chunk_keys_ref import SEGMENT_CHUNKS, segment_key
from .errors import LayoutError
from .target import register_limit, require_current_device, require_triton_device

MAX_TOKENS = 1024  # tokens of a chunk: four leaves of BLAKE3's tree
MAX_TOKENS_WITH_EXTRAS = 248  # tokens of a chunk with an extra: one leaf
MAX_REGISTERS = 128
_SEGMENT_LANES = 32  # one warp per program, so that a launch of few segments spreads over many SMs
_KEY_LANES = 128


@triton.jit
def _mix(a, b, c, d, x, y):
    a = a + b + x
    d = d ^ a
    d = (d >> 16) | (d << 16)
    c = c + d
    b = b ^ c
    b = (b >> 12) | (b << 20)
    a = a + b + y
    d = d ^ a
    d = (d >> 8) | (d << 24)
    c = c + d
    b = b ^ c
    b = (b >> 7) | (b << 25)
    return a, b, c, d


@triton.jit
def _compress(h, m, counter, nbytes, flags):
    """Return the next h. h, m: 8 and 16 uint32 tensors of one shape. counter: index of the leaf. The others may be tensors."""
    zero = h[0] ^ h[0]
    a0, a1, a2, a3, b0, b1, b2, b3 = h
    c0, c1, c2, c3 = zero + 0x6A09E667, zero + 0xBB67AE85, zero + 0x3C6EF372, zero + 0xA54FF53A
    d0, d1, d2, d3 = zero + counter, zero, zero + nbytes, zero + flags
    for _ in tl.static_range(7):
        a0, b0, c0, d0 = _mix(a0, b0, c0, d0, m[0], m[1])
        a1, b1, c1, d1 = _mix(a1, b1, c1, d1, m[2], m[3])
        a2, b2, c2, d2 = _mix(a2, b2, c2, d2, m[4], m[5])
        a3, b3, c3, d3 = _mix(a3, b3, c3, d3, m[6], m[7])
        a0, b1, c2, d3 = _mix(a0, b1, c2, d3, m[8], m[9])
        a1, b2, c3, d0 = _mix(a1, b2, c3, d0, m[10], m[11])
        a2, b3, c0, d1 = _mix(a2, b3, c0, d1, m[12], m[13])
        a3, b0, c1, d2 = _mix(a3, b0, c1, d2, m[14], m[15])
        m = (m[2], m[6], m[3], m[10], m[7], m[0], m[4], m[13], m[1], m[11], m[12], m[5], m[9], m[14], m[15], m[8])
    return a0 ^ c0, a1 ^ c1, a2 ^ c2, a3 ^ c3, b0 ^ d0, b1 ^ d1, b2 ^ d2, b3 ^ d3


@triton.jit
def _load8(ptr, at, mask):
    """Return 8 uint32 tensors: the words of row `at` of an [n, 8] int32 table."""
    out = ()
    for word in tl.static_range(8):
        out += (tl.load(ptr + at * 8 + word, mask, other=0).to(tl.uint32, bitcast=True),)
    return out


@triton.jit
def _store8(ptr, at, h, mask):
    for word in tl.static_range(8):
        tl.store(ptr + at * 8 + word, h[word].to(tl.int32, bitcast=True), mask)


@triton.jit
def _select8(condition, yes, no):
    out = ()
    for word in tl.static_range(8):
        out += (tl.where(condition, yes[word], no[word]),)
    return out


@triton.jit
def _leaf(
    key, tokens_ptr, at, extras_ptr, extra, live,
    INDEX: tl.constexpr, CHUNK_TOKENS: tl.constexpr, EXTRAS: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """Hash leaf INDEX (at most 256 words) of the tokens from `at` on, then the 8 words of row `extra` unless that is -1."""
    words = tl.zeros_like(at) + tl.minimum(CHUNK_TOKENS - 256 * INDEX, 256)
    if EXTRAS:
        words += tl.where(extra >= 0, 8, 0)
    h = key
    for block in range((min(CHUNK_TOKENS - 256 * INDEX, 256) + (8 if EXTRAS else 0) + 15) // 16):
        m = ()
        for i in tl.static_range(16):
            word = 256 * INDEX + block * 16 + i
            value = tl.load(tokens_ptr + at + word, live & (word < CHUNK_TOKENS), other=0)
            if EXTRAS:
                in_extra = live & (extra >= 0) & (word >= CHUNK_TOKENS) & (word < CHUNK_TOKENS + 8)
                value += tl.load(extras_ptr + extra * 8 + word - CHUNK_TOKENS, in_extra, other=0)
            m += (value.to(tl.uint32, bitcast=True),)
        left = words - block * 16
        flags = 16 + tl.where(left <= 16, END, 0) + (1 if block == 0 else 0)  # KEYED, END, CHUNK_START
        after = _compress(h, m, INDEX, (tl.minimum(left, 16) * 4).to(tl.uint32), flags.to(tl.uint32))
        h = _select8(left > 0, after, h)
    return h


@triton.jit
def _tree(key, tokens_ptr, at, extras_ptr, extra, live, CHUNK_TOKENS: tl.constexpr):
    """Hash two to four leaves and their parents."""
    left = _compress(
        key,
        _leaf(key, tokens_ptr, at, extras_ptr, extra, live, 0, CHUNK_TOKENS, False, 2)
        + _leaf(key, tokens_ptr, at, extras_ptr, extra, live, 1, CHUNK_TOKENS, False, 2),
        0, 64, 28 if CHUNK_TOKENS <= 512 else 20,
    )  # KEYED | PARENT, and ROOT  # fmt: skip
    if CHUNK_TOKENS > 512:
        right = _leaf(key, tokens_ptr, at, extras_ptr, extra, live, 2, CHUNK_TOKENS, False, 2)
        if CHUNK_TOKENS > 768:
            last = _leaf(key, tokens_ptr, at, extras_ptr, extra, live, 3, CHUNK_TOKENS, False, 2)
            right = _compress(key, right + last, 0, 64, 20)
        left = _compress(key, left + right, 0, 64, 28)
    return left


@triton.jit
def _hash32(key, c):
    """Return the keyed_hash of 32 bytes: one block that is first, last and root."""
    zero = c[0] ^ c[0]
    m = c + (zero, zero, zero, zero, zero, zero, zero, zero)
    return _compress(key, m, 0, 32, 27)  # KEYED | ROOT | CHUNK_END | CHUNK_START


@triton.jit
def _find(cu_tokens_ptr, num_sequences, place, tokens_per_place, slack):
    """Return the last sequence b with cu_tokens[b] // tokens_per_place + slack * b <= place."""
    low = tl.zeros_like(place)
    high = low + num_sequences - 1
    width = num_sequences
    while width > 1:
        middle = (low + high + 1) // 2
        start = tl.load(cu_tokens_ptr + middle) // tokens_per_place + slack * middle
        low = tl.where(start <= place, middle, low)
        high = tl.where(start <= place, high, middle - 1)
        width = (width + 1) // 2
    return low


@triton.jit
def _span(cu_tokens_ptr, num_chunks_ptr, sequence, mask, CHUNK_TOKENS: tl.constexpr):
    """Return (first token, index of the first chunk, index behind the last whole chunk) of each sequence."""
    begin = tl.load(cu_tokens_ptr + sequence, mask, other=0)
    end = tl.load(cu_tokens_ptr + sequence + 1, mask, other=0)
    first = tl.load(num_chunks_ptr + sequence, mask, other=0)
    return begin, first, first + (end - begin) // CHUNK_TOKENS


@triton.jit(do_not_specialize=["num_sequences", "num_slots"])
def chain_segments(
    tokens_ptr,  # [total] int32
    cu_tokens_ptr,  # [sequences + 1] int64
    num_chunks_ptr,  # [sequences] int64, of the previous states
    segment_keys_ptr,  # [sequences, 8] int32
    chain_in_ptr,  # [sequences, 8] int32, of the previous states
    extra_rows_ptr,  # [rows] int32: row in `extras`, or -1
    extras_ptr,  # [extras, 8] int32
    chains_ptr,  # out: [rows, 8] int32: c_i
    chain_out_ptr,  # out: [sequences, 8] int32
    num_sequences,
    num_slots,
    CHUNK_TOKENS: tl.constexpr,
    EXTRAS: tl.constexpr,
    LANES: tl.constexpr,
):
    slot = (tl.program_id(0) * LANES + tl.arange(0, LANES)).to(tl.int64)
    mask = slot < num_slots
    sequence = _find(cu_tokens_ptr, num_sequences, slot, 128 * CHUNK_TOKENS, 2)
    begin, first, end = _span(cu_tokens_ptr, num_chunks_ptr, sequence, mask, CHUNK_TOKENS)
    segment = first // 128 + slot - (begin // (128 * CHUNK_TOKENS) + 2 * sequence)
    low = tl.maximum(first, segment * 128)
    high = tl.minimum(end, segment * 128 + 128)
    count = tl.where(mask, high - low, 0)
    seeds = _load8(segment_keys_ptr, sequence, mask)
    chain = _select8(low % 128 == 0, seeds, _load8(chain_in_ptr, sequence, mask))
    for step in range(tl.max(count, 0)):
        live = step < count
        chunk = low - first + step  # index within this call
        row = begin // CHUNK_TOKENS + chunk
        at = begin + chunk * CHUNK_TOKENS
        if EXTRAS:
            extra = tl.load(extra_rows_ptr + row, live, other=-1).to(tl.int64)
        else:
            extra = tl.zeros_like(slot) - 1
        if CHUNK_TOKENS <= 256:
            h = _leaf(chain, tokens_ptr, at, extras_ptr, extra, live, 0, CHUNK_TOKENS, EXTRAS, 10)  # CHUNK_END | ROOT
        else:
            h = _tree(chain, tokens_ptr, at, extras_ptr, extra, live, CHUNK_TOKENS)
        chain = _select8(live, h, chain)
        _store8(chains_ptr, row, chain, live)
    _store8(chain_out_ptr, sequence, chain, (count > 0) & (high == end))


@triton.jit(do_not_specialize=["num_sequences"])
def chain_parents(
    cu_tokens_ptr,  # [sequences + 1] int64
    num_chunks_ptr,  # [sequences] int64
    segment_ends_ptr,  # [sequences, 8] int32, of the previous states
    chains_ptr,  # [rows, 8] int32
    parents_ptr,  # out: [slots, 8] int32
    segment_ends_out_ptr,  # out: [sequences, 8] int32
    num_chunks_out_ptr,  # out: [sequences] int64
    num_sequences,
    CHUNK_TOKENS: tl.constexpr,
    LANES: tl.constexpr,
):
    sequence = (tl.program_id(0) * LANES + tl.arange(0, LANES)).to(tl.int64)
    mask = sequence < num_sequences
    begin, first, end = _span(cu_tokens_ptr, num_chunks_ptr, sequence, mask, CHUNK_TOKENS)
    slot = begin // (128 * CHUNK_TOKENS) + 2 * sequence
    num_segments = tl.where(end > first, (end - 1) // 128 - first // 128 + 1, 0)
    parent = _load8(segment_ends_ptr, sequence, mask)
    for step in range(tl.max(num_segments, 0)):
        _store8(parents_ptr, slot + step, parent, step < num_segments)
        behind = (first // 128 + step + 1) * 128  # chunk index behind this segment
        whole = (step < num_segments) & (behind <= end)
        c = _load8(chains_ptr, begin // CHUNK_TOKENS + behind - 1 - first, whole)
        parent = _select8(whole, _hash32(parent, c), parent)
    _store8(segment_ends_out_ptr, sequence, parent, mask)
    tl.store(num_chunks_out_ptr + sequence, end, mask)


@triton.jit(do_not_specialize=["num_sequences", "num_rows"])
def chunk_keys_of_chains(
    cu_tokens_ptr,  # [sequences + 1] int64
    num_chunks_ptr,  # [sequences] int64
    chains_ptr,  # [rows, 8] int32
    parents_ptr,  # [slots, 8] int32
    keys_ptr,  # out: [rows, 8] int32
    num_sequences,
    num_rows,
    CHUNK_TOKENS: tl.constexpr,
    LANES: tl.constexpr,
):
    row = (tl.program_id(0) * LANES + tl.arange(0, LANES)).to(tl.int64)
    mask = row < num_rows
    sequence = _find(cu_tokens_ptr, num_sequences, row, CHUNK_TOKENS, 0)
    begin, first, end = _span(cu_tokens_ptr, num_chunks_ptr, sequence, mask, CHUNK_TOKENS)
    chunk = first + row - begin // CHUNK_TOKENS
    mask &= chunk < end
    slot = begin // (128 * CHUNK_TOKENS) + 2 * sequence + chunk // 128 - first // 128
    _store8(keys_ptr, row, _hash32(_load8(parents_ptr, slot, mask), _load8(chains_ptr, row, mask)), mask)


@dataclass(frozen=True, slots=True)
class DeviceStates:
    """The `ChainState`s of a batch, on the device. Words are little-endian uint32 in int32 tensors."""

    segment_keys: torch.Tensor  # [sequences, 8] int32
    num_chunks: torch.Tensor  # [sequences] int64
    chains: torch.Tensor  # [sequences, 8] int32
    segment_ends: torch.Tensor  # [sequences, 8] int32

    @classmethod
    def upload(cls, states: Sequence[ChainState], device: torch.device | str) -> DeviceStates:
        """Copy host states to the device."""
        segment_keys = {root: segment_key(root) for root in {state.root for state in states}}
        rows = [[segment_keys[s.root] for s in states], [s.chain for s in states], [s.segment_end for s in states]]
        tables = torch.from_numpy(np.frombuffer(b"".join(map(b"".join, rows)), dtype=np.int32).copy())
        keys, chains, ends = tables.to(device).view(3, len(states), 8)
        counts = torch.tensor([state.num_chunks for state in states], dtype=torch.int64, device=device)
        return cls(keys, counts, chains, ends)

    def download(self, roots: Sequence[bytes]) -> list[ChainState]:
        """Copy the states to the host. Waits for the device."""
        chains, ends = (t.cpu().numpy().view("V32").reshape(-1).tolist() for t in (self.chains, self.segment_ends))
        fields = zip(roots, self.num_chunks.tolist(), chains, ends, strict=True)
        return [ChainState(*state) for state in fields]


def _check_arguments(
    tokens: torch.Tensor,
    cu_tokens: torch.Tensor,
    chunk_tokens: int,
    keys: torch.Tensor,
    extra_rows: torch.Tensor | None,
    extras: torch.Tensor | None,
) -> None:
    limit = MAX_TOKENS if extras is None else MAX_TOKENS_WITH_EXTRAS
    if not 1 <= chunk_tokens <= limit:
        raise LayoutError(f"chunk_tokens is {chunk_tokens}, but on a GPU it must be in [1, {limit}]: use backend='ref'")
    require_current_device(tokens.device)
    words = (torch.int32, torch.uint32)
    _check_tensor("tokens", tokens, words, tokens.dim() == 1, "1 dimension")
    _check_tensor("cu_tokens", cu_tokens, (torch.int64,), cu_tokens.dim() == 1 and cu_tokens.numel() > 0, "1 dimension")
    rows = tokens.numel() // chunk_tokens
    fits = keys.dim() == 2 and keys.shape[1] == 32 and len(keys) >= rows
    _check_tensor("keys", keys, (torch.uint8,), fits, f"[>= {rows}, 32]")
    if (extra_rows is None) != (extras is None):
        raise LayoutError("only one of extra_rows and extras was given, but they go together: give both or neither")
    if extra_rows is not None and extras is not None:
        _check_tensor("extra_rows", extra_rows, (torch.int32,), extra_rows.shape == (rows,), f"[{rows}]")
        _check_tensor("extras", extras, (torch.uint8,), extras.dim() == 2 and extras.shape[1] == 32, "[n, 32]")


def _check_tensor(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], fits: bool, shape: str) -> None:
    if tensor.dtype not in dtypes or not fits or not tensor.is_contiguous():
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise LayoutError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}, "
            f"expected contiguous {kinds}, {shape}"
        )


def extend_keys(
    states: DeviceStates,
    tokens: torch.Tensor,  # [total] int32 or uint32 on the device: the sequences one after the other
    cu_tokens: torch.Tensor,  # [sequences + 1] int64 on the device: sequence b is tokens[cu[b]:cu[b + 1]]; cu[-1] == total
    chunk_tokens: int,
    keys: torch.Tensor,  # out: [>= total // chunk_tokens, 32] uint8; sequence b starts at row cu[b] // chunk_tokens
    extra_rows: torch.Tensor
    | None = None,  # [total // chunk_tokens] int32, per row of `keys`: row of `extras`, -1: text
    extras: torch.Tensor | None = None,  # [n, 32] uint8
) -> DeviceStates:
    """Enqueue the keys of all whole chunks on the current stream. Returns the states after them. Partial chunks have no key.

    Raises LayoutError if a chunk is longer than MAX_TOKENS (with extras: MAX_TOKENS_WITH_EXTRAS), or a tensor does not fit.
    """
    _check_arguments(tokens, cu_tokens, chunk_tokens, keys, extra_rows, extras)
    num_sequences, total = cu_tokens.numel() - 1, tokens.numel()
    num_rows, num_slots = total // chunk_tokens, total // (SEGMENT_CHUNKS * chunk_tokens) + 2 * num_sequences
    device = tokens.device
    chains = torch.empty((num_rows, 8), dtype=torch.int32, device=device)
    parents = torch.empty((num_slots, 8), dtype=torch.int32, device=device)
    out = DeviceStates(
        states.segment_keys, torch.empty_like(states.num_chunks), states.chains.clone(), torch.empty_like(states.chains)
    )
    if not num_sequences:
        return out
    chain_segments[(triton.cdiv(num_slots, _SEGMENT_LANES),)](
        tokens.view(torch.int32), cu_tokens, states.num_chunks, states.segment_keys, states.chains,  # inputs
        tokens if extra_rows is None else extra_rows, tokens if extras is None else extras.view(torch.int32),
        chains, out.chains,  # outputs
        num_sequences, num_slots,  # sizes
        CHUNK_TOKENS=chunk_tokens, EXTRAS=extras is not None, LANES=_SEGMENT_LANES,  # constants
        num_warps=1, **register_limit(MAX_REGISTERS),  # options
    )  # fmt: skip
    chain_parents[(triton.cdiv(num_sequences, _SEGMENT_LANES),)](
        cu_tokens, states.num_chunks, states.segment_ends, chains,  # inputs
        parents, out.segment_ends, out.num_chunks,  # outputs
        num_sequences,  # sizes
        CHUNK_TOKENS=chunk_tokens, LANES=_SEGMENT_LANES,  # constants
        num_warps=1, **register_limit(MAX_REGISTERS),  # options
    )  # fmt: skip
    if num_rows:
        chunk_keys_of_chains[(triton.cdiv(num_rows, _KEY_LANES),)](
            cu_tokens, states.num_chunks, chains, parents,  # inputs
            keys.view(torch.int32),  # outputs
            num_sequences, num_rows,  # sizes
            CHUNK_TOKENS=chunk_tokens, LANES=_KEY_LANES,  # constants
            num_warps=4, **register_limit(MAX_REGISTERS),  # options
        )  # fmt: skip
    return out


def extend_keys_from_host(
    states: Sequence[ChainState],
    sequences: Sequence[npt.NDArray[np.uint32]],  # whole chunks
    chunk_tokens: int,
    extras: Sequence[Mapping[int, bytes]],  # one per state: chunk index -> 32 bytes
) -> tuple[list[npt.NDArray[np.uint8]], list[ChainState]]:
    """Run `extend_keys` on host arrays: one upload, three launches, one wait. See chunk_keys.extend_keys_batch."""
    device = require_triton_device()
    if not states:
        return [], []
    cu_tokens = np.concatenate([[0], np.cumsum([len(tokens) for tokens in sequences])]).astype(np.int64)
    tokens = np.concatenate([np.empty(0, np.uint32), *sequences]).view(np.int32)
    keys = torch.empty((len(tokens) // chunk_tokens, 32), dtype=torch.uint8, device=device)
    first_rows = cu_tokens // chunk_tokens
    extra_rows = np.full(len(keys), -1, dtype=np.int32)
    found: list[bytes] = []
    for state, (begin, end), items in zip(states, itertools.pairwise(first_rows), extras, strict=True):
        for index, extra in items.items():
            if 0 <= (row := begin + index - state.num_chunks) - begin < end - begin:
                extra_rows[row] = len(found)
                found.append(extra)
    tables = {}
    if found:
        table = np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, 32).copy()
        tables = {"extra_rows": torch.from_numpy(extra_rows).to(device), "extras": torch.from_numpy(table).to(device)}
    after = extend_keys(
        DeviceStates.upload(states, device), torch.from_numpy(tokens).to(device), torch.from_numpy(cu_tokens).to(device),
        chunk_tokens, keys, **tables,
    )  # fmt: skip
    host = keys.cpu().numpy()
    return [host[a:b] for a, b in itertools.pairwise(first_rows)], after.download([state.root for state in states])
