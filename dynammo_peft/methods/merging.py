"""How `Dynammo` merges: which merge function, what is measured for it, and learned merge weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Optional

import torch
from torch import Tensor
from torch.utils.data import WeightedRandomSampler

from ..data import ClassStatistics, LabelledImages, Task
from ..merging import (
    adapter_slots,
    adapter_tensors,
    gaussian_likelihood,
    learn_merge_weights,
    merge_into,
)
from ..merging.functions import FIRST_SHARE
from ..merging.recalibration import recalibrate
from ..merging.registry import COMBINATIONS, check_runs
from ..tuner.head_config import check_choice
from .adapters import AdapterMethod
from .analytic import regularised, shrinkage_for
from .measurements import Measurements
from .merge_options import check_options, filled_in, read_options


Granularity = Literal["none", "task", "layer", "channel"]
Objective = Literal["statistics", "labels", "entropy"]


# Functions that merge by one adapter at a time, and those that merge the same all at once.
RUNNING = {"running_mean": "uniform", "running_anchored_mean": "anchored_mean"}
# Images a step, all of them on every process: what is measured must not depend on how many there are.
BATCH_SIZE = 32


@dataclass
class MergingArguments:
    """Options of the merge."""

    merge: Optional[str] = field(
        default=None,
        metadata={
            "help": f"Merge function: {', '.join(name for name in COMBINATIONS if name not in RUNNING)}, or of LoRA "
            "'cat'. If unset, 'anchored_mean': half way from the first task's adapter to the mean of all (less far "
            "with memory_size=0, where old classes could be lost); with learned weights, preset='paper' or LoRA of "
            "adapter_init='random' the mean ('linear', of LoRA 'cat')."
        },
    )
    merge_options: Optional[str] = field(
        default=None, metadata={"help": "Options of the merge function: a mapping, as JSON, as '{\"density\": 0.5}'."}
    )
    learned_weights: Granularity = field(
        default="none", metadata={"help": "What gets merge weights learned by gradient: 'task', 'layer', 'channel'."}
    )
    weights_objective: Objective = field(
        default="statistics",
        metadata={
            "help": "On what merge weights are learned: likelihood under class 'statistics', 'labels' by the heads, "
            "or 'entropy' of the predictions, without labels."
        },
    )
    weights_steps: int = field(default=20, metadata={"help": "Steps in which merge weights are learned."})
    weights_learning_rate: float = field(
        default=0.1, metadata={"help": "Learning rate of merge weights, as a share of equal ones."}
    )
    weights_simplex: Optional[bool] = field(
        default=None,
        metadata={"help": "Keep learned merge weights positive and their sum at one; if unset, for 'entropy' only."},
    )
    offload_adapters: Optional[str] = field(
        default=None,
        metadata={
            "help": "Folder in which the adapters of old tasks are kept instead of in the model, so that memory and "
            "time do not grow; for merges that take adapters in one by one: 'anchored_mean', 'linear', 'uniform' "
            "and 'exponential_moving_average'."
        },
    )
    recalibrate: bool = field(
        default=False, metadata={"help": "Measure the merged adapter's BatchNorm statistics instead of averaging."}
    )

    @property
    def learns(self) -> bool:
        """Whether merge weights are learned."""
        return self.learned_weights != "none"


class Merging:
    """
    Merges the adapters of a method as its arguments say.

    Args:
        method (`AdapterMethod`): The method, whose arguments are `MergingArguments` too.

    Raises:
        ValueError: If an option does not exist or does not go with the others.
    """

    def __init__(self, method: AdapterMethod) -> None:
        self.method = method
        self.arguments = method.arguments
        self.options = read_options(self.arguments.merge_options)
        self.combination_type = self._default() if self.arguments.merge is None else self.arguments.merge
        if self.combination_type in RUNNING:
            whole = RUNNING[self.combination_type]
            raise ValueError(
                f"merge={self.combination_type!r} counts the first adapter as many, but all adapters are merged at "
                f"once; choose merge={whole!r}, with offload_adapters if they shall be taken in one by one."
            )
        choices = dict.fromkeys([method.config.averaging, *(name for name in COMBINATIONS if name not in RUNNING)])
        check_choice("merge", self.combination_type, choices)
        if self.combination_type == "linear" and method.config.averaging != "linear":
            raise ValueError(
                "merge='linear' weights LoRA's factors by roots, as PEFT does, so that of adapters that are alike the "
                "sum of their updates is made; choose 'uniform' for the mean of their factors, or 'cat' for the mean "
                "of their updates."
            )
        # How far the merge stays with the first adapter, where nothing else was asked for.
        automatic_share = self.combination_type == "anchored_mean" and "first_share" not in self.options
        self.first_share: Optional[float] = FIRST_SHARE if automatic_share else None
        # What PEFT alone has takes the options of a weighted sum: none.
        function = COMBINATIONS.get(self.combination_type, COMBINATIONS["linear"])
        check_options(self.combination_type, function, self.options)
        automatic = filled_in(function)
        self.takes_base = "base" in automatic
        self.measurements = Measurements(method, automatic, self.combination_type)
        self._check_learning()
        if self.arguments.recalibrate and method.config.folds:
            raise ValueError("recalibrate measures BatchNorm statistics, which LoRA has none of; leave it out.")
        if self.arguments.offload_adapters is not None:
            self._check_offload()

    def _default(self) -> str:
        """The merge function if none is asked for."""
        config = self.method.config
        weighted = self.arguments.learns or config.preset == "paper"
        # Factors of LoRA that were drawn one by one have nothing in common; only their products can be averaged.
        unrelated = config.averaging == "cat" and self.arguments.adapter_init == "random"
        return config.averaging if weighted or unrelated else "anchored_mean"

    def _check_learning(self) -> None:
        """Refuses options of learned weights that have bad values or do not go with the merge."""
        rate = self.arguments.weights_learning_rate
        check_choice("learned_weights", self.arguments.learned_weights, Granularity)
        check_choice("weights_objective", self.arguments.weights_objective, Objective)
        if not isinstance(rate, (int, float)) or not math.isfinite(rate) or rate <= 0:
            raise ValueError(f"weights_learning_rate={rate!r} must be a finite number, greater than 0.")
        weighted = self.method.config.averaging
        if self.arguments.learns and self.combination_type != weighted:
            raise ValueError(f"learned_weights are those of merge={weighted!r}, got merge={self.combination_type!r}.")

    def _check_offload(self) -> None:
        """Refuses what needs all adapters in the model."""
        if self.arguments.learns:
            raise ValueError(
                f"learned_weights={self.arguments.learned_weights!r} needs all adapters at once, which "
                "offload_adapters leaves on the disk; leave one of them out."
            )
        try:
            check_runs(self.combination_type)
        except ValueError as error:
            given = "unset" if self.arguments.merge is None else repr(self.arguments.merge)
            instead = ""
            if self.combination_type == "cat":
                instead = " Or let adapters be convolutions: pass a DynammoConfig (in the recipe adapter='conv')."
            raise ValueError(f"offload_adapters does not go with merge={given}: {error}{instead}") from error

    def state(self) -> dict[str, Tensor]:
        """What was measured of each adapter, by name."""
        return self.measurements.state()

    def restore(self, adapters: list[str], tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave, for these adapters.

        Raises:
            ValueError: If the merge function needs what was not measured.
        """
        self.measurements.restore(adapters, tensors)

    def after_training(self, task: Task) -> None:
        """Measures on a task's own images what the merge function needs of its adapter."""
        self.measurements.measure(task, self._batches(task.train, balanced=False))

    def merge(self, adapters: list[str], merged: str, shown: LabelledImages) -> None:
        """Merges adapters into one; `shown` are images for the statistics of BatchNorm.

        With `offload_adapters` the newest is taken into what was merged before.
        """
        options = dict(self.options)
        if self.first_share is not None:
            options["first_share"] = self.first_share
        if self.arguments.offload_adapters is not None and len(adapters) > 1:
            count = len(adapters) - 1
            merge_into(
                self.method.model, merged, adapters[-1], count, self.combination_type, first=adapters[0], **options
            )
            self._recalibrate(merged, shown)
            return
        if self.measurements.kind is not None:
            options[self.measurements.kind] = self.measurements.of_adapters
        if self.takes_base:
            # Each adapter started as a copy of an earlier one: what training changed is the difference to the first.
            first = adapter_tensors(self.method.model, adapters[0])
            options["base"] = {key: tensor.detach().clone() for key, tensor in first.items()}
        self.method.model.add_weighted_adapter(
            adapters, adapter_name=merged, combination_type=self.combination_type, **options
        )
        self._recalibrate(merged, shown)

    def is_at(self, adapter: str, merged: str) -> bool:
        """Whether an adapter and the merged one are the same, but for rounding: all were copies of it so far."""
        own, others = (adapter_tensors(self.method.model, name) for name in (adapter, merged))
        slots = adapter_slots(self.method.model, adapter)
        # Statistics may have been measured anew, and counts of batches are added up.
        weights = [key for key, slot in slots.items() if slot.kind != "statistic"]
        return all(torch.allclose(own[key], others[key], rtol=1e-4, atol=1e-7) for key in weights)

    @torch.no_grad()
    def hold_back(self, first: str, merged: str, shown: LabelledImages) -> None:
        """Takes a merge half of its way back to the first adapter, whose share later merges keep.

        Args:
            first (`str`): Name of the first adapter.
            merged (`str`): Name of the merged one.
            shown (`LabelledImages`): As of `merge`.
        """
        of_first = adapter_tensors(self.method.model, first)
        for key, tensor in adapter_tensors(self.method.model, merged).items():
            # BatchNorm counts batches too, which are no statistics.
            if tensor.is_floating_point():
                tensor.lerp_(of_first[key], 0.5)
        self.first_share = (1 + self.first_share) / 2
        self._recalibrate(merged, shown)

    def learn_weights(
        self, adapters: list[str], merged: str, shown: LabelledImages, statistics: Optional[ClassStatistics]
    ) -> None:
        """Learns merge weights on images, all classes counting the same.

        Args:
            adapters (`list[str]`): Names of the adapters.
            merged (`str`): Name of the adapter merged with equal weights, whose heads know all classes.
            shown (`LabelledImages`): The images.
            statistics (`Optional[ClassStatistics]`): Of all classes, in the feature space of `merged`.

        Raises:
            ValueError: If the objective needs images of all classes, and some class has none.
        """
        model, arguments = self.method.model, self.arguments
        if arguments.weights_objective != "entropy":
            self._check_classes(shown)
        settings: dict[str, Any] = {"objective": arguments.weights_objective}
        output = "scores"
        if arguments.weights_objective == "statistics":
            shrinkage = shrinkage_for(statistics, arguments.shrinkage)
            covariance = regularised(statistics.pooled_covariance(), shrinkage)
            settings["objective"] = gaussian_likelihood(statistics.mean_matrix(), covariance)
            output = "features"
        with model.head_output(output):
            learn_merge_weights(
                model,
                adapters,
                self._batches(shown, balanced=True),
                merged,
                arguments.learned_weights,
                arguments.weights_simplex,
                steps=arguments.weights_steps,
                learning_rate=arguments.weights_learning_rate,
                seed=arguments.seed,
                combination_type=self.combination_type,
                progress=False,
                **settings,
            )
        self._recalibrate(merged, shown)

    def _check_classes(self, shown: LabelledImages) -> None:
        """Refuses weights that would suit some classes at the cost of those that no image stands for."""
        there = set(shown.labels.tolist())
        missing = [name for label, name in enumerate(self.method.class_names) if label not in there]
        if missing:
            raise ValueError(
                f"The memory has no exemplar of {', '.join(map(repr, missing))}, so that "
                f"learned_weights={self.arguments.learned_weights!r} would be learned for the other classes alone; "
                "set memory_size to at least the number of classes, or weights_objective='entropy'."
            )

    def _recalibrate(self, merged: str, shown: LabelledImages) -> None:
        # The statistics of a single adapter are measured already, in training.
        if self.arguments.recalibrate and len(self.method.adapters) > 1:
            recalibrate(self.method.model, merged, self._batches(shown, balanced=False))

    def _batches(self, images: LabelledImages, balanced: bool) -> _Batches:
        return _Batches(self.method, images, balanced)


class _Batches:
    """Batches of normalised images and labels, the same on every process; again and again.

    They differ in size by one at most: of a single image BatchNorm has no statistics.
    """

    def __init__(self, method: AdapterMethod, images: LabelledImages, balanced: bool) -> None:
        self.method, self.images = method, images
        self.order: Iterable[int] = range(len(images))
        if balanced:
            counts = torch.bincount(images.labels)
            generator = torch.Generator().manual_seed(method.arguments.seed)
            self.order = WeightedRandomSampler(1 / counts[images.labels], len(images), generator=generator)

    def __len__(self) -> int:
        return math.ceil(len(self.images) / BATCH_SIZE)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.method.accelerator.device
        self.method.model.to(device)
        for places in torch.tensor(list(self.order)).tensor_split(len(self)):
            batch = self.images.select(places)
            yield self.method.transform(batch.images.to(device)), batch.labels.to(device)
