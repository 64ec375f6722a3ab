"""What all prompts of a batch begin with is computed once for each adapter, and not once for each row.

A chat template puts the same words before every input: of a short question they are half of the prompt. Their keys
and values depend on the adapter alone. So do those of an adapter's virtual tokens, which come before everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from translora.lora.methods import VirtualTokens

Route = Callable[[Sequence[str | None]], None]
MIN_SHARED = 16
"""Tokens in common below which a pass of their own does not pay."""


def shared_length(
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[str | None],
    num_own: Sequence[int],
    num_new: int,
    model: PreTrainedModel,
) -> int:
    """Tokens at the beginning of all prompts that are worth a pass of their own; 0 where there is nothing to gain.

    Rows are padded between the shared beginning and their own rest, so that distances within a row grow by the
    padding: a base that looks back over a limited distance shares nothing if a row becomes longer than that.
    """
    if len(set(adapters)) > len(prompts) // 2:
        return 0
    shortest = min(len(prompt) - own for prompt, own in zip(prompts, num_own, strict=True))
    columns = zip(*(prompt[:shortest] for prompt in prompts), strict=True)
    length = next((place for place, tokens in enumerate(columns) if len(set(tokens)) > 1), shortest)
    if length < MIN_SHARED or max(map(len, prompts)) + num_new > window(model):
        return 0
    return length


def window(model: PreTrainedModel) -> float:
    """Over how many tokens a base looks back in all of its layers."""
    config = model.config.get_text_config()
    limits = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((limit for limit in limits if limit), default=math.inf)


def begin(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[str | None],
    route: Route,
    pad_id: int,
    *,
    num_own: Sequence[int] | None = None,
    num_new: int = 0,
    virtual: VirtualTokens | None = None,
) -> dict[str, Any]:
    """Compute what the prompts share; returns the model's arguments for the pass over the rest of each.

    The rows are routed when this returns. Call it in inference mode.

    Args:
        model: causal LM in eval mode.
        prompts: token ids of each row, not empty.
        adapters: slot of each row; None is the bare base.
        route: routes the rows of the next passes to these adapters.
        pad_id: any token; padding is masked.
        num_own: tokens at the end of each row that the next pass must compute; the last one when unset.
        num_new: most tokens that the caller goes on to decode; it has no cache when there are none.
        virtual: of the one adapter that all rows belong to, if it has virtual tokens.

    Returns:
        input_ids [B, T] with padding on the left, attention_mask [B, S + T], position_ids [B, T], past_key_values (S
        tokens a row) and use_cache.
    """
    device = model.device
    num_virtual = 0 if virtual is None else virtual.count
    length = shared_length(prompts, adapters, num_own or [1] * len(prompts), num_virtual + num_new, model)
    owners = list(dict.fromkeys(adapters))
    cache = DynamicCache(config=model.config) if num_new or length else None
    if virtual is not None:
        assert len(owners) == 1, "virtual tokens are of one adapter"
        cache = virtual.cache()
    if length:
        route(owners)
        model.base_model(
            input_ids=torch.tensor([list(prompts[0][:length])] * len(owners), device=device),
            past_key_values=cache,
            use_cache=True,
        )
    if num_virtual or length:
        assert cache is not None
        # On the CPU, because the layers of a base that is spread over GPUs keep their parts of it there.
        cache.batch_select_indices(torch.tensor([owners.index(adapter) for adapter in adapters]))
    rests = [list(prompt[length:]) for prompt in prompts]
    width = max(map(len, rests))
    mask_BT = torch.tensor([[0] * (width - len(rest)) + [1] * len(rest) for rest in rests], device=device)
    num_cached = num_virtual + length
    whole_BS = torch.cat([mask_BT.new_ones(len(rests), num_cached), mask_BT], dim=1)
    route(adapters)
    return {
        "input_ids": torch.tensor([[pad_id] * (width - len(rest)) + rest for rest in rests], device=device),
        "attention_mask": whole_BS,
        "position_ids": (whole_BS.cumsum(-1) - 1).clamp(min=0)[:, num_cached:],
        "past_key_values": cache,
        "use_cache": cache is not None,
    }
