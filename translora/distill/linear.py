"""The linear map of a frozen base under ZeRO-3, whose backward pass keeps no activations.

Autograd's own would hold on to the weights that were gathered for it. DeepSpeed (0.19) therefore puts a function of its
own in the place of torch.nn.functional.linear, for good; that one keeps its input as well, for the gradient of the
weight, which a frozen weight has not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Linear = Callable[..., torch.Tensor]


class FrozenLinear(torch.autograd.Function):
    """x W^T + b, rounded as by DeepSpeed's function; x is [..., in], W [out, in]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Keeps the parameter, whose data ZeRO-3 releases and gathers again."""
        ctx.save_for_backward(weight)
        if bias is not None and x.dim() == 2:
            return torch.addmm(bias, x, weight.t())
        out = x.matmul(weight.t())
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of x."""
        (weight,) = ctx.saved_tensors
        status = getattr(weight, "ds_status", None)
        if partitioned := getattr(status, "name", None) == "NOT_AVAILABLE":
            weight.all_gather()
        try:
            return grads[0].matmul(weight), None, None
        finally:
            if partitioned:
                weight.partition()


def keep_no_inputs() -> Linear:
    """Have every nn.Linear whose weight is frozen compute so; returns what stood there before.

    For the process, as DeepSpeed's; after zero.Init, which puts its own there again.
    """
    before: Linear = torch.nn.functional.linear

    def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.requires_grad:
            return before(input, weight, bias)
        result: torch.Tensor = FrozenLinear.apply(input, weight, bias)
        return result

    torch.nn.functional.linear = linear
    return before
