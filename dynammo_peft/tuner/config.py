"""The configuration of a DynaMMo adapter."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

from peft.config import PeftConfig

from .registration import extend_peft_type


Scoring = Literal["log_odds", "min_others"]
Preset = Literal["default", "paper"]

# What a preset fills in where the user has said nothing.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"reduction_factor": None, "padding": 1, "scoring": "log_odds"},
    "paper": {"reduction_factor": 1, "padding": 0, "scoring": "min_others", "feature_modules": []},
}


# Adapters that differ in one of these do not fit together.
BUILD_FIELDS = ("target_modules", "exclude_modules", "reduction_factor", "kernel_size", "padding", "feature_modules")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises a `ValueError` naming `name` and the possible values unless `value` is one of `choices`."""
    options = typing.get_args(choices) or tuple(choices)
    if value not in options:
        raise ValueError(f"{name}={value!r} does not exist; choose one of {', '.join(map(repr, options))}.")


@dataclass
class DynammoConfig(PeftConfig):
    """
    Configuration of a [`DynammoModel`]: one task's adapter (or the merged one) and its classifier head.

    The adapter is a residual convolutional bottleneck in front of a block of the backbone (Qazi et al. 2024, section
    2.2): `x + alpha * ReLU(BN(ConvTranspose(ReLU(BN(Conv(x))))))` with `C -> C // reduction_factor -> C` channels.

    Args:
        target_modules (`Optional[Union[list[str], str]]`):
            The blocks to put an adapter in front of, as names or suffixes, or as a regular expression. If `None`, they
            follow from the model type: each stage of a hierarchical backbone, four evenly spaced blocks of a plain
            transformer.
        exclude_modules (`Optional[Union[list[str], str]]`):
            Blocks to leave alone although `target_modules` names them.
        head_module (`Optional[str]`):
            Name of the classifier that the task's head stands in for. If `None`, it follows from the model type.
        feature_modules (`Optional[list[str]]`):
            Names of modules whose outputs, averaged over the image, the head reads beside what enters the classifier.
            If `None`, they follow from the model type: each stage but the last of a hierarchical backbone, up to six
            evenly spaced blocks of a plain transformer. `[]` (paper): none.
        classes (`Optional[Union[list[str], list[list[str]]]]`):
            Class names of the head, in the order of its logits; a list of lists for several heads (the merged
            adapter). If `None`, the model keeps its own classifier, frozen.
        preset (`Literal["default", "paper"]`):
            `"paper"` is the adapter of the paper (no bottleneck, no padding, task with the least "others"
            probability); `"default"` costs at most 5% of the backbone's FLOPs. Values given explicitly win.
        reduction_factor (`Optional[int]`):
            Input channels over bottleneck channels. If `None` (default preset), the smallest power of two with which
            all adapters together cost at most 5% of the backbone's FLOPs, counted on one forward pass.
        kernel_size (`int`): Height and width of the convolutions' kernels.
        padding (`Optional[int]`): Padding of the convolutions, in pixels of the map.
        init_alpha (`float`): Initial value of the learned scale of the residual branch.
        image_size (`Optional[Union[int, list[int]]]`):
            Height and width of the input images, in pixels. If `None`, that of the base model's configuration, else
            224. Position embeddings are interpolated to it where the base model can.
        scoring (`Optional[Literal["log_odds", "min_others"]]`):
            How several heads give one tensor of logits. `"log_odds"`: each class's logit minus its head's "others"
            logit. `"min_others"` (paper, section 2.4): the head with the least "others" probability decides.
        modules_to_save (`Optional[list[str]]`):
            Further modules of the base model to train and to save with the adapter.
        merge_weights (`Optional[dict[str, Any]]`):
            With which weights a merged adapter was made, where they were learned: what
            [`~dynammo_peft.merging.MergeWeights.from_dict`] reads. It documents, and changes nothing.
    """

    target_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": "Blocks to put an adapter in front of (names, suffixes or a regex); by model type if unset."
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Blocks to leave alone although target_modules names them (names or a regex)."}
    )
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
    preset: Preset = field(
        default="default",
        metadata={"help": "'paper': the paper's adapter; 'default': a bottleneck of at most 5% of the FLOPs."},
    )
    reduction_factor: Optional[int] = field(
        default=None,
        metadata={"help": "Input channels over bottleneck channels; chosen for at most 5% of the FLOPs if unset."},
    )
    kernel_size: int = field(default=3, metadata={"help": "Height and width of the convolutions' kernels."})
    padding: Optional[int] = field(
        default=None, metadata={"help": "Padding of the convolutions (default 1, paper 0)."}
    )
    init_alpha: float = field(default=0.02, metadata={"help": "Initial scale of the adapter's residual branch."})
    image_size: Optional[Union[int, list[int]]] = field(
        default=None, metadata={"help": "Height and width of the images in pixels; the base model's if unset."}
    )
    scoring: Optional[Scoring] = field(
        default=None, metadata={"help": "How heads are compared: 'log_odds' (default) or 'min_others' (paper)."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "Further modules of the base model to train and save with the adapter."}
    )
    merge_weights: Optional[dict[str, Any]] = field(
        default=None, metadata={"help": "Learned weights with which a merged adapter was made; only documents."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("DYNAMMO")
        check_choice("preset", self.preset, Preset)
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_choice("scoring", self.scoring, Scoring)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.feature_modules is not None:
            self.feature_modules = list(self.feature_modules)
        self._check_numbers()
        self.classes = _as_heads(self.classes)

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """Number of classes of each head, without "others"."""
        return tuple(len(head) for head in self.classes or ())

    @property
    def class_names(self) -> list[str]:
        """All class names in the order of the logits."""
        return [name for head in self.classes or () for name in head]

    def _check_numbers(self) -> None:
        if self.reduction_factor is not None and self.reduction_factor < 1:
            raise ValueError(f"reduction_factor={self.reduction_factor} must be at least 1.")
        if self.kernel_size < 1:
            raise ValueError(f"kernel_size={self.kernel_size} must be at least 1.")
        if not 0 <= self.padding < self.kernel_size:
            raise ValueError(
                f"padding={self.padding} must be at least 0 and less than kernel_size={self.kernel_size}."
            )


def _as_heads(classes: Optional[Union[list[str], list[list[str]]]]) -> Optional[list[list[str]]]:
    """One list of class names a head; names must be strings and differ."""
    if classes is None:
        return None
    heads = [list(classes)] if all(isinstance(name, str) for name in classes) else [list(head) for head in classes]
    names = [name for head in heads for name in head]
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"classes must hold class names (strings), got {name!r}.")
        if names.count(name) > 1:
            raise ValueError(f"Class {name!r} stands more than once in classes; each class needs a name of its own.")
    if not heads or not all(heads):
        raise ValueError("classes holds a head without a class; give each head at least one class name.")
    return heads
