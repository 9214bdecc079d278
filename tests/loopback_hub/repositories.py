"""Repositories with a history, and who may read and write them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Optional, Union

from .messages import HubError


# The real Hub starts every repository with a longer list of the same form.
GITATTRIBUTES = "".join(
    f"*.{extension} filter=lfs diff=lfs merge=lfs -text\n"
    for extension in ("bin", "h5", "npy", "npz", "onnx", "parquet", "pt", "pth", "safetensors", "zip")
).encode()
LFS_SIZE = 10 * 1024 * 1024


def git_hash(kind: str, content: bytes) -> str:
    """The SHA-1 that git gives an object."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


@dataclass(frozen=True)
class Blob:
    """A file's content, and whether git holds only a pointer to it."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        """The content's SHA-256, by which large files are stored."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git holds for a large file (the specification of Git LFS)."""
        lines = [
            "version https://git-lfs.github.com/spec/v1",
            f"oid sha256:{self.sha256}",
            f"size {len(self.content)}",
        ]
        return "".join(f"{line}\n" for line in lines).encode()

    @cached_property
    def oid(self) -> str:
        """The blob's hash in git."""
        return git_hash("blob", self.pointer if self.lfs else self.content)

    @property
    def etag(self) -> str:
        """What names the content in the client's cache."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """All files at one point of the history. `title` is the message's first line, `message` the description."""

    oid: str
    parent: Optional[str]
    title: str
    message: str
    author: str
    date: datetime
    files: dict[str, Blob] = field(repr=False)


@dataclass(frozen=True)
class User:
    """Somebody with a token, of role `"write"` or `"read"`."""

    name: str
    role: str = "write"
    organizations: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        """Whether the namespace is the user's or of one of the user's organizations."""
        return namespace in (self.name, *self.organizations)


class Repository:
    """A repository with branches, tags, and large files that were uploaded, whether committed or not.

    Args:
        repo_id (`str`): The owner and the name.
        repo_type (`str`): `"model"`, `"dataset"` or `"space"`.
        private (`bool`): Whether only its owner may see it.
        gated (`Union[bool, str]`): Whether files are only for its owner and for those in `granted`.
    """

    def __init__(
        self, repo_id: str, repo_type: str = "model", private: bool = False, gated: Union[bool, str] = False
    ) -> None:
        self.id, self.type, self.private, self.gated = repo_id, repo_type, private, gated
        self.granted: set[str] = set()
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.add_commit("main", "initial commit", "", "system", {".gitattributes": Blob(GITATTRIBUTES)})

    @property
    def namespace(self) -> str:
        """The owner."""
        return self.id.split("/")[0]

    @property
    def page(self) -> str:
        """The path of its page, as in the URLs that people see."""
        return self.id if self.type == "model" else f"{self.type}s/{self.id}"

    def add_commit(self, branch: str, title: str, message: str, author: str, files: dict[str, Blob]) -> Commit:
        """Makes the files the head of a branch."""
        parent, date = self.branches.get(branch), datetime.now(timezone.utc)
        tree = {path: blob.oid for path, blob in sorted(files.items())}
        # The count tells apart commits of the same instant.
        identity = json.dumps([self.type, self.id, parent, tree, title, message, author, str(date), len(self.commits)])
        commit = Commit(git_hash("commit", identity.encode()), parent, title, message, author, date, files)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def commit_at(self, revision: str) -> Commit:
        """The commit of a branch, a tag, or a hash of at least seven digits.

        Raises:
            HubError: Of code `RevisionNotFound`.
        """
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        oid = self.branches.get(name) or self.tags.get(name)
        if oid is None and len(revision) >= 7:
            oid = next((oid for oid in self.commits if oid.startswith(revision)), None)
        if oid is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits up to a revision, the last one first."""
        found: list[Commit] = []
        oid: Optional[str] = self.commit_at(revision).oid
        while oid is not None:
            found.append(self.commits[oid])
            oid = found[-1].parent
        return found

    def is_large(self, path: str, size: int, commit: Commit) -> bool:
        """Whether a file goes to the storage of large files: by its size, or by `.gitattributes`."""
        lines = commit.files.get(".gitattributes", Blob(b"")).content.decode().splitlines()
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        name = path.rsplit("/", 1)[-1]
        return size > LFS_SIZE or any(fnmatchcase(name, pattern) or fnmatchcase(path, pattern) for pattern in patterns)

    def may_read(self, user: Optional[User]) -> bool:
        """Whether the user may know of the repository."""
        return not self.private or (user is not None and user.owns(self.namespace))

    def may_download(self, user: Optional[User]) -> bool:
        """Whether the user may have the files, which of a gated repository is less than knowing of it."""
        return not self.gated or (user is not None and (user.owns(self.namespace) or user.name in self.granted))

    def may_write(self, user: User) -> bool:
        """Whether the user's token may commit."""
        return user.role == "write" and user.owns(self.namespace)
