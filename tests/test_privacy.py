"""Privacy: of what is published, not a byte tells of a patient."""

import json
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from safetensors.torch import save
from test_publish import BASE
from tiny import tiny_model, tiny_processor
from transformers import AutoModelForImageClassification

from dynammo_peft import ClassIncrementalScenario, Dynammo, DynammoArguments, DynammoLoraConfig, Learner
from dynammo_peft.data import load_image_dataset
from dynammo_peft.hub import CardFacts, push_to_hub


PATIENT = "DOE_JANE_1962-03-04_MRN998877"
FOLDER = "clinic_RIVERSIDE_patients"


def patient_images(root):
    """Folders of images that can be found again: names of patients, and pixels that occur nowhere else."""
    rng = np.random.default_rng(7)
    for split in ("train", "test"):
        for number in range(24):
            folder = root / FOLDER / split / f"kind {number % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{PATIENT}_{number:02d}.png")
    return root / FOLDER


def traces_of(folder, scenario):
    """What would tell of an image, as bytes: names, files, and rows of pixels in every way that they are kept."""
    traces = {
        name: name.encode() for name in (PATIENT, "DOE_JANE", "MRN998877", FOLDER, str(Path.home()), str(folder))
    }
    for path in sorted(folder.rglob("*.png")):
        content = path.read_bytes()
        traces[f"PNG of {path}"] = content[content.index(b"IDAT") + 4 :][:48]
        traces[f"rows of {path}"] = np.asarray(Image.open(path))[3].tobytes()
    for task in scenario:
        images = task.train.images
        kept = {
            "uint8": images,
            "float": scenario.transform(images),
            "float, unnormalised": images.float() / 255,
            "half": scenario.transform(images).half(),
        }
        for kind, tensor in kept.items():
            for number, image in enumerate(tensor):
                # A row of one channel, and of a layout with channels last.
                traces[f"{kind} {task.index} {number}"] = image[1, 3].numpy().tobytes()
                traces[f"{kind}, channels last {task.index} {number}"] = image[:, 3].T.contiguous().numpy().tobytes()
    return traces


def test_nothing_of_a_patient_leaves(hub, waits, tmp_path, monkeypatch):
    tiny_model("vit").push_to_hub(BASE)
    base = AutoModelForImageClassification.from_pretrained(BASE)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = patient_images(tmp_path)
    train, test = load_image_dataset("imagefolder", data_dir=str(folder))
    scenario = ClassIncrementalScenario(train, test, tiny_processor(16), classes_per_task=2)
    options = {"memory_size": 8, "adapter_epochs": 1, "head_epochs": 1}
    config = DynammoLoraConfig(r=2, feature_modules=[])
    method = Dynammo(base, DynammoArguments(**options), config)
    results = Learner(method).fit(scenario)
    assert len(method.memory.images()) == 8
    traces = traces_of(folder, scenario)
    hub.requests.clear()
    for form in ("adapter", "standalone", "stock"):
        facts = CardFacts(
            name="cells",
            form=form,
            tasks=results.groups,
            method="dynammo",
            options={**options, "data_dir": str(folder), "data_files": str(folder)},
            metrics=results.metrics(),
            image_size=(16, 16),
        )
        more = {"task_adapters": ["task_000", "task_001"]} if form == "adapter" else {}
        push_to_hub(method.model, f"tester/{form}", form, tiny_processor(16), facts=facts, **more)
    sent = hub.uploaded_bytes()
    # The search would find what must not be sent, and finds what was sent.
    exemplars = method.memory.images().images
    for leak in (
        save({"memory": exemplars}),
        save({"memory": scenario.transform(exemplars).permute(0, 2, 3, 1).contiguous()}),
        next(folder.rglob("*.png")).read_bytes(),
        json.dumps({"data_dir": str(folder)}).encode(),
    ):
        assert any(trace in leak for trace in traces.values()), leak[:80]
    for needle in (b"kind 3", b"Average incremental accuracy", hub.files("tester/stock")["model.safetensors"][-64:]):
        assert needle in sent
    assert [name for name, trace in traces.items() if trace in sent] == []
