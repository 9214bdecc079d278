"""DynaMMo: dynamic model merging (Qazi et al. 2024, https://arxiv.org/abs/2404.14099), and what goes beyond it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Optional, Union

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..data import (
    ClassIncrementalScenario,
    ClassStatistics,
    LabelledImages,
    Task,
    choose_ridge,
    fit_affine_map,
    fit_map_of_others,
    left_out_errors,
)
from ..tuner import HeadConfig
from ..tuner.heads import set_class_logits
from ..tuner.modes import adapter_instead
from .analytic import ANALYTIC_HEADS
from .anchor import Anchor
from .base import Stage
from .dynammo_arguments import DynammoArguments, Heads
from .merging import Merging
from .offload import AdapterFolder
from .state import under
from .two_stage import TwoStageMethod, heads_step


logger = get_logger(__name__)

MERGED = "merged"
# Without exemplars: how far classes may stray from maps that were fitted to others, and where that ends.
FARTHEST = 0.3
LARGEST_SHARE = 0.99


class _Moves(NamedTuple):
    """Features of the images at hand before and after a merge, and how a map of them is to be fitted.

    Args:
        before (`Tensor`): `(V * N, C)`.
        after (`Tensor`): `(V * N, C)`.
        labels (`Tensor`): Their classes, `(V * N,)`.
        ridge (`float`): How strongly the map is pulled to the identity.
        variances (`Tensor`): Of each feature within classes, `(C,)`.
    """

    before: Tensor
    after: Tensor
    labels: Tensor
    ridge: float
    variances: Tensor


class Dynammo(TwoStageMethod):
    """
    After each task all adapters are merged into one, and heads for all classes are fitted to its features.

    Inference is one forward pass for any number of tasks. By default the heads are fitted in closed form to class
    statistics: mean and covariance of features of several layers, moved into the new feature space at each merge. With
    `DynammoConfig(preset="paper")` they are trained on the exemplars, and the merge is the plain mean; by default it
    is half way between that and the first task's adapter ([`~dynammo_peft.merging.anchored_mean`]).

    Classes may come back in later tasks: their adapter joins the merge, their statistics and exemplars take the new
    images in, and they keep their place among the logits.

    Args:
        model (`PreTrainedModel`): The pretrained image classifier.
        arguments (`DynammoArguments`): Options of the training, the merge and the heads.
        config (`Optional[HeadConfig]`): The adapters' configuration; its `classes` are filled in.

    Raises:
        ValueError: If options do not go together.
    """

    name = "dynammo"
    arguments_cls = DynammoArguments
    arguments: DynammoArguments
    reads_layers = True

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: Optional[DynammoArguments] = None,
        config: Optional[HeadConfig] = None,
    ) -> None:
        if isinstance(arguments, DynammoArguments) and arguments.first_session:
            # Nothing would read exemplars.
            arguments = replace(arguments, memory_size=0)
        super().__init__(model, arguments, config)
        self.merging = Merging(self)
        options = self.arguments.filled_in(self.config)
        self.heads: Heads = options.heads
        self.views: int = options.feature_views
        self.exemplars_as_others = options.exemplars_as_others
        self.needs_exemplars = self.heads == "exemplars"
        if options.offload_adapters is not None:
            self.folder = AdapterFolder(options.offload_adapters)
        self.statistics: Optional[ClassStatistics] = None
        if self.heads != "exemplars":
            self.statistics = ClassStatistics(
                "class" if self.heads == "gaussians" else "shared", options.covariance_rank
            )
        # Exemplars would show better where old classes are.
        corrects = options.memory_size == 0 and not options.first_session
        self.anchor: Optional[Anchor] = Anchor(self) if corrects else None

    def begin(self, scenario: ClassIncrementalScenario, accelerator: Accelerator) -> None:
        super().begin(scenario, accelerator)
        first = scenario.groups[0]
        if self.arguments.train_backbone and not self.groups and not self._can_tell_apart(first):
            raise ValueError(
                f"train_backbone trains in the first task, which has {first[0]!r} alone and nothing to tell it from; "
                "begin with two classes at least."
            )
        if self.statistics is not None:
            self.statistics.names = dict(enumerate(scenario.class_names))
        if self.folder is not None:
            # Those learned before are written there too.
            groups = enumerate(scenario.groups)
            self.folder.check_free({self.adapter_name(index): group for index, group in groups})

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = super().state()
        if self.statistics is not None and len(self.statistics):
            for prefix, part in self._parts().items():
                tensors |= {f"{prefix}.{name}": tensor for name, tensor in part.state().items()}
        if self.merging.first_share is not None:
            values = {**values, "first_share": self.merging.first_share}
        return values, tensors | self.merging.state()

    def restore(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        scenario: Optional[ClassIncrementalScenario] = None,
    ) -> None:
        super().restore(values, tensors, scenario)
        if self.statistics is not None and self.adapters:
            for prefix, part in self._parts().items():
                part.restore(under(f"{prefix}.", tensors))
        self.merging.restore(self.adapters, tensors)
        if self.merging.first_share is not None:
            # Older states do not have it.
            self.merging.first_share = values.get("first_share", self.merging.first_share)
        first = self.adapters[0] if self.adapters else None
        if self.folder is not None and first is not None and first not in self.model.peft_config:
            self.model.load_adapter(self.folder.path / first, first)

    def _parts(self) -> dict[str, Union[ClassStatistics, Anchor]]:
        """What is known of classes, by the prefix of its tensors in the state."""
        parts = {"statistics": self.statistics, "anchor": self.anchor}
        return {prefix: part for prefix, part in parts.items() if part is not None}

    def learn(self, task: Task) -> Iterator[Stage]:
        yield from self._new_adapter(task)
        exemplars = self.memory.images()
        shown = task.train if exemplars is None else LabelledImages.concatenate([task.train, exemplars])
        moves = self.statistics is not None and task.index > 0 and not self.arguments.first_session
        before = self.features(shown, MERGED, self.views) if moves else None
        may_hold_back = moves and self.anchor is not None and self.merging.first_share is not None
        leaves_first = may_hold_back and self.merging.is_at(self.adapters[0], MERGED)
        heads = self._merge(task, shown)
        features = self.features(shown, MERGED, self.views)
        if moves:
            if leaves_first:
                features = self._hold_back(before, features, shown)
            if self.anchor is not None:
                first = self.anchor.features(task.train)
                self.anchor.correct(self.statistics, first, before[:, : len(task.train)], task.train.labels)
                self.anchor.take_in(first, task.train.labels)
            self._move_statistics(before, features, shown.labels)
        elif self.anchor is not None:
            # The merge of one adapter is that adapter.
            self.anchor.take_in(features, shown.labels)
        if self.arguments.learns and task.index > 0:
            features = self._learn_weights(task, heads, shown, features)
        features, of_exemplars = features.split([len(task.train), len(shown) - len(task.train)], dim=1)
        self.memory.update(task.train, features[0], of_exemplars[0])
        yield from self._fit_heads(task, heads, features)
        self.model.set_adapter(MERGED, inference_mode=True)
        if self.folder is not None:
            self.folder.keep(self.model, self.adapters[-1], self.accelerator)

    def add_adapter(self, name: str, class_names: list[str]) -> None:
        """As of `AdapterMethod`; with `offload_adapters` older ones are kept, all but the first out of the model."""
        super().add_adapter(name, class_names)
        if self.folder is not None:
            for old in self.adapters[1:-1]:
                self.folder.take_out(self.model, old, self.accelerator)
            if len(self.adapters) > 1:
                self.folder.keep(self.model, self.adapters[0], self.accelerator)

    @property
    def inference_adapters(self) -> list[str]:
        return [MERGED]

    def logits(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits

    def adapter_step(self, network: nn.Module, images: Tensor, labels: Tensor, task: Task) -> tuple[Tensor, Tensor]:
        """As in the paper, or with features held near those that the class statistics belong to."""
        weight = self.arguments.feature_distillation
        if not weight or task.index == 0:
            return super().adapter_step(network, images, labels, task)
        # Not `self.model`: where training is sharded, a copy is trained.
        model = self.accelerator.unwrap_model(network)
        with model.head_output("last_layer_logits+features"):
            output = network(pixel_values=images).logits
        width = len(task.classes) + 1
        loss, met = heads_step(output[:, :width], task.places(labels), (len(task.classes),))
        with torch.no_grad(), model.head_output("features"), adapter_instead(model, MERGED):
            known = model(pixel_values=images).logits
        return loss + weight * F.mse_loss(output[:, width:].float(), known.float()), met

    def _new_adapter(self, task: Task) -> Iterator[Stage]:
        """Trains the task's adapter, or makes it one more copy of the first."""
        if self._can_tell_apart(task.classes) and not (self.arguments.first_session and task.index > 0):
            yield from self.train_adapter(task)
        else:
            self.add_adapter(self.adapter_name(task.index), task.class_names)
            if task.index > 0:
                self.copy_adapter(self.adapters[0], self.adapters[-1])
        self.merging.after_training(task)

    def _can_tell_apart(self, classes: Sequence[Any]) -> bool:
        """Whether stage 1 has anything to tell a task's images from: without, it leads anywhere (merging_log.md)."""
        return len(classes) > 1 or (self.exemplars_as_others and len(self.memory) > 0)

    def _merge(self, task: Task, shown: LabelledImages) -> nn.Linear:
        """Merges the adapters; old heads go on from where they fitted the last merge, a new one from its task."""
        before = self.model.head.heads[MERGED].state_dict() if task.index > 0 else {}
        self.merging.merge(self.adapters, MERGED, shown)
        heads = self.model.head.heads[MERGED]
        with torch.no_grad():
            for name, value in before.items():
                heads.get_parameter(name)[: len(value)] = value
        return heads

    def _hold_back(self, before: Tensor, after: Tensor, shown: LabelledImages) -> Tensor:
        """Shortens the first merge until classes of which no image is there cannot stray far.

        Later ones keep its share of the first adapter: half of their way back to it would take them from where they
        came from (docs/merging_log.md).

        Args:
            before (`Tensor`): Features of the images under the first adapter, `(V, N, C)`.
            after (`Tensor`): Their features under the merged one.
            shown (`LabelledImages`): The images.

        Returns:
            `Tensor`: Their features under the merged adapter as it is then.
        """
        stray = self._stray(before, after, shown.labels)
        while stray > FARTHEST and self.merging.first_share < LARGEST_SHARE:
            self.merging.hold_back(self.adapters[0], MERGED, shown)
            logger.info(
                "Classes left out of drift maps stray from them by %.2g deviations within classes, and old ones may "
                "too: the first adapter's share of the merge is %.4g from now on.",
                stray,
                self.merging.first_share,
            )
            after = self.features(shown, MERGED, self.views)
            stray = self._stray(before, after, shown.labels)
        return after

    def _stray(self, before: Tensor, after: Tensor, labels: Tensor) -> float:
        """How far classes stray from maps fitted to others: root mean square, in deviations within classes."""
        moves = self._moves(before, after, labels)
        variances, errors = moves.variances, left_out_errors(**moves._asdict())
        # Single images have no variance to compare with.
        units = variances + 0.01 * variances.mean() if variances.any() else torch.ones_like(variances)
        return float((errors / units).mean().sqrt())

    def _moves(self, before: Tensor, after: Tensor, labels: Tensor) -> _Moves:
        """What drift maps are fitted to, given features `(V, N, C)` and labels `(N,)`."""
        before, after, labels = before.flatten(0, 1), after.flatten(0, 1), labels.repeat(self.views)
        variances = self.statistics.pooled_covariance().diagonal()
        ridge = self.arguments.drift_ridge
        if ridge is None:
            ridge = choose_ridge(before, after, labels, variances=variances)
        return _Moves(before, after, labels, ridge, variances)

    def _move_statistics(self, before: Tensor, after: Tensor, labels: Tensor) -> None:
        """Moves the class statistics along with the features of the images at hand, `(V, N, C)`."""
        moves = self._moves(before, after, labels)
        if self.anchor is None:
            step = fit_affine_map(moves.before, moves.after, moves.ridge, moves.variances)
        else:
            # No image is of old classes.
            step = fit_map_of_others(**moves._asdict())
            self.anchor.follow(step)
        self.statistics.move(step)

    def _fit_heads(self, task: Task, heads: nn.Linear, features: Tensor) -> Iterator[Stage]:
        """Heads for all classes seen.

        Args:
            task (`Task`): The task.
            heads (`nn.Linear`): The merged adapter's.
            features (`Tensor`): Of the task's training images under the merged adapter, `(V, N, C)`.
        """
        if self.statistics is not None:
            self.statistics.update(features, task.train.labels)
        if self.heads in ANALYTIC_HEADS:
            self.solve_heads(self.statistics)
        elif task.index > 0 and self.heads == "gaussians":
            yield from self.train_heads(heads, *self._samples(task, features))
        elif task.index > 0:
            balanced = self.memory.images_of(self.class_names)
            features = self.features(balanced, MERGED, self.views)
            yield from self.train_heads(heads, features.flatten(0, 1), balanced.labels.repeat(self.views))

    def analytic_heads(self, statistics: ClassStatistics) -> tuple[Tensor, Tensor]:
        """Weight and bias in closed form."""
        return ANALYTIC_HEADS[self.heads](statistics, self.arguments.shrinkage)

    def solve_heads(self, statistics: ClassStatistics) -> None:
        """Heads in closed form for the merged adapter."""
        weight, bias = self.analytic_heads(statistics)
        set_class_logits(self.model.head.heads[MERGED], self.head_sizes, weight, bias)

    def _learn_weights(self, task: Task, heads: nn.Linear, shown: LabelledImages, features: Tensor) -> Tensor:
        """Learns merge weights in place of equal ones; `features` are those before, the return value those after."""
        statistics = self.statistics.copy() if self.statistics is not None else None
        if statistics is not None:
            statistics.update(features[:, : len(task.train)], task.train.labels)
        if self.heads in ANALYTIC_HEADS:
            self.solve_heads(statistics)
        self.merging.learn_weights(self.adapters, MERGED, shown, statistics)
        learned = self.features(shown, MERGED, self.views)
        if self.statistics is not None:
            self._move_statistics(features, learned, shown.labels)
        return learned

    def _samples(self, task: Task, features: Tensor) -> tuple[Tensor, Tensor]:
        """As many features of each class: of old classes drawn from their Gaussians, of new ones from their images.

        `features` are those of the task's training images, `(V, N, C)`.

        A class that came back is an old one: its Gaussian is that of all its images.
        """
        count, classes = self.arguments.samples_per_class, self.statistics.classes
        old = [label for label in classes if label < task.first_class]
        generator = torch.Generator().manual_seed(self.arguments.seed + task.index)
        parts = list(self.statistics.sample(old, count, generator=generator))
        for label in task.new_classes:
            own = features[:, task.train.labels == label].flatten(0, 1)
            parts.append(own[torch.randint(len(own), (count,), generator=generator)])
        return torch.cat(parts), torch.tensor([*old, *task.new_classes]).repeat_interleave(count)
