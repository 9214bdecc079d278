"""Tasks from a data set: which classes come when, with which images, and what is refused."""

import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_dataset, tiny_processor
from transformers import ViTImageProcessorPil

from dynammo_peft import ClassIncrementalScenario
from dynammo_peft.data.transforms import iterate_decoded


NAMES = [f"class {label}" for label in range(5)]

# In mixed order, so that a row says nothing about its class.
TRAIN = tiny_dataset(classes=5, per_class=10).shuffle(seed=3)
TEST = tiny_dataset(classes=5, per_class=2, seed=1).shuffle(seed=4)


def make(train=TRAIN, test=TEST, processor=None, **options):
    return ClassIncrementalScenario(train, test, processor or tiny_processor(), progress=False, **options)


def with_labels(labels, names=NAMES):
    """The first training images with other labels."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    columns = {"image": TRAIN["image"][: len(labels)], "label": labels}
    return datasets.Dataset.from_dict(columns, features=features)


def with_images(images, labels):
    """Images given as the data set stores them."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES[:2])})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def without(label, dataset):
    return dataset.select([row for row, other in enumerate(dataset["label"]) if other != label])


def check_images(part, class_names, source):
    """Every image is that of its row, and of the class that the row says."""
    assert len(part.images) == len(part.labels) == len(part.rows)
    for image, label, row in zip(part.images, part.labels, part.rows):
        original = source[int(row)]
        resized = np.asarray(original["image"].convert("RGB").resize((32, 32), Image.BILINEAR))
        np.testing.assert_array_equal(image.permute(1, 2, 0), resized)
        assert class_names[label] == source.features["label"].int2str(original["label"])


def refused(words, *args, **options):
    """The scenario is refused in one line that holds all words."""
    with pytest.raises(ValueError) as error:
        make(*args, **options)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        # A number must not be found within another one.
        assert re.search(rf"(?<!\w){re.escape(word)}", message), f"{word!r} is not in {message!r}"


@pytest.mark.parametrize(
    ("classes_per_task", "sizes"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (3, [3, 2]), (5, [5]), (9, [5])]
)
def test_classes_per_task(classes_per_task, sizes):
    scenario = make(classes_per_task=classes_per_task)
    assert [len(task.class_names) for task in scenario] == [len(group) for group in scenario.groups] == sizes
    assert scenario.class_names == NAMES
    assert scenario.num_classes == 5
    assert scenario.task_of_class() == [task for task, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({"classes_per_task": 2}, [["class 0", "class 1"], ["class 2", "class 3"], ["class 4"]]),
        (
            {"classes_per_task": 2, "class_order": [NAMES[label] for label in (3, 0, 4, 2, 1)]},
            [["class 3", "class 0"], ["class 4", "class 2"], ["class 1"]],
        ),
        (
            {"groups": [["class 4"], ["class 2", "class 0", "class 3"], ["class 1"]]},
            [["class 4"], ["class 2", "class 0", "class 3"], ["class 1"]],
        ),
        # Not all classes of the data set.
        ({"groups": [["class 4", "class 1"], ["class 2"]]}, [["class 4", "class 1"], ["class 2"]]),
        # Any order, which the seed decides.
        ({"classes_per_task": 2, "seed": 5}, None),
    ],
    ids=["labels", "class_order", "groups", "subset", "seed"],
)
def test_tasks_hold_the_images_of_their_classes(options, groups):
    scenario = make(**options)
    assert groups is None or scenario.groups == groups
    assert scenario.class_names == [name for group in scenario.groups for name in group]
    assert len(scenario) == len(list(scenario)) == len(scenario.groups)
    first = 0
    for index, (task, group) in enumerate(zip(scenario, scenario.groups)):
        assert (task.index, task.class_names, task.first_class) == (index, group, first)
        assert task.classes == task.new_classes == list(range(first, first + len(group)))
        first += len(group)
        assert task.seen_classes == first
        for part, source in ((task.train, TRAIN), (task.test, TEST)):
            check_images(part, scenario.class_names, source)
            own = [row for row, label in enumerate(source["label"]) if NAMES[label] in group]
            assert sorted(part.rows.tolist()) == own
            assert sorted(part.labels.unique().tolist()) == list(task.classes)
            assert part.images.dtype == torch.uint8


def test_the_seed_shuffles_the_classes():
    orders = [make(classes_per_task=2, seed=seed).class_names for seed in (0, 0, 1, 2)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == NAMES for order in orders)


