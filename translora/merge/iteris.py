"""IterIS (arXiv 2411.15231) and RegMean in closed form: one module's merged LoRA from streamed Gram matrices.

Row layout: W is [out, in]. X_i [T, in] are the inputs of a module in the model that carries LoRA i, Y_i [T, in] those
of the same module and the same tokens in the *current merged* model. The merged weight of a module minimises
sum_i lambda_i |X_i W_i^T - Y_i W^T|_F^2, W_i = s_i B_i A_i. Of the data it needs three [in, in] sums a task:

    G_i = X_i^T Y_i        H_i = Y_i^T Y_i        C_i = X_i^T X_i

Everything here is float64: with the regularisation of 1e-7 that the paper uses, float32 leaves rank-deficient Grams
undecided. `translora.merge.features` fills the Grams from a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from translora.errors import InputError

Norm = Literal["delta", "base+delta"]


@dataclass
class Grams:
    """A task's sums over tokens for one module, [in, in] each, float64.

    G, H and C are one tensor while the merged model is not there yet (Y = X); C is None where it is not wanted.
    """

    G: torch.Tensor
    H: torch.Tensor
    C: torch.Tensor | None

    @classmethod
    def first(cls, num_in: int, device: torch.device | str = "cpu") -> Grams:
        """Empty sums for Y = X: one tensor serves as G, H and C."""
        gram = torch.zeros(num_in, num_in, dtype=torch.float64, device=device)
        return cls(gram, gram, gram)

    @classmethod
    def paired(cls, num_in: int, device: torch.device | str = "cpu", *, with_inputs: bool = True) -> Grams:
        """Empty sums for tokens that went through both models; `with_inputs` sums C too."""
        sums = [torch.zeros(num_in, num_in, dtype=torch.float64, device=device) for _ in range(3 if with_inputs else 2)]
        return cls(sums[0], sums[1], sums[2] if with_inputs else None)


def gram_update(grams: Grams, x_TI: torch.Tensor, merged_TI: torch.Tensor | None = None, reg_coef: float = 0.0) -> None:
    """Add tokens to the sums, in place: G += X^T Y, H += Y^T Y, C += X^T X with Y = (1 - reg_coef) merged + reg_coef X.

    Args:
        grams: sums of this module and task; `Grams.first` needs `merged_TI` None, `Grams.paired` takes either.
        x_TI: inputs of the module in the model with the task's own LoRA, padding taken out, any float dtype.
        merged_TI: inputs for the same tokens in the merged model; None for Y = X.
        reg_coef: rho of the paper, in [0, 1].

    Raises:
        InputError: the two inputs differ in shape, or `Grams.first` is given merged inputs.
    """
    x = x_TI.to(grams.G)
    if merged_TI is None:
        gram = x.T @ x
        for sums in {id(sums): sums for sums in (grams.G, grams.H, grams.C) if sums is not None}.values():
            sums += gram
        return
    if merged_TI.shape != x_TI.shape:
        raise InputError(f"inputs {list(x_TI.shape)} and merged inputs {list(merged_TI.shape)} are not the same tokens")
    if grams.G is grams.H:
        raise InputError("these Grams hold one sum for X and Y; make them with Grams.paired for two models")
    y = torch.lerp(merged_TI.to(grams.G), x, reg_coef)
    grams.G.addmm_(x.T, y)
    grams.H.addmm_(y.T, y)
    if grams.C is not None:
        grams.C.addmm_(x.T, x)


def adaptive_weights(
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    grams: Sequence[Grams],
    *,
    norm: Norm = "delta",
    base_weight: torch.Tensor | None = None,
) -> list[float]:
    """lambda_i = |W_i|_F^2 / |X_i W_i^T|_F^2 for one module, with |X_i W_i^T|_F^2 = tr(W_i C_i W_i^T).

    A task whose W_i is zero, or meets zero inputs alone, gets what a W_i of random direction would: in / tr(C_i), or 0.

    Args:
        lora_A: A_i [r_i, in]; a rank of 0 is a task that does not adapt this module.
        lora_B: B_i [out, r_i].
        scaling: s_i.
        grams: C_i is used.
        norm: W_i is the LoRA's s_i B_i A_i (`delta`, as the paper has it), or W_0 + s_i B_i A_i (`base+delta`).
        base_weight: W_0 [out, in], for `base+delta`.

    Raises:
        InputError: `base+delta` without `base_weight`, or Grams without C.
    """
    if norm == "base+delta" and base_weight is None:
        raise InputError("norm 'base+delta' needs base_weight, the module's frozen weight [out, in]")
    found = []
    for A, B, s, gram in zip(lora_A, lora_B, scaling, grams, strict=True):
        if gram.C is None:
            raise InputError("adaptive weights need the Gram C of a task's own inputs; make it with with_inputs=True")
        A64, B64, C = A.to(gram.C), B.to(gram.C) * s, gram.C
        if norm == "delta":
            outer = B64.T @ B64  # tr(B A C A^T B^T) = sum(B^T B * A C A^T): r by r, never out by in
            size, response = (outer * (A64 @ A64.T)).sum(), (outer * (A64 @ C @ A64.T)).sum()
        else:
            assert base_weight is not None
            weight = base_weight.detach().to(C) + B64 @ A64
            size, response = weight.square().sum(), ((weight @ C) * weight).sum()
        if not response > 0:
            size, response = size.new_tensor(float(len(C))), C.trace()
        found.append(float(size / response) if response > 0 else 0.0)
    return found


def solve_module(
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    weights: Sequence[float],
    grams: Sequence[Grams],
    *,
    a1: float = 0.0,
    a2: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The merged LoRA of one module, exact: A* [R, in] and B [out, R] of rank R = sum r_i and scaling 1, float64.

    W* = (sum_i l_i s_i B_i A_i G'_i)(sum_i l_i H'_i)^-1 = [B_1 .. B_N] A* with
    A* = stack_i(l_i s_i A_i G'_i)(sum_i l_i H'_i)^-1, G' = G + a1 |G|_F I and H' = H + a2 |H|_F I. RegMean is Y = X,
    l_i = 1, a1 = a2 = 0. Where the sum of the H' is rank-deficient (fewer tokens than inputs, a2 = 0), of all minima
    the one of least norm is taken.

    Args:
        lora_A: A_i [r_i, in]; ranks may differ and be 0.
        lora_B: B_i [out, r_i].
        scaling: s_i.
        weights: l_i >= 0.
        grams: G_i and H_i.
        a1: regularisation of G.
        a2: regularisation of H.
    """
    like = grams[0].H
    rows, total = [], torch.zeros_like(like)
    for A, s, weight, gram in zip(lora_A, scaling, weights, grams, strict=True):
        A64 = A.to(like)
        rows.append((weight * s) * (A64 @ gram.G + a1 * torch.linalg.matrix_norm(gram.G) * A64))
        total.add_(gram.H, alpha=weight)
        total.diagonal().add_(weight * a2 * torch.linalg.matrix_norm(gram.H))
    return _times_inverse(torch.cat(rows), total), torch.cat([B.to(like) for B in lora_B], dim=1)


def _times_inverse(rows_RI: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """rows @ gram^-1 for a positive gram; its pseudo-inverse where float64 cannot tell it from a singular one."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal().square()
    if not failed and pivots.min() > len(gram) * torch.finfo(gram.dtype).eps * pivots.max():
        return torch.cholesky_solve(rows_RI.T, factor).T.contiguous()
    return rows_RI @ torch.linalg.pinv(gram, hermitian=True)
