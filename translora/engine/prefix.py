"""What all prompts of a batch begin with is computed once for each adapter, and not once for each row.

A chat template puts the same words before every input: of a short question they are half of the prompt. Their keys
and values depend on the adapter alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

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
    config = model.config.get_text_config()
    longest = max(map(len, prompts)) + num_new
    limits = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if length < MIN_SHARED or any(limit and longest > limit for limit in limits):
        return 0
    return length


def begin(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[str | None],
    route: Route,
    pad_id: int,
    *,
    num_own: Sequence[int] | None = None,
    num_new: int = 0,
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

    Returns:
        input_ids [B, T] with padding on the left, attention_mask [B, S + T], position_ids [B, T], past_key_values (S
        tokens a row) and use_cache.
    """
    device = model.device
    length = shared_length(prompts, adapters, num_own or [1] * len(prompts), num_new, model)
    cache = DynamicCache(config=model.config) if num_new or length else None
    if length:
        owners = list(dict.fromkeys(adapters))
        route(owners)
        model.base_model(
            input_ids=torch.tensor([list(prompts[0][:length])] * len(owners), device=device),
            past_key_values=cache,
            use_cache=True,
        )
        assert cache is not None
        # On the CPU, because the layers of a base that is spread over GPUs keep their parts of it there.
        cache.batch_select_indices(torch.tensor([owners.index(adapter) for adapter in adapters]))
    rests = [list(prompt[length:]) for prompt in prompts]
    width = max(map(len, rests))
    mask_BT = torch.tensor([[0] * (width - len(rest)) + [1] * len(rest) for rest in rests], device=device)
    whole_BS = torch.cat([mask_BT.new_ones(len(rests), length), mask_BT], dim=1)
    route(adapters)
    return {
        "input_ids": torch.tensor([[pad_id] * (width - len(rest)) + rest for rest in rests], device=device),
        "attention_mask": whole_BS,
        "position_ids": (whole_BS.cumsum(-1) - 1).clamp(min=0)[:, length:],
        "past_key_values": cache,
        "use_cache": cache is not None,
    }
