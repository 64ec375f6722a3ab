"""One adapter of a run and what an earlier run left of it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from translora.bundle import BaseInfo, Bundle
from translora.config import AdapterEntry, FleetConfig
from translora.run.files import sha256_path
from translora.run.redact import printable, redact
from translora.run.resume import artifact_digest, continue_state
from translora.run.state import SYNTHETIC, AdapterState, Phase, save_state, training_fields
from translora.run.tracker import Tracker

logger = logging.getLogger(__name__)
MAX_REPAIRS = 2


@dataclass
class Member:
    """One adapter of the fleet: its bundle, its state on disk."""

    bundle: Bundle
    state: AdapterState
    directory: Path
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

    def warn(self, text: str) -> None:
        """Say what its training has to do without, here and in the report."""
        logger.warning("%s: %s", self.name, text)
        self.state.training_warnings.append(printable(redact(text)))

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
        os.replace(member.directory / SYNTHETIC, member.earlier_set)
        state.artifacts = {relative_to(self.config.run_dir, member.earlier_set): sha256_path(member.earlier_set)}
        state.status, state.phase, state.reason = "pending", "synthesis", ""
        for name, value in training_fields(AdapterState(name="", bundle="")).items():
            setattr(state, name, value)
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
