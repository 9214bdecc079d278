"""Cards: what they say, that names stay names in them, and that nothing of a machine gets into them."""

import ast
import builtins
import configparser
import importlib.util
import json
import logging
import math
import re
import shutil
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import DatasetCard, ModelCard, ModelCardData
from loopback_hub.cards import card_problems
from markdown_it import MarkdownIt
from peft import get_peft_model
from PIL import Image
from setuptools import find_packages
from tiny import tiny_dataset, tiny_model, tiny_processor

from dynammo_peft import ClassIncrementalScenario, DynammoConfig, Results
from dynammo_peft.hub import CardFacts, dataset_card, draw_accuracy_matrix, model_card, save_model, write_model_card


ROOT = Path(__file__).parent.parent
FORMS = ["adapter", "standalone", "stock"]
COST = {
    "multiply_adds": 300_000_000,
    "multiply_adds_base": 290_000_000,
    "ratio": 1.035,
    "parameters": 5_600_000,
    "parameters_base": 5_500_000,
}
# Each of them would mean something in Markdown, HTML, YAML or Jinja.
NAMES = [
    'a "b" \'c\'', "a: b", "line\nbreak", "windows\r\nbreak", "a|b|c", "\\|", "`a`", "```", "<b>a</b>", "<!-- a -->",
    "<script>alert(1)</script>", "{{ 7 * 7 }}", "{% if x %}", "{# a #}", "---", "a\n---\nb", "- a", "+ a", "# a",
    "1. a", "1) a", "*a*", "_a_", "a_b_c", "~~a~~", "[a](http://b.c)", "![a](b)", "http://a.b", "www.a.b", "a@b.c",
    "&amp;", "&#65;", "\\", " a ", "a  b", "\ta", "$a$", ":a:", "!", "yes", "null", "1e3", "Ünï 細胞 😀", "= a",
    "> a", "a\u2028b",
]  # fmt: skip


def facts(**more):
    given = {
        "name": "cells",
        "form": "adapter",
        "repo_id": "me/cells",
        "tasks": [["monocyte", "platelet"], ["basophil"]],
        "metrics": {
            "accuracy_matrix": [[0.9], [0.8, 0.715]],
            "last_accuracy": 0.7512345,
            "average_incremental_accuracy": 0.825,
            "forgetting": 0.1,
            "backward_transfer": -0.1,
            "mean_class_recall": 0.74,
        },
    }
    return CardFacts(**{**given, **more})


class Cells(HTMLParser):
    """The text of each cell of each table, and all elements."""

    def __init__(self, html):
        super().__init__()
        self.tables, self.tags, self.text, self.inside = [], set(), "", False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.inside:
            self.tables[-1][-1][-1] += data


def rendered(card):
    return Cells(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(card.text))


def table_with(cells, *header):
    return next(table[1:] for table in cells.tables if table[0] == list(header))


def metadata(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), flags=re.DOTALL).group(1))


def code_of(card):
    return re.findall(r"^```py\n(.*?)^```$", card.text, flags=re.DOTALL | re.MULTILINE)


