"""What daemon and clients say to each other: frames of msgpack over a Unix socket. Knows bytes; opens nothing.

    frame = length of the body as u32le | body: one message, a msgpack array with the message's tag first

A connection starts with Hello and is answered by Welcome, beside which the arena's descriptor travels, or by Refused.
Whatever does not decode to a message of this file, or is longer than MAX_FRAME_NBYTES, ends the connection.
Keys travel as one byte string of 32 bytes each. KV bytes never travel: they lie in the arena.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from ..arena.slots import SlotGeometry
from ..errors import ConfigError, KvkernError
from ..keys import KEY_NBYTES
from ..policy.base import Stop, Use

VERSION = 3
MAX_FRAME_NBYTES = 4 << 20
MAX_KEYS = 65_536  # in one message
MAX_SLOTS = 65_536
MAX_ROWS = 1000  # of an answer
MAX_PATH_NBYTES = 107  # of a Unix socket, by Linux
MAX_AGE_S = 1e7  # of a request
MAX_SPEED = 1e9  # tokens/s
MAX_NAME = 256  # characters of an engine's name, or of a field of a namespace
_LENGTH = struct.Struct("<I")

Id = Annotated[int, Meta(ge=0, lt=1 << 53)]
Count = Annotated[int, Meta(ge=0, le=MAX_SLOTS)]
Size = Annotated[int, Meta(ge=1, lt=1 << 46)]
Slot = Annotated[int, Meta(ge=0, lt=1 << 40)]
Generation = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Root = Annotated[bytes, Meta(min_length=32, max_length=32)]
Keys = Annotated[bytes, Meta(max_length=KEY_NBYTES * MAX_KEYS)]
Name = Annotated[str, Meta(max_length=MAX_NAME)]
Slots = Annotated[list[Slot], Meta(max_length=MAX_SLOTS)]
Generations = Annotated[list[Generation], Meta(max_length=MAX_SLOTS)]
Tokens = Annotated[int, Meta(ge=0, lt=1 << 31)]
OutputTokens = Annotated[int, Meta(ge=-1, lt=1 << 31)]
RequestNumber = Annotated[int, Meta(ge=0, lt=1 << 32)]
Ids = Annotated[list[Id], Meta(max_length=MAX_SLOTS)]


class ProtocolError(KvkernError):
    """The other side sent what is no message; the connection ends."""


class Geometry(Struct, array_like=True, forbid_unknown_fields=True):
    """Of the slots an engine needs; see slots.SlotGeometry."""

    part_nbytes: Size
    max_planes: Annotated[int, Meta(ge=1, le=1 << 16)]
    world_size: Annotated[int, Meta(ge=1, le=1 << 10)]

    @classmethod
    def of(cls, geometry: SlotGeometry) -> Geometry:
        """What is said of these slots."""
        return cls(geometry.part_nbytes, geometry.max_planes, geometry.world_size)

    def slots(self) -> SlotGeometry:
        """What it says."""
        return SlotGeometry(self.part_nbytes, self.max_planes, self.world_size)


class _Message(Struct, array_like=True, forbid_unknown_fields=True):
    pass


# -- client to daemon ---------------------------------------------------------------------------------------------------


class Hello(_Message, tag=1):
    """First message. Without geometry an operator: no arena, no credits."""

    version: Annotated[int, Meta(ge=0, lt=1 << 16)]
    engine: Name = ""  # processes of one engine give the same name: what one of them holds lives as long as any of them
    geometry: Geometry | None = None
    index: bool = False  # send the index and its changes; who only copies needs neither


class Describe(_Message, tag=2):
    """What a namespace root stands for; fields as in keys.Namespace. Answered by Described."""

    id: Id
    root: Root
    fields: Annotated[dict[Name, Name], Meta(max_length=16)]


class Acquire(_Message, tag=3):
    """Pin the longest cached prefix, or with `prefix=False` all cached chunks. Answered by Acquired.

    Of the request that asks as much is said as is known, as in policy.base.Use; numbers are the client's own.
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
    """Granted slots are written, of these chunks. Answered by Published. Of the request as in Acquire."""

    id: Id
    namespace: Root
    slots: Slots
    generations: Generations
    keys: Keys  # of the slots
    chain: Keys  # of the sequence, from its first chunk on
    request: RequestNumber = 0
    output_tokens: OutputTokens = -1
    stop: Stop = Stop.UNKNOWN
    session: Id = 0


