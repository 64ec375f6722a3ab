"""DeepSpeed ZeRO-3 around a frozen base and a trainable bank: loading, and setting the adapter in training.

Everything here is collective: every rank calls it, in the same order.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from translora.bundle.base import inspect_base
from translora.config import BaseModelConfig, TrainConfig
from translora.engine.loading import load_model, resolve_dtype
from translora.lora.bank import AdapterBank, new_bank
from translora.run.files import write_bytes

logger = logging.getLogger(__name__)
Pair = tuple[torch.Tensor, torch.Tensor]
STUDENT = "student"
"""The bank's one slot: students are trained one after the other."""
MOMENTS = ("exp_avg", "exp_avg_sq")
DS_CONFIGS = next(
    path / "ds_configs" for path in Path(__file__).resolve().parents[1:3] if (path / "ds_configs").is_dir()
)
"""At the top of a checkout, or inside the installed package."""
_RESIDENT: list[HfDeepSpeedConfig] = []  # transformers holds its DeepSpeed config by weak reference only


@dataclass
class AdapterState:
    """An adapter in training, in float32 on the CPU; pairs are (A [r, in], B [out, r])."""

    step: int
    weights: dict[str, Pair]
    moments: dict[str, dict[str, Pair]]
    """AdamW's exp_avg and exp_avg_sq."""
    losses: list[float] = field(default_factory=list)


def fresh_state(weights: dict[str, Pair]) -> AdapterState:
    """Step 0: the given weights, zero moments."""
    zeros = {name: (torch.zeros_like(lora_A), torch.zeros_like(lora_B)) for name, (lora_A, lora_B) in weights.items()}
    return AdapterState(step=0, weights=weights, moments={key: dict(zeros) for key in MOMENTS})


