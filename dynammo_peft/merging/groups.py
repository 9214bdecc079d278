"""Which tensors of a merge share their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .adapters import AdapterTensors, Slot


Granularity = Literal["task", "layer", "channel"]


@dataclass(frozen=True)
class WeightGroup:
    """Tensors that share their merge weights: all whose keys begin with the group's name.

    Args:
        layer (`str`): Name of the layer; empty for all layers.
        container (`str`): Container of the layer; empty for all of them.
        tensor (`str`): Name of the tensor; empty for all of them.
        channels (`int`): Output channels with weights of their own; 0 for one weight a task.
    """

    layer: str = ""
    container: str = ""
    tensor: str = ""
    channels: int = 0

    @property
    def name(self) -> str:
        """Beginning of the keys of its slots."""
        return ".".join(part for part in (self.layer, self.container, self.tensor) if part)


def check_granularity(granularity: str) -> None:
    """Raises a `ValueError` unless the granularity exists."""
    # Not at the top: the tuner imports this package.
    from ..tuner.head_config import check_choice

    check_choice("granularity", granularity, Granularity)


def channel_dim(slot: Slot, tensor: Tensor) -> int:
    """Dimension of the output channels; that of the only axis of IA3's row vectors, `(1, C)`."""
    wide = [dim for dim, size in enumerate(tensor.shape) if size > 1]
    is_vector = slot.kind == "parameter" and not slot.tensor and len(wide) == 1
    return wide[0] if is_vector else slot.output_dim


def _channels(slot: Slot, tensor: Tensor) -> int:
    """Number of output channels; 0 if there is but one."""
    count = tensor.shape[channel_dim(slot, tensor)] if tensor.dim() else 1
    return count if count > 1 else 0


def weight_groups(slots: Mapping[str, Slot], tensors: AdapterTensors, granularity: Granularity) -> list[WeightGroup]:
    """The groups of the slots, of whose tensors one adapter's give the shapes."""
    if granularity == "task":
        return [WeightGroup()]
    if granularity == "layer":
        return [WeightGroup(layer) for layer in dict.fromkeys(slot.layer for slot in slots.values())]
    containers: dict[tuple[str, str], list[Slot]] = {}
    for slot in slots.values():
        # Integers (counts of batches) take no weight.
        if tensors[slot.key].is_floating_point():
            containers.setdefault((slot.layer, slot.container), []).append(slot)
    groups = []
    for (layer, container), members in containers.items():
        channels = [_channels(slot, tensors[slot.key]) for slot in members]
        if len(set(channels)) == 1:
            groups.append(WeightGroup(layer, container, "", channels[0]))
        else:
            groups += [WeightGroup(layer, container, slot.tensor, count) for slot, count in zip(members, channels)]
    return groups
