"""The adapters of a fleet file: its bundles, globs expanded, each under the name that it has in the run."""

from __future__ import annotations

import glob
import logging
import os
from pathlib import Path

from translora.bundle.manifest import MANIFEST
from translora.bundle.remote import canonical_url, expand_remote, is_remote
from translora.config import AdapterEntry
from translora.errors import InputError
from translora.run.files import digest
from translora.run.state import BUNDLES

logger = logging.getLogger(__name__)
MAX_NAME = 128


def expand_entries(
    entries: list[AdapterEntry], run_dir: Path | None = None
) -> tuple[dict[str, AdapterEntry], dict[str, str]]:
    """Entries by adapter name, globs expanded; an entry of its own overrides a glob's, in any order.

    A directory whose name is none for an adapter, or that of an earlier one, gets another here, under which it can be
    quarantined.

    Args:
        run_dir: of the run that is to migrate them.

    Returns:
        The entries, and by name the faults of those that cannot be migrated under the names of their directories.

    Raises:
        InputError: no glob matches anything, two bundles that are named one by one bear the same name, or one lies
            where the run would replace it, or one is named twice with different settings.
    """
    own_output = None if run_dir is None else (run_dir / BUNDLES).resolve()
    found: dict[str, AdapterEntry] = {}
    faults: dict[str, str] = {}
    explicit = {bundle_name(one.bundle): place_of(one.bundle) for one in reversed(entries) if not is_glob(one.bundle)}
    empty: list[str] = []
    for entry in entries:
        is_pattern = is_glob(entry.bundle)
        paths = expand(entry.bundle)
        empty += [] if paths else [entry.bundle]
        for path in paths:
            if not is_remote(path) and Path(path).resolve().parent == own_output:
                raise InputError(f"adapters: {path}: this run writes its own bundles there; give another run_dir")
            is_bundle = os.path.isfile(os.path.join(path, MANIFEST))
            if is_bundle and run_dir is not None and run_dir.resolve().is_relative_to(Path(path).resolve()):
                raise InputError(f"run_dir: {run_dir} lies in the bundle {path}, which may not change; give another")
            name, place = bundle_name(path), place_of(path)
            owner = explicit.get(name) or (place_of(found[name].bundle) if name in found else place)
            if not is_name(name):
                name = f"unnamed-{digest(place)}"
                faults[name] = (
                    f"{path}: the directory's name cannot be an adapter's; rename it: at most {MAX_NAME} printable "
                    "characters, no dot or ~ in front, no space at its ends"
                )
            elif owner != place:
                if not is_pattern:
                    raise InputError(f"adapters: {owner} and {path} are both named {name}; rename one directory")
                name = f"{name[: MAX_NAME - 20]}-{digest(place)}"
                faults[name] = f"{path}: another bundle of the fleet has its name; rename one directory"
            elif is_pattern and name in explicit:
                continue
            own = entry.model_copy(update={"bundle": path})
            if name in found:
                refuse_different(found[name], own)
            found[name] = own
    if empty and not found:
        raise InputError(f"adapters: the pattern {empty[0]} matches no directory; correct it")
    for pattern in empty:
        logger.warning("adapters: the pattern %s matches no directory", pattern)
    return found, faults


def refuse_different(earlier: AdapterEntry, now: AdapterEntry) -> None:
    """Whether a bundle that two entries name, both one by one or both by a pattern, has one set of settings.

    Raises:
        InputError: it has two.
    """
    settings = sorted(AdapterEntry.model_fields.keys() - {"bundle"})
    if other := [name for name in settings if getattr(earlier, name) != getattr(now, name)]:
        raise InputError(f"adapters: {now.bundle} is named twice, with different {', '.join(other)}; name it once")


def expand(bundle: str) -> list[str]:
    """The paths or URLs that an entry stands for."""
    if is_remote(bundle):
        return expand_remote(bundle)
    return sorted(path for path in glob.glob(bundle) if os.path.isdir(path)) if is_glob(bundle) else [bundle]


def is_glob(bundle: str) -> bool:
    """Whether an entry stands for what a pattern matches."""
    return glob.has_magic(bundle) and (is_remote(bundle) or not os.path.isdir(bundle))


def place_of(bundle: str) -> str:
    """One spelling of a path or URL, so that a bundle that is named in two ways is one."""
    return canonical_url(bundle) if is_remote(bundle) else os.path.normpath(bundle)


def bundle_name(bundle: str) -> str:
    """The name of a bundle's directory: the adapter's, where it can be one."""
    return bundle.rstrip("/").rsplit("/", 1)[-1] if is_remote(bundle) else Path(bundle).name


def is_name(name: str) -> bool:
    """Whether the name of a bundle's directory can be an adapter's in paths, logs and reports."""
    return 0 < len(name) <= MAX_NAME and name.isprintable() and name[0] not in ".~" and name.strip() == name
