"""The state of each adapter of a run: what `status`, the report and a rerun read.

One JSON file per adapter, `RUN/adapters/NAME/state.json`, replaced atomically by the driver alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from translora.errors import InputError
from translora.run.files import read_object, write_json
from translora.run.redact import printable, redact

Phase = Literal["verify", "synthesis", "distill", "gate", "done"]
ScreenName = Literal["discriminator", "realness", "confidence", "excess", "none"]
BY_DISCRIMINATOR: frozenset[str] = frozenset({"discriminator", "realness"})
"""Screens that ask the bundle's discriminator."""
RANKING: frozenset[str] = frozenset({"realness", "confidence", "excess"})
"""Screens that choose the best of a surplus."""
LEAVING_DISCRIMINATOR: frozenset[str] = BY_DISCRIMINATOR | {"excess", ""}
"""Screens whose score speaks for some inputs and against others: the next hop's discriminator learns to tell these
apart. Old runs do not say which screen they had: it was the discriminator."""
SYNTHETIC, STUDENT, DISCRIMINATOR, BUNDLES = "synthetic.parquet", "student", "discriminator", "bundles"
"""An adapter's files and directories below RUN/adapters/NAME, and where what passed the gate lies in the run."""
FLEET = "fleet.json"
"""In the run directory: the names of the adapters that its fleet file has."""
PHASES: tuple[Phase, ...] = ("verify", "synthesis", "distill", "gate", "done")
Status = Literal["pending", "migrated", "merged", "failed_gate", "quarantined"]
"""`merged`: made of adapters that were migrated."""


class SynthesisStats(BaseModel):
    """Counts of the generate-and-screen rounds of one adapter."""

    rounds: int = 0
    generated: int = 0
    accepted: int = 0
    """Passed the screen, those that were not needed in the end (outranked) included."""
    needed: int = 0
    """|D_syn| plus the held-out samples."""
    num_train: int = 0
    """Samples to train on; 0 until the set is written."""
    num_too_long: int = 0
    """Those of them that distill.max_length leaves out."""
    dropped: dict[str, int] = {}
    """Samples not used, by reason: malformed, long_input, seed_copy, duplicate, near_duplicate, refused, outranked,
    empty_answer or long_answer."""
    shortfall: str = ""
    """Set when the budget ended before `needed` was reached."""
    screen: str = ""
    """Which screen was used."""
    distinct: dict[str, float] = {}
    """distinct-1, distinct-2: share of different word n-grams among the kept inputs."""
    classes: dict[str, int] = {}
    """The teacher's answers by frequency, where at most 20 differ; empty for free text."""
    warning: str = ""
    """What a person should look at: a teacher with one answer, for example."""

    @property
    def acceptance(self) -> float:
        """Accepted share of what was generated."""
        return self.accepted / self.generated if self.generated else 0.0

    @property
    def leaves_discriminator(self) -> bool:
        """Whether one is trained for the next hop, from what a screen's score speaks against.

        Where that is little, shuffled words make up for it; one that could not be measured for want of it is not what
        `screen: auto` takes.
        """
        return self.screen in LEAVING_DISCRIMINATOR

    @property
    def only_answer(self) -> str | None:
        """The teacher's answer to every kept sample, where it has only one."""
        return next(iter(self.classes)) if len(self.classes) == 1 else None


class GateResult(BaseModel):
    """Agreement with the teacher on held-out synthetic prompts."""

    num_heldout: int
    unit: Literal["answers", "tokens"] = "answers"
    """What agrees or not: answers as a whole, or their tokens, as a mean over the prompts."""
    has_long_answers: bool = False
    agreement_student: float
    agreement_base: float
    agreement_interval: tuple[float, float] | None = None
    """95 % bootstrap interval of the student's over the prompts, where `unit` is tokens."""
    only_answer: str | None = None
    """The teacher's answer to every synthetic sample, where it has only one."""
    informedness: float | None = None
    """Of the student's answers, where the teacher's are few: 0 is one answer to everything, 1 the teacher's."""
    commonest: float | None = None
    """Share of the held-out prompts that have the commonest answer: the agreement of one answer to everything."""
    chance: Literal["agreement", "likelihood"] = "agreement"
    """What the p-value is of, where `unit` is answers."""
    p_value: float | None = None
    """Chance that the teacher's answers would suit the student as well if they were dealt out to other prompts: few
    answers by their likelihood, others by agreement; of tokens, that they agree no more often than the bare base's, or
    than with other inputs."""
    loglik_student: float | None = None
    loglik_base: float | None = None
    """Mean log-likelihood of a token of the teacher's answers."""
    min_agreement: float | None = None
    """The least agreement that was asked for; none in a result of an older version."""
    min_informedness: float | None = None
    """The least informedness that was asked for, where it was."""
    passed: bool
    reason: str = ""


class Accuracy(BaseModel):
    """Exact-match accuracy on real held-out data, where the fleet file names some."""

    num_items: int
    num_seen: int = 0
    """Items whose input was invented word for word, and trained on."""
    source_base: float
    source_adapter: float
    target_base: float
    migrated: float


def is_against(score: float | None) -> bool:
    """Whether a screen's score speaks against a sample; one that is not a number does."""
    return score is not None and not score > 0


def was_refused(score: float | None, screen: str) -> bool:
    """Whether a screen refused a sample. The `refused` of a synthetic set also are what a surplus left over.

    Realness only ranks, and refuses what cannot be ranked.
    """
    if screen == "realness":
        return score is not None and math.isnan(score)
    return is_against(score)