def scenario(names=("a", "b", "c"), **more):
    return ClassIncrementalScenario(
        tiny_dataset(len(names), 4, names=list(names)),
        tiny_dataset(len(names), 2, seed=1, names=list(names)),
        tiny_processor(16),
        **{"classes_per_task": 2, **more},
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_field_of_a_template_is_given(form, monkeypatch):
    monkeypatch.setattr(jinja2, "Template", partial(jinja2.Template, undefined=jinja2.StrictUndefined))
    model_card(facts(form=form, unknown_score=form != "stock", cost=COST, exemplar_indices=3), "accuracy_matrix.png")
    model_card(CardFacts(name="cells", form=form, tasks=[["a"]], method="acl"))
    dataset_card(scenario(), "cells")
    dataset_card(scenario(), "cells", dataset_id="me/cells", validation_fraction=0.2)


@pytest.mark.parametrize(
    "form,library", [("adapter", "peft"), ("standalone", "transformers"), ("stock", "transformers")]
)
def test_metadata_says_what_the_hub_needs(form, library):
    data = metadata(
        model_card(facts(form=form, base_model="facebook/deit-tiny", training_data_id="me/blood", tags=["x"]))
    )
    assert data["library_name"] == library
    assert data["pipeline_tag"] == "image-classification"
    assert data["base_model"] == "facebook/deit-tiny"
    assert data["base_model_relation"] == ("adapter" if form == "adapter" else "finetune")
    assert data["datasets"] == ["me/blood"]
    assert data["license"] == "unknown"
    assert data["metrics"] == ["accuracy", "recall"]
    assert {"dynammo", "image-classification", "x"} <= set(data["tags"])
    assert "language" not in data


@pytest.mark.parametrize("form", FORMS)
def test_the_hub_finds_no_fault_with_the_metadata(form):
    for more in ({}, {"metrics": None}, {"base_model": "me/base", "training_data_id": "me/blood", "tags": NAMES}):
        assert card_problems(str(model_card(facts(form=form, **more)))) == ([], [])
    assert card_problems(str(dataset_card(scenario(), "\n---\n", tags=NAMES))) == ([], [])


@pytest.mark.parametrize(
    "license,expected",
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("Terms of our clinic", {"license": "other", "license_name": "terms-of-our-clinic"}),
        (None, {"license": "unknown"}),
    ],
)
def test_a_licence_is_one_that_the_hub_knows_or_other(license, expected):
    for card in (model_card(facts(license=license)), dataset_card(scenario(), "cells", license=license)):
        assert {key: value for key, value in metadata(card).items() if key.startswith("license")} == expected
    assert f"licence of this model | {license or 'unknown'}" in model_card(facts(license=license)).text


def test_results_round_trip_through_a_file(tmp_path):
    results = Results([["monocyte", "platelet"], ["basophil"]])
    results.add(0, [0, 1, 1], [0, 1, 0], 1.0)
    results.add(1, [0, 2, 2, 2], [0, 1, 0, 2], 1.0)
    given = facts(
        metrics=results.metrics(),
        evaluation_data="blood: cells",
        evaluation_data_id="me/blood",
        evaluation_split="test",
    )
    write_model_card(given, tmp_path)
    loaded = ModelCard.load(tmp_path / "README.md")
    assert isinstance(loaded.data, ModelCardData)
    assert loaded.data.model_name == "cells"
    measured = {result.metric_type: result for result in loaded.data.eval_results}
    expected = {**results.metrics(), "accuracy": results.metrics()["last_accuracy"]}
    expected["recall"] = expected.pop("mean_class_recall")
    del expected["accuracy_matrix"], expected["last_accuracy"]
    assert {name: result.metric_value for name, result in measured.items()} == expected
    for result in measured.values():
        assert (result.dataset_name, result.dataset_type, result.dataset_split) == ("blood: cells", "me/blood", "test")
        assert result.task_type == "image-classification"
    assert measured["recall"].metric_args == {"average": "macro"}
    assert str(loaded) == (tmp_path / "README.md").read_text(encoding="utf-8")


def test_measures_and_matrix_are_shown_as_they_were_measured():
    cells = rendered(
        model_card(facts(test_images=300, evaluation_data="blood", evaluation_split="test", image_size=(112, 96)))
    )
    rows = {row[0]: row[1] for row in table_with(cells, "measure", "value", "what it is")}
    assert rows == {
        "Last accuracy": "75.1 %",
        "Average incremental accuracy": "82.5 %",
        "Mean class recall": "74.0 %",
        "Forgetting": "10.0 points",
        "Backward transfer": "-10.0 points",
    }
    matrix = [["after task 1", "90.0", ""], ["after task 2", "80.0", "71.5"]]
    assert table_with(cells, "", "task 1", "task 2") == matrix
    assert "Measured on 300 images of blood, split test, resized to 112 x 96 pixels." in " ".join(cells.text.split())


