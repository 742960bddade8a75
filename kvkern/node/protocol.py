"""The messages between the node's daemon and its clients, and their limits. How they travel: framing.py.

A connection starts with Hello. The daemon answers with Welcome, beside which the arena's descriptor travels, or with
Refused. Keys travel as one byte string of 32 bytes each. KV bytes never travel: they lie in the arena.

Version 4: Acquired carries fingerprints of the headers as they were when the chunks were published, so that a reader sees
when another client has rewritten one; its slots are packed. MAX_SPEED is lower. Both sides must have the same version.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from ..arena.slots import SlotGeometry
from ..errors import KvkernError
from ..keys import KEY_NBYTES
from ..policy.base import Stop, Use

VERSION = 4
MAX_KEYS = 65_536  # in one message
MAX_SLOTS = 65_536
MAX_ROWS = 1000  # in one Answer
MAX_SUMS = 1 << 16  # checksums in a slot's header: planes of all ranks
MAX_AGE_S = 1e7  # age of a request at its end
MAX_SPEED = 1e7  # prefill speed, tokens/s; no engine computes faster
OVERVIEW = (
    b"kvkern: overview"  # as the prefix of List: a row `overview`, which is JSON, instead of chunks; no key begins so
)
STAYING_REFUSALS = (  # what such a refusal says, beside its numbers
    "may not use this cache",  # another user's engine
    "may operate this cache, but not read it",
    "that the daemon's user namespace does not know",
    "the daemon cannot see process",
    "this cache holds chunks of",  # slots of another model
)
MAX_NAME = 256  # characters of an engine's name, or of a field of a namespace

Id = Annotated[int, Meta(ge=0, lt=1 << 53)]
Count = Annotated[int, Meta(ge=0, le=MAX_SLOTS)]
Size = Annotated[int, Meta(ge=1, lt=1 << 46)]
Slot = Annotated[int, Meta(ge=0, lt=1 << 40)]
Generation = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Root = Annotated[bytes, Meta(min_length=32, max_length=32)]
Keys = Annotated[bytes, Meta(max_length=KEY_NBYTES * MAX_KEYS)]
Name = Annotated[str, Meta(max_length=MAX_NAME)]
PackedSlots = Annotated[bytes, Meta(max_length=4 * MAX_SLOTS)]  # u32 each, little-endian
Fingerprints = Annotated[bytes, Meta(max_length=8 * MAX_SLOTS)]  # u64 each, little-endian
Slots = Annotated[list[Slot], Meta(max_length=MAX_SLOTS)]
Generations = Annotated[list[Generation], Meta(max_length=MAX_SLOTS)]
Tokens = Annotated[int, Meta(ge=0, lt=1 << 31)]
OutputTokens = Annotated[int, Meta(ge=-1, lt=1 << 31)]
RequestNumber = Annotated[int, Meta(ge=0, lt=1 << 32)]
Ids = Annotated[list[Id], Meta(max_length=MAX_SLOTS)]


class ProtocolError(KvkernError):
    """The other side broke the protocol. The connection ends."""


class Geometry(Struct, array_like=True, forbid_unknown_fields=True):
    """Sizes of the slots that an engine needs; see arena.slots.SlotGeometry."""

    part_nbytes: Size
    max_planes: Annotated[int, Meta(ge=1, le=1 << 16)]
    world_size: Annotated[int, Meta(ge=1, le=1 << 10)]

    @classmethod
    def from_slots(cls, geometry: SlotGeometry) -> Geometry:
        """Return the message's form of a slot geometry."""
        return cls(geometry.part_nbytes, geometry.max_planes, geometry.world_size)

    def to_slots(self) -> SlotGeometry:
        """Return the slot geometry. Raises ProtocolError if its headers would be absurdly large."""
        if self.max_planes * self.world_size > MAX_SUMS:
            raise ProtocolError(
                f"{self.max_planes} planes of {self.world_size} ranks are more than {MAX_SUMS} checksums in a header; "
                f"use fewer ranks or layers per cache"
            )
        return SlotGeometry(self.part_nbytes, self.max_planes, self.world_size)