class GiveBack(_Message, tag=7):
    """Granted slots nobody is writing. Not answered."""

    slots: Slots


class Clear(_Message, tag=8):
    """Forget a namespace, or everything. Answered by Answer.

    Chunks that the client is writing are forgotten if they are in `begun`; others it began after it said this.
    """

    id: Id
    namespace: Root | None
    begun: Slots = []


class Settle(_Message, tag=9):
    """Every transfer this engine had begun before its present connection has ended. Not answered."""


class Stat(_Message, tag=10):
    """Answered by Answer."""

    id: Id


class List(_Message, tag=11):
    """Chunks whose key starts with `prefix`, at most `limit`. Answered by Answer."""

    id: Id
    prefix: Annotated[bytes, Meta(max_length=KEY_NBYTES)]
    limit: Annotated[int, Meta(ge=1, le=MAX_ROWS)]


class Evict(_Message, tag=12):
    """Forget chunks whose key starts with `prefix`. Answered by Answer."""

    id: Id
    prefix: Annotated[bytes, Meta(min_length=1, max_length=KEY_NBYTES)]


class Finish(_Message, tag=13):
    """How a request ended. Not answered. With the number 0 it was none, and says how fast the engine computes.

    The keys are for who records. Of 8,192 chunks they are 262 KB and take 0.1 ms, a tenth of what the Acquire takes.
    """

    keys: Keys  # of its prompt, from the first chunk on
    prompt_tokens: Tokens
    age_s: Annotated[float, Meta(ge=0, le=MAX_AGE_S)]  # since the client had it
    prefill_tokens_s: Annotated[float, Meta(ge=0, le=MAX_SPEED)]  # of the engine at present; 0: unknown
    request: RequestNumber
    output_tokens: OutputTokens = -1
    stop: Stop = Stop.UNKNOWN
    session: Id = 0


class Record(_Message, tag=14):
    """From now on tell what requests there were. Answered by one Recorded for each that ends."""


# -- daemon to client ---------------------------------------------------------------------------------------------------


class Welcome(_Message, tag=65):
    """The session is open. With an arena its descriptor comes along, and its sizes."""

    version: int
    pid: int  # of the daemon
    geometry: Geometry | None = None
    num_slots: int = 0
    path: str = ""
    remote: bool = False  # an Acquire may find more than the index tells


class Refused(_Message, tag=66):
    """The session is not opened; the text says why and what to do."""

    reason: str


class Described(_Message, tag=67):
    """`warning` is empty, or says which other namespace this one was probably meant to be."""

    id: Id
    warning: str


class Acquired(_Message, tag=68):
    """`rows[i]` of the keys asked for is in `slots[i]`, until `lease` is released. An empty lease needs no release."""

    id: Id
    lease: Id
    rows: Slots
    slots: Slots


class Granted(_Message, tag=69):
    """Slots to write under these generations. `limit` is how many this client may hold.

    With id 0 unasked: the limit has become less, and what is above it comes back with GiveBack.
    """

    id: Id
    slots: Slots
    generations: Generations
    limit: Slot


class Published(_Message, tag=70):
    """Which of the chunks are READY now. One that another client had stored meanwhile is not."""

    id: Id
    published: Annotated[list[bool], Meta(max_length=MAX_SLOTS)]


class Changed(_Message, tag=71):
    """The index gained and lost these chunks. `fresh`: forget what you knew before."""

    added: Keys
    removed: Keys
    fresh: bool = False


class Answer(_Message, tag=72):
    """Rows for an operator, or of counts."""

    id: Id
    rows: Annotated[list[dict[str, int | float | str]], Meta(max_length=MAX_ROWS)]


class Draining(_Message, tag=73):
    """The daemon ends soon: finish what is under way, begin nothing."""


class Working(_Message, tag=75):
    """The answer to this Acquire takes longer: part of it comes from a remote store. Said now and then."""

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

_PARALLEL: dict[type, tuple[str, ...]] = {
    Publish: ("slots", "generations", "keys"), Granted: ("slots", "generations"), Acquired: ("rows", "slots"),
}  # fmt: skip
_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_responses: msgspec.msgpack.Decoder[Response] = msgspec.msgpack.Decoder(Response)


