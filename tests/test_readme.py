"""The code of the README and of the API page runs as it is printed."""

import re
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, get_peft_model
from test_recipe import image_folder
from tiny import tiny_dataset, tiny_images, tiny_model, tiny_processor
from transformers import AutoModelForImageClassification, pipeline

from dynammo_peft import ClassIncrementalScenario, Dynammo, DynammoArguments, Learner
from dynammo_peft.merging import COMBINATIONS, adapter_tensors


ROOT = Path(__file__).parent.parent


def code_of(page):
    return re.findall(r"```py\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_model("vit").save_pretrained("facebook/deit-tiny-patch16-224")
    tiny_processor(32).save_pretrained("facebook/deit-tiny-patch16-224")
    image_folder(tmp_path / "cells", classes=4, per_class=12)
    learn, load, _ = code_of("README.md")
    exec(learn, {})
    assert "'last_accuracy': " in capsys.readouterr().out
    names = {"pixel_values": torch.randn(1, 3, 32, 32)}
    exec(load, names)
    assert names["label"] in {f"class {index}" for index in range(4)}
    # As the text below the code says.
    learned = AutoPeftModel.from_pretrained("cells-model/merged").eval()
    loaded = AutoModelForImageClassification.from_pretrained("cells-model/merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(names["pixel_values"]).logits, learned(names["pixel_values"]).logits)
    found = pipeline("image-classification", model="cells-model/merged")(tiny_dataset()[0]["image"])
    assert len(found) == 4


def test_the_code_about_interruptions_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in code_of("docs/scaling.md") if "resume_from_checkpoint" in block]
    scenario = ClassIncrementalScenario(
        tiny_dataset(4, 6), tiny_dataset(4, 2), tiny_processor(32), classes_per_task=2, progress=False
    )
    steps = []
    for _ in range(2):
        method = Dynammo(tiny_model("vit"), DynammoArguments(adapter_epochs=1, memory_size=4))
        exec(block, {"method": method, "scenario": scenario})
        steps.append(sorted(path.name for path in (tmp_path / "runs" / "cells").glob("checkpoint-*.json")))
    assert steps[0] == steps[1] != []


def base_on(hub, tmp_path):
    """The README's base model, on a Hub."""
    folder = tmp_path / "base"
    tiny_model("vit").save_pretrained(folder)
    tiny_processor(32).save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.create_repo("facebook/deit-tiny-patch16-224", files=files)


def test_the_readme_publishes(hub, waits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base_on(hub, tmp_path)
    image_folder(tmp_path / "cells", classes=4, per_class=12)
    learn, _, publish = code_of("README.md")
    exec(f"{learn}\n{publish.replace('me/cells', 'tester/cells')}", {})
    assert {"adapter_model.safetensors", "README.md", "preprocessor_config.json"} <= set(hub.files("tester/cells"))


def test_the_code_of_the_hub_page_runs(hub, waits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base_on(hub, tmp_path)
    data = tiny_dataset(classes=3, per_class=10, names=["monocyte", "platelet", "basophil"])
    names = {"train": data, "test": data, "image_processor": tiny_processor(32)}
    model = AutoModelForImageClassification.from_pretrained("facebook/deit-tiny-patch16-224")
    names["method"] = Dynammo(model, DynammoArguments(memory_size=12, adapter_epochs=1))
    scenario = ClassIncrementalScenario(data, data, tiny_processor(32), groups=[["monocyte", "platelet"]])
    names["results"] = Learner(names["method"]).fit(scenario)
    for block in code_of("docs/hub.md"):
        exec(block.replace("me/cells", "tester/cells"), names)
    assert names["method"].groups == [["monocyte", "platelet"], ["basophil"]]
    standalone, first, second = reversed(hub.history("tester/cells")[:3])
    assert "modeling_dynammo.py" in standalone.files
    assert "learning_state.json" in first.files
    assert "task_001/adapter_model.safetensors" in set(second.files) - set(first.files)
    assert (tmp_path / "cells" / "config.json").exists()


@pytest.fixture
def fresh_table():
    before = dict(COMBINATIONS)
    yield
    COMBINATIONS.clear()
    COMBINATIONS.update(before)


def test_the_code_of_the_api_page_runs(tmp_path, monkeypatch, capsys, fresh_table):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "other-base")):
        tiny_model("vit", seed).save_pretrained(name)
        tiny_processor(32).save_pretrained(name)
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"], init_lora_weights=False)
        get_peft_model(tiny_model("vit"), config).save_pretrained(f"lora-{name}")
    generator = torch.Generator().manual_seed(0)
    names = {
        "torch": torch,
        "examples": [(image, index % 3) for index, image in enumerate(tiny_images("vit", 8))],
        "features": torch.randn(30, 4, generator=generator),
        "labels": torch.arange(30) % 3,
        "features_after_a_merge": torch.randn(30, 4, generator=generator),
        "features_of_new_classes": torch.randn(20, 4, generator=generator),
        "new_labels": 3 + torch.arange(20) % 2,
        "train": tiny_dataset(classes=3, per_class=10),
        "two_hospitals": tiny_dataset(classes=3, per_class=16).add_column("hospital", ["north", "south"] * 24),
    }
    blocks = code_of("docs/api.md")
    assert len([line for line in blocks[0].splitlines() if line]) == 8
    for block in blocks:
        exec(block, names)
    assert (tmp_path / "lora-merged" / "merged" / "adapter_model.safetensors").exists()
    assert set(names["weights"].as_dict()["adapters"]) == {"a", "b"}
    assert names["weight"].shape == (5, 4)
    assert names["model"].active_adapter == "both"
    assert {"fisher", "regmean"} <= names["model"].peft_config.keys()
    both = adapter_tensors(names["model"], "both")
    assert all(torch.equal(tensor, both[key]) for key, tensor in names["soup"].tensors.items())
    assert names["shares"].adapters == ("first", "second")
    assert len(list((tmp_path / "decoded").iterdir())) == 2
    assert [len(row) for row in names["metrics"]["accuracy_matrix"]] == [1, 2, 3]
    assert names["method"].class_names == ["class 0", "class 1", "class 2"]
    assert len(capsys.readouterr().out.strip().splitlines()) == 2
