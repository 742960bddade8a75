"""How messages travel: frames of msgpack over a Unix socket, keys as one byte string. Opens no socket.

    frame = length of the body as u32le | body: one message, a msgpack array that begins with the message's tag

A frame that does not decode to a message of protocol.py, or is longer than MAX_FRAME_NBYTES, raises ProtocolError. The side
that receives such a frame ends the connection.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
from msgspec import Struct

from ..errors import ConfigError
from ..keys import KEY_NBYTES
from .protocol import MAX_KEYS, VERSION, Acquired, Changed, Granted, ProtocolError, Publish, Request, Response

MAX_FRAME_NBYTES = 4 << 20
PAGE_KEYS = MAX_KEYS // 2  # at most so many keys gained, and as many lost, in one Changed
MAX_SOCKET_PATH_NBYTES = 107  # Linux's limit for the path of a Unix socket
_LENGTH = struct.Struct("<I")
_EQUAL_LENGTHS: dict[type, tuple[str, ...]] = {  # fields that hold one element per slot
    Publish: ("slots", "generations", "keys"), Granted: ("slots", "generations"), Acquired: ("slots", "fingerprints"),
}  # fmt: skip
_PACKED_NBYTES = {
    "keys": KEY_NBYTES,
    "slots": 4,
    "fingerprints": 8,
}  # bytes of an element of a field that is one byte string
_KEY_FIELDS: dict[type, tuple[str, ...]] = {  # fields of each message that hold whole keys
    message: tuple(field for field in message.__struct_fields__ if field in ("keys", "chain", "added", "removed"))
    for message in (*get_args(Request), *get_args(Response))
}
_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_response_decoder: msgspec.msgpack.Decoder[Response] = msgspec.msgpack.Decoder(Response)


def encode(message: Struct) -> bytes:
    """Return the frame of a message. Raises ProtocolError if it is longer than MAX_FRAME_NBYTES."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_NBYTES:
        raise ProtocolError(
            f"a {type(message).__name__} has {len(body)} bytes, a frame at most {MAX_FRAME_NBYTES}; send less at a time"
        )
    return _LENGTH.pack(len(body)) + body


def decode_request(body: bytes | memoryview) -> Request:
    """Return the message in the body of a client's frame. Raises ProtocolError."""
    return _decode(_request_decoder, body)  # type: ignore[no-any-return]


def decode_response(body: bytes | memoryview) -> Response:
    """Return the message in the body of a daemon's frame. Raises ProtocolError."""
    return _decode(_response_decoder, body)  # type: ignore[no-any-return]


