"""The recipe as a user runs it: real command lines, real files, new processes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import tiny_dataset, tiny_model, tiny_processor


ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "class_incremental.py"
sys.path.insert(0, str(RECIPE.parent))

from backbone import ModelArguments, adapter_config, choose_adapter  # noqa: E402
from class_incremental import run  # noqa: E402
from options import parse_arguments  # noqa: E402

from dynammo_peft import DynammoConfig, DynammoLoraConfig  # noqa: E402
from dynammo_peft.hub import load_method  # noqa: E402


LOAD = """
import sys, torch, dynammo_peft
from peft import AutoPeftModel
from transformers import AutoModelForImageClassification
from peft import PeftModel
from safetensors.torch import load_file, save_file
directory, images, out = sys.argv[1:]
base = AutoModelForImageClassification.from_pretrained(directory + "/backbone")
pixels = load_file(images)["pixels"]
with torch.no_grad():
    one = PeftModel.from_pretrained(base, directory + "/merged").eval()(pixels).logits
    two = AutoPeftModel.from_pretrained(directory + "/merged").eval()(pixels).logits
save_file({"peft": one, "auto": two}, out)
"""


def image_folder(root, classes=4, per_class=6, names=None):
    """Folders `train/<class>/` and `test/<class>/` of drawn images."""
    for split, seed in (("train", 0), ("test", 1)):
        data = tiny_dataset(classes, per_class, seed=seed, names=names)
        for index, row in enumerate(data):
            folder = root / split / data.features["label"].names[row["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{index:03d}.png")
    return root


def small_run(tmp_path, **options):
    """A YAML file for a run of seconds on an image folder, with a tiny model from disk."""
    model = tmp_path / "model"
    tiny_model("vit").save_pretrained(model)
    tiny_processor(32).save_pretrained(model)
    settings = {
        "model_name_or_path": str(model),
        "data_dir": str(image_folder(tmp_path / "data")),
        "output_dir": str(tmp_path / "out"),
        "classes_per_task": 2,
        "memory_size": 8,
        "adapter_epochs": 2,
        "adapter_batch_size": 8,
        "head_epochs": 5,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, **options}))
    return path


def fails_with(arguments, *expected, env=None):
    """Runs the recipe in a new process; it must end in one line that holds all of `expected`."""
    command = [sys.executable, RECIPE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode != 0
    error = done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    for text in expected:
        assert text in error


def test_a_saved_model_gives_the_same_logits_in_a_new_process(tmp_path):
    path = small_run(tmp_path, train_backbone=True)
    method, results = run([str(path)])
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = method.logits(pixels)
    save_file({"pixels": pixels}, tmp_path / "pixels.safetensors")
    arguments = [str(tmp_path / name) for name in ("out", "pixels.safetensors", "logits.safetensors")]
    subprocess.run([sys.executable, "-c", LOAD, *arguments], check=True, cwd=ROOT)
    found = load_file(tmp_path / "logits.safetensors")
    assert torch.equal(found["peft"], expected)
    assert torch.equal(found["auto"], expected)
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["last_accuracy"] == results.metrics()["last_accuracy"]
    assert report["tasks"] == [["class 0", "class 1"], ["class 2", "class 3"]]
    assert report["cost"]["multiply_adds"] > report["cost"]["multiply_adds_base"] > 0


def test_two_processes_print_and_save_once_and_average_their_statistics(tmp_path):
    path = small_run(tmp_path, adapter="conv", save_task_adapters=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, RECIPE, path], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Task 2/2 (class 2, class 3): accuracy") == 1
    assert sorted(folder.name for folder in (tmp_path / "out").iterdir() if folder.is_dir()) == [
        "merged",
        "task_000",
        "task_001",
    ]
    parts = [load_file(tmp_path / "out" / name / "adapter_model.safetensors") for name in ("task_000", "task_001")]
    merged = load_file(tmp_path / "out" / "merged" / "adapter_model.safetensors")
    key = next(key for key in merged if key.endswith("dynammo_up_norm.running_var"))
    torch.testing.assert_close(merged[key], 0.75 * parts[0][key] + 0.25 * parts[1][key])


def test_options_of_the_merge_and_the_heads(tmp_path):
    path = small_run(tmp_path, heads="exemplars", feature_modules=["layers.2"], merge="ties")
    method, _ = run([str(path), "--merge_options", '{"density": 0.5}'])
    assert (method.heads, method.merging.options) == ("exemplars", {"density": 0.5})
    assert method.model.peft_config["merged"].feature_modules == ["layers.2"]
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (report["options"]["merge"], report["options"]["merge_options"]) == ("ties", '{"density": 0.5}')


def test_streamed_images_give_the_same_results(tmp_path):
    path = small_run(tmp_path)
    _, results = run([str(path)])
    own = ["--streaming", "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "streamed")]
    _, streamed = run([str(path), *own])
    assert streamed.metrics() == results.metrics()
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".npy"] * 2


@pytest.mark.parametrize("method", ["dynammo", "acl"])
def test_mirror_images_are_seen_when_images_are_classified(tmp_path, method):
    options = {"method": method, "model_type": "resnet", "model_name_or_path": None, "flips": ["horizontal"]}
    options["config_overrides"] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    trained, _ = run([str(small_run(tmp_path, **options))])
    assert {config.flips == ["horizontal"] for config in trained.model.peft_config.values()} == {True}
    cost = json.loads((tmp_path / "out" / "results.json").read_text())["cost"]
    assert cost["ratio"] > 2


@pytest.mark.parametrize(
    "options, adapter",
    [
        ({}, "lora"),
        ({"reduction_factor": 4}, "conv"),
        ({"preset": "paper"}, "conv"),
        ({"adapter": "conv"}, "conv"),
        ({"model_type": "swin"}, "conv"),
    ],
)
def test_adapters_follow_from_the_model_and_the_options(options, adapter):
    args = ModelArguments(**options)
    model = tiny_model(options.get("model_type", "vit"))
    args.adapter = choose_adapter(args, model)
    assert args.adapter == adapter
    config = adapter_config(args)
    assert type(config) is {"lora": DynammoLoraConfig, "conv": DynammoConfig}[adapter]
    if adapter == "lora":
        assert (config.r, config.lora_alpha) == (8, 8)


def test_lora_is_reported_and_costs_nothing_in_the_weights(tmp_path, capsys):
    method, _ = run([str(small_run(tmp_path, lora_rank=4, lora_alpha=16))])
    config = method.model.peft_config["task_000"]
    assert (type(config), config.r, config.lora_alpha) == (DynammoLoraConfig, 4, 16)
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["options"]["adapter"] == "lora"
    cost = report["cost"]
    assert cost["ratio"] > cost["ratio_folded"] >= 1
    assert f"{cost['ratio_folded']:.3f} with LoRA in its weights" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["acl", "joint"])
def test_other_methods_run_from_the_same_file(tmp_path, method):
    trained, results = run([str(small_run(tmp_path)), "--method", method])
    assert len(results.seconds) == 2
    for name in trained.inference_adapters:
        assert (tmp_path / "out" / name / "adapter_model.safetensors").exists()


def test_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("memory_size: 30\nclasses_per_task: 3\nadapter_learning_rate: 0.5\n")
    structured = [
        "--groups",
        '[["a", "b"], ["c"]]',
        "--domains",
        '["x", ["x", 2]]',
        "--config_overrides",
        '{"depths": [1]}',
    ]
    modules = ["--feature_modules", "layers.1", "layers.3"]
    _, model_args, data_args, method_args = parse_arguments(
        [str(path), "--memory_size", "7", "--heads", "ridge", *structured, *modules]
    )
    assert (method_args.memory_size, method_args.adapter_learning_rate, method_args.heads) == (7, 0.5, "ridge")
    assert model_args.feature_modules == ["layers.1", "layers.3"]
    assert (data_args.groups, data_args.classes_per_task) == ([["a", "b"], ["c"]], 3)
    assert data_args.domains == ["x", ["x", 2]]
    assert model_args.config_overrides == {"depths": [1]}


@pytest.mark.parametrize(
    ("stage", "options", "rates"),
    [
        ("adapter", [], {0: 1e-2, 69: 1e-2, 70: 1e-3, 129: 1e-3, 130: 1e-4, 169: 1e-4, 170: 1e-5, 199: 1e-5}),
        ("head", [], {0: 1e-3, 54: 1e-3, 55: 1e-4, 79: 1e-4, 80: 1e-5, 99: 1e-5}),
        (
            "head",
            ["--head_epochs", "50", "--head_milestones", "0.3", "0.7"],
            {0: 1e-3, 14: 1e-3, 15: 1e-4, 34: 1e-4, 35: 1e-5, 49: 1e-5},
        ),
    ],
)
def test_the_papers_recipe_trains_as_the_paper(stage, options, rates):
    _, model_args, _, method_args = parse_arguments([str(ROOT / "recipes" / "paper.yaml"), *options])
    assert model_args.preset == "paper"
    optimization = method_args.optimization(stage)
    assert optimization.epochs == max(rates) + 1
    optimizer, schedule = optimization.make(torch.nn.Linear(2, 2), optimization.epochs)
    assert (type(optimizer).__name__, optimization.weight_decay) == (
        ("SGD", 5e-4) if stage == "adapter" else ("Adam", 0.0)
    )
    for epoch in range(optimization.epochs):
        if epoch in rates:
            assert schedule.get_last_lr()[0] == pytest.approx(rates[epoch])
        optimizer.step()
        schedule.step()


def test_lists_on_the_command_line():
    _, model_args, *_ = parse_arguments(["--flips", "horizontal", "vertical", "--feature_modules"])
    assert (model_args.flips, model_args.feature_modules) == (["horizontal", "vertical"], [])
    with pytest.raises(SystemExit):
        parse_arguments(["--flips", "diagonal"])


def test_a_single_value_in_a_file_stands_for_a_list_of_one(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("flips: horizontal\nfeature_modules: layers.0\n")
    _, model_args, *_ = parse_arguments([str(path)])
    assert (model_args.flips, model_args.feature_modules) == (["horizontal"], ["layers.0"])


def test_every_recipe_file_holds_only_options_that_exist():
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        parse_arguments([str(path)])


def test_an_unknown_option_in_a_file_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("memory_seize: 30\n")
    with pytest.raises(ValueError, match="'memory_seize' does not exist"):
        parse_arguments([str(path)])


def test_a_file_that_is_no_yaml_ends_in_one_line(tmp_path):
    (tmp_path / "run.yaml").write_text("memory_size: [40")
    fails_with([tmp_path / "run.yaml"], f"{tmp_path / 'run.yaml'} is no YAML")


def test_folders_beside_the_output_are_not_in_it_if_its_name_ends_in_a_slash(tmp_path):
    run_args, *_ = parse_arguments(["--output_dir", f"{tmp_path}/run/"])
    assert run_args.output_dir == str(tmp_path / "run")


def test_exemplars_that_a_state_does_not_name_are_refused(tmp_path):
    path = small_run(tmp_path, memory_size=0, classes_per_task=None)
    run([str(path), *tasks_of("class 0", "class 1"), "--save_learning_state"])
    going_on = ["--load_learning_state", str(tmp_path / "out"), "--output_dir", str(tmp_path / "more")]
    going_on += ["--data_dir", str(tmp_path / "data"), *tasks_of("class 2", "class 3"), "--exemplars_in_data_set"]
    with pytest.raises(ValueError, match="the learning state names no row as an exemplar"):
        run(going_on)


def test_an_unknown_option_on_the_command_line_ends_in_one_line(tmp_path):
    fails_with([small_run(tmp_path), "--memory_seize", "3"], "--memory_seize")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"memory_size": 3}, ["memory_size=3", "4 classes"]),
        ({"method": "magic"}, ["'magic'", "dynammo"]),
        ({"method": "acl", "heads": "lda"}, ["'heads'", "'acl'"]),
        ({"heads": "knn"}, ["heads='knn'", "'lda', 'ridge', 'gaussians', 'exemplars'"]),
        ({"feature_modules": ["layers.9"]}, ["'layers.9'", "feature_modules"]),
        ({"label_column": "kind"}, ["'kind'", "'label'"]),
        ({"groups": "[['class 0'"}, ["--groups", "JSON"]),
        ({"preset": "paper", "target_modules": ["layers.0"], "image_size": 8}, ["too small", "padding=1"]),
        ({"report_to": ["clearsky"]}, ["'clearsky'", "installed"]),
        ({"streaming": True}, ["train set", "stream", "cache_dir"]),
        ({"adapter_optimizer": "lion"}, ["optimizer='lion'", "adamw"]),
        (
            {"offload_adapters": "adapters", "save_task_adapters": True},
            ["save_task_adapters", "='adapters' keeps all"],
        ),
        ({"offload_adapters": "adapters", "merge": "fisher"}, ["merge='fisher'", "'linear', 'uniform'"]),
        ({"offload_adapters": "adapters", "merge": "cat"}, ["merge='cat'", "DynammoConfig", "adapter='conv'"]),
        ({"method": "joint", "save_learning_state": True}, ["method='joint'", "save_learning_state"]),
        ({"adapter": "Conv"}, ["adapter='Conv'", "'conv', 'lora'"]),
        ({"flips": ["diagonal"]}, ["'diagonal'", "'horizontal'"]),
        ({"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps=0", "at least 1"]),
        ({"data_dir": None}, ["'imagefolder' needs data_dir", "train/<class>/"]),
        ({"data_dir": "nowhere"}, ["data_dir='nowhere' is no folder", "train/<class>/"]),
        ({"adapter": "conv", "lora_rank": 4}, ["adapter='conv'", "lora_rank"]),
        ({"adapter": "lora", "reduction_factor": 4}, ["adapter='lora'", "reduction_factor"]),
        ({"classes_per_task": [2]}, ["classes_per_task=[2] must be one value"]),
        ({"output_dir": "/"}, ["/ is a mount point", "choose a folder in it"]),
        (
            {"model_type": None, "model_name_or_path": "base", "config_overrides": {"depth": 2}},
            ["config_overrides is for a new model (model_type)", "leave it out"],
        ),
    ],
)
def test_bad_input_stops_before_anything_is_written(tmp_path, options, expected):
    if "groups" in options:
        options["classes_per_task"] = None
    with pytest.raises(ValueError) as caught:
        run([str(small_run(tmp_path, **options))])
    assert "\n" not in str(caught.value)
    for text in expected:
        assert text in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_corrupt_image_ends_in_one_line_with_its_path(tmp_path):
    path = small_run(tmp_path)
    broken = tmp_path / "data" / "train" / "class 2" / "broken.png"
    broken.write_bytes(b"no image")
    fails_with([path], str(broken))
    assert not (tmp_path / "out").exists()


def test_a_full_output_folder_is_refused_unless_told_otherwise(tmp_path):
    path = small_run(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep")
    with pytest.raises(ValueError, match="overwrite_output_dir"):
        run([str(path)])
    assert (tmp_path / "out" / "precious.txt").read_text() == "keep"


def test_a_run_that_was_to_resume_does_not_replace_another(tmp_path):
    path = small_run(tmp_path)
    run([str(path)])
    shutil.rmtree(tmp_path / "out-checkpoints")
    with pytest.raises(ValueError, match="overwrite_output_dir"):
        run([str(path), "--resume_from_checkpoint", "latest"])


@pytest.mark.parametrize("option", [["--memory_size", "3"], ["--memory_size", "-1"], ["--data_dir", "nowhere"]])
def test_bad_options_leave_checkpoints_that_were_to_be_overwritten(tmp_path, option):
    path = small_run(tmp_path)
    run([str(path)])
    kept = sorted((tmp_path / "out-checkpoints").rglob("*"))
    assert any(file.suffix == ".json" for file in kept)
    with pytest.raises(ValueError):
        run([str(path), "--overwrite_output_dir", *option])
    assert sorted((tmp_path / "out-checkpoints").rglob("*")) == kept
    run([str(path), "--overwrite_output_dir"])


def test_what_is_not_there_ends_in_one_line(tmp_path):
    fails_with([tmp_path / "none.yaml"], "none.yaml", "No such file")
    path = small_run(tmp_path)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    fails_with([path, "--model_name_or_path", "models/none"], "'models/none' is no folder here", env=environment)


def test_held_out_images_take_the_place_of_a_test_folder(tmp_path):
    path = small_run(tmp_path)
    shutil.rmtree(tmp_path / "data" / "test")
    with pytest.raises(ValueError, match=r"test_split='test' does not exist .* or none with a validation_fraction"):
        run([str(path)])
    _, results = run([str(path), "--validation_fraction", "0.34"])
    assert len(results.references) == 8


def test_learning_goes_on_from_what_a_run_has_saved(tmp_path):
    path = small_run(tmp_path)
    method, _ = run([str(path), "--save_learning_state"])
    again = load_method(tmp_path / "out")
    assert again.groups == [["class 0", "class 1"], ["class 2", "class 3"]]
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again.logits(pixels), method.logits(pixels))


def test_a_saved_adapter_is_no_backbone(tmp_path):
    path = small_run(tmp_path)
    run([str(path)])
    again = ["--model_name_or_path", str(tmp_path / "out" / "merged"), "--output_dir", str(tmp_path / "again")]
    with pytest.raises(ValueError, match=r"has adapters already\. To go on .*load_method"):
        run([str(path), *again])
    assert not (tmp_path / "again").exists()


def test_adapters_of_old_tasks_go_to_the_folder(tmp_path):
    method, _ = run([str(small_run(tmp_path)), "--offload_adapters", str(tmp_path / "adapters")])
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == ["task_000", "task_001"]
    assert set(method.model.peft_config) == {"task_000", "merged", "task_001"}


def test_class_names_may_hold_any_character(tmp_path):
    names = ["naïve: cell", 'quoted "cell"', "Zelle ä", "細胞"]
    image_folder(tmp_path / "other", names=names)
    path = small_run(tmp_path, data_dir=str(tmp_path / "other"))
    method, _ = run([str(path)])
    assert sorted(method.model.config.id2label.values()) == sorted(names)


def tasks_of(*names):
    """The recipe's options for tasks of two classes each."""
    return ["--groups", json.dumps([list(pair) for pair in zip(names[::2], names[1::2])])]


