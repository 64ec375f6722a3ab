"""The phase of a fleet that fills every adapter's synthetic set."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from translora.config import GateConfig
from translora.run.files import derive_seed, write_parquet
from translora.run.member import Member, Run
from translora.run.state import BY_DISCRIMINATOR, RANKING, SYNTHETIC, ScreenName
from translora.synthesis.pool import Pool, choose_screen
from translora.synthesis.quality import answer_classes, by_answer, deal
from translora.synthesis.rounds import synthesise

logger = logging.getLogger(__name__)


def synthesis_phase(run: Run, members: list[Member]) -> None:
    """Fill every adapter's synthetic set and write it, split into train, heldout and refused."""
    config = run.config
    pools = [make_pool(run, member) for member in members]

    def after_round() -> None:
        for member, pool in zip(members, pools, strict=True):
            if not member.waits_for("synthesis"):
                continue
            member.state.synthesis = pool.stats.model_copy(deep=True)
            run.save(member.state)
            run.tracker.log(
                {"adapter/accepted": float(pool.stats.accepted), "adapter/acceptance": pool.stats.acceptance},
                step=pool.stats.rounds,
                adapter=member.name,
            )

    synthesise(
        pools,
        generator=config.generator,
        source=config.source,
        identities=(run.generator.identity, run.source.identity),
        config=config.synthesis,
        resources=config.resources,
        seed=config.seed,
        run_dir=config.run_dir,
        on_round=after_round,
    )
    for member, pool in zip(members, pools, strict=True):
        if not member.waits_for("synthesis"):
            continue
        member.state.synthesis = pool.stats
        if pool.fault:
            run.quarantine(member.state, pool.fault)
            continue
        if len(pool.accepted) < max(2, config.synthesis.min_accepted_fraction * pool.needed):
            run.quarantine(member.state, f"too few synthetic samples: {pool.stats.shortfall}")
            continue
        write_synthetic(member, pool, config.seed, config.gate)
        if pool.stats.shortfall:
            logger.warning("%s: goes on with fewer samples: %s", member.name, pool.stats.shortfall)
        if pool.stats.warning:
            logger.warning("%s: %s", member.name, pool.stats.warning)
        run.advance(member, "distill", member.directory / SYNTHETIC)


def make_pool(run: Run, member: Member) -> Pool:
    """An adapter's pool. Another attempt goes on with the set of the one before, and with its screen."""
    synthesis, state = run.config.synthesis, member.state
    earlier = (state.earlier or state.synthesis) if state.attempt > 1 else None
    needed = sum(run.config.gate.sizes(state.num_samples, state.attempt))
    budget = math.ceil(synthesis.max_generated_factor * needed)
    screen = choose_screen(synthesis, member.bundle, member.entry.screen)
    if earlier is not None and earlier.screen:
        screen = cast(ScreenName, earlier.screen)
    found = member.bundle.manifest.discriminator_quality
    if (member.entry.screen or synthesis.screen) == "auto" and screen not in BY_DISCRIMINATOR and found is not None:
        logger.warning(
            "%s: its discriminator was not shown to tell real inputs from invented ones (%s): screened by %s",
            member.name,
            found,
            screen,
        )
    surplus = synthesis.surplus if screen in RANKING else 1.0
    pool = Pool(member.name, member.bundle, needed, budget, screen, surplus, member.entry.stop)
    if earlier is not None:
        pool.carry_on(earlier, pq.read_table(member.earlier_set).to_pylist())
    return pool


def draw_heldout(answers: Sequence[str], count: int, seed: int) -> set[int]:
    """Indices of samples for the gate, at random, with the same share of each answer as in all.

    Of each answer that two samples have, one is drawn if there is room: a gate that saw one answer alone would pass a
    student that gives no other. Where the answers are few, one that came once is left to the training.

    Args:
        answers: the teacher's, of all samples.
        count: of them for the gate.
    """
    order = list(range(len(answers)))
    random.Random(seed).shuffle(order)
    own = by_answer([answers[index] for index in order])
    if answer_classes(answers) and len(own) > 1:
        own.pop("", None)
    counts = deal({answer: len(places) for answer, places in own.items()}, count)
    for answer in own:
        most = max(counts, key=counts.__getitem__)
        if answer and not counts[answer] and counts[most] > 1:
            counts[most] -= 1
            counts[answer] = 1
    return {order[place] for answer, places in own.items() for place in places[: counts[answer]]}


def write_synthetic(member: Member, pool: Pool, seed: int, gate: GateConfig) -> None:
    """Write the adapter's synthetic set: input, answer, score, split (train, heldout, refused)."""
    _, wanted = gate.sizes(member.state.num_samples, member.state.attempt)
    share = round(len(pool.accepted) * wanted / pool.needed)
    num_heldout = max(1, min(wanted, max(share, gate.min_holdout), len(pool.accepted) // 2))
    answers = [row["answer"] for row in pool.accepted]
    if num_heldout < gate.min_holdout:
        short = f"samples held out for the gate: {num_heldout} of {gate.min_holdout} (gate.min_holdout)"
        pool.stats.shortfall = "; ".join(filter(None, [pool.stats.shortfall, short]))
    heldout = draw_heldout(answers, num_heldout, derive_seed(seed, member.name, "split"))
    rows = [
        {"adapter": member.name, **row, "split": "heldout" if index in heldout else "train"}
        for index, row in enumerate(pool.accepted)
    ] + [{"adapter": member.name, **row, "split": "refused"} for row in pool.refused]
    pool.stats.num_train = len(pool.accepted) - num_heldout
    names = ("adapter", "sample_id", "input", "answer", "score", "split")
    types = (pa.string(), pa.int64(), pa.string(), pa.string(), pa.float64(), pa.string())
    table = pa.Table.from_pylist(rows, pa.schema(list(zip(names, types, strict=True))))
    write_parquet(member.directory / SYNTHETIC, table)
