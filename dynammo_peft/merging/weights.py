"""Merge weights that can be learned: one for each task, or also for each layer or each output channel."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from .adapters import AdapterTensors, Slot
from .groups import Granularity, WeightGroup, check_granularity, weight_groups
from .weight_files import find_weights, read_groups, write_weights
from .weight_tables import draw_table, table_of
from .weighted_sums import WeightedCombination, weighted_sum


class MergeWeights(nn.Module):
    """
    The weights `w_i` of a merge `sum_i w_i * theta_i` as parameters, all `1 / T` at first.

    Args:
        adapters (`Sequence[str]`): Names of the T adapters.
        groups (`Sequence[WeightGroup]`): Which tensors share weights; `for_slots` finds them.
        granularity (`Literal["task", "layer", "channel"]`): By what the tensors were grouped.
        simplex (`bool`): Whether weights are positive and sum to one over the adapters; otherwise they are free.
        slots (`Optional[Mapping[str, Slot]]`): The tensors that `combine` merges.
        scalings (`Optional[Mapping[str, Tensor]]`): By key, for what a layer multiplies by the adapter's scaling as
            LoRA does: scaling of each adapter over that of the merged one, `(T,)`.
        combination_type (`Literal["linear", "cat"]`): `"cat"`: LoRA's factors are placed side by side, so that the
            update itself is the sum, at T times the rank.

    Attributes:
        values (`nn.Parameter`): The weights `(T, number a task)`, or their logits on the simplex.
        loss_before (`Optional[float]`): The objective with uniform weights, where they were learned.
        loss_after (`Optional[float]`): The objective with these weights.
    """

    def __init__(
        self,
        adapters: Sequence[str],
        groups: Sequence[WeightGroup],
        granularity: Granularity = "layer",
        simplex: bool = False,
        slots: Optional[Mapping[str, Slot]] = None,
        scalings: Optional[Mapping[str, Tensor]] = None,
        combination_type: WeightedCombination = "linear",
    ) -> None:
        super().__init__()
        check_granularity(granularity)
        check_weighted(combination_type)
        if not adapters:
            raise ValueError("No adapters to merge; name at least one.")
        self.adapters = tuple(adapters)
        self.groups = tuple(groups)
        self.granularity = granularity
        self.simplex = simplex
        self.slots = dict(slots or {})
        self.scalings = dict(scalings or {})
        self.combination_type = combination_type
        self.loss_before: Optional[float] = None
        self.loss_after: Optional[float] = None
        self._columns: dict[str, slice] = {}
        width = 0
        for group in self.groups:
            self._columns[group.name] = slice(width, width + max(group.channels, 1))
            width += max(group.channels, 1)
        self._channels = {group.name: group.channels for group in self.groups}
        # One parameter for all, since an optimizer takes as long for a small one.
        start = 0.0 if simplex else 1 / len(self.adapters)
        self.values = nn.Parameter(torch.full((len(self.adapters), width), start))

    @classmethod
    def for_slots(
        cls,
        adapters: Sequence[str],
        slots: Mapping[str, Slot],
        tensors: AdapterTensors,
        granularity: Granularity = "layer",
        simplex: bool = False,
        scalings: Optional[Mapping[str, Tensor]] = None,
        combination_type: WeightedCombination = "linear",
    ) -> MergeWeights:
        """Uniform weights for the given tensors.

        Args:
            adapters (`Sequence[str]`): Names of the T adapters.
            slots (`Mapping[str, Slot]`): The tensors to merge, by key.
            tensors (`dict[str, Tensor]`): Those of one of the adapters, for their shapes.
            granularity (`Literal["task", "layer", "channel"]`): `"task"`: one weight an adapter. `"layer"`: one an
                adapter and layer (AdaMerging, Yang et al. 2024, section 3.2). `"channel"`: one an adapter, container
                of a layer and output channel (MedMerge, Almakky et al. 2024: the weight of a kernel).
            simplex (`bool`): Whether weights are positive and sum to one over the adapters.
            scalings (`Optional[Mapping[str, Tensor]]`): As the class takes them.
            combination_type (`Literal["linear", "cat"]`): As the class takes it.

        Raises:
            ValueError: If the granularity or the combination does not exist, or there is no adapter.
        """
        check_granularity(granularity)
        groups = weight_groups(slots, tensors, granularity)
        return cls(adapters, groups, granularity, simplex, slots, scalings, combination_type)

    def of_tensors(
        self, slots: Mapping[str, Slot], tensors: AdapterTensors, scalings: Optional[Mapping[str, Tensor]] = None
    ) -> MergeWeights:
        """The same weights for other tensors, as of a model that was loaded again.

        Args:
            slots (`Mapping[str, Slot]`): The tensors to merge, by key.
            tensors (`dict[str, Tensor]`): Those of one of the adapters, for their shapes.
            scalings (`Optional[Mapping[str, Tensor]]`): As the class takes them.

        Raises:
            ValueError: If there are no weights for a tensor, weights without tensors, or channels are not as many.
        """
        own = {group.name: group.channels for group in self.groups}
        asked = {group.name: group.channels for group in weight_groups(slots, tensors, self.granularity)}
        for name in {**asked, **own}:
            if own.get(name) != asked.get(name):
                channels, needed = (_counted(groups.get(name)) for groups in (own, asked))
                raise ValueError(
                    f"The merge weights do not fit the adapters: of {name!r} they have {channels}, the adapters need "
                    f"{needed}. Load the model and adapters for which the weights were learned."
                )
        own_kind = (self.granularity, self.simplex, slots, scalings, self.combination_type)
        result = MergeWeights(self.adapters, self.groups, *own_kind)
        with torch.no_grad():
            result.values.copy_(self.values)
        result.loss_before, result.loss_after = self.loss_before, self.loss_after
        return result.to(next(iter(tensors.values())).device)

    def forward(self, slot_key: str) -> Tensor:
        """The weights of a tensor.

        Args:
            slot_key (`str`): Key of its slot.

        Returns:
            `Tensor`: `(T,)`, or `(T, channels)` where channels have weights of their own.
        """
        return self._weights_of(slot_key, self._mixture())

    def combine(self, adapters: Union[Sequence[AdapterTensors], AdapterTensors]) -> AdapterTensors:
        """
        The merged tensors, differentiable in the weights.

        Parameters are summed with their weights. LoRA's factors take the root of the weight each, so that in their
        product an adapter's own update has its weight, beside products of different adapters' factors, as
        `LoraModel.add_weighted_adapter` has it (the formula is at `merge_adapters`); with `"cat"` without those.
        Running statistics are averaged with the weights' absolute values, normalised to one and without gradient.
        Integer ones are added up; constants are the first adapter's.

        Args:
            adapters (`Union[Sequence[dict[str, Tensor]], dict[str, Tensor]]`): The tensors of each adapter by key, or
                the result of `stack`, which does the constant part of the work.

        Returns:
            `dict[str, Tensor]`: The merged tensors by key.

        Raises:
            ValueError: If the adapters are not as many as the weights are for, or lack a tensor.
        """
        stacked = adapters if isinstance(adapters, Mapping) else self.stack(adapters)
        mixture, merged = self._mixture(), {}
        for key, slot in self.slots.items():
            # Integers take no weights.
            weights = self._weights_of(key, mixture) if stacked[key].is_floating_point() else mixture[:, 0]
            merged[key] = weighted_sum(slot, stacked[key], weights, self.scalings.get(key), self.combination_type)
        return merged

    def stack(self, adapters: Sequence[AdapterTensors]) -> AdapterTensors:
        """Copies of the adapters' tensors side by side, `(T, ...)` by key, without gradient."""
        if len(adapters) != len(self.adapters):
            raise ValueError(f"{len(adapters)} adapters for merge weights of {len(self.adapters)}; give one each.")
        if not self.slots:
            raise ValueError("These merge weights know of no tensors; pass `slots` to `from_dict`.")
        for name, tensors in zip(self.adapters, adapters):
            missing = next((key for key in self.slots if key not in tensors), None)
            if missing is not None:
                raise ValueError(f"Adapter {name!r} has no tensor {missing!r}; all adapters must have the same.")
        return {key: torch.stack([tensors[key].detach() for tensors in adapters]) for key in self.slots}

    def step_length(self, learning_rate: float) -> float:
        """How far Adam shall move `values` for a learning rate in units of `1 / T`, the equal weight."""
        # Adam's steps are as long as its rate: what is little for two adapters would be all for a hundred.
        return learning_rate if self.simplex else learning_rate / len(self.adapters)

    def _mixture(self) -> Tensor:
        """All weights, `(T, number a task)`."""
        return self.values.softmax(dim=0) if self.simplex else self.values

    def _weights_of(self, key: str, mixture: Tensor) -> Tensor:
        name = key
        while name not in self._columns:
            if not name:
                raise ValueError(f"There are no merge weights for {key!r}; there are for {', '.join(self._columns)}.")
            name = name.rpartition(".")[0]
        weights = mixture[:, self._columns[name]]
        return weights if self._channels[name] else weights[:, 0]

    def as_dict(self) -> dict[str, Any]:
        """What these weights are, in plain numbers and lists, for a configuration or a file."""
        mixture = self._mixture().detach().cpu()
        groups = []
        for group in self.groups:
            weights = self._weights_of(group.name, mixture)
            places = {name: value for name, value in asdict(group).items() if value and name != "channels"}
            groups.append({**places, "weights": weights.tolist()})
        return {
            "adapters": list(self.adapters),
            "granularity": self.granularity,
            "simplex": self.simplex,
            "combination_type": self.combination_type,
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "groups": groups,
        }

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        slots: Optional[Mapping[str, Slot]] = None,
        scalings: Optional[Mapping[str, Tensor]] = None,
    ) -> MergeWeights:
        """The weights that `as_dict` described.

        `merge_adapters` takes them as they are; it finds tensors and scalings in the model.

        Args:
            data (`Mapping[str, Any]`): Result of `as_dict`, as in the configuration of a merged adapter.
            slots (`Optional[Mapping[str, Slot]]`): The tensors to merge; needed for `combine` only.
            scalings (`Optional[Mapping[str, Tensor]]`): As the class takes them: for `combine`, where scalings differ.

        Raises:
            ValueError: If something is missing, or weights are no finite numbers or not as many as the adapters.
        """
        groups, mixture = read_groups(data)
        # Weights that were saved before there was a choice do not have it.
        kind = (data["granularity"], data["simplex"], slots, scalings, data.get("combination_type", "linear"))
        result = cls(data["adapters"], groups, *kind)
        if result.simplex:
            mixture = mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log()
        with torch.no_grad():
            result.values.copy_(mixture)
        result.loss_before, result.loss_after = data.get("loss_before"), data.get("loss_after")
        return result

    def save_pretrained(self, save_directory: Union[str, os.PathLike]) -> None:
        """Writes the weights as `merge_weights.json`, for adapters whose configuration has no place for them.

        Args:
            save_directory (`Union[str, os.PathLike]`): The folder; best that of the merged adapter.

        Raises:
            ValueError: If there is a file in the place of the folder.
        """
        write_weights(self.as_dict(), save_directory)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Union[str, os.PathLike], subfolder: Optional[str] = None, **kwargs: Any
    ) -> MergeWeights:
        """The weights of a merged adapter: what `save_pretrained` wrote, or what its configuration keeps.

        Args:
            pretrained_model_name_or_path (`Union[str, os.PathLike]`): The adapter's folder, or its id on the Hub.
            subfolder (`Optional[str]`): Where in it.
            kwargs: Keyword arguments of `huggingface_hub.hf_hub_download`, as `revision` and `token`.

        Raises:
            ValueError: If there are none, or they are unusable.
        """
        return cls.from_dict(find_weights(pretrained_model_name_or_path, subfolder, **kwargs))

    def layer_means(self) -> dict[str, list[float]]:
        """Mean weight of each adapter by layer; by `""` where a weight holds for all layers."""
        mixture = self._mixture().detach().cpu()
        columns: dict[str, list[Tensor]] = {}
        for group in self.groups:
            columns.setdefault(group.layer, []).append(mixture[:, self._columns[group.name]])
        return {layer: torch.cat(parts, dim=1).mean(dim=1).tolist() for layer, parts in columns.items()}

    def table(self) -> str:
        """Mean weight by layer (rows) and adapter (columns), to be printed."""
        return table_of(self.layer_means(), self.adapters)

    def __str__(self) -> str:
        title = f"Merge weights by {self.granularity} for {len(self.adapters)} adapters"
        if self.loss_before is not None and self.loss_after is not None:
            title += f", loss {self.loss_before:.4g} -> {self.loss_after:.4g}"
        return f"{title}\n{self.table()}"

    def plot(self, path: Union[str, os.PathLike]) -> None:
        """Draws the mean weight by adapter and layer as a heat map.

        Args:
            path (`Union[str, os.PathLike]`): File to write; its ending decides the format.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        draw_table(self.layer_means(), self.adapters, path)


def check_weighted(combination_type: str) -> None:
    """Raises a `ValueError` unless merge weights can be those of this combination."""
    # Not at the top: the tuner imports this package.
    from ..tuner.head_config import check_choice

    check_choice("combination_type", combination_type, WeightedCombination)


def _counted(channels: Optional[int]) -> str:
    if channels is None:
        return "none"
    return f"weights of {channels} channels" if channels else "one weight an adapter"
