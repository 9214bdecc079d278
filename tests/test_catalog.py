"""Data sets by name."""

import datasets
import numpy as np
import pytest
from sklearn.datasets import load_digits

from dynammo_peft import load_image_dataset


def test_digits_are_scikit_learns_split_by_class():
    train, test = load_image_dataset("digits")
    assert len(train) + len(test) == 1797
    assert train.features["label"].names == [str(digit) for digit in range(10)]
    totals = np.bincount(load_digits().target)
    np.testing.assert_allclose(np.bincount(test["label"]) / totals, 0.3, atol=0.01)
    originals = {(image * (255 / 16)).round().astype("uint8").tobytes() for image in load_digits().images}
    assert np.asarray(train[0]["image"]).tobytes() in originals
    again, _ = load_image_dataset("digits")
    assert again["label"][:] == train["label"][:]


def test_streams_hold_the_same_images():
    for stream, dataset in zip(load_image_dataset("digits", streaming=True), load_image_dataset("digits")):
        assert isinstance(stream, datasets.IterableDataset)
        assert stream.features == dataset.features
        for row, expected in zip(stream.take(20), dataset):
            assert row["label"] == expected["label"]
            assert row["image"].tobytes() == expected["image"].tobytes()


def test_a_split_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="test_split='exam' does not exist in data set 'digits'.*train, test"):
        load_image_dataset("digits", test_split="exam")
    assert load_image_dataset("digits", test_split=None)[1] is None
    with pytest.raises(ValueError, match="train_split='exam' does not exist in data set 'digits'.*train, test"):
        load_image_dataset("digits", train_split="exam", streaming=True)