def test_what_could_not_be_computed_or_is_no_number_stays_out():
    metrics = {
        "accuracy_matrix": [[0.5], [math.nan, np.float64(0.25)]],
        "last_accuracy": np.float64(0.5),
        "forgetting": math.nan,
        "auroc": 0.9,
        "seconds": [1.0],
        "note": "x",
    }
    card = model_card(facts(metrics=metrics))
    (index,) = metadata(card)["model-index"][0]["results"]
    assert {entry["type"]: entry["value"] for entry in index["metrics"]} == {"accuracy": 0.5, "auroc": 0.9}
    rows = {row[0]: row[1] for row in table_with(rendered(card), "measure", "value", "what it is")}
    assert rows["Forgetting"] == rows["Mean class recall"] == "not measured"
    assert rows["auroc"] == "0.9"
    assert table_with(rendered(card), "", "task 1", "task 2")[1] == ["after task 2", "", "25.0"]


def test_without_facts_nothing_is_made_up():
    card = model_card(CardFacts(name="cells", form="stock", tasks=[["a"]]))
    text = card.text
    assert text.count("Not measured.") == 2
    assert "Data: unknown. Licence of the data: unknown." in text
    assert "base model | none that is published" in text
    assert "options are not recorded" in text
    assert "1 classes" not in text
    assert "model-index" not in metadata(card)
    assert "base_model" not in metadata(card)


def test_cost_is_set_against_the_base_model():
    rows = table_with(rendered(model_card(facts(cost=COST))), "one image", "this model", "base model")
    assert rows == [
        ["multiply-adds", "300 M", "290 M"],
        ["parameters used", "5.6 M", "5.5 M"],
        ["operations against the base model", "1.035", "1"],
    ]
    folded = model_card(facts(cost={**COST, "ratio_folded": 1.001}))
    rows = table_with(rendered(folded), "one image", "this model", "base model")
    assert rows[-1] == ["the same with LoRA in the base model's weights", "1.001", "1"]
    convolutions = model_card(facts(cost={**COST, "ratio_folded": COST["ratio"]}))
    assert len(table_with(rendered(convolutions), "one image", "this model", "base model")) == 3


def test_exemplars_and_statistics_are_told_and_images_first_of_all():
    plain = model_card(facts()).text
    assert "No training images are included." in plain
    assert "No class statistics are included." in plain
    assert "row numbers" not in plain and "squared gradients" not in plain
    told = model_card(facts(exemplar_images=True, exemplar_indices=40, class_statistics=True)).text
    assert told.index("holds training images") < told.index("## What it is")
    assert "No training images" not in told
    assert "row numbers of 40 training images" in told
    assert "No class statistics" not in told
    assert "squared gradients" in model_card(facts(merge_statistics=True)).text


def test_medical_use_and_the_paper():
    text = " ".join(model_card(facts()).text.split())
    for words in (
        "no medical device",
        "validated for that use",
        "other hospitals, scanners",
        "only the classes above",
    ):
        assert words in text
    entry = re.search(r"```bibtex (.*?) ```", text).group(1)
    assert entry.count("{") == entry.count("}")
    assert "eprint = {2404.14099}" in entry and "Qazi, Mohammad Areeb and" in entry


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("repo_id", ["me/cells", None])
def test_code_of_every_form_compiles(form, repo_id):
    blocks = code_of(model_card(facts(form=form, repo_id=repo_id, name="```\n'\"", unknown_score=form != "stock")))
    assert len(blocks) == {"adapter": 3, "standalone": 3, "stock": 1}[form]
    for block in blocks:
        ast.parse(block)
        assert '"me/cells"' in block or '"."' in block or "unknown_score" in block
    whole = "\n".join(blocks)
    assert ("trust_remote_code=True" in whole) == (form == "standalone")
    assert ("AutoPeftModel" in whole) == (form == "adapter")
    assert ("unknown_score" in whole) == (form != "stock")


def test_code_for_an_adapter_and_a_plain_model_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_model("vit").save_pretrained("base")
    model = get_peft_model(
        type(tiny_model("vit")).from_pretrained("base"), DynammoConfig(classes=["a", "b"]), "merged"
    )
    save_model(model, "out", ["merged"], tiny_processor(32))
    shutil.move("out/merged", "me/cells")
    image = tiny_dataset(1, 1)[0]["image"]
    load, transformers_too = code_of(model_card(facts()))
    names = {"image": image}
    exec(load, names)
    assert capsys.readouterr().out.strip() in ("a", "b")
    logits = names["output"].logits
    exec(transformers_too, names)
    with torch.no_grad():
        again = names["model"](**names["processor"](images=image, return_tensors="pt")).logits
    assert torch.equal(again, logits)

    shutil.rmtree("me/cells")
    tiny_model("vit").save_pretrained("me/cells")
    tiny_processor(32).save_pretrained("me/cells")
    (stock,) = code_of(model_card(facts(form="stock")))
    exec(stock, {"image": image})
    assert "LABEL_" in capsys.readouterr().out


