"""One adapter of a run and what an earlier run left of it."""

from __future__ import annotations

import glob
import json
import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from translora.bundle import BaseInfo, Bundle
from translora.bundle.remote import canonical_url, expand_remote, is_remote, name_of_url
from translora.config import AdapterEntry, FleetConfig, GateConfig
from translora.errors import InputError
from translora.run.files import digest, sha256_path, write_json
from translora.run.redact import printable, redact
from translora.run.resume import artifact_digest, continue_state
from translora.run.state import BUNDLES, SYNTHETIC, AdapterState, Phase, reached, save_state
from translora.run.tracker import Tracker

logger = logging.getLogger(__name__)
MAX_REPAIRS = 2
MAX_NAME = 128


@dataclass
class Member:
    """One adapter of the fleet: its bundle, its sizes, its state on disk."""

    bundle: Bundle
    state: AdapterState
    directory: Path
    num_samples: int
    """|D_syn| of this attempt."""
    num_heldout: int
    """Samples for the gate, beyond |D_syn|."""
    eval_rows: list[dict[str, str]]
    """Real held-out data to measure on; may be empty."""
    entry: AdapterEntry
    """Its line in the fleet file, with settings of its own."""
    looked: list[Any] = field(default_factory=list)
    """The files that it is made from, as they were before they were read; see recipes.Seals."""
    repairs: int = 0
    """Times that this process found files of it damaged and had them made anew."""

    def waits_for(self, phase: Phase) -> bool:
        """Whether this phase is the next thing to do."""
        return self.state.phase == phase and self.state.status == "pending"

    @property
    def name(self) -> str:
        """Name within the run: that of the bundle's directory."""
        return self.state.name

    @property
    def earlier_set(self) -> Path:
        """The synthetic set of the attempt before."""
        return self.directory / f"synthetic-{self.state.attempt - 1}.parquet"

    def template(self, config: FleetConfig) -> str:
        """The prompt template of its student and of its next discriminator."""
        return config.template_of(self.entry, self.bundle.manifest.prompt_template)

    def samples(self, split: str) -> list[dict[str, Any]]:
        """Rows of the synthetic set: split is train, heldout or refused."""
        return [row for row in pq.read_table(self.directory / SYNTHETIC).to_pylist() if row["split"] == split]


@dataclass(frozen=True)
class Run:
    """What every phase needs."""

    config: FleetConfig
    source: BaseInfo
    target: BaseInfo
    generator: BaseInfo
    tracker: Tracker
    source_tokenizer: Any
    generator_tokenizer: Any

    def save(self, state: AdapterState) -> None:
        """Write the adapter's state file."""
        save_state(self.config.run_dir, state)

    def quarantine(self, state: AdapterState, reason: str) -> None:
        """Take one adapter out of the fleet; the others go on."""
        logger.error("%s: quarantined: %s", state.name, reason)
        state.status, state.reason = "quarantined", printable(redact(reason))
        self.save(state)

    def is_whole(self, member: Member) -> bool:
        """Whether the files of the phases so far still are what was written.

        If not, the adapter goes back to the phase that makes the first damaged one, a few times; then it is out.
        """
        run_dir, state = self.config.run_dir, member.state
        damaged = [name for name, recorded in state.artifacts.items() if self.digest_of(name) != recorded]
        if not damaged:
            return True
        member.repairs += 1
        if member.repairs > MAX_REPAIRS:
            self.quarantine(
                state, f"{run_dir / damaged[0]}: damaged, {MAX_REPAIRS} times made anew; check the file system"
            )
            return False
        identity = {"name", "bundle", "bundle_digest", "task_name", "num_samples", "recipes", "spending"}
        fresh = AdapterState(**state.model_dump(include=identity), phase="synthesis")
        member.state = continue_state(run_dir, fresh, self.target)
        member.num_samples, member.num_heldout = attempt_sizes(member.state, self.config.gate)
        self.save(member.state)
        return False

    def digest_of(self, relative: str) -> str:
        """The present digest of one of a state's artifacts."""
        return artifact_digest(self.config.run_dir, relative, self.target)

    def send_back(self, member: Member) -> None:
        """Begin another attempt of an adapter that did not pass: its set is laid aside, to be continued."""
        state = member.state
        state.attempt += 1
        state.earlier = state.synthesis.model_copy(deep=True)
        member.num_samples, member.num_heldout = attempt_sizes(state, self.config.gate)
        os.replace(member.directory / SYNTHETIC, member.earlier_set)
        state.artifacts = {relative_to(self.config.run_dir, member.earlier_set): sha256_path(member.earlier_set)}
        state.status, state.phase, state.reason = "pending", "synthesis", ""
        state.step, state.num_steps, state.losses = 0, 0, []
        state.earlier_agreement = state.gate.agreement_student if state.gate else None
        state.gate, state.accuracy = None, None
        self.save(state)

    def advance(self, member: Member, phase: Phase, *artifacts: Path) -> None:
        """Record the hashes of what a phase wrote (paths below the run directory) and go on to the next one."""
        for path in artifacts:
            relative = relative_to(self.config.run_dir, path)
            member.state.artifacts[relative] = self.digest_of(relative)
        member.state.phase = phase
        self.save(member.state)


