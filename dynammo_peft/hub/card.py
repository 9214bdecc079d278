"""Model cards: what a model is and what was measured, for the Hub and for who reads it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Optional, Union

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..version import __version__
from .card_facts import CardFacts, license_metadata, public_options
from .card_markdown import escape, percent, table, template_path
from .card_picture import draw_accuracy_matrix


logger = logging.getLogger(__name__)

PICTURE = "accuracy_matrix.png"
TAGS = ("dynammo", "class-incremental-learning", "continual-learning", "model-merging", "image-classification")

# Measure -> its name, what it is, its unit, and what the Hub calls it.
_MEASURES = {
    "last_accuracy": ("Last accuracy", "accuracy on all classes after the last task", "%", "accuracy"),
    "average_incremental_accuracy": (
        "Average incremental accuracy",
        "mean over tasks of the accuracy on all classes seen",
        "%",
        "average_incremental_accuracy",
    ),
    "mean_class_recall": ("Mean class recall", "mean recall of all classes after the last task", "%", "recall"),
    "forgetting": ("Forgetting", "what earlier tasks have lost since their best", "points", "forgetting"),
    "backward_transfer": (
        "Backward transfer",
        "what earlier tasks have gained since they were learned",
        "points",
        "backward_transfer",
    ),
}


def model_card(facts: CardFacts, picture: Optional[str] = None) -> ModelCard:
    """
    Args:
        facts (`CardFacts`): What the card says.
        picture (`Optional[str]`): Name of the accuracy matrix's picture in the repository, if there is one.

    Returns:
        `ModelCard`: The card, with the measures as `model-index`. Names are shown as they are, whatever is in them.

    Example:

        ```py
        >>> card = model_card(CardFacts(name="cells", form="adapter", tasks=[["monocyte"], ["platelet"]]))
        >>> card.save("README.md")
        ```
    """
    options, places = public_options(facts.options)
    card = ModelCard.from_template(
        _metadata(facts),
        template_path=str(template_path("model_card.md")),
        title=escape(facts.name),
        form=facts.form,
        method=facts.method,
        class_count=len(facts.class_names),
        task_count=len(facts.tasks),
        has_base=facts.base_model is not None,
        base=_base(facts),
        base_license=_or_unknown(facts.base_model_license),
        model_license=_or_unknown(facts.license),
        version=__version__,
        classes=_classes(facts),
        repo_id=facts.repo_id,
        unknown_score=facts.unknown_score,
        measured=bool(facts.metrics),
        test_data=_or_unknown(facts.evaluation_data, "a data set that was not named"),
        test_split=escape(facts.evaluation_split or ""),
        test_images=facts.test_images,
        size=f"{facts.image_size[0]} x {facts.image_size[1]}" if facts.image_size else "",
        measures=_measures(facts),
        matrix=_matrix(facts),
        picture=picture if facts.accuracy_matrix else None,
        cost=_cost(facts.cost) if facts.cost else "",
        training_data=_or_unknown(facts.training_data),
        training_data_id=facts.training_data_id,
        training_data_license=_or_unknown(facts.training_data_license),
        method_name=_or_unknown(facts.method),
        options=table(["option", "value"], [[escape(name), escape(text)] for name, text in options.items()]),
        has_options=bool(options),
        places=places,
        exemplar_images=facts.exemplar_images,
        exemplar_indices=facts.exemplar_indices,
        class_statistics=facts.class_statistics,
        merge_statistics=facts.merge_statistics,
    )
    card.text = card.text.rstrip() + "\n"
    return card


def write_model_card(facts: CardFacts, directory: Union[str, os.PathLike]) -> ModelCard:
    """Writes `README.md`, and the accuracy matrix's picture where matplotlib is installed.

    `PeftModel.save_pretrained` writes a `README.md` too, and puts the base model's path into one that is there: save
    first.

    Args:
        facts (`CardFacts`): What the card says.
        directory (`Union[str, os.PathLike]`): The model's folder; made if it does not exist.

    Returns:
        `ModelCard`: The card.
    """
    directory, picture = Path(directory), None
    directory.mkdir(parents=True, exist_ok=True)
    if facts.accuracy_matrix:
        try:
            draw_accuracy_matrix(facts.accuracy_matrix, facts.tasks, directory / PICTURE)
            picture = PICTURE
        except ImportError as error:
            logger.warning("The card has no picture of the accuracy matrix, only its table: %s", error)
    card = model_card(facts, picture)
    card.save(directory / "README.md")
    return card


def _metadata(facts: CardFacts) -> ModelCardData:
    results = [
        EvalResult(
            task_type="image-classification",
            # The Hub asks for a data set of its own; "imagefolder" stands for images of one's own.
            dataset_type=facts.evaluation_data_id or "imagefolder",
            dataset_name=facts.evaluation_data or facts.evaluation_data_id or "not named",
            dataset_split=facts.evaluation_split,
            metric_type=_MEASURES[name][3] if name in _MEASURES else name,
            metric_name=_MEASURES[name][0] if name in _MEASURES else None,
            metric_value=value,
            metric_args={"average": "macro"} if name == "mean_class_recall" else None,
        )
        for name, value in facts.measures().items()
    ]
    relation = "adapter" if facts.form == "adapter" else "finetune"
    return ModelCardData(
        **license_metadata(facts.license, facts.license_link),
        library_name="peft" if facts.form == "adapter" else "transformers",
        pipeline_tag="image-classification",
        base_model=facts.base_model,
        base_model_relation=relation if facts.base_model else None,
        datasets=[facts.training_data_id] if facts.training_data_id else None,
        metrics=[result.metric_type for result in results if result.metric_type in ("accuracy", "recall")] or None,
        tags=[*TAGS, *facts.tags],
        model_name=facts.name if results else None,
        eval_results=results or None,
    )


def _or_unknown(text: Optional[str], unknown: str = "unknown") -> str:
    return escape(text) if text else unknown


def _base(facts: CardFacts) -> str:
    if facts.base_model is None:
        return "none that is published"
    revision = f", revision {escape(facts.base_model_revision)}" if facts.base_model_revision else ""
    return f"[{escape(facts.base_model)}](https://huggingface.co/{facts.base_model}){revision}"


def _classes(facts: CardFacts) -> str:
    """A row for each class: its place among the logits, its tasks, its name."""
    tasks: dict[str, list[str]] = {}
    for task, group in enumerate(facts.tasks):
        for name in group:
            tasks.setdefault(name, []).append(str(task + 1))
    rows = [[str(place), ", ".join(tasks[name]), escape(name)] for place, name in enumerate(facts.class_names)]
    return table(["logit", "task", "class"], rows)


def _measures(facts: CardFacts) -> str:
    """A row for each measure, known ones first."""
    measured = facts.measures()
    rows = []
    for name, (title, meaning, unit, _) in _MEASURES.items():
        value = f"{percent(measured[name])} {unit}" if name in measured else "not measured"
        rows.append([title, value, meaning])
    rows += [[escape(name), f"{value:.4g}", ""] for name, value in measured.items() if name not in _MEASURES]
    return table(["measure", "value", "what it is"], rows)


def _matrix(facts: CardFacts) -> str:
    """The accuracy matrix in per cent, empty above the diagonal."""
    matrix = facts.accuracy_matrix
    rows = []
    for index, row in enumerate(matrix):
        cells = ["" if math.isnan(value) else percent(value) for value in row]
        rows.append([f"after task {index + 1}", *cells, *[""] * (len(matrix) - len(row))])
    return table(["", *(f"task {index + 1}" for index in range(len(matrix)))], rows) if matrix else ""


def _cost(cost: Mapping[str, float]) -> str:
    rows = [
        [title, *(f"{cost[key] / 1e6:.4g} M" for key in (name, f"{name}_base"))]
        for title, name in (("multiply-adds", "multiply_adds"), ("parameters used", "parameters"))
    ]
    rows.append(["operations against the base model", f"{cost['ratio']:.3f}", "1"])
    folded = cost.get("ratio_folded", cost["ratio"])
    if folded < cost["ratio"]:
        rows.append(["the same with LoRA in the base model's weights", f"{folded:.3f}", "1"])
    return table(["one image", "this model", "base model"], rows)
