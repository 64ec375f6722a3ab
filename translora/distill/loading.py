"""Loads a base under ZeRO-3 so that each rank reads its own part of each tensor, and none ever holds the whole base.

transformers (5.23) has rank 0 read every tensor into its memory and hand the parts out: 141 GB for a base of 70B.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, PreTrainedModel, initialization

from translora.bundle.base import UnusableBaseError, info_of, stored_tensors
from translora.bundle.reading import TensorHeader
from translora.config import BaseModelConfig
from translora.engine.loading import attention_of, check_attention, device, load_model, plain_class

try:
    from transformers.integrations.deepspeed import prevent_arange_dtype_change
except ImportError:  # before transformers 5.20, as vLLM 0.32 wants it: initialize_weights makes those buffers again
    prevent_arange_dtype_change = contextlib.nullcontext

logger = logging.getLogger(__name__)
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE_BYTES = 1 << 26
"""Read at a time."""
Stored = dict[str, tuple[Path, TensorHeader]]


def load_partitioned(base: BaseModelConfig, dtype: torch.dtype, ds_config: dict[str, Any]) -> PreTrainedModel:
    """The frozen base in eval mode, partitioned over the ranks. Collective; an HfDeepSpeedConfig must be alive.

    transformers loads what is not stored as it is computed with (under other names, in other shapes), what has a part
    beside the decoder, and what DeepSpeed quantises, partitions twice or keeps on disks.
    """
    path = info_of(base).path
    stored, zero = stored_tensors(path), ds_config["zero_optimization"]
    config = AutoConfig.from_pretrained(path, trust_remote_code=base.trust_remote_code)
    kind = plain_class(config)
    twice = zero.get("zero_hpz_partition_size", 1) > 1 or any(zero.get(key) for key in zero if "quantized" in key)
    on_disk = zero.get("offload_param", {}).get("device") == "nvme"
    if kind is None or twice or on_disk:
        return load_model(base, dtype, place=None)
    check_attention(base, dtype)
    attention = attention_of(base, dtype)
    model = empty_model(kind, config, dtype, attention, ds_config)
    tied = ties_hold(model, stored)
    if not tied:
        del model
        config.tie_word_embeddings = False
        model = empty_model(kind, config, dtype, attention, ds_config)
    if not is_stored(model, stored):
        if not tied:
            raise UnusableBaseError(
                f"{path}: its config.json ties tensors that its files hold as different ones; set tie_word_embeddings "
                "to false there"
            )
        logger.info("%s: its tensors are stored under other names: rank 0 reads them all", path.name)
        del model
        return load_model(base, dtype, place=None)
    for name, parameter in model.named_parameters():
        read_own_part(parameter, *stored[name])
    for name, buffer in persistent_buffers(model).items():
        file, header = stored[name]
        buffer.copy_(read_range(file, header, 0, buffer.numel()).view(buffer.shape))
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    model.initialize_weights()  # of the rest: buffers that no file has, which zero.Init rounded
    dist.barrier()
    model.requires_grad_(False)
    return model.eval()


def empty_model(
    kind: type[PreTrainedModel], config: Any, dtype: torch.dtype, attention: str, ds_config: dict[str, Any]
) -> PreTrainedModel:
    """The model with its parameters partitioned, and nothing in them. Collective."""
    config = copy.deepcopy(config)
    config._attn_implementation, config.dtype = attention, dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with (
            initialization.no_init_weights(),
            prevent_arange_dtype_change(),
            deepspeed.zero.Init(config_dict_or_path=ds_config),
        ):
            model: PreTrainedModel = kind(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    return model


def persistent_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Buffers that a checkpoint holds."""
    kept = set(model.state_dict())
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def is_stored(model: PreTrainedModel, stored: Stored) -> bool:
    """Whether every tensor of the model is in the files under its own name and in its own shape."""
    wanted = {name: tuple(parameter.ds_shape) for name, parameter in model.named_parameters()}
    wanted |= {name: tuple(buffer.shape) for name, buffer in persistent_buffers(model).items()}
    return all(
        name in stored and tuple(stored[name][1].shape) == shape and stored[name][1].dtype in STORED
        for name, shape in wanted.items()
    )


def ties_hold(model: PreTrainedModel, stored: Stored) -> bool:
    """Whether tensors that the config ties are equal where the files have them twice.

    transformers (5.23) unties others, but not under ZeRO-3. Collective: each rank compares its own part.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pairs = [
        (tensor, stored[own], stored[name])
        for name, tensor in model.state_dict(keep_vars=True).items()
        if (own := names.get(id(tensor), name)) != name and own in stored and name in stored
    ]
    if any((one.dtype, one.shape) != (other.dtype, other.shape) for _, (_, one), (_, other) in pairs):
        return False
    pairs = [pair for pair in pairs if pair[1][1].dtype in STORED]
    if not pairs:
        return True
    equal = all(
        torch.equal(read_range(*one, *piece), read_range(*other, *piece))
        for tensor, one, other in pairs
        for piece in own_pieces(tensor, one[1])
    )
    of_all = torch.tensor(int(equal), device=device())
    dist.all_reduce(of_all, op=dist.ReduceOp.MIN)
    return bool(of_all)


def own_pieces(parameter: nn.Parameter, header: TensorHeader) -> list[tuple[int, int]]:
    """This rank's range of a partitioned parameter's flat weights, in pieces that are read at a time."""
    part: Any = parameter.ds_tensor  # type: ignore[attr-defined]
    start = part.ds_numel * dist.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
    stop = min(start + part.ds_numel, parameter.ds_numel)  # type: ignore[attr-defined]
    piece = PIECE_BYTES // STORED[header.dtype].itemsize
    return [(first, min(first + piece, stop)) for first in range(start, stop, piece)]


def read_own_part(parameter: nn.Parameter, file: Path, header: TensorHeader) -> None:
    """Fill this rank's part of a partitioned parameter, a range of its flat weights."""
    part: Any = parameter.ds_tensor  # type: ignore[attr-defined]
    pieces = own_pieces(parameter, header)
    for start, stop in pieces:
        begin = pieces[0][0]
        part.data[start - begin : stop - begin].copy_(read_range(file, header, start, stop))


def read_range(file: Path, header: TensorHeader, start: int, stop: int) -> torch.Tensor:
    """Flat weights start..stop of a stored tensor; no more than these are read, and nothing is mapped."""
    weights = torch.empty(stop - start, dtype=STORED[header.dtype])
    with open(file, "rb", buffering=0) as handle:
        handle.seek(header.start + start * weights.itemsize)
        view = weights.view(torch.uint8).numpy().data
        while view:
            count = handle.readinto(view)
            if not count:
                raise UnusableBaseError(f"{file}: ends before its tensors do; copy or download the base again")
            view = view[count:]
    return weights
