"""A merged model as an ONNX file, for onnxruntime and others."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Optional, Union

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..tuner.image_size import as_pair
from .modeling_dynammo import DynammoForImageClassification, DynammoImageClassifierConfig
from .standalone import to_standalone


INPUT, OUTPUTS = "pixel_values", ["logits", "unknown_score"]
# A protobuf message cannot be larger; then tensors go into a file beside it.
MAX_PROTOBUF_BYTES = 2**31 - 2**20


class _Outputs(nn.Module):
    """The model with tensors as outputs."""

    def __init__(self, model: DynammoForImageClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(pixel_values, return_dict=True)
        return output.logits, output.unknown_score


def export_onnx(
    model: Union[PeftModel, DynammoForImageClassification],
    path: Union[str, os.PathLike],
    adapter_name: str = "merged",
    image_size: Optional[Union[int, Sequence[int]]] = None,
    opset_version: int = 20,
) -> Path:
    """
    Writes a merged model as an ONNX file, in float32.

    Its input is `pixel_values` `(B, C, H, W)`, as the image processor returns them, with any number of images of one
    size; its outputs are `logits` `(B, N)` and `unknown_score` `(B,)`. Its metadata holds `id2label` and `image_size`
    as JSON.

    Args:
        model (`Union[PeftModel, DynammoForImageClassification]`): A model with task adapters, or one from
            `to_standalone`; left as it is.
        path (`Union[str, os.PathLike]`): The file to write. Tensors of more than 2 GB go into a file beside it.
        adapter_name (`str`): Which adapter of a `PeftModel`.
        image_size (`Optional[Union[int, Sequence[int]]]`):
            Height and width of the images, in pixels. If `None`, those that the model learned from.
        opset_version (`int`): Version of ONNX's operators, 18 or later.

    Returns:
        `Path`: The file.

    Raises:
        ImportError: If onnx or onnxscript is not installed.
        ValueError: If the model or its adapter cannot stand alone, as `to_standalone` explains.

    Example:

        ```py
        >>> export_onnx(method.model, "cells.onnx")
        >>> session = onnxruntime.InferenceSession("cells.onnx")
        >>> logits, unknown_score = session.run(None, {"pixel_values": pixel_values.numpy()})
        >>> labels = json.loads(session.get_modelmeta().custom_metadata_map["id2label"])
        ```
    """
    _check_installed()
    if opset_version < 18:
        raise ValueError(f"opset_version={opset_version} is too old for torch's exporter; use 18 or later.")
    standalone = _float_copy(model, adapter_name)
    config = standalone.config
    size = as_pair(image_size or config.image_size or getattr(config.backbone_config, "image_size", None) or 224)
    # Two, since an exporter may take an example of one image for a constant.
    images = torch.zeros(2, getattr(config.backbone_config, "num_channels", 3), *size)
    program = torch.onnx.export(
        _Outputs(standalone).eval(),
        (images,),
        input_names=[INPUT],
        output_names=OUTPUTS,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=opset_version,
        dynamo=True,
        verbose=False,
    )
    labels = {str(number): name for number, name in config.id2label.items()}
    program.model.metadata_props.update(id2label=json.dumps(labels), image_size=json.dumps(list(size)))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensor_bytes = sum(tensor.nbytes for tensor in standalone.state_dict().values())
    program.save(path, external_data=tensor_bytes > MAX_PROTOBUF_BYTES)
    return path


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"export_onnx needs onnx and onnxscript ({error}): pip install 'dynammo_peft[onnx]'"
        ) from error


def _float_copy(model: Union[PeftModel, DynammoForImageClassification], adapter_name: str) -> nn.Module:
    if isinstance(model, PeftModel):
        standalone = to_standalone(model, adapter_name)
    elif getattr(getattr(model, "config", None), "model_type", None) == DynammoImageClassifierConfig.model_type:
        # Also a model whose class came with its repository.
        standalone = copy.deepcopy(model)
    else:
        raise ValueError(f"A {type(model).__name__} is neither a PeftModel nor made by `to_standalone`.")
    standalone = standalone.cpu().float().eval().requires_grad_(False)
    # The exporter takes fused attention apart, into a larger and slower graph.
    standalone.backbone.set_attn_implementation("eager")
    return standalone
