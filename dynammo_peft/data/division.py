"""Which classes come in which task, and which images of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Optional, Union

import numpy as np
import torch
from torch import Tensor


DomainValue = Union[str, int]


def make_groups(
    names: list[str],
    classes_per_task: Optional[int],
    groups: Optional[Sequence[Sequence[str]]],
    class_order: Optional[Sequence[str]],
    seed: Optional[int],
    learned: Sequence[str],
) -> list[list[str]]:
    """The class names of each task to come; only `groups` can name a class that an earlier task has."""
    if (classes_per_task is None) == (groups is None):
        raise ValueError("Set either classes_per_task (a number) or groups (the class names of each task).")
    if groups is not None:
        if class_order is not None:
            raise ValueError("groups gives the order of the classes already; leave class_order out.")
        if not groups:
            raise ValueError("groups=[] has no task; name the classes of each task.")
        for index, group in enumerate(groups):
            if not group:
                raise ValueError(f"Task {index} of groups has no classes, and so no images; take it out.")
            _check_names(group, names, f"Task {index} of groups")
        return [list(group) for group in groups]
    if classes_per_task < 1:
        raise ValueError(f"classes_per_task={classes_per_task} must be at least 1.")
    for name in class_order or ():
        if name in learned:
            raise ValueError(f"Class {name!r} was learned already; classes that come back are named by groups.")
    names = [name for name in names if name not in learned]
    if not names:
        raise ValueError("All classes of the data set were learned already; name those that come back by groups.")
    if class_order is not None:
        _check_names(class_order, names, "class_order")
        order = list(class_order)
    elif seed is not None:
        shuffled = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
        order = [names[index] for index in shuffled.tolist()]
    else:
        order = names
    return [order[start : start + classes_per_task] for start in range(0, len(order), classes_per_task)]


def _check_names(given: Sequence[str], names: list[str], option: str) -> None:
    for position, name in enumerate(given):
        if name not in names:
            raise ValueError(f"{option} names the class {name!r}; the data set has {', '.join(map(repr, names))}.")
        if name in given[:position]:
            raise ValueError(f"{option} names the class {name!r} again; name each class once.")


class Domains:
    """
    Which domains (hospitals, cameras, years) the images of each task come from.

    Args:
        column (`Optional[str]`): Column of the data set that says it; `None` if a task's images are of any domain.
        domains (`Optional[Sequence[Union[str, int, Sequence[Union[str, int]]]]]`): A value, or several, for each task.
        tasks (`int`): Number of tasks to come.

    Raises:
        ValueError: If one of the first two is given without the other, or there is not one entry for each task.
    """

    def __init__(
        self,
        column: Optional[str],
        domains: Optional[Sequence[Union[DomainValue, Sequence[DomainValue]]]],
        tasks: int,
    ) -> None:
        if (column is None) != (domains is None):
            missing = "domains (a value of the column for each task)" if domains is None else "domain_column"
            raise ValueError(f"domain_column and domains belong together; {missing} is missing.")
        if domains is not None and len(domains) != tasks:
            raise ValueError(
                f"domains has {len(domains)} entries, but there are {tasks} tasks to come; give one each."
            )
        self.column = column
        self.tasks = tasks
        self.of_task: Optional[list[list[DomainValue]]] = None
        if domains is not None:
            self.of_task = [_values(domain) for domain in domains]
        self.values: list[DomainValue] = []

    def codes(self, values: Optional[Sequence[DomainValue]], rows: int, split: str) -> Tensor:
        """The domain of each row as a number, `(N,)`; zeros without domains.

        Raises:
            ValueError: If a task asks for a value that no row has.
        """
        if self.of_task is None:
            return torch.zeros(rows, dtype=torch.long)
        there = sorted(set(values), key=str)
        for value in (value for values in self.of_task for value in values):
            if value not in there:
                raise ValueError(
                    f"domains names {value!r}; column {self.column!r} of the {split} set has "
                    f"{', '.join(map(repr, there[:10]))}{' and others' if len(there) > 10 else ''}."
                )
        self.values += [value for value in there if value not in self.values]
        numbers = {value: number for number, value in enumerate(self.values)}
        return torch.tensor([numbers[value] for value in values])

    def has(self, task: int, code: int) -> bool:
        """Whether images of a domain, by its number, belong to a task, 0 for the first to come."""
        return self.of_task is None or self.values[code] in self.of_task[task]

    def masks(self, codes: Tensor) -> list[Tensor]:
        """For each task which rows have one of its domains, `(N,)`."""
        count = max(len(self.values), 1)
        return [torch.tensor([self.has(task, code) for code in range(count)])[codes] for task in range(self.tasks)]

    def describe(self, task: int) -> str:
        """Of which domains a task's images are, for messages; nothing without domains."""
        if self.of_task is None:
            return ""
        return f" whose {self.column!r} is {' or '.join(map(repr, self.of_task[task]))}"


