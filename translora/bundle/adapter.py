"""An adapter on disk: does it fit a base (headers first, then its numbers), and its copy into a bundle."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from translora.bundle.base import BaseInfo
from translora.bundle.hub import name_of_path
from translora.bundle.modules import linear_modules, output_head
from translora.bundle.reading import FLOATS, MAX_ADAPTER_HEADER_BYTES, read_header, read_json_object
from translora.errors import InputError
from translora.lora.kinds import MAX_RANK
from translora.run.files import digest, sha256_file, write_json

logger = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
README = "README.md"
MAX_CONFIG_BYTES = 1_000_000
SETS_OF_NAMES = ("target_modules", "exclude_modules", "feedforward_modules")
"""Settings that PEFT writes in an order that differs by process."""
_ELSEWHERE = "the adapter belongs to another base, use it with that one"


def same_name(one: str, other: str) -> bool:
    """Whether two names of a base agree in their last path component (`org/name`, `/models/name`, `name`)."""
    return name_of_path(one) == name_of_path(other)


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json as it is.

    Raises:
        InputError: it is missing, too long or not JSON.
    """
    return read_json_object(directory / CONFIG, "save the adapter with PEFT's save_pretrained", MAX_CONFIG_BYTES)


def portable_config(config: Mapping[str, Any], base_name: str) -> dict[str, Any]:
    """The config with the base's name where a path of this machine was, and sets sorted, so that hashes repeat."""
    places = [key for key in ("base_model_name_or_path", "tokenizer_name_or_path") if config.get(key)]
    names = {key: sorted(config[key], key=str) for key in SETS_OF_NAMES if isinstance(config.get(key), list)}
    return {**config, **names, **dict.fromkeys(["base_model_name_or_path", *places], base_name)}


def recorded_base(directory: Path) -> str | None:
    """The base that adapter_config.json names, or None.

    Raises:
        InputError: adapter_config.json is missing or not JSON.
    """
    name = read_adapter_config(directory).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def is_in_bank(directory: Path) -> bool:
    """Whether the adapter bank has the method of an adapter; PEFT itself computes the others.

    Raises:
        InputError: adapter_config.json is missing or not JSON.
    """
    from translora.lora.peft_io import is_banked

    return is_banked(read_adapter_config(directory))


def adapter_digest(directory: Path) -> str:
    """Hash of what an adapter is: its config and its weights, and not of the notes and checkpoints beside them."""
    return digest(*(sha256_file(directory / name) for name in (CONFIG, WEIGHTS)))


def check_recorded_base(directory: Path, expected: str, remedy: str, *, editable: bool = True) -> None:
    """Refuse an adapter whose config names another base than `expected`; `editable` unless a hash covers the config.

    Raises:
        InputError: names both, `remedy`, and what to do when both are one model.
    """
    recorded = recorded_base(directory)
    if recorded is None or same_name(recorded, expected):
        return
    if editable:
        remedy = f"{remedy}, or, if both are one model, write {expected!r} there"
    raise InputError(
        f"{directory / CONFIG}: base_model_name_or_path is {recorded!r}, but the base is {expected!r}; {remedy}"
    )


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor, from the header; refuses a pickle instead of the weights and what is no float."""
    pickled = path.with_name("adapter_model.bin")
    if not path.exists() and pickled.exists():
        raise InputError(f"{pickled}: pickled weights are never loaded; save the adapter as {WEIGHTS}")
    remedy = "copy the adapter again, or save it with PEFT's save_pretrained"
    tensors = read_header(path, remedy, MAX_ADAPTER_HEADER_BYTES)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise InputError(f"{path}: {name} is {tensor.dtype}; save the adapter in a floating-point dtype")
    return {name: tensor.shape for name, tensor in tensors.items()}


def _check_pairs(path: Path, base: BaseInfo) -> None:
    """Bound what is loaded of a LoRA for the bank: pairs of the base's shapes, no giant rank.

    The names are compared with the base here, before the config's patterns are matched against them.
    """
    from translora.lora.peft_io import check_name

    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in _read_shapes(path).items():
        match = check_name(name, path)
        shapes.setdefault(match[1], {})[match[2]] = shape
        if match[2] == "A" and shape and shape[0] > MAX_RANK:
            raise InputError(f"{path}: {name} has rank {shape[0]}, the limit is {MAX_RANK}; use a smaller rank")
    linears = linear_modules(base)
    for module, pair in shapes.items():
        if module not in linears:
            raise InputError(f"{path}: adapts {module}, {_misfit(module, base)}")
        _check_shapes(path, module, pair, linears[module], base)


def _check_shapes(
    path: Path, module: str, pair: dict[str, tuple[int, ...]], expected: tuple[int, int], base: BaseInfo
) -> None:
    """Refuse a pair that is none, and one for a matrix of another shape than `expected` (out, in)."""
    if set(pair) != {"A", "B"}:
        raise InputError(f"{path}: {module} has only lora_{next(iter(pair))}; save the adapter again")
    shape_A, shape_B = pair["A"], pair["B"]
    if len(shape_A) != 2 or len(shape_B) != 2 or shape_A[0] != shape_B[1]:
        raise InputError(f"{path}: {module} has A {list(shape_A)} and B {list(shape_B)}; save the adapter again")
    if (shape_B[0], shape_A[1]) != expected:
        raise InputError(
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


def highest_rank(directory: Path) -> int:
    """The highest rank that a LoRA's config names; 0 where it names none."""
    config = read_adapter_config(directory)
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else [])]
    return max((rank for rank in ranks if isinstance(rank, int)), default=0)


