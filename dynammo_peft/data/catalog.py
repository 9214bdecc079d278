"""Data sets by name."""

from __future__ import annotations

import os
from typing import Optional

import datasets
from PIL import Image

from .sources import ImageData


def load_image_dataset(
    name: str,
    config_name: Optional[str] = None,
    data_dir: Optional[str] = None,
    train_split: str = "train",
    test_split: Optional[str] = "test",
    streaming: bool = False,
) -> tuple[ImageData, Optional[ImageData]]:
    """
    Args:
        name (`str`): `"digits"` (scikit-learn's, no download), `"imagefolder"` for folders of images, or any data set
            on the Hub.
        config_name (`Optional[str]`): Which configuration of the data set.
        data_dir (`Optional[str]`): For `"imagefolder"`: a folder with `train/<class>/` and `test/<class>/`.
        train_split (`str`): Name of the split with training images.
        test_split (`Optional[str]`): Name of the split with test images; `None` if there is none.
        streaming (`bool`): Whether to give streams: files are read as they pass, instead of downloaded beforehand.

    Returns:
        `tuple[ImageData, Optional[ImageData]]`: Training and test images: data sets, or streams.

    Raises:
        ValueError: If a split or the folder does not exist.
    """
    _check_folder(name, data_dir)
    if name != "digits":
        splits = datasets.load_dataset(name, config_name, data_dir=data_dir, streaming=streaming)
    elif streaming:
        splits = {split: dataset.to_iterable_dataset() for split, dataset in digits().items()}
    else:
        splits = digits()
    for option, split in (("train_split", train_split), ("test_split", test_split)):
        if split is not None and split not in splits:
            raise ValueError(
                f"{option}={split!r} does not exist in data set {name!r}; choose one of {', '.join(splits)}"
                f"{', or none with a validation_fraction' if option == 'test_split' else ''}."
            )
    return splits[train_split], None if test_split is None else splits[test_split]


def _check_folder(name: str, data_dir: Optional[str]) -> None:
    """Raises a `ValueError` if folders of images are asked for and there are none."""
    if name != "imagefolder":
        return
    if data_dir is None:
        # Otherwise it would be whatever lies in the working directory.
        raise ValueError("'imagefolder' needs data_dir: a folder with train/<class>/ and test/<class>/.")
    if "://" not in str(data_dir) and not os.path.isdir(data_dir):
        raise ValueError(f"data_dir={str(data_dir)!r} is no folder; give one with train/<class>/ and test/<class>/.")


def digits() -> datasets.DatasetDict:
    """Scikit-learn's 1797 handwritten digits of 8x8 pixels; 30% of each class are test images."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype("uint8")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in bunch.target_names])}
    )
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": bunch.target}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    return dataset.train_test_split(test_size=0.3, seed=0, stratify_by_column="label")
