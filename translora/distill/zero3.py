"""A frozen base that DeepSpeed ZeRO-3 partitions over the ranks: loading, forward, backward, memory.

DeepSpeed gathers and releases the base's weights around every module. It never sees the adapters: those are plain
tensors on the rank that trains them, so nothing of them is partitioned, gathered or reduced. Everything here is
collective: every rank calls it, in the same order.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from translora.bundle.base import inspect_base
from translora.config import BaseModelConfig, TrainConfig
from translora.distill.data import Sample, pack
from translora.distill.plan import activation_bytes_per_token
from translora.engine.attention import PACKED
from translora.engine.head import Head
from translora.engine.loading import caps_attention, device, load_model, load_tokenizer, resolve_dtype
from translora.lora.bank import BASE_SLOT, new_bank

logger = logging.getLogger(__name__)
DS_CONFIGS = next(
    path / "ds_configs" for path in Path(__file__).resolve().parents[1:3] if (path / "ds_configs").is_dir()
)
"""At the top of a checkout, or inside the installed package."""
IN_TRAIN_CONFIG = {
    "optimizer": "distill.learning_rate",
    "scheduler": "distill.epochs",
    "gradient_clipping": "distill.max_grad_norm",
}
"""What a DeepSpeed config may not hold, and the setting of the fleet file that stands for it."""
PACKING_TOLERANCE = 0.05
"""Relative to the hidden states' mean; bfloat16 alone makes less than 0.01."""
_RESIDENT: list[HfDeepSpeedConfig] = []  # transformers holds its DeepSpeed config by weak reference only


def read_ds_config(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """A DeepSpeed config by path or by its name in ds_configs/, with bf16 set to the resolved dtype.

    Raises:
        ValueError: no such file, not ZeRO stage 3, an "auto" value (only HF Trainer resolves those), or a setting that
            belongs into the fleet file.
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
    # DeepSpeed holds the base only. Its optimizer and its clipping would couple the adapters.
    for key, instead in IN_TRAIN_CONFIG.items():
        if config.get(key):
            raise ValueError(f"{path}: {key} has no effect here, remove it; set {instead}")
    config["bf16"] = {"enabled": dtype == torch.bfloat16}
    return config


class ShardedBase:
    """The base under ZeRO-3 with a bank for students on it; resident as long as the worker lives."""

    def __init__(self, base: BaseModelConfig, config: TrainConfig) -> None:
        self.place, self.dtype = device(), resolve_dtype(config.dtype)
        self.tokenizer, self.fingerprint = load_tokenizer(base), inspect_base(base.model).fingerprint
        ds_config = read_ds_config(config.ds_config, self.dtype)
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        _RESIDENT[:] = [HfDeepSpeedConfig(ds_config)]
        self.model = load_model(base, self.dtype, place=None)
        for name, parameter in self.model.named_parameters():
            assert hasattr(parameter, "ds_id"), f"{name} is not partitioned: the model was not loaded under ZeRO-3"
        check_loaded(self.model, base.model)
        # Capped scores are eager elsewhere, whose mask lets one sample's NaN through to the others of the row.
        capped = caps_attention(self.model.config.to_dict())
        if self.model.config._attn_implementation in ("sdpa", *(["eager"] if capped else [])):
            self.model.set_attn_implementation(PACKED)
        self.bank = new_bank(self.model, config.lora.target_modules)
        self.head = Head.of(self.model)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.enable_input_require_grads()
            train_without_dropout(self.model)
        # The trunk alone: the head is gathered by `gathered_head`, once a pass and not twice.
        self.engine, *_ = deepspeed.initialize(model=self.model.base_model, config=ds_config, dist_init_required=False)
        self.check_packing()

    def check_packing(self) -> None:
        """Two short samples must give packed what they give alone. Collective.

        Raises:
            ValueError: they do not: state-space and convolution layers, for example, run on from sample to sample.
        """
        samples = [Sample([5, 6, 7, 8], [9, 10]), Sample([11, 12, 13], [14])]
        with torch.no_grad():
            hidden = []
            for part in (samples, samples[:1], samples[1:]):
                batch = pack([(BASE_SLOT, part, 1.0)], self.place)
                self.bank.route_segments(batch.segments)
                hidden.append(self(batch.inputs).float())
        packed_TD, *alone = hidden
        difference = (packed_TD - torch.cat(alone)).abs().mean() / packed_TD.abs().mean()
        if not difference < PACKING_TOLERANCE:
            raise ValueError(
                f"{self.model.config.model_type}: samples that are packed into one row see each other in this base "
                f"(hidden states differ by {float(difference):.0%}); it cannot be trained in packed batches"
            )

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
    def gathered_head(self) -> Iterator[Head]:
        """The head with its whole weight on every rank."""
        with deepspeed.zero.GatheredParameters(self.head.parameters):
            yield self.head

    def memory(self, rank: int, *, recompute: bool) -> dict[str, int]:
        """What the size of the gang is chosen from: bytes free on this rank, per token, and per student."""
        if self.place.type == "cuda":
            free = torch.cuda.mem_get_info(self.place)[0]
        else:
            free = psutil.virtual_memory().available // dist.get_world_size()
        model = self.model.config.get_text_config()
        per_token = activation_bytes_per_token(model, self.dtype.itemsize, recompute=recompute)
        num_parameters = sum(rank * (num_out + num_in) for num_out, num_in in self.bank.shapes.values())
        return {"free_bytes": free, "activation_bytes": per_token, "adapter_bytes": 16 * num_parameters}


def train_without_dropout(model: nn.Module) -> None:
    """Training mode, in which transformers recomputes, without the dropout that it would switch on in some bases.

    A student's result must not depend on the random numbers that its neighbours draw.
    """
    model.train()
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0


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