def test_there_are_no_tasks_beyond_the_last():
    scenario = make(classes_per_task=2)
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"Task {index} "):
            scenario[index]


def test_image_size_is_height_and_width():
    processor = ViTImageProcessorPil(size={"height": 16, "width": 40})
    scenario = make(processor=processor, classes_per_task=5)
    assert scenario.image_size == (16, 40)
    assert scenario[0].train.images.shape == (50, 3, 16, 40)


def test_labelled_images_as_a_data_set():
    images = make(classes_per_task=2)[1].train
    assert len(images) == 20
    image, label = images[3]
    assert torch.equal(image, images.images[3])
    assert label == images.labels[3]
    for (image, label), place in zip(images.__getitems__([5, 1]), (5, 1)):
        assert torch.equal(image, images.images[place])
        assert label == images.labels[place]


def test_augmentation_and_normalisation_are_those_asked_for():
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3])
    options = {"horizontal_flip": False, "vertical_flip": True, "crop_padding": 0.25}
    transform = make(processor=processor, classes_per_task=5, **options).transform
    assert list(transform.mean) == pytest.approx([0.1, 0.2, 0.3])
    assert {option: getattr(transform, option) for option in options} == options


def test_columns_of_other_names():
    train, test = (part.rename_columns({"image": "scan", "label": "finding"}) for part in (TRAIN, TEST))
    scenario = make(train, test, classes_per_task=2, image_column="scan", label_column="finding")
    for mine, other in zip(scenario, make(classes_per_task=2)):
        assert torch.equal(mine.train.images, other.train.images)
        assert torch.equal(mine.test.labels, other.test.labels)


def test_a_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for split, kinds in (("train", ["a.jpg", "b.png", "c.png"]), ("test", ["d.jpg", "e.png"])):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for kind, channels in zip(kinds, ([3], [], [4])):
                pixels = rng.integers(0, 256, (*rng.integers(20, 50, 2), *channels), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / kind)
    data = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))
    modes = {data["train"][row]["image"].mode for row in range(6)}
    assert modes == {"RGB", "L", "RGBA"}
    scenario = make(data["train"], data["test"], groups=[["dog"], ["cat"]])
    for task in scenario:
        check_images(task.train, ["dog", "cat"], data["train"])
        check_images(task.test, ["dog", "cat"], data["test"])
    assert [(len(task.train), len(task.test)) for task in scenario] == [(3, 2), (3, 2)]


def all_pixels(scenario, split):
    return [image.numpy().tobytes() for task in scenario for image in getattr(task, split).images]


@pytest.mark.parametrize("unread", [None, TEST.rename_columns({"image": "other", "label": "columns"})])
def test_held_out_images_take_the_place_of_the_test_set(unread):
    scenario = make(TRAIN, unread, classes_per_task=2, seed=0, validation_fraction=0.2)
    for task in scenario:
        for label in task.classes:
            assert (task.train.labels == label).sum() == 8
            assert (task.test.labels == label).sum() == 2
    # Noise makes every image unlike all others.
    train, test = all_pixels(scenario, "train"), all_pixels(scenario, "test")
    assert len(set(train) | set(test)) == 50
    assert not set(train) & set(test)
    assert sorted(train + test) == sorted(all_pixels(make(classes_per_task=5), "train"))


def test_held_out_images_are_drawn_by_the_seed():
    held_out = [
        all_pixels(make(TRAIN, None, classes_per_task=5, validation_fraction=0.2, seed=seed), "test")
        for seed in (0, 0, 1)
    ]
    assert held_out[0] == held_out[1]
    assert set(held_out[0]) != set(held_out[2])


