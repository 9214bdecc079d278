"""The README's code runs as it is printed."""

import re
from pathlib import Path

import torch
from test_recipe import image_folder
from tiny import tiny_model, tiny_processor


README = Path(__file__).parent.parent / "README.md"


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_model("vit").save_pretrained("facebook/deit-tiny-patch16-224")
    tiny_processor(32).save_pretrained("facebook/deit-tiny-patch16-224")
    image_folder(tmp_path / "cells", classes=4, per_class=12)
    learn, load = re.findall(r"```py\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(learn, {})
    assert "'last_accuracy': " in capsys.readouterr().out
    names = {"pixel_values": torch.randn(1, 3, 32, 32)}
    exec(load, names)
    assert names["label"] in {f"class {index}" for index in range(4)}
