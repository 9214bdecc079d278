"""Decoded images in a file: the same as in memory, found again, never half, and for the user alone."""

import os
import pickle
import resource
import shutil
import time
import warnings
from contextlib import contextmanager

import datasets
import numpy as np
import pytest
import torch
from forking import CONTEXT
from PIL import Image
from tiny import tiny_dataset, tiny_model, tiny_processor
from transformers import ViTImageProcessorPil

from dynammo_peft import ClassIncrementalScenario, Dynammo, Learner
from dynammo_peft.data import data_loader, transforms
from dynammo_peft.data.cache import MappedImages, open_cache
from dynammo_peft.methods import DynammoArguments


TRAIN = tiny_dataset(classes=5, per_class=10).shuffle(seed=3)
TEST = tiny_dataset(classes=5, per_class=2, seed=1).shuffle(seed=4)


def make(train=TRAIN, test=TEST, processor=None, **options):
    options = {"classes_per_task": 2, "progress": False, **options}
    if "groups" in options:
        del options["classes_per_task"]
    return ClassIncrementalScenario(train, test, processor or tiny_processor(), **options)


def saved(folder, dataset=TRAIN):
    """The data set with its images in files, which are there to be lost."""
    folder.mkdir()
    paths = [str(folder / f"{row}.png") for row in range(len(dataset))]
    for path, image in zip(paths, dataset["image"]):
        image.save(path)
    return datasets.Dataset.from_dict({"image": paths, "label": dataset["label"][:]}, features=dataset.features)


def check_same(scenario, other):
    assert scenario.groups == other.groups
    assert scenario.image_size == other.image_size
    for mine, its in zip(scenario, other):
        for part, expected in ((mine.train, its.train), (mine.test, its.test)):
            assert torch.equal(part.images, expected.images)
            assert torch.equal(part.labels, expected.labels)
            assert torch.equal(part.rows, expected.rows)


OPTIONS = {
    "plain": {},
    "order": {"seed": 5},
    "some classes": {"groups": [["class 4", "class 1"], ["class 2"]]},
    "held out": {"validation_fraction": 0.2, "seed": 1},
    "going on": {
        "groups": [["class 3"]],
        "learned": [["class 0"], ["class 2"]],
        "exemplar_rows": [row for row, label in enumerate(TRAIN["label"]) if label in (0, 2)][:3],
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_images_are_those_in_memory(tmp_path, options):
    cached, memory = make(cache_dir=tmp_path, **options), make(**options)
    check_same(cached, memory)
    assert torch.equal(cached.exemplars.images, memory.exemplars.images)
    assert torch.equal(cached.learned_test.images, memory.learned_test.images)


def test_training_and_scores_are_those_in_memory(tmp_path):
    found = []
    for options in ({}, {"cache_dir": tmp_path}):
        arguments = DynammoArguments(memory_size=10, adapter_epochs=1, adapter_batch_size=8, recalibrate=True)
        method = Dynammo(tiny_model("resnet_basic"), arguments)
        metrics = Learner(method, progress=False).fit(make(processor=tiny_processor(64), **options)).metrics()
        found.append((method.model.state_dict(), metrics, method.memory.rows))
    assert found[0][1:] == found[1][1:]
    for name, tensor in found[0][0].items():
        assert torch.equal(tensor, found[1][0][name]), name


def test_what_was_decoded_is_found_again(tmp_path):
    train, test, expected = saved(tmp_path / "a"), saved(tmp_path / "b", TEST), make(seed=7, validation_fraction=0.3)
    cache = tmp_path / "cache"
    make(train, test, cache_dir=cache)
    first = {path: path.stat() for path in cache.iterdir()}
    assert len(first) == 2
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    check_same(make(train, test, cache_dir=str(cache)), make())
    # Another order of the classes, and other images held out.
    check_same(make(train, None, cache_dir=cache, seed=7, validation_fraction=0.3), expected)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == {
        path: stat.st_mtime_ns for path, stat in first.items()
    }


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({}, 1),
        ({"processor": tiny_processor(16)}, 2),
        ({"processor": ViTImageProcessorPil(size={"height": 32, "width": 32}, resample=0)}, 2),
        ({"train": TRAIN.select(range(40))}, 2),
        ({"train": TRAIN.rename_column("image", "scan"), "image_column": "scan"}, 2),
        ({"horizontal_flip": False, "class_order": [f"class {label}" for label in (4, 3, 2, 1, 0)]}, 1),
    ],
    ids=["same", "size", "filter", "rows", "column", "order"],
)
def test_a_file_is_of_one_data_set_and_processor(tmp_path, options, files):
    # Held-out images are in the same file.
    make(test=None, cache_dir=tmp_path, validation_fraction=0.2)
    own = {"test": None, "validation_fraction": 0.2, **options}
    check_same(make(cache_dir=tmp_path, **own), make(**own))
    assert len(list(tmp_path.iterdir())) == files


