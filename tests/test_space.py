"""The page where a model can be tried: what it shows is what the model says, in a real browser too."""

import ast
import configparser
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from loopback_hub.cards import card_problems
from packaging.requirements import Requirement
from peft import AutoPeftModel, get_peft_model
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from setuptools import Distribution
from tiny import tiny_dataset, tiny_model, tiny_processor
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

from dynammo_peft import DynammoConfig, DynammoLoraConfig
from dynammo_peft.hub import save_model, to_standalone, to_stock, write_space
from dynammo_peft.hub.space import GRADIO_VERSION


ROOT = Path(__file__).parent.parent
FILES = ["README.md", "app.py", "requirements.txt", "style.css"]
FORMS = ["adapter", "standalone", "stock"]
CLASSES = [["monocyte", "<script>document.title = 'x'</script>"], ['a & "b" ${7*7} {{7*7}}', "&amp; 細胞"]]
NAMES = [name for names in CLASSES for name in names]
TITLE = """Cells "of" {{ 7 * 7 }} \\ '\"\"\" + <b>blood</b> & ${x} 😀"""


def images(per_class=1):
    """An image of one colour and a little noise for each class, in the order of the classes."""
    return list(tiny_dataset(4, per_class, size=96)["image"])


def pixels(of):
    return tiny_processor()(images=of, return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each form of model."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tiny_model("vit").save_pretrained(root / "base")
    models = []
    for config in (DynammoConfig(classes=CLASSES), DynammoLoraConfig(classes=CLASSES, feature_modules=[])):
        base = AutoModelForImageClassification.from_pretrained(root / "base")
        models.append(get_peft_model(base, config, "merged").eval())
    save_model(models[0], root / "saved", ["merged"], tiny_processor())
    (root / "saved" / "merged").rename(root / "adapter")
    for form, model in (("standalone", learn(to_standalone(models[0]))), ("stock", to_stock(models[1]))):
        model.save_pretrained(root / form)
        tiny_processor().save_pretrained(root / form)
    return root


def learn(model):
    """Trains the heads to know the colours, and to say "others" of noise."""
    known, labels = pixels(images(4)), torch.arange(4).repeat_interleave(4)
    noise = torch.randn(8, 3, 32, 32)
    optimizer = torch.optim.Adam(model.task_heads.parameters(), lr=0.05)
    for _ in range(40):
        output = model(torch.cat([known, noise]))
        is_noise = torch.cat([torch.zeros(len(known)), torch.ones(len(noise))])
        loss = F.cross_entropy(output.logits[: len(known)], labels)
        loss = loss + F.binary_cross_entropy(output.unknown_score.clamp(1e-6, 1 - 1e-6), is_noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def start(folders, tmp_path, monkeypatch):
    """Imports the app of a form."""

    def start(form):
        # The app sets both.
        monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
        monkeypatch.setenv("MODEL_ID", str(folders / form))
        write_space(tmp_path / "space", "me/cells", form=form)
        spec = importlib.util.spec_from_file_location("space_app", tmp_path / "space" / "app.py")
        app = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(app)
        return app

    return start


class Page(HTMLParser):
    """Texts of the cells of each table row, and all elements."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.tags, self.inside = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside |= tag == "table"
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.inside = tag != "table" and self.inside

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


@pytest.mark.parametrize("form", FORMS)
def test_the_page_shows_what_the_model_says(form, start, folders, tmp_path):
    app = start(form)
    image = images()[2]
    image.save(tmp_path / "image.png")
    empty, preview, result = app.classify(str(tmp_path / "image.png"))
    assert empty is None and preview.startswith('<img class="preview"') and "data:image/jpeg;base64,/9j/" in preview
    assert not (tmp_path / "image.png").exists()
    model = AutoModelForImageClassification.from_pretrained(folders / form).eval()
    with torch.no_grad():
        output = model(pixel_values=pixels(image))
    best = output.logits[0].softmax(0).sort(descending=True)
    page = Page(result)
    columns = ["class", "probability"] if form == "stock" else ["class", "learned in", "probability"]
    assert page.rows[0] == columns
    for row, index, probability in zip(page.rows[1:], best.indices.tolist(), best.values.tolist(), strict=True):
        task = [] if form == "stock" else [f"task {index // 2 + 1}"]
        assert row == [NAMES[index], *task, f"{100 * probability:.1f} %"]
    assert "script" not in page.tags
    assert ("none of these" in result) == (form != "stock")
    if form != "stock":
        adapted = AutoPeftModel.from_pretrained(folders / form).eval() if form == "adapter" else None
        score = output.unknown_score if adapted is None else adapted.unknown_score(pixels(image))
        assert f"<b>{score.item():.3g}</b>" in result
    assert form != "standalone" or best.indices[0] == 2


def test_of_many_classes_the_likeliest_are_shown(start):
    app = start("stock")
    app.model.config.id2label = {index: f"class {index}" for index in range(20)}
    probabilities = torch.arange(20.0).softmax(0).tolist()
    result = app.show(probabilities, None)
    assert [row[0] for row in Page(result).rows[1:9]] == [f"class {index}" for index in range(19, 11, -1)]
    assert "and 12 more" in result


def save_all_kinds(folder):
    """File name -> the image that it should be read as."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (12, 20, 3), dtype=np.uint8))
    deep = rng.integers(0, 65536, (12, 20)).astype("uint16")
    upper = Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    grey = colours.convert("L")
    clear = colours.convert("RGBA")
    clear.putalpha(grey)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(deep).save(folder / "deep.tif")
    grey.save(folder / "grey.png")
    grey.convert("1").save(folder / "bits.png")
    clear.save(folder / "alpha.png")
    colours.quantize(16).save(folder / "palette.gif")
    colours.convert("CMYK").save(folder / "print.tif")
    colours.save(folder / "turned.png", exif=exif)
    return {
        "deep.png": upper,
        "deep.tif": upper,
        "grey.png": grey.convert("RGB"),
        "bits.png": grey.convert("1").convert("RGB"),
        "alpha.png": colours,
        "palette.gif": colours.quantize(16).convert("RGB"),
        "print.tif": colours.convert("CMYK").convert("RGB"),
        "turned.png": colours.transpose(Image.Transpose.ROTATE_270),
    }


def test_all_kinds_of_images_are_read(start, tmp_path):
    app = start("stock")
    for name, expected in save_all_kinds(tmp_path).items():
        image = app.read_image(str(tmp_path / name))
        assert image.mode == "RGB" and image.size == expected.size, name
        assert np.array_equal(np.asarray(image), np.asarray(expected)), name
        assert Page(app.classify(str(tmp_path / name))[2]).rows, name


def test_what_is_no_image_or_too_large_is_told(start, tmp_path, monkeypatch):
    app = start("stock")
    assert Image.MAX_IMAGE_PIXELS == 50_000_000
    images()[0].save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    contents = {"cut.png": content[: len(content) // 2], "text.png": b"no image", "empty.jpg": b"", "a.svg": b"<svg/>"}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        empty, preview, result = app.classify(str(tmp_path / name))
        assert (empty, preview) == (None, "") and app.UNREADABLE in result and name not in result
        assert not (tmp_path / name).exists()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("1", (20, 11)).save(tmp_path / "large.png")
    assert app.TOO_LARGE in app.classify(str(tmp_path / "large.png"))[2]
    assert not (tmp_path / "large.png").exists()


@pytest.mark.parametrize("form", FORMS)
def test_the_folder_is_ready_for_the_hub(form, tmp_path):
    folder = write_space(tmp_path / "new" / "space", "me/cells", TITLE, form)
    assert folder == tmp_path / "new" / "space"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    constants = {}
    for node in ast.parse((folder / "app.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            constants[ast.unparse(node.targets[0])] = node.value.value
    assert constants["TITLE"] == TITLE
    assert f'"MODEL_ID", "me/cells"), os.environ.get("MODEL_FORM", "{form}")' in (folder / "app.py").read_text("utf-8")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card_problems(card) == ([], [])
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata == {
        "title": TITLE,
        "sdk": "gradio",
        "sdk_version": GRADIO_VERSION,
        "python_version": "3.12",
        "app_file": "app.py",
        "models": ["me/cells"],
    }
    assert "<b>blood" not in card.split("---\n", 2)[2]
    assert ("none of these" in card) == (form != "stock") and ("code of its own, which" in card) == (
        form == "standalone"
    )


@pytest.mark.parametrize("form", FORMS)
def test_requirements_are_those_of_the_package(form, tmp_path):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    known = [*config["options"]["install_requires"].split("\n"), *extras["space"].split("\n")]
    known = {Requirement(line).name: line for line in known if line and not line.startswith("#")}
    lines = (write_space(tmp_path, "me/cells", form=form) / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if known.get(Requirement(line).name) != line] == (
        ["dynammo_peft>=0.1,<0.2"] if form == "adapter" else []
    )
    assert known["gradio"] in extras["test"].split("\n")
    assert Requirement(known["gradio"]).specifier.contains(GRADIO_VERSION)
    assert {"gradio", "torch", "transformers"} < {Requirement(line).name for line in lines}


def test_by_default_the_title_is_the_name(tmp_path):
    assert 'TITLE = "cells"\n' in (write_space(tmp_path, "me/cells") / "app.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"repo_id": 'me/x"); import os #'}, "repo_id=.* is no repository on the Hub"),
        ({"repo_id": "me/cells\n"}, "is no repository on the Hub"),
        ({"repo_id": None}, "repo_id=None is no repository on the Hub"),
        ({"form": "onnx"}, "form='onnx' does not exist; choose one of 'adapter', 'standalone', 'stock'"),
        ({"title": " "}, "title=' ' is empty; leave it out"),
        ({"title": "a\nb"}, "must be one line"),
        ({"title": "a\u2028b"}, "must be one line"),
        ({"title": "\ud800"}, "must be one line"),
        ({"title": "/home/anna/cells"}, "title='/home/anna/cells' would publish a path"),
    ],
)
def test_what_cannot_be_written_is_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_space(tmp_path / "space", **{"repo_id": "me/cells", **change})
    assert not (tmp_path / "space").exists()


def test_the_build_holds_the_template(monkeypatch):
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files(["setup.cfg"])
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    held = {package: sorted(names) for package, _, _, names in command.data_files}["dynammo_peft.hub_cards"]
    assert [name for name in held if name.startswith("space")] == [f"space/{name}" for name in FILES]


@pytest.fixture
def browser(monkeypatch):
    """Chromium, which sees nothing but this machine."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        reason = "There is no Chromium with its driver; on Debian: apt-get install chromium chromium-driver"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "no-proxy-server"):
        options.add_argument(f"--{argument}")
    options.add_argument("--window-size=1100,900")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield running
    running.quit()


@pytest.fixture
def address(folders, tmp_path):
    """Where the app runs, in a process without dynammo_peft, as a Space has it."""
    space = write_space(tmp_path / "space", "me/cells", TITLE)
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "dynammo_peft.py").write_text("raise ImportError")
    (tmp_path / "uploads").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {
        "MODEL_ID": str(folders / "standalone"),
        "HF_HOME": str(tmp_path / "hf_home"),
        "PYTHONPATH": str(tmp_path / "blocked"),
        "GRADIO_TEMP_DIR": str(tmp_path / "uploads"),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "NO_PROXY": "127.0.0.1",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "OMP_NUM_THREADS": "1",
    }
    url = f"http://127.0.0.1:{port}/"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment, stdout=log, stderr=log)
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(600):
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                opener.open(url, timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def test_in_a_browser(browser, address, folders, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(folders / "standalone").eval()
    wait = WebDriverWait(browser, 30)
    browser.get(address)

    def upload(path, selector):
        wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, "input[type=file]"))
        browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(path))
        return wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, selector))

    def text(selector):
        return browser.find_element(By.CSS_SELECTOR, selector).text

    best, previews = ".classes tbody tr:first-child", set()
    for label, image in enumerate(images()):
        image.save(tmp_path / f"{label}.png")
        with torch.no_grad():
            output = model(pixels(image))
        assert output.logits.argmax() == label
        upload(tmp_path / f"{label}.png", ".classes")
        wait.until(lambda _, name=NAMES[label]: text(f"{best} th") == name)
        percent = f"{100 * output.logits[0].softmax(0).max().item():.1f} %"
        assert [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, f"{best} td")] == [
            f"task {label // 2 + 1}",
            percent,
        ]
        assert text(".unknown") == f"none of these: {output.unknown_score.item():.3g}"
        preview = browser.find_element(By.CSS_SELECTOR, "img.preview")
        assert browser.execute_script("return arguments[0].naturalWidth", preview) == 96
        previews.add(preview.get_attribute("src"))
    assert len(previews) == 4
    assert browser.title == text("h1") == TITLE
    assert "no medical device" in text("body") and "Images are not stored" in text("body")
    browser.save_screenshot(tmp_path / "space.png")

    (tmp_path / "cells.dcm").write_bytes(b"no image")
    upload(tmp_path / "cells.dcm", "[role=alert]")
    assert "no image that can be read" in text("[role=alert]") and str(tmp_path) not in text("body")
    assert not browser.find_elements(By.CSS_SELECTOR, ".classes, img.preview")
    if os.environ.get("KEEP_SCREENSHOTS"):
        (ROOT / "outputs").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "space.png", ROOT / "outputs")

    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith(address) for url in urls)
    assert [url for url in urls if not url.startswith((address, "data:", "blob:"))] == []
    assert [path for path in (tmp_path / "uploads").rglob("*") if path.is_file() and path.stat().st_size] == []
    assert (tmp_path / "hf_home" / "modules").is_dir(), "The model's own code was not used."
    assert "Traceback" not in (tmp_path / "log").read_text()
