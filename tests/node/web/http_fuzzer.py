"""Sends wrong and odd HTTP to ports: `python -m tests.node.web.http_fuzzer SEED REQUESTS PORT...`

Every round is a connection. It sends noise, or requests that are valid, odd or changed, several at once or cut into pieces.
Then it reads some of the answer, or none, and hangs up in some way, or stays silent for a moment. Imports little, to start
fast.
"""

from __future__ import annotations

import random
import socket
import struct
import sys
import time
from collections.abc import Callable

METHODS = [b"GET", b"HEAD", b"POST", b"PUT", b"OPTIONS", b"TRACE", b"CONNECT", b"get", b"G\x00T", b"", b"A" * 300]
PATHS = [
    b"/", b"/healthz", b"/readyz", b"/metrics", b"/events", b"/v1/stat", b"/v1/overview", b"/v1/chunks", b"/v1/chunks?limit=5",
    b"/v1/chunks?prefix=00&limit=1", b"/v1/chunks?prefix=zz", b"/v1/chunks?limit=" + b"9" * 400, b"/?token=" + b"x" * 100,
    b"/?token=x" + b"&a=b" * 50, b"/?token=%ff%00", b"/?&&=&token",
    b"/%", b"/%zz", b"/%00", b"/%ff%fe", b"//", b"/../../etc/passwd", b"/healthz/", b"/healthz?" + b"a=b&" * 500, b"*",
    b"http://evil.example/healthz", b"http://[::1/", b"healthz", b"", b"/\xff", b"/" + b"a" * 5000, b"/healthz#x", b"/ healthz",
]  # fmt: skip
HOSTS = [
    b"localhost",
    b"127.0.0.1",
    b"[::1]",
    b"evil.example",
    b"",
    b":",
    b"[",
    b"\xff",
    b"a" * 4000,
    b"localhost:99999",
]
HEADERS = [
    b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: 1, 2",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Expect: 100-continue", b"Upgrade: websocket",
    b"Connection: Upgrade, HTTP2-Settings", b"Connection: close", b"Connection: keep-alive", b"Range: bytes=0-",
    b"Cookie: " + b"a=b; " * 300, b"Cookie: \x00=\xff", b"Authorization: Bearer x", b"Authorization: \xff\xfe",
    b"X: " + b"y" * 9000,
    b"X" * 300 + b": y", b": no name", b"no colon", b" folded: line", b"X-Forwarded-For: 127.0.0.1", b"Host: second",
    b"Accept: text/event-stream", b"Last-Event-ID: \x7f", b"X: \r", b"If-None-Match: *",
]  # fmt: skip


def request(rng: random.Random) -> bytes:
    """Return a request that may be odd."""
    version = rng.choice([b"HTTP/1.1"] * 8 + [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"http/1.1", b"HTTP/1.1 ", b""])
    method = b"GET" if rng.random() < 0.6 else rng.choice(METHODS)
    lines = [b" ".join((method, rng.choice(PATHS), version))]
    if rng.random() < 0.9:
        lines.append(b"Host: " + (b"localhost" if rng.random() < 0.7 else rng.choice(HOSTS)))
    lines += rng.choices(HEADERS, k=rng.choice([0, 0, 1, 2, 5]))
    if rng.random() < 0.02:
        lines += [b"X-%d: y" % number for number in range(rng.choice([60, 500]))]
    end = b"\r\n" if rng.random() < 0.95 else b"\n"
    body = rng.choice([b"", b"", b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", rng.randbytes(50)])
    return end.join(lines) + end + end + body


def changed(rng: random.Random, said: bytes) -> bytes:
    """Change, drop or double some bytes."""
    found = bytearray(said)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(found) or 1)
        kind = rng.randrange(3)
        if kind == 0:
            found[at : at + 1] = rng.randbytes(1)
        elif kind == 1:
            del found[at : at + rng.randrange(4)]
        else:
            found[at:at] = found[at : at + rng.randrange(20)]
    return bytes(found)


def speech(rng: random.Random) -> tuple[bytes, int]:
    """Return what to say on one connection, and how many requests that is."""
    number = rng.choice([1, 1, 1, 2, 5])
    requests = [request(rng) for _ in range(number)]
    makers: list[Callable[[], bytes]] = [
        lambda: b"".join(requests),
        lambda: b"".join(requests),
        lambda: b"".join(changed(rng, each) for each in requests),
        lambda: b"".join(changed(rng, each) for each in requests),
        lambda: requests[0][: rng.randrange(len(requests[0]) or 1)],
        lambda: rng.randbytes(rng.randrange(1, 300)),
        lambda: b"\x16\x03\x01" + rng.randbytes(200),
        lambda: b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * rng.choice([10, 100, 4000]),
        lambda: b"G" * rng.choice([1, 20_000, 200_000]),
    ]
    return rng.choice(makers)(), number


def speak(rng: random.Random, port: int) -> int:
    """Do one round. Returns how many requests it sent. The daemon may hang up at any moment."""
    said, number = speech(rng)
    with socket.socket() as sock:
        sock.settimeout(rng.choice([0.05, 0.2, 1.0]))
        try:
            sock.connect(("127.0.0.1", port))
            cuts = sorted(rng.randrange(len(said) or 1) for _ in range(rng.choice([0, 0, 0, 2])))
            for begin, end in zip([0, *cuts], [*cuts, len(said)], strict=True):
                sock.sendall(said[begin:end])
            ending = rng.randrange(4)
            if ending == 0:  # resets
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif ending == 1:
                sock.shutdown(socket.SHUT_WR)
            if ending:
                for _ in range(number):
                    if not sock.recv(1 << 16):
                        break
        except OSError:  # a time limit of this side, too
            if rng.random() < 0.02:
                time.sleep(0.2)
    return number


def main() -> None:
    rng, left = random.Random(int(sys.argv[1])), int(sys.argv[2])
    ports = [int(text) for text in sys.argv[3:]]
    while left > 0:
        left -= speak(rng, rng.choice(ports))


if __name__ == "__main__":
    main()