class _Message(Struct, array_like=True, forbid_unknown_fields=True):
    """A message is an array: its fields travel without names, in the order in which they stand in the class.

    Acquire, Publish and Finish end with the same four fields of a request. A base class cannot hold them: msgspec puts the
    fields of a base first, and that would change the frames. `request_fields` fills them in, `to_use` reads them.
    """


# -- client to daemon ---------------------------------------------------------------------------------------------------


class Hello(_Message, tag=1):
    """The first message. Without a geometry the client is an operator: it gets no arena and no slots."""

    version: Annotated[int, Meta(ge=0, lt=1 << 16)]
    engine: Name = ""  # the same for all processes of an engine: what one holds lives as long as any of them
    geometry: Geometry | None = None
    index: bool = False  # send the index and its changes; a worker, which only copies, needs neither


class Describe(_Message, tag=2):
    """Say what a namespace root stands for; fields as in keys.Namespace. Answered by Described."""

    id: Id
    root: Root
    fields: Annotated[dict[Name, Name], Meta(max_length=16)]


class Acquire(_Message, tag=3):
    """Pin the longest cached prefix, or with `prefix=False` all cached chunks. Answered by Acquired.

    The last four fields say what is known of the request, as in policy.base.Use. Its numbers are the client's own.
    """

    id: Id
    keys: Keys
    prefix: bool
    namespace: Annotated[bytes, Meta(max_length=32)] = b""  # 32-byte root; empty: only what is in DRAM
    request: RequestNumber = 0
    output_tokens: OutputTokens = -1
    stop: Stop = Stop.UNKNOWN
    session: Id = 0


class Release(_Message, tag=4):
    """End leases. Slots marked BAD meanwhile are dropped. Not answered."""

    leases: Ids


class Grant(_Message, tag=5):
    """Ask for slots to write into. Answered by Granted, perhaps with fewer."""

    id: Id
    count: Count


class Publish(_Message, tag=6):
    """Say which chunks were written into which granted slots. Answered by Published. The last four fields are as in Acquire."""

    id: Id
    namespace: Root
    slots: Slots
    generations: Generations
    keys: Keys  # keys[i] was written into slots[i]
    chain: Keys  # the sequence, from its first chunk on
    request: RequestNumber = 0
    output_tokens: OutputTokens = -1
    stop: Stop = Stop.UNKNOWN
    session: Id = 0


class GiveBack(_Message, tag=7):
    """Return granted slots that nobody is writing. Not answered."""

    slots: Slots


class Clear(_Message, tag=8):
    """Forget a namespace, or everything. Answered by Answer.

    `begun` are the slots that the client was writing when it sent this; their chunks are forgotten too. The chunks of its
    other granted slots were begun later, and stay.
    """

    id: Id
    namespace: Root | None
    begun: Slots = []


class Settle(_Message, tag=9):
    """Say that every transfer that this engine began before its present connection has ended. Not answered."""


class Stat(_Message, tag=10):
    """Ask for the daemon's counters. Answered by Answer with one row."""

    id: Id


class List(_Message, tag=11):
    """Ask for the chunks whose key starts with `prefix`, at most `limit`; or with OVERVIEW for that. Answered by Answer.

    The overview has no message of its own because that would have raised VERSION, and with it have parted daemons from engines
    that agree on everything else. An older daemon answers with no rows. A change that raises VERSION anyway should add one.
    """

    id: Id
    prefix: Annotated[bytes, Meta(max_length=KEY_NBYTES)]
    limit: Annotated[int, Meta(ge=1, le=MAX_ROWS)]


class Evict(_Message, tag=12):
    """Forget the chunks whose key starts with `prefix`. Answered by Answer."""

    id: Id
    prefix: Annotated[bytes, Meta(min_length=1, max_length=KEY_NBYTES)]


class Finish(_Message, tag=13):
    """Say how a request ended. Not answered. With request number 0 no request ended: it only says the prefill speed.

    The keys are for recorders. The keys of 8,192 chunks are 262 KB and take 0.1 ms, a tenth of what the Acquire takes.
    """

    keys: Keys  # of the prompt, from its first chunk on
    prompt_tokens: Tokens
    age_s: Annotated[float, Meta(ge=0, le=MAX_AGE_S)]  # since the request reached the client
    prefill_tokens_s: Annotated[float, Meta(ge=0, le=MAX_SPEED)]  # of the engine at present; 0: unknown
    request: RequestNumber
    output_tokens: OutputTokens = -1
    stop: Stop = Stop.UNKNOWN
    session: Id = 0


