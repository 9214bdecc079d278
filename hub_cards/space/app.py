"""A page that shows what an image classifier says of an image. For research; it is no medical device."""

from __future__ import annotations

import base64
import os
from html import escape
from io import BytesIO
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification


try:
    import dynammo_peft  # knows the models, so that no code of the model's repository is run
except ImportError:
    dynammo_peft = None

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
TITLE = "{{ title }}"
# A repository on the Hub or a folder; "adapter", "standalone" or "stock".
MODEL, FORM = os.environ.get("MODEL_ID", "{{ repo_id }}"), os.environ.get("MODEL_FORM", "{{ form }}")
TOP = 8  # classes shown
Image.MAX_IMAGE_PIXELS = 50_000_000  # Pillow opens up to twice as many.

NOTICE = """<p class="notice"><b>For research. This is no medical device.</b> Do not base decisions about patients on
it, and upload nothing that shows who somebody is. It knows only the classes that it has learned.</p>"""
PRIVACY = '<p class="small">Images are not stored: the uploaded file is deleted as soon as it has been read.</p>'
UNKNOWN = """<p class="unknown">none of these: <b>{:.3g}</b></p><p class="small">From 0 (a class fits) to 1 (no class
does). The score is not calibrated: it is no probability. Which score is too high is for you to choose, on images of
your own, of these classes and of others.</p>"""
UNREADABLE = "This file is no image that can be read. Use PNG, JPEG, TIFF, BMP or WebP; convert DICOM to one of them."
TOO_LARGE = "This image has more than 100 million pixels. Crop it or make it smaller."


def load_model() -> torch.nn.Module:
    """The model in float32 and evaluation mode."""
    if FORM == "adapter":
        from peft import AutoPeftModel

        return AutoPeftModel.from_pretrained(MODEL, dtype=torch.float32).eval()
    own_code = {"trust_remote_code": True} if FORM == "standalone" and dynammo_peft is None else {}
    return AutoModelForImageClassification.from_pretrained(MODEL, dtype=torch.float32, **own_code).eval()


processor = AutoImageProcessor.from_pretrained(MODEL)
model = load_model().to("cuda" if torch.cuda.is_available() else "cpu")
head_sizes = getattr(model.active_peft_config if FORM == "adapter" else model.config, "head_sizes", ())
tasks = [task for task, size in enumerate(head_sizes, start=1) for _ in range(size)]


def read_image(path: str) -> Image.Image:
    """The file's image as it was read in training: upright, RGB, of 16-bit grey values the upper eight bits."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


@torch.no_grad()
def predict(image: Image.Image) -> tuple[list[float], float | None]:
    """The probability of each class, and the score for "none of these" if the model has one."""
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"].to(model.device)
    output = model(pixel_values=pixel_values)
    score = model.unknown_score(pixel_values) if FORM == "adapter" else getattr(output, "unknown_score", None)
    return output.logits[0].softmax(dim=0).tolist(), None if score is None else score.item()


def show(probabilities: list[float], score: float | None) -> str:
    """The likeliest classes as an HTML table, and what the score means."""
    rows = []
    for index in sorted(range(len(probabilities)), key=lambda index: -probabilities[index])[:TOP]:
        name, percent = escape(model.config.id2label[index]), f"{100 * probabilities[index]:.1f}"
        task = f"<td>task {tasks[index]}</td>" if tasks else ""
        bar = f'<div class="bar"><div style="width: {percent}%"></div></div>'
        rows.append(f'<tr><th scope="row">{name}{bar}</th>{task}<td>{percent} %</td></tr>')
    header = f"<th>class</th>{'<th>learned in</th>' if tasks else ''}<th>probability</th>"
    more = f'<p class="small">and {len(probabilities) - TOP} more</p>' if len(probabilities) > TOP else ""
    table = f'<table class="classes"><thead><tr>{header}</tr></thead><tbody>{"".join(rows)}</tbody></table>{more}'
    return table + ("" if score is None else UNKNOWN.format(score))


def classify(path: str) -> tuple[None, str, str]:
    """Empties the upload, and shows the image as it was read and what the model says of it."""
    try:
        image = read_image(path)
    except Exception as error:  # Decoders fail in many ways.
        too_large = isinstance(error, Image.DecompressionBombError)
        return None, "", f'<p class="notice" role="alert">{TOO_LARGE if too_large else UNREADABLE}</p>'
    finally:
        Path(path).unlink(missing_ok=True)
    result, buffer = show(*predict(image)), BytesIO()
    image.thumbnail((640, 640))
    image.save(buffer, "JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    return None, f'<img class="preview" alt="the uploaded image" src="data:image/jpeg;base64,{data}">', result


# What was uploaded and never read is deleted after a minute or two; without `run_history`, browsers keep nothing.
with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(60, 60)) as demo:
    gr.HTML(f"<h1>{escape(TITLE)}</h1>{NOTICE}")
    with gr.Row():
        with gr.Column():
            upload = gr.File(label="Image", height=160)
            preview = gr.HTML()
            gr.HTML(PRIVACY)
        with gr.Column():
            result = gr.HTML('<p class="small">What the model says comes here.</p>', apply_default_css=False)
    upload.upload(classify, upload, [upload, preview, result], api_visibility="private", concurrency_limit=1)

if __name__ == "__main__":
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    style = Path(__file__).with_name("style.css")
    demo.launch(theme=theme, css_paths=style, max_file_size="50mb", run_history=False, footer_links=[], ssr_mode=False)
