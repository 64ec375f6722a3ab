"""Bundles: a PEFT adapter directory plus the folder `translora/` with what the migration needs.

    adapter_config.json, adapter_model.safetensors    the adapter, as PEFT and vLLM load it
    translora/manifest.json                           names, base fingerprint, |D|, sha256 of every file
    translora/seeds.jsonl                             one {"input": ...} a line
    translora/discriminator/                          a PEFT adapter of the same base that says yes or no

A bundle comes from somebody else: nothing in it is executed or unpickled, links are not followed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from translora.bundle.adapter import (
    CONFIG,
    README,
    check_adapter,
    check_recorded_base,
    copy_files,
    copy_readme,
    same_name,
)
from translora.bundle.base import BaseInfo
from translora.bundle.manifest import (
    DISCRIMINATOR,
    MANIFEST,
    RESTORE,
    SEEDS,
    BundleError,
    DiscriminatorQuality,
    Manifest,
    check_listing,
    faults,
    list_files,
    read_manifest,
)
from translora.run.files import TEMPORARY_PREFIX, full_disk, read_jsonl, replace_directory, sha256_file, write_json

logger = logging.getLogger(__name__)

MAX_SEEDS_BYTES = 1_000_000
MIN_SEEDS, MAX_SEEDS = 2, 200


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read: its manifest and seeds, not yet its tensors."""

    path: Path
    manifest: Manifest
    seeds: list[str]
    """Task inputs that the owner left behind."""
    digest: str
    """sha256 of the manifest file, which holds the hash of every other file."""

    @property
    def discriminator_dir(self) -> Path | None:
        """The discriminator's PEFT directory, if the bundle has one."""
        return self.path / DISCRIMINATOR if self.manifest.discriminator else None


@contextlib.contextmanager
def _bundle_errors(temporary: str = "", path: str = "") -> Iterator[None]:
    """Turn every ValueError or OSError about a bundle's files into a BundleError that names `path`, not `temporary`.

    But for a full disk, which is no fault of the bundle.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if full_disk(error):
            raise
        text = str(error)
        if not temporary and isinstance(error, OSError) and error.filename:
            remedy = "; ask its owner for read permission" if isinstance(error, PermissionError) else ""
            text = f"{error.filename}: cannot be read ({error.strerror}){remedy}"
        if isinstance(error, BundleError) and (not temporary or temporary not in text):
            raise
        raise BundleError(text.replace(temporary, path) if temporary else text) from error


def _read_seeds(path: Path) -> list[str]:
    size = path.stat().st_size
    if size > MAX_SEEDS_BYTES:
        raise BundleError(f"{path}: {size:,} bytes, the limit is {MAX_SEEDS_BYTES:,}; keep about five short seeds")
    if size == 0:
        raise BundleError(f'{path}: no seeds; give {MIN_SEEDS} or more (five is usual) lines of {{"input": ...}}')
    seeds = []
    for number, row in enumerate(read_jsonl(path, ("input",)), 1):
        if extra := sorted(row.keys() - {"input"}):
            raise BundleError(
                f"{path}: seed {number} has {extra[0]!r} beside 'input'; seeds are inputs only, remove it"
            )
        seeds.append(row["input"])
    if len(seeds) > MAX_SEEDS:
        raise BundleError(f"{path}: {len(seeds)} seeds, the limit is {MAX_SEEDS}; keep about five short seeds")
    if len(set(seeds)) < MIN_SEEDS:
        raise BundleError(f"{path}: {len(set(seeds))} different seed(s); give {MIN_SEEDS} or more (five is usual)")
    return seeds


def read_bundle(path: str | Path) -> Bundle:
    """Read a bundle's manifest and seeds, and compare its list of files; no tensor is read.

    Raises:
        BundleError: names the file and the remedy.
    """
    path = Path(path)
    with _bundle_errors():
        if path.is_symlink():
            raise BundleError(f"{path}: a symbolic link, which is never followed; give the directory that it points to")
        if not path.is_dir():
            fault = "not a directory" if path.exists() else "no such directory"
            raise BundleError(f"{path}: {fault}; give the directory of a bundle")
        if not (path / MANIFEST).exists():
            if (path / CONFIG).exists():
                raise BundleError(
                    f"{path}: a plain PEFT adapter, not a bundle (no {MANIFEST}); make one with `translora prepare`, "
                    "which takes it as `adapter`"
                )
            raise BundleError(f"{path}: not a bundle (no {MANIFEST}); make one with `translora prepare`")
        present = list_files(path)
        manifest = read_manifest(path / MANIFEST)
        check_listing(path, manifest, present)
        return Bundle(path, manifest, _read_seeds(path / SEEDS), sha256_file(path / MANIFEST))


def _check_base(bundle: Bundle, base: BaseInfo) -> None:
    manifest = bundle.manifest
    where = bundle.path / MANIFEST
    if manifest.base_fingerprint == base.fingerprint:
        if not same_name(manifest.base_name, base.name):
            logger.warning("%s names the base %r, not %r, but the weights agree", where, manifest.base_name, base.name)
        return
    prints = f"fingerprints {manifest.base_fingerprint[:12]} and {base.fingerprint[:12]}"
    if same_name(manifest.base_name, base.name):
        raise BundleError(
            f"{where}: made for other weights of {manifest.base_name!r} than those in {base.path} ({prints}); "
            "use the revision and dtype of the base that the adapter was trained on"
        )
    raise BundleError(
        f"{where}: made for the base {manifest.base_name!r}, not for {base.name!r} ({prints}); "
        f"put it into a fleet whose source is {manifest.base_name!r}"
    )


def common_template(bundles: Sequence[Bundle], words: str) -> str | None:
    """The prompt template that bundles were trained with; None without bundles.

    Args:
        words: what the error calls them.

    Raises:
        BundleError: they have different ones.
    """
    found = sorted({bundle.manifest.prompt_template for bundle in bundles})
    if len(found) > 1:
        raise BundleError(
            f"{words} have different prompt templates ({', '.join(found)}); merge adapters that were trained with one"
        )
    return found[0] if found else None


def verify_bundle(bundle: Bundle, base: BaseInfo) -> None:
    """Check every hash, the base, and each tensor of adapter and discriminator against the base's linear modules.

    Raises:
        BundleError: the first fault found; names the file and the remedy.
    """
    with _bundle_errors():
        check_listing(bundle.path, bundle.manifest, list_files(bundle.path))
        if sha256_file(bundle.path / MANIFEST) != bundle.digest:
            raise BundleError(f"{bundle.path / MANIFEST}: changed since it was read; run again")
        _check_base(bundle, base)
        for name, expected in sorted(bundle.manifest.files.items()):
            if sha256_file(bundle.path / name) != expected:
                raise BundleError(
                    f"{bundle.path / name}: changed or damaged (its sha256 is not the manifest's); {RESTORE}"
                )
        for directory in filter(None, (bundle.path, bundle.discriminator_dir)):
            check_recorded_base(directory, bundle.manifest.base_name, RESTORE, editable=False)
            check_adapter(directory, base)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary directories of `replace_directory(path)` that a killed process left."""
    name = re.compile(rf"{re.escape(f'{TEMPORARY_PREFIX}{path.name}')}-[0-9a-f]{{8}}")
    for entry in list(path.parent.iterdir()) if path.parent.is_dir() else []:
        if name.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)


