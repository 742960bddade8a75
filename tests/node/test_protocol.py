"""Frames and messages: what survives a round trip, what is refused, and that only ProtocolError is ever raised."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkern.errors import ConfigError
from kvkern.node import framing
from kvkern.node import protocol as p
from kvkern.policy.base import Stop, Use
from tests.node.conftest import acquired
from tests.support import chain_keys

ids = st.integers(0, (1 << 53) - 1)
roots = st.binary(min_size=32, max_size=32)
key_lists = st.lists(roots, max_size=5)
keys = key_lists.map(framing.join_keys)
names = st.text(max_size=20)
slots = st.integers(0, (1 << 40) - 1)
generations = st.integers(0, (1 << 63) - 1)
slot_lists = st.lists(slots, max_size=5)
counts = st.integers(0, p.MAX_SLOTS)
sizes = st.integers(1, (1 << 46) - 1)
geometries = st.builds(p.Geometry, sizes, st.integers(1, 1 << 16), st.integers(1, 1 << 10))
rows = st.lists(
    st.dictionaries(names, st.integers(-(1 << 63), (1 << 63) - 1) | names | st.floats(allow_nan=False)), max_size=3
)
uses = st.tuples(
    st.integers(0, (1 << 32) - 1), st.integers(-1, (1 << 31) - 1), st.sampled_from(Stop), ids
)  # of a request: number, tokens of the reply, stop reason, session
tokens = st.integers(0, (1 << 31) - 1)
ages = st.floats(0, p.MAX_AGE_S)
granted = st.lists(st.tuples(slots, generations, roots), max_size=5)

REQUESTS: dict[type, st.SearchStrategy[Any]] = {
    p.Hello: st.builds(p.Hello, st.integers(0, (1 << 16) - 1), names, st.none() | geometries, st.booleans()),
    p.Describe: st.builds(p.Describe, ids, roots, st.dictionaries(names, names, max_size=5)),
    p.Acquire: st.builds(
        lambda number, asked, prefix, root, use: p.Acquire(number, asked, prefix, root, *use),
        ids, keys, st.booleans(), st.just(b"") | roots, uses,
    ),
    p.Release: st.builds(p.Release, st.lists(ids, max_size=5)),
    p.Grant: st.builds(p.Grant, ids, counts),
    p.Publish: st.builds(
        lambda number, root, held, chain, use: p.Publish(
            number, root, [h[0] for h in held], [h[1] for h in held], framing.join_keys([h[2] for h in held]), chain, *use
        ),
        ids, roots, granted, keys, uses,
    ),
    p.GiveBack: st.builds(p.GiveBack, slot_lists),
    p.Clear: st.builds(p.Clear, ids, st.none() | roots, slot_lists),
    p.Settle: st.builds(p.Settle),
    p.Stat: st.builds(p.Stat, ids),
    p.List: st.builds(p.List, ids, st.binary(max_size=32), st.integers(1, 1000)),
    p.Evict: st.builds(p.Evict, ids, st.binary(min_size=1, max_size=32)),
    p.Finish: st.builds(lambda asked, tokens, age, use: p.Finish(asked, tokens, age, age, *use), keys, tokens, ages, uses),
    p.Record: st.builds(p.Record),
}  # fmt: skip
RESPONSES: dict[type, st.SearchStrategy[Any]] = {
    p.Welcome: st.builds(p.Welcome, counts, counts, st.none() | geometries, counts, names),
    p.Refused: st.builds(p.Refused, names),
    p.Described: st.builds(p.Described, ids, names),
    p.Acquired: st.builds(
        lambda number, lease, held: acquired(number, lease, [h[0] for h in held], [h[1] for h in held]),
        ids, ids, st.lists(st.tuples(slots, st.integers(0, (1 << 32) - 1)), max_size=5),
    ),
    p.Granted: st.builds(
        lambda number, held, limit: p.Granted(number, [h[0] for h in held], [h[1] for h in held], limit),
        ids, granted, counts,
    ),
    p.Published: st.builds(p.Published, ids, st.lists(st.booleans(), max_size=5)),
    p.Changed: st.builds(p.Changed, keys, keys, st.booleans()),
    p.Answer: st.builds(p.Answer, ids, rows),
    p.Draining: st.builds(p.Draining),
    p.Working: st.builds(p.Working, ids),
    p.Recorded: st.builds(
        p.Recorded, ages, keys, tokens, st.integers(-1, (1 << 31) - 1), st.sampled_from(Stop), ids
    ),
}  # fmt: skip


def body(message: Any) -> bytes:
    """Return the body of a message's only frame."""
    (found,) = framing.FrameSplitter().feed(framing.encode(message))
    return found


