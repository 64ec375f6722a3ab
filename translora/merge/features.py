"""IterIS over a whole model: pass batches through the single adapters and the merged one, sum Grams, solve, repeat.

The first solve takes the inputs of the single adapters (Y = X). After each solve all modules change together and Y is
collected again; modules are solved independently of each other. What is kept does not depend on the number of
samples: Grams of the modules in hand, [in, in] float64, one for modules that read the same tensor (q, k and v).

For a decoder-only model the inputs are those of a teacher-forced pass over prompt and answer with padding masked out;
the authors' code hooks `generate` of encoder-decoder models and counts the padding. An encoder-decoder model takes
batches with `decoder_input_ids` and `decoder_attention_mask` too; without answers there the decoder sees its start
token alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from translora.lora.bank import AdapterBank, load_bank
from translora.lora.peft_io import LoraWeights
from translora.merge.config import IterisSettings
from translora.merge.iteris import Grams, adaptive_weights, gram_update, solve_module
from translora.merge.peft_methods import Merged

logger = logging.getLogger(__name__)
Batch = Mapping[str, torch.Tensor]
"""input_ids and attention_mask [B, T], and decoder_input_ids and decoder_attention_mask [B, U] where there is one."""
MASKS = ("attention_mask", "decoder_attention_mask")
MERGED = "merged"
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
        ValueError: a task has no inputs, or they are not finite in one of the models.
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


def shared_inputs(model: nn.Module, bank: AdapterBank, batch: Batch) -> dict[str, str]:
    """For each adapted module the first one that reads the same input tensor, found in one pass, in its order."""
    leaders: dict[str, str] = {}
    last: list[tuple[str, torch.Tensor]] = []

    def see(name: str, x: torch.Tensor) -> None:
        if last and last[0][1] is x:
            leaders[name] = last[0][0]
            return
        if x.ndim != 3:
            raise ValueError(
                f"{name}: is given its inputs as {list(x.shape)}, rows and tokens in one, which cannot be told apart; "
                "merge by cat or by a method without data"
            )
        leaders[name] = name
        last[:] = [(name, x)]

    with _watched(bank, bank.modules, see):
        _forward(model, bank, batch, [None])
    missing = bank.modules.keys() - leaders.keys()
    if missing:
        raise ValueError(f"{min(missing)}: is not used in a forward pass, so it has no inputs to merge by")
    return leaders


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


def collect(
    model: nn.Module,
    bank: AdapterBank,
    batches: Sequence[Batch],
    task: str,
    block: Mapping[str, str],
    *,
    with_merged: bool,
    rho: float = 0.0,
) -> dict[str, Grams]:
    """Grams of one task by leading module; the rows of task adapter and merged adapter share each pass.

    Args:
        model: the base with the bank on it.
        bank: has the slots `task` and "merged".
        batches: the task's.
        task: slot of its adapter.
        block: modules in hand by name, with their leaders.
        with_merged: Y is the merged model's input; else Y = X, and the Grams hold C too.
        rho: reg_coef.
    """
    place = next(iter(bank.modules.values())).base.weight.device
    grams = {
        leader: (Grams.paired(width, place, with_inputs=False) if with_merged else Grams.first(width, place))
        for leader in dict.fromkeys(block.values())
        for width in [bank.modules[leader].base.in_features]
    }
    for batch in batches:
        masks = _masks(batch)

        def see(name: str, x_BTI: torch.Tensor, masks: dict[tuple[int, int], torch.Tensor] = masks) -> None:
            own_BTI, merged_BTI = x_BTI.chunk(2) if with_merged else (x_BTI, None)
            mask_BT = masks[own_BTI.shape[0], own_BTI.shape[1]].to(x_BTI.device)
            merged_TI = None if merged_BTI is None else merged_BTI[mask_BT]
            gram_update(grams[name], own_BTI[mask_BT], merged_TI, rho)

        with _watched(bank, grams, see):
            _forward(model, bank, batch, [task, MERGED] if with_merged else [task])
    if dist.is_available() and dist.is_initialized():
        for gram in grams.values():
            for sums in (gram.G,) if gram.G is gram.H else (gram.G, gram.H):
                dist.all_reduce(sums)
    return grams


def check_grams(grams: Sequence[Mapping[str, Grams]], names: Sequence[str]) -> None:
    """Refuse sums that nothing can be solved from; they are those of all ranks, so all refuse.

    Raises:
        ValueError: names the adapter and the module.
    """
    for adapter, by_module in zip(names, grams, strict=True):
        for name, gram in by_module.items():
            if not math.isfinite(float(gram.H.diagonal().sum() + gram.G.diagonal().sum())):
                raise ValueError(
                    f"{adapter}: the inputs of {name} are not finite, with it or with what is merged so far; look at "
                    "its weights, or set dtype to float32"
                )


def check_batches(batches: Sequence[Sequence[Batch]], names: Sequence[str], place: torch.device) -> None:
    """Refuse a task without a token, and a rank without a batch, on all ranks alike.

    Raises:
        ValueError: names the adapter.
    """
    tokens = [sum(int(batch["attention_mask"].sum()) for batch in own) for own in batches]
    counts = torch.tensor([*tokens, int(not any(batches))], device=place)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
    *of_tasks, num_idle = counts.tolist()
    for adapter, count in zip(names, of_tasks, strict=True):
        if count == 0:
            raise ValueError(f"{adapter}: there are no inputs for it; give it some data")
    if num_idle:
        raise ValueError(f"{num_idle} ranks have no batch at all; give every rank some, or take fewer ranks")


def _masks(batch: Batch) -> dict[tuple[int, int], torch.Tensor]:
    """Masks by their shape, which is how a module's tokens are told from the other stream's.

    Raises:
        ValueError: encoder and decoder rows are of one length.
    """
    found = [batch[name].bool() for name in MASKS if name in batch]
    masks = {(mask.shape[0], mask.shape[1]): mask for mask in found}
    if len(masks) < len(found):
        raise ValueError("attention_mask and decoder_attention_mask have one shape; pad one of them by a column")
    return masks


@contextmanager
def _watched(
    bank: AdapterBank, names: Mapping[str, object], see: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Show the inputs of these modules to `see` while the block runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: see(name, args[0])

    handles = [bank.modules[name].register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def _forward(model: nn.Module, bank: AdapterBank, batch: Batch, slots: Sequence[str | None]) -> None:
    """One pass over the batch, once for each slot, side by side."""
    place = next(iter(bank.modules.values())).base.weight.device
    rows = len(batch["input_ids"])
    bank.route_rows([slot for slot in slots for _ in range(rows)], place)
    inputs = {key: torch.cat([value] * len(slots)).to(place) for key, value in batch.items() if key != "labels"}
    # The logits are of no use; a causal LM's trunk does without them, an encoder-decoder may be its own trunk.
    getattr(model, "base_model", model)(**inputs, use_cache=False)


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
        raise ValueError(f"norm base+delta: the weight of {name} is partitioned here; use norm delta under ZeRO-3")
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
