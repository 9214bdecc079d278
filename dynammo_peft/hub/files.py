"""The files of a published adapter: found in a folder or fetched from the Hub, or a line that says what is missing."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Optional, Union

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME


# Weights that are read by running what is in them.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

Token = Union[str, bool, None]


def refusal(where: str, reason: object) -> ValueError:
    """A `ValueError` of one line: what is not accepted, and why."""
    # Names in a repository's files may hold anything.
    text = "".join(character if character.isprintable() else " " for character in f"{where}: {reason}")
    return ValueError(" ".join(text.split()))


@dataclass(frozen=True)
class AdapterFiles:
    """Where an adapter's files lie, and what the user calls the place.

    Args:
        folder (`Path`): The folder that holds them.
        name (`str`): The folder as the user knows it: a path, or a repository with its subfolder.
    """

    folder: Path
    name: str

    @property
    def config(self) -> Path:
        """The adapter's configuration."""
        return self.folder / CONFIG_NAME

    @property
    def weights(self) -> Path:
        """The adapter's tensors."""
        return self.folder / SAFETENSORS_WEIGHTS_NAME

    def shown(self, path: Path) -> str:
        """A file as the user knows it."""
        return f"{self.name}/{path.name}"


def find_adapter(
    repo_id_or_path: Union[str, os.PathLike],
    subfolder: Optional[str] = None,
    revision: Optional[str] = None,
    token: Token = None,
) -> AdapterFiles:
    """Finds an adapter in a folder, or fetches its two files from the Hub.

    Args:
        repo_id_or_path (`Union[str, os.PathLike]`): A local folder, else a repository on the Hub.
        subfolder (`Optional[str]`): The folder in it that holds the adapter.
        revision (`Optional[str]`): The repository's branch, tag or commit.
        token (`Optional[Union[str, bool]]`): The user's token for the Hub.

    Returns:
        `AdapterFiles`: Where both files are.

    Raises:
        ValueError: If there is no such place, no adapter in it, or one with pickled weights only.
    """
    root = os.fspath(repo_id_or_path)
    inside = PurePosixPath((subfolder or "").strip("/"))
    if ".." in inside.parts:
        raise ValueError(f"subfolder={subfolder!r} leads out of {root}; give a folder inside.")
    name = "/".join([root.rstrip("/"), *inside.parts])
    if os.path.isdir(root):
        files = AdapterFiles(Path(root, inside), name)
        names = _local_names(files.folder)
    elif os.path.exists(root):
        raise refusal(root, "This is a file; give the folder that holds the adapter.")
    elif isinstance(repo_id_or_path, os.PathLike):
        raise refusal(root, "There is no such folder.")
    else:
        try:
            wanted = [str(inside / file) for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]
            snapshot = fetch(root, wanted, revision, token)
            files = AdapterFiles(snapshot / inside, name)
            names = _remote_names(files, root, snapshot.name, inside, token)
        except HUB_ERRORS as error:
            raise refusal(root, hub_reason(error, revision)) from error
    _check_complete(files, names)
    return files


def fetch(repo_id: str, names: Sequence[str], revision: Optional[str], token: Token) -> Path:
    """Downloads files of a repository, all of one commit, and returns the folder that they are in.

    The folder is called as the commit. Raises `HUB_ERRORS`; a file that does not exist is no error.
    """
    patterns = [glob.escape(name) for name in names]
    return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))


# What a request to the Hub may end in.
HUB_ERRORS = (OSError, HFValidationError, httpx.HTTPError)


def hub_reason(error: BaseException, revision: Optional[str] = None) -> str:
    """What went wrong with the Hub and what to do, in one line.

    Args:
        error (`BaseException`): The client's error, of which the cause matters too.
        revision (`Optional[str]`): The revision that was asked for.
    """
    for cause in _causes(error):
        # A gated repository counts as one that is not found.
        if isinstance(cause, GatedRepoError):
            return "Access is restricted: ask for it on the repository's page, then log in (`hf auth login`)."
        if isinstance(cause, RepositoryNotFoundError):
            return (
                "The Hub has no such repository, or a private one: check the name, log in (`hf auth login`) or give "
                "a token that may read it."
            )
        if isinstance(cause, RevisionNotFoundError):
            return f"The repository has no revision {revision!r}; give one of its branches, tags or commits."
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            advice = {401: "log in again (`hf auth login`)", 403: "give a token that may read the repository"}
            return f"The Hub refuses the request (status {status}); {advice.get(status, 'try again later')}."
        if isinstance(cause, LocalTokenNotFoundError):
            return "token=True needs a login (`hf auth login`)."
        if isinstance(cause, HFValidationError):
            return "This is no folder here, and cannot be a repository on the Hub ('user/name')."
    if any(isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled)) for cause in _causes(error)):
        return "The files are not in the cache and the Hub cannot be reached; connect to it, or give a local folder."
    return f"{type(error).__name__}: {error}"


def _causes(error: Optional[BaseException]) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _local_names(folder: Path) -> list[str]:
    """The files of a folder, and the adapters in its subfolders."""
    found = [path for path in folder.glob("*") if path.is_file()] + list(folder.glob(f"*/{CONFIG_NAME}"))
    return [path.relative_to(folder).as_posix() for path in found]


def _remote_names(files: AdapterFiles, repo_id: str, commit: str, inside: PurePosixPath, token: Token) -> list[str]:
    """The files of a repository's folder, which is asked for only if one was not fetched."""
    if files.config.is_file() and files.weights.is_file():
        return [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]
    names = map(PurePosixPath, HfApi(token=token).list_repo_files(repo_id, revision=commit))
    return [str(name.relative_to(inside)) for name in names if name.is_relative_to(inside)]


def _check_complete(files: AdapterFiles, names: Sequence[str]) -> None:
    """Raises a `ValueError` unless the folder has a configuration and weights that are no pickle."""
    pickles = sorted(name for name in names if "/" not in name and name.lower().endswith(PICKLES))
    if SAFETENSORS_WEIGHTS_NAME not in names and pickles:
        raise refusal(
            f"{files.name}/{pickles[0]}",
            f"Pickled weights can run any code and are never opened; ask the author for {SAFETENSORS_WEIGHTS_NAME}, "
            "which `save_pretrained` writes.",
        )
    if CONFIG_NAME not in names:
        raise refusal(files.shown(files.config), f"There is no such file, so this is no adapter; {_advice(names)}.")
    if SAFETENSORS_WEIGHTS_NAME not in names:
        raise refusal(files.shown(files.weights), "There is no such file; the adapter was not saved completely.")


def _advice(names: Sequence[str]) -> str:
    elsewhere = sorted(name.removesuffix(f"/{CONFIG_NAME}") for name in names if name.endswith(f"/{CONFIG_NAME}"))
    if elsewhere:
        return f"there is one with subfolder={elsewhere[0]!r}"
    if "config.json" in names:
        return "it looks like a whole model, which AutoModelForImageClassification.from_pretrained loads"
    return "give what `save_pretrained` wrote"
