"""What is known of a base model without loading it: its name, its tensors' shapes and a fingerprint of its weights."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from translora.bundle.reading import TensorHeader, read_header, read_json_object
from translora.config import BaseModelConfig
from translora.run.files import digest, sha256_file
from translora.run.redact import first_line

logger = logging.getLogger(__name__)
HUB_TIMEOUT_SECONDS = 10.0
PREFIX_BYTES = 4096
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_HUB_IGNORED = ["*/*", "consolidated*", "adapter_*"]
_COPY_AGAIN = "copy or download the base again"
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


class UnusableBaseError(ValueError):
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


@functools.cache
def _find_on_hub(model: str, with_code: bool, wanted: str | None) -> Path:
    """Download a hub model's config, safetensors and tokenizer, or take them from the hub's cache when offline.

    Asked once a process, which so keeps to one commit. Python files only `with_code`.

    A fault boundary: which errors the hub's client lets through depends on its version's HTTP library.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    advice = "give a local directory with config.json and *.safetensors, or an id that this machine can reach"
    revision, refusal = None, "no answer"
    try:
        # snapshot_download asks for the revision without a time limit, so it is asked for here.
        revision = HfApi().model_info(model, revision=wanted, timeout=HUB_TIMEOUT_SECONDS).sha
    except GatedRepoError as error:
        raise ValueError(f"{model}: the hub asks for permission to download it; accept its terms and log in") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{model}: has no revision {wanted!r} on the hub; give a commit, a tag or a branch") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{model}: neither a directory here nor a model on the hub; {advice}") from error
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        refusal = f"HTTP status {status}" if status else refusal
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision or wanted,
                local_files_only=revision is None,
                allow_patterns=[*_HUB_FILES, *(["*.py"] if with_code else [])],
                ignore_patterns=_HUB_IGNORED,
                etag_timeout=HUB_TIMEOUT_SECONDS,
            )
        )
    except Exception as error:
        if revision is None:
            raise ValueError(
                f"{model}: not a directory here, not in the hub's cache, and the hub cannot be reached ({refusal}); "
                f"{advice}"
            ) from error
        reason = first_line(error)
        raise ValueError(f"{model}: the download from the hub failed ({reason}); run again, or {advice}") from error


def name_of_path(path: str) -> str:
    """The last component of a base's path or hub id; the hub id's for a snapshot in the hub's cache."""
    parts = PurePath(path).parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].rsplit("--", 1)[-1]
    return parts[-1] if parts else path


