"""The contract between a class-incremental method and the learner that runs it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, Literal, Optional

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR
from torch.utils.data import Dataset
from transformers import PreTrainedModel, get_scheduler

from ..data import BatchTransform, ClassIncrementalScenario, LabelledImages, Task, data_loader
from ..tuner.head_config import check_choice


Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["cosine", "constant", "step"]

# Unless told otherwise. Few images are soon passed over, and adapters learn little in few updates.
EPOCHS, MIN_UPDATES = 10, 300


@dataclass(frozen=True)
class Optimization:
    """How the parameters of one stage are optimised.

    Args:
        optimizer (`Literal["sgd", "adam", "adamw"]`): SGD has a momentum of 0.9.
        learning_rate (`float`): At the start.
        weight_decay (`float`): As the optimizer understands it.
        epochs (`Optional[int]`): Passes over the data; `None`: 10, and as many more as 300 updates take.
        batch_size (`int`): Images (or features) a step and process.
        schedule (`Literal["cosine", "constant", "step"]`): `"step"` multiplies the learning rate by 0.1 at milestones.
        milestones (`Sequence[float]`): For `"step"`, as shares of the stage.

    Raises:
        ValueError: If one of them is not as it says.
    """

    optimizer: Optimizer
    learning_rate: float
    weight_decay: float
    epochs: Optional[int]
    batch_size: int
    schedule: Schedule
    milestones: Sequence[float] = ()

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, Optimizer)
        check_choice("schedule", self.schedule, Schedule)
        for name, value in {"epochs": self.epochs_of(1), "batch_size": self.batch_size}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        for name, value in {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}.items():
            if not isinstance(value, Real) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r} must be a finite number, at least 0.")
        given = self.milestones
        if not isinstance(given, (list, tuple)) or not all(isinstance(at, Real) and 0 < at < 1 for at in given):
            raise ValueError(
                f"milestones={given!r} must be a list of numbers between 0 and 1: shares of the stage, not epochs."
            )

    def epochs_of(self, updates: int) -> int:
        """Passes over data that take `updates` updates each."""
        return self.epochs if self.epochs is not None else max(EPOCHS, math.ceil(MIN_UPDATES / updates))

    def make(self, network: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
        """An optimizer for the trainable parameters of `network` and a schedule over `steps` steps."""
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        settings = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(parameters, momentum=0.9, **settings)
        else:
            optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimizer](parameters, **settings)
        if self.schedule == "step":
            milestones = [max(1, round(share * steps)) for share in self.milestones]
            return optimizer, MultiStepLR(optimizer, milestones, gamma=0.1)
        return optimizer, get_scheduler(self.schedule, optimizer, num_warmup_steps=0, num_training_steps=steps)


@dataclass(frozen=True)
class Stage:
    """One training loop of a method.

    Args:
        name (`str`): For the progress bar.
        network (`nn.Module`): What is trained: its parameters that require gradients.
        data (`Dataset`): Pairs of an input and a label; inputs are `uint8` images or features.
        observe (`Callable`): Called with the network as prepared by Accelerate, a batch of inputs (images augmented
            and normalised) and labels `(B,)`; returns the loss and which labels were met, `(B,)`.
        optimization (`Optimization`): How.
    """

    name: str
    network: nn.Module
    data: Dataset
    observe: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    optimization: Optimization


@dataclass
class MethodArguments:
    """What every method has an option for; methods add theirs."""

    seed: int = field(default=0, metadata={"help": "Seed of the weights, the batches and the memory."})


class Method(ABC):
    """
    A class-incremental learning method: what it trains when a task comes, and how it then scores images.

    A method is used once, for one sequence of tasks.

    Args:
        model (`PreTrainedModel`): The pretrained image classifier.
        arguments (`MethodArguments`): The method's options.

    Raises:
        ValueError: If the options are those of another method.

    Attributes:
        model: The model as adapted so far.
        accelerator (`Accelerator`): Set by the learner.
        transform (`BatchTransform`): Set by the learner.
        unfinished (`bool`): Whether a task was begun and not ended; set by the learner.
    """

    name: ClassVar[str]
    arguments_cls: ClassVar[type[MethodArguments]] = MethodArguments

    def __init__(self, model: PreTrainedModel, arguments: Optional[MethodArguments] = None) -> None:
        self.model: PreTrainedModel | PeftModel = model
        self.arguments = arguments if arguments is not None else self.arguments_cls()
        if type(self.arguments) is not self.arguments_cls:
            raise ValueError(
                f"{type(self).__name__} takes {self.arguments_cls.__name__}, got {type(self.arguments).__name__}."
            )
        self.accelerator: Accelerator
        self.transform: BatchTransform
        self.unfinished = False

    def begin(self, scenario: ClassIncrementalScenario, accelerator: Accelerator) -> None:
        """Called once before the first task; the place to refuse a scenario that cannot be learned.

        Args:
            scenario (`ClassIncrementalScenario`): What will be learned.
            accelerator (`Accelerator`): Where and how.
        """
        self.accelerator = accelerator
        self.transform = scenario.transform

    @abstractmethod
    def learn(self, task: Task) -> Iterator[Stage]:
        """Learns a task: a generator of training loops, each run before the generator goes on."""

    @property
    @abstractmethod
    def inference_adapters(self) -> list[str]:
        """Names of the adapters that `logits` needs: what to save for inference."""

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a method knows between two tasks, beside the adapters of its model: plain values and tensors.

        No image is in it. A method that adds adapters overrides this, so as to leave the frozen backbone out.
        """
        return {}, dict(self.model.state_dict())

    def restore(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        scenario: Optional[ClassIncrementalScenario] = None,
    ) -> None:
        """Goes on where the method stood that gave this `state`; the model has its adapters.

        Args:
            values (`Mapping[str, Any]`): Plain values.
            tensors (`Mapping[str, Tensor]`): Tensors by name.
            scenario (`Optional[ClassIncrementalScenario]`): What the method has begun with, if it has: images that it
                kept are found there. Otherwise they come with the scenario that it will begin with.

        Raises:
            ValueError: If the model lacks an adapter, or the state does not fit the method's options.
        """
        self.model.load_state_dict(tensors)

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """
        Args:
            images (`Tensor`): Normalised images, `(B, 3, H, W)`.

        Returns:
            `Tensor`: One logit for each class learned so far, in their order, `(B, N)`.
        """

    @torch.no_grad()
    def features(self, images: LabelledImages, adapter: str, views: int = 1, batch_size: int = 64) -> Tensor:
        """What enters the heads under one adapter, on every process in the same order.

        Args:
            images (`LabelledImages`): The images.
            adapter (`str`): Name of the adapter; it is active afterwards, and frozen.
            views (`int`): The first view of each image is itself, further ones are augmented, the same at each call
                and for any number of processes.
            batch_size (`int`): Images a process and step.

        Returns:
            `Tensor`: `(views, N, C)`, `float32`, on the CPU.
        """
        self.model.set_adapter(adapter, inference_mode=True)
        self.model.eval()
        # An image's place in the order of all, to find what is drawn for it.
        numbered = LabelledImages(images.store, torch.arange(len(images)), images.rows, images.places)
        loader = self.accelerator.prepare_data_loader(data_loader(numbered, batch_size))
        self.model.to(self.accelerator.device)
        generator = torch.Generator().manual_seed(self.arguments.seed)
        all_views = []
        for view in range(views):
            drawn = self.transform.draw(len(images), generator) if view > 0 else None
            parts = []
            with self.model.head_output("features"), self.accelerator.autocast():
                for batch, numbers in loader:
                    pixel_values = self.transform(batch, drawn[numbers.cpu()] if view > 0 else None)
                    features = self.model(pixel_values=pixel_values).logits
                    parts.append(self.accelerator.gather_for_metrics(features.float()).cpu())
            all_views.append(torch.cat(parts))
        # Accelerate would hold on to the loader, and so to the images.
        self.accelerator._dataloaders.remove(loader)
        return torch.stack(all_views)
