"""The configuration of a DynaMMo adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional, Union

from .head_config import HeadConfig, Preset, check_choice
from .registration import extend_peft_type


# What a preset fills in where the user has said nothing.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"reduction_factor": None, "padding": 1, "scoring": "log_odds"},
    "paper": {"reduction_factor": 1, "padding": 0, "scoring": "min_others", "feature_modules": []},
}


@dataclass
class DynammoConfig(HeadConfig):
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
        preset (`Literal["default", "paper"]`):
            `"paper"` is the adapter of the paper (no bottleneck, no padding, task with the least "others"
            probability); `"default"` costs at most 5% of the backbone's FLOPs. Values given explicitly win.
        reduction_factor (`Optional[int]`):
            Input channels over bottleneck channels. If `None` (default preset), the smallest power of two with which
            all adapters together cost at most 5% of the backbone's FLOPs, counted on one forward pass.
        kernel_size (`int`): Height and width of the convolutions' kernels.
        padding (`Optional[int]`): Padding of the convolutions, in pixels of the map.
        init_alpha (`float`): Initial value of the learned scale of the residual branch.
        modules_to_save (`Optional[list[str]]`):
            Further modules of the base model to train and to save with the adapter.
        head_module, feature_modules, classes, image_size, scoring, flips, merge_weights: See [`HeadConfig`].
    """

    build_fields: ClassVar[tuple[str, ...]] = (
        "target_modules",
        "exclude_modules",
        "reduction_factor",
        "kernel_size",
        "padding",
        "feature_modules",
    )

    target_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": "Blocks to put an adapter in front of (names, suffixes or a regex); by model type if unset."
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Blocks to leave alone although target_modules names them (names or a regex)."}
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
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "Further modules of the base model to train and save with the adapter."}
    )

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, Preset)
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        self.peft_type = extend_peft_type("DYNAMMO")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self._check_numbers()

    def _check_numbers(self) -> None:
        if self.reduction_factor is not None and self.reduction_factor < 1:
            raise ValueError(f"reduction_factor={self.reduction_factor} must be at least 1.")
        if self.kernel_size < 1:
            raise ValueError(f"kernel_size={self.kernel_size} must be at least 1.")
        if not 0 <= self.padding < self.kernel_size:
            raise ValueError(
                f"padding={self.padding} must be at least 0 and less than kernel_size={self.kernel_size}."
            )
