"""What a model card is made of, and what must not get into it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, Optional

from huggingface_hub.utils import validate_repo_id

from ..tuner.head_config import check_choice
from .card_markdown import looks_local


Form = Literal["adapter", "standalone", "stock"]

# What `cost` must hold.
COST_FIELDS = ("multiply_adds", "multiply_adds_base", "ratio", "parameters", "parameters_base")

# Options that other parts of the card tell, or that say whose images they are, or name places on somebody's machine.
_OPTIONS_TOLD_ELSEWHERE = {"method", "groups", "dataset_name", "model_name_or_path", "revision", "report_to"}
_OPTIONS_OF_PEOPLE = {"domain_column", "domains"}
_OPTIONS_OF_PLACES = ("_dir", "_path", "_file", "offload_adapters", "load_learning_state")

# Identifiers that the Hub knows (huggingface.co/docs/hub/repositories-licenses).
_LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m bsd
bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1
lgpl-3.0 lgpl-lr lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl
postgresql unknown unlicense wtfpl zlib
"""


@dataclass(frozen=True)
class CardFacts:
    """
    What a model card says. What is left out is said to be unknown or not measured, never guessed.

    Args:
        name (`str`): What the model is called.
        form (`Literal["adapter", "standalone", "stock"]`): What the repository holds: an adapter for PEFT, a whole
            model with its own code, or a plain model of transformers.
        tasks (`Sequence[Sequence[str]]`): Class names of each task; classes are logits in the order in which they
            first come.
        repo_id (`Optional[str]`): The repository on the Hub, as `"owner/name"`.
        base_model (`Optional[str]`): The base model's repository on the Hub; `None` if it has none.
        base_model_revision (`Optional[str]`): Its commit, tag or branch.
        base_model_license (`Optional[str]`): Its licence.
        method (`Optional[str]`): Name of the method, as `"dynammo"`.
        options (`Mapping[str, Any]`): The method's options. Those that are `None`, and those with a file or folder in
            them, are left out.
        metrics (`Optional[Mapping[str, Any]]`): What [`Results.metrics`] gives.
        evaluation_data (`Optional[str]`): Name of the data set that was measured on.
        evaluation_data_id (`Optional[str]`): Its repository on the Hub.
        evaluation_split (`Optional[str]`): Which part of it, as `"test"`.
        test_images (`Optional[int]`): How many images were measured on after the last task.
        image_size (`Optional[tuple[int, int]]`): Height and width that images are resized to, in pixels.
        cost (`Optional[Mapping[str, float]]`): Cost of one image against the base model: `multiply_adds`,
            `multiply_adds_base`, `ratio`, `parameters` and `parameters_base`.
        training_data (`Optional[str]`): Name of the data set that was trained on.
        training_data_id (`Optional[str]`): Its repository on the Hub.
        training_data_license (`Optional[str]`): Its licence.
        exemplar_images (`bool`): Whether the repository holds training images.
        exemplar_indices (`int`): How many training images are named by their row numbers.
        class_statistics (`bool`): Whether the repository holds means and covariances of features.
        merge_statistics (`bool`): Whether it holds what a merge goes by of each task's images: squared gradients, or
            products of what enters a layer.
        unknown_score (`bool`): Whether the model's output says how little an image fits any class.
        license (`Optional[str]`): The model's licence: one of the Hub's identifiers, or a name of your own.
        license_link (`Optional[str]`): For a licence of your own: its address, or `"LICENSE"`.
        tags (`Sequence[str]`): Further tags on the Hub.

    Raises:
        ValueError: If a value is impossible, or would publish a path of somebody's machine.
    """

    name: str
    form: Form
    tasks: Sequence[Sequence[str]]
    repo_id: Optional[str] = None
    base_model: Optional[str] = None
    base_model_revision: Optional[str] = None
    base_model_license: Optional[str] = None
    method: Optional[str] = None
    options: Mapping[str, Any] = field(default_factory=dict)
    metrics: Optional[Mapping[str, Any]] = None
    evaluation_data: Optional[str] = None
    evaluation_data_id: Optional[str] = None
    evaluation_split: Optional[str] = None
    test_images: Optional[int] = None
    image_size: Optional[tuple[int, int]] = None
    cost: Optional[Mapping[str, float]] = None
    training_data: Optional[str] = None
    training_data_id: Optional[str] = None
    training_data_license: Optional[str] = None
    exemplar_images: bool = False
    exemplar_indices: int = 0
    class_statistics: bool = False
    merge_statistics: bool = False
    unknown_score: bool = False
    license: Optional[str] = None
    license_link: Optional[str] = None
    tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_choice("form", self.form, Form)
        if not self.tasks or not all(self.tasks):
            raise ValueError(
                f"tasks={self.tasks!r} holds no task or a task without a class; name each task's classes."
            )
        for name in ("repo_id", "base_model", "evaluation_data_id", "training_data_id"):
            check_repository(name, getattr(self, name))
        for name, value in vars(self).items():
            for text in [value] if isinstance(value, str) else value if name == "tags" else []:
                check_no_path(name, text)
        if self.exemplar_indices < 0:
            raise ValueError(f"exemplar_indices={self.exemplar_indices} must not be negative.")
        if self.test_images is not None and self.test_images < 1:
            raise ValueError(f"test_images={self.test_images} must be at least 1, or None if nothing was measured.")
        for name in COST_FIELDS if self.cost is not None else ():
            if name not in self.cost:
                raise ValueError(f"cost has no {name!r}; it needs {', '.join(COST_FIELDS)}.")
        if self.unknown_score and self.form == "stock":
            raise ValueError(
                "unknown_score=True does not fit form='stock': plain models of transformers give no score."
            )
        check_matrix((self.metrics or {}).get("accuracy_matrix", ()), len(self.tasks))

    @property
    def class_names(self) -> list[str]:
        """All class names in the order of the logits."""
        return list(dict.fromkeys(name for task in self.tasks for name in task))

    @property
    def accuracy_matrix(self) -> Sequence[Sequence[float]]:
        """Row i: accuracy after task i on the test images of each task learned so far; empty if not measured."""
        return (self.metrics or {}).get("accuracy_matrix", ())

    def measures(self) -> dict[str, float]:
        """All single numbers of `metrics` that were measured; what could not be computed is left out."""
        numbers = {name: value for name, value in (self.metrics or {}).items() if isinstance(value, Real)}
        return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def check_repository(name: str, value: Optional[str]) -> None:
    """Raises a `ValueError` unless `value` is `None` or can be the name of a repository on the Hub."""
    try:
        if value is not None:
            validate_repo_id(value)
    except ValueError as error:
        raise ValueError(
            f"{name}={value!r} is no repository on the Hub (owner/name); leave it out if there is none."
        ) from error