class AdapterState(BaseModel):
    """Everything that is known of one adapter of the run."""

    model_config = ConfigDict(extra="forbid")

    name: str
    bundle: str
    bundle_digest: str = ""
    task_name: str = ""
    is_merge: bool = False
    """Of adapters that were migrated: made of them, and no migration itself."""
    phase: Phase = "verify"
    status: Status = "pending"
    reason: str = ""
    """Why it was quarantined or failed the gate."""
    num_samples: int = 0
    """|D_syn| of the first attempt, as asked for."""
    attempt: int = 1
    """Above 1 the gate sent it back for more samples."""
    synthesis: SynthesisStats = SynthesisStats()
    earlier: SynthesisStats | None = None
    """What the attempt before this one ended with, from which its synthesis goes on."""
    step: int = 0
    num_steps: int = 0
    losses: list[float] = []
    """Training loss per step."""
    answers_per_sample: float | None = None
    """Mean of what its student learns by soft labels; None where it learns the teacher's one answer alone."""
    training_warnings: list[str] = []
    """What its training had to do without: soft labels, or a discriminator for the next hop."""
    gate: GateResult | None = None
    earlier_agreement: float | None = None
    """The student's of the attempt before this one."""
    accuracy: Accuracy | None = None
    seconds: dict[str, float] = {}
    """Wall seconds by phase (shared phases: the whole phase)."""
    recipes: dict[str, str] = {}
    """Hash of what each phase is made from; none in a state of an older version, which is kept as it is."""
    spending: dict[str, float] = {}
    """How much might be spent on it, by setting."""
    artifacts: dict[str, str] = {}
    """sha256 by path relative to the run directory: what a rerun verifies before it skips a phase."""
    output: str = ""
    """The migrated bundle, relative to the run directory."""

    @property
    def has_discriminator(self) -> bool:
        """Whether one was trained for the next hop."""
        return f"adapters/{self.name}/{DISCRIMINATOR}" in self.artifacts

    @property
    def set_size(self) -> int:
        """|D_syn|: samples of this attempt that are trained on; as many as were asked for while they are not there."""
        return self.synthesis.num_train - self.synthesis.num_too_long or self.num_samples


def training_fields(state: AdapterState) -> dict[str, Any]:
    """What a state says of its training."""
    names = ("step", "num_steps", "losses", "answers_per_sample", "training_warnings")
    return {name: getattr(state, name) for name in names}


def reached(state: AdapterState, phase: Phase) -> bool:
    """Whether an adapter is in a phase or past it."""
    return PHASES.index(state.phase) >= PHASES.index(phase)


def state_path(run_dir: Path, name: str) -> Path:
    """Where the state of adapter `name` lies."""
    return run_dir / "adapters" / name / "state.json"


def save_state(run_dir: Path, state: AdapterState) -> None:
    """Replace the adapter's state file."""
    write_json(state_path(run_dir, state.name), state.model_dump() | {"bundle": printable(redact(state.bundle))})


def load_state(run_dir: Path, name: str) -> AdapterState:
    """Read one adapter's state.

    Raises:
        InputError: the file is truncated, damaged or of another version; names it and the remedy.
    """
    path = state_path(run_dir, name)
    try:
        return AdapterState.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        fault = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            fault = ": ".join([*(str(part) for part in first["loc"][:1]), first["msg"]])
        raise InputError(
            f"{path}: truncated, damaged or of another version of translora ({fault}); "
            "delete it: the adapter is migrated anew"
        ) from error


def note_fleet(run_dir: Path, names: Collection[str]) -> None:
    """Keep which adapters the fleet file has now: states of earlier ones stay where they are."""
    write_json(run_dir / FLEET, {"adapters": sorted(names)})


def load_states(run_dir: Path) -> list[AdapterState]:
    """The state of every adapter of a fleet, by name; one that cannot be read is that of a quarantined adapter.

    Adapters that an earlier fleet file of the run had are left out.

    Raises:
        InputError: `run_dir` is not the run directory of a fleet.
    """
    path = run_dir / "config.json"
    if not path.is_file():
        raise InputError(f"{run_dir}: not a run directory (no config.json); give the `run_dir` of a fleet file")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give the `run_dir` of a fleet file") from error
    if isinstance(config, dict) and "arms" in config:
        raise InputError(
            f"{run_dir}: the run of a `translora evaluate`, whose migrations are runs of their own; "
            f"give one of {run_dir}/seed-*/arms/*, or read {config.get('output')}"
        )
    if isinstance(config, dict) and "tasks" in config:
        raise InputError(
            f"{run_dir}: the run of a `translora prepare`, which has no states; "
            f"its bundles are written to {config.get('output_dir')}"
        )
    names = state_names(run_dir)
    fleet = set(read_object(run_dir / FLEET).get("adapters", names))  # all of a run that an older version began
    return [_load_or_quarantine(run_dir, name) for name in names if name in fleet]


def _load_or_quarantine(run_dir: Path, name: str) -> AdapterState:
    try:
        return load_state(run_dir, name)
    except InputError as error:
        return AdapterState(name=name, bundle="", status="quarantined", reason=str(error))


def state_names(run_dir: Path) -> list[str]:
    """Names of the adapters that have a state in this run, sorted."""
    return sorted(path.parent.name for path in (run_dir / "adapters").glob("*/state.json"))
