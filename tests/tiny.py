"""Real models of every supported architecture, small enough for a test, and small data sets of drawn images."""

import copy

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextV2Config,
    DeiTConfig,
    Dinov2Config,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
    ViTImageProcessorPil,
)


_TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "num_labels": 3}
_STAGES = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "num_labels": 3}

# Name of an architecture -> configuration and image size in pixels.
CONFIGS = {
    "vit": (ViTConfig(image_size=32, patch_size=8, intermediate_size=64, **_TRANSFORMER), 32),
    "deit": (
        DeiTConfig(
            image_size=32,
            patch_size=8,
            intermediate_size=64,
            architectures=["DeiTForImageClassification"],
            **_TRANSFORMER,
        ),
        32,
    ),
    "dinov2": (Dinov2Config(image_size=28, patch_size=7, **_TRANSFORMER), 28),
    "dinov2_with_registers": (
        AutoConfig.for_model("dinov2_with_registers", image_size=28, patch_size=7, **_TRANSFORMER),
        28,
    ),
    "convnext": (ConvNextConfig(image_size=64, **_STAGES), 64),
    "convnextv2": (ConvNextV2Config(image_size=64, **_STAGES), 64),
    "resnet_basic": (ResNetConfig(embedding_size=16, layer_type="basic", **_STAGES), 64),
    "resnet_bottleneck": (ResNetConfig(embedding_size=16, layer_type="bottleneck", **_STAGES), 64),
    "swin": (
        SwinConfig(
            embed_dim=16,
            depths=[1, 2, 1],
            num_heads=[1, 2, 4],
            window_size=4,
            image_size=32,
            patch_size=2,
            num_labels=3,
        ),
        32,
    ),
}


def tiny_model(name, seed=0):
    """A classifier of the architecture with random weights, in evaluation mode; the same for the same seed."""
    torch.manual_seed(seed)
    return AutoModelForImageClassification.from_config(copy.deepcopy(CONFIGS[name][0])).eval()


def tiny_language_model():
    """A GPT-2 with random weights, whose embeddings and last layer are tied; in evaluation mode."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=8, vocab_size=11, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def token_cross_entropy(logits, labels):
    """Of logits `(B, L, N)` and tokens `(B, L)`."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def tiny_images(name, count=2, seed=1):
    """Random normalised images of the size the architecture expects, `(count, 3, H, W)`."""
    size = CONFIGS[name][1]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tiny_processor(size=32):
    """An image processor that resizes to `size` pixels."""
    return ViTImageProcessorPil(size={"height": size, "width": size})


def tiny_dataset(classes=4, per_class=6, size=24, seed=0, names=None):
    """Images of one colour a class with a little noise: column `image`, and `label`, a ClassLabel."""
    rng = np.random.default_rng(seed)
    colours = np.random.default_rng(99).integers(40, 215, (classes, 3))
    images, labels = [], []
    for label in range(classes):
        for _ in range(per_class):
            noise = rng.integers(-30, 30, (size, size, 3))
            images.append(Image.fromarray((colours[label] + noise).clip(0, 255).astype("uint8")))
            labels.append(label)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=names or [f"class {i}" for i in range(classes)]),
        }
    )
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
