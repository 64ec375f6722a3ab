"""Other ways to train a LoRA student, each off by default: what is done to its gradients and to its updates.

Every option works on one student's own tensors, so it rides in a gang with others. A gradient is changed in place
after it was clipped; an update, AdamW's step, is scaled element by element after it (0 leaves a weight as it is).
Factors are A [r, in] and B [out, r] by module, float32; the update of a module is s B A.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch

from translora.config import ChainSettings, LoraSettings
from translora.lora.bank import Factors
from translora.run.files import derive_seed

DAMPING = 1e-2
"""Riemannian: added to the diagonal of B^T B and A A^T, PEFT's default."""
SINGULAR = 1e-6
"""LoRA-Pro: the same, where the inverse is meant to be exact."""


def damped_inverse(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """(matrix + damping I)^-1 of a symmetric positive [r, r] matrix, in float64."""
    eye = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
    return torch.linalg.inv(matrix.double() + damping * eye)


def riemannian(
    lora_A: torch.Tensor, lora_B: torch.Tensor, grad_A: torch.Tensor, grad_B: torch.Tensor, scaling: float
) -> None:
    """grad_A <- (B^T B + d I)^-1 grad_A, grad_B <- grad_B (A A^T + d I)^-1 (arXiv 2402.02347, PEFT's Riemannian)."""
    grad_A.copy_(damped_inverse(lora_B.T @ lora_B, DAMPING) @ grad_A.double())
    grad_B.copy_(grad_B.double() @ damped_inverse(lora_A @ lora_A.T, DAMPING))


def lora_pro(
    lora_A: torch.Tensor, lora_B: torch.Tensor, grad_A: torch.Tensor, grad_B: torch.Tensor, scaling: float
) -> None:
    """The changes whose s (B dA + dB A) comes nearest to the gradient by the whole matrix (LoRA-Pro, arXiv 2407.18242).

        dA = (B^T B)^-1 grad_A / s^2 + X A
        dB = (I - B (B^T B)^-1 B^T) grad_B (A A^T)^-1 / s^2 - B X

    with X of the Sylvester equation B^T B X + X A A^T = -(B^T B)^-1 grad_A A^T / s^2 (theorems 2.1 and 2.3). AdamW's
    moments are of dA and dB; the paper's own AdamW keeps those of the whole matrix.
    """
    A, B, g_A, g_B = (tensor.double() for tensor in (lora_A, lora_B, grad_A, grad_B))
    gram_B, gram_A = B.T @ B, A @ A.T
    inverse_B, inverse_A = damped_inverse(gram_B, SINGULAR), damped_inverse(gram_A, SINGULAR)
    own_A = inverse_B @ g_A / scaling**2
    own_B = g_B @ inverse_A / scaling**2
    own_B -= B @ (inverse_B @ (B.T @ own_B))
    X = sylvester(gram_B, gram_A, -own_A @ A.T)
    grad_A.copy_(own_A + X @ A)
    grad_B.copy_(own_B - B @ X)


def sylvester(left: torch.Tensor, right: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """X [r, r] of left X + X right = value, for symmetric matrices that are not negative."""
    lefts, U = torch.linalg.eigh(left)
    rights, V = torch.linalg.eigh(right)
    sums = (lefts[:, None] + rights[None, :]).clamp(min=SINGULAR)
    return U @ ((U.T @ value @ V) / sums) @ V.T


GRADIENTS: dict[str, Callable[..., None]] = {"riemannian": riemannian, "lora-pro": lora_pro}


def change_gradients(
    lora: LoraSettings, weights: Mapping[str, Factors], gradients: Mapping[str, Factors], link: int
) -> None:
    """Apply `gradient` to every module, in place; of a chain to its present link alone."""
    change = GRADIENTS[lora.gradient]
    own = slice(link * lora.rank, (link + 1) * lora.rank)
    for name, (lora_A, lora_B) in weights.items():
        grad_A, grad_B = gradients[name]
        change(lora_A[own], lora_B[:, own], grad_A[own], grad_B[:, own], lora.scaling)


def update_rates(lora: LoraSettings, shapes: Mapping[str, Factors], seed: int, link: int) -> dict[str, Factors] | None:
    """What each element of an update is multiplied with; None where all are 1.

    Args:
        shapes: tensors of the factors' shapes.
        seed: the student's.
        link: the present one of its chain.
    """
    rates: dict[str, Factors] | None = None
    if lora.scales_updates:
        rates = {name: [torch.ones_like(factor) for factor in factors] for name, factors in shapes.items()}
        adapted = None if lora.chain is None else layers_of_link(lora.chain, list(shapes), seed, link)
        for name, (rate_A, rate_B) in rates.items():
            rate_B.mul_(lora.lora_plus_ratio)
            if lora.random_half:
                for part, rate in enumerate((rate_A, rate_B)):
                    rate.mul_(random_half(rate.shape, derive_seed(seed, "half", name, part)).to(rate))
            if lora.chain is not None:
                keep_link(lora.chain, lora.rank, link, rate_A, rate_B)
            if adapted is not None and layer_of(name) not in adapted:
                rate_A.zero_()
                rate_B.zero_()
    return rates


def random_half(shape: torch.Size, seed: int) -> torch.Tensor:
    """1 or 0 for each element, with even odds: LoRA-SP trains a random half of the weights (arXiv 2403.08822)."""
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed))


def keep_link(chain: ChainSettings, rank: int, link: int, rate_A: torch.Tensor, rate_B: torch.Tensor) -> None:
    """Zero the rates of all links but one.

    A chain is a sum of LoRAs that are trained one after the other, each beside those before it, which stay as they are
    (COLA, arXiv 2401.04151): here they lie behind each other in the rank of one LoRA. With `freeze_A` each link keeps
    its random A and trains B alone (RAC-LoRA, arXiv 2410.08305).
    """
    for start in range(0, len(rate_A), rank):
        if start != link * rank:
            rate_A[start : start + rank] = 0
            rate_B[:, start : start + rank] = 0
    if chain.freeze_A:
        rate_A.zero_()


def layer_of(module: str) -> str:
    """The number of the layer that a module is in, or its own name where it is in none."""
    match = re.search(r"\.(\d+)\.", module)
    return match[1] if match else module


def layers_of_link(chain: ChainSettings, modules: Sequence[str], seed: int, link: int) -> set[str]:
    """The layers that a link adapts: a random share of them, drawn anew for each link (XGBLoRA, arXiv 2410.19694)."""
    layers = list(dict.fromkeys(layer_of(module) for module in modules))
    count = max(1, round(chain.layer_fraction * len(layers)))
    order = torch.randperm(len(layers), generator=torch.Generator().manual_seed(derive_seed(seed, "link", link)))
    return {layers[index] for index in order[:count].tolist()}
