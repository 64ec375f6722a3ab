"""LoRA adapters on disk in PEFT's format: adapter_config.json and adapter_model.safetensors.

Shapes: A [r, in], B [out, r]; the adapted module computes W x + scaling * B A x.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from translora.bundle.adapter import CONFIG, WEIGHTS, read_adapter_config
from translora.errors import InputError
from translora.lora.kinds import MAX_RANK
from translora.run.files import write_bytes

PREFIX = "base_model.model."
LORA_TENSOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_(A|B)\.weight")
MAX_PATTERNS = 16
MAX_NAMES, MAX_NAME_LENGTH = 2000, 256
"""Of the names of modules in one setting."""
_THROUGH_PEFT = {"use_dora": "DoRA", "lora_bias": "LoRA biases"}
"""Options of a LoRA that the bank does not have; PEFT computes such an adapter (see translora.lora.methods)."""
_UNSUPPORTED = {
    "modules_to_save": "fully trained modules (modules_to_save)",
    "layer_replication": "layer replication",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "LoRA on raw parameters (target_parameters)",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "fan_in_fan_out": "transposed (Conv1D) weights",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow routing",
    "use_bdlora": "block-diagonal LoRA",
}
_PATTERN = r"(.*\.)?({})$"
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Values of init_lora_weights, beside true and false, with which PEFT (0.21) leaves the base's weights alone."""
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True)
class LoraWeights:
    """One LoRA adapter: `modules[name] = (A [r, in], B [out, r])`, `scaling[name]`, and PEFT's config."""

    modules: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scaling: dict[str, float]
    config: dict[str, Any]

    @property
    def max_rank(self) -> int:
        """Largest rank over the modules."""
        return max(lora_A.shape[0] for lora_A, _ in self.modules.values())


def _compiled(config: dict[str, Any], option: str) -> list[tuple[re.Pattern[str], float]]:
    """PEFT's rank_pattern or alpha_pattern, its keys compiled once (re's own cache holds 512)."""
    pattern = config.get(option) or {}
    return [(re.compile(_PATTERN.format(key)), float(value)) for key, value in pattern.items()]


