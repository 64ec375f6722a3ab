"""Ray Data over actors that keep their bases: a block of rows is one batch, rows of all adapters mixed.

A block travels as one item (number, rows as JSON), so that Ray Data can neither split nor merge it. Blocks are the
unit of work and of resuming: each is written to its own file as soon as it is done.

An actor pool of Ray Data lives as long as its dataset, and a round of synthesis is two datasets: pools would load
both bases anew in every round. So the actors are `Hosts`, which outlive the datasets, and Ray Data's tasks are calls
to them, which load no torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import ray.exceptions
from ray import cloudpickle
from ray.data import TaskPoolStrategy

from translora.actors.calls import FAULT, SLOT_KEYS, TRIES, Computed, Row, Work, call_host, isolate
from translora.actors.hosts import Hosts
from translora.config import BaseModelConfig
from translora.run.files import digest, write_parquet
from translora.run.progress import Progress

if TYPE_CHECKING:
    from translora.actors.host import BlockFunction

logger = logging.getLogger(__name__)
OnBlock = Callable[[int, int], None]
RULES = 1
"""Of what the block functions compute: blocks of an older version, of others, are computed again. 1: answers are cut
into tokens behind their prompts."""
MAX_SUSPECTS = 8
"""Blocks that actors died of: more of them are no accident of a row, but of the settings or of the machine."""


def cut_blocks(rows: Sequence[Row], batch_size: int, order: Callable[[Row], Any]) -> list[list[Row]]:
    """Rows of similar length together, so that little is padding; the cut depends on the rows alone."""
    ordered = sorted(rows, key=order)
    return [list(ordered[start : start + batch_size]) for start in range(0, len(ordered), batch_size)]


def input_length(row: Row) -> int:
    """Characters of a row's input: an order for `cut_blocks`."""
    return len(row["input"])


def block_order(base: BaseModelConfig, order: Callable[[Row], Any]) -> Callable[[Row], Any]:
    """The order as it is where rows are padded; vLLM pads none and has few adapters at hand: by these first."""
    if base.vllm is None:
        return order
    return lambda row: ([str(row.get(key) or "") for key in SLOT_KEYS], order(row))


def run_rows(
    label: str,
    rows: Sequence[Row],
    function: BlockFunction,
    *,
    base: BaseModelConfig,
    hosts: Hosts,
    place: str,
    weights: Any,
    adapters: Mapping[str, str] | None = None,
    settings: dict[str, Any] | None = None,
    order: Callable[[Row], Any] = input_length,
    faults: dict[str, str] | None = None,
) -> list[Row]:
    """Compute rows in batches, with a line of progress; see `run_blocks`, which says what comes back and is raised.

    Args:
        label: of the progress.
        rows: in any order; `order` brings those of similar length together.
        place: below the run directory; finished blocks lie there under the hash of what they were made from.
        weights: content hashes of base and adapters: blocks of the same weights alone are used again.
    """
    blocks, settings = cut_blocks(rows, hosts.batch_size, block_order(base, order)), settings or {}
    key = digest(RULES, function.__name__, blocks, settings, base.decides(), weights)
    with Progress(label, len(rows), hosts.run_dir) as progress:
        return run_blocks(
            blocks,
            function,
            base=base,
            adapters=adapters or {},
            settings=settings,
            hosts=hosts,
            directory=hosts.run_dir / f"{place}-{key}",
            on_block=progress.fraction,
            faults=faults,
        )


def read_block(path: Path, num_rows: int) -> list[Row] | None:
    """Rows of a finished block; None where it is missing, or damaged, which is warned of."""
    if not path.is_file():
        return None
    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        logger.warning("%s: cannot be read (%s): computed again", path, error)
        return None
    if len(rows) != num_rows:
        logger.warning("%s: has %d rows, not %d: computed again", path, len(rows), num_rows)
        return None
    return rows


