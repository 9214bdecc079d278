"""Planned faults: errors, connections that break, and answers that take long."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Optional
from urllib.parse import unquote


@dataclass
class Fault:
    """What goes wrong with the next requests whose method and path match.

    Args:
        pattern (`str`): A pattern as of file names, for the unquoted path with its query.
        method (`Optional[str]`): The method; any if `None`.
        times (`int`): For how many requests.
        status (`Optional[int]`): Answer with this status.
        message (`str`): What the user is told with it.
        headers (`dict[str, str]`): Headers of that answer.
        done (`bool`): Whether the request takes effect before it fails.
        cut_after (`Optional[int]`): Cut the connection after so many bytes of a body.
        in_answer (`Optional[bool]`): Whether of the answer's body; by default if the request has none.
        reset (`bool`): Whether an answer is cut by resetting the connection, not by closing it.
        seconds (`float`): Wait so long before answering.
    """

    pattern: str
    method: Optional[str] = None
    times: int = 1
    status: Optional[int] = None
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    done: bool = False
    cut_after: Optional[int] = None
    in_answer: Optional[bool] = None
    reset: bool = False
    seconds: float = 0.0

    def matches(self, method: str, url: str) -> bool:
        """Whether the fault is due for a request."""
        return self.times > 0 and self.method in (None, method) and fnmatchcase(unquote(url), self.pattern)


class Faults:
    """The faults still to come, in the order in which they were planned."""

    def __init__(self) -> None:
        self._planned: list[Fault] = []
        self._lock = threading.Lock()

    def plan(self, fault: Fault) -> None:
        """Adds a fault."""
        with self._lock:
            self._planned.append(fault)

    def take(self, method: str, url: str, has_body: bool) -> Fault:
        """The fault of a request, or one that does nothing.

        Args:
            method (`str`): The request's method.
            url (`str`): Its path and query.
            has_body (`bool`): Whether it has a body: an answer's cut is not for requests without one to cut.
        """
        with self._lock:
            for fault in self._planned:
                if not fault.matches(method, url):
                    continue
                if fault.cut_after is not None and not fault.in_answer and not has_body and method != "GET":
                    continue
                fault.times -= 1
                return fault
        return Fault(url)
