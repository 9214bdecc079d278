"""Maps of drift from sums over chunks of images, against plain computation, and the memory that they take."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from dynammo_peft.data import ClassStatistics, choose_ridge, fit_affine_map, fit_correction, regression


def drifting(images, features=12, classes=7, offset=0.0, dtype=torch.float64, seed=0):
    """Features before and after a change that is in part each class's own, and labels in no order."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.cat([torch.arange(classes), torch.randint(classes, (images - classes,), generator=generator)])
    labels = labels[torch.randperm(images, generator=generator)]
    scales = torch.logspace(-1, 1, features, dtype=torch.float64)
    before = (drawn(images, features) + 2 * drawn(classes, features)[labels]) * scales
    change = before @ (0.1 * drawn(features, features) / scales[:, None] * scales)
    change = change + (0.3 * drawn(classes, features)[labels] + 0.1 * drawn(images, features) + 1) * scales
    # One feature varies far more than it did.
    change[:, 0] *= 10
    # Of opposite sign: a large change that all images share.
    return (before + offset).to(dtype), (before + change - offset).to(dtype), labels


def spread(features, of_others=None):
    """Variance of each feature; none is quite zero."""
    variances = features.var(dim=0, correction=0)
    if of_others is not None:
        variances = torch.maximum(variances, of_others)
    return variances + 1e-12 * variances.sum()


def plain(before, change, ridge, variances):
    """What of the change centred features tell, by least squares with an observation more for each feature."""
    rows, values = before - before.mean(dim=0), change - change.mean(dim=0)
    pull = torch.diag((ridge * len(before) * variances).sqrt())
    return torch.linalg.lstsq(torch.cat([rows, pull]), torch.cat([values, torch.zeros_like(pull)])).solution


def plain_choice(before, after, labels, candidates, folds, variances):
    """The candidate that predicts the means of left-out classes best."""
    change, errors = after - before, torch.zeros(len(candidates), dtype=torch.float64)
    units = torch.maximum(variances, spread(after) / 10)
    for fold in range(folds):
        held = labels % folds == fold
        own = torch.stack([labels == label for label in labels[held].unique()]).double()
        own = own / own.sum(dim=1, keepdim=True)
        moved, found = own @ before - before[~held].mean(dim=0), own @ change - change[~held].mean(dim=0)
        for index, ridge in enumerate(candidates):
            weight = plain(before[~held], change[~held], ridge, variances)
            errors[index] += ((found - moved @ weight).square() / units).sum()
    return candidates[int(errors.argmin())]


def close(found, expected, tolerance=1e-9):
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# Of twelve features: fewer images, as many, one chunk, several.
@pytest.fixture(params=[9, 12, 30, 97])
def images(request, monkeypatch):
    monkeypatch.setattr(regression, "CHUNK", 30)
    return request.param


# A large offset leaves fewer digits for what differs between images.
@pytest.mark.parametrize(("offset", "tolerance"), [(0.0, 1e-9), (1e5, 1e-7)])
@pytest.mark.parametrize("known", [False, True])
def test_maps_are_those_of_all_images_at_once(images, offset, tolerance, known):
    before, after, labels = drifting(images, offset=offset)
    of_others = 2 * before.var(dim=0).flip(0) if known else None
    change = after - before
    weight = plain(before, change, 0.3, spread(before, of_others))
    found = fit_affine_map(before, after, 0.3, of_others)
    # Less the identity: what the map is for.
    close(found.weight - torch.eye(12).double(), weight, tolerance)
    close(found.bias, change.mean(dim=0) - before.mean(dim=0) @ weight, tolerance)
    errors = change - change.mean(dim=0) - (before - before.mean(dim=0)) @ weight
    close(found.residual, errors.T @ errors / images, tolerance)
    correction = fit_correction(before, change, labels, 0.3, of_others)
    close(correction[:-1], weight, tolerance)
    close(correction[-1], 7 / 9 * change.mean(dim=0) - before.mean(dim=0) @ weight, tolerance)


@pytest.mark.parametrize("offset", [0.0, 1e5])
@pytest.mark.parametrize("folds", [2, 5])
def test_the_ridge_is_that_of_all_images_at_once(images, offset, folds):
    # So close to each other that a small error would choose another.
    candidates, chosen = torch.logspace(-3, 2, 40).tolist(), []
    for seed in range(2):
        before, after, labels = drifting(images, offset=offset, seed=seed)
        of_others = 2 * before.var(dim=0).flip(0) if seed else None
        chosen.append(choose_ridge(before, after, labels, candidates, folds, of_others))
        expected = plain_choice(before, after, labels, candidates, folds, spread(before, of_others))
        assert chosen[-1] == expected
    assert any(min(candidates) < ridge < max(candidates) for ridge in chosen)


def test_errors_far_smaller_than_the_change_are_told():
    before, _, _ = drifting(200)
    noise = 1e-9 * torch.randn(200, 12, generator=torch.Generator().manual_seed(1)).double()
    residual = fit_affine_map(before, 2 * before + noise, ridge=0.0).residual
    torch.testing.assert_close(residual.diagonal(), torch.full((12,), 1e-18).double(), rtol=0.5, atol=0)
    assert torch.linalg.eigvalsh(residual).min() > 0


class PeakMemory(TorchDispatchMode):
    """Most bytes of tensors that live at once, besides those given."""

    def __init__(self, *given):
        super().__init__()
        self.peak, self.sizes = 0, WeakIdKeyDictionary()
        for tensor in given:
            self.sizes[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.sizes.setdefault(storage, storage.nbytes())
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize(
    "call",
    [choose_ridge, fit_correction, lambda before, after, labels: fit_affine_map(before, after)],
    ids=["choose", "correct", "map"],
)
def test_memory_is_for_matrices_and_a_chunk_but_not_for_all_images(monkeypatch, call):
    monkeypatch.setattr(regression, "CHUNK", 100)
    count, width = 10000, 40
    before, after, labels = drifting(count, width, dtype=torch.float32)
    with PeakMemory(before, after, labels) as memory:
        call(before, after, labels)
    # Of an image, numbers such as its class and whether it is held out.
    allowed = 8 * (8 * width * width + 6 * 100 * width + 5 * count)
    assert 8 * width * width < memory.peak < allowed < 8 * count * width / 4


def test_statistics_take_in_one_class_at_a_time():
    count, width = 20000, 40
    features, _, labels = drifting(count, width, classes=100, dtype=torch.float32)
    with PeakMemory(features, labels) as memory:
        ClassStatistics().update(features, labels)
    # Less than all of them in double precision; that all are finite is found in single.
    assert memory.peak < 8 * count * width
