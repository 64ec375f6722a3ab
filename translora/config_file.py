"""How a config file is read: YAML, its paths expanded, checked in one go, each fault with its place.

Importing this module loads neither torch nor ray.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from translora.errors import InputError

DType = Literal["auto", "bfloat16", "float32"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4"]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
"""Of what becomes a directory's name."""


NumSamples = Annotated[int, Field(ge=2, le=10_000_000)]
Epochs = Annotated[float, Field(gt=0, le=10_000)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    arguments = get_args(annotation)
    return set().union(*map(_kinds, arguments)) if arguments else {annotation}


class Strict(BaseModel):
    """A config object: unknown keys are errors, the docstring under a field describes it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)
    added: ClassVar[frozenset[str]] = frozenset()
    """Settings that came later: at their defaults they are in no dump, so that what was made before them still fits.
    Such a default stays for good; where it has to change, the setting is taken out of here."""

    @model_validator(mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, raw: Any) -> Any:
        for name, value in raw.items() if isinstance(raw, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields:
                kinds = _kinds(cls.model_fields[name].annotation)
                if kinds & {int, float} and bool not in kinds:
                    raise ValueError(f"{name}: expected a number, found {value}, as YAML reads yes, no, on and off")
        return raw

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = handler(self)
        for name in self.added & found.keys():
            if getattr(self, name) == type(self).model_fields[name].default:
                del found[name]
        return found

    def at_defaults(self, names: Collection[str]) -> Self:
        """These settings, of which some do not count: whatever they are, they are at their defaults."""
        return self.model_copy(update={name: type(self).model_fields[name].default for name in names})


class ConfigFile(Strict):
    """A config that is a file of its own."""

    command: ClassVar[str]
    """The command that reads it."""


_TYPE_TAG = re.compile(r"(list|dict|tuple|literal|function-\w+)\[|constrained-|(list|dict|int|float|str|bool)$")
"""What pydantic puts into the place of a fault for each type of a union."""
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)  # what os.path.expandvars looks for
_PLACED = (".", "~", "/", "$")
"""How a value starts that is a path, and no name of a model or of a DeepSpeed config."""


def expand(path: str, relative_to: Path, is_pattern: bool = False) -> str:
    """Expand `~` and `$VARS`; a relative path is taken relative to the config file's directory.

    `is_pattern`: a glob pattern, unless it names a directory; the config file's directory is then taken literally. A
    URL stays as it is.

    Raises:
        InputError: an environment variable is not set.
    """
    if not path.strip():
        raise InputError("an empty path; leave it out, or write it")
    if "\0" in path:
        raise InputError(f"{path!r}: holds a NUL character; correct the path")
    for match in _VARIABLE.finditer(path):
        name = match[1] or match[2]
        if name not in os.environ:
            raise InputError(f"{path}: the environment variable {name} is not set; set it, or write the path out")
    expanded = os.path.expandvars(os.path.expanduser(path))
    if "://" in expanded and not is_pattern:
        raise InputError(f"{path}: is a URL, which only bundles may be; give a path")
    if os.path.isabs(expanded) or (is_pattern and "://" in expanded):
        return expanded
    joined = os.path.normpath(os.path.join(relative_to, expanded))
    if is_pattern and glob.has_magic(expanded) and not os.path.isdir(joined):
        return os.path.normpath(os.path.join(glob.escape(str(relative_to)), expanded))
    return joined


def _resolve_model(raw: dict[str, Any], relative_to: Path) -> None:
    model = raw.get("model")
    if not isinstance(model, str):
        return
    candidate = expand(model, relative_to)
    if model.startswith(_PLACED) or os.path.isdir(candidate):
        raw["model"] = candidate


def _resolve_ds_config(raw: Any, relative_to: Path) -> None:
    name = raw.get("ds_config") if isinstance(raw, dict) else None
    if not isinstance(name, str):
        return
    candidate = expand(name, relative_to)
    if name.startswith(_PLACED) or os.path.isfile(candidate):
        raw["ds_config"] = candidate


def _resolve_paths(raw: dict[str, Any], here: Path) -> None:
    """Expand every path of a config file in place, whatever its values are: they are checked afterwards.

    Raises:
        InputError: an environment variable is not set.
    """
    for key in ("run_dir", "output_dir", "output"):
        if isinstance(raw.get(key), str):
            raw[key] = expand(raw[key], here)
    for model in (raw.get("source"), raw.get("target")):
        if isinstance(model, dict):
            _resolve_model(model, here)
    arms = raw.get("arms")
    for sections in (raw, *(arms.values() if isinstance(arms, dict) else ())):
        if not isinstance(sections, dict):
            continue
        synthesis = sections.get("synthesis")
        if isinstance(synthesis, dict) and isinstance(synthesis.get("generator"), dict):
            _resolve_model(synthesis["generator"], here)
        for section in ("distill", "train"):
            _resolve_ds_config(sections.get(section), here)
    entries = raw.get("adapters") or raw.get("tasks") or []
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, str) and "adapters" in raw:
            entries[index] = entry = {"bundle": entry}
        for key in ("bundle", "eval_data", "data", "include_path", "adapter", "seeds"):
            if isinstance(entry, dict) and isinstance(entry.get(key), str):
                entry[key] = expand(entry[key], here, is_pattern=key == "bundle")
    for merge in raw["merges"] if isinstance(raw.get("merges"), list) else []:
        if not isinstance(merge, dict):
            continue
        if isinstance(merge.get("eval_data"), str):
            merge["eval_data"] = expand(merge["eval_data"], here)
        for key in ("data", *(["adapters"] if merge.get("when") == "before" else [])):
            if isinstance(merge.get(key), list):
                merge[key] = [
                    path if not isinstance(path, str) or "://" in path else expand(path, here) for path in merge[key]
                ]


class _Loader(yaml.SafeLoader):
    """YAML as it is meant: a key that comes twice is an error, where the last one would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge" else None
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {name!r} comes twice", problem_mark=key.start_mark)
            seen |= set() if name is None else {name}
        return super().construct_mapping(node, deep)


_KINDS = {
    "adapters": ("a fleet", "migrate"),
    "arms": ("an evaluate", "evaluate"),
    "output_dir": ("a prepare", "prepare"),
}
"""What a file is by the first of these keys that it has, and the command that reads it."""
ConfigT = TypeVar("ConfigT", bound=ConfigFile)


def kind_of(raw: dict[str, Any]) -> tuple[str, str] | None:
    """What a config file is, and the command that reads it; None where no key tells."""
    return next((_KINDS[key] for key in _KINDS if key in raw), None)


def load_config(path: str | Path, kind: type[ConfigT]) -> ConfigT:
    """Read a YAML file into a checked config; relative paths become relative to the file.

    Raises:
        InputError: the file is missing or not YAML, or a key or value is wrong; names the file and each fault.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give the path of a YAML file") from error
    except RecursionError as error:
        raise InputError(f"{path}: not valid YAML: nested too deep") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, say
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a mapping of settings, found {type(raw).__name__}")
    found = kind_of(raw)
    if found is not None and found[1] != kind.command:
        raise InputError(f"{path}: this is {found[0]} file; use `translora {found[1]}`")
    try:
        _resolve_paths(raw, path.resolve().parent)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{path}: {faults_text(kind, error)}") from error


def faults_text(kind: type[BaseModel], error: ValidationError, prefix: str = "") -> str:
    """All faults, those of one setting together: it may be of several types, and fit none.

    Args:
        prefix: where `kind` stands in the file, with a dot at its end.
    """
    found: dict[str, list[str]] = {}
    for fault in error.errors():
        where = _where(fault)
        found.setdefault(where, []).append(fault_text(kind, fault).removeprefix(f"{where}: "))
    return "; ".join(prefix + (f"{where}: " if where else "") + " or ".join(whats) for where, whats in found.items())


def _where(fault: ErrorDetails) -> str:
    """The setting, without the types that it was tried as."""
    return ".".join(str(part) for part in fault["loc"] if not (isinstance(part, str) and _TYPE_TAG.match(part)))


def fault_text(kind: type[BaseModel], fault: ErrorDetails) -> str:
    """One fault as `where: what`; an unknown setting comes with those that are known there.

    What is found of a whole file names its settings itself.
    """
    where = _where(fault)
    if fault["type"] != "extra_forbidden":
        what = fault["msg"].removeprefix("Value error, ") + _hint(fault)
        return f"{where}: {what}" if where else what
    *parents, unknown = fault["loc"]
    known = _settings_at(kind, parents)
    close = difflib.get_close_matches(str(unknown), known, n=1)
    return f"{where}: unknown setting; " + (f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}")


def _hint(fault: ErrorDetails) -> str:
    """What to write, where a slip is a common one."""
    kind, found = fault["type"], fault["input"]
    if found is None and kind in ("model_type", "list_type", "path_type"):
        return "; it is empty: leave it out, or give it a value"
    if kind == "model_type" and isinstance(found, str):
        return f"; write {{model: {found}}}" if fault["ctx"]["class_name"] == "BaseModelConfig" else ""
    if kind == "list_type" and isinstance(found, str):
        return f"; write [{found}]"
    if kind == "literal_error" and isinstance(found, bool):
        return f", found {found}, as YAML reads yes, no, on and off; put it in quotation marks"
    return ""


def _settings_at(kind: Any, loc: Sequence[int | str]) -> list[str]:
    """Names of the settings of the config object at `loc`."""
    for part in loc:
        if isinstance(part, str):
            kind = kind.model_fields[part].annotation
        # An item of a list, or a section that may be left out: what is inside.
        inner = [arg for arg in get_args(kind) if isinstance(arg, type) and issubclass(arg, BaseModel)]
        kind = inner[0] if inner else kind
    return sorted(kind.model_fields)
