"""Where others get an adapter's base model from."""

from __future__ import annotations

import os
from typing import Optional

import torch
from huggingface_hub.errors import RevisionResolutionError
from peft import PeftModel
from peft.utils.save_and_load import get_base_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from .card_facts import check_repository
from .commit import hub_api, hub_errors
from .export import check_unmerged


def base_repository(model: PeftModel) -> Optional[str]:
    """The base model's name on the Hub, as it was loaded by; `None` if it is new or from a folder.

    Args:
        model (`PeftModel`): A model with adapters.
    """
    name = getattr(model.get_base_model(), "name_or_path", "")
    return name if name and not os.path.exists(name) else None


def published_base(
    model: PeftModel, base_model: Optional[str] = None, revision: Optional[str] = None, token: Optional[str] = None
) -> tuple[str, str]:
    """
    Finds the repository and the commit from which others get the base model that is in memory.

    Its weights are loaded again and compared: an adapter on other weights computes something else, without an error.

    Args:
        model (`PeftModel`): A model with adapters.
        base_model (`Optional[str]`): The repository; the one it was loaded from if `None`.
        revision (`Optional[str]`): Branch, tag or commit; `main` if `None`.
        token (`Optional[str]`): A token of the Hub.

    Returns:
        `tuple[str, str]`: The repository, and the commit as 40 hexadecimal digits.

    Raises:
        ValueError: If LoRA is merged into the base model, there is no such repository or revision, or it holds other
            weights than the base model has now.
        ConnectionError: If the Hub does not answer and the cache does not know.
    """
    check_unmerged(model)
    name = base_model or base_repository(model)
    if name is None or os.path.exists(name):
        raise ValueError(
            f"The base model {name or model.get_base_model().name_or_path!r} is new or in a folder of this machine, "
            "so others could not load an adapter of it; publish form='standalone', or name the repository that the "
            "folder is a copy of by base_model='owner/name'. For this machine alone there is save_model."
        )
    check_repository("base_model", name)
    differing, commit, failure = "", None, None
    # The cache knows the commit that was loaded, also if the branch has moved on since.
    for cached in (True, False):
        found = _resolve(name, revision, token, cached)
        if found is None or found == commit:
            continue
        commit, failure = found, None
        try:
            published = _load(model, name, commit, token)
        except ValueError as error:
            # A repository that was just pushed to may be in the cache as it was before, without weights.
            failure = error
            continue
        differing = _difference(model, published)
        if differing is None:
            return name, commit
    if failure is not None:
        raise failure
    raise ValueError(
        f"The backbone is not that of {name!r} at revision {commit}: {differing!r} differs, so the adapter would "
        "compute something else there. If the backbone was trained, publish form='standalone'; if it is of another "
        "revision, name that by base_model_revision."
    )


def _resolve(name: str, revision: Optional[str], token: Optional[str], cached: bool) -> Optional[str]:
    with hub_errors(name):
        try:
            return hub_api().resolve_revision(name, revision=revision, token=token, local_files_only=cached).resolved
        except RevisionResolutionError as error:
            if cached:
                return None
            raise ConnectionError(f"The Hub does not answer about the base model {name!r}; try again.") from error


def _load(model: PeftModel, name: str, commit: str, token: Optional[str]) -> PreTrainedModel:
    base = model.get_base_model()
    try:
        return type(base).from_pretrained(name, revision=commit, token=token, dtype=base.dtype)
    except OSError as error:
        raise ValueError(
            f"The base model {name!r} at revision {commit} cannot be loaded: {' '.join(str(error).split())}"
        ) from error


@torch.no_grad()
def _difference(model: PeftModel, published: nn.Module) -> Optional[str]:
    """The name of the first tensor in which the base model differs, but for the classifier, which adapters replace."""
    heads = tuple(f"{config.head_module}." for config in model.peft_config.values())
    mine, theirs = (
        {key: tensor for key, tensor in state.items() if not key.startswith(heads)}
        for state in (get_base_model_state_dict(model), published.state_dict())
    )
    missing = sorted(mine.keys() ^ theirs.keys())
    differing = (key for key in mine if not torch.equal(mine[key].cpu(), theirs[key].to(mine[key].dtype)))
    return missing[0] if missing else next(differing, None)
