"""A merged model without PEFT: adapters folded into two convolutions each, for transformers alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.save_and_load import get_base_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from ..tuner import DynammoLayer
from ..tuner.head_config import HeadConfig
from ..tuner.layer import equal_convolution
from ..tuner.names import find_base_module
from .export import check_unmerged
from .modeling_dynammo import Adapter, DynammoForImageClassification, DynammoImageClassifierConfig


AutoConfig.register(DynammoImageClassifierConfig.model_type, DynammoImageClassifierConfig, exist_ok=True)
AutoModelForImageClassification.register(DynammoImageClassifierConfig, DynammoForImageClassification, exist_ok=True)
# `save_pretrained` writes the module of these classes beside the weights, for `trust_remote_code=True`.
DynammoImageClassifierConfig.register_for_auto_class()
DynammoForImageClassification.register_for_auto_class("AutoModelForImageClassification")


def to_standalone(model: PeftModel, adapter_name: str = "merged") -> DynammoForImageClassification:
    """
    A copy of the model with one adapter that computes the same without PEFT and without this package.

    What it saves by `save_pretrained`, anybody loads by `AutoModelForImageClassification.from_pretrained(...,
    trust_remote_code=True)`. The normalisation of convolutional adapters is folded into their convolutions, LoRA into
    the backbone's weights; the backbone's own classifier does not go along. The output's `unknown_score` is explained
    at [`~dynammo_peft.tuner.heads.unknown_score`].

    Args:
        model (`PeftModel`): A model with task adapters; left as it is.
        adapter_name (`str`): Name of the adapter to keep.

    Returns:
        `DynammoForImageClassification`: In evaluation mode, on the model's device, in the backbone's precision but for
            the heads, which are in float32.

    Raises:
        ValueError: If the adapter does not exist, is no task adapter, has no classes or is merged into the backbone,
            or transformers does not know the backbone.

    Example:

        ```py
        >>> to_standalone(method.model).save_pretrained("cells-standalone")
        ```
    """
    adapter_config = _check_adapter(model, adapter_name)
    base = model.get_base_model()
    layers = {
        _plain(name): layer
        for name, layer in base.named_modules()
        if isinstance(layer, DynammoLayer) and adapter_name in layer.dynammo_down
    }
    linear = model.base_model.head.heads[adapter_name]
    config = DynammoImageClassifierConfig(
        backbone_config=_backbone_config(base),
        sites=[_site(name, layer, adapter_name) for name, layer in layers.items()],
        feature_modules=[_feature_module(model, name) for name in adapter_config.feature_modules],
        head_module=adapter_config.head_module,
        head_sizes=adapter_config.head_sizes,
        num_features=linear.in_features,
        scoring=adapter_config.scoring,
        flips=adapter_config.flips,
        image_size=adapter_config.image_size,
        id2label=dict(enumerate(adapter_config.class_names)),
        label2id={name: number for number, name in enumerate(adapter_config.class_names)},
        # transformers knows no classification with a single class.
        problem_type="single_label_classification" if len(adapter_config.class_names) > 1 else None,
    )
    standalone = DynammoForImageClassification._from_config(config, dtype=base.dtype).to(base.device).eval()
    standalone.task_heads.float().load_state_dict(linear.state_dict())
    for adapter, layer in zip(standalone.adapters, layers.values()):
        _copy_adapter(adapter, layer, adapter_name)
    standalone.backbone.load_state_dict(_backbone_state(model, adapter_name, adapter_config.head_module))
    return standalone


def fold_batch_norm(weight: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """
    Folds the normalisation behind a convolution without bias into it, with the running statistics.

    Args:
        weight (`Tensor`): The convolution's kernel, `(C_out, C_in, k, k)`.
        norm (`nn.BatchNorm2d`): The normalisation of its output.

    Returns:
        `tuple[Tensor, Tensor]`: Kernel `(C_out, C_in, k, k)` and bias `(C_out,)`, in float64.
    """
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return weight.double() * scale[:, None, None, None], norm.bias.double() - norm.running_mean.double() * scale


def _check_adapter(model: PeftModel, adapter_name: str) -> HeadConfig:
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        names = ", ".join(map(repr, configs)) or "none, as it is no PeftModel"
        raise ValueError(f"The model has no adapter {adapter_name!r}; choose an adapter_name of its own ({names}).")
    config = configs[adapter_name]
    if not isinstance(config, HeadConfig):
        raise ValueError(
            f"Adapter {adapter_name!r} has a {type(config).__name__}, which knows no classes; only adapters of a "
            "DynammoConfig or a DynammoLoraConfig can stand alone."
        )
    if not config.classes:
        raise ValueError(f"Adapter {adapter_name!r} has no head; give its {type(config).__name__} `classes`.")
    check_unmerged(model)
    return config


def _backbone_config(base: PreTrainedModel) -> PreTrainedConfig:
    """The base model's configuration, without labels: its classifier does not go along."""
    config = copy.deepcopy(base.config)
    config.id2label = config.label2id = config.problem_type = None
    config.num_labels = 2
    # A model type may have several classes.
    config.architectures = [type(base).__name__]
    # A folder of this computer tells others nothing they should know, and one that has moved looks like a repository.
    config.name_or_path = ""
    try:
        cls = AutoModelForImageClassification._model_mapping[type(config)]
    except KeyError:
        cls = ()
    if type(base) not in (cls if isinstance(cls, tuple) else (cls,)):
        raise ValueError(
            f"transformers has no image classifier {type(base).__name__} of its own; only backbones that "
            "AutoModelForImageClassification knows can stand alone."
        )
    return config


