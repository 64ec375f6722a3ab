"""One adapter of a run and what an earlier run left of it."""

from __future__ import annotations

import glob
import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from translora.bundle import BaseInfo, Bundle, BundleError, read_bundle, verify_bundle
from translora.bundle.remote import expand_remote, is_remote, name_of_url
from translora.config import AdapterEntry, FleetConfig, GateConfig
from translora.run.files import remove_directory, sha256_path, write_json
from translora.run.state import AdapterState, Phase, load_state, save_state, state_path
from translora.run.tracker import Tracker

logger = logging.getLogger(__name__)
SYNTHETIC, STUDENT, DISCRIMINATOR, BUNDLES = "synthetic.parquet", "student", "discriminator", "bundles"
MAX_REPAIRS = 2
PHASES: tuple[Phase, ...] = ("verify", "synthesis", "distill", "gate", "done")


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
        state.status, state.reason = "quarantined", reason
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
        identity = {"name", "bundle", "bundle_digest", "task_name", "num_samples", "recipes"}
        fresh = AdapterState(**state.model_dump(include=identity), phase="synthesis")
        member.state = continue_state(run_dir, fresh, self.target)
        member.num_samples = attempt_size(member.state, self.config.gate)
        self.save(member.state)
        return False

    def digest_of(self, relative: str) -> str:
        """The present digest of one of a state's artifacts."""
        return artifact_digest(self.config.run_dir, relative, self.target)

    def send_back(self, member: Member) -> None:
        """Begin another attempt of an adapter that did not pass: its set is laid aside, to be continued."""
        state = member.state
        state.attempt += 1
        member.num_samples = attempt_size(state, self.config.gate)
        os.replace(member.directory / SYNTHETIC, member.earlier_set)
        state.artifacts = {relative_to(self.config.run_dir, member.earlier_set): sha256_path(member.earlier_set)}
        state.status, state.phase, state.reason = "pending", "synthesis", ""
        state.step, state.num_steps, state.losses = 0, 0, []
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


def attempt_size(state: AdapterState, config: GateConfig) -> int:
    """|D_syn| of an adapter's present attempt."""
    return math.ceil(state.num_samples * config.retry_factor ** (state.attempt - 1))


def cohort(run_dir: Path, phase: Phase, todo: list[Member], members: list[Member]) -> list[Member]:
    """The members whose rows are computed together in a phase: those of the killed run, if there was one.

    Batches mix adapters, so a rerun must mix the same ones to find its finished blocks again and to end with the same
    bits, also when the kill fell between two adapters' last steps. Members that are not of the cohort come after it.
    """
    path = run_dir / f"cohort-{phase}.json"
    by_name = {member.name: member for member in members}
    if path.is_file():
        names = json.loads(path.read_text(encoding="utf-8"))
        if all(name in by_name and reached(by_name[name].state, phase) for name in names):
            return [by_name[name] for name in names]
    write_json(path, [member.name for member in todo])
    return todo


def cohort_names(run_dir: Path) -> set[str]:
    """Names of all adapters of the cohorts of a killed run."""
    return {name for path in run_dir.glob("cohort-*.json") for name in json.loads(path.read_text(encoding="utf-8"))}


def end_cohort(run_dir: Path, phase: Phase) -> None:
    """Forget the cohort: each of its members has left the phase."""
    (run_dir / f"cohort-{phase}.json").unlink(missing_ok=True)


def reached(state: AdapterState, phase: Phase) -> bool:
    """Whether an adapter is in a phase or past it."""
    return PHASES.index(state.phase) >= PHASES.index(phase)


def expand_entries(entries: list[AdapterEntry]) -> dict[str, AdapterEntry]:
    """Entries by adapter name, globs expanded; an entry of its own overrides a glob's, in any order.

    Raises:
        ValueError: a glob matches nothing, or two bundles bear the same name.
    """
    found: dict[str, AdapterEntry] = {}
    explicit: set[str] = set()
    for entry in entries:
        paths = [entry.bundle]
        is_glob = glob.has_magic(entry.bundle) and not Path(entry.bundle).is_dir()
        if is_remote(entry.bundle):
            paths = expand_remote(entry.bundle)
        elif is_glob:
            paths = sorted(path for path in glob.glob(entry.bundle) if Path(path).is_dir())
        if not paths:
            raise ValueError(f"adapters: the pattern {entry.bundle} matches no directory; correct it")
        for path in paths:
            name = name_of_url(path) if is_remote(path) else Path(path).name
            if name in found and found[name].bundle != path:
                raise ValueError(
                    f"adapters: {found[name].bundle} and {path} are both named {name}; rename one directory"
                )
            if is_glob and name in explicit:
                continue
            found[name] = entry.model_copy(update={"bundle": path})
            if not is_glob:
                explicit.add(name)
    return found


