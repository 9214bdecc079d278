"""A learner that takes from others what they have computed already: adapters of stage 1, and features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

import dynammo_peft as dp
from dynammo_peft.data import LabelledImages
from dynammo_peft.merging import adapter_tensors
from dynammo_peft.methods import Stage


# Images a forward for features that are kept: a GPU is hardly busy with fewer, a processor's caches hold no more.
ON_GPU, ON_CPU = 256, 64


class SharedLearner(dp.Learner):
    """Trains stage 1 once for all methods with the same images in it, and keeps the features it has computed.

    Args:
        adapters (`Path`): Folder of trained adapters and heads, by task and what is in the loss; shared between
            learners, and with later runs that add rows.
        features (`dict`): Features by adapter and image; shared between learners.
    """

    def __init__(self, method: dp.Method, accelerator: Accelerator, adapters: Path, features: dict) -> None:
        super().__init__(method, accelerator, progress=False)
        self.adapters = adapters
        self.known = features
        compute = method.features
        method.features = lambda images, adapter, views=1: self._features(compute, images, adapter, views)

    def _run(self, stage: Stage, *arguments: Any) -> None:
        if stage.name != "adapter":
            super()._run(stage, *arguments)
            return
        method = self.method
        others = getattr(method, "exemplars_as_others", False) and method.arguments.memory_size > 0
        distillation = getattr(method.arguments, "feature_distillation", 0.0)
        name = method.adapters[-1]
        key = f"{type(method.config).__name__}-others_{others}-distillation_{distillation}-{name}"
        trained = self.adapters / f"{key}.safetensors"
        own = {**adapter_tensors(method.model, name)}
        head = method.model.head
        # What stage 1 trains of the head reads the last layer, whether others are read later or not.
        own |= {
            "head.weight": head.heads[name].weight[:, : head.features],
            "head.bias": head.heads[name].bias,
        }
        if not trained.exists():
            super()._run(stage, *arguments)
            trained.parent.mkdir(parents=True, exist_ok=True)
            unfinished = trained.with_suffix(".unfinished")
            save_file({name: tensor.detach().contiguous() for name, tensor in own.items()}, unfinished)
            unfinished.rename(trained)
        stored = load_file(trained)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(stored[name])

    def _features(self, compute: Callable[..., Tensor], images: LabelledImages, adapter: str, views: int) -> Tensor:
        model = self.method.model
        tensors = [*adapter_tensors(model, adapter).values()]
        state = _digest(repr((views, model.peft_config[adapter].feature_modules)), *tensors)
        model.set_adapter(adapter, inference_mode=True)
        model.eval()
        if views > 1:  # augmented in the order of all images
            key = (state, _digest("", images.rows, *(image for image, _ in images)))
            if key not in self.known:
                self.known[key] = compute(images, adapter, views)
            return self.known[key]
        keys = [(state, _digest("", image)) for image, _ in images]
        missing = torch.tensor([index for index, key in enumerate(keys) if key not in self.known])
        if len(missing):
            batch = ON_CPU if self.accelerator.device.type == "cpu" else ON_GPU
            for index, row in zip(missing.tolist(), compute(images.select(missing), adapter, 1, batch)[0]):
                self.known[keys[index]] = row
        return torch.stack([self.known[key] for key in keys])[None]

    @torch.no_grad()
    def _predict(self, images: LabelledImages, scenario: dp.ClassIncrementalScenario) -> tuple[list[int], list[int]]:
        method = self.method
        adapters = method.inference_adapters
        parts = [
            method.model.head.heads[name](method.features(images, name)[0].to(self.accelerator.device))
            for name in adapters
        ]
        sizes = sum((method.model.head.sizes[name] for name in adapters), ())
        scores = dp.tuner.heads.score_heads(torch.cat(parts, dim=1), sizes, method.config.scoring)
        return scores.argmax(dim=1).tolist(), images.labels.tolist()


def _digest(text: str, *tensors: Tensor) -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()
