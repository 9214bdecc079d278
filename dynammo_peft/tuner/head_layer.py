"""The layer that stands in for the classifier of the base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Optional

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .features import FeatureTap
from .flips import Flip, average_copies
from .forward_state import ForwardState
from .head_config import HeadConfig, Scoring
from .heads import class_logits, score_heads
from .standardisation import Standardisation
from .wrapping import WrappingLayer


HeadOutput = Literal["scores", "logits", "last_layer_logits", "last_layer_logits+features", "features"]


class DynammoHead(WrappingLayer):
    """The base model's classifier with task heads beside it; the active adapter's head stands in for it.

    Each adapter has one linear layer for all its heads: `n_t` classes and "others" for each head, side by side. In
    files it is found as all that is an adapter's: by a name that starts with its tuner's `prefix`.

    Args:
        base_layer (`nn.Module`): The base model's classifier.
        adapter_name (`str`): Name of the first adapter.
        config (`HeadConfig`): Its configuration.
        features (`int`): Features that enter the classifier.
        taps (`dict[str, FeatureTap]`): Where the features of the configuration's `feature_modules` come from.
    """

    adapter_layer_names = ("dynammo_head",)
    other_param_names = ("sizes", "scoring", "feature_modules", "flips")
    # Heads are placed side by side, not merged.
    is_head = True

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: HeadConfig,
        features: int,
        taps: dict[str, FeatureTap],
    ) -> None:
        super().__init__(base_layer, adapter_name)
        self.features = features
        self.taps = taps
        self.feature_modules: dict[str, list[str]] = {}
        self.output: HeadOutput = "scores"
        # How often each image stands in the batch.
        self.state = ForwardState()
        self.flips: dict[str, list[Flip]] = {}
        # Set while a head is trained on what enters the classifier, standardised.
        self.standardisation: Optional[Standardisation] = None
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.scoring: dict[str, Scoring] = {}
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self.update_layer(adapter_name, config)

    @property
    def heads(self) -> nn.ModuleDict:
        """The linear layer of each adapter."""
        return getattr(self, self.adapter_layer_names[0])

    def update_layer(self, adapter_name: str, config: HeadConfig) -> None:
        """Adds the heads of an adapter with fresh weights."""
        sizes = config.head_sizes
        self.sizes[adapter_name] = sizes
        self.scoring[adapter_name] = config.scoring
        self.flips[adapter_name] = list(config.flips)
        self.feature_modules[adapter_name] = list(config.feature_modules or ())
        features = self.features + sum(self.taps[name].site.channels for name in self.feature_modules[adapter_name])
        self.heads[adapter_name] = nn.Linear(features, sum(sizes) + len(sizes))
        # Training with "last_layer_logits" leaves these columns alone.
        nn.init.zeros_(self.heads[adapter_name].weight[:, self.features :])
        self._place(adapter_name, config.inference_mode)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits over the classes `(B, N)`; inside `head_output`, raw logits or the features instead."""
        if self.disable_adapters:
            self.unmerge()  # As LoRA's layers do.
        names = self._own_adapters(self.heads)
        taken = {name: tap.take() for name, tap in self.taps.items()}
        parts = {name: average_copies(self._features(hidden_states, taken, name), self.state.copies) for name in names}
        if self.output == "features":
            return parts[names[0]] if names else hidden_states.flatten(1)
        if not names:
            return self.base_layer(hidden_states, *args, **kwargs)
        logits = torch.cat([self._logits(parts[name], name) for name in names], dim=1)
        if self.output == "last_layer_logits+features":
            return torch.cat([logits, *(part.to(logits.dtype) for part in parts.values())], dim=1)
        if self.output != "scores":
            return logits
        return score_heads(logits, sum((self.sizes[name] for name in names), ()), self._common(names, "scoring"))

    def flips_to_average(self) -> list[Flip]:
        """Mirror images over which the active adapters' heads average.

        Raises:
            ValueError: If the active adapters differ in them.
        """
        names = self._own_adapters(self.heads)
        if not names or self.output not in ("scores", "logits"):
            return []
        return self._common(names, "flips")

    def _common(self, names: list[str], field: str) -> Any:
        """What active adapters agree on, or a `ValueError`."""
        values = getattr(self, field)
        for name in names[1:]:
            if values[name] != values[names[0]]:
                raise ValueError(
                    f"The active adapters {names[0]!r} and {name!r} differ in {field} ({values[names[0]]!r} and "
                    f"{values[name]!r}); give both the same."
                )
        return values[names[0]]

    @torch.no_grad()
    def concatenate_heads(self, adapters: list[str], columns: list[list[int]], merged: str) -> None:
        """Fills the heads of the adapter `merged` with those of the others, side by side.

        Args:
            adapters (`list[str]`): Names of the adapters.
            columns (`list[list[int]]`): Which raw logits of each adapter's heads to take.
            merged (`str`): Name of an adapter that exists already, with room for all of them.
        """
        if merged in self.heads:
            for key, parameter in self.heads[merged].named_parameters():
                parts = [self.heads[name].get_parameter(key)[own] for name, own in zip(adapters, columns)]
                parameter.copy_(torch.cat(parts))

    @torch.no_grad()
    def append_heads(self, merged: str, adapter: str, columns: list[int], sizes: tuple[int, ...]) -> None:
        """Places heads of an adapter behind those of the adapter `merged`.

        Args:
            merged (`str`): Name of the merged adapter.
            adapter (`str`): Name of the other adapter.
            columns (`list[int]`): Which raw logits of the other's heads to take.
            sizes (`tuple[int, ...]`): Number of classes of each head taken.
        """
        if merged not in self.heads or not columns:
            return
        old, new = self.heads[merged], self.heads[adapter]
        count = old.out_features + len(columns)
        both = nn.Linear(old.in_features, count, device="meta").to_empty(device=old.weight.device)
        both = both.to(old.weight.dtype).train(old.training)
        for key, parameter in both.named_parameters():
            parameter.copy_(torch.cat([old.get_parameter(key), new.get_parameter(key)[columns].to(old.weight)]))
            parameter.requires_grad_(old.get_parameter(key).requires_grad)
        self.heads[merged] = both
        self.sizes[merged] += sizes

    def check_folds(self, adapters: Sequence[str]) -> None:
        """Raises a `ValueError` unless a plain classifier can take the place of these adapters' heads."""
        for name in adapters:
            if name not in self.heads:
                continue
            if self.feature_modules[name]:
                raise ValueError(
                    f"The heads of adapter {name!r} read feature_modules={self.feature_modules[name]!r} beside what "
                    "enters the classifier, which a plain classifier does not; learn with feature_modules=[]."
                )
            if self.flips[name]:
                raise ValueError(
                    f"The heads of adapter {name!r} average over flips={self.flips[name]!r}, which a plain model does "
                    "not; learn with flips=[]."
                )
            if self.scoring[name] != "log_odds":
                raise ValueError(
                    f"The heads of adapter {name!r} have scoring={self.scoring[name]!r}, which is not linear; learn "
                    "with scoring='log_odds'."
                )
        if self._last_linear() is None:
            raise ValueError(
                f"The base model's classifier is a {type(self.base_layer).__name__} without a linear layer at its "
                "end, so heads cannot take its place."
            )

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Noted only: heads stand beside the backbone, whose weights take up adapters."""
        self.merged_adapters += [name for name in check_adapters_to_merge(self, adapter_names) if name in self.heads]

    def unmerge(self) -> None:
        """Noted only, as for `merge`."""
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: Optional[list[str]]
    ) -> nn.Module:
        """The base model's classifier; if `merge`, with the adapters' heads as its linear layer."""
        names = self._own_adapters(self.heads) if adapter_names is None else adapter_names
        names = [name for name in names if name in self.heads]
        if not merge or not names:
            return self.base_layer
        parts = [class_logits(self.heads[name], self.sizes[name]) for name in names]
        weight, bias = (torch.cat(values) for values in zip(*parts))
        linear = nn.Linear(weight.shape[1], len(weight), device="meta").to_empty(device=weight.device)
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        old = self._last_linear()
        linear = linear.to(old.weight.dtype).train(old.training)
        if old is self.base_layer:
            return linear
        self.base_layer[-1] = linear
        return self.base_layer

    def _last_linear(self) -> Optional[nn.Linear]:
        last = self.base_layer[-1] if isinstance(self.base_layer, nn.Sequential) else self.base_layer
        return last if isinstance(last, nn.Linear) else None

    def _features(self, hidden_states: Tensor, taken: dict[str, Tensor], name: str) -> Tensor:
        """What an adapter's heads read, `(B, C)`."""
        return torch.cat([hidden_states.flatten(1), *(taken[key] for key in self.feature_modules[name])], dim=1)

    def _logits(self, features: Tensor, name: str) -> Tensor:
        head = self.heads[name]
        # In half precision, heads on many correlated features would lose what tells classes apart, and overflow.
        features = features if features.dtype == torch.float64 else features.float()
        with torch.autocast(features.device.type, enabled=False):
            if self.standardisation is not None:
                features = self.standardisation(features)
            if self.output.startswith("last_layer_logits"):
                weight = head.weight[:, : self.features].to(features.dtype)
                return F.linear(features[:, : self.features], weight, head.bias.to(features.dtype))
            if head.weight.dtype == features.dtype:
                return head(features)
            tensors = {key: tensor.to(features.dtype) for key, tensor in head.named_parameters()}
            return functional_call(head, tensors, features)