@pytest.mark.parametrize("options", [{}, {"memory_size": 0}, {"method": "acl"}])
def test_a_run_that_goes_on_ends_as_one_that_was_never_done(options, tmp_path):
    path = small_run(tmp_path, classes_per_task=None, adapter_learning_rate=0.003, **options)
    image_folder(tmp_path / "data", classes=6)
    names = [f"class {index}" for index in (3, 0, 5, 1, 2, 4)]
    whole, expected = run([str(path), *tasks_of(*names), "--output_dir", str(tmp_path / "whole")])
    run([str(path), *tasks_of(*names[:4]), "--save_learning_state"])
    going_on = ["--load_learning_state", str(tmp_path / "out"), "--output_dir", str(tmp_path / "more")]
    going_on += ["--data_dir", str(tmp_path / "data"), *tasks_of(*names[4:])]
    with_exemplars = ["--exemplars_in_data_set"] if options.get("memory_size") != 0 else []
    method, results = run([*going_on, *with_exemplars])
    assert method.groups == whole.groups and method.arguments == whole.arguments
    pixels = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(method.logits(pixels), whole.logits(pixels))
    # What was learned before is measured as one task.
    assert results.groups == [names[:4], names[4:]]
    assert results.metrics()["last_accuracy"] == expected.metrics()["last_accuracy"]
    report = json.loads((tmp_path / "more" / "results.json").read_text())
    assert report["options"]["method"] == whole.name and report["learned_before"] == names[:4]