def _values(domain: Union[DomainValue, Sequence[DomainValue]]) -> list[DomainValue]:
    """The values of a task's domain, of one or several."""
    several = isinstance(domain, Iterable) and not isinstance(domain, str)
    # NumPy's numbers are none of Python's.
    values = [value.item() if isinstance(value, np.generic) else value for value in (domain if several else [domain])]
    if not values or not all(isinstance(value, (str, int)) for value in values):
        raise ValueError(f"domains has {domain!r}; give each task a string or a whole number, or a list of some.")
    return values


def divide(
    labels: Tensor,
    codes: Tensor,
    groups: Sequence[Sequence[int]],
    domains: Domains,
    generator: Optional[torch.Generator] = None,
) -> Tensor:
    """Deals images out to the tasks that have their class and domain.

    Args:
        labels (`Tensor`): Class of each row, `(N,)`; -1 for rows of none.
        codes (`Tensor`): Domain of each row, `(N,)`.
        groups (`Sequence[Sequence[int]]`): Classes of each task.
        domains (`Domains`): Those of each task.
        generator (`Optional[torch.Generator]`): Where several tasks may have an image, they get equal parts at random;
            if `None`, the first gets all.

    Returns:
        `Tensor`: Task of each row, `(N,)`; -1 if no task has it.
    """
    tasks_of_class: dict[int, list[int]] = {}
    for task, group in enumerate(groups):
        for label in group:
            tasks_of_class.setdefault(label, []).append(task)
    used = labels >= 0
    pairs, which = torch.stack([labels, codes])[:, used].unique(dim=1, return_inverse=True)
    fitting = [
        [task for task in tasks_of_class.get(label, ()) if domains.has(task, code)] for label, code in pairs.T.tolist()
    ]
    dealt = torch.tensor([tasks[0] if tasks else -1 for tasks in fitting], dtype=torch.long)[which]
    for pair, tasks in enumerate(fitting if generator is not None else ()):
        if len(tasks) > 1:
            own = torch.nonzero(which == pair).flatten()
            own = own[torch.randperm(len(own), generator=generator)]
            dealt[own] = torch.tensor(tasks)[torch.arange(len(own)) % len(tasks)]
    return torch.full_like(labels, -1).masked_scatter(used, dealt)


def hold_out(labels: Tensor, codes: Tensor, among: Tensor, fraction: float, seed: int) -> Tensor:
    """Which rows are held out, `(N,)`: a share of each class, and of each domain in it.

    Which images these are depends on the data set and the seed, not on the order of the classes.

    Args:
        labels (`Tensor`): The data set's own label of each row, `(N,)`.
        codes (`Tensor`): Domain of each row, `(N,)`.
        among (`Tensor`): Which rows may be held out, `(N,)`.
        fraction (`float`): The share of these.
        seed (`int`): Draws them.
    """
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros_like(labels, dtype=torch.bool)
    for label, code in torch.stack([labels, codes]).unique(dim=1).T.tolist():
        rows = torch.nonzero((labels == label) & (codes == code)).flatten()
        # All are shuffled, so that what is drawn for other classes does not depend on these.
        rows = rows[torch.randperm(len(rows), generator=generator)]
        rows = rows[among[rows]]
        held[rows[: round(fraction * len(rows))]] = True
    return held


def check_can_be_split(
    labels: Tensor, codes: Tensor, tasks: Tensor, fraction: float, class_names: Sequence[str], domains: Domains
) -> None:
    """Raises a `ValueError` unless `hold_out` leaves images on both sides, of each class and domain that a task has.

    Args:
        labels (`Tensor`): Class of each row, `(N,)`.
        codes (`Tensor`): Domain of each row, `(N,)`.
        tasks (`Tensor`): A task of each row, `(N,)`; negative for rows that are not held out.
        fraction (`float`): The share.
        class_names (`Sequence[str]`): Names of the classes.
        domains (`Domains`): Those of each task.
    """
    pairs, counts = torch.stack([labels, codes])[:, tasks >= 0].unique(dim=1, return_counts=True)
    for (label, code), count in zip(pairs.T.tolist(), counts.tolist()):
        if not 0 < round(fraction * count) < count:
            where = f" whose {domains.column!r} is {domains.values[code]!r}" if domains.column else ""
            raise ValueError(
                f"validation_fraction={fraction} of the {count} train images of {class_names[label]!r}{where} leaves "
                "none on one side; change it or add images."
            )
