"""Talking to the Hub: who may push, one commit a push, and errors in one line."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import httpx, validate_repo_id

from ..version import __version__


logger = logging.getLogger(__name__)

# Seconds before a push is tried again, once for each.
WAITS = (1, 4, 16)
TOKENS = "https://huggingface.co/settings/tokens"


def hub_api(token: Optional[str] = None) -> HfApi:
    """A client of the Hub.

    Args:
        token (`Optional[str]`): A token; the one of `HF_TOKEN` or of `hf auth login` if `None`.
    """
    return HfApi(token=token, library_name="dynammo_peft", library_version=__version__)


def check_can_push(repo_id: str, token: Optional[str] = None, private: Optional[bool] = None) -> str:
    """
    Finds out before a long training whether its result can be pushed; nothing is created.

    Args:
        repo_id (`str`): The repository, as `"owner/name"`, or `"name"` for one's own.
        token (`Optional[str]`): A token of the Hub; the one of `HF_TOKEN` or of `hf auth login` if `None`.
        private (`Optional[bool]`): Whether the repository shall be private.

    Returns:
        `str`: The repository's whole name, `"owner/name"`.

    Raises:
        ValueError: If the name cannot be that of a repository, there is no token, the Hub does not know it or it may
            not write there, or the repository shall be private and is there and public.
        ConnectionError: If the Hub does not answer.
    """
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"repo_id={repo_id!r} is no name of a repository on the Hub; use 'owner/name'.") from error
    api = hub_api(token)
    with hub_errors(repo_id):
        account = api.whoami()
        role = account.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise ValueError(f"The token may only read from the Hub; make one that may write at {TOKENS}.")
        owner, _, name = repo_id.rpartition("/")
        owner = owner or account["name"]
        try:
            api.auth_check(f"{owner}/{name}", write=True)
            _check_private(api, f"{owner}/{name}", private)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError as error:
            # Of a fine-grained token the Hub does not tell all organisations.
            owners = [account["name"], *(entry["name"] for entry in account.get("orgs", ()))]
            if role == "write" and owner not in owners:
                raise ValueError(
                    f"repo_id={repo_id!r} belongs to {owner!r}, but the token to {account['name']!r}; choose one of "
                    f"{', '.join(map(repr, owners))} as its owner."
                ) from error
    return f"{owner}/{name}"


def commit_files(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path],
    superseded: Iterable[re.Pattern[str]],
    message: str,
    private: Optional[bool] = None,
    revision: Optional[str] = None,
) -> str:
    """
    Makes the repository if need be, and one commit of all files.

    Not by `upload_folder`: that takes along whatever lies in a folder, and cannot say which commit it follows. Here
    files go by name, and the commit is refused if somebody else's came between. `huggingface_hub` tries again to
    upload large files but not to commit, since of an answer that is lost nobody knows what it said. So the head of the
    branch is looked at first: if it holds these files, the commit was made.

    Args:
        api (`HfApi`): The client.
        repo_id (`str`): The repository, as `"owner/name"`.
        files (`Mapping[str, Path]`): Paths in the repository, and what to put there.
        superseded (`Iterable[re.Pattern[str]]`): Paths to delete where they are there and not among `files`; earlier
            commits keep them.
        message (`str`): Of the commit.
        private (`Optional[bool]`): Whether a new repository is private; the owner's default if `None`.
        revision (`Optional[str]`): The branch, made if it does not exist; `main` if `None`.

    Returns:
        `str`: The commit's address. If nothing has changed, the last one's.

    Raises:
        ValueError: If the Hub refuses.
        ConnectionError: If the Hub cannot be reached or has an error that lasts.
    """
    parent: Optional[str] = None
    for number, wait in enumerate((*WAITS, None)):
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            _check_private(api, repo_id, private)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            head = api.repo_info(repo_id, revision=revision, files_metadata=True)
            additions = [CommitOperationAdd(name, path) for name, path in files.items()]
            if parent not in (None, head.sha):
                if _holds(head.siblings, additions):
                    return f"{api.endpoint}/{repo_id}/commit/{head.sha}"
                raise _changed_meanwhile(repo_id)
            parent = head.sha
            deletions = [
                CommitOperationDelete(entry.rfilename, is_folder=False)
                for entry in head.siblings
                if entry.rfilename not in files and any(name.fullmatch(entry.rfilename) for name in superseded)
            ]
            made = api.create_commit(
                repo_id, [*additions, *deletions], commit_message=message, revision=revision, parent_commit=parent
            )
            return made.commit_url
        except httpx.HTTPError as error:
            if wait is None or not _may_pass(error, again=number > 0):
                raise
            logger.warning("Pushing to %s failed (%s); next try in %d s.", repo_id, _one_line(error), wait)
            time.sleep(wait)
    raise AssertionError("The last try either returns or raises.")


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turns what `huggingface_hub` raises into a `ValueError` or a `ConnectionError` of one line that says what to do.

    Args:
        repo_id (`str`): The repository that is talked about.
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ValueError("There is no token for the Hub; log in by `hf auth login`, or set HF_TOKEN.") from error
    except OfflineModeIsEnabled as error:
        raise ConnectionError("The Hub may not be asked in offline mode; unset HF_HUB_OFFLINE.") from error
    except HfHubHTTPError as error:
        raise _explained(error, repo_id) from error
    except httpx.HTTPError as error:
        raise _unreachable(error) from error
    except ValueError as error:
        # Among others what the Hub finds wrong in a card, over several lines.
        raise ValueError(_one_line(error)) from error
    except RuntimeError as error:
        # So huggingface_hub tells of an upload that it gave up.
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _explained(error.__cause__, repo_id) from error
        if isinstance(error.__cause__, httpx.HTTPError):
            raise _unreachable(error.__cause__) from error
        raise


def _explained(error: HfHubHTTPError, repo_id: str) -> Exception:
    status = error.response.status_code
    said = f" (it says: {_one_line(error)})"
    if status == 401:
        return ValueError(f"The Hub does not accept the token; log in by `hf auth login`, or set HF_TOKEN{said}.")
    if status == 403:
        return ValueError(
            f"The token may not write to {repo_id!r}; choose another, or a token that may ({TOKENS}){said}."
        )
    if status == 404:
        return ValueError(f"The Hub has no {repo_id!r}, no such revision of it, or hides it from this token{said}.")
    if status in (409, 412):
        return _changed_meanwhile(repo_id)
    if status == 429 or status >= 500:
        return ConnectionError(f"The Hub answers with status {status}; try again later{said}.")
    return ValueError(f"The Hub refuses with status {status}{said}.")


def _unreachable(error: httpx.HTTPError) -> ConnectionError:
    detail = f"{type(error).__name__}: {_one_line(error)}"
    return ConnectionError(f"The connection to the Hub failed ({detail}); look to the network, and push again.")


def _changed_meanwhile(repo_id: str) -> ValueError:
    return ValueError(
        f"{repo_id!r} was changed by somebody else meanwhile, and was left so; push again to go on from that."
    )


def _one_line(error: Exception) -> str:
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(text.split()).rstrip(".")


def _may_pass(error: httpx.HTTPError, again: bool) -> bool:
    """Whether another try may help; when trying `again`, also against what our own lost commit may have caused."""
    if not isinstance(error, HfHubHTTPError):
        return True
    status = error.response.status_code
    return status == 429 or status >= 500 or (again and status in (409, 412))


def _check_private(api: HfApi, repo_id: str, private: Optional[bool]) -> None:
    # The Hub leaves a repository that exists as public as it is.
    if private and not api.repo_info(repo_id).private:
        raise ValueError(
            f"{repo_id!r} shall be private, but it is there already and public; make it private in its settings, or "
            "choose another repo_id."
        )


def _holds(siblings: Iterable[RepoSibling], additions: Iterable[CommitOperationAdd]) -> bool:
    """Whether all files are in a repository with the same content."""
    known = {entry.rfilename: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in siblings}
    for addition in additions:
        content = Path(addition.path_or_fileobj).read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if known.get(addition.path_in_repo) not in (git, addition.upload_info.sha256.hex()):
            return False
    return True
