"""IterIS over a whole model: pass batches through the single adapters and the merged one, sum Grams, solve, repeat.

The first solve takes the inputs of the single adapters (Y = X). After each solve all modules change together and Y is
collected again; modules are solved independently of each other. What is kept does not depend on the number of
samples: Grams of the modules in hand, [in, in] float64, one for modules that read the same tensor (q, k and v).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from translora.config.merge import IterisSettings
from translora.errors import InputError
from translora.lora.bank import AdapterBank, load_bank
from translora.lora.peft_io import LoraWeights
from translora.merge.grams import MERGED, Batch, check_batches, check_grams, collect, shared_inputs
from translora.merge.iteris import Grams, adaptive_weights, solve_module
from translora.merge.peft_methods import Merged

logger = logging.getLogger(__name__)
SUMS_LATER = 2
"""Grams of a task after the first solve: G and H."""


def run_iteris(
    model: nn.Module,
    loras: Sequence[LoraWeights],
    batches: Sequence[Sequence[Batch]],
    settings: IterisSettings,
    on_solve: Callable[[int, Merged], None] | None = None,
    names: Sequence[str] = (),
) -> Merged:
    """Merge adapters by IterIS: A* [R, in] and [B_1 .. B_N] [out, R] by module, R = sum r_i, float64, scaling 1.

    Args:
        model: the frozen base in eval mode, on one device, where the Grams lie too; left as it was.
        loras: two or more adapters of it; they may differ in ranks, scaling and modules.
        batches: each task's inputs, for the adapter of the same place. Where torch.distributed is up, every rank calls
            this with its own share of them and gets the same result; under ZeRO-3 the shares are of equal number.
        settings: schedule, regularisation, weights.
        on_solve: called after each solve with its number, from 1, and the adapter so far.
        names: what errors call the adapters.

    Raises:
        InputError: a task has no inputs, or they are not finite in one of the models.
    """
    tasks = [str(index) for index in range(len(loras))]
    names = names or [f"adapter {number}" for number, _ in enumerate(loras, 1)]
    factors = {name: _factors(loras, name) for name in sorted({name for lora in loras for name in lora.modules})}
    empty = LoraWeights(
        modules={
            name: (torch.zeros_like(torch.cat(lora_A)), torch.zeros_like(torch.cat(lora_B, dim=1)))
            for name, (lora_A, lora_B, _) in factors.items()
        },
        scaling=dict.fromkeys(factors, 1.0),
        config={},
    )
    bank = load_bank(model, {**dict(zip(tasks, loras, strict=True)), MERGED: empty})
    try:
        check_batches(batches, names, next(iter(bank.modules.values())).base.weight.device)
        leaders = shared_inputs(model, bank, next(batch for own in batches for batch in own))
        weights: dict[str, list[float]] = {}
        merged: Merged = {}
        for iteration in range(settings.max_iter):
            solved: Merged = {}
            for block in _blocks(leaders, bank, len(loras), settings.max_gram_gigabytes):
                grams = [
                    collect(model, bank, task_batches, task, block, with_merged=iteration > 0, rho=settings.reg_coef)
                    for task, task_batches in zip(tasks, batches, strict=True)
                ]
                check_grams(grams, names)
                if iteration == 0:
                    weights |= {name: _weights(bank, name, factors[name], grams, block, settings) for name in block}
                solved |= _solve(block, factors, weights, grams, settings)
                del grams  # before the next block's are made
            merged = {name: solved[name] for name in factors}
            _update(bank, merged)
            logger.info("solve %d of %d", iteration + 1, settings.max_iter)
            if on_solve is not None:
                on_solve(iteration + 1, merged)
    finally:
        bank.detach(model)
    return {name: (lora_A.cpu(), lora_B.cpu()) for name, (lora_A, lora_B) in merged.items()}


Factors = tuple[list[torch.Tensor], list[torch.Tensor], list[float]]
"""A_i, B_i and s_i of one module, one of each a task."""


def _factors(loras: Sequence[LoraWeights], name: str) -> Factors:
    """A task that does not adapt the module takes part with rank 0: its own update there is zero."""
    like_A, like_B = next(lora.modules[name] for lora in loras if name in lora.modules)
    none = like_A[:0], like_B[:, :0]
    pairs = [lora.modules.get(name, none) for lora in loras]
    return [A for A, _ in pairs], [B for _, B in pairs], [lora.scaling.get(name, 1.0) for lora in loras]


def _blocks(leaders: dict[str, str], bank: AdapterBank, num_tasks: int, gigabytes: float) -> Iterator[dict[str, str]]:
    """Modules that are collected in one pass, by their leaders: as many as the memory for Grams allows."""
    block: dict[str, str] = {}
    used = 0.0
    for leader in dict.fromkeys(leaders.values()):
        size = SUMS_LATER * num_tasks * bank.modules[leader].base.in_features ** 2 * 8 / 1e9
        if block and used + size > gigabytes:
            yield block
            block, used = {}, 0.0
        used += size
        block |= {name: found for name, found in leaders.items() if found == leader}
    yield block


def _weights(
    bank: AdapterBank,
    name: str,
    factors: Factors,
    grams: Sequence[Mapping[str, Grams]],
    block: Mapping[str, str],
    settings: IterisSettings,
) -> list[float]:
    if settings.norm == "equal":
        return [1.0] * len(grams)
    base_weight = bank.modules[name].base.weight if settings.norm == "base+delta" else None
    if base_weight is not None and not base_weight.numel():
        raise InputError(f"norm base+delta: the weight of {name} is partitioned here; use norm delta under ZeRO-3")
    own = [gram[block[name]] for gram in grams]
    return adaptive_weights(*factors, own, norm=settings.norm, base_weight=base_weight)


def _solve(
    block: Mapping[str, str],
    factors: Mapping[str, Factors],
    weights: Mapping[str, list[float]],
    grams: Sequence[Mapping[str, Grams]],
    settings: IterisSettings,
) -> Merged:
    """Solve the modules in hand, several at a time: LAPACK and cuSOLVER give the interpreter away."""

    def solve(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        own = [gram[block[name]] for gram in grams]
        return solve_module(*factors[name], weights[name], own, a1=settings.a1, a2=settings.a2)

    with ThreadPoolExecutor(settings.num_threads) as pool:
        return dict(zip(block, pool.map(solve, block), strict=True))


def _update(bank: AdapterBank, merged: Merged) -> None:
    """Put the adapter merged so far into its slot."""
    for name, (lora_A, lora_B) in merged.items():
        slot = bank.modules[name].slots[bank.slot(MERGED)]
        slot.lora_A.copy_(lora_A)
        slot.lora_B.copy_(lora_B)