def packed(*fields: object) -> bytes:
    """Return the body of a message that the protocol's own types would not let through."""
    return msgspec.msgpack.encode(fields)


def test_every_message_is_tried() -> None:
    assert set(REQUESTS) == set(get_args(p.Request))
    assert set(RESPONSES) == set(get_args(p.Response))


@given(st.one_of(*REQUESTS.values()))
def test_requests_go_round(message: p.Request) -> None:
    assert framing.decode_request(body(message)) == message


@given(st.one_of(*RESPONSES.values()))
def test_responses_go_round(message: p.Response) -> None:
    assert framing.decode_response(body(message)) == message


# The bytes on the wire, written down once: an array-like message that gains, loses or moves a field gives another frame.
R, K = bytes(range(32)), bytes(range(32, 64))
R_HEX, K_HEX = R.hex(), K.hex()
FRAMES: list[tuple[Any, str]] = [
    (p.Hello(3, "engine", p.Geometry(256, 2, 1), True), "11000000950103a6656e67696e6593cd01000201c3"),
    (p.Hello(3), "06000000950103a0c0c2"),
    (p.Describe(1, R, {"model": "m"}), f"2e000000940201c420{R_HEX}81a56d6f64656ca16d"),
    (p.Acquire(2, K, True, R, 7, 5, Stop.TOOL_CALL, 11), f"4c000000990302c420{K_HEX}c3c420{R_HEX}0705010b"),
    (p.Release([3, 4]), "050000009204920304"),
    (p.Grant(5, 6), "0400000093050506"),
    (
        p.Publish(6, R, [7], [8], K, K + R, 7, 5, Stop.END_TURN, 11),
        f"910000009b0606c420{R_HEX}91079108c420{K_HEX}c440{K_HEX}{R_HEX}0705020b",
    ),
    (p.GiveBack([9, 10]), "05000000920792090a"),
    (p.Clear(7, R, [11]), f"27000000940807c420{R_HEX}910b"),
    (p.Clear(7, None), "05000000940807c090"),
    (p.Settle(), "020000009109"),
    (p.Stat(8), "03000000920a08"),
    (p.List(9, b"\x20", 100), "07000000940b09c4012064"),
    (p.Evict(10, b"\x20\x21"), "07000000930c0ac4022021"),
    (
        p.Finish(K, 16, 0.5, 1000.0, 7, 5, Stop.TOOL_CALL, 11),
        f"3b000000990dc420{K_HEX}10cb3fe0000000000000cb408f4000000000000705010b",
    ),
    (p.Record(), "02000000910e"),
    (
        p.Welcome(3, 1234, p.Geometry(256, 2, 1), 127, "/dev/shm/a", True),
        "19000000974103cd04d293cd010002017faa2f6465762f73686d2f61c3",
    ),
    (p.Refused("no"), "050000009242a26e6f"),
    (p.Described(11, "warning"), "0b00000093430ba77761726e696e67"),
    (
        p.Acquired(12, 13, [0], b"\x0e\0\0\0", b"\1\2\3\4\5\6\7\x08"),
        "1600000096440c0d9100c4040e000000c4080102030405060708",
    ),
    (p.Granted(14, [15], [16], 17), "0800000095450e910f911011"),
    (p.Published(15, [True, False]), "0600000093460f92c3c2"),
    (p.Changed(K, R, True), f"470000009447c420{K_HEX}c420{R_HEX}c3"),
    (
        p.Answer(16, [{"chunks": 2, "ratio": 0.5, "arena": "a"}]),
        "240000009348109183a66368756e6b7302a5726174696fcb3fe0000000000000a56172656e61a161",
    ),
    (p.Draining(), "020000009149"),
    (p.Working(17), "03000000924b11"),
    (p.Recorded(1000.5, K, 16, 5, Stop.END_TURN, 11), f"31000000974acb408f440000000000c420{K_HEX}1005020b"),
]  # fmt: skip


def test_every_message_has_a_written_frame() -> None:
    assert {type(message) for message, _ in FRAMES} == {*get_args(p.Request), *get_args(p.Response)}


@pytest.mark.parametrize(("message", "frame"), FRAMES, ids=lambda value: type(value).__name__)
def test_the_bytes_of_a_frame(message: Any, frame: str) -> None:
    assert framing.encode(message).hex() == frame
    decode = framing.decode_request if isinstance(message, get_args(p.Request)) else framing.decode_response
    assert decode(bytes.fromhex(frame)[4:]) == message


