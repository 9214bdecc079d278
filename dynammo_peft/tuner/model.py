"""The tuner: attaches task adapters and heads to a backbone and merges them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Optional, Union

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..merging import merge_adapters
from .architectures import ARCHITECTURES, Probe, check_map_sizes, choose_reduction_factor, probe
from .config import BUILD_FIELDS, DynammoConfig, check_choice
from .features import FeatureTap
from .image_size import ImageSizeHook, as_pair
from .labels import BaseLabels
from .layer import CANNOT_FOLD, DynammoHead, DynammoLayer, HeadOutput, WrappingLayer
from .modes import adapters_bypassed, freeze_mode
from .names import base_modules, check_adapter_name, find_base_module


class DynammoModel(BaseTuner):
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

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_adapter_name(model, adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # Only now is it settled what is trained.
        self.train(model.training)

    def _prepare_adapter_config(self, peft_config: DynammoConfig, model_config: dict) -> DynammoConfig:
        model_type = model_config.get("model_type")
        architecture = ARCHITECTURES.get(model_type)
        if architecture is None:
            missing = ["`target_modules` (its blocks)"] if peft_config.target_modules is None else []
            if peft_config.classes is not None and peft_config.head_module is None:
                missing.append("`head_module` (its classifier)")
            if missing:
                raise ValueError(
                    f"Model type {model_type!r} is not known; set {' and '.join(missing)} in the DynammoConfig. "
                    f"Known: {', '.join(ARCHITECTURES)}."
                )
            peft_config.feature_modules = peft_config.feature_modules or []
            return peft_config
        if peft_config.target_modules is None:
            peft_config.target_modules = architecture.target_modules(model_config)
        if peft_config.head_module is None:
            peft_config.head_module = architecture.head
        if peft_config.classes is None:
            peft_config.feature_modules = []
        elif peft_config.feature_modules is None:
            peft_config.feature_modules = architecture.feature_modules(model_config)
        return peft_config

    def _prepare_model(self, peft_config: DynammoConfig, model: nn.Module) -> None:
        if not hasattr(self, "_probe"):
            self._base_labels = BaseLabels(model)
        found = self._probe_blocks(peft_config, model)
        if peft_config.reduction_factor is None:
            peft_config.reduction_factor = choose_reduction_factor(found, peft_config)
        check_map_sizes(found, peft_config)
        self._probe: Probe = found

    def _probe_blocks(self, peft_config: DynammoConfig, model: nn.Module) -> Probe:
        """What enters the blocks of `peft_config`; each set of blocks and image size is probed once."""
        size = peft_config.image_size or getattr(getattr(model, "config", None), "image_size", None) or 224
        peft_config.image_size = list(as_pair(size))
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
        head = next((name for name, _ in base_modules(model) if self._is_head(peft_config, name)), None)
        if head is None and peft_config.classes is not None:
            raise ValueError(
                f"The base model has no module {peft_config.head_module!r} for the head; load it with "
                "AutoModelForImageClassification or set head_module in the DynammoConfig."
            )
        feature_modules = {name: find_base_module(model, name) for name in peft_config.feature_modules}
        known = getattr(self, "_probe", None)
        enough = known is not None and set(blocks) <= set(known.sites) and (head is None or known.features is not None)
        if enough and set(feature_modules) <= set(known.outputs) and known.image_size == as_pair(size):
            return replace(known, sites={name: known.sites[name] for name in blocks})
        with adapters_bypassed(model):
            return probe(model, blocks, head, as_pair(size), feature_modules)

    def _taps(self, names: Sequence[str], taps: dict[str, FeatureTap]) -> dict[str, FeatureTap]:
        """A tap on each of the modules; those that are there already are used again."""
        for name in names:
            if name not in taps:
                path = find_base_module(self.model, name)
                taps[name] = FeatureTap(self.model.get_submodule(path), self._probe.outputs[name])
        return taps

    @staticmethod
    def _is_head(peft_config: DynammoConfig, key: str) -> bool:
        return peft_config.head_module is not None and key == peft_config.head_module

    @staticmethod
    def _check_target_module_exists(peft_config: DynammoConfig, key: str) -> bool | re.Match[str] | None:
        if DynammoModel._is_head(peft_config, key):
            return peft_config.classes is not None
        return BaseTuner._check_target_module_exists(peft_config, key)

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
        if isinstance(target, DynammoHead):
            self._taps(peft_config.feature_modules, target.taps)
        if isinstance(target, WrappingLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if self._is_head(peft_config, current_key):
            taps = self._taps(peft_config.feature_modules, {})
            layer = DynammoHead(target, adapter_name, peft_config, self._probe.features, taps)
        else:
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

    def train(self, mode: bool = True) -> DynammoModel:
        """Training mode for what is trained; a frozen backbone or adapter stays in evaluation mode.

        Otherwise the running statistics of a frozen BatchNorm would drift, and they are not saved with the adapter.
        """
        super().train(mode)
        if mode:
            # The model itself keeps its flag: it is the mode that was asked for, to which `set_adapter` returns.
            for child in self.model.children():
                freeze_mode(child)
        return self

    def set_adapter(self, adapter_name: Union[str, list[str]], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        # What is trained has changed, and so have the modes; an adapter that becomes active may have been idle.
        self.train(self.model.training)
        self._sync_labels(self.active_adapters)

    def enable_adapter_layers(self) -> None:
        super().enable_adapter_layers()
        self._sync_labels(self.active_adapters)

    def disable_adapter_layers(self) -> None:
        super().disable_adapter_layers()
        self._sync_labels([])

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._sync_labels(self.active_adapters)

    def unload(self) -> nn.Module:
        self._sync_labels([])
        ImageSizeHook.of(self.model).handle.remove()
        if self.head is not None:
            for tap in self.head.taps.values():
                tap.handle.remove()
        return super().unload()

    def _check_merge_allowed(self) -> None:
        # Before anything is touched: `merge_and_unload` would stop half-way.
        raise NotImplementedError(CANNOT_FOLD)

    def _sync_labels(self, adapters: Sequence[str]) -> None:
        """Makes the base model's configuration name the classes whose logits it gives now."""
        layers = [module for module in self.model.modules() if isinstance(module, WrappingLayer)]
        if layers and all(layer.disable_adapters for layer in layers):
            adapters = []
        self._base_labels.show([name for adapter in adapters for name in self.peft_config[adapter].class_names])

    @property
    def head(self) -> Optional[DynammoHead]:
        """The layer that holds the heads, or `None` if no adapter has classes."""
        return next((module for module in self.model.modules() if isinstance(module, DynammoHead)), None)

    @contextmanager
    def head_output(self, output: HeadOutput) -> Iterator[None]:
        """Makes the model's `logits` something else for a while.

        Args:
            output (`Literal["scores", "logits", "last_layer_logits", "last_layer_logits+features", "features"]`):
                `"scores"`: logits over the classes `(B, N)`, as ever. `"logits"`: the raw logits of all heads, with
                "others", `(B, sum of n_t + 1)`, for training. `"last_layer_logits"`: the part of them that comes from
                what enters the classifier, without further layers, for training adapters all the way through the
                backbone. `"features"`: what the heads read, `(B, C)`; with a `+`, one behind the other.
        """
        check_choice("output", output, HeadOutput)
        head = self.head
        if head is None:
            raise ValueError("The model has no head; give the DynammoConfig the `classes` of the task.")
        before, head.output = head.output, output
        try:
            yield
        finally:
            head.output = before

    def set_backbone_requires_grad(self, requires_grad: bool) -> None:
        """Makes the backbone trainable or frozen; adapters, heads and the base model's own classifier stay so.

        Args:
            requires_grad (`bool`): Whether the backbone shall be trained.
        """
        layers = [module for module in self.model.modules() if isinstance(module, WrappingLayer)]
        spared = {
            id(parameter)
            for layer in layers
            for key, parameter in layer.named_parameters()
            if isinstance(layer, DynammoHead) or not key.startswith("base_layer.")
        }
        for key, module in base_modules(self.model):
            is_head = any(self._is_head(config, key) for config in self.peft_config.values())
            if is_head or isinstance(module, AuxiliaryTrainingWrapper):
                spared.update(id(parameter) for parameter in module.parameters())
        # A block of one adapter may lie inside a block of another: what is an adapter's anywhere is spared.
        for parameter in self.model.parameters():
            if id(parameter) not in spared:
                parameter.requires_grad_(requires_grad)
        self.train(self.model.training)

    def copy_adapter(self, source: str, target: str) -> None:
        """Copies the blocks' adapters of `source`, with their statistics, to `target`; heads are not copied.

        Args:
            source (`str`): Name of the adapter to copy from.
            target (`str`): Name of the adapter to copy to.

        Raises:
            ValueError: If one does not exist, or they differ in what they are attached to or in shape.
        """
        self._check_alike([source, target])
        for layer in self.model.modules():
            if isinstance(layer, DynammoLayer):
                layer.copy_adapter(source, target)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: Optional[list[float]] = None,
        adapter_name: str = "merged",
        combination_type: str = "linear",
        **options: Any,
    ) -> None:
        """
        Merges adapters into a new one (Qazi et al. 2024, section 2.3), in the manner of `LoraModel`.

        Parameters of the blocks' adapters, alpha among them, are combined by `combination_type`; BatchNorm statistics
        are averaged with the weights normalised to one; heads are placed side by side, so that the new adapter knows
        the classes of all. The new adapter is frozen. It replaces an adapter of its name, and is active if that was.

        Args:
            adapters (`list[str]`): Names of the adapters, in the order in which their classes shall stand.
            weights (`list[float]`, *optional*): A weight for each; see [`~dynammo_peft.merging.merge_adapters`].
            adapter_name (`str`): Name of the new adapter, defaults to `"merged"`.
            combination_type (`str`): A key of [`~dynammo_peft.merging.COMBINATIONS`]; `"linear"`: the weighted sum.
            options: Options of that function, as `density` of `"ties"`.

        Raises:
            ValueError: If an adapter does not exist or is built differently from the first, a class belongs to two of
                them, weights are missing or unusable, or the combination type or an option does not exist.
        """
        merge_adapters(self, adapters, weights, adapter_name, combination_type, **options)

    def create_merged_adapter(self, adapters: list[str], adapter_name: str) -> None:
        """Adds a frozen adapter with the heads of others side by side; its blocks' adapters are fresh.

        Args:
            adapters (`list[str]`): Names of the adapters, in the order in which their classes shall stand.
            adapter_name (`str`): Name of the new adapter.

        Raises:
            ValueError: If an adapter does not exist or is built differently from the first, a class belongs to two of
                them, or there is an adapter of the new name already.
        """
        self.check_mergeable(adapters, adapter_name)
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter {adapter_name!r} exists already; choose another adapter_name.")
        self.peft_config[adapter_name] = self._merged_config(adapters)
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        self._cast_adapter_dtype(adapter_name)
        if self.head is not None:
            self.head.concatenate_heads(adapters, adapter_name)

    def check_mergeable(self, adapters: list[str], adapter_name: str) -> None:
        """Raises a `ValueError` unless `create_merged_adapter` can make an adapter of others.

        Args:
            adapters (`list[str]`): Names of the adapters.
            adapter_name (`str`): Name of the new adapter.
        """
        if not adapters:
            raise ValueError("No adapters to merge; name at least one.")
        if adapter_name in adapters:
            raise ValueError(f"Adapter {adapter_name!r} cannot be merged into itself; choose another adapter_name.")
        # Before the comparison of fields, of which some follow from having a head.
        if len({self.peft_config[name].classes is None for name in adapters if name in self.peft_config}) > 1:
            raise ValueError(f"Of adapters {', '.join(adapters)} only some have a head; give all of them `classes`.")
        self._check_alike(adapters)
        # Raises if two adapters have a class in common.
        self._merged_config(adapters)

    def _merged_config(self, adapters: list[str]) -> DynammoConfig:
        heads = [head for name in adapters for head in self.peft_config[name].classes or ()]
        first = self.peft_config[adapters[0]]
        return replace(first, classes=heads or None, inference_mode=True, merge_weights=None)

    def _check_alike(self, adapters: list[str]) -> None:
        """Raises a `ValueError` unless all adapters exist and are built as the first."""
        for name in adapters:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name!r} does not exist; there are {', '.join(self.peft_config)}.")
        first = self.peft_config[adapters[0]]
        for name in adapters[1:]:
            config = self.peft_config[name]
            for field in BUILD_FIELDS:
                if getattr(config, field) != getattr(first, field):
                    raise ValueError(
                        f"Adapters {adapters[0]!r} and {name!r} differ in {field} ({getattr(first, field)!r} and "
                        f"{getattr(config, field)!r}); give both the same."
                    )
