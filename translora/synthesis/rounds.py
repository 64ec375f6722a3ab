"""Rounds of generate, screen and label, until every adapter of the fleet has its synthetic set.

Every decision (how many to generate, which to drop) is a function of the bundles, the config and the seeds, so
that a killed run replays the finished blocks from disk and goes on as if nothing had happened. What came out is kept
as well: an adapter that was left short has other neighbours, hence other blocks, when it is tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from translora.actors.blocks import generate_block
from translora.actors.calls import Row
from translora.actors.hosts import Hosts
from translora.actors.rows import run_rows
from translora.config import BaseModelConfig, ResourceConfig, SynthesisConfig
from translora.run.files import digest
from translora.run.state import BY_DISCRIMINATOR
from translora.synthesis.pool import Pool, admit, close, read_outcomes, restore, write_outcomes
from translora.synthesis.prompts import answer_stop, generation_order, generation_row, normalise
from translora.synthesis.quality import SeedCopies, own_cutoff
from translora.synthesis.screens import screen_and_label_block


def plan_round(pools: Sequence[Pool], config: SynthesisConfig, seed: int) -> list[Row]:
    """The generation requests of the next round, over all adapters."""
    rows = []
    for pool in pools:
        count = pool.next_count(config.oversample)
        for sample_id in range(pool.stats.generated, pool.stats.generated + count):
            ordering = sample_id % config.num_orderings
            rows.append(generation_row(pool.name, pool.bundle.seeds, sample_id, seed, ordering))
        if count > 0:
            pool.stats.rounds += 1
            pool.stats.generated += count
    return rows


def clean(generated: Sequence[Row], pools: Mapping[str, Pool], config: SynthesisConfig) -> list[Row]:
    """Drop malformed inputs, copies of seeds and duplicates, also those that differ in a trifle; each is counted."""
    candidates = []
    leaks = {name: SeedCopies(pool.bundle.seeds, config.seed_similarity) for name, pool in pools.items()}
    cutoffs = {name: own_cutoff(config.duplicate_similarity, pool.bundle.seeds) for name, pool in pools.items()}
    for row in sorted(generated, key=lambda row: (row["adapter"], row["sample_id"])):
        pool = pools[row["adapter"]]
        key = normalise(row["text"])
        if not key:
            pool.drop("malformed")
        elif not row["finished"]:
            pool.drop("long_input")
        elif key in leaks[pool.name]:
            pool.drop("seed_copy")
        elif key in pool.seen:
            pool.drop("duplicate")
        elif pool.seen.has_near(key, cutoffs[pool.name]):
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
                    "stop": answer_stop(pool.stop),
                }
            )
    return candidates


def stops(pool: Pool) -> list[str]:
    """What an adapter's own stop adds to a key."""
    return [] if pool.stop is None else [pool.stop]


def bank_adapters(pools: Sequence[Pool]) -> dict[str, str]:
    """Directories of teachers and discriminators by slot name."""
    slots = {f"teacher/{pool.name}": str(pool.bundle.path) for pool in pools}
    judges = {pool.name: pool.bundle.discriminator_dir for pool in pools if pool.screen in BY_DISCRIMINATOR}
    return slots | {f"discriminator/{name}": str(directory) for name, directory in judges.items()}


def synthesise(
    pools: Sequence[Pool],
    *,
    generator: BaseModelConfig,
    source: BaseModelConfig,
    identities: tuple[str, str],
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
        identities: of the generator and of the source base; blocks computed on other weights are not reused.
        on_round: called after each round, with the pools' statistics up to date.
    """
    decided_by = (
        config.model_dump(exclude={"generator", "batch_size"}),
        generator.decides(),
        source.decides(),
        identities,
        seed,
    )
    known = read_outcomes(run_dir / "rounds")
    keyed = {
        digest(pool.name, pool.bundle.digest, pool.needed, pool.budget, pool.screen, *decided_by, *stops(pool)): pool
        for pool in pools
    }
    keyed = {key: pool for key, pool in keyed.items() if not restore(pool, known.get(key))}
    if not keyed:
        return
    with Hosts(resources, run_dir, config.batch_size) as hosts:
        for number in range(config.max_rounds):
            if not run_round(
                number,
                list(keyed.values()),
                generator=generator,
                source=source,
                identities=identities,
                config=config,
                hosts=hosts,
                seed=seed,
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
    identities: tuple[str, str],
    config: SynthesisConfig,
    hosts: Hosts,
    seed: int,
) -> bool:
    """Generate, clean, screen and label once for all pools; False when no pool asks for more."""
    rows = plan_round(pools, config, seed)
    if not rows:
        return False
    by_name = {pool.name: pool for pool in pools}
    faults: dict[str, str] = {}
    generated = run_rows(
        f"round {number + 1}: generate",
        rows,
        generate_block,
        base=generator,
        hosts=hosts,
        place=f"rounds/{number:03d}-generate",
        weights=identities[0],
        settings={"sampling": config.sampling.model_dump()},
        order=generation_order,
        faults=faults,
    )
    labelled = run_rows(
        f"round {number + 1}: screen and label",
        clean(generated, by_name, config),
        screen_and_label_block,
        base=source,
        hosts=hosts,
        place=f"rounds/{number:03d}-label",
        weights=[identities[1], {pool.name: pool.bundle.digest for pool in pools}],
        adapters=bank_adapters(pools),
        settings={"max_answer_tokens": config.max_answer_tokens},
        faults=faults,
    )
    admit(labelled, by_name)
    for name, reason in faults.items():
        by_name[name].fault = reason
    return True