def test_names_are_shown_as_they_are_whatever_is_in_them():
    plain = rendered(model_card(facts())).tags
    cells = rendered(model_card(facts(tasks=[NAMES[:20], NAMES[20:]])))
    rows = table_with(cells, "logit", "task", "class")
    assert [row[2] for row in rows] == NAMES
    assert [row[:2] for row in rows] == [[str(i), "1" if i < 20 else "2"] for i in range(len(NAMES))]
    assert cells.tags == plain


@pytest.mark.parametrize("name", NAMES)
def test_a_name_breaks_neither_heading_nor_text_nor_metadata(name, tmp_path):
    plain = rendered(model_card(facts(options={"seed": 0})))
    texts = dict.fromkeys(
        ["name", "method", "evaluation_data", "evaluation_split", "training_data", "training_data_license"], name
    )
    card = model_card(facts(**texts, license=name, base_model_license=name, tags=[name], options={name: name}))
    cells = rendered(card)
    assert cells.tags == plain.tags
    assert cells.text.startswith(name)
    assert table_with(cells, "option", "value") == [[name, name]]
    assert ["licence of the base model", name] in cells.tables[0]
    assert f"Data: {name}. Licence of the data: {name}." in cells.text
    assert len(cells.tables) == len(plain.tables)
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.model_name == loaded.data.eval_results[0].dataset_name == name
    assert loaded.data.tags[-1] == name
    assert loaded.text == card.text


def test_what_cannot_be_written_is_replaced():
    card = model_card(facts(tasks=[["a\x00b"], ["\ud800"]]))
    assert [row[2] for row in table_with(rendered(card), "logit", "task", "class")] == ["a\ufffdb", "\ufffd"]
    str(card).encode("utf-8")


def test_plain_names_are_left_plain():
    text = model_card(facts(tasks=[["blood_cell"], ["IgA-positive (weak), 2/3"]])).text
    assert "| blood_cell |" in text and "| IgA-positive (weak), 2/3 |" in text


def test_options_tell_no_place_of_a_machine():
    options = {
        "memory_size": 40,
        "merge": "ties",
        "merge_options": {"density": 0.5},
        "head_module": None,
        "target_modules": ["encoder.layer.0"],
        "output_dir": "outputs/run",
        "data_dir": "wards/anna",
        "offload_adapters": "wards/adapters",
        "model_name_or_path": "weights/deit",
        "dataset_name": "shared/wards",
        "groups": [["monocyte"]],
        "cache": "/home/anna/cache",
        "init": {"from": "~/weights"},
        "other": r"C:\Users\anna",
        "near": "../anna",
    }
    card = model_card(facts(options=options))
    assert table_with(rendered(card), "option", "value") == [
        ["memory_size", "40"],
        ["merge", "ties"],
        ["merge_options", '{"density": 0.5}'],
        ["target_modules", '["encoder.layer.0"]'],
    ]
    assert "those that name files or folders (7) are left out" in card.text
    for part in ("anna", "outputs", "weights", "wards"):
        assert part not in str(card)