def check_adapter(directory: Path, base: BaseInfo) -> None:
    """Check that a PEFT directory is sound and that the adapter fits `base`.

    Raises:
        InputError: a file is missing or truncated, a method or an option is not supported; a module is none of the
            base's linear modules, is its output head or has another shape; a number is not finite. Names the file and
            the remedy.
    """
    if not is_in_bank(directory):
        _check_method(directory, base)
        return
    from translora.lora.peft_io import lora_config, read_lora

    path = directory / WEIGHTS
    lora_config(directory)  # what it says of an option is clearer than what its tensors do
    _check_pairs(path, base)
    lora = read_lora(directory)
    for module, factors in lora.modules.items():
        _check_finite(path, module, factors)
    if all(not lora_B.any() for _, lora_B in lora.modules.values()):
        logger.warning("%s: every B is zero, so the adapter answers as its base does", path)


def _check_finite(path: Path, name: str, tensors: Iterable[Any]) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise InputError(f"{path}: {name} holds NaN or infinity; the training diverged, train the adapter again")


def _check_method(directory: Path, base: BaseInfo) -> None:
    """Check an adapter that the bank does not have against what PEFT would make of its config on this base."""
    from translora.lora.methods import expected_shapes, method_config
    from translora.lora.peft_io import read_tensors

    path = directory / WEIGHTS
    config = method_config(directory)  # before a byte of the weights
    if base.is_encoder_decoder and config.is_prompt_learning:
        raise InputError(
            f"{directory / CONFIG}: {config.peft_type.value}: virtual tokens in front of an encoder are not supported; "
            "of an encoder-decoder's adapters, those that change layers are"
        )
    shapes = _read_shapes(path)
    try:
        expected = expected_shapes(base, config)
    except ValueError as error:
        raise InputError(f"{directory / CONFIG}: {error}; {_ELSEWHERE}") from error
    for name in sorted(expected.keys() ^ shapes.keys()):
        fault = "lacks" if name in expected else "has beside them"
        raise InputError(
            f"{path}: {fault} {name}, going by its config and {base.name!r}; {_ELSEWHERE}, or save the adapter again"
        )
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise InputError(
                f"{path}: {name} is {list(shape)}, on {base.name!r} it is {list(expected[name])}; {_ELSEWHERE}"
            )
    for name, tensor in read_tensors(path).items():
        _check_finite(path, name, [tensor])


def copy_files(source: Path, target: Path, base: BaseInfo) -> None:
    """Copy weights and config, the latter as `portable_config` has it."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    write_json(target / CONFIG, portable_config(config, base.name))


def is_copy(copy: Path, source: Path, base: BaseInfo) -> bool:
    """Whether `copy_files` would make the one of the other."""
    made, own = (portable_config(read_adapter_config(directory), base.name) for directory in (copy, source))
    return made == own and sha256_file(copy / WEIGHTS) == sha256_file(source / WEIGHTS)


def copy_readme(source: Path, target: Path, base: BaseInfo) -> None:
    """Copy README.md, if there is one, without the path that PEFT writes into it for a local base.

    A link that leads out of the adapter's directory is not followed, but to the blobs of the hub's cache.
    """
    if not (source / README).is_file():
        return
    own = {source.resolve(), source.resolve().parent.parent / "blobs"}
    if (place := (source / README).resolve()).parent not in own:
        logger.warning("%s: leads to %s, outside the adapter: left out", source / README, place)
        return
    text = (source / README).read_text(encoding="utf-8", errors="replace")
    recorded = recorded_base(source)
    if recorded is not None and "/" in recorded:
        text = text.replace(recorded, base.name)
    (target / README).write_text(text, encoding="utf-8")