def artifact_digest(run_dir: Path, relative: str, target: BaseInfo) -> str:
    """What a rerun compares: a path's hash, or the digest of a bundle, to which its readers may add a model card.

    Empty for a file that is missing and for a bundle that is missing or damaged.
    """
    path = run_dir / relative
    if not relative.startswith(f"{BUNDLES}/"):
        return sha256_path(path) if path.exists() else ""
    try:
        bundle = read_bundle(path)
        verify_bundle(bundle, target)
    except BundleError:
        return ""
    return bundle.digest


def continue_state(run_dir: Path, fresh: AdapterState, target: BaseInfo) -> AdapterState:
    """The state an earlier run left, as far as its files still are what it recorded; else `fresh`.

    A changed bundle starts from the beginning. A missing or changed file sends the adapter back to the phase that
    makes it, a changed setting or base to the first phase that it touches. A quarantined adapter is tried again; one
    that failed the gate is not.
    """
    directory = run_dir / "adapters" / fresh.name
    if not state_path(run_dir, fresh.name).is_file():
        remove_directory(directory)
        return fresh
    state = load_state(run_dir, fresh.name)
    if (state.bundle_digest, state.num_samples) != (fresh.bundle_digest, fresh.num_samples):
        logger.info("%s: the bundle or its size changed: migrated anew", fresh.name)
        remove_directory(directory)
        remove_directory(run_dir / BUNDLES / fresh.name)
        return fresh
    state.bundle = fresh.bundle
    state = touched_again(run_dir, state, fresh)
    earlier = [name for name in state.artifacts if name.startswith(f"adapters/{fresh.name}/synthetic-")]
    if any(artifact_digest(run_dir, name, target) != state.artifacts[name] for name in earlier):
        logger.warning("%s: the samples of its first attempt are missing or changed: migrated anew", fresh.name)
        remove_directory(directory)
        return fresh
    made_by: dict[str, Phase] = {
        f"adapters/{fresh.name}/{SYNTHETIC}": "synthesis",
        f"adapters/{fresh.name}/{STUDENT}": "distill",
        f"adapters/{fresh.name}/{DISCRIMINATOR}": "distill",
        f"{BUNDLES}/{fresh.name}": "gate",
    }
    for relative, phase in made_by.items():
        recorded = state.artifacts.get(relative)
        if recorded is None or artifact_digest(run_dir, relative, target) == recorded:
            continue
        logger.warning("%s: %s is missing or changed: made anew", fresh.name, run_dir / relative)
        for later in [other for other, maker in made_by.items() if PHASES.index(maker) >= PHASES.index(phase)]:
            state.artifacts.pop(later, None)
            if later.endswith(SYNTHETIC):
                (run_dir / later).unlink(missing_ok=True)
            else:
                remove_directory(run_dir / later)
        return sent_back(state, fresh, phase)
    if state.status == "quarantined":
        state.status, state.reason = "pending", ""
        if state.phase == "done":  # its bundle was broken for a while, after it had been migrated
            passed = f"{BUNDLES}/{fresh.name}" in state.artifacts
            state.status = "migrated" if passed else "failed_gate"
            state.reason = "" if passed or state.gate is None else state.gate.reason
    return state


def touched_again(run_dir: Path, state: AdapterState, fresh: AdapterState) -> AdapterState:
    """The state, sent back to the first phase that was made from something else than now.

    What was shipped goes; student and discriminator stay, because a training recognises by itself what it made. An
    attempt beyond the first keeps its number and its samples unless the samples themselves are touched.
    """
    touched = next((phase for phase in PHASES if state.recipes.get(phase) != fresh.recipes.get(phase)), None)
    begun = touched is not None and (reached(state, touched) and (state.phase != touched or state.attempt > 1))
    if touched is None or not state.recipes or not begun:
        return state.model_copy(update={"recipes": fresh.recipes})
    logger.info("%s: settings or a base changed: done again from the phase %s on", state.name, touched)
    remove_directory(run_dir / BUNDLES / state.name)
    if touched == "synthesis":
        return fresh
    dropped = {f"{BUNDLES}/{state.name}"}
    if touched == "distill":
        dropped |= {f"adapters/{state.name}/{kind}" for kind in (STUDENT, DISCRIMINATOR)}
    state.artifacts = {name: value for name, value in state.artifacts.items() if name not in dropped}
    return sent_back(state, fresh, touched)


def sent_back(state: AdapterState, fresh: AdapterState, phase: Phase) -> AdapterState:
    """`fresh` with what the phases before `phase` have come to."""
    kept: dict[str, Any] = {"phase": phase, "artifacts": state.artifacts, "attempt": state.attempt}
    if phase != "synthesis":
        kept["synthesis"] = state.synthesis
    if phase == "gate":
        kept |= {"losses": state.losses, "step": state.step, "num_steps": state.num_steps}
    return fresh.model_copy(update=kept)