def encode(message: _Message) -> bytes:
    """The frame of a message."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_NBYTES:
        raise ProtocolError(f"a {type(message).__name__} of {len(body)} bytes is above {MAX_FRAME_NBYTES}; send less")
    return _LENGTH.pack(len(body)) + body


def decode_request(body: bytes | memoryview) -> Request:
    """The message of a client's frame. Raises ProtocolError."""
    return _decode(_requests, body)  # type: ignore[no-any-return]


def decode_response(body: bytes | memoryview) -> Response:
    """The message of a daemon's frame. Raises ProtocolError."""
    return _decode(_responses, body)  # type: ignore[no-any-return]


def _decode(decoder: Any, body: bytes | memoryview) -> Any:
    try:
        message = decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"no message of protocol version {VERSION}: {error}") from error
    for name in ("keys", "chain", "added", "removed"):
        if len(getattr(message, name, b"")) % KEY_NBYTES:
            raise ProtocolError(f"{name} of {type(message).__name__} are no whole number of {KEY_NBYTES} bytes")
    names = _PARALLEL.get(type(message), ())
    if len({len(getattr(message, name)) // (KEY_NBYTES if name == "keys" else 1) for name in names}) > 1:
        raise ProtocolError(f"{type(message).__name__} has not as many of each: {', '.join(names)}")
    return message


class Frames:
    """Cuts a stream into frames. Holds at most one frame that is not whole yet."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def __bool__(self) -> bool:
        """Whether the beginning of a frame is here, and its end is not."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Bodies of the frames that are whole now. Raises ProtocolError on a length above the limit, before it is buffered."""
        buffer = self._buffer
        buffer += data
        at = 0
        try:
            while len(buffer) - at >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(buffer, at)
                if length > MAX_FRAME_NBYTES:
                    raise ProtocolError(f"a frame of {length} bytes is above {MAX_FRAME_NBYTES}")
                end = at + _LENGTH.size + length
                if len(buffer) < end:
                    return
                body = bytes(buffer[at + _LENGTH.size : end])
                at = end
                yield body
        finally:
            del buffer[:at]


def join_keys(keys: Sequence[bytes]) -> bytes:
    """Keys as one byte string. Raises ConfigError if they are no chunk keys."""
    joined = b"".join(keys)
    if len(joined) != KEY_NBYTES * len(keys):
        raise ConfigError(f"{len(keys)} keys have {len(joined)} bytes in all; chunk keys have {KEY_NBYTES} each")
    return joined


def said_of(use: Use | None) -> tuple[int, int, Stop, int]:
    """The last fields of Acquire, Publish and Finish. Numbers are cut to what travels."""
    if use is None:
        return 0, -1, Stop.UNKNOWN, 0
    output_tokens = max(-1, min(use.output_tokens, (1 << 31) - 1))
    return use.request % (1 << 32), output_tokens, use.stop, use.session % (1 << 53)


def use_of(
    message: Acquire | Publish | Finish,
    connection: int,  # its number: requests of different clients may say the same one
) -> Use:
    """What the message says of its request. The time is for the daemon to add."""
    return Use(
        request=(connection << 32 | message.request) if message.request else 0,
        namespace=message.namespace if isinstance(message, Acquire) and len(message.namespace) == 32 else b"",
        output_tokens=message.output_tokens,
        stop=message.stop,
        session=message.session,
    )


def unreachable(path: Path, error: OSError) -> ConfigError:
    """What a client says that cannot connect."""
    if isinstance(error, PermissionError):
        return ConfigError(f"{path} may not be opened by this user; join the group of the socket, or run as its owner")
    return ConfigError(
        f"no daemon answers on {path} ({error.strerror or error}); start one: kvkern serve --socket {path} --capacity 8GiB"
    )


def checked_path(path: Path) -> Path:
    """`path`, if a socket can have it. Raises ConfigError."""
    if len(os.fsencode(path)) > MAX_PATH_NBYTES:
        raise ConfigError(
            f"socket path {str(path)!r} is longer than the {MAX_PATH_NBYTES} bytes Linux allows; shorten it"
        )
    return path


def cut_keys(keys: bytes) -> list[bytes]:
    """Keys of one byte string."""
    return [keys[at : at + KEY_NBYTES] for at in range(0, len(keys), KEY_NBYTES)]