def _decode(decoder: Any, body: bytes | memoryview) -> Any:
    try:
        message = decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(
            f"a frame of {len(body)} bytes holds no message of protocol version {VERSION}: {error}; "
            f"use the same version of kvkern on both sides"
        ) from error
    kind = type(message)
    for field in _KEY_FIELDS[kind]:
        if len(getattr(message, field)) % KEY_NBYTES:
            nbytes = len(getattr(message, field))
            raise ProtocolError(
                f"{field} of {kind.__name__} has {nbytes} bytes; send a whole number of {KEY_NBYTES}-byte keys"
            )
    if kind in _EQUAL_LENGTHS:
        fields = _EQUAL_LENGTHS[kind]
        values = [(field, getattr(message, field)) for field in fields]
        counts = [len(v) // (_PACKED_NBYTES[field] if isinstance(v, bytes) else 1) for field, v in values]
        if len(set(counts)) > 1:
            raise ProtocolError(f"{', '.join(fields)} of {kind.__name__} have {counts} elements; send as many of each")
    return message


class FrameSplitter:
    """Cuts a stream of bytes into frames. Holds at most one incomplete frame."""

    def __init__(self, max_nbytes: int = MAX_FRAME_NBYTES) -> None:
        self.max_nbytes = max_nbytes  # of the body of each frame from now on
        self._buffer = bytearray()

    def __bool__(self) -> bool:
        """Return True if the buffer holds the beginning of a frame whose end has not arrived, or a frame."""
        return bool(self._buffer)

    def __len__(self) -> int:
        """Return how many bytes have been appended and belong to no frame that was taken."""
        return len(self._buffer)

    @property
    def complete(self) -> bool:
        """Return True if `pop` gives a frame now, or raises."""
        return len(self._buffer) >= _LENGTH.size and (
            (length := _LENGTH.unpack_from(self._buffer)[0]) > self.max_nbytes
            or len(self._buffer) >= _LENGTH.size + length
        )

    def append(self, data: bytes) -> None:
        """Add bytes to the end of the stream."""
        self._buffer += data

    def clear(self) -> None:
        """Drop everything."""
        self._buffer = bytearray()

    def pop(self) -> bytes | None:
        """Take the first frame and return its body; None if it is not complete.

        Raises ProtocolError on a length above the limit, before the body is buffered.
        """
        buffer = self._buffer
        if len(buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(buffer)
        if length > self.max_nbytes:
            raise ProtocolError(
                f"a frame has {length} bytes, at most {self.max_nbytes} are allowed; send less at a time"
            )
        end = _LENGTH.size + length
        if len(buffer) < end:
            return None
        with memoryview(buffer) as view:
            body = bytes(view[_LENGTH.size : end])
        del buffer[:end]
        return body

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Append bytes, then yield the bodies of the frames that are complete. Raises ProtocolError like `pop`."""
        self.append(data)
        while (body := self.pop()) is not None:
            yield body


def join_keys(keys: Sequence[bytes]) -> bytes:
    """Join keys into one byte string. Raises ConfigError if a key is not 32 bytes long."""
    joined = b"".join(keys)
    if len(joined) != KEY_NBYTES * len(keys):
        raise ConfigError(
            f"{len(keys)} keys have {len(joined)} bytes in all; give chunk keys of {KEY_NBYTES} bytes each"
        )
    return joined


def split_keys(joined: bytes) -> list[bytes]:
    """Cut one byte string into keys. numpy does it several times as fast as slices."""
    keys: list[bytes] = np.frombuffer(joined, f"V{KEY_NBYTES}").tolist()
    return keys


def changed_frames(added: Sequence[bytes], removed: Sequence[bytes], fresh: bool = False) -> Iterator[bytes]:
    """Yield the frames of the Changed that carry these keys. With `fresh` the first one empties the client's replica."""
    for begin in range(0, max(int(fresh), len(added), len(removed)), PAGE_KEYS):
        page = slice(begin, begin + PAGE_KEYS)
        yield encode(Changed(join_keys(added[page]), join_keys(removed[page]), fresh and begin == 0))


def checked_socket_path(path: Path) -> Path:
    """Return `path` if Linux allows it for a Unix socket. Raises ConfigError if it is too long."""
    if not path.name or "\0" in path.name:
        raise ConfigError(f"socket path {str(path)!r} names no socket; give a path such as /run/kvkern.sock")
    if (nbytes := len(os.fsencode(path))) > MAX_SOCKET_PATH_NBYTES:
        raise ConfigError(
            f"socket path {str(path)!r} has {nbytes} bytes, longer than the {MAX_SOCKET_PATH_NBYTES} bytes Linux allows; "
            f"shorten it"
        )
    return path


def connect_error(path: Path, error: OSError) -> ConfigError:
    """Return the error that tells the user why a client could not connect and what to do."""
    if isinstance(error, PermissionError):
        return ConfigError(f"this user may not open {path}; join the group of the socket, or run as its owner")
    if isinstance(error, TimeoutError):
        return ConfigError(
            f"the daemon on {path} is there but does not answer (timed out): it is still making its arena, or it hangs; look "
            f"at its log, then try again"
        )
    return ConfigError(
        f"no daemon answers on {path} ({error.strerror or error}); start one: kvkern serve --socket {path} --capacity 8GiB"
    )