def read_ds_config(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """A DeepSpeed config by path or by its name in ds_configs/, with bf16 set to the resolved dtype.

    Raises:
        ValueError: no such file, not ZeRO stage 3, or an "auto" value (only HF Trainer resolves those).
    """
    path = next((path for path in (Path(name), DS_CONFIGS / name) if path.is_file()), None)
    if path is None:
        raise ValueError(
            f"distill.ds_config: {name} is no file and not in ds_configs/; give the path of a DeepSpeed config"
        )
    text = path.read_text(encoding="utf-8")
    try:
        config: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if '"auto"' in text:
        raise ValueError(f'{path}: "auto" is resolved by HF Trainer only; write numbers')
    if config.get("zero_optimization", {}).get("stage") != 3:
        raise ValueError(f"{path}: zero_optimization.stage must be 3")
    config["bf16"] = {"enabled": dtype == torch.bfloat16}
    return config


def load_engine(base: BaseModelConfig, config: TrainConfig) -> tuple[Any, AdapterBank]:
    """Load the base partitioned over the ranks, put a one-slot bank on it and start DeepSpeed."""
    dtype = resolve_dtype(config.dtype)
    ds_config = read_ds_config(config.ds_config, dtype)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    _RESIDENT[:] = [HfDeepSpeedConfig(ds_config)]
    model = load_model(base, dtype, place=None)
    for name, parameter in model.named_parameters():
        assert hasattr(parameter, "ds_id"), f"{name} is not partitioned: the model was not loaded under ZeRO-3"
    check_loaded(model, base.model)
    lora = config.lora
    bank = new_bank(model, [STUDENT], target_modules=lora.target_modules, rank=lora.rank, alpha=lora.alpha)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()  # transformers recomputes in training mode only; LoRA here has no dropout, bases none
    optimizer = torch.optim.AdamW(bank.parameters(), lr=config.learning_rate, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=bank.parameters(), optimizer=optimizer, config=ds_config, dist_init_required=False
    )
    return engine, bank


def check_loaded(model: nn.Module, base: str, max_tensors: int = 8) -> None:
    """Compare some partitioned weights with the files: a silently re-initialised base must never train.

    Guards against transformers #43964 and #45313. Collective.

    Raises:
        ValueError: a weight differs from its file.
    """
    info = inspect_base(base)
    parameters = {name: p for name, p in model.named_parameters() if name in info.shapes and p.ndim > 0}
    assert parameters, "no parameter of the model bears the name of a tensor in the files"
    names = sorted(parameters)[:: max(1, len(parameters) // max_tensors)]
    wrong: list[str | None] = [None]
    for name in names:
        with deepspeed.zero.GatheredParameters([parameters[name]]):
            if dist.get_rank() == 0:
                stored = _stored_slice(info.path, name)
                loaded = parameters[name].detach()[: len(stored)].cpu()
                if not torch.equal(loaded, stored.to(loaded.dtype)):
                    wrong[0] = name
    dist.broadcast_object_list(wrong, src=0)
    if wrong[0]:
        raise ValueError(f"{base}: {wrong[0]} differs from its file after loading under ZeRO-3; pin transformers")


def _stored_slice(directory: Path, name: str, rows: int = 4) -> torch.Tensor:
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            if name in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                return handle.get_slice(name)[:rows]
    raise AssertionError(f"{name} is in the header of no file of {directory}")


def set_adapter(engine: Any, bank: AdapterBank, state: AdapterState) -> None:
    """Make `state` the adapter in training: parameters, AdamW moments and step count."""
    optimizer = engine.optimizer
    place = engine.device
    for partition in optimizer.fp32_partitioned_groups_flat:
        # DeepSpeed leaves AdamW's state to the first step; the moments below need it now.
        inner = optimizer.optimizer.state[partition]
        for key in MOMENTS:
            inner.setdefault(key, torch.zeros_like(partition))
        inner["step"] = torch.tensor(float(state.step))
    for name, module in bank.modules.items():
        for index, parameter in enumerate((module.lora_A, module.lora_B)):
            safe_set_local_fp32_param(parameter, _own_part(parameter, state.weights[name][index]).to(place))
            for key in MOMENTS:
                part = _own_part(parameter, state.moments[key][name][index])
                safe_set_local_optimizer_state(parameter, part.to(place), key)
    # The setters above change the float32 partitions alone: copy them to the weights of the forward pass.
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        # They are resident, hence stale: release them, then gather the new values.
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    engine.zero_grad()


def _own_part(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a full value; ZeRO-3 pads parameters that the number of ranks does not divide.

    DeepSpeed's own setters of full values (0.19.8) read past the end there.
    """
    size: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    padded = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    return padded.narrow(0, size * dist.get_rank(), size)


def get_adapter(engine: Any, bank: AdapterBank, step: int, losses: list[float]) -> AdapterState:
    """Gather the adapter in training to every rank's CPU."""
    weights: dict[str, Pair] = {}
    moments: dict[str, dict[str, Pair]] = {key: {} for key in MOMENTS}
    for name, module in bank.modules.items():
        pair = (module.lora_A, module.lora_B)
        weights[name] = tuple(safe_get_full_fp32_param(p)[0].cpu().clone() for p in pair)
        for key in MOMENTS:
            values = (safe_get_full_optimizer_state(p, key)[0].cpu().clone() for p in pair)
            moments[key][name] = tuple(values)
    return AdapterState(step=step, weights=weights, moments=moments, losses=list(losses))


def write_checkpoint(work_dir: Path, state: AdapterState, recipe: str) -> None:
    """Rank 0 replaces the job's checkpoint: LoRA weights, moments and losses, never the base."""
    if dist.get_rank() == 0:
        tensors = {}
        for kind, pairs in {"weights": state.weights, **state.moments}.items():
            for name, (lora_A, lora_B) in pairs.items():
                tensors[f"{kind}/{name}/A"], tensors[f"{kind}/{name}/B"] = lora_A, lora_B
        metadata = {"step": str(state.step), "losses": json.dumps(state.losses), "recipe": recipe}
        write_bytes(work_dir / "checkpoint.safetensors", save(tensors, metadata))
    dist.barrier()


def read_checkpoint(work_dir: Path, recipe: str) -> AdapterState | None:
    """The job's last checkpoint, or None where there is none of the same recipe or it cannot be read."""
    path = work_dir / "checkpoint.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata()
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        logger.warning("%s: cannot be read (%s); the training starts again", path, error)
        return None
    if metadata.get("recipe") != recipe:
        return None
    kinds: dict[str, dict[str, Pair]] = {kind: {} for kind in ("weights", *MOMENTS)}
    for key in tensors:
        kind, name, factor = key.split("/")
        if factor == "A":
            kinds[kind][name] = (tensors[key], tensors[f"{kind}/{name}/B"])
    weights = kinds.pop("weights")
    return AdapterState(int(metadata["step"]), weights, kinds, json.loads(metadata["losses"]))