def is_foreign(path: Path) -> bool:
    """Whether something is there that is no bundle, which is never replaced; an empty directory is nothing."""
    return path.exists() and not (path / MANIFEST).exists() and (not path.is_dir() or any(path.iterdir()))


def write_bundle(
    path: str | Path,
    *,
    adapter_dir: str | Path,
    discriminator_dir: str | Path | None,
    seeds: list[str],
    task_name: str,
    base: BaseInfo,
    num_samples: int,
    prompt_template: str,
    provenance: dict[str, str | int | float],
    model_card: str | None = None,
    discriminator_quality: DiscriminatorQuality | None = None,
) -> Bundle:
    """Write a bundle: `path` is complete and verified, or unchanged.

    A kill in the instant of the exchange leaves none; the same command writes it again, and removes what a killed one
    left half-written beside it. One writer for a path at a time.

    Args:
        model_card: README.md, which the manifest does not cover, so that readers may change it; the adapter's own
            where left out.
        discriminator_quality: as `measure` found it.

    Raises:
        BundleError: adapter, discriminator, seeds or a value would not pass read_bundle and verify_bundle, or
            `path` holds something that is not a bundle.
    """
    path = Path(path)
    if is_foreign(path):
        raise BundleError(f"{path}: exists and is not a bundle, so it is not replaced; give another directory")
    parts = {"": Path(adapter_dir)} | ({DISCRIMINATOR: Path(discriminator_dir)} if discriminator_dir else {})
    with _bundle_errors():
        _remove_leftovers(path)
    with (
        _bundle_errors(),
        replace_directory(path) as temporary,
        _bundle_errors(str(temporary), str(path)),
    ):
        for name, directory in parts.items():
            check_recorded_base(directory, base.name, "give an adapter of this base")
            check_adapter(directory, base)
            copy_files(directory, temporary / name, base)
        if model_card is None:
            copy_readme(parts[""], temporary, base)
        else:
            (temporary / README).write_text(model_card, encoding="utf-8")
        (temporary / "translora").mkdir(exist_ok=True)
        # ASCII, so that no line separator of Unicode splits a row.
        (temporary / SEEDS).write_text("".join(json.dumps({"input": seed}) + "\n" for seed in seeds), encoding="ascii")
        try:
            manifest = Manifest(
                task_name=task_name,
                base_name=base.name,
                base_fingerprint=base.fingerprint,
                num_samples=num_samples,
                prompt_template=prompt_template,
                discriminator=discriminator_dir is not None,
                discriminator_quality=discriminator_quality,
                provenance=provenance,
                files={name: sha256_file(temporary / name) for name in sorted(list_files(temporary) - {README})},
            )
        except ValidationError as error:
            raise BundleError(f"{path}: {faults(error)}") from error
        write_json(temporary / MANIFEST, manifest.model_dump(exclude_none=True))
        read_bundle(temporary)
    return read_bundle(path)
