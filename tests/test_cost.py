"""Floating-point operations and parameters of a forward pass, against counts by hand."""

import pytest
import torch
from tiny import tiny_images, tiny_model
from torch import nn
from torch.nn import functional as F

from dynammo_peft import Cost, forward_cost


class Reuse(nn.Module):
    """A layer that runs twice, one that shares its weight, and one that never runs."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.twice.weight
        self.unused = nn.Linear(100, 100)

    def forward(self, x):
        return self.tied(self.twice(self.twice(x)))


@pytest.mark.parametrize(
    ("layer", "shape", "multiply_adds", "parameters"),
    [
        (nn.Linear(3, 5), (2, 3), 2 * 3 * 5, 3 * 5 + 5),
        (nn.Linear(3, 5, bias=False), (2, 7, 3), 2 * 7 * 3 * 5, 3 * 5),
        (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 5), 2 * 6 * 5 * 4 * 3 * 9, 4 * 3 * 9 + 4),
        (nn.Conv2d(4, 8, 3, groups=2, bias=False), (1, 4, 6, 6), 4 * 4 * 8 * 2 * 9, 8 * 2 * 9),
        (nn.ConvTranspose2d(3, 4, 3, bias=False), (1, 3, 6, 5), 6 * 5 * 3 * 4 * 9, 3 * 4 * 9),
        # What is done element by element costs nothing, but its parameters are there.
        (nn.BatchNorm2d(6), (2, 6, 4, 4), 0, 6 + 6),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (1, 3), 3 * 4 + 4 * 2, 3 * 4 + 4 + 4 * 2 + 2),
    ],
)
def test_layers(layer, shape, multiply_adds, parameters):
    cost = forward_cost(layer, lambda: layer(torch.randn(shape)))
    assert cost == Cost(flops=2 * multiply_adds, parameters=parameters)
    assert cost.multiply_adds == multiply_adds


def test_attention():
    # The scores and the values: two products of 17 x 17 x 8 for each of 2 images and 3 heads.
    query = torch.randn(2, 3, 17, 8)
    cost = forward_cost(nn.Identity(), lambda: F.scaled_dot_product_attention(query, query, query))
    assert cost == Cost(flops=2 * (2 * 2 * 3 * 17 * 17 * 8), parameters=0)


def test_what_runs_is_counted_and_parameters_once():
    model = Reuse()
    assert forward_cost(model, lambda: model(torch.randn(1, 4))) == Cost(flops=3 * 2 * 4 * 4, parameters=4 * 4 + 4)


def test_several_forwards_of_a_part():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)])

    def forward():
        return model[1](torch.randn(3, 4)), model[1](torch.randn(1, 4))

    assert forward_cost(model, forward) == Cost(flops=2 * (3 + 1) * 4 * 2, parameters=4 * 2 + 2)


def test_vision_transformer():
    model = tiny_model("vit")
    width, inner, tokens, patches = 32, 64, 17, 16
    layer = tokens * (4 * width * width + 2 * width * inner) + 2 * tokens * tokens * width
    multiply_adds = patches * 3 * 8 * 8 * width + 5 * layer + width * 3
    cost = forward_cost(model, lambda: model(tiny_images("vit", count=1)))
    assert cost.multiply_adds == multiply_adds
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = nn.Sequential(nn.Linear(4, 4))

    def forward():
        model(torch.randn(1, 4))
        if fails:
            raise RuntimeError("out of memory")

    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            forward_cost(model, forward)
    else:
        forward_cost(model, forward)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model(torch.randn(1, 4)).requires_grad
