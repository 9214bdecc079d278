"""The adapter's configuration."""

from dataclasses import asdict

import pytest
from peft import PeftType

from dynammo_peft import DynammoConfig


def test_default_preset():
    config = DynammoConfig()
    assert config.peft_type is PeftType.DYNAMMO
    assert (config.reduction_factor, config.padding, config.scoring) == (None, 1, "log_odds")
    assert (config.kernel_size, config.init_alpha) == (3, 0.02)
    assert config.classes is config.target_modules is config.image_size is config.feature_modules is None


def test_paper_preset():
    config = DynammoConfig(preset="paper")
    assert (config.reduction_factor, config.padding, config.scoring) == (1, 0, "min_others")
    assert (config.kernel_size, config.init_alpha, config.feature_modules) == (3, 0.02, [])


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_explicit_values_win(preset):
    config = DynammoConfig(preset=preset, reduction_factor=2, padding=1, scoring="log_odds")
    assert (config.reduction_factor, config.padding, config.scoring) == (2, 1, "log_odds")
    # Zero is a value too.
    config = DynammoConfig(preset=preset, padding=0, scoring="min_others")
    assert (config.padding, config.scoring) == (0, "min_others")
    # So are an order of layers, and none of them.
    for modules in (["layers.3", "layers.0"], []):
        assert DynammoConfig(preset=preset, feature_modules=modules).feature_modules == modules


@pytest.mark.parametrize(
    "classes, heads, sizes, names",
    [
        (None, None, (), []),
        (["a", "b"], [["a", "b"]], (2,), ["a", "b"]),
        (("a",), [["a"]], (1,), ["a"]),
        ([["a", "b"], ["c"]], [["a", "b"], ["c"]], (2, 1), ["a", "b", "c"]),
        ([("a", "b"), ("c",)], [["a", "b"], ["c"]], (2, 1), ["a", "b", "c"]),
    ],
)
def test_classes_are_normalised(classes, heads, sizes, names):
    config = DynammoConfig(classes=classes)
    assert config.classes == heads
    assert config.head_sizes == sizes
    assert config.class_names == names


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
def test_module_lists_become_sets(name):
    assert getattr(DynammoConfig(**{name: ["layers.0", "layers.1"]}), name) == {"layers.0", "layers.1"}
    assert getattr(DynammoConfig(**{name: r".*layers\.0"}), name) == r".*layers\.0"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"preset": "fast"}, "preset='fast'.*'default', 'paper'"),
        ({"scoring": "max"}, "scoring='max'.*'log_odds', 'min_others'"),
        ({"classes": "abc"}, "classes='abc' must be a list of class names"),
        ({"classes": ["abc", ["d"]]}, "must be a list of class names, or a list of such lists"),
        ({"classes": ["a", "b", "a"]}, "'a' stands more than once"),
        ({"classes": [["a"], ["b", "a"]]}, "'a' stands more than once"),
        ({"classes": []}, "head without a class"),
        ({"classes": [["a"], []]}, "head without a class"),
        ({"classes": [["a", 1]]}, "strings.*1"),
        ({"reduction_factor": 0}, "reduction_factor=0"),
        ({"reduction_factor": -4}, "reduction_factor=-4"),
        ({"kernel_size": 0}, "kernel_size=0"),
        ({"padding": 3}, "padding=3.*kernel_size=3"),
        ({"padding": -1}, "padding=-1"),
        ({"kernel_size": 1}, "padding=1.*kernel_size=1"),
    ],
)
def test_errors_name_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        DynammoConfig(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"preset": "paper", "classes": ["a", "b"]},
        {"feature_modules": []},
        {"preset": "paper", "feature_modules": ["layers.3", "layers.0"]},
        {"preset": "paper", "padding": 1, "reduction_factor": 8, "scoring": "log_odds"},
        {
            "classes": [["a", "b"], ["c"]],
            "target_modules": ["layers.3", "layers.0"],
            "exclude_modules": r".*layers\.1",
            "head_module": "classifier",
            "feature_modules": ["layers.4", "layers.2"],
            "merge_weights": {"adapters": ["task_000"], "groups": [{"layer": "a", "weights": [0.5]}]},
            "reduction_factor": 4,
            "kernel_size": 5,
            "padding": 2,
            "init_alpha": 0.1,
            "image_size": [48, 32],
            "modules_to_save": ["layernorm"],
            "inference_mode": True,
        },
        {"target_modules": r".*\.blocks\.0", "image_size": 64},
    ],
)
def test_round_trip(arguments, tmp_path):
    config = DynammoConfig(**arguments)
    config.save_pretrained(tmp_path)
    assert asdict(DynammoConfig.from_pretrained(tmp_path)) == asdict(config)