def test_no_card_names_a_file(tmp_path):
    text = str(write_model_card(facts(cost=COST), tmp_path)) + str(dataset_card(scenario(), "cells"))
    for word in (str(tmp_path), str(ROOT), str(Path.home()) + "/", ".jpg", ".jpeg", ".dcm", "/tmp"):
        assert word not in text
    assert re.findall(r"[\w-]+\.png", text) == ["accuracy_matrix.png"]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"form": "onnx"}, "form='onnx' does not exist; choose one of 'adapter', 'standalone', 'stock'"),
        ({"tasks": []}, "no task or a task without a class"),
        ({"tasks": [["a"], []]}, "no task or a task without a class"),
        ({"repo_id": "me/you/cells"}, "repo_id='me/you/cells' is no repository on the Hub"),
        ({"repo_id": 'me/"x"'}, "is no repository on the Hub"),
        ({"repo_id": "me/cells\n"}, "is no repository on the Hub"),
        ({"base_model": "/home/anna/deit"}, "base_model='/home/anna/deit' is no repository on the Hub"),
        ({"base_model": "../weights/deit"}, "leave it out if there is none"),
        ({"training_data_id": "./cells"}, "training_data_id='./cells' is no repository"),
        ({"training_data": "../data/cells"}, "training_data='../data/cells' would publish a path"),
        ({"evaluation_data": "cells in /data/anna"}, "evaluation_data=.* would publish a path of your machine"),
        ({"name": r"D:\cells"}, "would publish a path"),
        ({"tags": ["~/x"]}, "tags='~/x' would publish a path"),
        ({"exemplar_indices": -1}, "exemplar_indices=-1 must not be negative"),
        ({"test_images": 0}, "test_images=0 must be at least 1"),
        ({"cost": {"ratio": 1.0}}, "cost has no 'multiply_adds'; it needs multiply_adds, multiply_adds_base, ratio"),
        ({"form": "stock", "unknown_score": True}, "unknown_score=True does not fit form='stock'"),
        ({"metrics": {"accuracy_matrix": [[1.0], [1.0]]}}, "Row 1 of accuracy_matrix has 1 values, not 2"),
        ({"tasks": [["a"]]}, "accuracy_matrix has 2 rows, but there are 1 tasks"),
    ],
)
def test_impossible_facts_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        facts(**change)


def test_addresses_on_the_web_are_no_paths():
    card = model_card(facts(license="ours", license_link="https://a.b/c", training_data="CT/MR, see https://a.b/c"))
    assert metadata(card)["license_link"] == "https://a.b/c"


def test_a_dataset_card_counts_images_and_its_code_makes_the_same_tasks():
    made = scenario(NAMES, classes_per_task=10, seed=3, validation_fraction=0.25)
    card = dataset_card(made, "cells", validation_fraction=0.25, seed=3, test_split=None)
    rows = table_with(rendered(card), "task", "class", "training images", "test images")
    expected = [[str(task + 1), name, "3", "1"] for task, group in enumerate(made.groups) for name in group]
    assert rows == expected
    assert "held out of the training images: 25 % of each class, drawn with seed 3" in card.text
    assert f"{3 * len(NAMES)} for training, {len(NAMES)} for testing" in card.text
    assert metadata(card)["size_categories"] == ["n<1K"]
    assert metadata(card)["task_categories"] == ["image-classification"]
    (code,) = code_of(card)
    names = {"train": tiny_dataset(len(NAMES), 4, names=NAMES), "test": None, "image_processor": tiny_processor(16)}
    exec(code, names)
    assert names["scenario"].groups == made.groups
    for task, again in zip(made, names["scenario"]):
        assert torch.equal(task.train.rows, again.train.rows) and torch.equal(task.test.rows, again.test.rows)


def test_code_of_a_dataset_on_the_hub_names_it():
    card = dataset_card(
        scenario(),
        "cells",
        dataset_id="me/blood",
        base_model="facebook/deit-tiny",
        test_split="val",
        label_column="kind",
    )
    (code,) = code_of(card)
    assert "dp.load_image_dataset('me/blood', train_split='train', test_split='val')" in code
    assert "from_pretrained('facebook/deit-tiny')" in code
    assert "dp.resized_image_processor(image_processor, 16)" in code
    assert code.rstrip().endswith("groups=groups, label_column='kind')")
    ast.parse(code)
    assert "[me/blood](https://huggingface.co/datasets/me/blood)" in card.text


def test_a_name_does_not_break_a_dataset_card(tmp_path):
    made, name = scenario(), "\n".join(NAMES)
    card = dataset_card(made, name, license=name, tags=[name])
    cells = rendered(card)
    assert cells.tags == rendered(dataset_card(made, "cells")).tags
    assert ["licence", name] in cells.tables[0]
    card.save(tmp_path / "README.md")
    loaded = DatasetCard.load(tmp_path / "README.md")
    assert loaded.data.pretty_name == loaded.data.tags[-1] == name
    assert loaded.text == card.text


