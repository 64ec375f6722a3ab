"""The synthetic set of one adapter while it grows: what is asked for, what is kept, and what came out of it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from translora.bundle.bundle import Bundle
from translora.config import Screen, SynthesisConfig
from translora.errors import InputError
from translora.run.files import digest, write_bytes
from translora.run.state import BY_DISCRIMINATOR, RANKING, ScreenName, SynthesisStats, was_refused
from translora.synthesis.prompts import normalise
from translora.synthesis.quality import KnownInputs, answer_classes, by_answer, deal, deal_evenly, distinct_ngrams

if TYPE_CHECKING:
    from translora.actors.calls import Row

logger = logging.getLogger(__name__)
REMEDIES = {
    "malformed": "the generator writes nothing after these seeds: look at them, or set another `generator`",
    "long_input": "raise synthesis.sampling.max_new_tokens",
    "long_answer": "raise synthesis.max_answer_tokens, or set its `stop` if the adapter never learnt to end an answer",
    "seed_copy": "ship more and more different seeds, or raise synthesis.seed_similarity",
    "duplicate": "ship more and more different seeds, or raise synthesis.sampling.temperature",
    "near_duplicate": "ship more and more different seeds, or raise synthesis.duplicate_similarity",
    "refused": "raise synthesis.max_generated_factor and max_rounds, or set its screen to auto",
    "empty_answer": "the adapter answers nothing to these inputs: compare its prompt_template with how it was trained",
}
"""Where most of what was generated was dropped for one reason."""

PRIOR_ACCEPTED, PRIOR_GENERATED = 3, 5
"""What a first round takes the acceptance to be, as if so many had been generated before."""


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
    stop: str | None = None
    """Where the teacher's answers end, if it does not end them itself."""
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
        """Samples to collect, from which the screen chooses."""
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
            kept = row["split"] != "refused" or not was_refused(row["score"], self.screen)
            (self.accepted if kept else self.refused).append(sample)
            self.seen.add(normalise(row["input"]))
        self.stats.accepted = len(self.accepted)

    def drop(self, reason: str) -> None:
        """Count a sample that is not used."""
        self.stats.dropped[reason] = self.stats.dropped.get(reason, 0) + 1

    def next_count(self, oversample: float) -> int:
        """Inputs to generate in the next round, from what was accepted so far, and the prior.

        After the first round at least so many that what is missing is a standard deviation below what they are
        expected to give: a round more costs more than some rows.
        """
        missing = self.wanted - len(self.accepted)
        if missing <= 0 or self.fault:
            return 0
        acceptance = (len(self.accepted) + PRIOR_ACCEPTED) / (self.stats.generated + PRIOR_GENERATED)
        count = math.ceil(missing / acceptance * oversample)
        if self.stats.generated:  # n p - sqrt(n p (1 - p)) = missing, solved for sqrt(n)
            spread = math.sqrt(acceptance * (1 - acceptance))
            root = (spread + math.sqrt(spread**2 + 4 * acceptance * missing)) / (2 * acceptance)
            count = max(count, math.ceil(root**2))
        return min(count, self.budget - self.stats.generated)


def choose_screen(config: SynthesisConfig, bundle: Bundle, own: Screen | None = None) -> ScreenName:
    """The screen of one adapter; `own` is its entry's.

    `auto` passes over a discriminator that was measured and cannot tell real inputs from invented ones: what it finds
    real is chosen by something else, the answer for instance. It passes over an unmeasured one of an earlier migration,
    too, which had too few inputs on one side to hold some out.

    Raises:
        InputError: the screen asks the discriminator, and the bundle has none.
    """
    screen = own or config.screen
    if screen == "auto":
        found, migrated = bundle.manifest.discriminator_quality, "migrated_from" in bundle.manifest.provenance
        trusted = not migrated if found is None else found.tells_apart
        return "realness" if bundle.discriminator_dir and trusted else "confidence"
    if screen in BY_DISCRIMINATOR and not bundle.discriminator_dir:
        setting = "its screen" if own else "synthesis.screen"
        raise InputError(f"{bundle.path}: has no discriminator; set {setting} to auto, confidence, excess or none")
    return screen


def admit(labelled: Sequence[Row], pools: Mapping[str, Pool]) -> None:
    """Sort screened and labelled rows into accepted, refused and dropped."""
    for row in sorted(labelled, key=lambda row: (row["adapter"], row["sample_id"])):
        pool = pools[row["adapter"]]
        sample = {key: row[key] for key in ("sample_id", "input", "answer", "score")}
        if was_refused(row["score"], pool.screen):
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


def choose(pool: Pool) -> list[Row]:
    """As many as were asked for, of all answers as evenly as there are samples of them.

    Of an answer's samples the first ones, or those of the greatest score where the screen ranks them. Scores of
    different answers are not compared: that of an answer is a mean over its tokens and depends on its words and length,
    that of an input may favour some answers, and the greatest over all could leave out a class whole. What the
    generator likes to write leaves some answers rare anyway. Answers that came once, and free text, keep their share.
    """
    rows = pool.accepted
    if pool.screen in RANKING:
        rows = sorted(rows, key=lambda row: (-(row["score"] or 0.0), row["sample_id"]))
    own = by_answer([row["answer"] for row in rows])
    sizes, total = {answer: len(places) for answer, places in own.items()}, min(pool.needed, len(rows))
    alone = deal(sizes, total).get("", 0)
    counts = {"": alone} | deal_evenly({answer: size for answer, size in sizes.items() if answer}, total - alone)
    return [rows[place] for answer, places in own.items() for place in places[: counts[answer]]]


def close(pool: Pool) -> None:
    """Cut a pool to what was asked for and say what it is like; what is over is laid aside, a retry goes on with it."""
    stats = pool.stats
    kept = {row["sample_id"] for row in choose(pool)}
    outranked = [row for row in pool.accepted if row["sample_id"] not in kept]
    pool.refused += outranked
    pool.accepted = [row for row in pool.accepted if row["sample_id"] in kept]
    if outranked:
        stats.dropped["outranked"] = len(outranked)
    if len(pool.accepted) < pool.needed:
        limit = "max_generated_factor" if stats.generated >= pool.budget else "max_rounds"
        stats.shortfall = (
            f"{stats.accepted} of {pool.needed} samples when synthesis.{limit} ended it, after {stats.rounds} rounds "
            f"and {stats.generated} generated (acceptance {stats.acceptance:.0%}, dropped {stats.dropped})"
        )
        commonest = max(stats.dropped, key=lambda reason: stats.dropped[reason], default="")
        stats.shortfall += f"; {REMEDIES[commonest]}" if commonest in REMEDIES else ""
    texts, answers = ([row[key] for row in pool.accepted] for key in ("input", "answer"))
    stats.distinct = {f"distinct-{n}": round(distinct_ngrams(texts, n), 4) for n in (1, 2)}
    stats.classes = answer_classes(answers)
    if stats.only_answer is not None and len(answers) > 1:
        stats.warning = (
            f"the teacher answers {stats.only_answer!r} to all {len(answers)} samples: nothing but that answer "
            "can be learnt from them; ship seeds of every answer"
        )


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
