"""What an adapter's phases are made from: a rerun does again what a changed setting, base or bundle touches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from translora.bundle import BaseInfo
from translora.bundle.base import pinned
from translora.config import AdapterEntry, BaseModelConfig, FleetConfig
from translora.distill.ds_config import deciding
from translora.run.files import digest, read_object, sha256_file, write_json
from translora.run.state import AdapterState, Phase

HELD_OUT = {"holdout_fraction", "min_holdout"}
"""Of the gate's settings: they decide the size of the synthetic set."""
BUDGET = ("max_rounds", "max_generated_factor")
SPENT = {"batch_size", "min_accepted_fraction", *BUDGET}
"""Of the synthesis: they touch no adapter that has its samples."""
RETRIES = {"retries", "retry_factor"}
"""Of the gate: they touch no adapter that passed it."""
Base = TypeVar("Base")
SEALS = "seals.json"
GATE_RULES = 4
"""Of the gate's verdict: a run of others judges again. 2: few answers are told from chance by their likelihood.
3: a student has room for the teacher's answers, in however many tokens of its own. 4: where answers are few, at least
`min_informedness`, and an answer that one prompt has weighs nothing in it."""


class Bases(NamedTuple, Generic[Base]):
    """The bases of a fleet."""

    source: Base
    target: Base
    generator: Base


def recipes(
    config: FleetConfig,
    entry: AdapterEntry,
    *,
    bundle_digest: str,
    num_samples: int,
    bases: Bases[BaseInfo],
) -> dict[Phase, str]:
    """A hash for each phase of what decides its result, given the results of the phases before it.

    Args:
        bases: they count by their weights, not by where they lie.
    """
    source, target, generator = (
        (base.identity, {key: value for key, value in settings.decides().items() if key != "model"})
        for base, settings in zip(bases, base_settings(config), strict=True)
    )
    gate = config.gate.at_defaults(RETRIES).model_dump()
    template = config.template_of(entry, "source")  # itself: the bundle's is of its digest, which the synthesis has
    synthesis = config.synthesis.at_defaults(SPENT).model_dump(exclude={"generator"})
    answers = {key: synthesis[key] for key in ("batch_size", "max_answer_tokens")}
    return {
        "synthesis": digest(
            bundle_digest,
            num_samples,
            synthesis,
            entry.screen,
            {key: gate[key] for key in HELD_OUT},
            source,
            generator,
            config.seed,
            *([] if entry.stop is None else [entry.stop]),
        ),
        "distill": digest(
            deciding(config.training_of(entry)),
            *(None, None),  # what an entry has of its own stood here
            config.discriminator.model_dump(),
            (target[0], {key: value for key, value in target[1].items() if key != "vllm"}),
            config.seed,
            *([] if template == "auto" else [template]),
        ),
        "gate": digest(
            GATE_RULES,
            {key: value for key, value in gate.items() if key not in HELD_OUT},
            answers,
            source,
            target,
            sha256_file(Path(entry.eval_data)) if entry.eval_data else None,
            *([] if entry.min_agreement is None else [entry.min_agreement]),
        ),
    }


def spending(config: FleetConfig) -> dict[str, float]:
    """How much may be spent on an adapter before it is given up."""
    return {**{name: getattr(config.synthesis, name) for name in BUDGET}, "retries": config.gate.retries}


def at_commits(config: FleetConfig, bases: Bases[BaseInfo]) -> FleetConfig:
    """The fleet file with the commits that its bases' hub ids were found to stand for, as every worker loads them."""
    update: dict[str, Any] = {
        "source": pinned(config.source, bases.source),
        "target": pinned(config.target, bases.target),
    }
    if config.synthesis.generator is not None:
        generator = pinned(config.synthesis.generator, bases.generator)
        update["synthesis"] = config.synthesis.model_copy(update={"generator": generator})
    return config.model_copy(update=update)


def base_settings(config: FleetConfig) -> Bases[BaseModelConfig]:
    """The bases as the fleet file has them."""
    return Bases(config.source, config.target, config.generator)


class Seals:
    """Finished adapters that were verified, by the size and time of change of each of their files.

    Hashing a thousand bundles and what was made of them takes minutes; looking at their files does not. A seal fits as
    long as no file, no setting and no base changed. What no longer fits is verified by its hashes.

    Args:
        run_dir: they lie in RUN/seals.json; deleting it makes a rerun hash everything.
        bases: of the fleet.
    """

    def __init__(self, run_dir: Path, config: FleetConfig, bases: Bases[BaseInfo]) -> None:
        self.run_dir = run_dir
        settings = config.model_dump(exclude={"adapters", "merges", "resources", "tracking", "run_dir"})
        self._common = digest(settings, [base.identity for base in bases], GATE_RULES)
        known = read_object(run_dir / SEALS)
        self._known = {str(name): seal for name, seal in known.items()}

    def fits(self, entry: AdapterEntry, state: AdapterState) -> bool:
        """Whether the adapter is finished and nothing of it changed since it was sealed."""
        return state.name in self._known and self._known[state.name] == self._seal(entry, state, self.look(entry))

    def look(self, entry: AdapterEntry) -> list[Any]:
        """The files that an adapter is made from, as they are now; to be called before they are read."""
        return [_listing(place) for place in (entry.bundle, *([entry.eval_data] if entry.eval_data else []))]

    def put(self, entry: AdapterEntry, state: AdapterState, looked: list[Any]) -> None:
        """Seal an adapter whose files were verified or just made, if it is finished.

        Args:
            looked: from `look`. A bundle that its owner replaced since then must not pass for the one that was read.
        """
        if state.phase == "done" and state.status in ("migrated", "failed_gate"):
            self._known[state.name] = self._seal(entry, state, looked)
        else:
            self._known.pop(state.name, None)

    def save(self) -> None:
        """Write them down."""
        if read_object(self.run_dir / SEALS) != self._known:
            write_json(self.run_dir / SEALS, self._known)

    def _seal(self, entry: AdapterEntry, state: AdapterState, looked: list[Any]) -> str:
        files = [*looked, *(_listing(str(self.run_dir / name)) for name in sorted(state.artifacts))]
        verdict = (state.phase, state.status, state.bundle_digest, state.num_samples, state.artifacts)
        return digest(self._common, entry.model_dump(exclude={"bundle", "eval_data"}), verdict, files)


def _listing(path: str) -> list[Any]:
    """Relative path, size and time of change of a file, or of every file below a directory."""
    if os.path.isdir(path):
        found = []
        for folder, folders, names in os.walk(path):
            folders.sort()
            place = os.path.relpath(folder, path)
            for name in sorted(names):
                try:
                    status = os.lstat(os.path.join(folder, name))
                except FileNotFoundError:  # its owner is at work there
                    continue
                found.append([place, name, status.st_size, status.st_mtime_ns])
        return found
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]
