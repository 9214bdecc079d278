"""What the tuners of all task adapters have in common: heads beside the base model's classifier."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Optional, Union

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .architectures import ARCHITECTURES, Probe, probe
from .features import FeatureTap
from .flips import FlipHook
from .head_config import HeadConfig, check_choice
from .head_layer import DynammoHead, HeadOutput
from .heads import unknown_score
from .image_size import ImageSizeHook, as_pair
from .labels import BaseLabels
from .mergeable import MergeableTuner
from .modes import adapters_bypassed, freeze_mode
from .names import base_modules, check_adapter_name, find_base_module
from .standardisation import Standardisation
from .targets import check_targets


class HeadTuner(MergeableTuner):
    """
    A tuner whose adapters bring classifier heads along.

    To be combined with a tuner of PEFT, or to be completed by one that says what it puts into the backbone. The
    backbone is frozen and stays in evaluation mode while adapters are trained.
    """

    head_cls: ClassVar[type[DynammoHead]] = DynammoHead
    _trains_backbone = False

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_adapter_name(model, adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        if isinstance(config.target_modules, set) and config.head_module is not None:
            # PEFT counts the head among all linear layers, but for the first adapter alone.
            config.target_modules -= {name for name in config.target_modules if self._is_head(config, name)}
        if self.head is not None:
            # PEFT copies modules to be saved whole, which is where the heads' features come from then.
            for hooks, key, tap in FeatureTap.all_of(self.model):
                hooks[key] = self.head.taps[tap.name]
        # Only now is it settled what is trained.
        self.train(model.training)

    def _prepare_adapter_config(self, peft_config: HeadConfig, model_config: dict) -> HeadConfig:
        peft_config.backbone_trained |= any(config.backbone_trained for config in self.peft_config.values())
        model_type = model_config.get("model_type")
        architecture = ARCHITECTURES.get(model_type)
        if architecture is None:
            missing = ["`target_modules` (its blocks)"] if peft_config.target_modules is None else []
            if peft_config.classes is not None and peft_config.head_module is None:
                missing.append("`head_module` (its classifier)")
            if missing:
                raise ValueError(
                    f"Model type {model_type!r} is not known; set {' and '.join(missing)} in the "
                    f"{type(peft_config).__name__}. Known: {', '.join(ARCHITECTURES)}."
                )
            peft_config.feature_modules = peft_config.feature_modules or []
            return peft_config
        if peft_config.target_modules is None:
            peft_config.target_modules = self._default_targets(model_config)
        if peft_config.head_module is None:
            peft_config.head_module = architecture.head
        if peft_config.classes is None:
            peft_config.feature_modules = []
        elif peft_config.feature_modules is None:
            peft_config.feature_modules = architecture.feature_modules(model_config)
        return peft_config

    def _default_targets(self, model_config: dict[str, Any]) -> set[str]:
        """Which modules of a known model type get adapters."""
        raise NotImplementedError

    def _prepare_model(self, peft_config: HeadConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        # What is loaded to be used is as it was trained.
        if not peft_config.inference_mode:
            check_targets(peft_config, model)
        if not hasattr(self, "_probe"):
            self._base_labels = BaseLabels(model)
        self._probe: Probe = self._probe_parts(peft_config, model, [])

    def _probe_parts(self, peft_config: HeadConfig, model: nn.Module, blocks: Sequence[str]) -> Probe:
        """What enters and leaves blocks and classifier; each set of them and image size is probed once."""
        size = peft_config.image_size or getattr(getattr(model, "config", None), "image_size", None) or 224
        peft_config.image_size = list(as_pair(size))
        head = next((name for name, _ in base_modules(model) if self._is_head(peft_config, name)), None)
        if head is None and peft_config.classes is not None:
            own, why = type(model).__name__, ""
            if own.endswith("WithTeacher"):
                why = ", but two classifiers, one of them distilled"
            loader = own.removesuffix("WithTeacher") if why else "AutoModelForImageClassification"
            raise ValueError(
                f"The base model has no module {peft_config.head_module!r} for the head{why}; load it with {loader} "
                f"or set head_module in the {type(peft_config).__name__}."
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
                taps[name] = FeatureTap(name, self.model.get_submodule(path), self._probe.outputs[name])
        return taps

    @staticmethod
    def _is_head(peft_config: HeadConfig, key: str) -> bool:
        return peft_config.head_module is not None and key == peft_config.head_module

    @staticmethod
    def _check_target_module_exists(peft_config: HeadConfig, key: str) -> bool | re.Match[str] | None:
        if HeadTuner._is_head(peft_config, key):
            return peft_config.classes is not None
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: HeadConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: Optional[str] = None,
    ) -> None:
        if isinstance(target, DynammoHead):
            self._taps(peft_config.feature_modules, target.taps)
            target.update_layer(adapter_name, peft_config)
        elif self._is_head(peft_config, current_key):
            taps = self._taps(peft_config.feature_modules, {})
            layer = self.head_cls(target, adapter_name, peft_config, self._probe.features, taps)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            # A new module is in training mode, also in a model in evaluation mode.
            layer.training = target.training
            self._flip_hook = FlipHook(self.model, layer)
            setattr(parent, target_name, layer)
        else:
            super()._create_and_replace(
                peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=parameter_name
            )

    def train(self, mode: bool = True) -> HeadTuner:
        """Training mode for what is trained; a frozen backbone or adapter stays in evaluation mode.

        Otherwise the running statistics of a frozen BatchNorm would drift, and they are not saved with the adapter.
        """
        super().train(mode)
        if mode:
            # The model itself keeps its flag: it is the mode that was asked for, to which `set_adapter` returns.
            for child in self.model.children():
                freeze_mode(child, self._trains_backbone)
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
        # As of `set_adapter`: another one may be trained now.
        self.train(self.model.training)
        self._sync_labels(self.active_adapters)

    def append_heads(self, merged: str, adapter: str) -> None:
        """As of [`MergeableTuner`]; the base model's labels follow."""
        super().append_heads(merged, adapter)
        self._sync_labels(self.active_adapters)

    def unload(self) -> nn.Module:
        self._detach()
        self._sync_labels([])
        return super().unload()

    def _detach(self) -> None:
        """Removes the hooks that this tuner put into the base model."""
        ImageSizeHook.of(self.model).handle.remove()
        if self.head is not None:
            self._flip_hook.handle.remove()
            for hooks, key, _ in FeatureTap.all_of(self.model):
                del hooks[key]

    def _sync_labels(self, adapters: Sequence[str]) -> None:
        """Makes the base model's configuration name the classes whose logits it gives now."""
        head = self.head
        if head is None or head.disable_adapters:
            adapters = []
        self._base_labels.show([name for adapter in adapters for name in self.peft_config[adapter].class_names])

    def _required_head(self) -> DynammoHead:
        if self.head is None:
            raise ValueError("The model has no head; give the configuration the `classes` of the task.")
        return self.head

    @contextmanager
    def head_output(self, output: HeadOutput) -> Iterator[None]:
        """Makes the model's `logits` something else for a while.

        Args:
            output (`Literal["scores", "logits", "last_layer_logits", "last_layer_logits+features", "features"]`):
                `"scores"`: logits over the classes `(B, N)`, as ever. `"logits"`: the raw logits of all heads, with
                "others", `(B, sum of n_t + 1)`, for training. `"last_layer_logits"`: the part of them that comes from
                what enters the classifier, without further layers, for training adapters all the way through the
                backbone. `"features"`: what the heads read, `(B, C)`; with a `+`, one behind the other.

        Raises:
            ValueError: If the model has no head, or there is no such output.
        """
        check_choice("output", output, HeadOutput)
        head = self._required_head()
        before, head.output = head.output, output
        try:
            yield
        finally:
            head.output = before

    @contextmanager
    def standardised_features(self, features: Tensor) -> Iterator[None]:
        """Heads read what enters the classifier standardised; the active adapter's then takes that into its weights.

        Args:
            features (`Tensor`): What enters the classifier, `(N, C)`, to standardise by.

        Raises:
            ValueError: If the model has no head.
        """
        head = self._required_head()
        own = [head.heads[name] for name in head.active_adapters]
        head.standardisation = standardisation = Standardisation.of(features)
        try:
            yield
            for linear in own:
                standardisation.fold(linear)
        finally:
            head.standardisation = None

    def unknown_score(self, pixel_values: Tensor) -> Tensor:
        """How likely images show no class of the active adapters, `(B,)`: see [`~tuner.heads.unknown_score`].

        Args:
            pixel_values (`Tensor`): Images, `(B, C, H, W)`.

        Raises:
            ValueError: If no active adapter has a head.
        """
        with self.head_output("logits"):
            sizes = sum((self.peft_config[name].head_sizes for name in self.active_adapters), ())
            if not sizes or self.head.disable_adapters:
                raise ValueError("No head is active that could say 'others'; make an adapter with classes active.")
            return unknown_score(self.model(pixel_values=pixel_values).logits, sizes)

    def set_backbone_requires_grad(self, requires_grad: bool) -> None:
        """Makes the backbone trainable or frozen; adapters, heads and the base model's own classifier stay so.

        Args:
            requires_grad (`bool`): Whether the backbone shall be trained. The configurations of all adapters, and of
                those to come, note that it was.
        """
        self._trains_backbone = requires_grad
        for config in self.peft_config.values():
            config.backbone_trained |= requires_grad
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
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
