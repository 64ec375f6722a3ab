"""What is known of a base model without loading it: its name, its tensors' shapes and a fingerprint of its weights."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from translora.bundle.hub import locate
from translora.bundle.reading import TensorHeader, read_header, read_json_object
from translora.config import BaseModelConfig
from translora.errors import InputError
from translora.run.files import digest, sha256_file
from translora.run.redact import first_line

logger = logging.getLogger(__name__)
PREFIX_BYTES = 4096
COPY_AGAIN = "copy or download the base again"
ENCODER_DECODERS = ("t5", "mt5", "umt5")
"""Model types of those that can be a source."""
_SAYS_NOTHING = ("_name_or_path", "transformers_version")
"""Of a config.json: they decide no answer."""
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


class UnusableBaseError(InputError):
    """A base that cannot be computed with, as is found out where it is loaded: no rerun changes that."""


@dataclass(frozen=True)
class BaseInfo:
    """A base model on disk; the fingerprint covers every tensor's name, dtype, shape and first 4 KiB."""

    name: str
    """Hub id, or the directory's name."""
    path: Path
    """Local directory that transformers loads."""
    fingerprint: str
    """Hex sha256, the same for every sharding of the same weights."""
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    """Shape of every tensor of the safetensors files."""
    config: dict[str, Any] = field(repr=False)
    """config.json."""
    trust_remote_code: bool = False
    """Whether its own Python code may be run."""
    revision: str | None = None
    """Commit of a base from the hub."""

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder reads the prompt (T5)."""
        return bool(self.config.get("is_encoder_decoder"))

    @functools.cached_property
    def identity(self) -> str:
        """Hex sha256 of what decides its answers: the fingerprint, config.json, and the tokenizer and chat template."""
        config = {key: value for key, value in self.config.items() if key not in _SAYS_NOTHING}
        files = (self.path / name for name in _TOKENIZER_FILES)
        return digest(self.fingerprint, config, {file.name: sha256_file(file) for file in files if file.is_file()})


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """The safetensors files that transformers would load, with the tensors that the index promises in each."""
    single = directory / "model.safetensors"
    if single.exists():
        return {single: None}
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        if pickles:
            raise InputError(
                f"{directory}: has only pickled weights ({pickles[0]}), which are never loaded; "
                "save the model as safetensors (save_pretrained)"
            )
        raise InputError(f"{single}: missing, and there is no {index.name}; {COPY_AGAIN}")
    weight_map = read_json_object(index, COPY_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map; {COPY_AGAIN}")
    promised: dict[Path, set[str] | None] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index}: {shard!r} is not the name of a safetensors file beside it; {COPY_AGAIN}")
        tensors = promised.setdefault(directory / shard, set())
        assert tensors is not None
        tensors.add(tensor)
    return promised


def _hash_prefixes(path: Path, tensors: dict[str, TensorHeader]) -> dict[str, str]:
    """One line per tensor for the fingerprint: dtype, shape and the sha256 of its first 4 KiB."""
    lines = {}
    with open(path, "rb") as handle:
        for name, tensor in tensors.items():
            handle.seek(tensor.start)
            prefix = handle.read(min(PREFIX_BYTES, tensor.num_bytes))
            lines[name] = json.dumps([name, tensor.dtype, tensor.shape, hashlib.sha256(prefix).hexdigest()])
    return lines


def _check_directory(directory: Path) -> dict[str, Any]:
    """Return config.json; refuse adapters and directories without a config or a tokenizer."""
    if not (directory / "config.json").exists() and (directory / "adapter_config.json").exists():
        raise InputError(f"{directory}: an adapter, not a base model; give the base that it was trained on")
    config = read_json_object(directory / "config.json", "give a directory that transformers' save_pretrained wrote")
    names = {path.name for path in directory.iterdir()}
    if "adapter_config.json" in names:
        raise InputError(
            f"{directory}: has an adapter_config.json beside the model, an adapter that transformers would put on the "
            "base unasked; move the adapter's files away"
        )
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"}:
        raise InputError(f"{directory}: has no tokenizer; save it there with the tokenizer's save_pretrained")
    return config


def _check_code(directory: Path) -> None:
    """Refuse code that is to be fetched from elsewhere: trust is given to what lies in this directory alone."""
    for path in (directory / "config.json", directory / "tokenizer_config.json"):
        code = read_json_object(path, COPY_AGAIN).get("auto_map") if path.exists() else None
        if "--" in json.dumps(code):
            raise InputError(
                f"{path}: its auto_map names code of another repository, which is never fetched; copy that code into "
                f"{directory} and name it there"
            )


@functools.lru_cache(maxsize=16)
def _warn_of_code(name: str) -> None:
    """Once a process and base."""
    logger.warning("%s: trust_remote_code is set: Python code that comes with this base is run", name)


def _inspect(name: str, directory: Path, trust_remote_code: bool, commit: str | None) -> BaseInfo:
    config = _check_directory(directory)
    if trust_remote_code:
        _check_code(directory)
        _warn_of_code(name)
    shapes: dict[str, tuple[int, ...]] = {}
    lines: dict[str, str] = {}
    for path, promised in _weight_files(directory).items():
        tensors = read_header(path, COPY_AGAIN)
        if lacking := (promised or set()) - tensors.keys():
            raise InputError(f"{path}: lacks the tensor {min(lacking)!r} that the index promises; {COPY_AGAIN}")
        lines |= _hash_prefixes(path, tensors)
        shapes |= {tensor_name: tensor.shape for tensor_name, tensor in tensors.items()}
    if not shapes:
        raise InputError(f"{directory}: its safetensors files hold no tensors; {COPY_AGAIN}")
    fingerprint = hashlib.sha256("\n".join(lines[tensor_name] for tensor_name in sorted(lines)).encode()).hexdigest()
    return BaseInfo(name, directory, fingerprint, shapes, config, trust_remote_code, commit)


def inspect_base(model: str, trust_remote_code: bool = False, revision: str | None = None) -> BaseInfo:
    """Find a base (hub id or directory) and read its headers and the first 4 KiB of each tensor.

    Args:
        model: as `BaseModelConfig.model`.
        trust_remote_code: whether its own Python code may be run later on; nothing is run here.
        revision: as `BaseModelConfig.revision`.

    Raises:
        InputError: not found, no config or tokenizer, only pickles, a missing or truncated shard; names the file
            and the remedy; code that lies elsewhere.
    """
    name, directory, commit = locate(model, trust_remote_code, revision)
    try:
        return _inspect(name, directory, trust_remote_code, commit)
    except OSError as error:
        raise InputError(f"{error.filename or directory}: cannot be read ({error.strerror}); {COPY_AGAIN}") from error


def info_of(base: BaseModelConfig) -> BaseInfo:
    """`inspect_base` of a setting."""
    return inspect_base(base.model, base.trust_remote_code, base.revision)


def pinned(base: BaseModelConfig, found: BaseInfo) -> BaseModelConfig:
    """The setting with the commit that its hub id was found to stand for: every worker is to load the same."""
    return base if found.revision is None else base.model_copy(update={"revision": found.revision})


def refuse_quantised(config: Mapping[str, Any], name: str, remedy: str = "give the base as it was before") -> None:
    """Whether a base's weights are as they were trained: others can be neither partitioned nor planned with.

    Raises:
        InputError: its config.json says that they are quantised; names the method and the remedy.
    """
    settings = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if settings:
        method = settings.get("quant_method", "some method") if isinstance(settings, dict) else "some method"
        raise InputError(f"{name}: its weights are quantised ({method}), which is not supported; {remedy}")


def refuse_encoder_decoder(base: BaseInfo, what: str, remedy: str = "it can be a source only") -> None:
    """An encoder-decoder answers as a source of adapters, and that is all.

    Args:
        what: it is asked for, with its verb: `distill trains`.

    Raises:
        InputError: it is one.
    """
    if base.is_encoder_decoder:
        raise InputError(f"{base.name}: {what} decoder-only bases, and this one has an encoder; {remedy}")


def stored_tensors(directory: Path) -> dict[str, tuple[Path, TensorHeader]]:
    """The file and the header of every tensor of a base, by its name there.

    Raises:
        InputError: a file is missing or damaged; names it and the remedy.
    """
    headers = {path: read_header(path, COPY_AGAIN) for path in _weight_files(directory)}
    return {name: (path, header) for path, tensors in headers.items() for name, header in tensors.items()}


def refuse_config(directory: Path, trust_remote_code: bool, error: Exception, fault: str, remedy: str) -> NoReturn:
    """Say why transformers makes nothing of a base's config.json, whatever its classes raised.

    Raises:
        InputError: names the file, `fault` and `remedy`, or the setting that would have the base's own code run.
    """
    path = directory / "config.json"
    if not trust_remote_code:
        refuse_code(path, error)
    raise InputError(f"{path}: {fault} ({first_line(error)}); {remedy}") from error


def refuse_code(path: Path, error: Exception) -> None:
    """Say that a base wants its own code run, if that is why it cannot be loaded.

    Raises:
        InputError: it is; names the file and the setting.
    """
    if "auto_map" in read_json_object(path, COPY_AGAIN):
        raise InputError(
            f"{path}: this base is built by Python code of its own (auto_map), which is not run; read that code, then "
            "set trust_remote_code: true beside `model`, or use a base that transformers builds by itself"
        ) from error
