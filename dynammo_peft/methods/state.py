"""Tensors of a part in the state of the whole."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with `prefix`, by what follows it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
