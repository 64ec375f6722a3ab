"""Attention over packed batches: samples of all lengths in one row, none of which sees another.

flash-attention takes packed batches by itself. Elsewhere `packed_sdpa` calls torch's SDPA on all samples of one length
together, in their own shape: no padding, and no [T, T] mask over the whole batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

PACKED = "translora_packed"
SHORT = 128


def packed_inputs(lengths: Sequence[int], place: torch.device) -> dict[str, object]:
    """The model's arguments that mark where samples begin and end, for every attention implementation.

    Args:
        lengths: tokens of each sample, in order.
    """
    positions = torch.cat([torch.arange(length) for length in lengths])
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device=place, dtype=torch.int32)
    return {
        "position_ids": positions[None].to(place),
        "packed_lengths": tuple(lengths),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def short_on_cpu(query: torch.Tensor) -> bool:
    """Whether plain matrix products beat torch's flash kernel (2.13: its CPU backward is twice as slow up to here)."""
    return query.device.type == "cpu" and query.shape[2] <= SHORT


def packed_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed_lengths: tuple[int, ...] = (),
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample; the signature is that of transformers' attention functions.

    Args:
        query: [1, H, T, D]; key and value are [1, G, T, D] with G heads that groups of queries share.
        packed_lengths: tokens of each sample; they add up to T.

    Returns:
        [1, T, H, D], and None in the place of the attention weights.
    """
    groups = query.shape[1] // key.shape[1]
    parts = [x.split(packed_lengths, dim=2) for x in (query, repeat_kv(key, groups), repeat_kv(value, groups))]
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(packed_lengths):
        by_length.setdefault(length, []).append(index)
    outputs: list[torch.Tensor] = [query] * len(packed_lengths)
    for length, indices in by_length.items():
        mask = None
        if sliding_window is not None and length > sliding_window:
            place = torch.arange(length, device=query.device)
            distance = place[:, None] - place[None, :]
            mask = (distance >= 0) & (distance < sliding_window)
        q, k, v = (torch.cat([part[index] for index in indices]) for part in parts)
        if softcap is not None:
            together = capped_attention(q, k, v, mask, scaling, softcap)
        else:
            with sdpa_kernel(SDPBackend.MATH) if short_on_cpu(q) else contextlib.nullcontext():
                together = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, scale=scaling, is_causal=mask is None
                )
        for index, output in zip(indices, together.split(1), strict=True):
            outputs[index] = output
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def capped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float | None, softcap: float
) -> torch.Tensor:
    """Causal attention whose scores are capped to c tanh(score / c) (Gemma 2), which SDPA cannot.

    Args:
        q, k, v: [B, H, T, D].
        mask: [T, T], True where a token is seen; the causal one when None.
    """
    if mask is None:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    scores_BHTT = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores_BHTT = softcap * torch.tanh(scores_BHTT / softcap)
    weights_BHTT = scores_BHTT.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights_BHTT.to(v.dtype) @ v


AttentionInterface.register(PACKED, packed_sdpa)
