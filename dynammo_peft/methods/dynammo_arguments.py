"""Options of `Dynammo`, and which of them go together."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Optional

from ..merging.registry import is_between
from ..tuner import HeadConfig
from ..tuner.head_config import Preset, check_choice
from .adapters import AdapterMethodArguments
from .analytic import ANALYTIC_HEADS
from .merging import MergingArguments


Heads = Literal["lda", "ridge", "gaussians", "exemplars"]

# What the configuration's preset fills in where the user has said nothing.
PRESETS: dict[Preset, dict[str, Any]] = {
    "default": {"heads": "lda", "feature_views": 2, "exemplars_as_others": False},
    "paper": {"heads": "exemplars", "feature_views": 1, "exemplars_as_others": True},
}

# The least value of options.
LEAST = {
    "feature_distillation": 0,
    "feature_views": 1,
    "drift_ridge": 0,
    "samples_per_class": 1,
    "weights_steps": 0,
    "covariance_rank": 1,
}
WHOLE = ("feature_views", "samples_per_class", "weights_steps", "covariance_rank")


@dataclass
class DynammoArguments(MergingArguments, AdapterMethodArguments):
    """Options of `Dynammo`: those of the training, of the merge, and of the heads."""

    heads: Optional[Heads] = field(
        default=None,
        metadata={
            "help": "From class statistics in closed form ('lda', the default, or 'ridge'), trained on samples of "
            "them ('gaussians'), or trained on exemplars alone ('exemplars', the paper's)."
        },
    )
    first_session: bool = field(
        default=False,
        metadata={
            "help": "Train an adapter on the first task only; later tasks fit heads alone. No exemplars are kept, "
            "whatever memory_size is: nothing would read them."
        },
    )
    exemplars_as_others: Optional[bool] = field(
        default=None,
        metadata={
            "help": "Train each adapter to tell its classes from the exemplars of older ones, as the paper does; "
            "otherwise exemplars are never trained on, and only show where old classes have moved; a task of one "
            "class, which has nothing to tell its images from, then trains no adapter."
        },
    )
    feature_distillation: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the mean squared change of the merged model's features while an adapter is trained; it "
            "takes a forward pass more a step."
        },
    )
    feature_views: Optional[int] = field(
        default=None, metadata={"help": "Views of each image for statistics and heads; all but one augmented."}
    )
    shrinkage: Optional[float] = field(
        default=None,
        metadata={
            "help": "Share by which 'lda' and 'ridge' shrink the covariance to its diagonal; if unset, the more, the "
            "fewer images there are for each feature: C / (C + 4 N), but at least 0.1."
        },
    )
    drift_ridge: Optional[float] = field(
        default=None,
        metadata={
            "help": "How strongly the map that moves statistics is held to the identity; if unset, as strongly as "
            "predicts classes left out best."
        },
    )
    covariance_rank: Optional[int] = field(
        default=None,
        metadata={
            "help": "Directions kept of each covariance, for wide features; exact if unset. Without exemplars a map "
            "of all features to all features is kept in any case."
        },
    )
    samples_per_class: int = field(default=200, metadata={"help": "Features drawn of each class for 'gaussians'."})

    def filled_in(self, config: HeadConfig) -> DynammoArguments:
        """A copy with what the preset of `config` says where the user has said nothing.

        Args:
            config (`HeadConfig`): The adapters' configuration.

        Raises:
            ValueError: If options have bad values or do not go together.
        """
        preset = PRESETS[config.preset]
        filled = replace(self, **{key: value for key, value in preset.items() if getattr(self, key) is None})
        check_choice("heads", filled.heads, Heads)
        filled._check_numbers()
        # What the user never set, no message shall speak of alone.
        by_preset = f" (preset={config.preset!r})" if self.heads is None and config.preset != "default" else ""
        heads = f"heads={filled.heads!r}{by_preset}"
        filled._check_heads(config, heads)
        filled._check_training(heads, others_by_preset=self.exemplars_as_others is None)
        if self.exemplars_as_others and self.memory_size == 0:
            raise ValueError("exemplars_as_others has none where no exemplars are kept; set memory_size.")
        return filled

    def _check_numbers(self) -> None:
        """Refuses at once what would otherwise show after the first task only."""
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not is_between(value, least, sys.float_info.max):
                raise ValueError(f"{name}={value!r} must be at least {least}, and finite.")
            if name in WHOLE and not isinstance(value, int):
                raise ValueError(f"{name}={value!r} must be an integer.")
        if self.shrinkage is not None and not is_between(self.shrinkage, 0, 1):
            raise ValueError(f"shrinkage={self.shrinkage!r} must be at least 0 and at most 1.")

    def _check_heads(self, config: HeadConfig, heads: str) -> None:
        scoring = ""
        if config.scoring != "log_odds":
            scoring = f"scoring='log_odds' in the {type(config).__name__}"
        if self.heads == "exemplars" and (self.memory_size == 0 or self.first_session):
            option = "first_session" if self.first_session else "memory_size=0"
            others = "exemplars_as_others=False" if self.first_session and self.exemplars_as_others else ""
            instead = " and ".join(["heads='lda'", *filter(None, (scoring, others))])
            raise ValueError(f"{heads} cannot do with {option}; leave that out, or choose {instead}.")
        if self.heads in ANALYTIC_HEADS and scoring:
            preset = f" (preset={config.preset!r})" if config.preset != "default" else ""
            raise ValueError(f"{heads} needs scoring='log_odds', got {config.scoring!r}{preset}; set {scoring}.")

    def _check_training(self, heads: str, others_by_preset: bool) -> None:
        """Refuses learned merge weights that nothing tells, and options of a training that does not take place."""
        merges = self.merge is not None or self.merge_options or self.learns or self.recalibrate
        trains = self.feature_distillation or self.exemplars_as_others or self.adapter_init == "random"
        if self.first_session and (merges or trains or self.drift_ridge is not None):
            preset = " (preset='paper'; set it to False)" if others_by_preset and self.exemplars_as_others else ""
            raise ValueError(
                "first_session trains one adapter only, so merge, merge_options, learned_weights, recalibrate, "
                f"feature_distillation, exemplars_as_others{preset}, adapter_init='random' and drift_ridge would do "
                "nothing; leave them out."
            )
        if self.shrinkage is not None and self.heads not in ANALYTIC_HEADS:
            raise ValueError(f"shrinkage is for heads in closed form, and not for {heads}; leave it out.")
        for name in ("drift_ridge", "covariance_rank"):
            if self.heads == "exemplars" and getattr(self, name) is not None:
                raise ValueError(f"{name} is for class statistics, which {heads} has not; leave it out.")
        if self.learns and self.weights_objective == "statistics" and self.heads == "exemplars":
            raise ValueError(
                f"weights_objective='statistics' needs class statistics, which {heads} has not; choose 'labels' or "
                "'entropy'."
            )
        if self.learns and self.weights_objective != "entropy" and self.memory_size == 0:
            raise ValueError(
                "Without exemplars merge weights would be learned on the newest classes alone; set memory_size, or "
                "weights_objective='entropy'."
            )
