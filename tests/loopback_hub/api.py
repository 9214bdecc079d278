"""The routes that describe and manage repositories."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional
from urllib.parse import parse_qs

import yaml

from .access import API, REVISION, readable, user_of, writable
from .cards import card_metadata, card_problems
from .messages import HubError, Record, Result, json_answer, route
from .repositories import Blob, Commit, Repository, git_hash


if TYPE_CHECKING:
    from .hub import LoopbackHub


@route("GET", "/api/whoami-v2")
def whoami(hub: LoopbackHub, record: Record) -> Result:
    user = user_of(hub, record)
    if user is None:
        raise HubError(401, "Invalid username or password.")
    token = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": user.role}}
    orgs = [{"type": "org", "name": name} for name in user.organizations]
    return {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "orgs": orgs, "auth": token}


@route("GET", "/api/agent-harnesses")
def agent_harnesses(hub: LoopbackHub, record: Record) -> Result:
    return {"standardEnvVars": [], "harnesses": {}}


@route("GET", "/api/telemetry/.*")
def telemetry(hub: LoopbackHub, record: Record) -> Result:
    return {}


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: LoopbackHub, record: Record) -> Result:
    errors, warnings = card_problems(record.json()["content"])
    data = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return json_answer(data, 400 if errors else 200)


@route("POST", "/api/repos/create")
def create_repository(hub: LoopbackHub, record: Record) -> Result:
    wanted, user = record.json(), user_of(hub, record)
    if user is None:
        raise HubError(401, "Invalid username or password.")
    namespace, kind = wanted.get("organization") or user.name, wanted.get("type", "model")
    if user.role != "write" or not user.owns(namespace):
        raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    repo_id = f"{namespace}/{wanted['name']}"
    known = hub.repositories.get((kind, repo_id))
    if known is not None:
        url = f"{hub.url}/{known.page}"
        raise HubError(409, f"You already created this {kind} repo", details={"url": url})
    private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    repo = hub.create_repo(repo_id, kind, private)
    return {"url": f"{hub.url}/{repo.page}", "name": repo.id, "id": repo.id}


@route("DELETE", "/api/repos/delete")
def delete_repository(hub: LoopbackHub, record: Record) -> Result:
    wanted, user = record.json(), user_of(hub, record)
    namespace = wanted.get("organization") or (user.name if user else "")
    repo, _ = writable(hub, record, f"{namespace}/{wanted['name']}", f"{wanted.get('type', 'model')}s")
    del hub.repositories[repo.type, repo.id]
    return {}


@route("PUT", f"{API}/settings")
def settings(hub: LoopbackHub, record: Record, repo_id: str, kinds: str) -> Result:
    repo, _ = writable(hub, record, repo_id, kinds)
    wanted = record.json()
    repo.gated = wanted.get("gated", repo.gated)
    if "visibility" in wanted:
        repo.private = wanted["visibility"] == "private"
    return {}


@route("GET", f"{API}/auth-check(?P<write>/write)?")
def auth_check(hub: LoopbackHub, record: Record, repo_id: str, kinds: str, write: Optional[str] = None) -> Result:
    (writable if write else readable)(hub, record, repo_id, kinds)
    return {}


@route("GET", API)
@route("GET", f"{API}/revision/{REVISION}")
def info(hub: LoopbackHub, record: Record, repo_id: str, kinds: str, revision: str = "main") -> Result:
    repo = readable(hub, record, repo_id, kinds)
    commit, first = repo.commit_at(revision), repo.history()[-1]
    blobs = record.query.get("blobs") == ["true"]
    metadata = _metadata(commit)
    data = {
        "_id": git_hash("repository", repo.page.encode())[:24],
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.oid,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": metadata.get("tags") or [],
        "cardData": metadata,
        "createdAt": _date(first),
        "lastModified": _date(commit),
        "siblings": [_sibling(path, blob, blobs) for path, blob in sorted(commit.files.items())],
    }
    if repo.type == "model":
        data["modelId"] = repo.id
        data.update({name: metadata[name] for name in ("library_name", "pipeline_tag") if name in metadata})
    wanted = record.query.get("expand")
    return {name: value for name, value in data.items() if wanted is None or name in {"_id", "id", *wanted}}


def _metadata(commit: Commit) -> dict[str, Any]:
    try:
        metadata = card_metadata(commit.files.get("README.md", Blob(b"")).content.decode())
    except yaml.YAMLError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _date(commit: Commit) -> str:
    return commit.date.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _sibling(path: str, blob: Blob, details: bool) -> dict[str, Any]:
    if not details:
        return {"rfilename": path}
    entry = _entry(path, blob)
    sibling = {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]}
    if blob.lfs:
        sibling["lfs"] = {"sha256": blob.sha256, "size": entry["size"], "pointerSize": len(blob.pointer)}
    return sibling


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
    return entry


def _folders(commit: Commit) -> list[str]:
    return sorted({path[:place] for path in commit.files for place, letter in enumerate(path) if letter == "/"})


def _folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": git_hash("tree", path.encode())}


@route("GET", f"{API}/tree/{REVISION}(?:/(?P<folder>.+))?")
def tree(
    hub: LoopbackHub, record: Record, repo_id: str, kinds: str, revision: str, folder: Optional[str] = None
) -> Result:
    commit = readable(hub, record, repo_id, kinds).commit_at(revision)
    start = f"{folder.strip('/')}/" if folder else ""
    deep = record.query.get("recursive") == ["true"]
    entries = [_folder_entry(path) for path in _folders(commit)]
    entries += [_entry(path, blob) for path, blob in sorted(commit.files.items())]
    entries = [entry for entry in entries if entry["path"].startswith(start)]
    if start and not entries:
        raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    return [entry for entry in entries if deep or "/" not in entry["path"][len(start) :]]


@route("POST", f"{API}/paths-info/{REVISION}")
def paths_info(hub: LoopbackHub, record: Record, repo_id: str, kinds: str, revision: str) -> Result:
    commit = readable(hub, record, repo_id, kinds).commit_at(revision)
    paths = parse_qs(record.body.decode()).get("paths", [])
    folders = set(_folders(commit))
    found = [_entry(path, commit.files[path]) for path in paths if path in commit.files]
    return found + [_folder_entry(path) for path in paths if path in folders]


@route("GET", f"{API}/refs")
def refs(hub: LoopbackHub, record: Record, repo_id: str, kinds: str) -> Result:
    repo = readable(hub, record, repo_id, kinds)
    listed = {
        kind: [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid} for name, oid in found.items()]
        for kind, folder, found in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
    }
    return {**listed, "converts": [], "pullRequests": []}


@route("GET", f"{API}/commits/{REVISION}")
def commits(hub: LoopbackHub, record: Record, repo_id: str, kinds: str, revision: str) -> Result:
    history = readable(hub, record, repo_id, kinds).history(revision)
    return [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author}],
            "date": _date(commit),
        }
        for commit in history
    ]


def _refuse_known(known: dict[str, str], name: str, kind: str) -> None:
    if name in known:
        raise HubError(409, f"{kind} {name} already exists")


@route("POST", f"{API}/branch/{REVISION}")
def create_branch(hub: LoopbackHub, record: Record, repo_id: str, kinds: str, revision: str) -> Result:
    repo, _ = writable(hub, record, repo_id, kinds)
    start = repo.commit_at(record.json().get("startingPoint", "main"))
    _refuse_known(repo.branches, revision, "Reference")
    repo.branches[revision] = start.oid
    return {}


@route("POST", f"{API}/tag/{REVISION}")
def create_tag(hub: LoopbackHub, record: Record, repo_id: str, kinds: str, revision: str) -> Result:
    repo, _ = writable(hub, record, repo_id, kinds)
    tag, target = record.json()["tag"], repo.commit_at(revision)
    _refuse_known(repo.tags, tag, "Tag")
    repo.tags[tag] = target.oid
    return {}


@route("DELETE", f"{API}/(?P<kind>branch|tag)/{REVISION}")
def delete_reference(hub: LoopbackHub, record: Record, repo_id: str, kinds: str, kind: str, revision: str) -> Result:
    repo: Repository = writable(hub, record, repo_id, kinds)[0]
    if kind == "branch" and revision == "main":
        raise HubError(403, "The branch main cannot be deleted")
    if (repo.branches if kind == "branch" else repo.tags).pop(revision, None) is None:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return {}
