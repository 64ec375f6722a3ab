"""Rounds of generate, screen and label, until every adapter of the fleet has its synthetic set.

Every decision (how many to generate, which to drop) is a function of the bundles, the config and the seeds, so
that a killed run replays the finished blocks from disk and goes on as if nothing had happened. What came out is kept
as well: an adapter that was left short has other neighbours, hence other blocks, when it is tried again.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from translora.bundle.bundle import Bundle
from translora.config import BaseModelConfig, ResourceConfig, Screen, SynthesisConfig
from translora.run.files import digest, write_bytes
from translora.run.progress import Progress
from translora.run.state import ScreenName, SynthesisStats
from translora.synthesis.actors import Hosts, cut_blocks, run_blocks
from translora.synthesis.calls import Row
from translora.synthesis.prompts import generation_order, generation_row, normalise
from translora.synthesis.quality import KnownInputs, answer_classes, distinct_ngrams, is_copy, own_cutoff
from translora.synthesis.stages import generate_block, screen_and_label_block

logger = logging.getLogger(__name__)


@dataclass
class Pool:
    """The growing synthetic set of one adapter."""

    name: str
    bundle: Bundle
    needed: int
    budget: int
    """Most inputs that may be generated."""
    screen: ScreenName = "none"
    surplus: float = 1.0
    """Samples that are collected, as a multiple of `needed`; the best of them by score are kept."""
    accepted: list[Row] = field(default_factory=list)
    refused: list[Row] = field(default_factory=list)
    stats: SynthesisStats = field(default_factory=SynthesisStats)
    seen: KnownInputs = field(default_factory=KnownInputs)
    fault: str = ""
    """Why its rows cannot be computed; it asks for no more."""

    def __post_init__(self) -> None:
        self.stats.needed, self.stats.screen = self.needed, self.screen

    @property
    def wanted(self) -> int:
        """Samples to collect."""
        return math.ceil(self.needed * self.surplus)

    def carry_on(self, stats: SynthesisStats, rows: Sequence[Row]) -> None:
        """Begin with what an earlier, smaller set of the adapter holds: its samples, counts and numbers.

        Args:
            rows: of the set, in its order: sample_id, input, answer, score, split (`refused` is not accepted).
        """
        counts = stats.model_dump(include={"rounds", "generated", "dropped"})
        counts["dropped"].pop("outranked", None)
        self.stats = self.stats.model_copy(update=counts)
        for row in rows:
            sample = {key: row[key] for key in ("sample_id", "input", "answer", "score")}
            outranked = self.surplus > 1 and row["score"] is not None and row["score"] > 0
            kept = row["split"] != "refused" or outranked
            (self.accepted if kept else self.refused).append(sample)
            self.seen.add(normalise(row["input"]))
        self.stats.accepted = len(self.accepted)

    def drop(self, reason: str) -> None:
        """Count a sample that is not used."""
        self.stats.dropped[reason] = self.stats.dropped.get(reason, 0) + 1

    def next_count(self, oversample: float) -> int:
        """Inputs to generate in the next round, from what was accepted so far (prior: 3 of 5)."""
        missing = self.wanted - len(self.accepted)
        if missing <= 0 or self.fault:
            return 0
        acceptance = (len(self.accepted) + 3) / (self.stats.generated + 5)
        return min(math.ceil(missing / acceptance * oversample), self.budget - self.stats.generated)


def choose_screen(config: SynthesisConfig, bundle: Bundle, own: Screen | None = None) -> ScreenName:
    """The screen of one adapter; `own` is its entry's.

    Raises:
        ValueError: the discriminator is asked for, and the bundle has none.
    """
    screen = own or config.screen
    if screen == "auto":
        return "discriminator" if bundle.discriminator_dir else "excess"
    if screen == "discriminator" and not bundle.discriminator_dir:
        setting = "its screen" if own else "synthesis.screen"
        raise ValueError(f"{bundle.path}: has no discriminator; set {setting} to auto, excess or none")
    return screen


def plan_round(pools: Sequence[Pool], config: SynthesisConfig, seed: int) -> list[Row]:
    """The generation requests of the next round, over all adapters."""
    rows = []
    for pool in pools:
        count = pool.next_count(config.oversample)
        for sample_id in range(pool.stats.generated, pool.stats.generated + count):
            rows.append(generation_row(pool.name, pool.bundle.seeds, sample_id, seed, config.num_orderings))
        if count > 0:
            pool.stats.rounds += 1
            pool.stats.generated += count
    return rows


def clean(generated: Sequence[Row], pools: Mapping[str, Pool], config: SynthesisConfig) -> list[Row]:
    """Drop malformed inputs, copies of seeds and duplicates, also those that differ in a trifle; each is counted."""
    candidates = []
    seed_texts = {name: {normalise(text) for text in pool.bundle.seeds} for name, pool in pools.items()}
    cutoffs = {
        name: tuple(own_cutoff(c, pool.bundle.seeds) for c in (config.seed_similarity, config.duplicate_similarity))
        for name, pool in pools.items()
    }
    for row in sorted(generated, key=lambda row: (row["adapter"], row["sample_id"])):
        pool = pools[row["adapter"]]
        key = normalise(row["text"])
        leak, duplicate = cutoffs[pool.name]
        if not row["finished"] or not key:
            pool.drop("malformed")
        elif is_copy(key, seed_texts[pool.name], leak):
            pool.drop("seed_copy")
        elif key in pool.seen:
            pool.drop("duplicate")
        elif pool.seen.has_near(key, duplicate):
            pool.drop("near_duplicate")
        else:
            pool.seen.add(key)
            manifest = pool.bundle.manifest
            candidates.append(
                {
                    "adapter": pool.name,
                    "sample_id": row["sample_id"],
                    "input": row["text"],
                    "slot": f"teacher/{pool.name}",
                    "screen": pool.screen,
                    "discriminator": f"discriminator/{pool.name}",
                    "task_name": manifest.task_name,
                    "template": manifest.prompt_template,
                    "stop": None,
                }
            )
    return candidates


def admit(labelled: Sequence[Row], pools: Mapping[str, Pool]) -> None:
    """Sort screened and labelled rows into accepted, refused and dropped."""
    for row in sorted(labelled, key=lambda row: (row["adapter"], row["sample_id"])):
        pool = pools[row["adapter"]]
        sample = {key: row[key] for key in ("sample_id", "input", "answer", "score")}
        if row["score"] is not None and row["score"] <= 0:
            pool.drop("refused")
            pool.refused.append(sample)
        elif not row["answer"]:
            pool.drop("empty_answer")
        elif not row["finished"]:
            pool.drop("long_answer")
        else:
            pool.accepted.append(sample)
    for pool in pools.values():
        pool.stats.accepted = len(pool.accepted)


def read_outcomes(directory: Path) -> dict[str, Any]:
    """Outcomes of finished syntheses of this run by the key of their pool."""
    found: dict[str, Any] = {}
    for path in sorted(directory.glob("outcome-*.json")):
        try:
            found |= json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s: cannot be read (%s): its adapters are computed again", path, error)
    return found


def write_outcomes(directory: Path, pools: Mapping[str, Pool]) -> None:
    """Keep what came out, pools by key; all in one file, so that a killed run finds all of its neighbours or none."""
    outcomes = {
        key: {"stats": pool.stats.model_dump(), "accepted": pool.accepted, "refused": pool.refused}
        for key, pool in pools.items()
    }
    write_bytes(directory / f"outcome-{digest(sorted(pools))}.json", json.dumps(outcomes).encode())


def restore(pool: Pool, outcome: Mapping[str, Any] | None) -> bool:
    """Fill a pool with the outcome of an earlier synthesis, if there is one."""
    if outcome is None:
        return False
    pool.stats = SynthesisStats.model_validate(outcome["stats"])
    pool.accepted, pool.refused = outcome["accepted"], outcome["refused"]
    logger.info("%s: synthesis was finished by an earlier run: taken from there", pool.name)
    return True


def close(pool: Pool) -> None:
    """Cut a pool to what was asked for, the best by score where there is a surplus, and say what it is like."""
    stats = pool.stats
    if pool.surplus > 1:
        ranked = sorted(pool.accepted, key=lambda row: (-(row["score"] or 0.0), row["sample_id"]))
        pool.refused += ranked[pool.needed :]
        pool.accepted = sorted(ranked[: pool.needed], key=lambda row: row["sample_id"])
        if outranked := len(ranked) - len(pool.accepted):
            stats.dropped["outranked"] = outranked
    pool.accepted = pool.accepted[: pool.needed]
    if len(pool.accepted) < pool.needed:
        stats.shortfall = (
            f"{stats.accepted} of {pool.needed} samples after {stats.rounds} rounds and {stats.generated} "
            f"generated (acceptance {stats.acceptance:.0%}, dropped {stats.dropped})"
        )
    texts, answers = ([row[key] for row in pool.accepted] for key in ("input", "answer"))
    stats.distinct = {f"distinct-{n}": round(distinct_ngrams(texts, n), 4) for n in (1, 2)}
    stats.classes = answer_classes(answers)
    if stats.only_answer is not None and len(answers) > 1:
        stats.warning = (
            f"the teacher answers {stats.only_answer!r} to all {len(answers)} samples: nothing but that answer "
            "can be learnt from them; ship seeds of every answer"
        )


def bank_adapters(pools: Sequence[Pool]) -> dict[str, str]:
    """Directories of teachers and discriminators by slot name."""
    slots = {f"teacher/{pool.name}": str(pool.bundle.path) for pool in pools}
    judges = {pool.name: pool.bundle.discriminator_dir for pool in pools if pool.screen == "discriminator"}
    return slots | {f"discriminator/{name}": str(directory) for name, directory in judges.items()}


def synthesise(
    pools: Sequence[Pool],
    *,
    generator: BaseModelConfig,
    source: BaseModelConfig,
    fingerprints: tuple[str, str],
    config: SynthesisConfig,
    resources: ResourceConfig,
    seed: int,
    run_dir: Path,
    on_round: Callable[[], None],
) -> None:
    """Fill the pools, in rounds over all of them at once, on actors that keep both bases where memory has the room.

    A pool is left short when its budget or `config.max_rounds` is spent; `pool.stats.shortfall` says so. A pool that
    an earlier synthesis of this run filled, or left short, is not computed again. A pool whose rows cannot be computed
    has a `fault` and is given up; the others go on.

    Args:
        fingerprints: of the generator and of the source base; blocks computed on other weights are not reused.
        on_round: called after each round, with the pools' statistics up to date.
    """
    decided_by = (config.model_dump(), generator.model_dump(), source.model_dump(), fingerprints, seed)
    known = read_outcomes(run_dir / "rounds")
    keyed = {
        digest(pool.name, pool.bundle.digest, pool.needed, pool.budget, pool.screen, *decided_by): pool
        for pool in pools
    }
    keyed = {key: pool for key, pool in keyed.items() if not restore(pool, known.get(key))}
    if not keyed:
        return
    with Hosts(resources) as hosts:
        for number in range(config.max_rounds):
            if not run_round(
                number,
                list(keyed.values()),
                generator=generator,
                source=source,
                fingerprints=fingerprints,
                config=config,
                hosts=hosts,
                seed=seed,
                run_dir=run_dir,
            ):
                break
            on_round()
    keyed = {key: pool for key, pool in keyed.items() if not pool.fault}
    for pool in keyed.values():
        close(pool)
    write_outcomes(run_dir / "rounds", keyed)


def run_round(
    number: int,
    pools: Sequence[Pool],
    *,
    generator: BaseModelConfig,
    source: BaseModelConfig,
    fingerprints: tuple[str, str],
    config: SynthesisConfig,
    hosts: Hosts,
    seed: int,
    run_dir: Path,
) -> bool:
    """Generate, clean, screen and label once for all pools; False when no pool asks for more."""
    rows = plan_round(pools, config, seed)
    if not rows:
        return False
    by_name = {pool.name: pool for pool in pools}
    faults: dict[str, str] = {}
    blocks = cut_blocks(rows, config.batch_size, generation_order)
    settings = {"sampling": config.sampling.model_dump()}
    key = digest("generate", blocks, settings, generator.model_dump(), fingerprints[0])
    with Progress(f"round {number + 1}: generate", len(rows), run_dir) as progress:
        generated = run_blocks(
            blocks,
            generate_block,
            base=generator,
            adapters={},
            settings=settings,
            hosts=hosts,
            directory=run_dir / "rounds" / f"{number:03d}-generate-{key}",
            on_block=progress.fraction,
            faults=faults,
        )
    candidates = clean(generated, by_name, config)
    blocks = cut_blocks(candidates, config.batch_size, lambda row: len(row["input"]))
    answers = {"max_answer_tokens": config.max_answer_tokens}
    bundle_digests = {pool.name: pool.bundle.digest for pool in pools}
    key = digest("label", blocks, answers, source.model_dump(), fingerprints[1], bundle_digests)
    with Progress(f"round {number + 1}: screen and label", len(candidates), run_dir) as progress:
        labelled = run_blocks(
            blocks,
            screen_and_label_block,
            base=source,
            adapters=bank_adapters(pools),
            settings=answers,
            hosts=hosts,
            directory=run_dir / "rounds" / f"{number:03d}-label-{key}",
            on_block=progress.fraction,
            faults=faults,
        )
    admit(labelled, by_name)
    for name, reason in faults.items():
        by_name[name].fault = reason
    return True
