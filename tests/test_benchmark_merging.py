"""The benchmark of merging, on images and a model that take seconds."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny import tiny_dataset, tiny_model, tiny_processor

from dynammo_peft.methods import base


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    path = Path(__file__).parent.parent / "benchmarks" / "merging.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_merging", path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.syspath_prepend(path.parent)
    spec.loader.exec_module(module)
    for split, images in (("train", tiny_dataset(4, 6)), ("test", tiny_dataset(4, 2, seed=1))):
        for index, row in enumerate(images):
            folder = tmp_path / "data" / "tiny_imagenet_40" / split / f"class {row['label']}"
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{index}.png")
    tiny_model("vit").save_pretrained(tmp_path / "weights" / "deit_tiny_patch16_224")
    tiny_processor(32).save_pretrained(tmp_path / "weights" / "deit_tiny_patch16_224")
    monkeypatch.setattr(module, "SHARED", tmp_path)
    monkeypatch.setattr(module, "IMAGE_SIZE", 32)
    monkeypatch.setitem(module.SEQUENCES, "tiny_imagenet_40", module.Sequence(("tiny_imagenet_40",), (2,), 8))
    return module


def test_rows_of_a_seed_share_adapters_and_are_run_once(benchmark, tmp_path):
    out = tmp_path / "results" / "merging.jsonl"
    out.parent.mkdir()

    def run(*rows):
        benchmark.run_seed("deit_tiny", "tiny_imagenet_40", 0, 1, list(rows), 0.0, out)
        return benchmark.read(out)

    lines = run("acl", "default", "joint")
    assert [line["row"] for line in lines] == ["acl", "default", "joint"]
    assert all(0 <= line["last"] <= 100 for line in lines)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    assert {line["device"] for line in lines} == {where}
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "results" / "adapters").rglob("*.safetensors")}
    # Of two tasks by ACL, which trains with exemplars, and by the default. The joint one is of no use to others.
    assert len(kept) == 4
    lines = run("acl", "mean", "first_session", "joint")
    assert [line["row"] for line in lines] == ["acl", "default", "joint", "mean", "first_session"]
    found = {path: path.stat().st_mtime_ns for path in (tmp_path / "results" / "adapters").rglob("*.safetensors")}
    assert found == kept
    # All classes as one task: an adapter of its own.
    run("joint, heads=lda")
    found = [*(tmp_path / "results" / "adapters").rglob("*.safetensors")]
    assert len(found) == 5 and {path: path.stat().st_mtime_ns for path in kept} == kept
    assert json.loads(out.read_text().splitlines()[0])["seed"] == 0


def test_the_default_is_not_run_under_two_names(benchmark, tmp_path, capsys):
    out = tmp_path / "merging.jsonl"
    # LoRA is the default of a ViT; `acl` has convolutions, whatever the default is.
    benchmark.run_seed("deit_tiny", "tiny_imagenet_40", 0, 1, ["adapter=lora", "adapter=lora, acl"], 0.0, out)
    assert [line["row"] for line in benchmark.read(out)] == ["adapter=lora, acl"]
    assert "adapter=lora, deit_tiny: is default, left out" in capsys.readouterr().out


def test_own_images_become_a_sequence_for_each_division(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "results")
    (tmp_path / "data" / "tiny_imagenet_40").rename(tmp_path / "mine")
    for classes, adapters in (("4", 1), ("2", 2), ("2 1", 1)):
        command = f"merging.py --data_dir {tmp_path / 'mine'} --classes_per_task {classes} --memory_size 8"
        options = "--backbones deit_tiny --seeds 3 --rows default --epochs 1"
        monkeypatch.setattr(sys, "argv", f"{command} {options}".split())
        benchmark.main()
        result = benchmark.read(tmp_path / "results" / "merging.jsonl")[-1]
        name = f"mine-classes_{classes.replace(' ', '_')}-memory_8"
        assert (result["sequence"], result["seed"], result["row"]) == (name, 3, "default")
        assert f"{name}, deit_tiny" in capsys.readouterr().out
        # Of the sequence's own: an adapter for each task of several classes.
        trained = (tmp_path / "results" / "adapters" / "test").glob(f"deit_tiny-{name}-*/*.safetensors")
        assert len([*trained]) == adapters


def test_results_of_other_epochs_are_kept_apart(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(base, "MIN_UPDATES", 0)
    monkeypatch.setattr(base, "EPOCHS", 1)
    command = "merging.py --backbones deit_tiny --sequences tiny_imagenet_40 --seeds 0 --rows"
    for rows, epochs in (("default", 1), ("first_session", 0)):
        monkeypatch.setattr(sys, "argv", [*command.split(), rows, "--epochs", str(epochs)])
        benchmark.main()
        shown = capsys.readouterr().out.splitlines()
        measured = [line.split("|")[1].strip() for line in shown if line.startswith("| `") and line.endswith("| 0 |")]
        assert measured == [f"`{rows}`"]
    assert [line["epochs"] for line in benchmark.read(tmp_path / "results" / "merging.jsonl")] == [1, None]
    trained = (tmp_path / "results" / "adapters" / "test").iterdir()
    assert sorted(folder.name.rpartition("_")[2] for folder in trained) == ["1-bf16-zeros", "default-bf16-zeros"]


@pytest.mark.parametrize(
    ("option", "values"), [("precision", ("bf16", "fp32", "fp32")), ("head_init", ("random", "zeros", "zeros"))]
)
def test_each_way_to_train_has_adapters_and_results_of_its_own(option, values, benchmark, tmp_path):
    out = tmp_path / "merging.jsonl"
    for value in values:
        AcceleratorState._reset_state(reset_partial_state=True)
        benchmark.run_seed(
            "deit_tiny", "tiny_imagenet_40", 0, 1, ["first_session"], 0.0, out, **{"precision": "fp32", option: value}
        )
    assert [line[option] for line in benchmark.read(out)] == [*values[:2]]
    trained = [load_file(path) for path in sorted((tmp_path / "adapters").rglob("*task_000.safetensors"))]
    assert len(trained) == 2
    assert any((trained[0][name] != trained[1][name]).any() for name in trained[0])


def test_what_is_measured_as_published_starts_heads_at_random(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    command = "merging.py --backbones deit_tiny --sequences tiny_imagenet_40 --seeds 0 --epochs 1 --rows acl"
    for start in ("random", "zeros"):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", [*command.split(), "first_session", "--head_init", start])
        benchmark.main()
        shown = capsys.readouterr().out.splitlines()
        measured = [line.split("|")[1].strip() for line in shown if line.startswith("| `") and line.endswith("| 0 |")]
        assert measured == ["`acl`", "`first_session`"]
    found = [(line["row"], line["head_init"]) for line in benchmark.read(tmp_path / "merging.jsonl")]
    assert found == [("acl", "random"), ("first_session", "random"), ("first_session", "zeros")]


def test_how_results_were_trained_that_do_not_say_so(benchmark, tmp_path):
    out = tmp_path / "merging.jsonl"
    out.write_text(json.dumps({"row": "acl", "seed": 0}) + "\n")
    assert benchmark.read(out) == [{"row": "acl", "seed": 0, "precision": "bf16", "head_init": "random"}]


def line(row, seed, last, average, backbone="a", precision="bf16"):
    measured = {"last": last, "average": average}
    return {"backbone": backbone, "sequence": "s", "seed": seed, "row": row, "precision": precision, **measured}


LINES = [
    line("acl", 0, 50.0, 60.0),
    line("default", 0, 60.0, 80.0),
    line("default", 1, 63.0, 84.0),
    line("joint", 1, 70.0, 70.0),
    line("default", 0, 40.0, 45.0, backbone="b"),
]


def test_all_backbones_and_sequences_in_one_table(benchmark):
    table = benchmark.overview(LINES, ("acl", "default", "joint"), ["joint"]).splitlines()
    assert table == [
        "| | s, a | s, b |",
        "|---|---|---|",
        "| `acl` | 50.0 / 60.0 |  |",
        "| `default` | 61.5 ± 2.1 / 82.0 ± 2.8 | 40.0 / 45.0 |",
        "| `joint` | 70.0 |  |",
        # Over the seeds that have both.
        "| `default` less `acl` | +10.0 / +20.0 |  |",
        "| `default` less `joint` | -7.0 |  |",
    ]


def test_differences_are_those_on_the_same_class_orders_and_in_the_same_precision(benchmark):
    lines = [
        line("mean", 0, 90.0, 95.0),
        line("mean", 1, 80.0, 85.0),
        line("mean", 1, 84.0, 87.0, precision="fp32"),
        line("merge=ties", 0, 88.0, 93.0),
        line("merge=ties", 1, 80.0, 82.0, precision="fp32"),
        line("adapter=conv, mean", 0, 70.0, 75.0, backbone="b"),
        line("mean", 0, 72.0, 76.0, backbone="b"),
        line("merge=fisher", 0, 71.0, 76.0, backbone="b"),
    ]
    rows = ("adapter=conv, mean", "mean", "merge=ties", "merge=fisher", "merge=dare_ties")
    assert benchmark.compared(lines, rows, rows[:2]).splitlines() == [
        "",
        "s",
        "",
        "| | a | less the mean | class orders | b | less the mean | class orders |",
        "|---|---|---|---|---|---|---|",
        "| `adapter=conv, mean` |  |  |  | 70.0 / 75.0 |  | 1 |",
        # Of a class order in two precisions their mean.
        "| `mean` | 86.0 ± 5.7 / 90.5 ± 6.4 |  | 2 | 72.0 / 76.0 | +2.0 | 1 |",
        "| `merge=ties` | 84.0 ± 5.7 / 87.5 ± 7.8 | -3.0 ± 1.4 | 2 |  |  |  |",
        "| `merge=fisher` |  |  |  | 71.0 / 76.0 | +1.0 | 1 |",
    ]


def test_rows_of_any_precision_beside_each_other(benchmark):
    lines = [*LINES, line("default", 0, 62.0, 81.0, precision="fp32"), line("mean", 1, 62.0, 82.5, precision="fp32")]
    table = benchmark.overview(benchmark.of_any_precision(lines), ("default", "mean"), []).splitlines()
    assert table[2:] == [
        "| `default` | 62.0 ± 1.4 / 82.2 ± 2.5 | 40.0 / 45.0 |",
        "| `mean` | 62.0 / 82.5 |  |",
        "| `default` less `mean` | +1.0 / +1.5 |  |",
    ]


def test_nothing_runs_in_any_precision(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["merging.py", "--precision", "any"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "--precision any is for --report" in capsys.readouterr().err


def test_what_was_measured_under_another_name_comes_last(benchmark):
    table = benchmark.details([line("default, before", 2, 12.3, 45.6), *LINES], ("acl", "default"), ["joint"])
    assert table.splitlines()[:8] == [
        "",
        "a, s",
        "",
        "| | last / average | less `acl` | seeds |",
        "|---|---|---|---|",
        "| `acl` | 50.0 / 60.0 |  | 0 |",
        "| `default` | 61.5 ± 2.1 / 82.0 ± 2.8 | +10.0 / +20.0 | 0, 1 |",
        "| `default, before` | 12.3 / 45.6 |  | 2 |",
    ]
