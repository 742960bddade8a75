"""A minimal object store: PUT, GET, HEAD and DELETE as S3, Google and Azure share them. Tests switch its faults on."""

from __future__ import annotations

import re
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ObjectServer(ThreadingHTTPServer):
    """Objects of one bucket, on a port of 127.0.0.1. Use it as a context manager."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []  # methods, in order
        self.faults: list[tuple[str, int, str]] = []  # (method, status, code): its next request gets this answer
        self.cut = 0  # bytes missing at the end of GET bodies
        self.delay_s = 0.0  # before every answer
        self.most_at_once = self._at_once = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, by: int) -> None:
        with self.lock:
            self._at_once += by
            self.most_at_once = max(self.most_at_once, self._at_once)

    def fault(self, method: str) -> tuple[int, str] | None:
        with self.lock:
            for row, (of, status, code) in enumerate(self.faults):
                if of == method:
                    del self.faults[row]
                    return status, code
        return None

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that break off are a part of the tests."""

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        super().__exit__(*args)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 20  # an answer is one packet: no wait for acknowledgements
    server: ObjectServer

    def _do(self) -> None:
        self.server.count(1)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        time.sleep(self.server.delay_s)
        self.server.count(-1)  # before the answer: a client that has the answer may ask again at once
        self.server.requests.append(self.command)
        path, _, query = self.path.partition("?")
        fault = self.server.fault(self.command)
        if fault is not None:
            self._answer(fault[0], f"<Error><Code>{fault[1]}</Code></Error>".encode())
        elif self.command == "PUT":
            self.server.objects[path] = body
            self._answer(201, b"")
        elif self.command == "POST" and query.startswith("delete"):
            keys = re.findall(rb"<Key>(.*?)</Key>", body)
            for key in keys:
                self.server.objects.pop(f"{path.rstrip('/')}/{key.decode()}", None)
            done = b"".join(b"<Deleted><Key>%b</Key></Deleted>" % key for key in keys)
            self._answer(200, b"<DeleteResult>%b</DeleteResult>" % done)
        elif self.command == "POST" and "comp=batch" in query:  # from Azure
            self._answer_batch(re.findall(rb"^DELETE ([^ ?]+)", body, re.MULTILINE))
        elif path not in self.server.objects:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        elif self.command == "DELETE":
            del self.server.objects[path]
            self._answer(202, b"")
        else:
            self._answer(200, self.server.objects[path])

    def _answer_batch(self, paths: list[bytes]) -> None:
        parts = b""
        for row, path in enumerate(paths):
            there = self.server.objects.pop(path.decode(), None) is not None
            status = b"202 Accepted" if there else b"404 The specified blob does not exist."
            parts += b"--part\r\nContent-Type: application/http\r\nContent-ID: %d\r\n\r\nHTTP/1.1 %b\r\n\r\n\r\n" % (
                row,
                status,
            )
        self._answer(202, parts + b"--part--\r\n", "multipart/mixed; boundary=part")

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _do

    def _answer(self, status: int, body: bytes, content: str = "application/xml") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.end_headers()
        if self.command == "GET" and status == 200 and self.server.cut:
            body = body[: -self.server.cut]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