def relative_to(run_dir: Path, path: Path) -> str:
    """A path below the run directory as states record it."""
    return path.relative_to(run_dir).as_posix()


def attempt_sizes(state: AdapterState, config: GateConfig) -> tuple[int, int]:
    """|D_syn| of an adapter's present attempt, and its samples for the gate beyond it.

    Both grow: an adapter may have failed because the held-out prompts were too few to tell agreement from chance.
    """
    factor = config.retry_factor ** (state.attempt - 1)
    heldout = heldout_size(config, state.num_samples)
    return math.ceil(state.num_samples * factor), math.ceil(heldout * factor)


def heldout_size(config: GateConfig, num_samples: int) -> int:
    """Samples for the gate of a first attempt, beyond |D_syn|."""
    return max(config.min_holdout, math.ceil(config.holdout_fraction * num_samples))


def cohort(run_dir: Path, phase: Phase, todo: list[Member], members: list[Member]) -> list[Member]:
    """The members whose rows are computed together in a phase: those of the killed run, if there was one.

    Batches mix adapters, so a rerun must mix the same ones to find its finished blocks again and to end with the same
    bits, also when the kill fell between two adapters' last steps. Members that are not of the cohort come after it.
    """
    path = run_dir / f"cohort-{phase}.json"
    by_name = {member.name: member for member in members}
    names = read_cohort(path)
    if names and all(name in by_name and reached(by_name[name].state, phase) for name in names):
        return [by_name[name] for name in names]
    write_json(path, [member.name for member in todo])
    return todo


def read_cohort(path: Path) -> list[str]:
    """Names of a cohort; none where there is no file, or one that is damaged, which is warned of."""
    if not path.is_file():
        return []
    try:
        names = json.loads(path.read_bytes())
    except (OSError, ValueError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        logger.warning("%s: cannot be read: unfinished batches are computed again", path)
        return []
    return names


def cohort_names(run_dir: Path) -> set[str]:
    """Names of all adapters of the cohorts of a killed run."""
    return {name for path in run_dir.glob("cohort-*.json") for name in read_cohort(path)}


def end_cohort(run_dir: Path, phase: Phase) -> None:
    """Forget the cohort: each of its members has left the phase."""
    (run_dir / f"cohort-{phase}.json").unlink(missing_ok=True)


def is_name(name: str) -> bool:
    """Whether the name of a bundle's directory can be an adapter's in paths, logs and reports."""
    return len(name) <= MAX_NAME and name.isprintable() and not name.startswith((".", "~")) and name.strip() == name


def expand_entries(entries: list[AdapterEntry], run_dir: Path | None = None) -> dict[str, AdapterEntry]:
    """Entries by adapter name, globs expanded; an entry of its own overrides a glob's, in any order.

    A directory whose name is none for an adapter, or that of an earlier one, gets another here, under which it can be
    quarantined (see `bundle_name`).

    Args:
        run_dir: of the run that is to migrate them.

    Raises:
        InputError: no glob matches anything, two bundles that are named one by one bear the same name, or one lies
            where the run would replace it.
    """
    own_output = None if run_dir is None else (run_dir / BUNDLES).resolve()
    found: dict[str, AdapterEntry] = {}
    explicit = {bundle_name(one.bundle): place_of(one.bundle) for one in reversed(entries) if not is_glob(one.bundle)}
    empty: list[str] = []
    for entry in entries:
        paths = expand_remote(entry.bundle) if is_remote(entry.bundle) else [entry.bundle]
        if is_glob(entry.bundle) and not is_remote(entry.bundle):
            paths = sorted(path for path in glob.glob(entry.bundle) if Path(path).is_dir())
        empty += [] if paths else [entry.bundle]
        for path in paths:
            if not is_remote(path) and Path(path).resolve().parent == own_output:
                raise InputError(f"adapters: {path}: this run writes its own bundles there; give another run_dir")
            name, place = bundle_name(path), place_of(path)
            owner = explicit.get(name) or (place_of(found[name].bundle) if name in found else place)
            if not is_name(name):
                name = f"unnamed-{digest(path)}"
            elif owner != place:
                if not is_glob(entry.bundle):
                    raise InputError(f"adapters: {owner} and {path} are both named {name}; rename one directory")
                name = f"{name[: MAX_NAME - 20]}-{digest(path)}"
            elif is_glob(entry.bundle) and name in explicit:
                continue
            found[name] = entry.model_copy(update={"bundle": path})
    if empty and not found:
        raise InputError(f"adapters: the pattern {empty[0]} matches no directory; correct it")
    for pattern in empty:
        logger.warning("adapters: the pattern %s matches no directory", pattern)
    return found


def is_glob(bundle: str) -> bool:
    """Whether an entry stands for what a pattern matches."""
    return glob.has_magic(bundle) and (is_remote(bundle) or not Path(bundle).is_dir())


def place_of(bundle: str) -> str:
    """One spelling of a path or URL, so that a bundle that is named in two ways is one."""
    return canonical_url(bundle) if is_remote(bundle) else os.path.normpath(bundle)


def bundle_name(bundle: str) -> str:
    """The name of a bundle's directory: the adapter's, unless `expand_entries` had to give it another."""
    return name_of_url(bundle) if is_remote(bundle) else Path(bundle).name