def check_no_path(name: str, value: str) -> None:
    """Raises a `ValueError` if `value` holds the path of a file or folder."""
    if looks_local(value):
        raise ValueError(f"{name}={value!r} would publish a path of your machine; give a name instead.")


def check_matrix(matrix: Sequence[Sequence[float]], tasks: int) -> None:
    """Raises a `ValueError` unless row i of an accuracy matrix has `i + 1` values, in at most `tasks` rows."""
    if len(matrix) > tasks:
        raise ValueError(f"accuracy_matrix has {len(matrix)} rows, but there are {tasks} tasks.")
    for index, row in enumerate(matrix):
        if len(row) != index + 1:
            raise ValueError(
                f"Row {index} of accuracy_matrix has {len(row)} values, not {index + 1}: one for each task learned."
            )


def public_options(options: Mapping[str, Any]) -> tuple[dict[str, str], int]:
    """Options as text, without those that are unset, told elsewhere, or name a file or folder.

    Returns:
        `tuple[dict[str, str], int]`: The options, and how many were left out because they name a place.
    """
    public, places = {}, 0
    for name, value in options.items():
        if value is None or name in _OPTIONS_TOLD_ELSEWHERE | _OPTIONS_OF_PEOPLE:
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        if name.endswith(_OPTIONS_OF_PLACES) or looks_local(text):
            places += 1
        else:
            public[name] = text
    return public, places


def license_metadata(license: Optional[str], link: Optional[str]) -> dict[str, Optional[str]]:
    """A licence in the words of the Hub: one it knows, or `other` with a name and a link."""
    known = (license or "unknown").lower()
    if known in _LICENSES.split():
        return {"license": known, "license_link": link if known == "other" else None}
    name = re.sub(r"[^a-z0-9.]+", "-", known).strip("-")
    return {"license": "other", "license_name": name or "own-terms", "license_link": link}
