"""Models on several devices: FSDP 2 for training, a device map for a teacher that fills the cache.

FSDP 2 shards every parameter over the processes and gathers one layer at a time. A script's module
(`TokenLevelLoss` and the like) is the root of what is sharded. Embeddings, final norm and head are
its own: they are gathered when its `forward` begins and stay until its backward pass ends, so that
the loss, which is outside of all layers, finds the head whole.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import FullyShardedDataParallelPlugin, align_module_device
from torch import Tensor, device, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

UNSUPPORTED = {  # accelerate's variables
    "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG",
    "FSDP_OFFLOAD_PARAMS", "FSDP_IGNORED_MODULES",
}  # fmt: skip


def start_accelerator(**options: Any) -> Accelerator:
    """accelerate as it was launched, with FSDP on CPUs too; `ValueError` for what lacks support."""
    on = {name for name, value in os.environ.items() if value.lower() not in {"", "0", "false"}}
    for name in sorted(on & UNSUPPORTED):
        raise ValueError(f"{name} is not supported: use --use_fsdp --fsdp_version 2 alone")
    if "FSDP_ACTIVATION_CHECKPOINTING" in on:
        raise ValueError("--fsdp_activation_checkpointing: use --gradient-checkpointing instead")
    if "ACCELERATE_USE_FSDP" not in on:
        return Accelerator(**options)
    if os.environ.get("FSDP_VERSION") != "2":
        raise ValueError("FSDP 1 is not supported: add --fsdp_version 2")
    plugin = FullyShardedDataParallelPlugin(
        # Read with weights_only=True. Sharded checkpoints have metadata that would be unpickled.
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,  # each process loads the whole student, and checks it
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
    )
    accelerator = Accelerator(fsdp_plugin=plugin, **options)
    if accelerator.use_distributed:  # accelerate itself has FSDP on GPUs only
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def layer_kinds(model: PreTrainedModel) -> set[str]:
    """The classes of the layers that are gathered one at a time; `ValueError` if none is known."""
    present = {type(module).__name__ for module in model.modules()}
    if not (kinds := present & set(model._no_split_modules or ())):
        raise ValueError(f"FSDP: transformers names no layers of {type(model).__name__}")
    return kinds


def shard_for_inference(model: PreTrainedModel) -> None:
    """Keep this process's share of all but the head. A forward pass gathers one layer at a time,
    so every process must run equally many."""
    kinds = layer_kinds(model)
    for module in [m for m in model.modules() if type(m).__name__ in kinds]:
        fully_shard(module)
    fully_shard(model.base_model, reshard_after_forward=True)


def without_weights(model: nn.Module, *others: Any) -> Any:
    """Copies of the model and of objects that refer to it, with empty parameters."""
    empty = {id(p): nn.Parameter(p.new_empty(0), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy((model, *others), empty)


def fill(model: nn.Module, source: nn.Module | None, dtype: torch.dtype | None = None) -> None:
    """Gather the weights of `source` into its copy, in every process; None empties the copy.

    They get `dtype` as if they were loaded in it: transformers exempts some, such as routers, and
    computes buffers that are not saved, such as rotary frequencies, in float32.
    """
    if source is None:
        for parameter in model.parameters():
            parameter.data = parameter.new_empty(0)
        return
    saved = model.state_dict().keys()
    exempt = [re.compile(k.replace("*", ".*")) for k in source._keep_in_fp32_modules_strict or ()]
    targets, sources = ([*m.named_parameters(), *m.named_buffers()] for m in (model, source))
    for (name, target), (_, weight) in zip(targets, sources, strict=True):
        part = weight.detach()
        if dtype and name in saved and part.is_floating_point():
            name = name.replace(".base_layer", "")  # peft's name for an adapted layer
            part = part if any(kind.search(name) for kind in exempt) else part.to(dtype)
        target.data = part.full_tensor() if isinstance(part, DTensor) else part


def number(value: Any) -> float:
    """The value of a scalar, which under FSDP may need every process."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


def spread_head(model: PreTrainedModel, home: device) -> Sequence[Tensor | None] | None:
    """Weight and bias of the head of a model with a device map, on the device `home`; None if it
    has no head. From now on the backbone returns its states on the device of its inputs."""
    add_hook_to_module(model.base_model, AlignDevicesHook(io_same_device=True), append=True)
    if (head := model.get_output_embeddings()) is None:
        return None
    with align_module_device(head, home):  # it may have been offloaded
        return head.weight.detach(), getattr(head, "bias", None)