@torch.no_grad()
def _backbone_state(model: PeftModel, adapter_name: str, head_module: str) -> dict[str, Tensor]:
    """Tensors of the backbone without its classifier, with what the adapter adds to them or has in their place."""
    state = get_base_model_state_dict(model)
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            for key, tensor in module.modules_to_save[adapter_name].state_dict().items():
                state[f"{_plain(name)}.{key}"] = tensor
        elif isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            if adapter_name in module.lora_variant:
                raise ValueError(
                    f"Adapter {adapter_name!r} is no plain LoRA ({type(module.lora_variant[adapter_name]).__name__}), "
                    "which does not only add to weights; with feature_modules=[] it folds into a form='stock'."
                )
            added = {"weight": module.get_delta_weight(adapter_name)}
            if module.lora_bias[adapter_name]:
                added["bias"] = module.lora_B[adapter_name].bias * module.scaling[adapter_name]
            for key, tensor in added.items():
                # Rounded once, after the addition.
                state[f"{_plain(name)}.{key}"] = state[f"{_plain(name)}.{key}"].double() + tensor.double()
    return {key: tensor for key, tensor in state.items() if not key.startswith(f"{head_module}.")}


def _site(name: str, layer: DynammoLayer, adapter_name: str) -> dict[str, Any]:
    down = layer.dynammo_down[adapter_name]
    return {
        "name": name,
        "layout": layer.site.layout,
        "channels": layer.site.channels,
        "bottleneck_channels": down.out_channels,
        "kernel_size": down.kernel_size[0],
        "padding": down.padding[0],
        "prefix": layer.site.prefix,
        "stride": list(layer.site.stride),
    }


def _feature_module(model: PeftModel, name: str) -> dict[str, Any]:
    site = model.base_model.head.taps[name].site
    path = _plain(find_base_module(model.get_base_model(), name))
    return {"name": path, "layout": site.layout, "prefix": site.prefix}


@torch.no_grad()
def _copy_adapter(adapter: Adapter, layer: DynammoLayer, adapter_name: str) -> None:
    down = fold_batch_norm(layer.dynammo_down[adapter_name].weight, layer.dynammo_down_norm[adapter_name])
    up_kernel = equal_convolution(layer.dynammo_up[adapter_name].weight)
    up = fold_batch_norm(up_kernel, layer.dynammo_up_norm[adapter_name])
    for convolution, (weight, bias) in ((adapter.down, down), (adapter.up, up)):
        convolution.weight.copy_(weight)
        convolution.bias.copy_(bias)
    adapter.alpha.copy_(layer.dynammo_alpha[adapter_name])


def _plain(path: str) -> str:
    """A module's path as it is in the base model without tuner layers."""
    return ".".join(part for part in path.split(".") if part not in ("base_layer", "original_module"))