class Record(_Message, tag=14):
    """Ask for every request that ends from now on. Answered by one Recorded for each."""


# -- daemon to client ---------------------------------------------------------------------------------------------------


class Welcome(_Message, tag=65):
    """The session is open. If the client gets an arena, its descriptor and its sizes come along."""

    version: int
    pid: int  # of the daemon
    geometry: Geometry | None = None
    num_slots: int = 0
    path: str = ""
    remote: bool = False  # there is a remote store: an Acquire may find more chunks than the index holds


class Refused(_Message, tag=66):
    """The session is not opened. `reason` says why and what to do."""

    reason: str

    @property
    def stays(self) -> bool:
        """Return True if the reason stays until somebody changes who may connect, or which model uses which daemon."""
        return any(words in self.reason for words in STAYING_REFUSALS)


class Described(_Message, tag=67):
    """`warning` is empty, or names the other namespace that this one was probably meant to equal."""

    id: Id
    warning: str


class Acquired(_Message, tag=68):
    """Key number `rows[i]` of the Acquire is in `slots[i]` until `lease` is released. An empty lease needs no release.

    Without rows, slot i holds key number i. `fingerprints[i]` is of the slot's header when the chunk was published, see
    arena.slots.fingerprints: a reader takes nothing from a slot whose header has another one.
    """

    id: Id
    lease: Id
    rows: Slots
    slots: PackedSlots
    fingerprints: Fingerprints


class Granted(_Message, tag=69):
    """Slots to write under these generations. `limit` is how many granted slots this client may hold.

    With id 0 it is sent unasked: the limit has shrunk, and the client returns the slots above it with GiveBack.
    """

    id: Id
    slots: Slots
    generations: Generations
    limit: Slot


class Published(_Message, tag=70):
    """`published[i]` says whether chunk i is READY now. It is False if another client stored the chunk first."""

    id: Id
    published: Annotated[list[bool], Meta(max_length=MAX_SLOTS)]


class Changed(_Message, tag=71):
    """The index gained and lost these chunks. If `fresh`, the client first empties its replica."""

    added: Keys
    removed: Keys
    fresh: bool = False


class Answer(_Message, tag=72):
    """Rows for an operator, or one row with a count."""

    id: Id
    rows: Annotated[list[dict[str, int | float | str]], Meta(max_length=MAX_ROWS)]


class Draining(_Message, tag=73):
    """The daemon ends soon. The client finishes what is under way and begins nothing."""


class Working(_Message, tag=75):
    """The answer to this Acquire takes longer, because a remote store is still busy. Sent again and again until it comes."""

    id: Id


class Recorded(_Message, tag=74):
    """A request of some client has ended."""

    arrived_s: float  # Unix time
    keys: Keys
    prompt_tokens: Tokens
    output_tokens: OutputTokens
    stop: Stop
    session: Id


Request = (
    Hello | Describe | Acquire | Release | Grant | Publish | GiveBack | Clear | Settle | Stat | List | Evict | Finish
    | Record
)  # fmt: skip
Response = (
    Welcome | Refused | Described | Acquired | Granted | Published | Changed | Answer | Draining | Working | Recorded
)  # fmt: skip


def request_fields(use: Use | None) -> tuple[int, int, Stop, int]:
    """Return the last four fields of Acquire, Publish and Finish. Numbers are cut to the widths of the fields."""
    if use is None:
        return 0, -1, Stop.UNKNOWN, 0
    output_tokens = max(-1, min(use.output_tokens, (1 << 31) - 1))
    return use.request % (1 << 32), output_tokens, use.stop, use.session % (1 << 53)


def to_use(
    message: Acquire | Publish | Finish,
    connection_number: int,  # different clients may give the same request number: this keeps them apart
) -> Use:
    """Return what the message says of its request. The daemon adds the time."""
    return Use(
        request=(connection_number << 32 | message.request) if message.request else 0,
        namespace=message.namespace if isinstance(message, Acquire) and len(message.namespace) == 32 else b"",
        output_tokens=message.output_tokens,
        stop=message.stop,
        session=message.session,
        client=connection_number,
    )
