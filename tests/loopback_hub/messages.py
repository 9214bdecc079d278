"""What goes over the wire: requests, answers, errors, and a record of all that was received."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Optional, Union
from urllib.parse import parse_qs, unquote, unquote_plus, urlsplit


@dataclass
class Record:
    """One request as it was received.

    Args:
        method (`str`): The method.
        url (`str`): Path and query as sent, percent-encoded.
        headers (`dict[str, str]`): The headers, by their names in lower case.
        body (`bytes`): What was read of the body: of an upload that was cut, the part before the cut.
        storage (`bool`): Whether the storage of large files was asked, not the Hub itself.
        status (`Optional[int]`): What was answered; `None` if the connection was cut before.
    """

    method: str
    url: str
    headers: dict[str, str]
    body: bytes = b""
    storage: bool = False
    status: Optional[int] = None

    @property
    def path(self) -> str:
        """The path, percent-encoded."""
        return urlsplit(self.url).path

    @property
    def query(self) -> dict[str, list[str]]:
        """The query's values by name."""
        return parse_qs(urlsplit(self.url).query)

    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)

    def contents(self) -> Iterator[bytes]:
        """Everything that was sent, as sent and decoded: percent-encoding, strings of JSON, and base64 in them."""
        yield f"{self.method} {self.url}".encode()
        yield unquote(self.url).encode()
        for name, value in self.headers.items():
            yield f"{name}: {value}".encode()
        yield self.body
        kind = self.headers.get("content-type", "")
        if "json" in kind:
            for line in self.body.split(b"\n") if "ndjson" in kind else [self.body]:
                yield from _decoded(line)
        elif "urlencoded" in kind:
            yield unquote_plus(self.body.decode()).encode()


def _decoded(line: bytes) -> Iterator[bytes]:
    try:
        yield from _strings(json.loads(line))
    except ValueError:
        # A line that was cut in its middle.
        for encoded in re.findall(rb'"(?:content|sample)": ?"([\w+/]*)', line):
            yield base64.b64decode(encoded[: len(encoded) // 4 * 4])


def _strings(value: Any, name: str = "") -> Iterator[bytes]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield key.encode()
            yield from _strings(entry, key)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry, name)
    elif isinstance(value, str):
        yield value.encode()
        if name in ("content", "sample") and re.fullmatch(r"[\w+/]+=*", value) and len(value) % 4 == 0:
            yield base64.b64decode(value)


@dataclass
class Answer:
    """A status, a body and headers."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """An error in the Hub's form: the client chooses its exception by the status and by `X-Error-Code`.

    Args:
        status (`int`): The status.
        message (`str`): What the user is told.
        code (`Optional[str]`): `"RepoNotFound"`, `"RevisionNotFound"`, `"EntryNotFound"` or `"GatedRepo"`.
        headers (`Optional[dict[str, str]]`): Further headers.
        details (`Optional[dict[str, Any]]`): Further entries of the JSON body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: Optional[str] = None,
        headers: Optional[dict[str, str]] = None,
        details: Optional[dict[str, Any]] = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers, self.details = headers or {}, details or {}

    def answer(self) -> Answer:
        """The error as an answer."""
        # Headers hold one line of Latin-1.
        line = self.message.splitlines()[0].encode("latin-1", "replace").decode("latin-1")
        headers = {"X-Error-Message": line, **self.headers}
        if self.code is not None:
            headers["X-Error-Code"] = self.code
        return json_answer({"error": self.message, **self.details}, self.status, headers)


def json_answer(data: Any, status: int = 200, headers: Optional[dict[str, str]] = None) -> Answer:
    """An answer whose body is JSON."""
    return Answer(
        status, json.dumps(data).encode(), {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
    )


# What a route returns: an answer, or what is sent as JSON.
Result = Union[Answer, dict, list]
ROUTES: list[tuple[str, bool, re.Pattern[str], Callable[..., Result]]] = []


def route(method: str, pattern: str, storage: bool = False) -> Callable[[Callable], Callable]:
    """Registers a function for a method and for paths that match; named groups, unquoted, become its arguments."""

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        ROUTES.append((method, storage, re.compile(pattern), function))
        return function

    return register


def find_route(record: Record) -> tuple[Callable[..., Result], dict[str, str]]:
    """The function for a request and its arguments.

    Raises:
        HubError: If there is none.
    """
    method = "GET" if record.method == "HEAD" else record.method
    for candidate, storage, pattern, function in ROUTES:
        # Before unquoting: a branch's name may hold a slash, which is sent as %2F.
        match = pattern.fullmatch(record.path)
        if match and candidate == method and storage == record.storage:
            return function, {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
    raise HubError(404, f"No route for {record.method} {record.path}")
