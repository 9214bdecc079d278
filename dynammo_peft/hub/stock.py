"""A learned model as a plain checkpoint of transformers, without any code of this package."""

from __future__ import annotations

import copy

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..tuner.image_size import as_pair, needs_interpolation


# Largest difference of a logit, over the largest logit.
TOLERANCE = 1e-4


def to_stock(model: PeftModel, adapter_name: str = "merged") -> PreTrainedModel:
    """
    Folds an adapter and its heads into the base model.

    The result is a model of the base model's own class, as `ViTForImageClassification`, with the learned classes: its
    `save_pretrained` and `push_to_hub` write what anyone can load. It costs exactly what the base model costs.

    Position embeddings are fitted once to the size of the images that were learned from, where the base model was
    trained on another.

    Args:
        model (`PeftModel`): A model with LoRA task adapters, learned with `feature_modules=[]`; left as it is.
        adapter_name (`str`): The adapter to fold, by default the merged one.

    Returns:
        `PreTrainedModel`: The plain model, in evaluation mode.

    Raises:
        ValueError: If the adapter does not exist or has no classes, or if adapter or heads are not linear.
    """
    config = model.peft_config.get(adapter_name)
    if config is None:
        raise ValueError(f"Adapter {adapter_name!r} does not exist; there are {', '.join(model.peft_config)}.")
    if not getattr(config, "classes", None):
        raise ValueError(f"Adapter {adapter_name!r} has no classes, so there is no classifier to export.")
    if not config.folds:
        raise ValueError(
            f"Adapter {adapter_name!r} is convolutional, which is not linear and cannot be folded into the weights. "
            "Export it by `to_standalone`, or learn with LoRA (DynammoLoraConfig(feature_modules=[]))."
        )
    adapted = copy.deepcopy(model)
    adapted.base_model.enable_adapter_layers()
    adapted.set_adapter(adapter_name, inference_mode=True)
    adapted.eval()
    size = as_pair(config.image_size)
    images = torch.randn(2, adapted.config.num_channels, *size, generator=torch.Generator().manual_seed(0))
    dtype = next(adapted.parameters()).dtype
    images = images.to(adapted.device, dtype)
    with torch.no_grad():
        expected = adapted(pixel_values=images).logits.float()
        # In double precision the sums of weights are rounded once.
        plain = adapted.double().merge_and_unload(safe_merge=True).to(dtype)
        if needs_interpolation(plain, size):
            plain = _resized(plain, size)
        difference = (plain(pixel_values=images).logits.float() - expected).abs().max() / expected.abs().max()
    if dtype == torch.float32 and not difference <= TOLERANCE:
        raise RuntimeError(
            f"The exported {type(plain).__name__} gives other logits than the model (by {difference:.1e} of the "
            "largest). Please report the model type."
        )
    return plain.requires_grad_(True).eval()


def _resized(model: PreTrainedModel, size: tuple[int, int]) -> PreTrainedModel:
    """The same model for images of another size, position embeddings interpolated as the model itself does it."""
    state = model.state_dict()
    for path, module in model.named_modules():
        embeddings = getattr(module, "position_embeddings", None)
        if not isinstance(embeddings, nn.Parameter) or not hasattr(module, "interpolate_pos_encoding"):
            continue
        patch = as_pair(model.config.patch_size)
        prefix = embeddings.shape[1] - module.patch_embeddings.num_patches
        tokens = prefix + (size[0] // patch[0]) * (size[1] // patch[1])
        state[f"{path}.position_embeddings"] = module.interpolate_pos_encoding(
            embeddings.new_zeros(1, tokens, embeddings.shape[2]), *size
        )
    config = copy.deepcopy(model.config)
    config.image_size = size[0] if size[0] == size[1] else list(size)
    resized = type(model)(config).to(model.device, model.dtype)
    resized.load_state_dict(state)
    return resized.eval()