def _pattern_value(patterns: list[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    """The value of the first key that matches the end of the module's name, as in PEFT."""
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def check_pattern(key: str, option: str, path: Path | str) -> bool:
    """Refuse a key of rank_pattern or alpha_pattern that could take for ever to match; True if it is no plain name.

    Repeated groups and chains of repeats or alternatives can backtrack exponentially; module names need none.
    """
    if (
        len(key) > MAX_NAME_LENGTH
        or re.search(r"\)[*+?{]|\(\?(?!:)", key)
        or len(re.findall(r"[*+?{]", key)) > 2
        or key.count("|") > 6
    ):
        raise InputError(f"{path}: {option} has the key {key[:80]!r}; use plain module names as keys")
    try:
        re.compile(_PATTERN.format(key))
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: {option} has the key {key!r}, no valid pattern ({error})") from error
    return re.search(r"[*+?{(|]", key) is not None


def check_names(names: Collection[Any], what: str) -> None:
    """Refuse lists or keys without bound: each name is compared with every module, and PEFT makes all ends of each.

    Raises:
        InputError: there are too many, or one is no module's.
    """
    if len(names) > MAX_NAMES:
        raise InputError(f"{what}: {len(names)} entries, the limit is {MAX_NAMES}; use a pattern")
    if long := next((name for name in names if len(str(name)) > MAX_NAME_LENGTH), None):
        raise InputError(f"{what}: {str(long)[:80]!r}... has {len(str(long))} characters; use plain module names")


def check_numbers(config: Mapping[str, Any], path: Path | str, remedy: str = "restore the adapter's config") -> None:
    """Refuse ranks and alphas that are no positive numbers, and name patterns that could take for ever to match."""
    values = {option: config.get(option) for option in ("r", "lora_alpha")}
    num_patterns = 0
    for option in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(option) or {}
        if not isinstance(pattern, dict):
            raise InputError(f"{path}: {option} is no object; {remedy}")
        check_names(pattern, f"{path}: {option}")
        for key, value in pattern.items():
            values[f"{option}.{key}"] = value
            num_patterns += check_pattern(key, option, path)
    if num_patterns > MAX_PATTERNS:
        raise InputError(
            f"{path}: rank_pattern and alpha_pattern have {num_patterns} keys that are patterns, the limit is "
            f"{MAX_PATTERNS}; use plain module names as keys"
        )
    for option, value in values.items():
        integral = not option.endswith("alpha") and not option.startswith("alpha")
        kinds = (int,) if integral else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 1e9:
            whole = "whole and " if integral else ""
            raise InputError(f"{path}: {option} is {value!r}, expected a positive number, {whole}below 1e9; {remedy}")


def check_init(init: object, path: Path | str, remedy: str | None = None) -> None:
    """Refuse an initialisation that changes the base's weights: PEFT does it again at loading, the bank does not.

    Args:
        remedy: of whoever is yet to train the adapter.
    """
    if not isinstance(init, str) or init.lower() in _PLAIN_INITS:
        return
    convert = "convert it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    retrain = "train the adapter again with init_lora_weights: true"
    raise InputError(
        f"{path}: init_lora_weights is {init[:80]!r}; initialisations that change (or may change) the base's weights "
        "are not supported; "
        f"{remedy or (convert if init.lower().startswith(_CONVERTIBLE_INITS) else retrain)}"
    )


def is_banked(config: Mapping[str, Any]) -> bool:
    """Whether the adapter bank has adapters of this config; PEFT itself computes the others."""
    return config.get("peft_type") == "LORA" and not any(config.get(option) for option in _THROUGH_PEFT)


def refuse_options(config: Mapping[str, Any], where: Path | str, *, through_peft: bool = False) -> None:
    """Refuse options that are not supported: by the bank, or `through_peft`.

    Raises:
        InputError: names the option.
    """
    for option, meaning in (_UNSUPPORTED | ({} if through_peft else _THROUGH_PEFT)).items():
        if config.get(option):
            raise InputError(f"{where}: {option} is set: {meaning} is not supported; retrain the adapter without it")
    if config.get("bias", "none") != "none":
        raise InputError(f"{where}: bias is {config['bias']!r}; only bias='none' is supported; train it without biases")


def lora_config(directory: Path) -> dict[str, Any]:
    """Read adapter_config.json.

    Raises:
        InputError: missing, not JSON, not LoRA, or with options that the adapter bank does not cover.
    """
    path, config = directory / CONFIG, read_adapter_config(directory)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be read here")
    refuse_options(config, path)
    check_init(config.get("init_lora_weights"), path)
    check_numbers(config, path)
    return config


def check_name(key: str, path: Path | str) -> re.Match[str]:
    """Module and factor of a tensor's name.

    Raises:
        InputError: it is none of a LoRA's.
    """
    match = LORA_TENSOR.fullmatch(key)
    if match is None:
        whole = key.endswith(".weight") and "lora_" not in key.rpartition(".")[0].rpartition(".")[2]
        raise InputError(
            f"{path}: unexpected tensor {key!r}; only lora_A and lora_B of linear modules are supported"
            + ", train the adapter without the embedding and the output head, which is saved whole" * whole
        )
    return match


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors by name, on the CPU.

    Raises:
        InputError: the file is missing, truncated or a pickle; names it and the remedy.
    """
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        if pickled.exists():
            raise InputError(f"{pickled}: pickled weights are never loaded; convert the adapter to {path.name}")
        raise InputError(f"{path}: missing; save the adapter with PEFT's save_pretrained")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated or not safetensors ({error}); copy the file again") from error


def read_lora(directory: str | Path) -> LoraWeights:
    """Read a PEFT LoRA directory, on the CPU, in the dtype of the file.

    Raises:
        InputError: a file is missing, truncated or a pickle; a tensor has no partner, a rank does not
            fit the config or exceeds MAX_RANK. Names the file and the remedy.
    """
    directory = Path(directory)
    config = lora_config(directory)
    path = directory / WEIGHTS
    tensors = read_tensors(path)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = check_name(key, path)
        pairs.setdefault(match[1], {})[match[2]] = tensor
    if not pairs:
        raise InputError(f"{path}: holds no tensors; save the adapter again (ZeRO-3 needs its parameters gathered)")
    modules: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    scaling: dict[str, float] = {}
    ranks, alphas = _compiled(config, "rank_pattern"), _compiled(config, "alpha_pattern")
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise InputError(f"{path}: {module} has only lora_{next(iter(pair))}; save the adapter again")
        lora_A, lora_B = pair["A"], pair["B"]
        rank = int(_pattern_value(ranks, module, config.get("r", 0)))
        alpha = _pattern_value(alphas, module, config.get("lora_alpha", rank))
        if not 1 <= rank <= MAX_RANK:
            raise InputError(f"{directory / 'adapter_config.json'}: rank {rank} of {module} is outside 1..{MAX_RANK}")
        if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != rank or lora_B.shape[1] != rank:
            raise InputError(
                f"{path}: {module} has A {list(lora_A.shape)} and B {list(lora_B.shape)}, but the config says "
                f"rank {rank}; restore the adapter_config.json that belongs to these weights"
            )
        modules[module] = (lora_A, lora_B)
        scaling[module] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return LoraWeights(modules=modules, scaling=scaling, config=config)


def truncated(lora_A: torch.Tensor, lora_B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank] whose B A is nearest to that of larger factors, its size shared between them.

    By a decomposition of the factors' own rank.
    """
    Q_B, R_B = torch.linalg.qr(lora_B.double())
    Q_A, R_A = torch.linalg.qr(lora_A.double().T)
    U, sizes, Vh = torch.linalg.svd(R_B @ R_A.T)
    roots = sizes[:rank].sqrt()
    return ((roots[:, None] * Vh[:rank]) @ Q_A.T).float(), (Q_B @ (U[:, :rank] * roots)).float()


def pad_rank(pair: tuple[torch.Tensor, torch.Tensor], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B filled up with zeros to one rank for all modules: every reader of PEFT's format takes that."""
    lora_A, lora_B = pair
    grow = rank - len(lora_A)
    return torch.nn.functional.pad(lora_A, (0, 0, 0, grow)), torch.nn.functional.pad(lora_B, (0, grow))


def write_lora(
    directory: Path,
    modules: Mapping[str, Sequence[torch.Tensor]],
    *,
    alpha: float,
    base_model: str,
    target_modules: list[str] | None = None,
    use_rslora: bool = False,
    with_encoder: bool = False,
) -> None:
    """Write `modules[name] = (A [r, in], B [out, r])`, all of one rank, as a PEFT directory.

    The caller gathers partitioned tensors first and calls this on one rank only. PEFT adapts the base's modules whose
    names end in one of `target_modules`; the last parts of the names written here, when unset.

    Args:
        with_encoder: the base is an encoder-decoder.
    """
    ranks = {lora_A.shape[0] for lora_A, _ in modules.values()}
    assert len(ranks) == 1, f"one rank an adapter, got {sorted(ranks)}"
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if with_encoder else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": ranks.pop(),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": use_rslora,
        "use_dora": False,
        "target_modules": target_modules or sorted({name.rsplit(".", 1)[-1] for name in modules}),
    }
    tensors = {}
    for name, (lora_A, lora_B) in modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = lora_A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = lora_B.detach().cpu().contiguous()
    write_bytes(directory / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
