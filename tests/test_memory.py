"""The exemplar memory: which images it keeps, and how many of each class."""

import numpy as np
import pytest
import torch

from dynammo_peft.data import ExemplarMemory, LabelledImages
from dynammo_peft.data.memory import closest_to_mean, herding, random_choice


def random_features(count, width=6, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def at_unit_length(features):
    return [row / np.sqrt((row**2).sum()) for row in features.double().numpy()]


def herding_by_definition(features, count):
    """Algorithm 4 of iCaRL, one candidate at a time; an image is taken once."""
    features = at_unit_length(features)
    mean = sum(features) / len(features)
    chosen = []
    while len(chosen) < count:
        picked_so_far = sum((features[place] for place in chosen), np.zeros_like(mean))
        distance = {
            place: np.linalg.norm(mean - (features[place] + picked_so_far) / (len(chosen) + 1))
            for place in range(len(features))
            if place not in chosen
        }
        chosen.append(min(distance, key=distance.get))
    return chosen


def class_images(counts, seed=0, first_row=0):
    """Images whose pixels all hold their row, of classes `{class: how many}` in mixed order, and features."""
    labels = torch.tensor([label for label, count in counts.items() for _ in range(count)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    rows = torch.arange(first_row, first_row + len(labels))
    images = rows.to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    return LabelledImages(images, labels, rows), random_features(len(labels), seed=seed)


def rows_by_class(memory):
    images = memory.images()
    return {label: images.rows[images.labels == label].tolist() for label in memory.classes}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 4, 12])
def test_herding_follows_icarl(seed, count):
    features = random_features(12, seed=seed)
    # Their lengths differ much: only directions may count.
    features = features * torch.linspace(0.1, 10, 12)[:, None]
    assert herding(features, count).tolist() == herding_by_definition(features, count)


def test_first_few_of_herding_are_the_herding_of_fewer():
    features = random_features(20)
    longest = herding(features, 20)
    assert sorted(longest.tolist()) == list(range(20))
    for count in range(20):
        assert torch.equal(herding(features, count), longest[:count])


def test_herding_takes_no_image_twice():
    features = random_features(2).repeat(4, 1)
    assert sorted(herding(features, 8).tolist()) == list(range(8))


@pytest.mark.parametrize("seed", range(3))
def test_closest_to_mean(seed):
    features = random_features(10, seed=seed) * torch.linspace(0.1, 10, 10)[:, None]
    unit = at_unit_length(features)
    distances = [np.linalg.norm(row - sum(unit) / 10) for row in unit]
    assert closest_to_mean(features, 4).tolist() == sorted(range(10), key=distances.__getitem__)[:4]


def test_random_choice_draws_without_replacement_by_the_generator():
    features = random_features(30)
    draws = [random_choice(features, 10, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 10
    assert set(draws[0]) <= set(range(30))


@pytest.mark.parametrize("select", [herding, closest_to_mean, random_choice])
def test_a_class_smaller_than_its_share_is_kept_whole(select):
    assert sorted(select(random_features(3), 7).tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("size", "classes", "quota"), [(10, 1, 10), (10, 3, 3), (10, 10, 1), (200, 8, 25), (0, 1, 0), (0, 9, 0)]
)
def test_quota_is_rounded_down(size, classes, quota):
    assert ExemplarMemory(size).quota(classes) == quota


@pytest.mark.parametrize("selection", ["herding", "closest_to_mean", "random"])
def test_shares_shrink_as_classes_come(selection):
    memory = ExemplarMemory(11, selection)
    assert (len(memory), memory.classes, memory.images()) == (0, [], None)

    memory.update(*class_images({0: 8, 1: 9}, seed=1))
    first = rows_by_class(memory)
    assert {label: len(rows) for label, rows in first.items()} == {0: 5, 1: 5}

    memory.update(*class_images({2: 7}, seed=2, first_row=100))
    second = rows_by_class(memory)
    assert second == {0: first[0][:3], 1: first[1][:3], 2: second[2]}
    assert len(second[2]) == 3
    assert len(memory) == 9

    memory.update(*class_images({3: 7, 4: 7}, seed=3, first_row=200))
    third = rows_by_class(memory)
    assert third == {label: second[label][:2] for label in (0, 1, 2)} | {3: third[3], 4: third[4]}
    assert memory.classes == [0, 1, 2, 3, 4]
    assert len(memory) == len(memory.images()) == 10


def test_images_keep_their_labels_and_rows():
    memory = ExemplarMemory(6)
    images, features = class_images({0: 8, 1: 8})
    memory.update(images, features)
    kept = memory.images()
    assert (kept.images == kept.rows.to(torch.uint8)[:, None, None, None]).all()
    assert torch.equal(kept.labels, images.labels[kept.rows])


def test_each_class_is_chosen_by_its_own_features():
    memory = ExemplarMemory(6)
    images, features = class_images({0: 8, 1: 8})
    memory.update(images, features)
    for label, rows in rows_by_class(memory).items():
        own = torch.nonzero(images.labels == label).flatten()
        assert rows == own[herding_by_definition(features[own], 3)].tolist()


def test_classes_smaller_than_the_share_leave_room_empty():
    memory = ExemplarMemory(12)
    memory.update(*class_images({0: 2, 1: 8}))
    assert {label: len(rows) for label, rows in rows_by_class(memory).items()} == {0: 2, 1: 6}
    # Two images are still fewer than the new share of three: none may get lost.
    memory.update(*class_images({2: 8, 3: 8}))
    assert {label: len(rows) for label, rows in rows_by_class(memory).items()} == {0: 2, 1: 3, 2: 3, 3: 3}


def test_random_memory_is_reproducible():
    memories = [ExemplarMemory(8, "random", seed) for seed in (0, 0, 1)]
    for memory in memories:
        memory.update(*class_images({0: 30, 1: 30}))
        memory.update(*class_images({2: 30, 3: 30}))
    assert rows_by_class(memories[0]) == rows_by_class(memories[1])
    assert rows_by_class(memories[0]) != rows_by_class(memories[2])


def test_a_memory_of_no_images():
    memory = ExemplarMemory(0)
    for label in range(3):
        memory.update(*class_images({label: 4}))
        assert (len(memory), memory.classes, memory.images()) == (0, [], None)


@pytest.mark.parametrize(
    ("new", "words"),
    [({2: 4, 3: 4}, ["memory_size=3", "4 classes", "at least 4", "or to 0"]), ({1: 4}, ["Class 1", "own_features"])],
)
def test_refused_classes_leave_the_memory_as_it_was(new, words):
    memory = ExemplarMemory(3)
    memory.update(*class_images({0: 4, 1: 4}))
    before = rows_by_class(memory)
    with pytest.raises(ValueError) as error:
        memory.update(*class_images(new, first_row=50))
    assert all(word in str(error.value) for word in words)
    assert rows_by_class(memory) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": -1}, ["memory_size=-1", "negative"]),
        ({"size": 12.5}, ["memory_size=12.5", "whole number"]),
        ({"size": 4, "selection": "newest"}, ["'newest'", "herding", "random", "closest_to_mean"]),
    ],
)
def test_impossible_memories_are_refused(options, words):
    with pytest.raises(ValueError) as error:
        ExemplarMemory(**options)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_a_class_without_exemplars_is_named():
    memory = ExemplarMemory(4)
    memory.update(*class_images({0: 3, 2: 3}))
    with pytest.raises(ValueError, match="no exemplar of 'mast cell'; set memory_size"):
        memory.images_of(["basophil", "mast cell", "platelet"])
    with pytest.raises(ValueError, match="no exemplar of 'a', 'b'"):
        ExemplarMemory(0).images_of(["a", "b"])
    memory.update(*class_images({1: 3}))
    assert memory.images_of(["basophil", "mast cell", "platelet"]).labels.unique().tolist() == [0, 1, 2]


def test_nothing_is_left_of_images_that_were_not_chosen_or_were_forgotten():
    memory = ExemplarMemory(8)
    for counts in ({0: 9}, {1: 9}, {2: 9, 3: 9}):
        memory.update(*class_images(counts))
        quota = memory.size // len(memory.classes)
        # What is behind the images, not the images alone.
        assert [images.store.shape[0] for images in memory._classes.values()] == [quota] * len(memory.classes)
        assert memory.images().store.shape[0] == quota * len(memory.classes)
