"""By what layers multiply adapters (LoRA): what a merge has to make up for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .adapters import AdaptedModel, Slot, adapted_base


# Kinds of tensors that the layer multiplies by the adapter's scaling.
SCALED = ("factor_a", "factor_b", "scaled")


def scalings_of(model: AdaptedModel, slots: Mapping[str, Slot], adapters: Sequence[str]) -> dict[str, list[float]]:
    """The adapters' scalings of the tensors that have one, by key.

    Raises:
        ValueError: If a scaling is zero.
    """
    base = adapted_base(model)
    scalings = {}
    for key, slot in slots.items():
        if slot.kind in SCALED:
            of_layer = base.get_submodule(slot.layer).scaling
            scalings[key] = [float(of_layer[name]) for name in adapters]
            for name, scaling in zip(adapters, scalings[key]):
                if scaling == 0:
                    raise ValueError(f"Adapter {name!r} has the scaling 0 in {slot.layer!r}; give it a lora_alpha.")
    return scalings


def scalings_over(
    model: AdaptedModel, slots: Mapping[str, Slot], adapters: Sequence[str], merged: str
) -> dict[str, Tensor]:
    """The adapters' scalings over that of a merged adapter, `(T,)` by key: what [`MergeWeights`] takes.

    Raises:
        ValueError: If a scaling is zero.
    """
    scalings = scalings_of(model, slots, [*adapters, merged])
    return {key: torch.tensor([value / values[-1] for value in values[:-1]]) for key, values in scalings.items()}