@pytest.mark.parametrize(
    "change,message",
    [
        ({"dataset_id": "/data/cells"}, "dataset_id='/data/cells' is no repository on the Hub"),
        ({"base_model": "a/b/c"}, "base_model='a/b/c' is no repository"),
        ({"license": "see /data/terms"}, "license='see /data/terms' would publish a path"),
    ],
)
def test_impossible_facts_of_a_dataset_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataset_card(scenario(), "cells", **change)


@pytest.mark.parametrize("tasks", [1, 2, 12, 40])
def test_the_picture_has_the_colours_of_the_accuracies(tasks, tmp_path):
    matrix = [[1.0] * index + [0.25] for index in range(tasks)]
    draw_accuracy_matrix(matrix, [["$\\frac$", "a\nb"]] * tasks, tmp_path / "matrix.png")
    picture = Image.open(tmp_path / "matrix.png").convert("RGB")
    assert 400 < picture.width < 1400 and 200 < picture.height < 1000
    found = {colour: count for count, colour in picture.getcolors(picture.width * picture.height)}
    low, high = (tuple(matplotlib.colormaps["cividis"](share, bytes=True)[:3]) for share in (0.25, 1.0))
    cell = found[low] / tasks
    assert cell > 150
    assert found.get(high, 0) / cell == pytest.approx(tasks * (tasks - 1) / 2, rel=0.1)


def test_names_that_the_font_lacks_are_not_drawn(tmp_path, recwarn):
    draw_accuracy_matrix([[0.5]], [["細胞"]], tmp_path / "matrix.png")
    assert not recwarn.list


def test_an_empty_or_wrong_matrix_is_not_drawn(tmp_path):
    for matrix, message in [
        ([], "accuracy_matrix is empty"),
        ([[1.0], [1.0]], "Row 1 of accuracy_matrix has 1 values"),
    ]:
        with pytest.raises(ValueError, match=message):
            draw_accuracy_matrix(matrix, [["a"], ["b"]], tmp_path / "matrix.png")


def test_without_matplotlib_the_card_has_the_table_alone(tmp_path, monkeypatch, caplog):
    normal = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return normal(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install dynammo_peft\[plots\]"):
        draw_accuracy_matrix([[1.0]], [["a"]], tmp_path / "matrix.png")
    with caplog.at_level(logging.WARNING):
        card = write_model_card(facts(), tmp_path)
    assert "no picture" in caplog.text and "dynammo_peft[plots]" in caplog.text
    assert ".png" not in card.text
    assert table_with(rendered(card), "", "task 1", "task 2")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_written_card_shows_its_picture(tmp_path):
    card = write_model_card(facts(), tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["README.md", "accuracy_matrix.png"]
    assert "](accuracy_matrix.png)" in card.text
    unmeasured = write_model_card(facts(metrics=None), tmp_path / "other")
    assert ".png" not in unmeasured.text


def test_every_package_is_named_in_the_build():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = config["options"]["packages"].split()
    assert sorted(named) == sorted([*find_packages(str(ROOT), include=["dynammo_peft*"]), "dynammo_peft.hub_cards"])


def test_a_built_wheel_holds_the_templates(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dynammo_peft", "hub_cards"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-index"]
    pip += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(pip, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    shutil.rmtree(source)
    package = tmp_path / "installed" / "dynammo_peft"
    spec = importlib.util.spec_from_file_location("installed", package / "hub" / "card_markdown.py")
    installed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(installed)
    for name in ("model_card.md", "dataset_card.md"):
        path = installed.template_path(name)
        assert path == package / "hub_cards" / name
        assert path.read_text(encoding="utf-8") == (ROOT / "hub_cards" / name).read_text(encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="'other.md' is missing"):
        installed.template_path("other.md")
    card = ModelCard.from_template(ModelCardData(), template_path=str(installed.template_path("model_card.md")))
    assert "## Privacy" in card.text
    assert json.dumps(sorted(path.name for path in (tmp_path / "installed").iterdir())).count("hub_cards") == 0
