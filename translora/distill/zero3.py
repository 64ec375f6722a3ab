"""A frozen base that DeepSpeed ZeRO-3 partitions over the ranks: loading, forward, backward, memory.

DeepSpeed gathers and releases the base's weights around every module. It never sees the adapters: those are plain
tensors on the rank that trains them, so nothing of them is partitioned, gathered or reduced. Everything here is
collective: every rank calls it, in the same order.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from safetensors import safe_open
from torch import nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from translora.bundle.base import BaseInfo, UnusableBaseError, info_of
from translora.config import BaseModelConfig, TrainConfig
from translora.distill.build_lock import free_build_locks, leave_out_unused_op
from translora.distill.data import Sample, pack
from translora.distill.ds_config import read_ds_config
from translora.distill.frozen import keep_no_inputs, recompute
from translora.distill.loading import load_partitioned
from translora.distill.memory import gathered_weights, known_gang_bytes, weights_of
from translora.distill.plan import GangBytes
from translora.distill.slots import ResidentBase
from translora.engine.attention import PACKED
from translora.engine.head import Head
from translora.engine.loading import caps_attention, device, load_tokenizer, resolve_dtype
from translora.engine.memory import release_memory
from translora.lora.bank import new_bank
from translora.lora.banked import BASE_SLOT

logger = logging.getLogger(__name__)
PACKING_TOLERANCE = 0.05
"""Relative to the hidden states' mean; bfloat16 alone makes less than 0.01."""
_RESIDENT: list[HfDeepSpeedConfig] = []  # transformers holds its DeepSpeed config by weak reference only


class ShardedBase:
    """The base under ZeRO-3 with a bank for students on it; resident as long as the worker lives."""

    def __init__(self, base: BaseModelConfig, config: TrainConfig) -> None:
        self.place, self.dtype = device(), resolve_dtype(config.dtype)
        info = info_of(base)
        self.tokenizer, self.identity = load_tokenizer(base), info.identity
        self.ds_config = ds_config = read_ds_config(config.ds_config, self.dtype)
        free_build_locks()
        if self.place.type == "cpu":
            leave_out_unused_op()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        _RESIDENT[:] = [HfDeepSpeedConfig(ds_config)]
        self.model = load_partitioned(base, self.dtype, ds_config)
        for name, parameter in self.model.named_parameters():
            assert hasattr(parameter, "ds_id"), f"{name} is not partitioned: the model was not loaded under ZeRO-3"
        check_loaded(self.model, info)
        self.attention = self.model.config._attn_implementation
        # Capped scores are eager elsewhere, whose mask lets one sample's NaN through to the others of the row.
        capped = caps_attention(self.model.config.to_dict())
        if self.attention in ("sdpa", *(["eager"] if capped else [])):
            self.model.set_attn_implementation(PACKED)
        attention = self.model.config._attn_implementation
        logger.info("%s: %s partitioned over %d, attention %s", info.name, self.dtype, dist.get_world_size(), attention)
        self.bank = new_bank(self.model, config.lora.target_modules)
        self.head = Head.of(self.model)
        if config.gradient_checkpointing:
            recompute(self.model)
        elif any(len(parameter.ds_shape) > 2 for parameter in self.model.parameters()):
            # Experts are multiplied as slices of one tensor: autograd keeps the slices, and with them all of it.
            logger.warning(
                "%s: every worker ends up with all experts of all layers; set gradient_checkpointing to true",
                self.model.config.model_type,
            )
        keep_no_inputs()
        # The trunk alone: the head is gathered by `gathered_head`, once a pass and not twice.
        self.engine, *_ = deepspeed.initialize(model=self.model.base_model, config=ds_config, dist_init_required=False)
        check_packing(self, self.model.config.model_type)

    def __call__(self, inputs: dict[str, object]) -> torch.Tensor:
        """Last hidden states [T, D] of a packed batch."""
        # Not engine(...): that wants a DeepSpeed optimizer for its backward pass. ZeRO-3's hooks sit on the modules.
        hidden_1TD = self.engine.module(**inputs, use_cache=False).last_hidden_state
        assert isinstance(hidden_1TD, torch.Tensor)
        return hidden_1TD[0]

    def backward(self, loss: torch.Tensor) -> None:
        """The backward pass, and the release of weights whose module had no gradient to pass on."""
        loss.backward()
        self.engine.optimizer.release_backward_leftovers()

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        """A forward pass in which PEFT's layers may read the weights of the layers below them (DoRA, LoHa, HRA, ...).

        DeepSpeed gathers a weight when it is read outside its own module's pass, and from then on with the module that
        is computed around it, forward and backward; its own engine's forward switches this on, which is not used here.
        """
        own = [module._parameters for module in self.engine.module.modules()]
        partitioned = [one for one in own if isinstance(one, ZeROOrderedDict)]
        for parameters in partitioned:
            parameters._in_forward = True
        try:
            yield
        finally:
            for parameters in partitioned:
                parameters._in_forward = False

    @contextlib.contextmanager
    def gathered_head(self) -> Iterator[Head]:
        """The head with its whole weight on every rank; one that stays there is not given back after the loss."""
        weights: list[Any] = list(self.head.parameters)
        stays = all(one.ds_persist and one.ds_status == ZeroParamStatus.AVAILABLE for one in weights)
        with contextlib.nullcontext() if stays else deepspeed.zero.GatheredParameters(self.head.parameters):
            yield self.head

    def awaited_bytes(self) -> int:
        """What this rank is yet to gather of the base at the fullest; one that stays on it is there by now."""
        parameters: list[Any] = list(self.model.parameters())
        here = sum(one.ds_numel for one in parameters if one.ds_status == ZeroParamStatus.AVAILABLE)
        return max(0, gathered_weights(weights_of(self.model), self.ds_config) - here) * self.dtype.itemsize

    def free_bytes(self) -> int:
        """Memory that this rank has left, less what it is yet to gather of the base."""
        release_memory()
        if self.place.type == "cuda":
            free = int(torch.cuda.mem_get_info(self.place)[0])
        else:
            here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))  # ranks on this machine
            free = int(psutil.virtual_memory().available) // here
        return free - self.awaited_bytes()

    def gang_bytes(self, train: TrainConfig, num_samples: int, num_tokens: int) -> GangBytes:
        """What a gang takes of it, see translora.distill.memory."""
        config, shapes = self.model.config, self.bank.shapes
        flash = config._attn_implementation.startswith("flash")
        return known_gang_bytes(config, self.dtype, train, shapes, num_samples, num_tokens, flash=flash)