def test_rows_of_held_out_images_are_those_of_the_data_set():
    scenario = make(TRAIN, None, groups=[["class 3"], ["class 1", "class 0"]], validation_fraction=0.2)
    rows = []
    for task in scenario:
        for part in (task.train, task.test):
            check_images(part, scenario.class_names, TRAIN)
            rows += part.rows.tolist()
    assert sorted(rows) == [row for row, label in enumerate(TRAIN["label"]) if label in (0, 1, 3)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["classes_per_task", "groups"]),
        ({"classes_per_task": 2, "groups": [["class 0"]]}, ["classes_per_task", "groups"]),
        ({"classes_per_task": 0}, ["classes_per_task=0", "at least 1"]),
        ({"groups": [["class 0", "clas 1"]]}, ["groups", "'clas 1'", "'class 1'"]),
        ({"groups": [["class 0", "class 0"]]}, ["groups", "'class 0'", "once"]),
        ({"groups": [["class 0"], []]}, ["Task 1", "groups", "take it out"]),
        ({"groups": []}, ["groups"]),
        ({"groups": [["class 0"]], "class_order": NAMES}, ["groups", "class_order"]),
        ({"classes_per_task": 1, "class_order": ["clas 1"]}, ["class_order", "'clas 1'", "'class 1'"]),
        ({"classes_per_task": 1, "class_order": ["class 0", "class 0"]}, ["class_order", "'class 0'", "once"]),
        ({"classes_per_task": 2, "image_column": "scan"}, ["'scan'", "image_column", "'image'", "'label'"]),
        ({"classes_per_task": 2, "label_column": "kind"}, ["'kind'", "label_column", "'image'", "'label'"]),
        ({"classes_per_task": 2, "validation_fraction": -0.1}, ["validation_fraction=-0.1", "at least 0"]),
        ({"classes_per_task": 2, "validation_fraction": 1.0}, ["validation_fraction=1.0", "less than 1"]),
        ({"classes_per_task": 2, "crop_padding": -0.2}, ["crop_padding=-0.2", "at least 0"]),
        ({"classes_per_task": 2, "crop_padding": 1}, ["crop_padding=1", "less than 1"]),
        ({"classes_per_task": 2, "crop_padding": float("nan")}, ["crop_padding=nan", "less than 1"]),
        # Not one image of each class, and nothing left to train on.
        ({"classes_per_task": 2, "validation_fraction": 0.001}, ["validation_fraction"]),
        ({"classes_per_task": 2, "validation_fraction": 0.999}, ["validation_fraction"]),
    ],
)
def test_unusable_options(options, words):
    refused(words, **options)


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (TRAIN, None, ["test", "validation_fraction"]),
        ([{"image": None, "label": 0}], TEST, ["train set is a list", "datasets.Dataset"]),
        (TRAIN, datasets.DatasetDict(test=TEST), ["test set is a DatasetDict", "split"]),
        (TRAIN, TEST.remove_columns("image"), ["test set", "'image'", "image_column", "'label'"]),
        (TRAIN, TEST.remove_columns("label"), ["test set", "'label'", "label_column", "'image'"]),
        (
            TRAIN.cast_column("label", datasets.Value("int64")),
            TEST,
            ["'label'", "train set", "ClassLabel", "Value", "class_encode_column"],
        ),
        (
            TRAIN.remove_columns("image").add_column("image", ["path.png"] * len(TRAIN)),
            TEST,
            ["'image'", "train set", "Image", "Value", "cast_column"],
        ),
        (TRAIN, with_labels([0, 1, 2, 3, 0], NAMES[:4]), ["'label'", "train", "test", "equal"]),
        # The same names, but other numbers.
        (TRAIN, with_labels([0, 1, 2, 3, 4], NAMES[::-1]), ["'label'", "train", "test", "equal"]),
        (without(2, TRAIN), TEST, ["Task 1", "train", "'class 2'", "groups"]),
        (TRAIN, without(4, TEST), ["Task 2", "test", "'class 4'", "groups"]),
        (TRAIN, TEST.select([]), ["Task 0", "test", "'class 0'"]),
        # Test sets of competitions hide their labels so.
        (TRAIN, with_labels([0, 1, 2, 3, 4, -1, -1]), ["test", "'label'"]),
        (with_labels([0, 1, 2, 3, 4, None]), TEST, ["train", "'label'"]),
    ],
    ids=[
        "no_test",
        "a_list",
        "all_splits",
        "no_test_images_column",
        "no_test_label_column",
        "numbers_as_labels",
        "paths_as_images",
        "fewer_classes_in_test",
        "other_numbers_in_test",
        "class_without_train_images",
        "class_without_test_images",
        "empty_test",
        "hidden_labels",
        "no_label",
    ],
)
def test_unusable_data(train, test, words):
    refused(words, train, test, classes_per_task=2)


# Class 2 has one image.
ONE_IMAGE = datasets.concatenate_datasets([without(2, TRAIN), TRAIN.select([TRAIN["label"][:].index(2)])])


def test_a_class_of_one_image_cannot_be_split():
    refused(["'class 2'", "validation_fraction"], ONE_IMAGE, None, classes_per_task=2, validation_fraction=0.2)


