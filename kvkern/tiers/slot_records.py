"""The manager's own record of every slot, in private memory: generation, what the header said, and its tail's fingerprint.

Every process that maps the arena can write all of it, and a bit may flip there. So nothing that a decision depends on is read
from a header twice: a header is copied once, checked, and recorded. From then on the record counts. It knows no index.
"""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt

from ..arena.file import Slots
from ..arena.slots import HEAD, MAX_GENERATION, SlotState, fingerprints

_RECORD = np.dtype(
    [
        ("namespace", "V32"), ("generation", "<u8"), ("fingerprint", "<u8"),
        ("group", "<u4"), ("chunk_tokens", "<u4"), ("position", "<u4"), ("private", "<u4"), ("writer", "<u4"),
    ],
    align=True,
)  # fmt: skip
_COPIED = ("namespace", "group", "chunk_tokens", "position", "private")
MAX_CHUNK_TOKENS = 1 << 20  # a header that says more is wrong; 0 is recorded then: unknown
_FRESH_BITS = 61  # of the generation that replaces an impossible one: it is below MAX_GENERATION, and no writer has it


class SlotRecords:
    """The records of one arena. `rows[slot]` is the record of a slot. Not thread-safe."""

    def __init__(self, arena: Slots) -> None:
        self._arena = arena
        self._tails = arena.spec.geometry.tail_words(arena.headers)
        self.rows = np.zeros(arena.spec.num_slots, dtype=_RECORD)
        self.fingerprints: npt.NDArray[np.uint64] = self.rows["fingerprint"]  # [num_slots] uint64, of complete slots
        # An arena that was used before has generations. One that no manager can have given is replaced.
        generations: npt.NDArray[np.uint64] = arena.headers["generation"].copy()
        for slot in np.flatnonzero(generations > MAX_GENERATION).tolist():
            generations[slot] = secrets.randbits(_FRESH_BITS)
        self.rows["generation"] = generations

    def next_generations(
        self,
        slots: npt.NDArray[np.int64],  # [n] int64, all different
    ) -> npt.NDArray[np.uint64]:
        """Raise the generations of these slots by one, so that a late writer of the old chunk changes nothing. Returns them."""
        generations: npt.NDArray[np.uint64] = self.rows["generation"][slots] + np.uint64(1)
        self.rows["generation"][slots] = generations
        return generations

    def begin_grant(
        self,
        slots: npt.NDArray[np.int64],  # [n] int64, all different
    ) -> npt.NDArray[np.uint64]:
        """Make the headers of slots that a client will fill. Returns their generations."""
        generations, headers = self.next_generations(slots), self._arena.headers
        values = {
            "generation": generations,  # so that a former owner of the slot cannot complete it
            "namespace": np.void(bytes(32)),  # the slot has no chunk yet, so a clear of a namespace ignores it
            "owner_pid": 0, "owner_start": 0, "state": SlotState.WRITING,  # the next daemon reads these
        }  # fmt: skip
        for name, value in values.items():
            headers[name][slots] = value
        return generations

    def note_heads(
        self,
        slots: npt.NDArray[np.int64],  # [n] int64
        heads: npt.NDArray[np.void],  # [n] of slots.HEAD, copies
    ) -> None:
        """Record what these headers say of their chunks."""
        for name in _COPIED:
            self.rows[name][slots] = heads[name]
        tokens = heads["chunk_tokens"]
        if (tokens > MAX_CHUNK_TOKENS).any():
            self.rows["chunk_tokens"][slots] = np.where(tokens > MAX_CHUNK_TOKENS, np.uint32(0), tokens)

    def complete(
        self,
        slots: npt.NDArray[np.int64],  # [n] int64
        generations: npt.NDArray[np.uint64],  # [n] uint64
    ) -> npt.NDArray[np.bool_]:
        """[n] bool: True where every rank has written this generation. Records the tails that it has seen."""
        tails = self._tails[slots]
        self.fingerprints[slots] = fingerprints(tails)
        world_size = self._arena.spec.geometry.world_size
        written: npt.NDArray[np.bool_] = (tails[:, :world_size] == generations[:, None]).all(axis=1)
        return written

    def complete_as(
        self,
        slots: npt.NDArray[np.int64],  # [n] int64
        generations: npt.NDArray[np.uint64],  # [n] uint64
        keys: npt.NDArray[np.void],  # [n] V32
        namespace: bytes,  # 32-byte root
        writer: int,  # pid, for messages
    ) -> npt.NDArray[np.bool_]:
        """[n] bool: True where the header also names this chunk and generation. Records what it has seen."""
        heads = self._arena.heads[slots].view(HEAD)
        self.note_heads(slots, heads)
        self.rows["writer"][slots] = writer
        good = self.complete(slots, generations)
        good &= heads["identity"] == self._arena.spec.geometry.identities(keys, np.void(namespace))
        good &= (heads["generation"] == generations) & (heads["codec"] == 0)
        return good

    def agree(
        self,
        slots: npt.NDArray[np.int64],  # [n] int64, complete
        headers: npt.NDArray[np.void]
        | None = None,  # [n] of SlotGeometry.dtype, copies of these slots'; None: copy them now
    ) -> npt.NDArray[np.bool_]:
        """[n] bool: True where generation, namespace and tail of the header are as they were recorded."""
        found = self._arena.headers[slots] if headers is None else headers
        rows, geometry = self.rows[slots], self._arena.spec.geometry
        good: npt.NDArray[np.bool_] = fingerprints(geometry.tail_words(found)) == rows["fingerprint"]
        good &= (found["generation"] == rows["generation"]) & (found["namespace"] == rows["namespace"])
        return good

    def describe_bad(self, slots: list[int]) -> str:
        """Say of chunks that did not verify whether their headers changed after publication, and who had stored them."""
        at = np.array(slots, dtype=np.int64)
        changed = int((~self.agree(at)).sum())
        writers = sorted({pid for pid in self.rows["writer"][at].tolist() if pid})
        by = f" They were stored by pid {', '.join(map(str, writers[:8]))}." if writers else ""
        if not changed:
            return f"{len(slots)} with other bytes than were stored.{by}"
        return (
            f"{changed} of {len(slots)} with another header than when they were published: some process that maps the arena "
            f"has written it.{by}"
        )
