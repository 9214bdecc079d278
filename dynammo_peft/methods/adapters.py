"""What the methods share that add adapters to a frozen backbone: their options, and an adapter and a head a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Optional

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import ClassIncrementalScenario, LabelledImages
from ..data.memory import Selection
from ..tuner import TASK_ADAPTERS, HeadConfig, default_adapter
from ..tuner.head_config import check_choice
from .base import EPOCHS, MIN_UPDATES, Method, MethodArguments, Optimization, Optimizer, Schedule
from .offload import AdapterFolder


AdapterInit = Literal["previous", "first", "random"]
HeadInit = Literal["zeros", "random"]

# Images of a task, at most, that the scale of its features is measured on.
SCALE_IMAGES = 1024


@dataclass
class AdapterMethodArguments(MethodArguments):
    """Options of the methods that train an adapter and a head for each task."""

    memory_size: int = field(default=200, metadata={"help": "Exemplars kept of all classes together; 0: none."})
    selection: Selection = field(default="herding", metadata={"help": "How exemplars are chosen."})
    adapter_init: AdapterInit = field(
        default="previous", metadata={"help": "Whose copy a new task's adapter starts as, if not 'random'."}
    )
    head_init: Optional[HeadInit] = field(
        default=None,
        metadata={
            "help": "Stage 1: how a task's head starts. 'zeros': its first step is towards the classes' means, so "
            "that adapters are not bent towards random directions; the default, but for preset='paper', and for the "
            "first head if train_backbone is set. 'random': as PyTorch's linear layers."
        },
    )
    train_backbone: bool = field(
        default=False,
        metadata={
            "help": "Train the backbone in the first task too, then freeze it. It is then no longer the one that was "
            "loaded: publish the whole model (form='standalone'), since adapters alone are of no use on another."
        },
    )
    standardise_features: Optional[bool] = field(
        default=None,
        metadata={
            "help": "Stage 1: the head reads features of zero mean and unit variance, and takes the change into its "
            "weights afterwards, so that it learns as fast on any backbone. The default, but for preset='paper'."
        },
    )
    adapter_optimizer: Optimizer = field(default="adamw", metadata={"help": "Stage 1: optimizer."})
    adapter_learning_rate: float = field(default=2e-3, metadata={"help": "Stage 1: learning rate."})
    adapter_weight_decay: float = field(default=5e-4, metadata={"help": "Stage 1: weight decay."})
    adapter_epochs: Optional[int] = field(
        default=None,
        metadata={
            "help": f"Stage 1: passes over the task's images. The default: {EPOCHS}, and as many more as "
            f"{MIN_UPDATES} updates take."
        },
    )
    adapter_batch_size: int = field(default=32, metadata={"help": "Stage 1: images a step and process."})
    adapter_schedule: Schedule = field(default="cosine", metadata={"help": "Stage 1: learning rate schedule."})
    adapter_milestones: list[float] = field(
        default_factory=lambda: [0.35, 0.65, 0.85],
        metadata={"help": "Stage 1: shares of the stage after which the schedule 'step' multiplies by 0.1."},
    )
    head_optimizer: Optimizer = field(
        default="adam", metadata={"help": "Stage 2, of heads trained by gradient: optimizer."}
    )
    head_learning_rate: float = field(
        default=1e-3, metadata={"help": "Stage 2, of heads trained by gradient: learning rate."}
    )
    head_weight_decay: float = field(
        default=0.0, metadata={"help": "Stage 2, of heads trained by gradient: weight decay."}
    )
    head_epochs: int = field(
        default=50,
        metadata={"help": "Stage 2, of heads trained by gradient: passes over the balanced set's features."},
    )
    head_batch_size: int = field(
        default=32, metadata={"help": "Stage 2, of heads trained by gradient: features a step and process."}
    )
    head_schedule: Schedule = field(
        default="cosine", metadata={"help": "Stage 2, of heads trained by gradient: learning rate schedule."}
    )
    head_milestones: list[float] = field(
        default_factory=lambda: [0.55, 0.8],
        metadata={
            "help": "Stage 2, of heads trained by gradient: shares of the stage after which the schedule 'step' "
            "multiplies by 0.1."
        },
    )

    def optimization(self, stage: Literal["adapter", "head"]) -> Optimization:
        """The options whose names begin with `stage`."""
        names = ("optimizer", "learning_rate", "weight_decay", "epochs", "batch_size", "schedule", "milestones")
        return Optimization(**{name: getattr(self, f"{stage}_{name}") for name in names})


class AdapterMethod(Method):
    """
    A method that adds adapters to a frozen backbone.

    Args:
        model (`PreTrainedModel`): The pretrained image classifier.
        arguments (`AdapterMethodArguments`): Options of the training.
        config (`Optional[HeadConfig]`): The adapters' configuration; its `classes` are filled in. If `None`, one that
            suits the model ([`~dynammo_peft.tuner.default_adapter`]).

    Raises:
        ValueError: If an option does not exist, or the model has adapters already.
    """

    arguments_cls = AdapterMethodArguments
    arguments: AdapterMethodArguments
    # Whether heads read features of several layers unless the configuration says otherwise.
    reads_layers: ClassVar[bool] = False

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: Optional[AdapterMethodArguments] = None,
        config: Optional[HeadConfig] = None,
    ) -> None:
        super().__init__(model, arguments)
        if not isinstance(model, PeftModel):
            _check_plain(model)
        self.config = config if config is not None else TASK_ADAPTERS[default_adapter(model)]()
        if self.config.feature_modules is None and not self.reads_layers:
            self.config = replace(self.config, feature_modules=[])
        asked = self.arguments.standardise_features
        self.standardises: bool = asked if asked is not None else self.config.preset != "paper"
        self.adapters: list[str] = []
        # Where adapters are that are not in the model.
        self.folder: Optional[AdapterFolder] = None
        check_choice("adapter_init", self.arguments.adapter_init, AdapterInit)
        if self.arguments.head_init is not None:
            check_choice("head_init", self.arguments.head_init, HeadInit)
        self.optimization = {stage: self.arguments.optimization(stage) for stage in ("adapter", "head")}

    def begin(self, scenario: ClassIncrementalScenario, accelerator: Accelerator) -> None:
        super().begin(scenario, accelerator)
        if not self.adapters:
            _check_plain(self.model)
        if self.unfinished:
            raise ValueError(
                f"Task {len(self.adapters) - 1} was begun and is not finished; resume from a checkpoint with a new "
                "method, or begin again with what was saved before it."
            )
        if scenario.groups[: scenario.first_task] != self.groups:
            raise ValueError(
                f"The scenario goes on behind the tasks {scenario.groups[: scenario.first_task]}, but "
                f"{self.groups} were learned; make it with learned=method.groups."
            )
        self.config = replace(self.config, image_size=list(scenario.image_size))

    def add_adapter(self, name: str, class_names: list[str]) -> None:
        """A new adapter with a fresh head, its other weights copied from an earlier one; made active.

        The first adapter's backbone is trained with it if `train_backbone` is set (first-session adaptation).

        Raises:
            ValueError: If there is an adapter of this name.
        """
        if name in self.adapters:
            raise ValueError(f"There is an adapter {name!r} already; a task is learned once.")
        config = replace(self.config, classes=[class_names])
        if isinstance(self.model, PeftModel):
            self.model.add_adapter(name, config)
        else:
            self.model = get_peft_model(self.model, config, name)
        if self._head_init == "zeros":
            nn.init.zeros_(self.model.head.heads[name].weight)
            nn.init.zeros_(self.model.head.heads[name].bias)
        if self.adapters and self.arguments.adapter_init != "random":
            self.copy_adapter(self.adapters[-1 if self.arguments.adapter_init == "previous" else 0], name)
        self.adapters.append(name)
        self.model.set_adapter(name)

    @property
    def _head_init(self) -> HeadInit:
        """How the head of the next adapter starts, before it joins the others."""
        if self.arguments.head_init is not None:
            return self.arguments.head_init
        # A backbone in training learns features for later classes too, and more of them behind a random head.
        trains_backbone = self.arguments.train_backbone and not self.adapters
        return "random" if trains_backbone or self.config.preset == "paper" else "zeros"

    @contextmanager
    def standardised_features(self, images: LabelledImages) -> Iterator[None]:
        """The newest adapter's head is trained on standardised features inside, if it is to be."""
        if not self.standardises:
            yield
            return
        name = self.adapters[-1]
        # A scale needs few images, and they come sorted by class or not.
        some = torch.linspace(0, len(images) - 1, min(len(images), SCALE_IMAGES)).long()
        features = self.features(images.select(some), name)[0][:, : self.model.head.features]
        self.model.set_adapter(name)
        with self.model.standardised_features(features.to(self.accelerator.device)):
            yield

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"adapters": list(self.adapters)}, {}

    def restore(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        scenario: Optional[ClassIncrementalScenario] = None,
    ) -> None:
        self.adapters = list(values["adapters"])
        if self.adapters:
            self._find_adapters()

    def copy_adapter(self, source: str, target: str) -> None:
        """Copies the convolutions of an adapter to one in the model; heads are not copied."""
        if source in self.model.peft_config:
            self.model.copy_adapter(source, target)
        else:
            self.folder.copy_to(self.model, source, target)

    def _find_adapters(self) -> None:
        """Raises a `ValueError` unless all adapters are in the model or, where that will do, in the folder."""
        for name in dict.fromkeys([*self.adapters, *self.inference_adapters]) if self.adapters else ():
            if name in getattr(self.model, "peft_config", {}):
                continue
            if self.folder is None:
                raise ValueError(f"The model has no adapter {name!r}, with which learning would go on.")
            if name in self.inference_adapters or not self.folder.find(name):
                raise ValueError(
                    f"Neither the model nor offload_adapters={str(self.folder.path)!r} has an adapter {name!r}, with "
                    "which learning would go on."
                )

    @property
    def inference_adapters(self) -> list[str]:
        return list(self.adapters)

    def config_of(self, name: str) -> HeadConfig:
        """The configuration of an adapter, wherever that is."""
        known = self.model.peft_config if isinstance(self.model, PeftModel) else {}
        return known[name] if name in known or self.folder is None else self.folder.configs[name]

    @property
    def groups(self) -> list[list[str]]:
        """Class names of each task learned so far."""
        return [self.config_of(name).class_names for name in self.adapters]

    @property
    def class_names(self) -> list[str]:
        """Names of all classes learned so far, in the order of their numbers: that in which they first came."""
        return list(dict.fromkeys(name for group in self.groups for name in group))

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """Number of classes of each head for all classes: of those that were new in a task, if there were any."""
        known: set[str] = set()
        sizes = []
        for group in self.groups:
            sizes.append(len(set(group) - known))
            known.update(group)
        return tuple(size for size in sizes if size)


def _check_plain(model: nn.Module) -> None:
    """Raises a `ValueError` if a model has adapters, which learning from its first task would forget."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "The model has adapters already. To go on learning where they were learned, load it by "
            "dynammo_peft.hub.load_method; to begin anew, give the base model."
        )
