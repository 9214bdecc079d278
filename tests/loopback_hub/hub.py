"""The Hub itself: its state, what tests may ask of it, and the faults that they may plan."""

from __future__ import annotations

import hmac
import secrets
import threading
import traceback
from pathlib import Path
from types import TracebackType
from typing import Optional, Union
from urllib.parse import quote, urlencode

from . import api, transfers  # noqa: F401 (their routes)
from .client import Client
from .faults import Fault, Faults
from .messages import Answer, HubError, Record, find_route, json_answer
from .repositories import Blob, Commit, Repository, User
from .server import Server


class LoopbackHub(Client):
    """A running Hub, to be used in a `with` statement.

    Args:
        home (`Union[str, Path]`): A folder for the clients' caches.

    Attributes:
        url (`str`): The Hub's address.
        storage_url (`str`): The address of the storage of large files, to which no token may be sent.
        user (`str`): The name of the user to whom `token` belongs, who may write.
        token (`str`): The token.
        users (`dict[str, User]`): All users by their tokens.
        repositories (`dict[tuple[str, str], Repository]`): The repositories by type and id.
        requests (`list[Record]`): All requests, in the order of their arrival.
    """

    def __init__(self, home: Union[str, Path]) -> None:
        self.home = Path(home)
        self.user = "tester"
        self.users: dict[str, User] = {}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[Record] = []
        self.faults = Faults()
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self.token = self.add_user(self.user)
        self._secret = secrets.token_bytes(16)
        self._servers = [Server(self, storage) for storage in (False, True)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> LoopbackHub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        super().close()

    def add_user(self, name: str, role: str = "write", organizations: tuple[str, ...] = ()) -> str:
        """Adds somebody, and returns the token."""
        token = f"hf_{secrets.token_hex(12)}"
        self.users[token] = User(name, role, tuple(organizations))
        return token

    def create_repo(
        self,
        repo_id: str,
        repo_type: str = "model",
        private: bool = False,
        gated: Union[bool, str] = False,
        files: Optional[dict[str, bytes]] = None,
    ) -> Repository:
        """Makes a repository without asking over the wire, with a commit of the files if there are any."""
        repo = self.repositories[repo_type, repo_id] = Repository(repo_id, repo_type, private, gated)
        if files:
            head = repo.commit_at("main")
            blobs = {path: Blob(data, repo.is_large(path, len(data), head)) for path, data in files.items()}
            repo.objects.update({blob.sha256: blob.content for blob in blobs.values() if blob.lfs})
            repo.add_commit("main", "Add files", "", repo.namespace, {**head.files, **blobs})
        return repo

    def repository(self, repo_id: str, repo_type: str = "model") -> Repository:
        """The repository; a KeyError if there is none."""
        return self.repositories[repo_type, repo_id]

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """The files' contents by path, `.gitattributes` of the initial commit among them."""
        commit = self.repository(repo_id, repo_type).commit_at(revision)
        return {path: blob.content for path, blob in sorted(commit.files.items())}

    def history(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """The commits, the last one first; the initial one is by "system"."""
        return self.repository(repo_id, repo_type).history(revision)

    def uploaded_bytes(self) -> bytes:
        """Everything that was received, as sent and decoded (see `Record.contents`), to be searched."""
        with self.lock:
            return b"\n".join(part for record in self.requests for part in record.contents())

    def fail(
        self,
        path_pattern: str,
        status: int = 503,
        times: int = 1,
        *,
        method: Optional[str] = None,
        retry_after: Optional[int] = None,
        message: str = "A planned fault",
        done: bool = False,
    ) -> None:
        """The next requests that match fail; with `done`, only after they took effect (as when a gateway times out).

        Args:
            path_pattern (`str`): A pattern as of file names, for path and query: `"*/commit/*"`.
            status (`int`): The status that is answered.
            times (`int`): How many requests fail.
            method (`Optional[str]`): Only requests of this method.
            retry_after (`Optional[int]`): Seconds for the header `Retry-After`.
            message (`str`): What the user is told.
            done (`bool`): Whether the requests take effect.
        """
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        self.faults.plan(Fault(path_pattern, method, times, status, message, headers, done))

    def cut(
        self,
        path_pattern: str,
        after_bytes: int,
        times: int = 1,
        *,
        method: Optional[str] = None,
        in_answer: Optional[bool] = None,
        reset: bool = False,
    ) -> None:
        """The connections of the next requests that match break in the middle of a body.

        Args:
            path_pattern (`str`): A pattern as of file names, for path and query.
            after_bytes (`int`): How many bytes of the body pass; if it is shorter, its end.
            times (`int`): How many connections break.
            method (`Optional[str]`): Only requests of this method.
            in_answer (`Optional[bool]`): Whether the answer is cut, after the request took effect. By default the
                request if it has a body, else the answer.
            reset (`bool`): Whether an answer is cut by resetting the connection instead of closing it.
        """
        self.faults.plan(Fault(path_pattern, method, times, cut_after=after_bytes, in_answer=in_answer, reset=reset))

    def slow(self, path_pattern: str, seconds: float, times: int = 1, *, method: Optional[str] = None) -> None:
        """The next requests that match are answered only after a while."""
        self.faults.plan(Fault(path_pattern, method, times, seconds=seconds))

    def signed(self, method: str, path: str, filename: Optional[str] = None) -> str:
        """A URL of the storage that needs no token."""
        query = {"signature": hmac.new(self._secret, f"{method} {path}".encode(), "sha256").hexdigest()}
        if filename is not None:
            query["response-content-disposition"] = f'inline; filename="{filename}";'
        return f"{self.storage_url}{quote(path)}?{urlencode(query)}"

    def check_signature(self, record: Record) -> None:
        """Refuses what the storage would refuse: URLs without a signature, and a token beside it."""
        if "authorization" in record.headers:
            raise HubError(400, "Only one auth mechanism allowed")
        method = "GET" if record.method == "HEAD" else record.method
        if f"{self.storage_url}{record.url}".split("&")[0] != self.signed(method, record.path):
            raise HubError(403, "The signature does not match")

    def answer(self, record: Record) -> Answer:
        """Does what a request asks."""
        with self.lock:
            try:
                function, arguments = find_route(record)
                result = function(self, record, **arguments)
            except HubError as error:
                return error.answer()
            except Exception:
                # A status that the client does not try again.
                return HubError(501, traceback.format_exc()).answer()
        return result if isinstance(result, Answer) else json_answer(result)
