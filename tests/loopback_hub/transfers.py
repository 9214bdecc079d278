"""The routes by which files come and go: preupload, large files, commits, and downloads."""

from __future__ import annotations

import base64
import json
import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Optional
from urllib.parse import quote

from .access import API, OBJECT, PAGE, REVISION, downloadable, writable
from .cards import card_problems
from .messages import Answer, HubError, Record, Result, json_answer, route
from .repositories import Blob, Repository


if TYPE_CHECKING:
    from .hub import LoopbackHub

LFS_JSON = {"Content-Type": "application/vnd.git-lfs+json"}


@route("POST", f"{API}/preupload/{REVISION}")
def preupload(hub: LoopbackHub, record: Record, repo_id: str, kinds: str, revision: str) -> Result:
    repo, _ = writable(hub, record, repo_id, kinds)
    commit, wanted = repo.commit_at(revision), record.json()
    remote = commit.files.get(".gitignore", Blob(b"")).content.decode()
    ignored = [line.strip() for line in wanted.get("gitIgnore", remote).splitlines() if line.strip()]
    files = []
    for entry in wanted["files"]:
        path = entry["path"]
        large, known = repo.is_large(path, entry["size"], commit), commit.files.get(path)
        answer = {
            "path": path,
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": any(fnmatchcase(part, line) for line in ignored for part in (path, *path.split("/"))),
        }
        if known is not None:
            answer["oid"] = known.etag
        files.append(answer)
    return {"files": files}


@route("POST", rf"{PAGE}\.git/info/lfs/objects/batch")
def batch(hub: LoopbackHub, record: Record, repo_id: str, kinds: Optional[str] = None) -> Result:
    repo, _ = writable(hub, record, repo_id, kinds)
    objects = []
    for wanted in record.json()["objects"]:
        if wanted["oid"] not in repo.objects:
            href = hub.signed("PUT", f"/{repo.type}s/{repo.id}/{wanted['oid']}")
            verify = f"{hub.url}/{repo.page}.git/info/lfs/objects/verify"
            wanted = {**wanted, "actions": {"upload": {"href": href}, "verify": {"href": verify}}}
        objects.append(wanted)
    return json_answer({"transfer": "basic", "objects": objects}, headers=LFS_JSON)


@route("POST", rf"{PAGE}\.git/info/lfs/objects/verify")
def verify(hub: LoopbackHub, record: Record, repo_id: str, kinds: Optional[str] = None) -> Result:
    repo, _ = writable(hub, record, repo_id, kinds)
    wanted = record.json()
    if len(repo.objects.get(wanted["oid"], b"")) != wanted["size"]:
        raise HubError(404, f"Object {wanted['oid']} does not exist, or is of another size")
    return json_answer({}, headers=LFS_JSON)


@route("PUT", OBJECT, storage=True)
def store(hub: LoopbackHub, record: Record, repo_id: str, kinds: str, oid: str) -> Result:
    hub.check_signature(record)
    if Blob(record.body).sha256 != oid:
        raise HubError(400, f"The content is not that of {oid}")
    hub.repositories[kinds.removesuffix("s"), repo_id].objects[oid] = record.body
    return Answer(200, headers={"ETag": f'"{oid[:32]}"'})


@route("POST", f"{API}/commit/{REVISION}")
def commit(hub: LoopbackHub, record: Record, repo_id: str, kinds: str, revision: str) -> Result:
    repo, user = writable(hub, record, repo_id, kinds)
    if "create_pr" in record.query:
        raise HubError(400, "There are no pull requests here")
    if revision not in repo.branches:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    head = repo.commit_at(revision)
    header, *operations = [json.loads(line) for line in record.body.splitlines() if line]
    if header["key"] != "header":
        raise HubError(400, "The first line must be the header")
    if not head.oid.startswith(header["value"].get("parentCommit", "")):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    # All operations are done on a copy: the branch moves to a whole commit, or stays.
    files = dict(head.files)
    for operation in operations:
        _operate(repo, files, operation["key"], operation["value"])
    title, message = header["value"]["summary"], header["value"].get("description", "")
    made = repo.add_commit(revision, title, message, user.name, files)
    url = f"{hub.url}/{repo.page}/commit/{made.oid}"
    return {"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""}


def _operate(repo: Repository, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if key == "file":
        content = value["content"]
        files[path] = Blob(base64.b64decode(content) if value.get("encoding") == "base64" else content.encode())
        errors = card_problems(files[path].content.decode())[0] if path == "README.md" else []
        if errors:
            details = {"errors": [{"message": text} for text in errors]}
            raise HubError(400, "Invalid metadata in README.md", details=details)
    elif key == "lfsFile":
        if value["oid"] not in repo.objects:
            raise HubError(400, f"LFS pointer of {path} points to a file that does not exist: {value['oid']}")
        files[path] = Blob(repo.objects[value["oid"]], lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        start = f"{path.rstrip('/')}/"
        gone = [name for name in files if (name.startswith(start) if key == "deletedFolder" else name == path)]
        if not gone:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise HubError(400, f"Unknown operation: {key}")


@route("GET", f"{PAGE}/resolve/{REVISION}/(?P<path>.+)")
def resolve(
    hub: LoopbackHub, record: Record, repo_id: str, revision: str, path: str, kinds: Optional[str] = None
) -> Result:
    repo = downloadable(hub, record, repo_id, kinds)
    commit, blob = _blob(repo, revision, path)
    headers = {"X-Repo-Commit": commit}
    if blob.lfs:
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        headers["Location"] = hub.signed("GET", f"/{repo.type}s/{repo.id}/{blob.sha256}", path)
        return Answer(302, b"Found", headers)
    headers["Location"] = f"/api/resolve-cache/{repo.type}s/{repo.id}/{commit}/{quote(path)}"
    return Answer(307, b"Temporary Redirect", headers)


@route("GET", rf"/api/resolve-cache/{API.removeprefix('/api/')}/(?P<revision>[0-9a-f]{{40}})/(?P<path>.+)")
def resolve_cache(hub: LoopbackHub, record: Record, repo_id: str, kinds: str, revision: str, path: str) -> Result:
    commit, blob = _blob(downloadable(hub, record, repo_id, kinds), revision, path)
    return _content(record, blob, {"X-Repo-Commit": commit})


@route("GET", OBJECT, storage=True)
def stored(hub: LoopbackHub, record: Record, repo_id: str, kinds: str, oid: str) -> Result:
    hub.check_signature(record)
    return _content(record, Blob(hub.repositories[kinds.removesuffix("s"), repo_id].objects[oid], lfs=True))


def _blob(repo: Repository, revision: str, path: str) -> tuple[str, Blob]:
    commit = repo.commit_at(revision)
    if path not in commit.files:
        raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.oid})
    return commit.oid, commit.files[path]


def _content(record: Record, blob: Blob, headers: Optional[dict[str, str]] = None) -> Answer:
    """A blob, or the part of it that is asked for."""
    content, size = blob.content, len(blob.content)
    headers = {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", **(headers or {})}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", record.headers.get("range", ""))
    if asked is None or not any(asked.groups()):
        return Answer(200, content, headers)
    first, last = asked.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        raise HubError(416, "The range is not of the file", headers={"Content-Range": f"bytes */{size}"})
    return Answer(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})