class OtherProcessor(ViTImageProcessorPil):
    """Says the same of itself and does something else, as those of other libraries do."""

    def to_dict(self):
        return tiny_processor().to_dict()

    def __call__(self, *args, **kwargs):
        processed = super().__call__(*args, **kwargs)
        raw = not kwargs.get("do_normalize", True)
        processed["pixel_values"] = (255 if raw else 0) - processed["pixel_values"]
        return processed


def test_files_that_were_changed_are_decoded_again(tmp_path):
    data = saved(tmp_path / "images")
    make(data, cache_dir=tmp_path / "cache")
    for path in (tmp_path / "images").iterdir():
        Image.new("RGB", (32, 32), "white").save(path)
        os.utime(path, (time.time() + 1,) * 2)
    assert (make(data, cache_dir=tmp_path / "cache")[0].train.images == 255).all()


def test_processors_of_one_name_are_told_apart(tmp_path):
    other = OtherProcessor(size={"height": 32, "width": 32})
    plain, inverted = make(cache_dir=tmp_path), make(processor=other, cache_dir=tmp_path)
    assert torch.equal(plain[0].train.images, 255 - inverted[0].train.images)


def test_only_the_user_can_read_the_files(tmp_path):
    make(cache_dir=tmp_path / "new" / "cache")
    assert (tmp_path / "new" / "cache").stat().st_mode & 0o777 == 0o700
    for path in (tmp_path / "new" / "cache").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_numpy_reads_the_file(tmp_path):
    scenario = make(test=None, cache_dir=tmp_path, validation_fraction=0.2)
    (path,) = tmp_path.iterdir()
    images = np.load(path, mmap_mode="r")
    assert images.shape == (50, 3, 32, 32)
    train = scenario[0].train
    np.testing.assert_array_equal(images[train.rows], train.images)
    assert MappedImages(path).labels.tolist() == TRAIN["label"][:]


def test_the_file_cannot_be_changed_through_its_images(tmp_path):
    images = make(cache_dir=tmp_path)[0].train
    assert not images.store._images.flags.writeable
    before = images.images
    for read in (images.images, images[0][0], images.__getitems__([1, 2]).images):
        assert read.max() > 0
        read.zero_()
    assert torch.equal(images.images, before)


def test_other_processes_map_the_file_themselves(tmp_path):
    images = make(cache_dir=tmp_path)[1].train
    sent = pickle.dumps(images)
    assert len(sent) < 10_000 < images.images.numel()
    assert torch.equal(pickle.loads(sent).images, images.images)
    # Workers that are forked share the mapping.
    loader = data_loader(images, batch_size=8, num_workers=2)
    assert torch.equal(torch.cat([pixels for pixels, _ in loader]), images.images)


