"""The wire: two ports of 127.0.0.1, one of the Hub and one of its storage of large files, as two hosts."""

from __future__ import annotations

import secrets
import socket
import struct
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Optional

from .faults import Fault
from .messages import Answer, HubError, Record


if TYPE_CHECKING:
    from .hub import LoopbackHub


class Server(ThreadingHTTPServer):
    """One of the two ports."""

    daemon_threads = True

    def __init__(self, hub: LoopbackHub, storage: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.storage = hub, storage

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that went away."""


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def handle_request(self) -> None:
        hub = self.server.hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        record = Record(self.command, self.path, headers, storage=self.server.storage)
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        fault = hub.faults.take(record.method, record.url, has_body)
        in_answer = fault.in_answer if fault.in_answer is not None else not has_body
        cut_request = fault.cut_after is not None and not in_answer
        with hub.lock:
            hub.requests.append(record)
        for part in self._body(headers, fault.cut_after if cut_request else None):
            record.body += part
        if cut_request:
            self._reset()
            return
        if fault.seconds:
            hub.closing.wait(fault.seconds)
        if fault.status is None or fault.done:
            answer = hub.answer(record)
        if fault.status is not None:
            answer = HubError(fault.status, fault.message, headers=fault.headers).answer()
        self._send(record, answer, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def _body(self, headers: dict[str, str], limit: Optional[int]) -> Iterator[bytes]:
        """The request's body in parts, at most `limit` bytes of it."""
        left = float("inf") if limit is None else limit
        for size in self._part_sizes(headers):
            while size > 0 and left > 0:
                part = self.rfile.read(int(min(size, left, 65536)))
                if not part:
                    return
                size, left = size - len(part), left - len(part)
                yield part
            if left <= 0:
                return

    def _part_sizes(self, headers: dict[str, str]) -> Iterator[int]:
        if "chunked" not in headers.get("transfer-encoding", ""):
            yield int(headers.get("content-length", 0))
            return
        while (size := int(self.rfile.readline().split(b";")[0] or b"0", 16)) > 0:
            yield size
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, record: Record, answer: Answer, fault: Fault) -> None:
        record.status = answer.status
        self.send_response(answer.status)
        answer.headers.setdefault("Content-Length", str(len(answer.body)))
        answer.headers.setdefault("X-Request-Id", secrets.token_hex(8))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        body = b"" if record.method == "HEAD" else answer.body
        self.end_headers()
        self.wfile.write(body[: fault.cut_after])
        if fault.cut_after is not None:
            self.close_connection = True
            if fault.reset:
                self._reset()

    def _reset(self) -> None:
        # Closing with a linger of zero seconds makes the kernel send RST.
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for stream in (self.rfile, self.wfile, self.connection):
            stream.close()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Writes nothing: `hub.requests` tells more."""
