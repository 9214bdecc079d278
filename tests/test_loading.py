"""Loading published adapters: what was saved comes back, and what is wrong is said in a line and changes nothing."""

import copy
import json
import shutil

import pytest
import torch
from huggingface_hub import HfApi, constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, tiny_images, tiny_model
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification

from dynammo_peft import DynammoConfig, DynammoLoraConfig
from dynammo_peft.hub import from_pretrained, load_adapter, save_model
from dynammo_peft.hub.loading import find_file


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = {"dynammo": DynammoConfig, "lora": DynammoLoraConfig}
REPO = "tester/cells"
DOWN = "base_model.model.vit.layers.0.dynammo_down.weight"
STEPS = "base_model.model.vit.layers.0.dynammo_down_norm.num_batches_tracked"


def logits(model, name="vit"):
    with torch.no_grad():
        return model(tiny_images(name)).logits


def trained(base, config_cls=DynammoConfig):
    """A merged adapter that is not as a fresh one."""
    model = get_peft_model(base, config_cls(classes=["a", "b"]), "task_000")
    model.add_adapter("task_001", config_cls(classes=["c"]))
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "task_" in name:
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(index))
    model.add_weighted_adapter(["task_000", "task_001"])
    model.set_adapter("merged", inference_mode=True)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The base model, and for each method the saved adapter's folder and the logits of the model that was saved."""
    root, found = tmp_path_factory.mktemp("saved"), {}
    tiny_model("vit").save_pretrained(root / "base")
    for kind, config_cls in KINDS.items():
        model = trained(AutoModelForImageClassification.from_pretrained(root / "base"), config_cls)
        save_model(model, root / kind, ["merged"])
        found[kind] = (root / kind, logits(model))
    return root / "base", found


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved adapter, to be spoiled."""
    return shutil.copytree(saved[1]["dynammo"][0] / "merged", tmp_path / "adapter")


@pytest.fixture(scope="module")
def in_memory():
    """A model with an adapter in training, and a base model; both as they were before every test."""
    model = get_peft_model(tiny_model("vit"), DynammoConfig(classes=["a", "z"]), "task_000").train()
    return model, state_of(model), (base := tiny_model("vit")), state_of(base)


def state_of(model):
    """All that loading could change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "hooks": [list(getattr(module, name).items()) for module in model.modules() for name in hooks],
        "parameters": [(name, id(item), item.requires_grad, item.device) for name, item in model.named_parameters()],
        "configs": {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()},
        "active": list(getattr(model, "active_adapters", [])) if isinstance(model, PeftModel) else None,
        "labels": (dict(model.config.id2label), dict(model.config.label2id), model.config.problem_type),
        "names": sorted(vars(model)),
    }


def assert_unchanged(model, before):
    now, before = state_of(model), dict(before)
    tensors, known = now.pop("tensors"), before.pop("tensors")
    assert tensors.keys() == known.keys() and all(torch.equal(tensors[name], known[name]) for name in known)
    assert now == before


def message(action, *arguments, **options):
    """The line that an action fails with."""
    with pytest.raises(ValueError) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused(in_memory, place, **options):
    """What is said of a bad adapter, which is the same for both ways to load it, and changes no model."""
    model, before, base, base_before = in_memory
    said = message(from_pretrained, place, base_model=base, **options)
    assert_unchanged(base, base_before)
    assert message(load_adapter, model, place, "other", **options) == said
    assert_unchanged(model, before)
    return said


def edit(folder, **changes):
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **changes}))


def edit_tensors(folder, **changes):
    """Replaces tensors by their names; `None` takes one out."""
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_comes_back_from_a_subfolder_and_from_the_root(saved, kind):
    place, expected = saved[1][kind]
    for arguments in ({"subfolder": "merged"}, {"subfolder": "merged/", "adapter_name": "cells"}):
        model = from_pretrained(str(place), **arguments)
        assert torch.equal(logits(model), expected)
        assert model.active_adapters == [arguments.get("adapter_name", "merged")]
        assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "dynammo" in name)
    assert torch.equal(logits(from_pretrained(place / "merged")), expected)


