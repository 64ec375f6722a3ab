"""What a model's modules are given, summed to Grams: with a single adapter and, beside it, with the merged one.

For a decoder-only model the inputs are those of a teacher-forced pass over prompt and answer with padding masked out;
the authors' code hooks `generate` of encoder-decoder models and counts the padding. An encoder-decoder model takes
batches with `decoder_input_ids` and `decoder_attention_mask` too; without answers there the decoder sees its start
token alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from translora.errors import InputError
from translora.lora.bank import AdapterBank
from translora.merge.iteris import Grams, gram_update

Batch = Mapping[str, torch.Tensor]
"""input_ids and attention_mask [B, T], and decoder_input_ids and decoder_attention_mask [B, U] where there is one."""
MASKS = ("attention_mask", "decoder_attention_mask")
MERGED = "merged"


def shared_inputs(model: nn.Module, bank: AdapterBank, batch: Batch) -> dict[str, str]:
    """For each adapted module the first one that reads the same input tensor, found in one pass, in its order."""
    leaders: dict[str, str] = {}
    last: list[tuple[str, torch.Tensor]] = []

    def see(name: str, x: torch.Tensor) -> None:
        if last and last[0][1] is x:
            leaders[name] = last[0][0]
            return
        if x.ndim != 3:
            raise InputError(
                f"{name}: is given its inputs as {list(x.shape)}, rows and tokens in one, which cannot be told apart; "
                "merge by cat or by a method without data"
            )
        leaders[name] = name
        last[:] = [(name, x)]

    with _watched(bank, bank.modules, see):
        _forward(model, bank, batch, [None])
    missing = bank.modules.keys() - leaders.keys()
    if missing:
        raise InputError(f"{min(missing)}: is not used in a forward pass, so it has no inputs to merge by")
    return leaders


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
        InputError: names the adapter and the module.
    """
    for adapter, by_module in zip(names, grams, strict=True):
        for name, gram in by_module.items():
            if not math.isfinite(float(gram.H.diagonal().sum() + gram.G.diagonal().sum())):
                raise InputError(
                    f"{adapter}: the inputs of {name} are not finite, with it or with what is merged so far; look at "
                    "its weights, or set dtype to float32"
                )


def check_batches(batches: Sequence[Sequence[Batch]], names: Sequence[str], place: torch.device) -> None:
    """Refuse a task without a token, and a rank without a batch, on all ranks alike.

    Raises:
        InputError: names the adapter.
    """
    tokens = [sum(int(batch["attention_mask"].sum()) for batch in own) for own in batches]
    counts = torch.tensor([*tokens, int(not any(batches))], device=place)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
    *of_tasks, num_idle = counts.tolist()
    for adapter, count in zip(names, of_tasks, strict=True):
        if count == 0:
            raise InputError(f"{adapter}: there are no inputs for it; give it some data")
    if num_idle:
        raise InputError(f"{num_idle} ranks have no batch at all; give every rank some, or take fewer ranks")


def _masks(batch: Batch) -> dict[tuple[int, int], torch.Tensor]:
    """Masks by their shape, which is how a module's tokens are told from the other stream's.

    Raises:
        InputError: encoder and decoder rows are of one length.
    """
    found = [batch[name].bool() for name in MASKS if name in batch]
    masks = {(mask.shape[0], mask.shape[1]): mask for mask in found}
    if len(masks) < len(found):
        raise InputError("attention_mask and decoder_attention_mask have one shape; pad one of them by a column")
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
