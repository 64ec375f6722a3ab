"""Ray Data over actors that each hold one base: a block of rows is one batch, rows of all adapters mixed.

Blocks are the unit of work and of resuming: each is written to its own file as soon as it is done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data import ActorPoolStrategy

from translora.config import BaseModelConfig, ResourceConfig
from translora.engine.transformers import TransformersEngine
from translora.run.files import write_bytes

logger = logging.getLogger(__name__)
Row = dict[str, Any]
OnBlock = Callable[[int, int], None]


class BlockFunction(Protocol):
    """Turns one block of rows into as many rows, on a resident engine."""

    def __call__(self, engine: TransformersEngine, rows: list[Row], settings: dict[str, Any]) -> list[Row]: ...


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
        self.engine = TransformersEngine(BaseModelConfig.model_validate(base), adapters, num_threads)
        self.function = function
        self.settings = settings

    def __call__(self, table: pa.Table) -> pa.Table:
        """Compute the rows of `table`, which must all be of one block."""
        rows = table.to_pylist()
        assert len({row["block"] for row in rows}) == 1, "a batch must be exactly one block"
        results = self.function(self.engine, rows, self.settings)
        return pa.Table.from_pylist([{**result, "block": rows[0]["block"]} for result in results])


def cut_blocks(rows: Sequence[Row], batch_size: int, length: Callable[[Row], int]) -> list[list[Row]]:
    """Rows of similar length together, so that little is padding; the cut depends on the rows alone."""
    ordered = sorted(rows, key=length)
    return [list(ordered[start : start + batch_size]) for start in range(0, len(ordered), batch_size)]


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

    Blocks whose file already lies in `directory` are read, not computed.

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
    missing = [index for index, path in enumerate(paths) if not path.is_file()]
    finished = len(blocks) - len(missing)
    if missing:
        tables = [pa.Table.from_pylist([{**row, "block": index} for row in blocks[index]]) for index in missing]
        dataset = ray.data.from_arrow(tables).map_batches(
            EngineActor,  # type: ignore[arg-type]
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=min(resources.num_actors, len(missing))),
            num_gpus=resources.gpus_per_actor,
            num_cpus=resources.cpus_per_actor,
            fn_constructor_kwargs={
                "base": base.model_dump(),
                "adapters": dict(adapters),
                "function": function,
                "settings": settings,
                "num_threads": None if resources.gpus_per_actor else int(resources.cpus_per_actor),
            },
        )
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for index in sorted(set(batch["block"].to_pylist())):
                rows = [row for row in batch.to_pylist() if row["block"] == index]
                assert len(rows) == len(blocks[index]), f"block {index} came back with {len(rows)} rows"
                sink = pa.BufferOutputStream()
                pq.write_table(pa.Table.from_pylist(rows).drop_columns("block"), sink)
                write_bytes(paths[index], sink.getvalue().to_pybytes())
                finished += 1
                if on_block is not None:
                    on_block(finished, len(blocks))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]