@pytest.mark.parametrize("name", ["convnext", "resnet_basic", "swin", "dinov2"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_architectures_come_back(tmp_path, name, kind):
    model = trained(tiny_model(name), KINDS[kind])
    save_model(model, tmp_path / "out", ["merged"])
    loaded = from_pretrained(tmp_path / "out" / "merged", base_model=tiny_model(name))
    assert torch.equal(logits(loaded, name), logits(model, name))


@pytest.mark.parametrize("kind", KINDS)
def test_a_further_adapter_is_loaded_beside_others(saved, kind):
    place, expected = saved[1][kind]
    model = get_peft_model(tiny_model("vit"), KINDS[kind](classes=["a", "z"]), "task_000").eval()
    before = logits(model)
    load_adapter(model, place, "merged", subfolder="merged")
    assert model.active_adapters == ["task_000"] and torch.equal(logits(model), before)
    assert all(p.requires_grad == ("task_000" in name) for name, p in model.named_parameters() if "dynammo" in name)
    model.set_adapter("merged", inference_mode=True)
    assert torch.equal(logits(model), expected)


def test_an_adapter_without_classes_comes_back(tmp_path):
    model = get_peft_model(tiny_model("vit"), DynammoConfig(), "task_000")
    nn.init.ones_(model.get_submodule("base_model.model.vit.layers.0").dynammo_up_norm["task_000"].weight)
    save_model(model.eval(), tmp_path / "out", ["task_000"])
    loaded = from_pretrained(tmp_path / "out" / "task_000", base_model=tiny_model("vit"))
    assert torch.equal(logits(loaded), logits(model))


def test_a_base_model_that_looks_at_values_is_copied_with_them(folder):
    class Careful(type(tiny_model("vit"))):
        def forward(self, pixel_values, **kwargs):
            assert pixel_values.sum().item() == pixel_values.sum().item()
            return super().forward(pixel_values, **kwargs)

    base = tiny_model("vit")
    base.__class__ = Careful
    before = state_of(base)
    edit(folder, kernel_size=5)
    assert "has shape [1, 32, 3, 3] instead of [1, 32, 5, 5]" in message(from_pretrained, folder, base_model=base)
    assert_unchanged(base, before)
    edit(folder, kernel_size=3)
    assert from_pretrained(folder, base_model=base).active_adapters == ["merged"]


NO_CONFIG = [
    (b'{"peft_type": ', "is no JSON (Expecting value"),
    (b"\xff\xfe", "is no JSON"),
    (b"[" * 100_000, "is no JSON"),
    (b'{"peft_type": "DYNAMMO", "init_alpha": NaN}', "is no JSON (NaN is no number of JSON)"),
    (b'["DYNAMMO"]', "must be a JSON object, got ['DYNAMMO']"),
    (b"{}", "peft_type=None is not known; DYNAMMO and DYNAMMO_LORA are."),
]


@pytest.mark.parametrize("content, expected", NO_CONFIG)
def test_a_configuration_that_is_none_is_refused(folder, in_memory, content, expected):
    (folder / CONFIG).write_bytes(content)
    said = refused(in_memory, folder)
    assert said.startswith(f"{folder}/{CONFIG}: ") and expected in said


BAD_FIELDS = [
    ({"peft_type": "SPARKLE"}, "peft_type='SPARKLE' is not known"),
    ({"peft_type": ["DYNAMMO"]}, "peft_type=['DYNAMMO'] is not known"),
    ({"peft_type": "LORA"}, "peft_type='LORA' is a method of PEFT itself: load it by peft.PeftModel.from_pretrained."),
    ({"sparkle": 1}, "Field 'sparkle' is not known; a newer version of dynammo_peft or PEFT may have written it"),
    ({"zeal": 1, "sparkle\n": 2}, r"Field 'sparkle\n' (and 1 more) is not known"),
    ({"runtime_config": {}}, "Field 'runtime_config' is not known"),
    ({"kernel_size": "3"}, "kernel_size='3' must be a whole number."),
    ({"kernel_size": True}, "kernel_size=True must be a whole number."),
    ({"kernel_size": None}, "kernel_size=None must be a whole number."),
    ({"inference_mode": 1}, "inference_mode=1 must be true or false."),
    ({"init_alpha": "big"}, "init_alpha='big' must be a number."),
    ({"classes": ["a", ["b"]]}, "classes=['a', ['b']] must be a list of a list of text or a list of text."),
    ({"target_modules": [1]}, "target_modules=[1] must be a list of text or text."),
    ({"merge_weights": []}, "merge_weights=[] must be an object."),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path=3 must be text."),
    ({"preset": 3}, "preset=3 must be one of 'default', 'paper'."),
    ({"kernel_size": 0}, "kernel_size=0 must be at least 1."),
    ({"padding": 3}, "padding=3 must be at least 0 and less than kernel_size=3."),
    ({"scoring": "loudest"}, "scoring='loudest' does not exist; choose one of 'log_odds', 'min_others'."),
    ({"classes": ["a", "a"]}, "Class 'a' stands more than once in classes"),
    ({"classes": []}, "classes holds a head without a class"),
    ({"image_size": 0}, "image_size=0 must be a number of pixels, or height and width."),
    ({"image_size": [32]}, "image_size=[32] must be"),
    ({"image_size": [32, -32]}, "image_size=[32, -32] must be"),
    ({"image_size": 4}, "cannot process an image of 4x4 pixels"),
    ({"task_type": "CAUSAL_LM"}, "task_type='CAUSAL_LM' is for models of language; it must be null."),
    ({"target_modules": ["stages.0"]}, "does not fit the base model: it has no module target_modules=['stages.0'] ("),
    ({"target_modules": "layers.("}, "The adapter does not fit the base model: "),
    ({"target_modules": ["layers.0.attention.dropout"]}, "The adapter does not fit the base model: "),
    ({"feature_modules": ["stages.0"]}, "The base model has no module 'stages.0'; give feature_modules whole names"),
    ({"head_module": "fc"}, "The base model has no classifier head_module='fc'; load it by AutoModelForImage"),
]


@pytest.mark.parametrize("changes, expected", BAD_FIELDS, ids=[str(changes)[:40] for changes, _ in BAD_FIELDS])
def test_a_bad_field_is_named(folder, in_memory, changes, expected):
    edit(folder, **changes)
    said = refused(in_memory, folder)
    assert said.startswith(f"{folder}/{CONFIG}: ") and expected in said


BAD_LORA_FIELDS = [
    ({"r": -1}, "`r` should be a positive integer value"),
    ({"r": 2.5}, "r=2.5 must be a whole number."),
    ({"rank_pattern": [8]}, "rank_pattern=[8] must be an object."),
    ({"use_dora": True}, "use_dora=True scales the base weights"),
    ({"eva_config": 3}, "eva_config=3 must be an object."),
    ({"target_modules": ["query"]}, "does not fit the base model: it has no module target_modules=['query'] ("),
]


@pytest.mark.parametrize("changes, expected", BAD_LORA_FIELDS, ids=[str(item[0]) for item in BAD_LORA_FIELDS])
def test_a_bad_field_of_lora_is_named(saved, tmp_path, changes, expected):
    folder = shutil.copytree(saved[1]["lora"][0] / "merged", tmp_path / "adapter")
    edit(folder, **changes)
    said = message(from_pretrained, folder, base_model=tiny_model("vit"))
    assert said.startswith(f"{folder}/{CONFIG}: ") and expected in said


@pytest.mark.parametrize("rank", [10**13, 10**30])
def test_no_memory_is_taken_for_what_a_configuration_asks_for(saved, tmp_path, rank):
    folder = shutil.copytree(saved[1]["lora"][0] / "merged", tmp_path / "adapter")
    edit(folder, r=rank, rank_pattern={}, auto_mapping={"base_model_class": ["\x1b[2J\n"]})
    said = message(from_pretrained, folder, base_model=tiny_model("vit"))
    assert said.isprintable() and (f"instead of [{rank}, 32]" in said or "does not fit the base model" in said)
    assert ("has shape" in said) == (rank < 2**62)


def test_a_scaling_that_is_no_whole_number_is_loaded(saved, tmp_path):
    folder = shutil.copytree(saved[1]["lora"][0] / "merged", tmp_path / "adapter")
    edit(folder, lora_alpha=1.5)
    assert from_pretrained(folder).peft_config["merged"].lora_alpha == 1.5


BAD_TENSORS = [
    (
        {DOWN: None},
        f"Tensor {DOWN!r} is missing; the file is incomplete, or else the adapter was made for ViT",
    ),
    ({"sparkle": torch.ones(1)}, "Tensor 'sparkle' is unexpected; the adapter was made for ViTForImageClassification"),
    ({DOWN: torch.ones(1, 32, 3)}, f"Tensor {DOWN!r} has shape [1, 32, 3] instead of [1, 32, 3, 3]; "),
    ({DOWN: torch.ones(1, 32, 3, 3, dtype=torch.int64)}, "holds whole numbers instead of floating-point numbers."),
    ({STEPS: torch.tensor(1.0)}, f"Tensor {STEPS!r} holds floating-point numbers instead of whole numbers."),
    ({DOWN: torch.full((1, 32, 3, 3), float("nan"))}, f"Tensor {DOWN!r} holds NaN or infinite values."),
    ({DOWN: torch.full((1, 32, 3, 3), float("-inf"), dtype=torch.bfloat16)}, "holds NaN or infinite values."),
]


@pytest.mark.parametrize("changes, expected", BAD_TENSORS, ids=[item[1][:30] for item in BAD_TENSORS])
def test_a_bad_tensor_is_named(folder, in_memory, changes, expected):
    edit_tensors(folder, **changes)
    said = refused(in_memory, folder)
    assert said.startswith(f"{folder}/{WEIGHTS}: ") and expected in said


@pytest.mark.parametrize("spoil", ["cut", "header", "text", "empty"])
def test_a_damaged_file_of_tensors_is_refused(folder, in_memory, spoil):
    data = (folder / WEIGHTS).read_bytes()
    spoiled = {"cut": data[:-10], "header": data[:20], "text": b"version https://git-lfs", "empty": b""}[spoil]
    (folder / WEIGHTS).write_bytes(spoiled)
    said = refused(in_memory, folder)
    assert said.startswith(f"{folder}/{WEIGHTS}: This is no safetensors file, or a damaged one (SafetensorError: ")


MISSING = [
    ([CONFIG, "adapter_model.bin"], "adapter_model.bin: Pickled weights can run any code and are never opened"),
    (["model.PT"], "model.PT: Pickled weights can run any code"),
    ([], f"{CONFIG}: There is no such file, so this is no adapter; give what `save_pretrained` wrote."),
    (["merged/adapter_config.json"], f"{CONFIG}: There is no such file, so this is no adapter; there is one with "),
    (["config.json", "model.safetensors"], "it looks like a whole model, which AutoModelForImageClassification"),
    ([WEIGHTS], f"{CONFIG}: There is no such file"),
    ([CONFIG], f"{WEIGHTS}: There is no such file; the adapter was not saved completely."),
]


@pytest.mark.parametrize("names, expected", MISSING)
def test_a_folder_without_an_adapter_is_refused(tmp_path, in_memory, names, expected):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not to be opened")
    said = refused(in_memory, tmp_path)
    assert said.startswith(str(tmp_path)) and expected in said


def test_pickles_beside_safetensors_do_no_harm(folder):
    (folder / "adapter_model.bin").write_bytes(b"not to be opened")
    assert from_pretrained(folder).active_adapters == ["merged"]


def test_places_that_are_none_are_refused(folder, in_memory):
    assert "This is a file; give the folder" in refused(in_memory, folder / CONFIG)
    assert refused(in_memory, folder / "nowhere") == f"{folder}/nowhere: There is no such folder."
    assert f"{folder}/nowhere/{CONFIG}: There is no such file" in refused(in_memory, folder, subfolder="nowhere")
    assert "subfolder='a/../..' leads out of" in refused(in_memory, folder, subfolder="a/../..")
    assert "This is no folder here, and cannot be a repository" in refused(in_memory, f"{folder}/nowhere")
    assert "not in the cache and the Hub cannot be reached; connect to it" in refused(in_memory, REPO)


OTHERS = [
    (lambda: tiny_model("convnext"), CONFIG, "this is ConvNextForImageClassification"),
    (lambda: tiny_model("deit"), WEIGHTS, "is missing: the adapter was made for ViTForImageClassification"),
    (lambda: wide("vit", hidden_size=64), WEIGHTS, "has shape [5, 192] instead of [5, 384]"),
    (lambda: wide("vit", num_hidden_layers=2), CONFIG, "The base model has no module 'layers.2'"),
    (lambda: AutoModel.from_config(CONFIGS["vit"][0]), CONFIG, "The base model has no classifier head_module="),
]


def wide(name, **changes):
    config = copy.deepcopy(CONFIGS[name][0])
    config.update(changes)
    return AutoModelForImageClassification.from_config(config)


@pytest.mark.parametrize("make, file, expected", OTHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_another_base_model_is_refused(saved, make, file, expected, kind):
    base, place = make(), saved[1][kind][0] / "merged"
    before = state_of(base)
    said = message(from_pretrained, place, base_model=base)
    assert said.startswith(f"{place}/") and "vit" in said.lower()
    if kind == "dynammo":
        assert said.startswith(f"{place}/{file}: ") and expected in said
    assert_unchanged(base, before)


def test_models_and_names_that_do_not_go_together_are_refused(saved, folder, in_memory):
    model, before, base, base_before = in_memory
    assert message(load_adapter, model, folder, "task_000").startswith("Adapter 'task_000' exists already")
    assert "'classifier' is the name of a part of the model" in message(load_adapter, model, folder, "classifier")
    assert "may hold letters" in message(from_pretrained, folder, adapter_name="a.b", base_model=base)
    assert "base_model has adapters already" in message(from_pretrained, folder, base_model=model)
    assert "model must be a PeftModel, got ViT" in message(load_adapter, base, folder, "other")
    lora = saved[1]["lora"][0]
    expected = f"{lora}/merged/{CONFIG}: peft_type='DYNAMMO_LORA' does not go with the model's adapters, which are 'DY"
    assert expected in message(load_adapter, model, lora, "other", subfolder="merged")
    assert_unchanged(model, before)
    assert_unchanged(base, base_before)
    plain = get_peft_model(tiny_model("vit"), LoraConfig(target_modules=["q_proj"]))
    assert "which are 'LORA'" in message(load_adapter, plain, folder, "other")


def test_a_base_model_that_cannot_be_loaded_is_named(folder, tmp_path):
    def said(value):
        edit(folder, base_model_name_or_path=value)
        found = message(from_pretrained, folder)
        assert found.startswith(f"{folder}/{CONFIG}: ") and "base_model_name_or_path" in found
        return found

    assert "There is no base_model_name_or_path; load the base model and give it" in said(None)
    assert "This is no folder here, and cannot be a repository" in said(str(tmp_path / "nowhere"))
    assert "not in the cache and the Hub cannot be reached" in said("tester/base")
    (tmp_path / "pickled").mkdir()
    CONFIGS["vit"][0].save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"not to be opened")
    assert "It cannot be loaded (Error no file named model.safetensors" in said(str(tmp_path / "pickled"))
    (tmp_path / "language").mkdir()
    (tmp_path / "language" / "config.json").write_text('{"model_type": "bert"}')
    assert "It cannot be loaded (Unrecognized configuration class" in said(str(tmp_path / "language"))


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_from_the_hub(saved, hub, waits, folder, tmp_path):
    expected = saved[1]["dynammo"][1]
    first = hub.create_repo("tester/base", files=content(saved[0])).commit_at("main").oid
    edit(folder, base_model_name_or_path="tester/base", revision=first)
    tiny_model("vit", seed=5).save_pretrained(tmp_path / "newer")
    HfApi().upload_folder(repo_id="tester/base", folder_path=tmp_path / "newer")
    files = {**content(folder), "extra.bin": b"0", "merged/extra.json": b"{}"}
    files |= {f"merged/{name}": data for name, data in content(folder).items()}
    hub.create_repo(REPO, private=True, files=files)
    for options in ({}, {"subfolder": "merged", "revision": "main", "token": hub.token}):
        assert torch.equal(logits(from_pretrained(REPO, **options)), expected)
    cached = {path.name for path in (hub.home / "hf_home").rglob("snapshots/*/**/*") if path.is_file()}
    assert cached == {CONFIG, WEIGHTS, "config.json", "model.safetensors"}
    assert find_file(REPO, "merged/extra.json").read_bytes() == b"{}" and find_file(REPO, "nothing") is None
    hub.fail("*", times=100)
    assert torch.equal(logits(from_pretrained(REPO)), expected)


def test_what_the_hub_refuses_is_one_line(hub, waits, folder, in_memory, monkeypatch):
    wrong = {"token": "hf_wrong"}
    hub.create_repo(REPO, files={**content(folder)})
    hub.create_repo("tester/pickled", files={"merged/adapter_model.bin": b"0", f"merged/{CONFIG}": b"{}"})
    hub.create_repo("tester/partly", files={CONFIG: b"{}"})
    hub.create_repo("other/gated", gated="manual", files=content(folder))
    hub.create_repo("other/private", private=True, files=content(folder))
    assert "Access is restricted: ask for it" in refused(in_memory, "other/gated")
    for name in ("other/private", "tester/none"):
        assert refused(in_memory, name).startswith(f"{name}: The Hub has no such repository, or a private one")
    assert "has no revision 'v9'" in refused(in_memory, REPO, revision="v9")
    assert "The Hub refuses the request (status 401); log in again" in refused(in_memory, REPO, **wrong)
    said = refused(in_memory, "tester/pickled", subfolder="merged")
    assert said.startswith("tester/pickled/merged/adapter_model.bin: Pickled weights")
    assert "there is one with subfolder='merged'" in refused(in_memory, "tester/pickled")
    assert refused(in_memory, "tester/partly").startswith(f"tester/partly/{WEIGHTS}: There is no such file")
    hub.fail("*", status=403, times=2)
    assert "(status 403); give a token that may read the repository." in refused(in_memory, "tester/new")
    hub.fail("*", times=100)
    assert "(status 503); try again later." in refused(in_memory, "tester/new")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not in the cache and the Hub cannot be reached" in refused(in_memory, "tester/new")
    assert "no such repository" not in message(find_file, "tester/new", CONFIG)
