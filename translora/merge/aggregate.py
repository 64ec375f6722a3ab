"""Averages of federated learning: FedEx-LoRA (arXiv 2410.09432), and component by component for unequal ranks.

Scaling is multiplied into B first, so adapters that differ in it are averaged by what they do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from translora.lora.peft_io import LoraWeights, pad_rank
from translora.merge.peft_methods import Merged, Pair, exact


def fedex(loras: Sequence[LoraWeights], weights: Sequence[float]) -> tuple[Merged, Merged]:
    """The mean adapter and the residual that makes it exact, by module.

    With Ab = sum_i w_i A_i and Bb = sum_i w_i B_i, sum_i w_i B_i A_i = Bb Ab + sum_i w_i (B_i - Bb)(A_i - Ab). The
    paper adds the second term to the frozen W_0; it is returned as a LoRA of rank (N - 1) r: because the
    w_i (B_i - Bb) sum to zero, it equals sum_{i<N} w_i (B_i - Bb)(A_i - A_N).

    Args:
        loras: N of them; smaller ranks, and modules that some lack, are filled up with zeros.
        weights: w_i, positive, summing to 1.
    """
    mean: Merged = {}
    residual: Merged = {}
    for name in sorted({name for lora in loras for name in lora.modules}):
        factors = _padded(loras, name)
        mean_A = torch.stack([w * A for w, (A, _) in zip(weights, factors, strict=True)]).sum(0)
        mean_B = torch.stack([w * B for w, (_, B) in zip(weights, factors, strict=True)]).sum(0)
        last_A = factors[-1][0]
        others = list(zip(weights, factors, strict=True))[:-1]
        mean[name] = (mean_A, mean_B)
        residual[name] = (
            torch.cat([A - last_A for _, (A, _) in others]),
            torch.cat([w * (B - mean_B) for w, (_, B) in others], dim=1),
        )
    return mean, residual


def stack(first: Merged, second: Merged) -> Merged:
    """One adapter whose update is the sum of two of the same modules."""
    return {
        name: (torch.cat([A, second[name][0]]), torch.cat([B, second[name][1]], dim=1))
        for name, (A, B) in first.items()
    }


def component_mean(loras: Sequence[LoraWeights], weights: Sequence[float]) -> Merged:
    """Average rank-1 components, each over those adapters alone that have it (HAFL, arXiv 2411.06581), rank max r_i.

    A[k] = sum_{i: r_i > k} w_i A_i[k] / sum_{i: r_i > k} w_i, and B[:, k] alike.
    """
    merged: Merged = {}
    for name in sorted({name for lora in loras for name in lora.modules}):
        owners = [(w, lora) for w, lora in zip(weights, loras, strict=True) if name in lora.modules]
        factors = _padded([lora for _, lora in owners], name)
        ranks = torch.tensor([len(lora.modules[name][0]) for _, lora in owners])
        has_NR = torch.arange(int(ranks.max()))[None] < ranks[:, None]
        share_NR = has_NR * torch.tensor([w for w, _ in owners], dtype=torch.float64)[:, None]
        share_NR = (share_NR / share_NR.sum(0)).to(factors[0][0].dtype)
        pairs = list(zip(share_NR, factors, strict=True))
        merged[name] = (
            torch.stack([share_R[:, None] * A for share_R, (A, _) in pairs]).sum(0),
            torch.stack([B * share_R for share_R, (_, B) in pairs]).sum(0),
        )
    return merged


def _padded(loras: Sequence[LoraWeights], name: str) -> list[Pair]:
    """A_i and s_i B_i of one module, filled up with zeros to the greatest rank."""
    like_A, like_B = next(lora.modules[name] for lora in loras if name in lora.modules)
    rank = max(len(lora.modules[name][0]) for lora in loras if name in lora.modules)
    found = []
    for lora in loras:
        A, B = lora.modules.get(name, (like_A[:0], like_B[:, :0]))
        found.append(pad_rank((exact(A), exact(B) * lora.scaling.get(name, 1.0)), rank))
    return found
