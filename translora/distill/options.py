"""Other ways to train a LoRA student, each off by default: what is done to its gradients and to its updates.

Every option works on one student's own tensors, so it rides in a gang with others. Riemannian changes the gradient in
place after it was clipped, LoRA-Pro has an AdamW of its own; an optimizer's step is scaled element by element after it
(0 leaves a weight as it is).
Factors are A [r, in] and B [out, r] by module, float32; the update of a module is s B A.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from translora.config import ChainSettings, LoraSettings
from translora.lora.banked import Factors
from translora.run.files import derive_seed

DAMPING = 1e-2
"""Riemannian: added to the diagonal of B^T B and A A^T, PEFT's default."""
SINGULAR, TINY = 1e-9, 1e-30
"""LoRA-Pro: the same relative to the matrix's trace, where the inverse is meant to be exact; and where that is 0."""


def damped_inverse(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """(matrix + damping I)^-1 of a symmetric positive [r, r] matrix, in float64."""
    eye = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
    return torch.linalg.inv(matrix.double() + damping * eye)


def riemannian(lora: LoraSettings, weights: Mapping[str, Factors], gradients: Mapping[str, Factors], link: int) -> None:
    """grad_A <- (B^T B + d I)^-1 grad_A, grad_B <- grad_B (A A^T + d I)^-1 (arXiv 2402.02347, PEFT's Riemannian).

    In place, module by module; of a chain its present link alone.
    """
    own = slice(link * lora.rank, (link + 1) * lora.rank)
    for name, (lora_A, lora_B) in weights.items():
        A, B = lora_A[own], lora_B[:, own]
        grad_A, grad_B = gradients[name][0][own], gradients[name][1][:, own]
        grad_A.copy_(damped_inverse(B.T @ B, DAMPING) @ grad_A.double())
        grad_B.copy_(grad_B.double() @ damped_inverse(A @ A.T, DAMPING))


def lora_pro(A: torch.Tensor, B: torch.Tensor, grad_A: torch.Tensor, grad_B: torch.Tensor, scaling: float) -> Factors:
    """The changes whose s (B dA + dB A) comes nearest to the gradient by the whole matrix (LoRA-Pro, arXiv 2407.18242).

        dA = (B^T B)^-1 grad_A / s^2 + X A
        dB = (I - B (B^T B)^-1 B^T) grad_B (A A^T)^-1 / s^2 - B X

    with X of the Sylvester equation B^T B X + X A A^T = -(B^T B)^-1 grad_A A^T / s^2 (theorems 2.1 and 2.3).

    Args:
        A, B: factors [r, in] and [out, r], float64.
        grad_A, grad_B: their gradients, s B^T G and s G A^T of the whole matrix's G.

    Returns:
        dA and dB.
    """
    gram_B, gram_A = B.T @ B, A @ A.T
    inverse_B, inverse_A = (damped_inverse(gram, SINGULAR * float(gram.trace()) + TINY) for gram in (gram_B, gram_A))
    own_A = inverse_B @ grad_A / scaling**2
    own_B = grad_B @ inverse_A / scaling**2
    own_B -= B @ (inverse_B @ (B.T @ own_B))
    X = sylvester(gram_B, gram_A, -own_A @ A.T)
    return [own_A + X @ A, own_B - B @ X]


def sylvester(left: torch.Tensor, right: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """X [r, r] of left X + X right = value, for symmetric matrices that are not negative."""
    lefts, U = torch.linalg.eigh(left)
    rights, V = torch.linalg.eigh(right)
    sums = lefts[:, None] + rights[None, :]
    return U @ ((U.T @ value @ V) / sums.clamp(min=SINGULAR * float(sums.max()) + TINY)) @ V.T


class LoraProAdamW(torch.optim.Optimizer):
    """LoRA-Pro's own AdamW (arXiv 2407.18242, algorithm 2), without weight decay.

    Its moments are those of what a whole matrix is given, s (B dA + dB A), and its step on that matrix is brought back
    to the factors the same way: two numbers for each weight of an adapted module, as if all of it were trained.

    Args:
        flat: the parameter that holds all factors.
        lora: scaling and rank.
        weights, gradients: views of `flat` and of its gradient, A [r, in] and B [out, r] by module. Of a chain the link
            is trained that the group's `link` says.
    """

    def __init__(
        self,
        flat: torch.nn.Parameter,
        lora: LoraSettings,
        weights: Mapping[str, Factors],
        gradients: Mapping[str, Factors],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__([flat], {"lr": lr, "link": 0})
        self.flat, self.lora, self.weights, self.gradients = flat, lora, weights, gradients
        self.betas, self.eps = betas, eps

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every module."""
        scaling, (group,), state = self.lora.scaling, self.param_groups, self.state[self.flat]
        sizes = [len(lora_B) * lora_A.shape[1] for lora_A, lora_B in self.weights.values()]
        if not state:
            state["step"] = torch.zeros((), device=self.flat.device)
            state["exp_avg"], state["exp_avg_sq"] = self.flat.new_zeros(2, sum(sizes)).unbind()
        state["step"] += 1
        bias_1, bias_2 = (1 - beta ** float(state["step"]) for beta in self.betas)
        own = slice(group["link"] * self.lora.rank, (group["link"] + 1) * self.lora.rank)
        moments = zip(state["exp_avg"].split(sizes), state["exp_avg_sq"].split(sizes), strict=True)
        for (name, (lora_A, lora_B)), (mean, square) in zip(self.weights.items(), moments, strict=True):
            A, B = lora_A[own].double(), lora_B[:, own].double()
            grad_A, grad_B = self.gradients[name]
            dA, dB = lora_pro(A, B, grad_A[own].double(), grad_B[:, own].double(), scaling)
            whole = (scaling * (B @ dA + dB @ A)).flatten().float()
            mean.lerp_(whole, 1 - self.betas[0])
            square.mul_(self.betas[1]).addcmul_(whole, whole, value=1 - self.betas[1])
            direction = ((mean / bias_1) / ((square / bias_2).sqrt() + self.eps)).view(len(B), -1).double()
            dA, dB = lora_pro(A, B, scaling * B.T @ direction, scaling * direction @ A.T, scaling)
            lora_A[own] -= group["lr"] * dA
            lora_B[:, own] -= group["lr"] * dB


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