def _locate(model: str, with_code: bool, revision: str | None) -> tuple[str, Path, str | None]:
    """Name, directory and commit (of the hub alone) of a base; raises ValueError when there is none."""
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        return name_of_path(os.path.abspath(path)), Path(path), None
    if os.path.exists(path):
        raise ValueError(f"{model}: a file; give a model directory (convert GGUF or other single files first)")
    if not _HUB_ID.fullmatch(model):
        raise ValueError(f"{model}: no such directory; give a model directory or a hub id (owner/name)")
    snapshot = _find_on_hub(model, with_code, revision)
    return model, snapshot, snapshot.name


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """The safetensors files that transformers would load, with the tensors that the index promises in each."""
    single = directory / "model.safetensors"
    if single.exists():
        return {single: None}
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        if pickles:
            raise ValueError(
                f"{directory}: has only pickled weights ({pickles[0]}), which are never loaded; "
                "save the model as safetensors (save_pretrained)"
            )
        raise ValueError(f"{single}: missing, and there is no {index.name}; {_COPY_AGAIN}")
    weight_map = read_json_object(index, _COPY_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map; {_COPY_AGAIN}")
    promised: dict[Path, set[str] | None] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: {shard!r} is not the name of a safetensors file beside it; {_COPY_AGAIN}")
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
        raise ValueError(f"{directory}: an adapter, not a base model; give the base that it was trained on")
    config = read_json_object(directory / "config.json", "give a directory that transformers' save_pretrained wrote")
    names = {path.name for path in directory.iterdir()}
    if "adapter_config.json" in names:
        raise ValueError(
            f"{directory}: has an adapter_config.json beside the model, an adapter that transformers would put on the "
            "base unasked; move the adapter's files away"
        )
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"}:
        raise ValueError(f"{directory}: has no tokenizer; save it there with the tokenizer's save_pretrained")
    return config


def _check_code(directory: Path) -> None:
    """Refuse code that is to be fetched from elsewhere: trust is given to what lies in this directory alone."""
    for path in (directory / "config.json", directory / "tokenizer_config.json"):
        code = read_json_object(path, _COPY_AGAIN).get("auto_map") if path.exists() else None
        if "--" in json.dumps(code):
            raise ValueError(
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
        tensors = read_header(path, _COPY_AGAIN)
        if lacking := (promised or set()) - tensors.keys():
            raise ValueError(f"{path}: lacks the tensor {min(lacking)!r} that the index promises; {_COPY_AGAIN}")
        lines |= _hash_prefixes(path, tensors)
        shapes |= {tensor_name: tensor.shape for tensor_name, tensor in tensors.items()}
    if not shapes:
        raise ValueError(f"{directory}: its safetensors files hold no tensors; {_COPY_AGAIN}")
    fingerprint = hashlib.sha256("\n".join(lines[tensor_name] for tensor_name in sorted(lines)).encode()).hexdigest()
    return BaseInfo(name, directory, fingerprint, shapes, config, trust_remote_code, commit)


def inspect_base(model: str, trust_remote_code: bool = False, revision: str | None = None) -> BaseInfo:
    """Find a base (hub id or directory) and read its headers and the first 4 KiB of each tensor.

    Args:
        model: as `BaseModelConfig.model`.
        trust_remote_code: whether its own Python code may be run later on; nothing is run here.
        revision: as `BaseModelConfig.revision`.

    Raises:
        ValueError: not found, no config or tokenizer, only pickles, a missing or truncated shard; names the file
            and the remedy; code that lies elsewhere.
    """
    name, directory, commit = _locate(model, trust_remote_code, revision)
    try:
        return _inspect(name, directory, trust_remote_code, commit)
    except OSError as error:
        raise ValueError(f"{error.filename or directory}: cannot be read ({error.strerror}); {_COPY_AGAIN}") from error


def info_of(base: BaseModelConfig) -> BaseInfo:
    """`inspect_base` of a setting."""
    return inspect_base(base.model, base.trust_remote_code, base.revision)


def pinned(base: BaseModelConfig, found: BaseInfo) -> BaseModelConfig:
    """The setting with the commit that its hub id was found to stand for: every worker is to load the same."""
    return base if found.revision is None else base.model_copy(update={"revision": found.revision})


def refuse_quantised(config: Mapping[str, Any], name: str, remedy: str = "give the base as it was before") -> None:
    """Whether a base's weights are as they were trained: others can be neither partitioned nor planned with.

    Raises:
        ValueError: its config.json says that they are quantised; names the method and the remedy.
    """
    settings = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if settings:
        method = settings.get("quant_method", "some method") if isinstance(settings, dict) else "some method"
        raise ValueError(f"{name}: its weights are quantised ({method}), which is not supported; {remedy}")


def refuse_encoder_decoder(base: BaseInfo, what: str, remedy: str = "it can be a source only") -> None:
    """An encoder-decoder answers as a source of adapters, and that is all.

    Args:
        what: it is asked for, with its verb: `distill trains`.

    Raises:
        ValueError: it is one.
    """
    if base.is_encoder_decoder:
        raise ValueError(f"{base.name}: {what} decoder-only bases, and this one has an encoder; {remedy}")


def stored_tensors(directory: Path) -> dict[str, tuple[Path, TensorHeader]]:
    """The file and the header of every tensor of a base, by its name there.

    Raises:
        ValueError: a file is missing or damaged; names it and the remedy.
    """
    headers = {path: read_header(path, _COPY_AGAIN) for path in _weight_files(directory)}
    return {name: (path, header) for path, tensors in headers.items() for name, header in tensors.items()}


def refuse_code(path: Path, error: Exception) -> None:
    """Say that a base wants its own code run, if that is why it cannot be loaded.

    Raises:
        ValueError: it is; names the file and the setting.
    """
    if "auto_map" in read_json_object(path, _COPY_AGAIN):
        raise ValueError(
            f"{path}: this base is built by Python code of its own (auto_map), which is not run; read that code, then "
            "set trust_remote_code: true beside `model`, or use a base that transformers builds by itself"
        ) from error


def meta_model(base: str | Path, trust_remote_code: bool, revision: str | None = None) -> Any:
    """The language model of a directory with a config.json, or of a hub id, on the meta device: no weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, revision=revision)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=trust_remote_code)


def linears(model: Any) -> dict[str, Any]:
    """Every nn.Linear of a model, by name."""
    import torch

    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def adaptable(model: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear modules that a LoRA may adapt, by name: all but the output head."""
    head = model.get_output_embeddings()
    own = {name: module for name, module in linears(model).items() if module is not head}
    return {name: (module.out_features, module.in_features) for name, module in own.items()}


@functools.lru_cache(maxsize=16)
def _linears_and_head(
    path: Path, fingerprint: str, trust_remote_code: bool
) -> tuple[dict[str, tuple[int, int]], str | None]:
    """(out, in) of every linear module but the output head, and that one's name where it is linear.

    A fault boundary: what a model class raises for an odd config is its own affair.
    """
    try:
        model = meta_model(path, trust_remote_code)
    except Exception as error:
        if not trust_remote_code:
            refuse_code(path / "config.json", error)
        reason = first_line(error)
        raise ValueError(
            f"{path / 'config.json'}: transformers makes no causal language model of it ({reason}); {_COPY_AGAIN}, or "
            "use a base whose architecture this version of transformers has"
        ) from error
    head = model.get_output_embeddings()
    return adaptable(model), next((name for name, module in linears(model).items() if module is head), None)


def linear_modules(base: BaseInfo) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear modules that a LoRA may adapt, by name: all but the output head.

    Built once a process and base, without weights. Not under ZeRO-3, which would partition the empty model.

    Raises:
        ValueError: transformers cannot build the model; names config.json and the remedy.
    """
    return dict(_linears_and_head(base.path, base.fingerprint, base.trust_remote_code)[0])


def output_head(base: BaseInfo) -> str | None:
    """Name of the linear module that gives the logits (`lm_head`), or None; as costly as `linear_modules`."""
    return _linears_and_head(base.path, base.fingerprint, base.trust_remote_code)[1]