DAMAGES = {
    "cut within the images": lambda content: content[:5000],
    "cut within the labels": lambda content: content[:-8],
    "without its labels": lambda content: content[: 128 + 50 * 3 * 32 * 32],
    "cut within the header": lambda content: content[:40],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"more",
    "another file": lambda content: b"patient 7, left eye" * 500,
    "of another type": lambda content: content.replace(b"|u1", b"|i1", 1),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_made_again(tmp_path, damage):
    make(test=None, cache_dir=tmp_path, validation_fraction=0.2)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    with pytest.warns(UserWarning, match=f"{path} is damaged .*decoded again"):
        scenario = make(test=None, cache_dir=tmp_path, validation_fraction=0.2)
    check_same(scenario, make(test=None, validation_fraction=0.2))
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == content


def test_nothing_is_left_of_images_that_cannot_be_read(tmp_path):
    train = saved(tmp_path / "images")
    (tmp_path / "images" / "30.png").write_text("no image")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"images/30\.png cannot be read"):
            make(train, cache_dir=tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []


class Process:
    """Another process that makes the scenario, and waits before it decodes one of the images until it is told."""

    def __init__(self, cache_dir, stop_at):
        self.pipe, pipe = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=self._run, args=(cache_dir, stop_at, pipe), daemon=True)
        self.process.start()
        assert self.pipe.recv() == "waiting"

    @staticmethod
    def _run(cache_dir, stop_at, pipe):
        decode, decoded = transforms._decode, []

        def counted(*args):
            decoded.append(args)
            if len(decoded) == stop_at:
                pipe.send("waiting")
                pipe.recv()
            return decode(*args)

        transforms._decode = counted
        scenario = make(cache_dir=cache_dir)
        pipe.send((len(decoded), [int(task.train.images.sum()) for task in scenario]))

    def finish(self):
        """How many images it decoded, and sums over those of each task."""
        self.pipe.send("go on")
        result = self.pipe.recv()
        self.process.join()
        assert self.process.exitcode == 0
        return result


def test_what_a_killed_process_leaves_is_taken_for_nothing_and_removed(tmp_path):
    other = Process(tmp_path, stop_at=30)
    other.process.kill()
    other.process.join()
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".unfinished"
    assert left.stat().st_mode & 0o777 == 0o600
    check_same(make(cache_dir=tmp_path), make())
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"] * 2


def test_processes_that_decode_at_once_do_not_disturb_each_other(tmp_path):
    others = [Process(tmp_path, stop_at) for stop_at in (20, 40)]
    # Neither takes what the other is at for a leftover.
    assert [path.suffix for path in tmp_path.iterdir()] == [".unfinished"] * 2
    check_same(make(cache_dir=tmp_path), make())
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npy"] * 2 + [".unfinished"] * 2
    sums = [int(task.train.images.sum()) for task in make()]
    for other in others:
        # The training images were all decoded, and the test images found.
        assert other.finish() == (50, sums)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_same(make(cache_dir=tmp_path), make())


def refused(cache_dir, *words, train=TRAIN):
    with pytest.raises(ValueError) as error:
        make(train, cache_dir=cache_dir)
    for word in (f"cache_dir={str(cache_dir)!r}", *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@contextmanager
def files_of_at_most(size):
    """No file grows beyond `size` bytes, as on a disk that is full then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Within the images, and within what is still in Python's buffer when all images are there.
@pytest.mark.parametrize("size", [20_000, 50 * 3 * 32 * 32 + 150])
def test_a_full_disk_is_told(tmp_path, size):
    with files_of_at_most(size):
        refused(tmp_path, "room for the decoded images")
    assert list(tmp_path.iterdir()) == []


def test_room_is_looked_for_before_all_is_decoded(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50 * 3 * 32 * 32 - 1))
    refused(tmp_path, "0.0 GB of room", "choose another folder")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50 * 3 * 32 * 32))
    make(cache_dir=tmp_path)


@contextmanager
def no_rights():
    """Without the rights of the superuser, whom no file mode stops."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    folder, file = tmp_path / "read-only", tmp_path / "file"
    folder.mkdir(mode=0o555)
    file.write_text("no folder")
    with no_rights():
        refused(folder, "Permission denied")
        refused(folder / "new", "Permission denied")
    refused(file, "choose a folder")


def test_progress_is_all_that_is_shown(tmp_path, capfd):
    make(cache_dir=tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")
    make(cache_dir=tmp_path / "shown", progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "Decoding train images" in shown.err
    assert "50/50" in shown.err
    make(cache_dir=tmp_path / "shown", progress=True)
    assert capfd.readouterr() == ("", "")


def test_a_file_grows_with_images_that_nobody_counted(tmp_path):
    # The header is written anew with their number, whose digits are more.
    pixels = torch.arange(1200, dtype=torch.int32).to(torch.uint8).view(1200, 1, 1, 1).expand(1200, 3, 1, 1)
    images = open_cache(tmp_path, {}, lambda: ((image, row % 7) for row, image in enumerate(pixels)))
    assert images.shape == (1200, 3, 1, 1)
    assert torch.equal(images.index_select(0, torch.arange(1200)), pixels)
    assert images.labels.tolist() == [row % 7 for row in range(1200)]
