"""The class names in the base model's configuration, which follow the active adapters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class BaseLabels:
    """The labels of a base model as they were, and those of the heads that stand in for its classifier.

    Args:
        model (`nn.Module`): The base model; one without labels is left alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.config = getattr(model, "config", None)
        self.known = getattr(self.config, "id2label", None) is not None
        if self.known:
            self.id2label = dict(self.config.id2label)
            self.problem_type = getattr(self.config, "problem_type", None)

    def show(self, class_names: Sequence[str]) -> None:
        """Makes the configuration name the classes whose logits the model gives now; its own if there are none."""
        if not self.known:
            return
        id2label, problem_type = self.id2label, self.problem_type
        if class_names:
            id2label, problem_type = dict(enumerate(class_names)), "single_label_classification"
        self.config.id2label = dict(id2label)
        self.config.label2id = {label: index for index, label in id2label.items()}
        self.config.problem_type = problem_type
