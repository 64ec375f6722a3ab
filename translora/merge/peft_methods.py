"""Merging without data: PEFT's `add_weighted_adapter`, called on the adapters alone.

PEFT merges LoRA layers of a model, but reads no weight of the base for it. So it is given a skeleton: modules of the
right names and shapes whose weights take no memory, and an adapter of a 70B base merges on any machine. rsLoRA's
alpha / sqrt(r) is written as a plain alpha / r first: PEFT 0.21 copies `use_rslora` into the merged config, and the
result of cat and svd came out sqrt(r) too large.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from translora.config.merge import Combination
from translora.errors import InputError
from translora.lora.peft_io import LoraWeights, truncated

Pair = tuple[torch.Tensor, torch.Tensor]
Merged = dict[str, Pair]
"""A [r, in] and B [out, r] by module name, of scaling 1."""
ELEMENTWISE = ("linear", "ties", "dare_ties", "dare_linear", "magnitude_prune")
"""Combinations that act on A and on B by themselves, and so need equal ranks."""
_MERGED = "merged"


def combine(
    loras: Sequence[LoraWeights],
    weights: Sequence[float],
    combination: Combination,
    *,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
    rank: int | None = None,
    seed: int = 0,
) -> Merged:
    """Merge adapters by one of PEFT's combinations; a module that only some of them adapt is merged from those.

    `static_cat` is exact, of rank sum r_i: Delta W = sum_i w_i s_i B_i A_i. `svd` is that, truncated. `linear` sums A
    and B by themselves, so it has cross terms B_i A_j. The others sparsify before they add.

    Args:
        loras: two or more.
        weights: w_i, one an adapter.
        combination: see `Combination`.
        density: share of entries that ties, dare and magnitude_prune keep.
        majority_sign_method: of ties.
        rank: of the `svd` combinations; their greatest rank when unset.
        seed: of dare's random choice.

    Raises:
        InputError: an elementwise combination meets different ranks.
    """
    assert len(loras) == len(weights) > 1, "PEFT turns any combination of one adapter into linear"
    if combination in ELEMENTWISE:
        _refuse_different_ranks(loras, combination)
    with torch.random.fork_rng(devices=[]):
        model = _skeleton(loras)
        torch.manual_seed(seed)
        model.base_model.add_weighted_adapter(
            [str(index) for index in range(len(loras))],
            list(weights),
            _MERGED,
            combination_type="cat" if combination == "static_cat" else combination,
            svd_rank=rank,
            svd_full_matrices=False,
            density=density,
            majority_sign_method=majority_sign_method,
        )
    found = {}
    for name in sorted({name for lora in loras for name in lora.modules}):
        layer = model.base_model.model.get_submodule(name)
        found[name] = (layer.lora_A[_MERGED].weight.detach(), layer.lora_B[_MERGED].weight.detach())
    if combination == "static_cat":  # PEFT makes room for all adapters' greatest ranks: the rest is zeros
        own = {name: sum(len(lora.modules[name][0]) for lora in loras if name in lora.modules) for name in found}
        found = {name: (A[: own[name]], B[:, : own[name]]) for name, (A, B) in found.items()}
    return found


def truncate(merged: Merged, rank: int) -> Merged:
    """The best approximation of rank `rank` of every module's update.

    What PEFT's svd finds, by a decomposition of the factors' own rank: [out, in] is never made, and takes minutes where
    it is wide.
    """
    return {name: truncated(A, B, rank) if len(A) > rank else (A, B) for name, (A, B) in merged.items()}


def exact(factor: torch.Tensor) -> torch.Tensor:
    """A factor in float32 or more: sums over bfloat16 files are not made in bfloat16."""
    return factor.to(torch.promote_types(factor.dtype, torch.float32))


def fingerprint(lora: LoraWeights) -> str:
    """Hash of an adapter's numbers: its place in the order of merging, whatever the order that it is named in."""
    digest = hashlib.sha256()
    for name in sorted(lora.modules):
        digest.update(f"{name} {lora.scaling[name]!r}".encode())
        for factor in lora.modules[name]:
            digest.update(factor.detach().to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


def _refuse_different_ranks(loras: Sequence[LoraWeights], combination: str) -> None:
    for name in sorted({name for lora in loras for name in lora.modules}):
        ranks = sorted({len(lora.modules[name][0]) for lora in loras if name in lora.modules})
        if len(ranks) > 1:
            remedy = "svd" if combination == "linear" else f"{combination}_svd"
            raise InputError(
                f"{combination}: {name} has the ranks {', '.join(map(str, ranks))}, and it adds A and B by themselves; "
                f"use {remedy}, static_cat or component_mean"
            )
    greatest = sorted({lora.max_rank for lora in loras})
    if len(greatest) > 1:
        raise InputError(
            f"{combination}: the adapters have the ranks {', '.join(map(str, greatest))}; use svd or static_cat"
        )


def _skeleton(loras: Sequence[LoraWeights]) -> PeftModel:
    """A PEFT model with the adapters "0", "1", ... on modules of their shapes; one number is the weight of all."""
    shapes = {
        name: (lora_B.shape[0], lora_A.shape[1])
        for lora in loras
        for name, (lora_A, lora_B) in sorted(lora.modules.items())
    }
    dtype = torch.promote_types(torch.float32, next(iter(loras[0].modules.values()))[0].dtype)
    root = nn.Module()
    for name in sorted(shapes):
        *parents, leaf = name.split(".")
        parent = root
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        num_out, num_in = shapes[name]
        linear = nn.Linear(num_in, num_out, bias=False, device="meta")
        linear.weight = nn.Parameter(torch.zeros((), dtype=dtype).expand(num_out, num_in), requires_grad=False)
        parent.add_module(leaf, linear)
    model: PeftModel | None = None
    for index, lora in enumerate(loras):
        if model is None:
            model = get_peft_model(root, _plain_config(lora), adapter_name="0", autocast_adapter_dtype=False)
        else:
            model.add_adapter(str(index), _plain_config(lora), autocast_adapter_dtype=False)
        for name, (lora_A, lora_B) in lora.modules.items():
            layer = model.base_model.model.get_submodule(name)
            layer.lora_A[str(index)].weight.data.copy_(lora_A)
            layer.lora_B[str(index)].weight.data.copy_(lora_B)
            assert abs(layer.scaling[str(index)] - lora.scaling[name]) < 1e-6 * abs(lora.scaling[name])
    assert model is not None
    return model


def _plain_config(lora: LoraWeights) -> LoraConfig:
    """The adapter's ranks and scalings with alpha / r, module by module."""
    ranks = {name: len(lora_A) for name, (lora_A, _) in lora.modules.items()}
    return LoraConfig(
        r=lora.max_rank,
        lora_alpha=lora.max_rank,
        target_modules=sorted(lora.modules),
        rank_pattern=ranks,
        alpha_pattern={name: lora.scaling[name] * rank for name, rank in ranks.items()},
        use_rslora=False,
    )
