"""DeepSpeed's config: by name from ds_configs/, or a file of the user's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from translora.config import TrainConfig
from translora.errors import InputError
from translora.run.rundir import EXECUTION_ONLY

DS_CONFIGS = next(
    path / "ds_configs" for path in Path(__file__).resolve().parents[1:3] if (path / "ds_configs").is_dir()
)
"""At the top of a checkout, or inside the installed package."""
PLAIN = "zero3.json"
IN_TRAIN_CONFIG = {
    "optimizer": "distill.learning_rate",
    "scheduler": "distill.epochs",
    "gradient_clipping": "distill.max_grad_norm",
}
"""What a DeepSpeed config may not hold, and the setting of the fleet file that stands for it."""


COUNTS = ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "zero_hpz_partition_size")
"""Settings of ZeRO that are numbers, beside stage3_max_*."""


def check_partitions(config: Mapping[str, Any], num_workers: int, where: str) -> None:
    """Whether ZeRO++'s copies of the base can be dealt out to the workers.

    Raises:
        InputError: they cannot; DeepSpeed would end at its start.
    """
    size = config["zero_optimization"].get("zero_hpz_partition_size", 1)
    if size > 1 and num_workers > size and num_workers % size:
        raise InputError(
            f"{where}: zero_hpz_partition_size {size} does not divide {num_workers} workers; take a multiple of it, or "
            "set it to the GPUs of a machine"
        )


def deciding(config: TrainConfig) -> dict[str, Any]:
    """The settings of a training that decide what is learnt; the others change rounding alone.

    DeepSpeed's config is one of them where it has the base's weights gathered in fewer bits; the name of the plain one
    stands for all others. A file that is not here is refused where it is needed.
    """
    try:
        zero = read_ds_config(config.ds_config, torch.float32)["zero_optimization"]
    except InputError:
        zero = {}
    quantised = any(zero[key] for key in zero if "quantized" in key and key != "zero_quantized_gradients")
    own = Path(config.ds_config).name if quantised else PLAIN
    return config.model_dump(exclude=EXECUTION_ONLY) | {"ds_config": own}


def is_resident(config: Mapping[str, Any], num_weights: int) -> bool:
    """Whether a base stays whole on every worker once it has been gathered: no weight of it is ever given back.

    Args:
        num_weights: of the base.
    """
    return float(config["zero_optimization"].get("stage3_param_persistence_threshold", 100_000)) >= num_weights


def read_ds_config(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """A DeepSpeed config by path or by its name in ds_configs/, with bf16 set to the resolved dtype.

    Raises:
        InputError: no such file, not ZeRO stage 3, an "auto" value (only HF Trainer resolves those), or a setting that
            belongs into the fleet file.
    """
    path = next((path for path in (Path(name), DS_CONFIGS / name) if path.is_file()), None)
    if path is None:
        raise InputError(
            f"distill.ds_config: {name} is no file and not in ds_configs/; give the path of a DeepSpeed config"
        )
    try:
        config: dict[str, Any] = json.loads(text := path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if '"auto"' in text:
        raise InputError(f'{path}: "auto" is resolved by HF Trainer only; write numbers')
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") != 3:
        raise InputError(f"{path}: expected an object whose zero_optimization.stage is 3")
    if not isinstance(zero.get("offload_param", {}), dict):
        raise InputError(f"{path}: zero_optimization.offload_param must be an object; leave it out for none")
    for key in (key for key in zero if key.startswith("stage3_max_") or key in COUNTS):
        if isinstance(zero[key], bool) or not isinstance(zero[key], (int, float)) or not 0 <= zero[key] < 1e18:
            raise InputError(f"{path}: zero_optimization.{key} is {zero[key]!r}, expected a number")
    # DeepSpeed holds the base only. Its optimizer and its clipping would couple the adapters.
    for key, instead in IN_TRAIN_CONFIG.items():
        if config.get(key):
            raise InputError(f"{path}: {key} has no effect here, remove it; set {instead}")
    config["bf16"] = {"enabled": dtype == torch.bfloat16}
    return config
