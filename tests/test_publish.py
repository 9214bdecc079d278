"""Publishing: each form comes back the same in a fresh process, and nothing but its files leaves."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from huggingface_hub import HfApi
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_images, tiny_model, tiny_processor
from transformers import AutoModelForImageClassification

from dynammo_peft import DynammoConfig, DynammoLoraConfig
from dynammo_peft.hub import CardFacts, base_model, check_can_push, push_to_hub, save_pretrained
from dynammo_peft.hub.publish import publishable_files


REPO, BASE = "tester/cells", "tester/base"
LORA = {"config_cls": DynammoLoraConfig, "r": 2, "feature_modules": []}

# Load repositories and write their logits: with this package, and where neither it nor PEFT can be imported.
LOAD = """
import sys, torch, dynammo_peft
from peft import AutoPeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor
images, out = sys.argv[1:]
model = AutoPeftModel.from_pretrained("tester/adapter").eval()
with torch.no_grad():
    save_file({"adapter": model(load_file(images)["images"]).logits}, out)
print(sorted(model.config.id2label.items()), AutoImageProcessor.from_pretrained("tester/adapter").size["height"])
"""
LOAD_ALONE = """
import sys
sys.modules["dynammo_peft"] = sys.modules["peft"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification
images, out = sys.argv[1:]
logits = {}
for form, more in (("standalone", {"trust_remote_code": True}), ("stock", {})):
    model = AutoModelForImageClassification.from_pretrained(f"tester/{form}", **more).eval()
    with torch.no_grad():
        logits[form] = model(load_file(images)["images"]).logits
    print(sorted(model.config.id2label.items()), AutoImageProcessor.from_pretrained(f"tester/{form}").size["height"])
save_file(logits, out)
"""


def learned(base, config_cls=DynammoConfig, **options):
    """A model that looks as if it had learned three classes in two tasks."""
    model = get_peft_model(base, config_cls(classes=["a", "b"], **options), "task_000")
    model.add_adapter("task_001", config_cls(classes=["c"], **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key or "dynammo_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    model.add_weighted_adapter(["task_000", "task_001"])
    model.set_adapter("merged", inference_mode=True)
    return model.eval()


def logits_of(model, images=None):
    with torch.no_grad():
        return model(pixel_values=tiny_images("vit") if images is None else images).logits


def written(hub, repo=REPO, **more):
    return sorted(path for path in hub.files(repo, **more) if path != ".gitattributes")


def commits(hub, repo=REPO):
    return [commit.title for commit in hub.history(repo) if commit.author != "system"]


@pytest.fixture
def base(hub, waits):
    """A base model that was loaded from the Hub."""
    tiny_model("vit").push_to_hub(BASE)
    return AutoModelForImageClassification.from_pretrained(BASE)


@pytest.fixture
def model(base):
    return learned(base)


def test_each_form_gives_the_same_logits_in_a_fresh_process(hub, base, tmp_path):
    base_commit = hub.history(BASE)[0].oid
    convolutional, lora = learned(base), learned(AutoModelForImageClassification.from_pretrained(BASE), **LORA)
    # Whoever loads the adapter must not get what the base model's repository holds later.
    HfApi(token=hub.token).create_branch(BASE, branch="old")
    tiny_model("vit", seed=5).push_to_hub(BASE)
    expected = {}
    for form, model in (("adapter", convolutional), ("standalone", convolutional), ("stock", lora)):
        before = {
            name: (config.base_model_name_or_path, config.revision) for name, config in model.peft_config.items()
        }
        address = push_to_hub(model, f"tester/{form}", form, tiny_processor(32))
        assert address == f"{hub.url}/tester/{form}/commit/{hub.history(f'tester/{form}')[0].oid}"
        assert {name: (c.base_model_name_or_path, c.revision) for name, c in model.peft_config.items()} == before
        expected[form] = logits_of(model)
    save_file({"images": tiny_images("vit")}, tmp_path / "images")
    found = {}
    for home, code in (("with", LOAD), ("alone", LOAD_ALONE)):
        printed = hub.run(code, str(tmp_path / "images"), str(tmp_path / home), home=home).splitlines()
        assert set(printed) == {"[(0, 'a'), (1, 'b'), (2, 'c')] 32"}
        found |= load_file(tmp_path / home)
    assert torch.equal(found["adapter"], expected["adapter"])
    for form in ("standalone", "stock"):
        # Folded, and so summed up in another order.
        torch.testing.assert_close(found[form], expected[form], rtol=1e-4, atol=1e-5)
    common = ["README.md", "preprocessor_config.json"]
    assert written(hub, "tester/adapter") == sorted(["adapter_config.json", "adapter_model.safetensors", *common])
    assert written(hub, "tester/standalone") == sorted(
        ["config.json", "model.safetensors", "modeling_dynammo.py", *common]
    )
    assert written(hub, "tester/stock") == sorted(["config.json", "model.safetensors", *common])
    config = json.loads(hub.files("tester/adapter")["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, base_commit)
    assert base_commit in hub.files("tester/adapter")["README.md"].decode()


def test_task_adapters_go_into_subfolders(hub, base, model, tmp_path):
    push_to_hub(model, REPO, task_adapters=["task_000"])
    assert [path for path in written(hub) if "/" in path] == [
        "task_000/adapter_config.json",
        "task_000/adapter_model.safetensors",
    ]
    save_pretrained(model, tmp_path / "task", adapter_name="task_000")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert hub.files(REPO)[f"task_000/{name}"] == (tmp_path / "task" / name).read_bytes()
    with pytest.raises(ValueError, match="form='stock' holds one adapter; leave task_adapters out"):
        save_pretrained(model, tmp_path / "out", "stock", task_adapters=["task_000"])


def test_publishing_again_adds_a_commit_and_deletes_what_another_form_left(hub, model):
    hub.create_repo(REPO, files={"LICENSE": b"mine", "notes/a.txt": b"mine"})
    addresses = [push_to_hub(model, REPO, "adapter", tiny_processor(32), task_adapters=["task_000"])]
    first = hub.files(REPO)
    addresses += [push_to_hub(model, REPO, "standalone", commit_message="Now standalone")]
    assert written(hub) == sorted(
        ["LICENSE", "README.md", "config.json", "model.safetensors", "modeling_dynammo.py", "notes/a.txt"]
    )
    assert commits(hub) == ["Now standalone", "Add the model as adapter (3 classes)", "Add files"]
    assert hub.files(REPO, revision=addresses[0].rpartition("/")[2]) == first
    # The same again is no commit.
    assert push_to_hub(model, REPO, "standalone") == addresses[1] and len(commits(hub)) == 3
    push_to_hub(model, REPO, "standalone", revision="next", facts=None, commit_message="x")
    assert len(commits(hub)) == 3 and "next" in hub.repository(REPO).branches


def test_private_repositories(hub, model):
    push_to_hub(model, REPO, "standalone", private=True)
    assert hub.repository(REPO).private
    hub.create_repo("tester/public")
    for call in (
        lambda: check_can_push("tester/public", private=True),
        lambda: push_to_hub(model, "tester/public", private=True),
    ):
        with pytest.raises(ValueError, match="'tester/public' shall be private, but it is there already and public"):
            call()
    assert commits(hub, "tester/public") == []


def test_an_adapter_needs_its_base_model_on_the_hub(hub, base, tmp_path):
    base.save_pretrained(tmp_path / "copy")
    model = learned(AutoModelForImageClassification.from_pretrained(tmp_path / "copy"))
    with pytest.raises(ValueError, match="in a folder of this machine.*form='standalone'.*base_model='owner/name'"):
        save_pretrained(model, tmp_path / "out")
    save_pretrained(model, tmp_path / "out", base_model=BASE)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, hub.history(BASE)[0].oid)
    with pytest.raises(ValueError, match="'tester/base' holds the base model"):
        push_to_hub(model, BASE, base_model=BASE)
    # A backbone that was trained, a newer one, and ones that do not exist.
    with torch.no_grad():
        model.get_base_model().vit.layernorm.bias[3] += 1e-3
    before = (tmp_path / "out" / "adapter_config.json").read_bytes()
    with pytest.raises(ValueError, match="'vit.layernorm.bias' differs.*If the backbone was trained.*standalone"):
        save_pretrained(model, tmp_path / "out", base_model=BASE)
    with pytest.raises(ValueError, match="no 'tester/other'"):
        save_pretrained(model, tmp_path / "out", base_model="tester/other")
    with pytest.raises(ValueError, match="no such revision"):
        save_pretrained(model, tmp_path / "out", base_model=BASE, base_model_revision="v9")
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == before
    base_commit = hub.history(BASE)[0].oid
    model.set_backbone_requires_grad(True)
    base_model(model).push_to_hub("tester/trained")
    with warnings.catch_warnings():
        # A backbone that others can load is not missing.
        warnings.simplefilter("error")
        save_pretrained(model, tmp_path / "out", base_model="tester/trained")
    assert not json.loads((tmp_path / "out" / "adapter_config.json").read_text())["backbone_trained"]
    assert model.peft_config["merged"].backbone_trained
    save_pretrained(learned(tiny_model("vit")), tmp_path / "out", base_model=BASE, base_model_revision=base_commit)
    save_pretrained(model, tmp_path / "out", "standalone")
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def test_only_files_of_the_form_leave(hub, model, tmp_path, monkeypatch):
    folder = save_pretrained(model, tmp_path / "out", "standalone", tiny_processor(32))
    assert set(publishable_files(folder, "standalone")) == {path.name for path in folder.iterdir()}
    (folder / "memory.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="'memory.safetensors' is no part of a model published as form='standalone'"):
        publishable_files(folder, "standalone")
    (folder / "memory.safetensors").unlink()
    with pytest.raises(ValueError, match="'config.json' is no part"):
        publishable_files(folder, "adapter")

    class Processor:
        def save_pretrained(self, folder):
            (folder / self.name).write_text(self.content)

    processor = Processor()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name, content, message in [
        ("training.pkl", "", "'training.pkl' is no part"),
        ("preprocessor_config.json", '{"from": "/home/me/cells"}', "from='/home/me/cells'.*path of your machine"),
    ]:
        processor.name, processor.content = name, content
        with pytest.raises(ValueError, match=message):
            save_pretrained(model, folder, "standalone", processor)
        with pytest.raises(ValueError, match=message):
            push_to_hub(model, REPO, "standalone", processor)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.glob(".out*")) == [] and ("model", REPO) not in hub.repositories


def test_what_the_card_says_is_checked(hub, model, tmp_path):
    facts = CardFacts(name="cells", form="standalone", tasks=[["a", "b"], ["c"]], exemplar_images=True)
    save_pretrained(model, tmp_path / "out", "standalone", facts=facts)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No training images are included" in card and f"[{BASE}]" in card.replace("&#47;", "/")
    with pytest.raises(ValueError, match="facts are of form='standalone', not 'adapter'"):
        save_pretrained(model, tmp_path / "out", facts=facts)
    with pytest.raises(ValueError, match=r"name the classes \['b', 'a', 'c'\], but the model's are \['a', 'b', 'c'\]"):
        save_pretrained(model, tmp_path / "out", "standalone", facts=replace(facts, tasks=[["b", "a"], ["c"]]))
    with pytest.raises(ValueError, match="no adapter 'other' with classes; choose one of its own"):
        save_pretrained(model, tmp_path / "out", adapter_name="other")
    with pytest.raises(ValueError, match="form='onnx' does not exist"):
        save_pretrained(model, tmp_path / "out", "onnx")
    save_pretrained(model, tmp_path / "out", "standalone")
    assert "Not measured" in (tmp_path / "out" / "README.md").read_text()