@pytest.mark.parametrize("message", [p.Stat(1), p.Draining()])
def test_each_side_understands_only_the_other(message: Any) -> None:
    decode = framing.decode_response if isinstance(message, p.Stat) else framing.decode_request
    with pytest.raises(p.ProtocolError, match="Invalid value"):
        decode(body(message))


ROOT, KEY = bytes(32), chain_keys("a", 1)[0]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ((), "at least length 1"),
        ((99,), "Invalid value 99"),
        (("10", 1), "Expected `int`"),
        ((10,), "at least length 2"),
        ((10, 1, 2), "Expected `array`"),
        ((10, -1), ">= 0"),
        ((10, 1 << 53), "<= 9007199254740991"),
        ((10, (1 << 64) - 1), "<= 9007199254740991"),
        ((10, 1.0), "got `float`"),
        ((10, True), "got `bool`"),
        ((10, None), "got `None`"),
        ((1, -1), ">= 0"),
        ((1, 1, "x" * 257), "length <= 256"),
        ((1, 1, "x", (0, 2, 1)), ">= 1"),
        ((1, 1, "x", (1 << 46, 2, 1)), "<="),
        ((1, 1, "x", (1, (1 << 16) + 1, 1)), "<="),
        ((1, 1, "x", (1, 1, (1 << 10) + 1)), "<="),
        ((1, 1, "x", (1, 1)), "at least length 3"),
        ((2, 1, ROOT[:31], {}), "length >= 32"),
        ((2, 1, ROOT, {"model": 1}), "Expected `str`"),
        ((2, 1, ROOT, {str(i): "" for i in range(17)}), "length <= 16"),
        ((3, 1, KEY[:31], True), "keys of Acquire has 31 bytes; send a whole number of 32-byte keys"),
        ((3, 1, KEY + b"x", True), "keys of Acquire has 33 bytes; send a whole number of 32-byte keys"),
        ((3, 1, KEY * (p.MAX_KEYS + 1), True), "length <= 2097152"),
        ((3, 1, "k" * 32, True), "got `str`"),
        ((3, 1, KEY, 1), "Expected `bool`"),
        ((3, 1, KEY, True, bytes(33)), "length <= 32"),
        ((3, 1, KEY, True, b"", -1), ">= 0"),
        ((3, 1, KEY, True, b"", 1 << 32), "<= 4294967295"),
        ((3, 1, KEY, True, b"", 1, -2), ">= -1"),
        ((3, 1, KEY, True, b"", 1, 1 << 31), "<= 2147483647"),
        ((3, 1, KEY, True, b"", 1, 1, 3), "Invalid enum value 3"),
        ((3, 1, KEY, True, b"", 1, 1, "END_TURN"), "Expected `int`"),
        ((3, 1, KEY, True, b"", 1, 1, 2, 1 << 53), "<= 9007199254740991"),
        ((3, 1, KEY, True, b"", 1, 1, 2, 3, 4), "at most length 8"),
        ((4, [0] * (p.MAX_SLOTS + 1)), "length <= 65536"),
        ((5, 1, p.MAX_SLOTS + 1), "<= 65536"),
        ((6, 1, ROOT, [1], [1], b"", b""), r"slots, generations, keys of Publish have \[1, 1, 0\] elements; send as many"),
        ((6, 1, ROOT, [1], [], KEY, b""), r"have \[1, 0, 1\] elements; send as many of each"),
        ((6, 1, ROOT, [], [1], KEY, b""), r"have \[0, 1, 1\] elements; send as many of each"),
        ((6, 1, ROOT, [1], [1 << 63], KEY, b""), "<="),
        ((6, 1, ROOT, [1 << 40], [1], KEY, b""), "<="),
        ((6, 1, ROOT, [1], [1], KEY, b"x"), "chain of Publish has 1 bytes; send a whole number of 32-byte keys"),
        ((6, 1, ROOT, [], [], b"", b"", 0, -1, -1), "Invalid enum value -1"),
        ((8, 1, b""), "length >= 32"),
        ((11, 1, bytes(33), 1), "length <= 32"),
        ((11, 1, b"", 0), ">= 1"),
        ((11, 1, b"", 1001), "<= 1000"),
        ((12, 1, b""), "length >= 1"),
        ((13, KEY, 1, 0.5, 9.0), "at least length 6"),
        ((13, KEY[1:], 1, 0.5, 9.0, 1), "keys of Finish has 31 bytes; send a whole number of 32-byte keys"),
        ((13, KEY, -1, 0.5, 9.0, 1), ">= 0"),
        ((13, KEY, 1, -0.5, 9.0, 1), ">= 0"),
        ((13, KEY, 1, float("inf"), 9.0, 1), "<= 10000000"),
        ((13, KEY, 1, float("nan"), 9.0, 1), "= "),
        ((13, KEY, 1, 0.5, -9.0, 1), ">= 0"),
        ((13, KEY, 1, 0.5, 9.0, 1, -2), ">= -1"),
        ((13, KEY, 1, 0.5, 9.0, 1, 5, 7), "Invalid enum value 7"),
    ],
)  # fmt: skip
def test_requests_outside_the_limits(fields: tuple[object, ...], why: str) -> None:
    with pytest.raises(p.ProtocolError, match=why):
        framing.decode_request(packed(*fields))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (
            (68, 1, 1, [], bytes(4), b""),
            r"slots, fingerprints of Acquired have \[1, 0\] elements; send as many of each",
        ),
        (
            (68, 1, 1, [], bytes(8), bytes(8)),
            r"slots, fingerprints of Acquired have \[2, 1\] elements; send as many of each",
        ),
        ((69, 1, [1], [], 1), r"slots, generations of Granted have \[1, 0\] elements; send as many of each"),
        ((69, 1, [], [], -1), ">= 0"),
        ((71, KEY[1:], b"", False), "added of Changed has 31 bytes; send a whole number of 32-byte keys"),
        ((72, 1, [{}] * 1001), "length <= 1000"),
        ((72, 1, [{"a": [1]}]), "Expected `int | float | str`"),
        ((72, 1, [{"a": {}}]), "Expected `int | float | str`"),
    ],
)
def test_responses_outside_the_limits(fields: tuple[object, ...], why: str) -> None:
    with pytest.raises(p.ProtocolError, match=why.replace("|", r"\|")):
        framing.decode_response(packed(*fields))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        packed(10, 1) + b"\xc0",  # a byte behind the message
        packed(1, 1, "x")[:-1] + b"\xff",  # invalid UTF-8
        bytes([0x92, 4, 0xDD]) + b"\xff" * 4,  # an array that says it has 2^32 - 1 elements
        bytes([0x94, 3, 1, 0xC6]) + b"\xff" * 4,
        b"\xdd\xff\xff\xff\xff\x04",
        b"\x91" * 100_000,  # arrays in arrays
    ],
    ids=["empty", "longer", "not_utf8", "long_array", "long_bytes", "long_message", "deep"],
)
def test_what_is_no_message(raw: bytes) -> None:
    for decode in (framing.decode_request, framing.decode_response):
        with pytest.raises(
            p.ProtocolError,
            match=r"holds no message of protocol version 4: .*; use the same version of kvkern on both sides",
        ):
            decode(raw)