def test_a_class_that_no_task_has_need_not_be_split():
    scenario = make(ONE_IMAGE, None, groups=[["class 0", "class 1"]], validation_fraction=0.2)
    assert (len(scenario[0].train), len(scenario[0].test)) == (16, 4)


@pytest.mark.parametrize("damage", ["no image", "cut off", "missing", "a bomb"])
def test_unreadable_files_are_named(tmp_path, monkeypatch, damage):
    paths = [str(tmp_path / f"{number}.jpg") for number in range(4)]
    for path in paths:
        TRAIN[0]["image"].save(path)
    broken = tmp_path / "2.jpg"
    if damage == "no image":
        broken.write_text("patient 7\nleft eye\n")
    elif damage == "cut off":
        broken.write_bytes(broken.read_bytes()[:-200])
    elif damage == "missing":
        broken.unlink()
    else:
        Image.new("L", (200, 200)).save(broken)
        # Pillow refuses images of more than twice that many pixels.
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    refused([str(broken)], with_images(paths, [0, 1, 0, 1]), with_images(paths[:2], [0, 1]), classes_per_task=1)


@pytest.mark.parametrize("image", [{"bytes": b"no image", "path": None}, None], ids=["no image", "nothing"])
def test_unreadable_images_without_a_file_are_named_by_their_row(image):
    images = [*TRAIN["image"][:5], image]
    # The row is that of the data set, although the first task's class has only the last two images.
    train = with_images(images, [0, 0, 0, 0, 1, 1])
    refused(["5"], train, with_images(images[:2], [1, 1]), groups=[["class 1"]])


@pytest.mark.parametrize("sizes", [((24, 24), (24, 30)), ((24, 30), (24, 24)), ((24, 24), (24, 24))])
def test_images_must_have_one_size(sizes):
    def noise(height, width):
        return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))

    # Different ones within the training set, or between it and the test set, or none.
    train = with_images([noise(24, 24), noise(*sizes[0])], [0, 1])
    test = with_images([noise(*sizes[1])] * 2, [0, 1])
    processor = ViTImageProcessorPil(do_resize=False)
    if sizes == ((24, 24), (24, 24)):
        assert make(train, test, processor, classes_per_task=1).image_size == (24, 24)
    else:
        refused(["24x24", "24x30", "image processor"], train, test, processor, classes_per_task=1)


def test_progress_is_shown_only_if_asked_for(capsys):
    make(classes_per_task=5)
    assert capsys.readouterr().err == ""
    ClassIncrementalScenario(TRAIN, TEST, tiny_processor(), classes_per_task=5)
    shown = capsys.readouterr().err
    assert "training images" in shown
    assert "50/50" in shown
    assert "test images" in shown


@pytest.mark.parametrize("format", ["torch", "numpy", "arrow"])
def test_labels_are_read_whatever_the_format(format):
    train, test = tiny_dataset(4, 6), tiny_dataset(4, 3, seed=1)
    scenario = ClassIncrementalScenario(
        train.with_format(format, columns=["image"]), test, tiny_processor(), classes_per_task=2, progress=False
    )
    plain = ClassIncrementalScenario(train, test, tiny_processor(), classes_per_task=2, progress=False)
    assert torch.equal(scenario[0].train.images, plain[0].train.images)


def test_a_transform_that_is_not_applied_is_told():
    train, test = tiny_dataset(4, 6), tiny_dataset(4, 3, seed=1)
    with pytest.warns(UserWarning, match="The train set has a transform .*not applied"):
        ClassIncrementalScenario(
            train.with_transform(lambda rows: {}), test, tiny_processor(), classes_per_task=2, progress=False
        )


def test_images_that_are_asked_for_in_grey_are_refused():
    train, test = tiny_dataset(4, 6), tiny_dataset(4, 3, seed=1)
    train = train.cast_column("image", datasets.Image(mode="L"))
    with pytest.raises(ValueError, match="mode='L', and all are read in colour"):
        ClassIncrementalScenario(train, test, tiny_processor(), classes_per_task=2, progress=False)


def test_images_that_a_decoder_fails_on_are_named_by_their_row(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("Failed to decode image")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ValueError, match="of row 0 cannot be read .Failed to decode image"):
        ClassIncrementalScenario(
            tiny_dataset(4, 6), tiny_dataset(4, 3, seed=1), tiny_processor(), classes_per_task=2, progress=False
        )
    with pytest.raises(ValueError, match="Row 7 has no image; remove it"):
        list(iterate_decoded([{"image": {"bytes": None, "path": None}}], "image", tiny_processor(), [7]))
