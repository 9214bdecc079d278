"""What the configurations of all task adapters have in common: the head and what it reads."""

from __future__ import annotations

import typing
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Optional, Union

from peft.config import PeftConfig

from .flips import Flip


Scoring = Literal["log_odds", "min_others"]
Preset = Literal["default", "paper"]
# What a warning of `HeadConfig.save_pretrained` begins with.
BACKBONE_TRAINED = "The backbone was trained"


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises a `ValueError` naming `name` and the possible values unless `value` is one of `choices`."""
    options = typing.get_args(choices) or tuple(choices)
    if value not in options:
        raise ValueError(f"{name}={value!r} does not exist; choose one of {', '.join(map(repr, options))}.")


@dataclass
class HeadConfig(PeftConfig):
    """
    The part of a task adapter's configuration that describes its classifier head.

    Args:
        head_module (`Optional[str]`):
            Name of the classifier that the task's head stands in for. If `None`, it follows from the model type.
        feature_modules (`Optional[list[str]]`):
            Names of modules whose outputs, averaged over the image, the head reads beside what enters the classifier.
            If `None`, they follow from the model type: each stage but the last of a hierarchical backbone, up to six
            evenly spaced blocks of a plain transformer. `[]` (paper): none.
        classes (`Optional[Union[list[str], list[list[str]]]]`):
            Class names of the head, in the order of its logits; a list of lists for several heads (the merged
            adapter). If `None`, the model keeps its own classifier, frozen.
        image_size (`Optional[Union[int, list[int]]]`):
            Height and width of the input images, in pixels. If `None`, that of the base model's configuration, else
            224. Position embeddings are interpolated to it where the base model can.
        scoring (`Optional[Literal["log_odds", "min_others"]]`):
            How several heads give one tensor of logits. `"log_odds"` (default): each class's logit minus its head's
            "others" logit. `"min_others"` (Qazi et al. 2024, section 2.4): the head with the least "others"
            probability decides.
        flips (`Optional[list[Literal["horizontal", "vertical"]]]`):
            Mirror images over which, and the image itself, features are averaged when images are classified (in
            evaluation mode); each costs a forward pass. If `None`: none.
        merge_weights (`Optional[dict[str, Any]]`):
            With which weights a merged adapter was made, where they were learned: what
            [`~dynammo_peft.merging.MergeWeights.from_dict`] reads. It documents, and changes nothing.
        backbone_trained (`bool`):
            Whether the backbone was trained with the first adapter and is saved nowhere yet, so that this adapter
            computes something else on `base_model_name_or_path`. Noted where it happens; `save_pretrained`, which
            leaves the backbone out, then warns.
    """

    # Adapters that differ in one of these do not fit together.
    build_fields: ClassVar[tuple[str, ...]] = ()
    # Nor do those that differ in one of these make one adapter, which has a single value of it.
    merge_fields: ClassVar[tuple[str, ...]] = ("image_size", "scoring", "flips")
    # The `combination_type` that averages what the adapters compute, or comes closest to it.
    averaging: ClassVar[str] = "linear"
    # Whether the backbone's weights can take the adapter up.
    folds: ClassVar[bool] = False
    preset: ClassVar[Preset] = "default"

    head_module: Optional[str] = field(
        default=None, metadata={"help": "Name of the base model's classifier; follows from the model type if unset."}
    )
    feature_modules: Optional[list[str]] = field(
        default=None,
        metadata={"help": "Modules whose pooled outputs the head reads too; by model type if unset, none if empty."},
    )
    classes: Optional[Union[list[str], list[list[str]]]] = field(
        default=None, metadata={"help": "Class names of the head in the order of its logits; a list per head."}
    )
    image_size: Optional[Union[int, list[int]]] = field(
        default=None, metadata={"help": "Height and width of the images in pixels; the base model's if unset."}
    )
    scoring: Optional[Scoring] = field(
        default=None, metadata={"help": "How heads are compared: 'log_odds' (default) or 'min_others' (paper)."}
    )
    flips: Optional[list[Flip]] = field(
        default=None,
        metadata={
            "help": "Mirror images whose features are averaged with an image's own when it is classified: "
            "'horizontal', 'vertical' or both; each costs a forward pass. None if unset."
        },
    )
    merge_weights: Optional[dict[str, Any]] = field(
        default=None, metadata={"help": "Learned weights with which a merged adapter was made; only documents."}
    )
    backbone_trained: bool = field(
        default=False,
        metadata={"help": "Whether the backbone was trained and is saved nowhere yet; noted where that happens."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scoring is None:
            self.scoring = "log_odds"
        check_choice("scoring", self.scoring, Scoring)
        if self.feature_modules is not None:
            self.feature_modules = list(self.feature_modules)
        self.flips = list(self.flips or ())
        for place, flip in enumerate(self.flips):
            check_choice("flips", flip, Flip)
            if flip in self.flips[:place]:
                raise ValueError(f"flips={self.flips!r} names {flip!r} twice; once is enough.")
        self.classes = _as_heads(self.classes)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As of `PeftConfig`, with a warning where an adapter goes without the backbone that was trained for it."""
        if self.backbone_trained:
            warnings.warn(
                f"{BACKBONE_TRAINED}, and the adapter is saved without it: on the weights of "
                f"{self.base_model_name_or_path!r} it computes something else. Save the whole model by "
                "dynammo_peft.hub.save_pretrained(model, directory, form='standalone').",
                stacklevel=3,
            )
        super().save_pretrained(save_directory, **kwargs)

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """Number of classes of each head, without "others"."""
        return tuple(len(head) for head in self.classes or ())

    @property
    def class_names(self) -> list[str]:
        """All class names in the order of the logits."""
        return [name for head in self.classes or () for name in head]


def _as_heads(classes: Optional[Union[list[str], list[list[str]]]]) -> Optional[list[list[str]]]:
    """One list of class names a head; names must be strings and differ."""
    if classes is None:
        return None
    kinds = {isinstance(head, str) for head in classes if isinstance(head, (str, list, tuple))}
    if isinstance(classes, str) or len(kinds) > 1:
        raise ValueError(f"classes={classes!r} must be a list of class names, or a list of such lists.")
    heads = [list(classes)] if all(isinstance(name, str) for name in classes) else [list(head) for head in classes]
    names = [name for head in heads for name in head]
    known: set[str] = set()
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"classes must hold class names (strings), got {name!r}.")
        if name in known:
            raise ValueError(f"Class {name!r} stands more than once in classes; each class needs a name of its own.")
        known.add(name)
    if not heads or not all(heads):
        raise ValueError("classes holds a head without a class; give each head at least one class name.")
    return heads
