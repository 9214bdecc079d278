"""Adapters of a tuner made of others: copied, or with the heads of several side by side."""

from __future__ import annotations

import copy
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any, Optional

from peft.tuners.tuners_utils import BaseTuner

from ..merging import adapter_tensors, set_adapter_tensors
from .head_config import HeadConfig
from .head_layer import DynammoHead
from .heads import heads_of_new_classes


class MergeableTuner(BaseTuner):
    """A tuner whose adapters bring heads along, which stand side by side where adapters are merged."""

    @property
    def head(self) -> Optional[DynammoHead]:
        """The layer that holds the heads, or `None` if no adapter has classes."""
        return next((module for module in self.model.modules() if isinstance(module, DynammoHead)), None)

    def copy_adapter(self, source: str, target: str) -> None:
        """Copies the backbone's adapters of `source`, with their statistics, to `target`; heads are not copied.

        With which weights `target` was merged before is forgotten: its configuration names those of `source`, if any.

        Args:
            source (`str`): Name of the adapter to copy from.
            target (`str`): Name of the adapter to copy to.

        Raises:
            ValueError: If one does not exist, or they differ in what they are attached to or in shape.
        """
        self._check_alike([source, target])
        set_adapter_tensors(self, target, adapter_tensors(self, source))
        self.peft_config[target].merge_weights = copy.deepcopy(self.peft_config[source].merge_weights)

    def create_merged_adapter(self, adapters: list[str], adapter_name: str, **changes: Any) -> None:
        """Adds a frozen adapter with the heads of others side by side; its blocks' adapters are fresh.

        A class that several of them have keeps the head of the first; of the later heads it is left out.

        Args:
            adapters (`list[str]`): Names of the adapters, in the order in which their classes shall stand.
            adapter_name (`str`): Name of the new adapter.
            changes: Fields in which its configuration differs from the first adapter's.

        Raises:
            ValueError: If an adapter does not exist, is named twice or is built differently from the first, or there
                is an adapter of the new name already.
        """
        self.check_mergeable(adapters, adapter_name, changes.keys())
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter {adapter_name!r} exists already; choose another adapter_name.")
        parts = self._merged_heads(adapters)
        self.peft_config[adapter_name] = self._merged_config(adapters[0], [heads for heads, _ in parts], **changes)
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        self._cast_adapter_dtype(adapter_name)
        if self.head is not None:
            self.head.concatenate_heads(adapters, [columns for _, columns in parts], adapter_name)

    def append_heads(self, merged: str, adapter: str) -> None:
        """Places the heads of an adapter beside those that a merged one has already, but for classes that it knows.

        Args:
            merged (`str`): Name of the merged adapter.
            adapter (`str`): Name of the other adapter; left as it is.
        """
        (old, _), (new, columns) = self._merged_heads([merged, adapter])
        self.peft_config[merged] = self._merged_config(merged, [old, new])
        if self.head is not None:
            self.head.append_heads(merged, adapter, columns, tuple(len(head) for head in new))

    def check_mergeable(
        self, adapters: list[str], adapter_name: Optional[str] = None, ignored: Set[str] = frozenset()
    ) -> None:
        """Raises a `ValueError` unless `create_merged_adapter` can make an adapter of others.

        Args:
            adapters (`list[str]`): Names of the adapters.
            adapter_name (`Optional[str]`): Name of the new adapter; `None` if none is made.
            ignored (`Set[str]`): Fields in which they may differ all the same.
        """
        if not adapters:
            raise ValueError("No adapters to merge; name at least one.")
        if adapter_name in adapters:
            raise ValueError(f"Adapter {adapter_name!r} cannot be merged into itself; choose another adapter_name.")
        # Before the comparison of fields, of which some follow from having a head.
        if len({self.peft_config[name].classes is None for name in adapters if name in self.peft_config}) > 1:
            raise ValueError(f"Of adapters {', '.join(adapters)} only some have a head; give all of them `classes`.")
        self._check_alike(adapters, HeadConfig.merge_fields, ignored)
        twice = next((name for place, name in enumerate(adapters) if name in adapters[:place]), None)
        if twice is not None and self.peft_config[twice].classes is not None:
            raise ValueError(f"Adapter {twice!r} is named twice; name each adapter with a head once.")

    def check_heads(self, adapters: list[str], merged: str) -> None:
        """Raises a `ValueError` unless an adapter has the heads that `create_merged_adapter` would give it.

        Args:
            adapters (`list[str]`): Names of the adapters that are merged.
            merged (`str`): Name of the adapter that exists.
        """
        expected = self._merged_config(adapters[0], [heads for heads, _ in self._merged_heads(adapters)]).class_names
        found = self.peft_config[merged].class_names
        if found != expected:
            raise ValueError(
                f"Adapter {merged!r} has the classes {', '.join(found) or 'none'}, but the merge of "
                f"{', '.join(adapters)} has {', '.join(expected) or 'none'}. Merge them anew by `merge_adapters`, "
                "delete it, or choose another adapter_name."
            )

    def _merged_heads(self, adapters: list[str]) -> list[tuple[list[list[str]], list[int]]]:
        """Of each adapter the heads of classes that no earlier one has, and their columns."""
        parts, known = [], []
        for name in adapters:
            config = self.peft_config[name]
            parts.append(heads_of_new_classes(config.classes or (), known))
            known += config.class_names
        return parts

    def _merged_config(self, first: str, parts: list[list[list[str]]], **changes: Any) -> HeadConfig:
        heads = [head for part in parts for head in part]
        config = self.peft_config[first]
        return replace(config, classes=heads or None, inference_mode=True, merge_weights=None, **changes)

    def _check_alike(self, adapters: list[str], further: Sequence[str] = (), ignored: Set[str] = frozenset()) -> None:
        """Raises a `ValueError` unless all adapters exist and are built as the first, and alike in further fields."""
        for name in adapters:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name!r} does not exist; there are {', '.join(self.peft_config)}.")
        first = self.peft_config[adapters[0]]
        for name in adapters[1:]:
            config = self.peft_config[name]
            for field in (*first.build_fields, *further):
                if field not in ignored and getattr(config, field) != getattr(first, field):
                    raise ValueError(
                        f"Adapters {adapters[0]!r} and {name!r} differ in {field} ({getattr(first, field)!r} and "
                        f"{getattr(config, field)!r}); give both the same."
                    )
