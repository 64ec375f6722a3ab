"""Ray Data over actors that each hold one base: a block of rows is one batch, rows of all adapters mixed.

A block travels as one item (number, rows as JSON), so that Ray Data can neither split nor merge it. Blocks are the
unit of work and of resuming: each is written to its own file as soon as it is done.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data import ActorPoolStrategy

from translora.config import BaseModelConfig, ResourceConfig
from translora.engine.loading import hide_gpus
from translora.engine.transformers import TransformersEngine
from translora.run.files import write_bytes

logger = logging.getLogger(__name__)
Row = dict[str, Any]
OnBlock = Callable[[int, int], None]


BlockFunction = Callable[[TransformersEngine, list[Row], dict[str, Any]], list[Row]]
"""Turns one block of rows into as many rows, on a resident engine, with plain settings."""


class EngineActor:
    """Holds an engine; Ray Data calls it with one block at a time."""

    def __init__(
        self,
        base: dict[str, Any],
        adapters: Mapping[str, str],
        function: BlockFunction,
        settings: dict[str, Any],
        num_threads: int | None,
    ) -> None:
        if num_threads is not None:
            hide_gpus()
        self.engine = TransformersEngine(BaseModelConfig.model_validate(base), adapters, num_threads)
        self.function = function
        self.settings = settings

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Compute one block: its number and its rows as JSON, both in arrays of length 1."""
        (rows,) = (json.loads(text) for text in batch["rows"])
        results = self.function(self.engine, rows, self.settings)
        return {"block": batch["block"], "rows": np.array([json.dumps(results)])}


def cut_blocks(rows: Sequence[Row], batch_size: int, order: Callable[[Row], Any]) -> list[list[Row]]:
    """Rows of similar length together, so that little is padding; the cut depends on the rows alone."""
    ordered = sorted(rows, key=order)
    return [list(ordered[start : start + batch_size]) for start in range(0, len(ordered), batch_size)]


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
    resources: ResourceConfig,
    directory: Path,
    on_block: OnBlock | None = None,
) -> list[Row]:
    """Compute every block on actors that hold `base` and `adapters`, and return all rows in block order.

    Blocks whose file already lies in `directory` are read, not computed; a file that cannot be read is made anew.

    Args:
        blocks: rows in batches; a block is one forward batch.
        function: module-level function run inside the actor.
        base: the base that each actor loads once.
        adapters: PEFT directory by slot name.
        settings: plain values handed to `function`.
        resources: number and size of actors.
        directory: one parquet file per finished block.
        on_block: called with (finished, total) as blocks finish.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{index:06d}.parquet" for index in range(len(blocks))]
    kept = [read_block(path, len(block)) for path, block in zip(paths, blocks, strict=True)]
    missing = [index for index, rows in enumerate(kept) if rows is None]
    finished = len(blocks) - len(missing)
    if missing:
        # Ray Data would warn again and again that an actor holds much memory: it holds a base, and is meant to.
        ray.data.DataContext.get_current().issue_detectors_config.detectors = []
        items = [{"block": index, "rows": json.dumps(blocks[index])} for index in missing]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            EngineActor,
            batch_size=1,
            compute=ActorPoolStrategy(size=min(resources.num_actors, len(missing))),
            num_gpus=resources.gpus_per_actor,
            num_cpus=resources.cpus_per_actor,
            fn_constructor_kwargs={
                "base": base.model_dump(),
                "adapters": dict(adapters),
                "function": function,
                "settings": settings,
                "num_threads": None if resources.gpus_per_actor else max(1, int(resources.cpus_per_actor)),
            },
        )
        for result in dataset.iter_rows():
            index, rows = int(result["block"]), json.loads(result["rows"])
            assert len(rows) == len(blocks[index]), f"block {index} came back with {len(rows)} rows"
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows), sink)
            write_bytes(paths[index], sink.getvalue().to_pybytes())
            finished += 1
            if on_block is not None:
                on_block(finished, len(blocks))
    # Computed rows are read back too: Parquet may spell a value differently, and a rerun must see the same.
    whole = (pq.read_table(path).to_pylist() if rows is None else rows for path, rows in zip(paths, kept, strict=True))
    return [row for rows in whole for row in rows]
