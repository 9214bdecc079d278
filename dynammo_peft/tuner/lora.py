"""LoRA as the task adapter: linear, so that the merged one folds into the backbone's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Optional, Union

from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

from ..merging import MergeWeights, merge_adapters
from ..merging.checks import changes_base
from .architectures import ARCHITECTURES
from .head_config import HeadConfig
from .head_layer import DynammoHead
from .head_model import HeadTuner
from .image_size import ImageSizeHook
from .registration import extend_peft_type


@dataclass
class DynammoLoraConfig(HeadConfig, LoraConfig):
    """
    Configuration of a [`DynammoLoraModel`]: PEFT's [`~peft.LoraConfig`] and a task's classifier head ([`HeadConfig`]).

    With `feature_modules=[]` the merged adapter and its heads fold into a plain model of transformers
    (`merge_and_unload`). If `target_modules` is `None`, queries and values of attention get LoRA, the pointwise
    layers of a ConvNeXt, or all convolutions of a ResNet.
    """

    build_fields: ClassVar[tuple[str, ...]] = (
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "r",
        "rank_pattern",
        "lora_alpha",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "feature_modules",
    )
    averaging: ClassVar[str] = "cat"
    folds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("DYNAMMO_LORA")
        # What depends on the base weights or trains some of them cannot be averaged over tasks.
        if self.bias != "none":
            raise ValueError(f"bias={self.bias!r} trains biases that all tasks share; use bias='none'.")
        if self.use_dora:
            raise ValueError("use_dora=True scales the base weights, which no average over tasks can; use plain LoRA.")
        if self.kasa_config is not None:
            raise ValueError("kasa_config changes the base weights, which all tasks share; leave it out.")
        if changes_base(self.init_lora_weights):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} changes the base weights, which all tasks share; use "
                "True, False or 'gaussian'."
            )


class LoraHead(DynammoHead):
    """A [`DynammoHead`] that is found in files by LoRA's prefix: transformers knows one prefix of each method."""

    adapter_layer_names = ("lora_head",)


class DynammoLoraModel(HeadTuner, LoraModel):
    """
    A backbone with PEFT's LoRA as task adapters, and task heads as a [`DynammoModel`] has them.

    Args:
        model ([`~transformers.PreTrainedModel`]): The image classifier to be adapted.
        config ([`DynammoLoraConfig`]): The configuration of the first adapter.
        adapter_name (`str`): Its name, by convention `task_000`; defaults to `"default"`.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Create empty adapter weights on the meta device.

    Returns:
        `torch.nn.Module`: The adapted model.

    Example:

        ```py
        >>> model = get_peft_model(base, DynammoLoraConfig(classes=["basophil", "eosinophil"], r=8), "task_000")
        >>> model.add_adapter("task_001", DynammoLoraConfig(classes=["lymphocyte", "monocyte"], r=8))
        >>> model.add_weighted_adapter(["task_000", "task_001"], adapter_name="merged")
        >>> model.set_adapter("merged")
        >>> plain = model.merge_and_unload()  # a model of transformers that names four classes
        ```
    """

    tuner_layer_cls = (LoraLayer, LoraHead)
    head_cls = LoraHead

    def _default_targets(self, model_config: dict[str, Any]) -> set[str]:
        return set(ARCHITECTURES[model_config["model_type"]].projections)

    def _prepare_model(self, peft_config: DynammoLoraConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        # Fits position embeddings to the images.
        ImageSizeHook.of(model)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: Optional[Union[list[float], MergeWeights]] = None,
        adapter_name: str = "merged",
        combination_type: Optional[str] = None,
        **options: Any,
    ) -> None:
        """
        Merges adapters into a new one, in the manner of `LoraModel`; heads are placed side by side.

        A class that several adapters have keeps the head of the first of them.

        Args:
            adapters (`list[str]`): Names of the adapters, in the order in which their classes shall stand.
            weights (`Union[list[float], MergeWeights]`, *optional*):
                A weight for each, 1 / T if `None`; or learned ones.
            adapter_name (`str`): Name of the new adapter, defaults to `"merged"`.
            combination_type (`str`, *optional*):
                That of learned weights, or `"cat"`, if `None`. `"cat"`: the weighted sum of what the adapters add to
                the base weights, exactly; the rank grows with the number of adapters, and is gone once folded. Or a
                key of [`~dynammo_peft.merging.COMBINATIONS`], which combine the factors and are an approximation
                only.
            options: Options of that function, as `density` of `"ties"`.

        Raises:
            ValueError: If an adapter does not exist, is named twice or is built differently from the first, weights
                are unusable, or the combination type or an option does not exist.
        """
        if combination_type is None:
            combination_type = weights.combination_type if isinstance(weights, MergeWeights) else "cat"
        merge_adapters(self, adapters, weights, adapter_name, combination_type, **options)

    def merge_adapter(self, adapter_names: Optional[list[str]] = None, safe_merge: bool = False) -> None:
        """
        Adds LoRA to the backbone's weights, so that a forward pass costs what the base model's does.

        The heads stay beside the backbone, whatever they read. `unmerge_adapter` takes LoRA out again.

        Args:
            adapter_names (`Optional[list[str]]`): Of which adapters; the active ones if `None`.
            safe_merge (`bool`): Look for NaN first.
        """
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = True, safe_merge: bool = False, adapter_names: Optional[list[str]] = None
    ) -> nn.Module:
        """The base model with adapters in its weights and their heads as the classifier.

        Args:
            progressbar (`bool`): As of `LoraModel.merge_and_unload`.
            safe_merge (`bool`): Look for NaN first.
            adapter_names (`Optional[list[str]]`): Which adapters; the active ones if `None`.

        Raises:
            ValueError: If heads read more than what enters the classifier, or are no linear classifier together.
        """
        adapters = self.active_adapters if adapter_names is None else adapter_names
        # Before anything is touched.
        if self.head is not None:
            self.head.check_folds(adapters)
        names = [name for adapter in adapters for name in self.peft_config[adapter].class_names]
        self._detach()
        plain = super().merge_and_unload(progressbar, safe_merge, list(adapters))
        self._base_labels.show(names)
        if names and hasattr(plain, "num_labels"):
            plain.num_labels = len(names)
        return plain
