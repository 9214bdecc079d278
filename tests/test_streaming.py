"""Streams: decoded as they pass, once, and then no different from data sets."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from test_cache import OPTIONS, TEST, TRAIN, check_same, make, saved
from test_recipe import image_folder
from tiny import tiny_processor

from dynammo_peft import load_image_dataset
from dynammo_peft.data.sources import ImageSource
from dynammo_peft.data.transforms import iterate_decoded, raw_examples


TESTS = Path(__file__).parent
FEATURES = TRAIN.features


def stream(dataset=TRAIN, shards=1):
    return dataset.to_iterable_dataset(num_shards=shards)


def generated(log, rows=50, features=FEATURES, labels=None):
    """A stream that writes down each time it is begun."""

    def generate():
        with open(log, "a") as file:
            file.write("begun\n")
        for row in range(rows):
            yield {"image": TRAIN[row]["image"], "label": TRAIN[row]["label"] if labels is None else labels[row]}

    return datasets.IterableDataset.from_generator(generate, features=features)


def fingerprint(dataset):
    return ImageSource(dataset, "train", tiny_processor(), "image", "label", ".", False)._fingerprint()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shards", [1, 3])
def test_a_stream_is_no_different_from_the_data_set(tmp_path, options, shards):
    check_same(make(stream(shards=shards), stream(TEST), cache_dir=tmp_path, **options), make(**options))


def first_classes(example):
    return example["label"] < 4


def as_it_is(example):
    return example


@pytest.mark.parametrize("step", ["filter", "map"])
def test_images_that_a_step_of_a_stream_has_decoded_are_taken(tmp_path, step):
    train = stream().filter(first_classes) if step == "filter" else stream().map(as_it_is, features=FEATURES)
    groups = [["class 0", "class 1"], ["class 3"]]
    scenario, other = make(train, stream(TEST), cache_dir=tmp_path, groups=groups), make(groups=groups)
    for mine, its in zip(scenario, other):
        assert torch.equal(mine.train.images, its.train.images) and torch.equal(mine.train.labels, its.train.labels)


def test_a_stream_and_a_data_set_go_together(tmp_path):
    check_same(make(stream(), TEST, cache_dir=tmp_path), make())
    check_same(make(TRAIN, stream(TEST), cache_dir=tmp_path), make())


def test_a_folder_of_images_is_streamed(tmp_path):
    image_folder(tmp_path / "images")
    options = {"data_dir": str(tmp_path / "images")}
    streams = load_image_dataset("imagefolder", **options, streaming=True)
    assert all(isinstance(part, datasets.IterableDataset) for part in streams)
    check_same(make(*streams, cache_dir=tmp_path / "cache"), make(*load_image_dataset("imagefolder", **options)))


def test_images_within_an_archive_are_read_as_they_pass(tmp_path):
    expected = saved(tmp_path / "images", TRAIN)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for row in range(50):
            archive.write(tmp_path / "images" / f"{row}.png", f"{row}.png")

    def generate():
        for row in range(50):
            yield {"image": f"zip://{row}.png::{tmp_path / 'images.zip'}", "label": TRAIN[row]["label"]}

    packed = datasets.IterableDataset.from_generator(generate, features=FEATURES)
    check_same(make(packed, TEST, cache_dir=tmp_path / "cache"), make(expected, TEST))


def test_a_stream_passes_once(tmp_path):
    log = tmp_path / "log"
    expected = make(seed=1)
    for options in ({"seed": 1}, {"seed": 2}, {"test": None, "validation_fraction": 0.2}):
        scenario = make(**{"train": generated(log), "cache_dir": tmp_path / "cache", **options})
        assert log.read_text() == "begun\n"
        if options == {"seed": 1}:
            check_same(scenario, expected)


def test_streams_are_told_apart_by_what_is_done_to_them():
    whole = stream()
    others = [
        whole,
        stream(TEST),
        stream(shards=2),
        whole.take(20),
        whole.take(21),
        whole.skip(20),
        whole.filter(lambda row: row["label"] > 0),
        whole.filter(lambda row: row["label"] > 1),
        whole.shuffle(seed=0, buffer_size=10),
        whole.shuffle(seed=1, buffer_size=10),
        split_dataset_by_node(whole, rank=0, world_size=2),
        split_dataset_by_node(whole, rank=1, world_size=2),
    ]
    later = whole.shuffle(seed=0, buffer_size=10)
    later.set_epoch(1)
    found = [fingerprint(dataset) for dataset in [*others, later]]
    assert len(set(found)) == len(found)


def test_a_stream_that_was_read_before_is_the_same():
    read, unread = stream(shards=2), stream(shards=2)
    for row, _ in enumerate(read):
        if row == 30:
            break
    next(iter(read.select_columns(["label"])))
    assert fingerprint(read) == fingerprint(unread)
    # And telling does not change where it stands.
    assert next(iter(read))["label"] == TRAIN[0]["label"]


def test_other_processes_know_the_stream_again():
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_streaming import *; print(*map(fingerprint, some()))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(TESTS)], capture_output=True, text=True, cwd=TESTS.parent)
    assert done.stdout.split() == [*map(fingerprint, some())], done.stderr


def some():
    return stream(), stream().filter(labelled), datasets.IterableDataset.from_generator(ten, features=FEATURES)


def labelled(row):
    return row["label"] > 0


def ten():
    yield from TRAIN.select(range(10))


def test_few_images_are_in_memory_at_a_time(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    taken = []
    examples = (taken.append(row) or row for row in raw_examples(TRAIN, ["image"], "image"))
    for done, _ in enumerate(iterate_decoded(examples, "image", tiny_processor()), start=1):
        assert len(taken) <= done + 2 * 3
    assert (done, len(taken)) == (50, 50)


def refused(words, train, cache_dir, test=TEST):
    with pytest.raises(ValueError) as error:
        make(train, test, cache_dir=cache_dir)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}", message), f"{word!r} is not in {message!r}"


def test_a_stream_needs_a_folder(tmp_path):
    refused(["train set", "stream", "cache_dir"], stream(), None)
    refused(["test set", "stream", "cache_dir"], TRAIN, None, stream(TEST))


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (lambda log: generated(log, features=None), ["train stream", "dataset.cast(", "'image'", "ClassLabel"]),
        (lambda log: stream().remove_columns("label"), ["train set", "'label'", "label_column", "'image'"]),
        (
            lambda log: stream().cast_column("label", datasets.Value("int64")),
            ["'label'", "ClassLabel", "Value", "cast_column('label'"],
        ),
        (lambda log: generated(log, rows=0), ["train set has no images"]),
        (lambda log: generated(log, rows=3, labels=[0, 1, None]), ["Row 2", "train set", "'label'"]),
        (lambda log: generated(log, rows=3, labels=[0, -1, 2]), ["Row 1", "train set", "'label'"]),
        (lambda log: generated(log, rows=3), ["has no train images"]),
        (lambda log: unpicklable(), ["train stream", "cannot be pickled"]),
    ],
    ids=["no features", "no labels", "numbers", "empty", "no label", "hidden label", "missing classes", "unpicklable"],
)
def test_unusable_streams(tmp_path, train, words):
    refused(words, train(tmp_path / "log"), tmp_path / "cache")
    left = list((tmp_path / "cache").iterdir()) if (tmp_path / "cache").exists() else []
    # Images that all could be read may be of use to another scenario.
    assert len(left) == (words == ["has no train images"])


def unpicklable():
    frame = sys._getframe()
    return stream().filter(lambda row: frame is not None)


def test_the_error_of_a_stream_is_its_own(tmp_path):
    def broken():
        yield from TRAIN.select(range(5))
        raise ConnectionResetError("the network is gone")

    train = datasets.IterableDataset.from_generator(broken, features=FEATURES)
    with pytest.raises(ConnectionResetError, match="the network is gone"):
        make(train, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_streams_keep_their_class_names(tmp_path):
    names = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcde"))})
    scenario = make(stream().cast(names), stream(TEST).cast(names), cache_dir=tmp_path)
    assert scenario.class_names == list("abcde")
    assert torch.equal(scenario[0].train.images, make()[0].train.images)
