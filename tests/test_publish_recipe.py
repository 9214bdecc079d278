"""The recipe publishes what it has learned, or says before it learns why it cannot."""

import json
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml
from test_publish import BASE, REPO, commits, written
from test_recipe import image_folder
from tiny import tiny_model, tiny_processor


ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "class_incremental.py"
sys.path.insert(0, str(RECIPE.parent))

from class_incremental import main, run  # noqa: E402

from dynammo_peft.hub import from_pretrained, load_method, save_model  # noqa: E402


@pytest.fixture
def recipe_file(tmp_path):
    """A YAML file for a run of seconds: four digits in two tasks."""

    def write(**options):
        settings = {
            "dataset_name": "digits",
            "output_dir": str(tmp_path / "out"),
            "model_name_or_path": BASE,
            "image_size": 32,
            "groups": [["0", "1"], ["2", "3"]],
            "memory_size": 8,
            "adapter_epochs": 1,
            "push_to_hub": True,
            "hub_model_id": REPO,
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**settings, **options}))
        return path

    return write


def test_the_recipe_publishes_what_it_has_learned(hub, waits, recipe_file, tmp_path):
    tiny_model("vit").push_to_hub(BASE)
    tiny_processor(32).push_to_hub(BASE)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    options = ["--hub_private_repo", "--hub_license", "mit", "--save_task_adapters"]
    done = subprocess.run(
        [*launch, RECIPE, recipe_file(), *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=hub.environment("recipe", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr
    published = hub.history(REPO)[0]
    assert f"Published at {hub.url}/{REPO}/commit/{published.oid}" in done.stdout
    assert commits(hub) == ["Learn 4 classes in 2 tasks by dynammo"] and hub.repository(REPO).private
    assert {"adapter_config.json", "task_000/adapter_config.json", "task_001/adapter_model.safetensors"} <= set(
        written(hub)
    )
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    card = hub.files(REPO)["README.md"].decode()
    data = yaml.safe_load(card.split("---\n")[1])
    measures = {m["type"]: m["value"] for m in data["model-index"][0]["results"][0]["metrics"]}
    assert measures["accuracy"] == report["last_accuracy"]
    assert (data["license"], data["base_model"], data["base_model_relation"]) == ("mit", BASE, "adapter")
    for text in (
        "32 x 32",
        "split test",
        "scikit-learn&#39;s",
        "memory&#95;size" if "&#95;" in card else "memory_size",
    ):
        assert text in card, text
    assert f"{report['cost']['multiply_adds'] / 1e6:.4g} M" in card
    assert str(tmp_path) not in card and not any(name.startswith(("hub", "push")) for name in report["options"])
    # What was published is what was saved.
    saved = (tmp_path / "out" / "merged" / "adapter_model.safetensors").read_bytes()
    assert saved == hub.files(REPO)["adapter_model.safetensors"]


def test_learning_goes_on_with_the_commit_that_it_began_with(hub, waits, recipe_file, tmp_path):
    """Another commit has other weights, behind which adapters are of no use."""
    tiny_processor(32).push_to_hub(BASE)
    tiny_model("vit").push_to_hub(BASE)
    method, _ = run([str(recipe_file(push_to_hub=False, hub_model_id=None)), "--save_learning_state"])
    tiny_model("vit", seed=1).push_to_hub(BASE)
    again = load_method(tmp_path / "out")
    assert again.config.revision == hub.history(BASE)[1].oid
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again.logits(images), method.logits(images))
    # Where the backbone itself goes along there is no commit.
    save_model(again.model, tmp_path / "whole", ["merged"], save_backbone=True)
    assert from_pretrained(tmp_path / "whole", "merged").peft_config["merged"].revision is None


@pytest.mark.parametrize("test_images_of_before", ["all", "some", "none"])
def test_what_was_published_goes_on_and_is_published_again(hub, waits, recipe_file, tmp_path, test_images_of_before):
    tiny_model("vit").push_to_hub(BASE)
    tiny_processor(32).push_to_hub(BASE)
    run([str(recipe_file(hub_learning_state=True))])
    going_on = {"load_learning_state": REPO, "output_dir": str(tmp_path / "more")}
    going_on |= {"push_to_hub": True, "hub_model_id": REPO, "hub_learning_state": True}
    if test_images_of_before == "all":
        going_on |= {"dataset_name": "digits", "groups": [["4", "5"]]}
    else:
        names = ["4", "5"] if test_images_of_before == "none" else ["4", "5", "0"]
        images = image_folder(tmp_path / "new", classes=len(names), names=names)
        going_on |= {"data_dir": str(images), "groups": [["4", "5"]]}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(going_on))
    method, results = run([str(tmp_path / "more.yaml")])
    assert commits(hub) == ["Learn 6 classes in 3 tasks by dynammo", "Learn 4 classes in 2 tasks by dynammo"]
    files = hub.files(REPO)
    assert json.loads(files["learning_state.json"])["classes"] == method.groups == [["0", "1"], ["2", "3"], ["4", "5"]]
    assert (files["README.md"].count(b"| 5 | ") > 0) and BASE.encode() in files["README.md"]
    assert "load_learning_state" not in files["README.md"].decode()
    card = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert "what earlier classes were learned from is not known" in files["README.md"].decode()
    if test_images_of_before == "all":
        measures = {m["type"]: m["value"] for m in card["model-index"][0]["results"][0]["metrics"]}
        assert measures["accuracy"] == results.metrics()["last_accuracy"]
    else:
        # What some classes' images tell is not said of a model of six.
        assert "model-index" not in card


@pytest.mark.parametrize("request_of_the_push", ["*/preupload/*", "*/commit/*"])
def test_a_run_killed_while_it_pushes_is_published_once_resumed(
    hub, waits, recipe_file, tmp_path, request_of_the_push
):
    tiny_model("vit").push_to_hub(BASE)
    tiny_processor(32).push_to_hub(BASE)
    command = [sys.executable, RECIPE, recipe_file(), "--resume_from_checkpoint", "latest"]
    settings = {"cwd": ROOT, "env": hub.environment("recipe", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")}
    before = len(hub.requests)
    hub.slow(request_of_the_push, 600)
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **settings)
    while not any(fnmatch(record.url, request_of_the_push) for record in hub.requests[before:]):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert commits(hub) == [] and (tmp_path / "out" / "results.json").exists()
    steps = sorted(path.name for path in (tmp_path / "out-checkpoints").glob("*.json"))
    done = subprocess.run(command, capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stderr
    # Nothing was trained again.
    assert "Task 1/2" not in done.stdout
    assert sorted(path.name for path in (tmp_path / "out-checkpoints").glob("*.json")) == steps
    assert commits(hub) == ["Learn 4 classes in 2 tasks by dynammo"]
    saved = (tmp_path / "out" / "merged" / "adapter_model.safetensors").read_bytes()
    assert saved == hub.files(REPO)["adapter_model.safetensors"]


def test_without_a_token_the_recipe_ends_before_it_learns(hub, waits, recipe_file, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(sys, "argv", ["class_incremental.py", str(recipe_file())])
    with pytest.raises(SystemExit) as caught:
        main()
    assert str(caught.value).startswith("error: There is no token for the Hub; log in by `hf auth login`")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hub_model_id": None}, "set hub_model_id"),
        ({"hub_form": "onnx"}, "hub_form='onnx' does not exist"),
        ({"hub_learning_state": True, "hub_form": "standalone"}, "leave hub_learning_state out, or set hub_form="),
        ({"hub_learning_state": True, "method": "joint"}, "method='joint' does not go on learning"),
        ({"method": "acl"}, "method='acl' keeps an adapter for each task"),
        ({"model_name_or_path": "tests"}, "backbone is new or in a folder; set hub_form='standalone'"),
        ({"model_name_or_path": None, "model_type": "vit"}, "backbone is new or in a folder"),
        ({"train_backbone": True}, "train_backbone is set; set hub_form='standalone', or leave train_backbone out"),
        ({"hub_form": "stock"}, "set adapter='lora'"),
        ({"hub_form": "stock", "adapter": "lora"}, "give --feature_modules without a value"),
        ({"hub_form": "stock", "adapter": "lora", "feature_modules": ["layers.1"]}, "give --feature_modules without"),
        (
            {"hub_form": "stock", "adapter": "lora", "feature_modules": [], "scoring": "min_others"},
            "needs scoring='log_odds'",
        ),
        (
            {"hub_form": "stock", "adapter": "lora", "feature_modules": [], "flips": ["vertical"]},
            "leave out flips",
        ),
        ({"hub_model_id": "elsewhere/cells"}, "belongs to 'elsewhere', but the token to 'tester'"),
    ],
)
def test_what_cannot_be_published_is_refused_before_anything_is_loaded(
    hub, waits, recipe_file, monkeypatch, options, message
):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        run([str(recipe_file(**options))])
    assert not any(BASE in record.url for record in hub.requests)