def test_going_on_takes_new_options_and_images_elsewhere(tmp_path, capsys):
    path = small_run(tmp_path)
    run([str(path), "--save_learning_state"])
    image_folder(tmp_path / "new", classes=3, names=["x", "y", "z"])
    options = {
        "load_learning_state": str(tmp_path / "out"),
        "data_dir": str(tmp_path / "new"),
        "output_dir": str(tmp_path / "more"),
        "classes_per_task": 2,
        "adapter_epochs": 1,
    }
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(options))
    capsys.readouterr()
    command = [str(tmp_path / "more.yaml"), "--seed", "7", "--save_learning_state"]
    method, results = run(command)
    assert method.class_names == [*(f"class {index}" for index in range(4)), "x", "y", "z"]
    assert (method.arguments.adapter_epochs, method.arguments.seed, method.arguments.memory_size) == (1, 7, 8)
    assert "Task 3/4 (x, y)" in capsys.readouterr().out and results.groups == [["x", "y"], ["z"]]
    # Interrupted runs go on by their checkpoints, whatever they went on from.
    _, resumed = run([*command, "--resume_from_checkpoint", "latest"])
    assert "Task 3/4" not in capsys.readouterr().out and resumed.metrics() == results.metrics()
    assert load_method(tmp_path / "more").groups == method.groups


@pytest.mark.parametrize(
    "options, expected",
    [
        ("--load_learning_state {}/nothing", "nothing has no learning_state.json"),
        ("--load_learning_state {}/out --lora_rank 4", "brings its model and adapters along; leave lora_rank"),
        ("--load_learning_state {}/out --method acl", "method='acl' cannot go on with what method='dynammo'"),
        ("--load_learning_state {0}/out --output_dir {0}/out --overwrite_output_dir", "choose another, so that"),
        ("--exemplars_in_data_set", "exemplars_in_data_set is for going on to learn; give load_learning_state"),
    ],
)
def test_going_on_from_something_else_is_refused(options, expected, tmp_path):
    path = small_run(tmp_path)
    run([str(path), "--save_learning_state"])
    (tmp_path / "nothing").mkdir()
    plain = ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "more"), "--classes_per_task", "2"]
    with pytest.raises(ValueError, match=re.escape(expected)):
        run([*plain, *options.format(tmp_path).split()])
    assert not (tmp_path / "more").exists()
