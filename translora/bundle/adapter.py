"""An adapter on disk: does it fit a base (headers first, then its numbers), and its copy into a bundle."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from translora.bundle.base import BaseInfo, linear_modules, name_of_path, output_head
from translora.bundle.reading import FLOATS, MAX_ADAPTER_HEADER_BYTES, read_header, read_json_object
from translora.run.files import write_json

logger = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
README = "README.md"
MAX_CONFIG_BYTES = 1_000_000
_ELSEWHERE = "the adapter belongs to another base, use it with that one"


def same_name(one: str, other: str) -> bool:
    """Whether two names of a base agree in their last path component (`org/name`, `/models/name`, `name`)."""
    return name_of_path(one) == name_of_path(other)


def recorded_base(directory: Path) -> str | None:
    """The base that adapter_config.json names, or None.

    Raises:
        ValueError: adapter_config.json is missing or not JSON.
    """
    config = read_json_object(directory / CONFIG, "save the adapter with PEFT's save_pretrained", MAX_CONFIG_BYTES)
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def check_recorded_base(directory: Path, expected: str, remedy: str, *, editable: bool = True) -> None:
    """Refuse an adapter whose config names another base than `expected`; `editable` unless a hash covers the config.

    Raises:
        ValueError: names both, `remedy`, and what to do when both are one model.
    """
    recorded = recorded_base(directory)
    if recorded is None or same_name(recorded, expected):
        return
    if editable:
        remedy = f"{remedy}, or, if both are one model, write {expected!r} there"
    raise ValueError(
        f"{directory / CONFIG}: base_model_name_or_path is {recorded!r}, but the base is {expected!r}; {remedy}"
    )


def _check_headers(path: Path, base: BaseInfo) -> None:
    """Bound what is loaded: no pickle instead of the weights, a sound file, pairs of the base's shapes, no giant rank.

    The names are compared with the base here, before the config's patterns are matched against them.
    """
    from translora.lora.peft_io import MAX_RANK, check_name

    pickled = path.with_name("adapter_model.bin")
    if not path.exists() and pickled.exists():
        raise ValueError(f"{pickled}: pickled weights are never loaded; save the adapter as {WEIGHTS}")
    remedy = "copy the adapter again, or save it with PEFT's save_pretrained"
    tensors = read_header(path, remedy, MAX_ADAPTER_HEADER_BYTES)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is {tensor.dtype}; save the adapter in a floating-point dtype")
        match = check_name(name, path)
        shapes.setdefault(match[1], {})[match[2]] = tensor.shape
        if match[2] == "A" and tensor.shape and tensor.shape[0] > MAX_RANK:
            raise ValueError(f"{path}: {name} has rank {tensor.shape[0]}, the limit is {MAX_RANK}; use a smaller rank")
    linears = linear_modules(base)
    for module, pair in shapes.items():
        if module not in linears:
            raise ValueError(f"{path}: adapts {module}, {_misfit(module, base)}")
        _check_shapes(path, module, pair, linears[module], base)


def _check_shapes(
    path: Path, module: str, pair: dict[str, tuple[int, ...]], expected: tuple[int, int], base: BaseInfo
) -> None:
    """Refuse a pair that is none, and one for a matrix of another shape than `expected` (out, in)."""
    if set(pair) != {"A", "B"}:
        raise ValueError(f"{path}: {module} has only lora_{next(iter(pair))}; save the adapter again")
    shape_A, shape_B = pair["A"], pair["B"]
    if len(shape_A) != 2 or len(shape_B) != 2 or shape_A[0] != shape_B[1]:
        raise ValueError(f"{path}: {module} has A {list(shape_A)} and B {list(shape_B)}; save the adapter again")
    if (shape_B[0], shape_A[1]) != expected:
        raise ValueError(
            f"{path}: {module} adapts a [{shape_B[0]}, {shape_A[1]}] matrix, in {base.name!r} it is "
            f"{list(expected)}; {_ELSEWHERE}"
        )


def _misfit(module: str, base: BaseInfo) -> str:
    """Why no LoRA can be put on a module, and the remedy."""
    if module == output_head(base):
        fault = f"the output head of {base.name!r}; LoRA on the output head is not supported"
    elif f"{module}.weight" in base.shapes:
        fault = f"which is no linear module of {base.name!r}; only LoRA on linear modules is supported"
    else:
        return f"which {base.name!r} does not have; {_ELSEWHERE}"
    return f"{fault}, train the adapter again without it"


def check_adapter(directory: Path, base: BaseInfo) -> None:
    """Check that a PEFT LoRA directory is sound and that each of its modules is a linear module of `base`.

    Raises:
        ValueError: a file is missing or truncated, a module is none of the base's linear modules, is its output
            head or has another shape, a number is not finite; names the file and the remedy.
    """
    path = directory / WEIGHTS
    _check_headers(path, base)
    import torch

    from translora.lora.peft_io import read_lora

    lora = read_lora(directory)
    for module, (lora_A, lora_B) in lora.modules.items():
        if not (torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
            raise ValueError(f"{path}: {module} holds NaN or infinity; the training diverged, train the adapter again")
    if all(not lora_B.any() for _, lora_B in lora.modules.values()):
        logger.warning("%s: every B is zero, so the adapter answers as its base does", path)


def copy_adapter(source: Path, target: Path, base: BaseInfo) -> None:
    """Copy weights and config; the config then names the base by `base.name`, not by a path of this machine.

    PEFT writes the set target_modules in an order that differs by process: it is sorted, so that hashes repeat.
    """
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    modules = config.get("target_modules")
    if isinstance(modules, list):
        config["target_modules"] = sorted(modules, key=str)
    write_json(target / CONFIG, config | {"base_model_name_or_path": base.name})


def copy_readme(source: Path, target: Path, base: BaseInfo) -> None:
    """Copy README.md, if there is one, without the path that PEFT writes into it for a local base."""
    if not (source / README).is_file():
        return
    text = (source / README).read_text(encoding="utf-8", errors="replace")
    recorded = recorded_base(source)
    if recorded is not None and "/" in recorded:
        text = text.replace(recorded, base.name)
    (target / README).write_text(text, encoding="utf-8")
