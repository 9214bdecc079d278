"""A merged DynaMMo model (Qazi et al. 2024, https://arxiv.org/abs/2404.14099) that needs torch and transformers only.

In front of some blocks of the backbone stands an adapter `x + alpha * ReLU(Conv(ReLU(Conv(x))))`; one linear layer
reads the pooled features and holds the heads of all tasks, each with its classes and "others". From the package
dynammo_peft, Apache-2.0.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


# What hooks need to know or tell of the current forward of a thread: `image_size`, and `pooled` outputs of blocks.
_FORWARD = threading.local()
# Which dimension of images `(B, C, H, W)` a mirror turns round.
_FLIPPED = {"horizontal": 3, "vertical": 2}


class DynammoImageClassifierConfig(PreTrainedConfig):
    """
    Configuration of a [`DynammoForImageClassification`].

    Args:
        backbone_config (`Optional[Union[dict, PreTrainedConfig]]`): Configuration of the backbone.
        sites (`Sequence[dict]`): For each adapter its block's `name` and the arguments of [`Adapter`].
        feature_modules (`Sequence[dict]`): Blocks whose pooled outputs the heads read: `name`, `layout` and `prefix`.
        head_module (`str`): Name of the backbone's classifier, whose input the heads read.
        head_sizes (`Sequence[int]`): Number of classes of each head, without "others".
        num_features (`int`): Features that the heads read.
        scoring (`Literal["log_odds", "min_others"]`): How the heads give one tensor of logits: each class's logit
            minus its head's "others" logit, or the head with the least "others" probability decides.
        flips (`Sequence[Literal["horizontal", "vertical"]]`): Mirror images whose features are averaged with an
            image's own in evaluation mode; each costs a forward pass of the backbone.
        image_size (`Optional[list[int]]`): Height and width of the images that the model was made for, in pixels.
    """

    model_type = "dynammo"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        backbone_config: Optional[Union[dict[str, Any], PreTrainedConfig]] = None,
        sites: Sequence[dict[str, Any]] = (),
        feature_modules: Sequence[dict[str, Any]] = (),
        head_module: str = "classifier",
        head_sizes: Sequence[int] = (),
        num_features: int = 0,
        scoring: Literal["log_odds", "min_others"] = "log_odds",
        flips: Sequence[Literal["horizontal", "vertical"]] = (),
        image_size: Optional[Sequence[int]] = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(backbone_config, PreTrainedConfig):
            backbone_config = AutoConfig.for_model(**{"model_type": "vit", **(backbone_config or {})})
        self.backbone_config = backbone_config
        self.sites = [dict(site) for site in sites]
        self.feature_modules = [dict(module) for module in feature_modules]
        self.head_module = head_module
        self.head_sizes = list(head_sizes)
        self.num_features = num_features
        self.scoring = scoring
        self.flips = list(flips)
        self.image_size = None if image_size is None else list(image_size)
        super().__init__(**kwargs)


@dataclass
class DynammoImageClassifierOutput(ImageClassifierOutput):
    """
    Output of a [`DynammoForImageClassification`], with one entry more than its base class.

    Args:
        unknown_score (`Optional[Tensor]`): Probability that all heads say "others", `(B,)`: the higher, the less an
            image looks like any class. It is calibrated only if the heads were trained on images of others.
    """

    unknown_score: Optional[torch.FloatTensor] = None


class Adapter(nn.Module):
    """A residual bottleneck of two convolutions, computed on what enters a block.

    Args:
        layout (`Literal["map", "tokens"]`): `(B, C, H, W)`, or `(B, L, C)` with the patch tokens last.
        channels (`int`): C.
        bottleneck_channels (`int`): Channels between the convolutions.
        kernel_size (`int`): Height and width of the kernels.
        padding (`int`): Of the first convolution; the second undoes its change of the map's size.
        prefix (`int`): Tokens in front of the patch tokens.
        stride (`Sequence[int]`): Pixels of the image per patch token, down and across.
    """

    def __init__(
        self,
        layout: Literal["map", "tokens"],
        channels: int,
        bottleneck_channels: int,
        kernel_size: int,
        padding: int,
        prefix: int = 0,
        stride: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__()
        self.layout, self.prefix, self.stride = layout, prefix, tuple(stride)
        self.down = nn.Conv2d(channels, bottleneck_channels, kernel_size, padding=padding)
        self.up = nn.Conv2d(bottleneck_channels, channels, kernel_size, padding=kernel_size - 1 - padding)
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, grid: Tensor) -> Tensor:
        """`(B, C, H, W)` to the same."""
        hidden = F.relu(self.down(grid.to(self.down.weight.dtype)))
        return grid + (self.alpha * F.relu(self.up(hidden))).to(grid.dtype)

    def before_block(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Hook: replaces the block's first argument."""
        adapt = self.forward if self.layout == "map" else self._adapt_tokens
        if args:
            return (adapt(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": adapt(kwargs["hidden_states"])}

    def _adapt_tokens(self, tokens: Tensor) -> Tensor:
        grid = tokens[:, self.prefix :].transpose(1, 2).unflatten(2, self._grid(tokens.shape[1] - self.prefix))
        patches = self(grid).flatten(2).transpose(1, 2)
        return torch.cat([tokens[:, : self.prefix], patches], dim=1) if self.prefix else patches

    def _grid(self, patches: int) -> tuple[int, int]:
        pixels = _FORWARD.image_size
        # A backbone either drops the pixels beyond the last whole patch or pads them to a patch.
        for rounding in (0, 1):
            height, width = (-(-p // s) if rounding else p // s for p, s in zip(pixels, self.stride))
            if height * width == patches:
                return height, width
        raise ValueError(
            f"An image of {pixels} pixels is no grid of {patches} patches; use multiples of {self.stride}."
        )


class FeatureTap:
    """Hook: keeps a block's output of the current forward, averaged over the image and normalised."""

    def __init__(self, name: str, layout: Literal["map", "tokens"], prefix: int = 0) -> None:
        self.name, self.layout, self.prefix = name, layout, prefix

    def __call__(self, block: nn.Module, args: tuple, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        hidden = hidden.flatten(2) if self.layout == "map" else hidden[:, self.prefix :].transpose(1, 2)
        pooled = hidden.mean(dim=2, dtype=torch.float32)
        _FORWARD.pooled[self.name] = F.layer_norm(pooled, pooled.shape[1:])


class DynammoForImageClassification(PreTrainedModel):
    """
    An image classifier of many tasks: a backbone with folded adapters and one linear layer for all heads.

    Args:
        config ([`DynammoImageClassifierConfig`]): Its configuration.

    Raises:
        ValueError: If the backbone does not have a module that the configuration names, or the configuration's
            heads, labels and scoring do not go together.
    """

    config_class = DynammoImageClassifierConfig
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False
    # The backbone has the last word on these.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    # In half precision, heads on many correlated features would lose what tells classes apart.
    _keep_in_fp32_modules_strict = {"task_heads"}  # noqa: RUF012

    def __init__(self, config: DynammoImageClassifierConfig) -> None:
        super().__init__(config)
        sizes = config.head_sizes
        if config.scoring not in ("log_odds", "min_others"):
            raise ValueError(f"scoring={config.scoring!r} does not exist; choose 'log_odds' or 'min_others'.")
        unknown = [flip for flip in config.flips if flip not in _FLIPPED]
        if unknown:
            raise ValueError(f"flips={config.flips!r} holds {unknown[0]!r}; choose of 'horizontal', 'vertical'.")
        if not sizes or min(sizes) < 1 or sum(sizes) != config.num_labels:
            raise ValueError(
                f"head_sizes={sizes} must be of one class at least and add up to {config.num_labels} labels."
            )
        if config.num_features < 1:
            raise ValueError(f"num_features={config.num_features} must be at least 1.")
        self.backbone = AutoModelForImageClassification.from_config(config.backbone_config)
        self.adapters = nn.ModuleList()
        for site in config.sites:
            self.adapters.append(Adapter(**{key: value for key, value in site.items() if key != "name"}))
            block = self._find(site["name"], "sites")
            block.register_forward_pre_hook(self.adapters[-1].before_block, with_kwargs=True)
        for module in config.feature_modules:
            self._find(module["name"], "feature_modules").register_forward_hook(FeatureTap(**module))
        self._find(config.head_module, "head_module")
        # The backbone's logits become what would have entered its classifier.
        self.backbone.set_submodule(config.head_module, nn.Identity())
        self.task_heads = nn.Linear(config.num_features, sum(sizes) + len(sizes))
        self._index = _head_index(sizes)
        trained = getattr(config.backbone_config, "image_size", None)
        self._trained_size = (trained, trained) if isinstance(trained, int) else tuple(trained or ())
        accepts = inspect.signature(type(self.backbone).forward).parameters
        self._interpolates = bool(trained) and "interpolate_pos_encoding" in accepts
        self.post_init()

    def _find(self, name: str, field: str) -> nn.Module:
        try:
            return self.backbone.get_submodule(name)
        except AttributeError as error:
            saved = self.config.transformers_version
            hint = f"; the model was saved with transformers {saved}." if saved else "; change it."
            raise ValueError(
                f"{type(self.backbone).__name__} has no module {name!r}, named by {field}{hint}"
            ) from error

    def forward(
        self, pixel_values: Tensor, labels: Optional[Tensor] = None, return_dict: Optional[bool] = None, **kwargs: Any
    ) -> Union[tuple, DynammoImageClassifierOutput]:
        """
        Classifies images.

        Args:
            pixel_values (`Tensor`): Images as the image processor returns them, `(B, 3, H, W)`.
            labels (`Optional[Tensor]`): Numbers of the true classes, `(B,)`, for the mean cross-entropy as `loss`.
            return_dict (`Optional[bool]`): Whether to return an output with names instead of a tuple.
            kwargs: Passed on to the backbone, as `output_hidden_states`.

        Returns:
            [`DynammoImageClassifierOutput`]: `logits` `(B, N)` and `unknown_score` `(B,)` among others.
        """
        if pixel_values is None or pixel_values.dim() != 4:
            shape = None if pixel_values is None else tuple(pixel_values.shape)
            raise ValueError(f"pixel_values must be images (B, C, H, W), got {shape}.")
        size = tuple(pixel_values.shape[2:])
        # Image processors give single precision, which most backbones refuse where their weights are half.
        pixel_values = pixel_values.to(self.backbone.dtype)
        if self._interpolates and size != self._trained_size:
            kwargs.setdefault("interpolate_pos_encoding", True)
        flips = [] if self.training else self.config.flips
        pixel_values = torch.cat([pixel_values, *(pixel_values.flip(_FLIPPED[flip]) for flip in flips)])
        _FORWARD.image_size, _FORWARD.pooled = size, {}
        try:
            outputs = self.backbone(pixel_values, return_dict=True, **kwargs)
            pooled = [_FORWARD.pooled[module["name"]] for module in self.config.feature_modules]
        finally:
            _FORWARD.pooled = {}
        features = torch.cat([outputs.logits.flatten(1).float(), *pooled], dim=1)
        if flips:
            features = features.unflatten(0, (1 + len(flips), -1)).mean(dim=0)
        with torch.autocast(features.device.type, enabled=False):
            raw_logits = F.linear(features, self.task_heads.weight.float(), self.task_heads.bias.float())
        logits, unknown_score = self._score(raw_logits)
        output = DynammoImageClassifierOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=getattr(outputs, "attentions", None),
            unknown_score=unknown_score,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _score(self, raw_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits over the classes `(B, N)`, and the probability that all heads say "others" `(B,)`."""
        columns, head, place = (torch.tensor(index, device=raw_logits.device) for index in self._index)
        # (B, T, 1 + max n): "others" first, then the head's classes, then minus infinity.
        grouped = F.pad(raw_logits, (0, 1), value=float("-inf"))[:, columns]
        log_probabilities = grouped.log_softmax(dim=-1)
        unknown_score = log_probabilities[..., 0].sum(dim=1).exp()
        if self.config.scoring == "log_odds":
            return grouped.flatten(1)[:, place] - grouped[:, head, 0], unknown_score
        # Log-odds of "others" can still be told apart where its probability rounds to one.
        chosen = (grouped[..., 0] - grouped[..., 1:].logsumexp(dim=-1)).argmin(dim=1)
        scores = log_probabilities.flatten(1)[:, place]
        # Every class of the chosen head stays above every class outside it.
        gap = scores.amax(dim=1, keepdim=True) - scores.amin(dim=1, keepdim=True) + 1
        return scores - (head != chosen[:, None]) * gap, unknown_score


def _head_index(sizes: Sequence[int]) -> tuple[list[list[int]], list[int], list[int]]:
    """For each head its columns of the raw logits, for each class its head and its place among all heads' columns.

    A head's columns are that of "others", those of its classes, and the one past the end as filling.
    """
    width, widest = sum(sizes) + len(sizes), max(sizes)
    columns, head, place = [], [], []
    for t, n in enumerate(sizes):
        start = sum(sizes[:t]) + t
        columns.append([start + n, *range(start, start + n), *[width] * (widest - n)])
        head += [t] * n
        place += [t * (widest + 1) + 1 + k for k in range(n)]
    return columns, head, place
