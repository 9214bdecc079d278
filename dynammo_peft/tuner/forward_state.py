"""What parts of a model tell each other within a forward pass."""

from __future__ import annotations

import threading
from typing import Any, Optional

from torch import Tensor


class ForwardState(threading.local):
    """What one part of a model leaves for another within a forward pass: threads have one each.

    A copy of the model has states of its own, which are empty: what they hold is of no use behind the pass.

    Attributes:
        pooled (`Optional[Tensor]`): The pooled output of a block, `(B, C)`.
        copies (`int`): How often each image stands in the batch.
        image_size (`Optional[tuple[int, int]]`): Height and width of the images, in pixels.
    """

    pooled: Optional[Tensor] = None
    copies: int = 1
    image_size: Optional[tuple[int, int]] = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