scalars = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.binary() | st.text()
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


@given(st.binary(max_size=64) | st.lists(anything, max_size=7).map(msgspec.msgpack.encode))
def test_nothing_but_protocol_errors(raw: bytes) -> None:
    for decode in (framing.decode_request, framing.decode_response):
        try:
            decode(raw)
        except p.ProtocolError:
            continue


@given(st.integers(1, 13) | st.integers(65, 74), st.lists(anything, max_size=6))
def test_nothing_but_protocol_errors_behind_a_tag(tag: int, fields: list[object]) -> None:
    for decode in (framing.decode_request, framing.decode_response):
        try:
            decode(packed(tag, *fields))
        except p.ProtocolError:
            continue


@given(st.lists(st.one_of(*REQUESTS.values()), max_size=6), st.data())
def test_any_split_of_a_stream_gives_the_same_frames(messages: list[p.Request], data: st.DataObject) -> None:
    stream = b"".join(map(framing.encode, messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    frames, found = framing.FrameSplitter(), []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += frames.feed(stream[begin:end])
    assert [framing.decode_request(one) for one in found] == messages
    assert not frames


def test_byte_by_byte() -> None:
    frames, stream = framing.FrameSplitter(), framing.encode(p.Stat(1)) + framing.encode(p.Settle())
    found = []
    for at in range(len(stream)):
        found += frames.feed(stream[at : at + 1])
        assert bool(frames) == (at not in (len(framing.encode(p.Stat(1))) - 1, len(stream) - 1))
    assert found == [body(p.Stat(1)), body(p.Settle())]


def test_who_stops_listening_loses_no_frame() -> None:
    """The frames that a caller has not taken yet come with the next bytes."""
    frames = framing.FrameSplitter()
    for found in frames.feed(framing.encode(p.Stat(1)) + framing.encode(p.Stat(2))):
        assert found == body(p.Stat(1))
        break
    assert list(frames.feed(b"")) == [body(p.Stat(2))]


@pytest.mark.parametrize("length", [framing.MAX_FRAME_NBYTES + 1, (1 << 32) - 1])
def test_a_frame_above_the_limit_is_refused_by_its_length(length: int) -> None:
    frames = framing.FrameSplitter()
    with pytest.raises(
        p.ProtocolError,
        match=rf"a frame has {length} bytes, at most {framing.MAX_FRAME_NBYTES} are allowed; send less at a time",
    ):
        list(frames.feed(struct.pack("<I", length)))


def test_a_frame_of_the_largest_length() -> None:
    whole = bytes(framing.MAX_FRAME_NBYTES)
    assert list(framing.FrameSplitter().feed(struct.pack("<I", len(whole)) + whole)) == [whole]


def test_a_message_above_the_limit_is_not_sent() -> None:
    message = p.Changed(bytes(framing.MAX_FRAME_NBYTES), b"")
    with pytest.raises(
        p.ProtocolError, match=r"a Changed has 4194314 bytes, a frame at most 4194304; send less at a time"
    ):
        framing.encode(message)


def test_the_largest_publish_fits_a_frame() -> None:
    """A reservation of MAX_PUBLISH chunks in a sequence of MAX_KEYS, with the largest numbers that are allowed."""
    from kvkern.node.client.cache_client import MAX_PUBLISH

    chain = KEY * p.MAX_KEYS
    slots, under = [(1 << 40) - 1] * MAX_PUBLISH, [(1 << 63) - 1] * MAX_PUBLISH
    use = p.request_fields(
        Use(request=(1 << 32) - 1, output_tokens=(1 << 31) - 1, stop=Stop.END_TURN, session=(1 << 53) - 1)
    )
    message = p.Publish((1 << 53) - 1, ROOT, slots, under, KEY * MAX_PUBLISH, chain, *use)
    assert framing.decode_request(body(message)) == message


big = st.integers(-(1 << 70), 1 << 70)


@given(st.builds(Use, st.floats(), big, roots, big, st.sampled_from(Stop), big), st.integers(1, 1 << 20))
def test_whatever_is_known_of_a_request_can_be_said(use: Use, connection: int) -> None:
    message = p.Finish(KEY, 5, 0.5, 9.0, *p.request_fields(use))
    assert framing.decode_request(body(message)) == message
    heard = p.to_use(message, connection)
    assert (heard.now_s, heard.namespace, heard.stop) == (0.0, b"", use.stop)
    assert heard.request == (connection << 32 | use.request % (1 << 32) if use.request % (1 << 32) else 0)
    assert heard.request < 1 << 63
    if -1 <= use.output_tokens < 1 << 31:
        assert heard.output_tokens == use.output_tokens
    if 0 <= use.session < 1 << 53:
        assert heard.session == use.session


def test_nothing_known_is_what_is_not_said() -> None:
    assert p.Acquire(1, KEY, True, b"", *p.request_fields(None)) == p.Acquire(1, KEY, True)
    assert p.to_use(p.Acquire(1, KEY, True), 5) == Use(client=5)
    assert p.request_fields(Use()) == p.request_fields(None)


@given(key_lists)
def test_keys_go_round(found: list[bytes]) -> None:
    assert framing.split_keys(framing.join_keys(found)) == found


@pytest.mark.parametrize("found", [[b""], [KEY, KEY[1:]], [KEY + b"x"]])
def test_what_is_no_chunk_key_is_not_sent(found: list[bytes]) -> None:
    with pytest.raises(ConfigError, match=r"\d keys have \d+ bytes in all; give chunk keys of 32 bytes each"):
        framing.join_keys(found)


def test_paths_of_sockets_are_short() -> None:
    assert framing.checked_socket_path(Path("/" + "x" * 106)) == Path("/" + "x" * 106)
    with pytest.raises(ConfigError, match="longer than the 107 bytes Linux allows; shorten it"):
        framing.checked_socket_path(Path("/" + "x" * 107))
    with pytest.raises(ConfigError, match="107 bytes"):
        framing.checked_socket_path(Path("/" + "ö" * 54))


def test_headers_have_a_limit() -> None:
    assert p.Geometry(1, 1 << 16, 1).to_slots().max_planes == 1 << 16
    with pytest.raises(p.ProtocolError, match="65536 planes of 2 ranks are more than 65536 checksums in a header"):
        p.Geometry(1, 1 << 16, 2).to_slots()
