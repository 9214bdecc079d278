"""What the routes share: who asks, for which repository, and whether that is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from .messages import HubError, Record
from .repositories import Repository, User


if TYPE_CHECKING:
    from .hub import LoopbackHub


# Plural of the type, then the id. One without an owner is looked for, and not found.
_ID = r"(?P<repo_id>[^/]+?(?:/[^/]+?)?)"
PAGE = rf"/(?:(?P<kinds>datasets|spaces)/)?{_ID}"
API = rf"/api/(?P<kinds>models|datasets|spaces)/{_ID}"
REVISION = r"(?P<revision>[^/]+)"
OBJECT = r"/(?P<kinds>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"


def user_of(hub: LoopbackHub, record: Record) -> Optional[User]:
    """Who sent the request; `None` without a token.

    Raises:
        HubError: If the token is nobody's.
    """
    authorization = record.headers.get("authorization")
    if authorization is None:
        return None
    user = hub.users.get(authorization.removeprefix("Bearer "))
    if user is None:
        raise HubError(401, "Invalid credentials in Authorization header")
    return user


def readable(hub: LoopbackHub, record: Record, repo_id: str, kinds: Optional[str]) -> Repository:
    """The repository, if the sender may know of it.

    Raises:
        HubError: Of code `RepoNotFound`: the Hub does not tell apart what is missing and what is private. Somebody
            without a token is told to log in (401).
    """
    user = user_of(hub, record)
    repo = hub.repositories.get(((kinds or "models").removesuffix("s"), repo_id))
    if repo is None or not repo.may_read(user):
        if user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")
    return repo


def downloadable(hub: LoopbackHub, record: Record, repo_id: str, kinds: Optional[str]) -> Repository:
    """The repository, if the sender may have its files.

    Raises:
        HubError: As `readable`, and of code `GatedRepo`.
    """
    repo, user = readable(hub, record, repo_id, kinds), user_of(hub, record)
    if not repo.may_download(user):
        message = f"Access to {repo.type} {repo.id} is restricted. You must have access to it and be authenticated."
        raise HubError(401 if user is None else 403, message, "GatedRepo")
    return repo


def writable(hub: LoopbackHub, record: Record, repo_id: str, kinds: Optional[str]) -> tuple[Repository, User]:
    """The repository and its writer.

    Raises:
        HubError: As `readable`, and of status 403 without the right to write.
    """
    repo, user = readable(hub, record, repo_id, kinds), user_of(hub, record)
    if user is None:
        raise HubError(401, "Invalid username or password.", "RepoNotFound")
    if not repo.may_write(user):
        raise HubError(403, f"You don't have write access to the {repo.type} {repo.id} with this token.")
    return repo, user
