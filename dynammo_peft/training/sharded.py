"""Training where parameters are spread over processes: FSDP2 and DeepSpeed ZeRO.

Both take a network over for good: `fully_shard` makes its parameters pieces, in place, and cannot be undone, and
DeepSpeed's engine keeps them to itself. But adapters are merged, and features computed, with whole weights. So a copy
is trained, and what it learned is taken back.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer
from transformers.integrations import unset_hf_deepspeed_config


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether networks are trained in pieces."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def set_up_sharding(accelerator: Accelerator) -> None:
    """Makes FSDP and DeepSpeed do what the same training does without them; refuses settings that cannot.

    To be called once the accelerator is made, before the model is loaded. Without sharding it does nothing.

    Args:
        accelerator (`Accelerator`): Where and how.

    Raises:
        ValueError: If a setting cannot be followed.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        _check_fsdp(accelerator)
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        _set_up_deepspeed(accelerator)


def _check_fsdp(accelerator: Accelerator) -> None:
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version={plugin.fsdp_version} is not supported; set fsdp_version: 2 in fsdp_config.")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading=True would leave all processes but one without weights; set it to false "
            "in fsdp_config."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing=True is not supported; set it to false in fsdp_config, and call "
            "model.gradient_checkpointing_enable()."
        )
    backend = accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO:
        raise ValueError(f"dynamo_backend={backend.value} is not supported with FSDP2; leave dynamo_config out.")


def _set_up_deepspeed(accelerator: Accelerator) -> None:
    config = accelerator.deepspeed_plugin.deepspeed_config
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"mixed_precision={accelerator.mixed_precision!r} is not supported with DeepSpeed, which would round the "
            "statistics of BatchNorm layers too; set mixed_precision: 'no', or take FSDP2."
        )
    if config.get("gradient_clipping", "auto") == "auto":
        # DeepSpeed and Accelerate clip to a norm of 1 unless told otherwise; training elsewhere does not clip.
        config["gradient_clipping"] = 0.0
    # Under ZeRO-3 transformers would load the model in pieces, whatever zero3_init_flag says.
    unset_hf_deepspeed_config()


def training_copy(accelerator: Accelerator, network: nn.Module) -> nn.Module:
    """What to train in place of a network: itself, or a copy where it will be sharded.

    To be called before the optimizer is made, on all processes. While a copy is trained the network waits in main
    memory; [`take_back`] returns it.

    Args:
        accelerator (`Accelerator`): Where and how.
        network (`nn.Module`): A network with the same values on all processes.

    Returns:
        `nn.Module`: To be prepared by [`prepare`]; its parameters are pieces already under FSDP2.

    Raises:
        ValueError: If a setting of FSDP or DeepSpeed cannot be followed.
    """
    if not is_sharded(accelerator):
        return network
    set_up_sharding(accelerator)
    twin = copy.deepcopy(network.to("cpu"))
    return _fully_shard(accelerator, twin) if accelerator.is_fsdp2 else twin


def prepare(
    accelerator: Accelerator, network: nn.Module, optimizer: Optimizer, batch_size: int
) -> tuple[nn.Module, Any]:
    """`accelerator.prepare`, for what [`training_copy`] gave.

    Args:
        accelerator (`Accelerator`): Where and how.
        network (`nn.Module`): What [`training_copy`] gave.
        optimizer (`Optimizer`): For its parameters.
        batch_size (`int`): Images a step and process.
    """
    if accelerator.is_fsdp2:
        # Accelerate would shard by classes of the model that it saw first; see `_fully_shard`.
        return network, accelerator.prepare_optimizer(optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Accelerate would ask a loader, and the stage before may have had other batches.
        sizes = {"train_micro_batch_size_per_gpu": batch_size, "train_batch_size": "auto"}
        accelerator.deepspeed_plugin.deepspeed_config.update(sizes)
    return accelerator.prepare(network, optimizer)


@torch.no_grad()
def take_back(accelerator: Accelerator, network: nn.Module, prepared: nn.Module) -> None:
    """Copies what a copy of a network has learned into the network; without sharding they are one, and all is done.

    Afterwards the network is on the accelerator's device, whole on each process, with the copy's parameters and this
    process's buffers, each part in the copy's mode.

    Args:
        accelerator (`Accelerator`): Where and how.
        network (`nn.Module`): What was given to [`training_copy`].
        prepared (`nn.Module`): The copy as prepared; it must not be used any more.
    """
    if not is_sharded(accelerator):
        return
    learned = _fsdp2_state(prepared) if accelerator.is_fsdp2 else _deepspeed_state(prepared)
    unexpected = network.to(accelerator.device).load_state_dict(learned, strict=False).unexpected_keys
    if unexpected:
        raise RuntimeError(f"The trained copy has {unexpected[0]!r}, which the network has not.")
    for own, trained in zip(network.modules(), accelerator.unwrap_model(prepared).modules()):
        own.training = trained.training


def _fully_shard(accelerator: Accelerator, network: nn.Module) -> nn.Module:
    """Shards blocks one by one and then the rest, which is gathered once a step: adapters, heads, embeddings.

    By hand, since Accelerate 1.15 cannot prepare most image classifiers for FSDP2: it shards embeddings twice, fails
    where a model does not name its embeddings, and casts BatchNorm's weights to half precision but not its statistics.

    Under mixed precision parameters are gathered in float32 and computed with under autocast, as without sharding.
    """
    plugin = accelerator.state.fsdp_plugin
    names = plugin.transformer_cls_names_to_wrap or getattr(network, "_no_split_modules", None) or ()
    options = {"mp_policy": MixedPrecisionPolicy(), "offload_policy": plugin.cpu_offload}
    # Inner modules first: what is in a unit already is left out of the next.
    for module in reversed(list(network.modules())):
        if module is not network and type(module).__name__ in names:
            fully_shard(module, reshard_after_forward=plugin.reshard_after_forward, **options)
    fully_shard(network, **options)
    forward = network.forward

    @functools.wraps(forward)
    def forward_under_autocast(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    network.forward = forward_under_autocast
    return network


def _fsdp2_state(prepared: nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters, whole, and this process's buffers."""
    return get_model_state_dict(prepared, options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True))


def _deepspeed_state(prepared: nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters, whole and as precise as the optimizer knows them, and this process's buffers."""
    from deepspeed.utils import safe_get_full_fp32_param

    state = {}
    for name, parameter in prepared.module.named_parameters():
        if parameter.requires_grad:
            whole = safe_get_full_fp32_param(parameter)
            state[name] = parameter if whole is None else whole
    persistent = prepared.module.state_dict()
    return state | {name: buffer for name, buffer in prepared.module.named_buffers() if name in persistent}