def check_packing(base: ResidentBase, kind: str) -> None:
    """Two short samples must give packed what they give alone. Collective.

    Raises:
        InputError: they do not: state-space and convolution layers, for example, run on from sample to sample.
    """
    samples = [Sample([5, 6, 7, 8], [9, 10]), Sample([11, 12, 13], [14])]
    with torch.no_grad():
        hidden = []
        for part in (samples, samples[:1], samples[1:]):
            batch = pack([(BASE_SLOT, part, 1.0)], base.place)
            base.bank.route_segments(batch.segments)
            hidden.append(base(batch.inputs).float())
    packed_TD, *alone = hidden
    difference = (packed_TD - torch.cat(alone)).abs().mean() / packed_TD.abs().mean()
    if not difference < PACKING_TOLERANCE:
        raise UnusableBaseError(
            f"{kind}: samples that are packed into one row see each other in this base "
            f"(hidden states differ by {float(difference):.0%}); it cannot be trained in packed batches"
        )


def check_loaded(model: nn.Module, info: BaseInfo, max_tensors: int = 8) -> None:
    """Compare some partitioned weights with the files: a silently re-initialised base must never train.

    Guards against transformers #43964 and #45313. Collective.

    Raises:
        InputError: a weight differs from its file.
    """
    parameters = {name: p for name, p in model.named_parameters() if name in info.shapes and p.ndim > 0}
    assert parameters, "no parameter of the model bears the name of a tensor in the files"
    names = sorted(parameters)[:: max(1, len(parameters) // max_tensors)]
    wrong: list[str | None] = [None]
    for name in names:
        with deepspeed.zero.GatheredParameters([parameters[name]]):
            if dist.get_rank() == 0:
                stored = _stored_ends(info.path, name)
                parameter = parameters[name].detach()
                loaded = _ends(parameter, len(parameter)).cpu()
                if not torch.equal(loaded, stored.to(loaded.dtype)):
                    wrong[0] = name
    dist.broadcast_object_list(wrong, src=0)
    if wrong[0]:
        raise UnusableBaseError(
            f"{info.path}: {wrong[0]} differs from its file after loading under ZeRO-3; pin transformers"
        )


def _ends(rows: Any, num_rows: int, count: int = 4) -> torch.Tensor:
    """The first rows and the last, which lie with different ranks."""
    return torch.cat((rows[:count], rows[max(0, num_rows - count) :]))


def _stored_ends(directory: Path, name: str) -> torch.Tensor:
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            if name in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                found = handle.get_slice(name)
                return _ends(found, found.get_shape()[0])
    raise AssertionError(f"{name} is in the header of no file of {directory}")
