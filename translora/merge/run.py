"""`translora merge`: read the adapters, merge them, write one plain PEFT adapter with a model card.

Adapters are put into an order of their own contents first: the order that they are named in changes not a bit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from translora.bundle import common_template, inspect_base, read_bundle, verify_bundle
from translora.bundle.adapter import check_adapter, check_recorded_base, recorded_base
from translora.bundle.base import BaseInfo, refuse_encoder_decoder
from translora.bundle.manifest import MANIFEST
from translora.bundle.modules import linear_modules
from translora.config import BaseModelConfig
from translora.config.merge import COMBINATIONS, NEED_OWN_DATA, Combination, MergeConfig, merged_rank
from translora.engine.loading import device, load_model, load_tokenizer, resolve_dtype
from translora.engine.memory import is_out_of_memory
from translora.engine.prompts import prompt_format
from translora.errors import InputError
from translora.lora.kinds import MAX_RANK
from translora.lora.peft_io import LoraWeights, pad_rank, read_lora, write_lora
from translora.merge import aggregate, cat
from translora.merge.data import batches, read_samples
from translora.merge.features import run_iteris
from translora.merge.peft_methods import Merged, combine, fingerprint, truncate
from translora.report.merge_card import Ingredient, merge_card
from translora.run.files import check_writable, replace_directory, sha256_file, sha256_path, write_bytes, write_json
from translora.run.redact import first_line

logger = logging.getLogger(__name__)
SETTINGS_FILE = "merge.json"
"""Beside the adapter: settings, hashes and coefficients, and the mark of a directory that may be replaced."""


MORE_MEMORY = "give it more memory, or lower iteris.max_gram_gigabytes, batch_size or max_length of the merge"


@dataclass(frozen=True)
class Task:
    """An adapter with what belongs to it."""

    path: Path
    lora: LoraWeights
    weight: float
    data: Path | None


def merge(config: MergeConfig) -> Path:
    """Merge adapters; returns the directory of the result.

    Raises:
        InputError: an adapter, the base, the data or a setting cannot be used; names it and the remedy.
    """
    is_empty = config.out.is_dir() and not any(config.out.iterdir())
    if config.out.exists() and not is_empty and not (config.out / SETTINGS_FILE).is_file():
        raise InputError(f"{config.out}: exists and is no merged adapter, so it is not replaced; give another --out")
    for path in config.data:
        if not path.is_file():
            raise InputError(f"--data {path}: no such file; give JSONL, or a synthetic.parquet")
    base = find_base(config)
    for path in config.adapters:
        check_recorded_base(path, base.name, "merge adapters of one base")
        check_adapter(path, base)
    config = config.model_copy(update={"prompt_template": prompt_template(config, base)})
    check_writable(config.out, "give another --out", is_directory=True)
    try:
        with replace_directory(config.out) as directory:
            write_merged(config, base, directory)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"{first_line(error)}; {MORE_MEMORY}") from error
    return config.out


def prompt_template(config: MergeConfig, base: BaseInfo) -> str:
    """The template that is asked for, or that of the bundles among the adapters.

    Raises:
        InputError: a bundle is damaged or of another base, or two were trained with different templates.
    """
    bundles = [read_bundle(path.resolve()) for path in config.adapters if (path / MANIFEST).is_file()]
    for bundle in bundles:
        verify_bundle(bundle, base)
    if config.prompt_template != "auto":
        return config.prompt_template
    return common_template(bundles, "the adapters") or config.prompt_template


def write_merged(config: MergeConfig, base: BaseInfo, directory: Path) -> None:
    """Merge adapters that were checked, into a directory.

    Raises:
        InputError: see `merge`.
    """
    tasks = read_tasks(config)
    if (rank := whole_rank(config.method, tasks)) > MAX_RANK and config.rank is None:
        raise InputError(f"the merged adapter would have rank {rank}, the limit is {MAX_RANK}; give --rank")
    started = time.monotonic()
    try:
        merged, learnt = run_method(config, tasks, base)
        merged = {name: (A.float(), B.float()) for name, (A, B) in merged.items()}
        if config.rank is not None and config.rank < max(len(A) for A, _ in merged.values()):
            merged = truncate(merged, config.rank)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise InputError(f"{config.method}: {first_line(error)}; look at the adapters' weights") from error
    for name, factors in merged.items():
        if not all(bool(factor.isfinite().all()) for factor in factors):
            raise InputError(
                f"{config.method}: the merged update of {name} is not finite; look at the adapters' weights"
            )
    rank = max(len(A) for A, _ in merged.values())
    logger.info("%s: %d adapters, rank %d, %.1f s", config.method, len(tasks), rank, time.monotonic() - started)
    write_result(config, tasks, base, merged, learnt, directory)


def whole_rank(method: str, tasks: Sequence[Task]) -> int:
    """Greatest rank of a module that the merge has before it is truncated."""
    names = {name for task in tasks for name in task.lora.modules}
    by_module = [[len(task.lora.modules[name][0]) for task in tasks if name in task.lora.modules] for name in names]
    return max(merged_rank(method, ranks, len(tasks)) for ranks in by_module)


def find_base(config: MergeConfig) -> BaseInfo:
    """The base that is named, or the one that the adapters' configs name where it can be found.

    Bundles and merged adapters tell its name, others often its directory.

    Raises:
        InputError: there is none.
    """
    if config.base is not None:
        return inspect_base(config.base, config.trust_remote_code)
    named = sorted({name for path in config.adapters if (name := recorded_base(path))}, key=lambda n: (-len(n), n))
    if not named:
        raise InputError(f"{config.adapters[0]}: its config names no base; give --base")
    faults: list[ValueError] = []
    for name in named:
        try:
            return inspect_base(name, config.trust_remote_code)
        except ValueError as error:
            faults.append(error)
    raise InputError(f"{faults[0]}; or give --base (the adapters' configs name {named[0]!r})") from faults[0]


def read_tasks(config: MergeConfig) -> list[Task]:
    """The adapters with their weights and data, in an order that depends on their contents alone."""
    num = len(config.adapters)
    alike = 1.0 if "ties" in config.method else 1 / num
    files: Sequence[Path | None] = config.data if config.method in NEED_OWN_DATA else [None] * num
    tasks = [
        Task(path, read_lora(path), weight, file)
        for path, weight, file in zip(config.adapters, config.weights or [alike] * num, files, strict=True)
    ]
    return sorted(
        tasks,
        key=lambda task: (
            fingerprint(task.lora),
            task.weight,
            sha256_file(task.data) if task.data else "",
            task.path.resolve().name,
        ),
    )


def run_method(config: MergeConfig, tasks: Sequence[Task], base: BaseInfo) -> tuple[Merged, dict[str, Any]]:
    """The merged adapter of scaling 1, and what was learnt on the way for the record."""
    loras, weights = [task.lora for task in tasks], [task.weight for task in tasks]
    if config.method in COMBINATIONS:
        merged = combine(
            loras,
            weights,
            cast(Combination, config.method),
            density=config.density,
            majority_sign_method=config.majority_sign_method,
            rank=config.rank,
            seed=config.seed,
        )
        return merged, {}
    if config.method == "fedex":
        return aggregate.stack(*aggregate.fedex(loras, weights)), {}
    if config.method == "component_mean":
        return aggregate.component_mean(loras, weights), {}
    refuse_encoder_decoder(base, f"merge {config.method} runs")
    settings = BaseModelConfig(
        model=str(base.path),
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    tokenizer = load_tokenizer(settings)
    try:
        prompts = prompt_format(tokenizer, config.prompt_template)
    except InputError as error:
        raise InputError(f"prompt_template: {error}") from error
    pad = int(tokenizer.pad_token_id)
    chosen = config.max_length, config.max_samples, config.seed
    if config.method == "cat":
        files = sorted(config.data, key=sha256_file)
        mixture = cat.with_answers([sample for path in files for sample in read_samples(path, prompts, *chosen)])
        model = load_model(settings, resolve_dtype(config.dtype), device())
        found = cat.train_coefficients(model, loras, mixture, config.cat, pad_token_id=pad, seed=config.seed)
        learnt = {"coefficients": found.by_module, "initial": 1 / len(loras), "losses": found.losses}
        return cat.export(loras, found.by_module), learnt
    files = [task.data for task in tasks if task.data is not None]
    inputs = [batches(read_samples(path, prompts, *chosen), config.batch_size, pad) for path in files]
    model = load_model(settings, resolve_dtype(config.dtype), device())
    return run_iteris(model, loras, inputs, config.solving, names=[str(task.path) for task in tasks]), {}


def write_result(
    config: MergeConfig, tasks: Sequence[Task], base: BaseInfo, merged: Merged, learnt: dict[str, Any], directory: Path
) -> None:
    """Write weights, config, card and record."""
    rank = max(len(A) for A, _ in merged.values())
    modules = {name: pad_rank(pair, rank) for name, pair in merged.items()}
    ingredients = [
        Ingredient(
            name=task.path.resolve().name,
            sha256=sha256_path(task.path),
            rank=task.lora.max_rank,
            weight=None if config.needs_data else task.weight,
            data_sha256=sha256_file(task.data) if task.data else None,
        )
        for task in tasks
    ]
    data = sorted(sha256_file(path) for path in config.data) if config.method == "cat" else []
    shown = config.model_dump(mode="json", exclude={"adapters", "data", "out", "base", "weights", "trust_remote_code"})
    shown |= {"iteris": config.solving.model_dump(mode="json"), "max_samples": config.max_samples}
    write_lora(
        directory,
        modules,
        alpha=float(rank),
        base_model=base.name,
        target_modules=target_names(list(modules), base),
        with_encoder=base.is_encoder_decoder,
    )
    card = merge_card(
        name=config.out.resolve().name,
        method=config.method,
        base=base.name,
        with_encoder=base.is_encoder_decoder,
        rank=rank,
        truncated=rank < whole_rank("static_cat" if config.method.endswith("svd") else config.method, tasks),
        ingredients=ingredients,
        mixture=data,
    )
    write_bytes(directory / "README.md", card.encode())
    record = {"settings": shown, "base": base.fingerprint, "adapters": [vars(one) for one in ingredients], **learnt}
    write_json(directory / SETTINGS_FILE, record)


def target_names(modules: Sequence[str], base: BaseInfo) -> list[str]:
    """PEFT's target_modules: last parts of the names where these mean the same modules, else the whole names."""
    lasts = {name.rsplit(".", 1)[-1] for name in modules}
    meant = {name for name in linear_modules(base) if name.rsplit(".", 1)[-1] in lasts}
    return sorted(lasts if meant == set(modules) else modules)
