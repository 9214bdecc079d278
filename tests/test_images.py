"""Images as places in a store: nothing is copied until it is read, and what is read is what was asked for."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dynammo_peft.data import LabelledImages, data_loader


class CountingStore:
    """A tensor of images that writes down which of them are read together."""

    def __init__(self, images):
        self.tensor = images
        self.shape = images.shape
        self.read = []

    def index_select(self, dim, index):
        self.read.append(index.tolist())
        return self.tensor.index_select(dim, index)


def random_images(count, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def counted(count=12, classes=3, seed=0):
    """Images of classes that take turns, and the store that they are in."""
    store = CountingStore(random_images(count, seed=seed))
    return LabelledImages(store, torch.arange(count) % classes, torch.arange(100, 100 + count)), store


def check(part, images, labels, rows):
    """A set holds these images, however they are read."""
    assert len(part) == len(images)
    assert torch.equal(part.images, images)
    assert (part.labels.tolist(), part.rows.tolist()) == (labels.tolist(), rows.tolist())
    for place in range(len(part)):
        image, label = part[place]
        assert torch.equal(image, images[place])
        assert label == labels[place]
    for pairs in (part.__getitems__(range(len(part))), [part[place] for place in range(len(part))]):
        assert len(pairs) == len(part)
        assert torch.equal(torch.stack([image for image, _ in pairs]), images)
        assert [int(label) for _, label in pairs] == labels.tolist()


def test_selections_read_no_image():
    images, store = counted()
    some = images.select(torch.tensor([7, 2, 2, 11]))
    some = LabelledImages.concatenate([some.select(some.labels == 2), images.of_classes([1, 0]), some])
    assert some.store is store
    assert store.read == []
    places = torch.tensor([2, 2, 11, 0, 1, 3, 4, 6, 7, 9, 10, 7, 2, 2, 11])
    check(some, store.tensor[places], places % 3, places + 100)


def test_only_what_is_asked_for_is_read_and_a_batch_at_once():
    images, store = counted()
    some = images.of_classes([1])
    some[2], some[-1]
    some.__getitems__([3, 0])
    assert store.read == [[7], [10], [10, 1]]
    store.read.clear()
    batches = list(data_loader(some.select(torch.tensor([3, 1, 0, 2])), batch_size=3))
    assert store.read == [[10, 4, 1], [7]]
    assert torch.equal(batches[0][0], store.tensor[[10, 4, 1]])
    assert batches[1][1].tolist() == [1]


def test_images_of_several_stores_are_read_in_order():
    (first, one), (second, two), (third, three) = (counted(count, seed=count) for count in (12, 5, 4))
    both = LabelledImages.concatenate(
        [first.select(torch.tensor([3, 1])), second.of_classes([0]), first.of_classes([2])]
    )
    # Joined once more, in another order of stores and with images of a store that is in it.
    again = LabelledImages.concatenate([third, both.select(torch.tensor([4, 2, 0])), second, both])
    assert one.read == two.read == three.read == []
    assert set(map(id, again.store.stores)) == {id(one), id(two), id(three)}
    a, b, c = one.tensor, two.tensor, three.tensor
    check(both, torch.cat([a[[3, 1]], b[[0, 3]], a[[2, 5, 8, 11]]]), *columns([3, 1], [0, 3], [2, 5, 8, 11]))
    expected = torch.cat([c, a[[2]], b[[0]], a[[3]], b, a[[3, 1]], b[[0, 3]], a[[2, 5, 8, 11]]])
    check(
        again,
        expected,
        *columns(range(4), [2], [0], [3], range(5), [3, 1], [0, 3], [2, 5, 8, 11]),
    )


def columns(*places):
    """Labels and rows of images at some places, as `counted` gives them."""
    places = torch.tensor([place for part in places for place in part])
    return places % 3, places + 100


def test_one_batch_reads_each_store_once():
    (first, one), (second, two) = counted(seed=0), counted(seed=1)
    both = LabelledImages.concatenate([first, second])
    both.__getitems__([20, 3, 13, 0])
    assert (one.read, two.read) == ([[3, 0]], [[8, 1]])


def test_a_set_without_images_stays_one():
    images, _ = counted()
    none = images.of_classes([])
    assert (len(none), none.images.shape, none.image_size) == (0, (0, 3, 4, 4), (4, 4))
    assert len(LabelledImages.concatenate([none, images, none])) == 12


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_what_torchs_own_gives(workers):
    images, _ = counted(count=21)
    images = LabelledImages.concatenate([images.of_classes([2, 0]), counted(count=4, seed=1)[0]])
    plain = TensorDataset(images.images, images.labels)
    for options in ({}, {"shuffle": True}, {"shuffle": True, "drop_last": True}):
        options["batch_size"] = 5
        own = data_loader(images, num_workers=workers, **options)
        batches = []
        for loader in (DataLoader(plain, **options), DataLoader(images, **options), own):
            torch.manual_seed(3)
            batches.append([*loader, *loader])
        for found in batches[1:]:
            assert len(found) == len(batches[0])
            for (pixels, labels), (expected, numbers) in zip(found, batches[0]):
                assert torch.equal(pixels, expected)
                assert torch.equal(labels, numbers)


def test_reading_draws_nothing():
    images, _ = counted()
    before = torch.get_rng_state()
    assert len(list(data_loader(images, batch_size=5))) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_the_loader_of_features_is_torchs_own():
    features = TensorDataset(torch.randn(7, 2), torch.arange(7))
    for own, expected in zip(data_loader(features, batch_size=3), DataLoader(features, batch_size=3)):
        assert torch.equal(own[0], expected[0])
        assert torch.equal(own[1], expected[1])


def test_what_is_read_is_a_copy():
    images = LabelledImages(random_images(6), torch.arange(6), torch.arange(6))
    before = images.store.clone()
    for read in (
        images.images,
        images[2][0],
        images.__getitems__([1, 4]).images,
        images.select(torch.arange(6)).images,
    ):
        read.zero_()
    assert torch.equal(images.store, before)
    assert torch.equal(copy.deepcopy(images).images, before)


def test_copied_images_leave_the_others_behind():
    images, store = counted()
    some = images.of_classes([1]).copied()
    assert some.store.shape[0] == 4
    store.read.clear()
    check(some, store.tensor[[1, 4, 7, 10]], *columns([1, 4, 7, 10]))
    assert store.read == []


def test_images_of_two_sizes_are_refused():
    small, large = (LabelledImages(random_images(2, size), torch.arange(2), torch.arange(2)) for size in (4, 6))
    with pytest.raises(ValueError, match="4x4 and 6x6 pixels cannot be put together; use an image processor"):
        LabelledImages.concatenate([large, small])


@pytest.mark.parametrize("counts", [(3, 2, 3), (3, 3, 2), (2, 3, 3)])
def test_every_image_needs_a_label_and_a_row(counts):
    images, labels, rows = counts
    with pytest.raises(ValueError, match=f"{images} images, {labels} labels and {rows} rows"):
        LabelledImages(random_images(images), torch.arange(labels), torch.arange(rows))
