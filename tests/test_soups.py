"""Soups of adapters, with scores of which the best soup is known, and snapshots of a real training."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_images, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from dynammo_peft import DynammoConfig
from dynammo_peft.merging import (
    CyclicSnapshots,
    adapter_slots,
    adapter_tensors,
    average_adapters,
    cyclic_schedule,
    greedy_soup,
    hierarchical_soup,
    set_adapter_tensors,
)


def points(*values):
    """Adapters with one parameter, and a count and a mean of BatchNorm."""
    return [{"a": torch.tensor([float(value)]), "count": torch.tensor(2)} for value in values]


def near(target, asked=None):
    """A score: the nearer the parameter is to `target`, the better."""

    def score(tensors):
        if asked is not None:
            asked.append(round(tensors["a"].item(), 4))
        return -abs(tensors["a"].item() - target)

    return score


def test_average_adapters():
    adapters = points(1, 5)
    mean = average_adapters(adapters)
    assert (mean["a"].item(), mean["count"].item()) == (3.0, 4)
    # Of one adapter too it is no view.
    alone = average_adapters(adapters[:1])
    alone["a"].zero_()
    assert adapters[0]["a"].item() == 1.0


def test_statistics_are_those_of_a_merge():
    model = get_peft_model(tiny_model("vit"), DynammoConfig(classes=["a"]), "task_000")
    model.add_adapter("task_001", DynammoConfig(classes=["b"]))
    model(tiny_images("vit"))
    for key, tensor in model.state_dict().items():
        if "dynammo_" in key and tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
    slots, names = adapter_slots(model, "task_000"), ["task_000", "task_001"]
    for known in (slots, None):
        mean = average_adapters([adapter_tensors(model, name) for name in names], known)
        model.add_weighted_adapter(names)
        merged = adapter_tensors(model, "merged")
        assert list(mean) == list(merged)
        assert all(torch.equal(value, merged[key]) for key, value in mean.items())


def test_greedy_soup_takes_what_helps():
    asked = []
    adapters = points(9, 2, 6, 1)
    soup = greedy_soup(adapters, near(4.0, asked))
    # 2 and 6 are equally good, the first is the start; with 6 the mean is perfect; 1 and 9 would make it worse.
    assert soup.ingredients == (1, 2)
    assert (soup.tensors["a"].item(), soup.score) == (4.0, 0.0)
    assert soup.tensors["count"].item() == 4
    # All adapters once, then the soup with each of the others, from the best one down.
    assert asked == [9.0, 2.0, 6.0, 1.0, 4.0, 3.0, 5.6667]
    assert [own["a"].item() for own in adapters] == [9, 2, 6, 1]


def test_greedy_soup_keeps_what_does_no_harm():
    soup = greedy_soup(points(3, 5, 4), lambda tensors: 1.0)
    assert soup.ingredients == (0, 1, 2)
    best = greedy_soup(points(0, 10, 11), near(0.0))
    assert (best.ingredients, best.score) == ((0,), 0.0)


def test_hierarchical_soup():
    groups = {"0.1": points(20, 30), "0.01": points(3, 9, 5), "0.001": points(-2, 1)}
    soup = hierarchical_soup(groups, near(2.6))
    # In their groups: 20 alone; 3 alone, as 5 would lead away; 1 alone. Then 3 and 1, of which 3 is nearer.
    assert {name: group.ingredients for name, group in soup.groups.items()} == {
        "0.1": (0,),
        "0.01": (0,),
        "0.001": (1,),
    }
    assert soup.ingredients == {"0.01": (0,)}
    soup = hierarchical_soup(groups, near(2.1))
    assert soup.ingredients == {"0.01": (0,), "0.001": (1,)}
    assert list(soup.ingredients) == ["0.01", "0.001"]
    assert (soup.tensors["a"].item(), soup.tensors["count"].item()) == (2.0, 4)
    assert soup.score == pytest.approx(-0.1)
    # Each group has one vote, however many went into it.
    soup = hierarchical_soup({"many": points(0, 2, 1), "one": points(5)}, lambda tensors: 1.0)
    assert (soup.tensors["a"].item(), soup.ingredients) == (3.0, {"many": (0, 1, 2), "one": (0,)})


@pytest.mark.parametrize("min_ratio", [0.0, 0.1])
def test_cyclic_schedule(min_ratio):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 0.5}])
    schedule = cyclic_schedule(optimizer, steps_per_cycle=4, min_ratio=min_ratio)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    low = 0.5 * min_ratio
    expected = [low + (0.5 - low) / 2 * (1 + math.cos(math.pi * (step % 4) / 4)) for step in range(10)]
    assert rates == pytest.approx(expected)
    assert rates[0] == rates[4] == rates[8] == 0.5
    assert rates[0] > rates[1] > rates[2] > rates[3] > low


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"pixel_values": tiny_images("vit", 8)[index], "labels": index % 3}


class Watch(TrainerCallback):
    """Copies the adapter after every step, and the learning rate during it."""

    def __init__(self):
        self.steps, self.rates = [], []

    def on_step_begin(self, *_, optimizer, **__):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, *_, model, **__):
        self.steps.append({key: value.detach().clone() for key, value in adapter_tensors(model, "default").items()})


def trainer_of(model, tmp_path, callbacks, steps_per_cycle=3, **arguments):
    arguments = {"max_steps": 7, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **arguments}
    arguments = TrainingArguments(
        tmp_path, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, **arguments
    )
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    schedule = cyclic_schedule(optimizer, steps_per_cycle)
    return Trainer(model, arguments, train_dataset=Images(), optimizers=(optimizer, schedule), callbacks=callbacks)


def test_snapshots_of_a_training(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False, modules_to_save=["classifier"])
    model = get_peft_model(tiny_model("vit"), config)
    snapshots, watch = CyclicSnapshots(steps_per_cycle=3), Watch()
    trainer = trainer_of(model, tmp_path, [snapshots, watch])
    trainer.train()
    # Cycles end after steps 3 and 6; the third one is not complete.
    assert watch.rates == pytest.approx([0.1, 0.075, 0.025, 0.1, 0.075, 0.025, 0.1])
    assert len(snapshots.snapshots) == 2
    for snapshot, step in zip(snapshots.snapshots, (2, 5)):
        assert snapshot.keys() == adapter_tensors(model, "default").keys()
        assert all(torch.equal(value, watch.steps[step][key]) for key, value in snapshot.items())
        assert not any(value.requires_grad for value in snapshot.values())
    first, second = snapshots.snapshots
    assert all(not torch.equal(value, second[key]) for key, value in first.items())

    def score(tensors):
        set_adapter_tensors(model, "default", tensors)
        with torch.no_grad():
            labels = torch.arange(8) % 3
            return -torch.nn.functional.cross_entropy(model(pixel_values=tiny_images("vit", 8)).logits, labels).item()

    soup = greedy_soup(snapshots.snapshots, score)
    assert soup.score >= max(map(score, snapshots.snapshots))
    mean = {key: torch.stack([snapshots.snapshots[i][key] for i in soup.ingredients]).mean(0) for key in soup.tensors}
    for key, value in mean.items():
        torch.testing.assert_close(soup.tensors[key], value)
    # The next training starts anew.
    trainer.args.max_steps = 3
    trainer.train()
    assert len(snapshots.snapshots) == 1


def test_snapshots_of_a_named_adapter(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], r=2)
    model = get_peft_model(tiny_model("vit"), config)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    named = CyclicSnapshots(steps_per_cycle=1, adapter="other")
    trainer_of(model, tmp_path, [named], max_steps=1).train()
    other = adapter_tensors(model, "other")
    assert all(torch.equal(value, other[key]) for key, value in named.snapshots[0].items())
    with pytest.raises(ValueError, match="Adapters default, other are active; name one by `adapter`"):
        trainer_of(model, tmp_path, [CyclicSnapshots(steps_per_cycle=1)], max_steps=1).train()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda own: {"b": own["a"], "count": own["count"]}, r"the shape of a \(\(1,\) and None\)"),
        (lambda own: {**own, "b": own["a"]}, r"the shape of b \(None and \(1,\)\); give both the same"),
        (lambda own: {**own, "a": torch.zeros(2)}, r"the shape of a \(\(1,\) and \(2,\)\)"),
    ],
)
def test_adapters_that_are_not_alike(change, message):
    first, second, other = points(1, 2, 3)
    adapters = [first, second, change(other)]
    for make in (average_adapters, lambda given: greedy_soup(given, near(0))):
        with pytest.raises(ValueError, match=f"Adapters 0 and 2 differ in {message}"):
            make(adapters)
    with pytest.raises(ValueError, match=rf"Adapters '0.1\[0\]' and '0.2\[1\]' differ in {message}"):
        hierarchical_soup({"0.1": [first], "0.2": [second, change(other)]}, lambda tensors: 0.0)
    # No mean is made of groups that do not fit together, nor is one scored first.
    with pytest.raises(ValueError, match=rf"Adapters '0.1\[0\]' and '0.2\[0\]' differ in {message}"):
        hierarchical_soup({"0.1": [first], "0.2": [change(other)]}, lambda tensors: float("nan"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adapters_that_are_not_finite(value):
    adapters = points(1, 2, value)
    for make in (average_adapters, lambda given: greedy_soup(given, near(0))):
        with pytest.raises(ValueError, match="Adapter 2 has NaN or infinity in 'a'; leave it out"):
            make(adapters)
    with pytest.raises(ValueError, match=r"Adapter '0.2\[1\]' has NaN or infinity in 'a'"):
        hierarchical_soup({"0.1": adapters[:1], "0.2": adapters[1:]}, near(0))


def test_unusable_arguments():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    for make in (CyclicSnapshots, lambda steps: cyclic_schedule(optimizer, steps)):
        with pytest.raises(ValueError, match="steps_per_cycle=0 must be at least 1"):
            make(0)
    with pytest.raises(ValueError, match="min_ratio=1.5 must be between 0 and 1"):
        cyclic_schedule(optimizer, 3, min_ratio=1.5)
    with pytest.raises(ValueError, match="No adapters for a soup"):
        average_adapters([])
    with pytest.raises(ValueError, match="No adapters for a soup"):
        greedy_soup([], near(0))
    with pytest.raises(ValueError, match="No adapters for a soup"):
        hierarchical_soup({}, near(0))
    for given in (["a", "b"], "ab"):
        for make in (average_adapters, lambda given: greedy_soup(given, near(0))):
            with pytest.raises(ValueError, match="made of a list of adapters' tensors, got 'ab?'; give such as of"):
                make(given)
    with pytest.raises(ValueError, match="made of a list of adapters' tensors, got a dict"):
        greedy_soup(points(1)[0], near(0))
    with pytest.raises(ValueError, match="groups must be a mapping .*, got a list"):
        hierarchical_soup(points(1), near(0))
    with pytest.raises(ValueError, match="Group '0.1' holds no adapters"):
        hierarchical_soup({"0.1": [], "0.2": points(1)}, near(0))
    with pytest.raises(ValueError, match="Adapter 1 has the score nan"):
        greedy_soup(points(1, 2), lambda tensors: float("nan") if tensors["a"] == 2 else 0.0)