def run_blocks(
    blocks: Sequence[list[Row]],
    function: BlockFunction,
    *,
    base: BaseModelConfig,
    adapters: Mapping[str, str],
    settings: dict[str, Any],
    hosts: Hosts,
    directory: Path,
    on_block: OnBlock | None = None,
    faults: dict[str, str] | None = None,
) -> list[Row]:
    """Compute every block on actors that hold `base` and `adapters`, and return all rows in block order.

    Blocks whose file already lies in `directory` are read, not computed; a file that cannot be read is made anew.

    Args:
        blocks: rows in batches; a block is one forward batch.
        function: module-level function run inside the actor.
        base: the base that each actor loads, if it does not hold it yet.
        adapters: PEFT directory by slot name.
        settings: plain values handed to `function`.
        hosts: the actors.
        directory: one parquet file per finished block.
        on_block: called with (finished, total) as blocks finish.
        faults: gets the reason by adapter of rows that cannot be computed (too large for the memory, or their process
            dies again and again); they are missing from the result, and their block is not kept.

    Raises:
        RayError: a row cannot be computed and `faults` is unset, or the actors cannot be used at all.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{index:06d}.parquet" for index in range(len(blocks))]
    kept = [read_block(path, len(block)) for path, block in zip(paths, blocks, strict=True)]
    work = Work(cloudpickle.dumps(function), base.model_dump(), dict(adapters), settings)
    for _ in range(TRIES):
        missing = [index for index, rows in enumerate(kept) if rows is None]
        finished = len(blocks) - len(missing)
        for index, (rows, seconds) in compute(blocks, missing, work, hosts):
            assert len(rows) == len(blocks[index]), f"block {index} came back with {len(rows)} rows"
            good = [row for row in rows if FAULT not in row]
            table = pa.Table.from_pylist(good).replace_schema_metadata({"seconds": json.dumps(seconds)})
            if len(good) == len(rows):
                write_parquet(paths[index], table)
            else:
                kept[index] = table.to_pylist() + [row for row in rows if FAULT in row]
            finished += 1
            if on_block is not None:
                on_block(finished, len(blocks))
        # Computed rows are read back too: Parquet may spell a value differently, and a rerun must see the same.
        for index in missing:
            kept[index] = kept[index] or read_block(paths[index], len(blocks[index]))
    found: list[Row] = []
    for block, path, computed in zip(blocks, paths, kept, strict=True):
        lost = f"{path} cannot be read back, {TRIES} times written"
        found += [{**row, FAULT: lost} for row in block] if computed is None else computed
    return without_faults(found, faults)


def without_faults(rows: Sequence[Row], faults: dict[str, str] | None) -> list[Row]:
    """The rows that were computed; the reasons of the others go to `faults`, by adapter.

    Raises:
        RayError: a row was not computed and `faults` is None.
    """
    for row in rows:
        if row.get(FAULT) is not None:
            if faults is None:
                raise ray.exceptions.RayError(f"{row.get('adapter', 'a row')}: {row[FAULT]}")
            faults.setdefault(row["adapter"], row[FAULT])
    return [row for row in rows if row.get(FAULT) is None]


def compute(
    blocks: Sequence[list[Row]], wanted: Sequence[int], work: Work, hosts: Hosts
) -> Iterator[tuple[int, Computed]]:
    """Compute the wanted blocks through Ray Data, in any order; those that actors die of come last, one at a time.

    Raises:
        RayError: too many blocks end their actors, or a base alone does.
    """
    if not wanted:
        return
    actors = hosts.get(len(wanted))
    items = [
        {"block": index, "actor": turn % len(actors), "rows": json.dumps(blocks[index])}
        for turn, index in enumerate(wanted)
    ]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        call_host,
        fn_kwargs={"actors": actors, "work": work},
        batch_size=1,
        # A second block waits at each actor while it computes the first; one actor has nobody to wait for.
        compute=TaskPoolStrategy(size=min(2 * len(actors) - 1, len(items))),
        num_cpus=0,
    )
    suspects: list[int] = []
    for result in dataset.iter_rows():
        index, rows = int(result["block"]), json.loads(result["rows"])
        if rows is not None:
            yield index, (rows, json.loads(result["seconds"]))
            continue
        suspects.append(index)
        if len(suspects) > MAX_SUSPECTS:
            raise ray.exceptions.RayError(
                f"{len(suspects)} blocks of rows ended the actors that computed them, {TRIES} times each; "
                "lower synthesis.batch_size, or see Ray's logs for what ends them"
            )
    for index in suspects:
        (actor,) = hosts.get(1)
        yield index, isolate(actor, blocks[index], work, hosts.resources.worker_timeout_seconds)
