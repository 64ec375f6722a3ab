"""translora/manifest.json: what a bundle says of itself, and the hash of each of its files."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from translora.bundle.adapter import CONFIG, WEIGHTS
from translora.bundle.reading import read_json_object
from translora.config_file import NAME_PATTERN, NumSamples
from translora.errors import InputError
from translora.run.redact import printable

SCHEMA_VERSION = 1
MANIFEST = "translora/manifest.json"
SEEDS = "translora/seeds.jsonl"
DISCRIMINATOR = "translora/discriminator"
MAX_MANIFEST_BYTES = 1_000_000
MAX_FILES = 1000
MAX_BUNDLE_BYTES = 32 << 30
"""All files together: hashing them is the first thing that is done with a bundle."""
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
RESTORE = "restore the bundle from its source, or make it again with `translora prepare`"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class BundleError(InputError):
    """A bundle cannot be used: the message, one line without control characters, names the file and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class _Record(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DiscriminatorQuality(_Record):
    """How well a discriminator tells inputs apart that it was not trained on.

    Of an owner's bundle: real inputs from invented ones. Of a migrated one, whose real inputs nobody has: those that
    the screen's score spoke for from those that it spoke against.
    """

    num_real: int = Field(ge=1, le=10_000)
    """Real inputs of the task, or those that were spoken for."""
    num_invented: int = Field(ge=1, le=10_000)
    """Inputs that a base invented from the seeds, or those that were spoken against."""
    auc: float = Field(ge=0, le=1)
    """How often a real input has a greater score than an invented one, ties counting half; 0.5 is chance."""
    accepts_real: float = Field(ge=0, le=1)
    """Share of the real inputs with log-odds above zero."""
    accepts_invented: float = Field(ge=0, le=1)
    """Share of the invented ones."""

    @property
    def tells_apart(self) -> bool:
        """Whether the AUC is above chance at the 5 % level, and more real inputs are accepted than others.

        Mann and Whitney (1947), normal approximation.
        """
        spread = math.sqrt((self.num_real + self.num_invented + 1) / (12 * self.num_real * self.num_invented))
        return self.auc - 0.5 > 1.645 * spread and self.accepts_real > self.accepts_invented

    def __str__(self) -> str:
        return (
            f"AUC {self.auc:.2f} on {self.num_real} real and {self.num_invented} invented inputs that it was not "
            f"trained on; accepts {self.accepts_real:.0%} and {self.accepts_invented:.0%} of them"
        )


class Manifest(_Record):
    """Contents of translora/manifest.json."""

    schema_version: Literal[1] = 1
    """Version of this layout."""
    task_name: str = Field(pattern=NAME_PATTERN)
    """The <NAME> of the discriminator's question."""
    base_name: str = Field(min_length=1, max_length=256)
    """Hub id or directory name of the base that the adapter was trained on."""
    base_fingerprint: Sha256
    """Fingerprint of that base's weights."""
    num_samples: NumSamples
    """|D|, the number of the owner's training samples."""
    prompt_template: str = Field(max_length=20_000)
    """`chat` (the tokenizer's chat template) or a string that contains {input} once."""
    discriminator: bool
    """Whether translora/discriminator/ is there."""
    discriminator_quality: DiscriminatorQuality | None = None
    """What it was measured to be; None where there was too little to measure it on."""
    provenance: dict[str, str | int | float] = {}
    """Free notes: how the bundle was made, and the hop it came by."""
    files: dict[str, Sha256]
    """sha256 of every file but this one and hub files such as README.md, by path relative to the bundle."""

    @field_validator("prompt_template")
    @classmethod
    def _holds_input(cls, value: str) -> str:
        if value != "chat" and "{input}" not in value:
            raise InputError(f"{value[:80]!r} is neither 'chat' nor a string that contains {{input}}")
        if (num_inputs := value.count("{input}")) > 1:
            raise InputError(f"{value[:80]!r} contains {{input}} {num_inputs} times; write it once")
        return value

    @field_validator("files")
    @classmethod
    def _stays_inside(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or str(path) != name:
                raise InputError(f"{name!r} is not a path inside the bundle")
        return value


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        InputError: missing, not JSON, of a newer version, or with a wrong key or value; names the file and the remedy.
    """
    raw = read_json_object(path, RESTORE, MAX_MANIFEST_BYTES)
    version = raw.get("schema_version")
    if type(version) is not int or version < 1:
        raise InputError(f"{path}: schema_version is {version!r}, expected {SCHEMA_VERSION}; {RESTORE}")
    if version > SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema_version is {version}, this translora reads up to {SCHEMA_VERSION}; upgrade translora"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{path}: {faults(error)}; {RESTORE}") from error


def faults(error: ValidationError) -> str:
    """The faults of a pydantic error in one line, the first five of them."""
    found = error.errors(include_url=False)
    lines = []
    for fault in found[:5]:
        line = f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg'].removeprefix('Value error, ')}"
        shown = fault["type"] not in {"missing", "extra_forbidden", "value_error"} and not isinstance(
            fault["input"], dict
        )
        lines.append(f"{line}, found {str(fault['input'])[:80]!r}" if shown else line)
    return "; ".join(lines) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")


def list_files(path: Path) -> set[str]:
    """Every file below a bundle by relative path; refuses pickles, links, what is no plain file, and too much of it."""
    names: set[str] = set()
    num_bytes = 0
    for folder, folders, files in os.walk(path):
        for entry in (Path(folder) / name for name in sorted(folders) + sorted(files)):
            if entry.is_symlink():
                raise BundleError(
                    f"{entry}: a symbolic link, which is never followed; delete the link, or ask the owner for a "
                    "bundle of plain files"
                )
            if entry.suffix.lower() in PICKLES:
                raise BundleError(f"{entry}: looks like a pickle, which is never loaded; delete it or use safetensors")
            if entry.is_dir():
                continue
            if not entry.is_file():
                raise BundleError(f"{entry}: neither a file nor a directory; delete it")
            names.add(entry.relative_to(path).as_posix())
            num_bytes += entry.stat().st_size
        if len(names) > MAX_FILES:
            raise BundleError(f"{path}: more than {MAX_FILES} files; give the directory of one bundle")
        if num_bytes > MAX_BUNDLE_BYTES:
            raise BundleError(
                f"{path}: {num_bytes:,} bytes, the limit is {MAX_BUNDLE_BYTES:,}; remove what is not of the adapter"
            )
    return names


def check_listing(path: Path, manifest: Manifest, present: set[str]) -> None:
    """Compare the files that are there with the manifest; README.md and other hub files may be added freely."""
    required = {CONFIG, WEIGHTS, SEEDS}
    if manifest.discriminator:
        required |= {f"{DISCRIMINATOR}/{CONFIG}", f"{DISCRIMINATOR}/{WEIGHTS}"}
    elif denied := min((name for name in present if name.startswith(f"{DISCRIMINATOR}/")), default=""):
        raise BundleError(f"{path / denied}: a discriminator, but the manifest says that there is none; {RESTORE}")
    for name in sorted(required - present):
        raise BundleError(f"{path / name}: missing; {RESTORE}")
    for name in sorted(required - manifest.files.keys()):
        raise BundleError(f"{path / MANIFEST}: has no hash for {name}; {RESTORE}")
    for name in sorted(manifest.files.keys() - present):
        raise BundleError(f"{path / name}: listed in the manifest, but missing; {RESTORE}")
    for name in sorted(present - manifest.files.keys() - {MANIFEST}):
        if name.startswith("translora/") or name.endswith(".safetensors"):
            raise BundleError(f"{path / name}: not listed in the manifest; delete it, or {RESTORE}")
