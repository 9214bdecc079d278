"""The tuner: attaches task adapters and heads to a backbone and merges them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Optional, Union

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..merging import MergeWeights, merge_adapters
from .architectures import ARCHITECTURES, Probe, check_map_sizes, choose_reduction_factor
from .config import DynammoConfig
from .head_model import HeadTuner
from .image_size import ImageSizeHook
from .layer import DynammoLayer
from .names import base_modules
from .wrapping import CANNOT_FOLD, WrappingLayer


class DynammoModel(HeadTuner):
    """
    A backbone with DynaMMo adapters (Qazi et al. 2024, https://arxiv.org/abs/2404.14099).

    Each task has an adapter in front of chosen blocks and a head for its classes. Any number of them is merged into
    one by [`~DynammoModel.add_weighted_adapter`], so that the forward pass costs the same for any number of tasks. The
    backbone is frozen and stays in evaluation mode while adapters are trained.

    Args:
        model ([`~transformers.PreTrainedModel`]): The image classifier to be adapted.
        config ([`DynammoConfig`]): The configuration of the first adapter.
        adapter_name (`str`): Its name, by convention `task_000`; defaults to `"default"`.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Create empty adapter weights on the meta device.

    Returns:
        `torch.nn.Module`: The adapted model.

    Example:

        ```py
        >>> from transformers import AutoModelForImageClassification
        >>> from peft import get_peft_model
        >>> from dynammo_peft import DynammoConfig

        >>> base = AutoModelForImageClassification.from_pretrained("facebook/deit-tiny-patch16-224")
        >>> model = get_peft_model(base, DynammoConfig(classes=["basophil", "eosinophil"]), "task_000")
        >>> model.add_adapter("task_001", DynammoConfig(classes=["lymphocyte", "monocyte"]))
        >>> model.add_weighted_adapter(["task_000", "task_001"], adapter_name="merged")
        >>> model.set_adapter("merged")
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The adapted image classifier.
        - **peft_config** (`dict[str, DynammoConfig]`) -- The configuration of each adapter.
    """

    prefix: str = "dynammo_"
    tuner_layer_cls = WrappingLayer

    def _default_targets(self, model_config: dict[str, Any]) -> set[str]:
        return ARCHITECTURES[model_config["model_type"]].target_modules(model_config)

    def _prepare_model(self, peft_config: DynammoConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        if peft_config.reduction_factor is None:
            peft_config.reduction_factor = choose_reduction_factor(self._probe, peft_config)
        check_map_sizes(self._probe, peft_config)

    def _probe_parts(self, peft_config: DynammoConfig, model: nn.Module, blocks: Sequence[str]) -> Probe:
        blocks = [name for name, _ in base_modules(model) if BaseTuner._check_target_module_exists(peft_config, name)]
        if not blocks:
            raise ValueError(
                f"The base model has no block target_modules={peft_config.target_modules!r} (exclude_modules="
                f"{peft_config.exclude_modules!r}); name its blocks by target_modules in the DynammoConfig."
            )
        for outer in blocks:
            inner = next((name for name in blocks if name.startswith(f"{outer}.")), None)
            if inner is not None:
                raise ValueError(f"Block {inner!r} is inside block {outer!r}; take one of them out of target_modules.")
        return super()._probe_parts(peft_config, model, blocks)

    def _create_and_replace(
        self,
        peft_config: DynammoConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: Optional[str] = None,
    ) -> None:
        if self._is_head(peft_config, current_key):
            super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key)
            return
        if isinstance(target, DynammoLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = DynammoLayer(target, adapter_name, peft_config, self._probe.sites[current_key])
        ImageSizeHook.of(self.model).layers.append(layer)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # A new module is in training mode, also in a model in evaluation mode.
        new_module.training = child.training
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            return
        # PEFT casts parameters only; running statistics in half precision lose the small updates.
        for module in self._adapter_modules(adapter_name):
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.dtype in (torch.float16, torch.bfloat16):
                    setattr(module, name, buffer.float())

    def _adapter_modules(self, adapter_name: str) -> Iterator[nn.Module]:
        for layer in self.model.modules():
            if isinstance(layer, WrappingLayer):
                yield from (container[adapter_name] for container in layer.containers_of(adapter_name))

    def _check_merge_allowed(self) -> None:
        # Before anything is touched: `merge_and_unload` would stop half-way.
        raise NotImplementedError(CANNOT_FOLD)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: Optional[Union[list[float], MergeWeights]] = None,
        adapter_name: str = "merged",
        combination_type: str = "linear",
        **options: Any,
    ) -> None:
        """
        Merges adapters into a new one (Qazi et al. 2024, section 2.3), in the manner of `LoraModel`.

        Parameters of the blocks' adapters, alpha among them, are combined by `combination_type`; BatchNorm statistics
        are averaged with the weights normalised to one; heads are placed side by side, so that the new adapter knows
        the classes of all. A class that several have keeps the head of the first of them. The new adapter is frozen.
        It replaces an adapter of its name, and is active if that was.

        Args:
            adapters (`list[str]`): Names of the adapters, in the order in which their classes shall stand.
            weights (`Union[list[float], MergeWeights]`, *optional*):
                A weight for each, or learned ones; see [`~dynammo_peft.merging.merge_adapters`].
            adapter_name (`str`): Name of the new adapter, defaults to `"merged"`.
            combination_type (`str`): A key of [`~dynammo_peft.merging.COMBINATIONS`]; `"linear"`: the weighted sum.
            options: Options of that function, as `density` of `"ties"`.

        Raises:
            ValueError: If an adapter does not exist, is named twice or is built differently from the first, weights
                are missing or unusable, or the combination type or an option does not exist.
        """
        merge_adapters(self, adapters, weights, adapter_name, combination_type, **options)
