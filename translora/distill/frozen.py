"""A frozen base in training: linear maps that keep no inputs for the backward pass, and activations computed again.

Under ZeRO-3 autograd's own linear map would hold on to the weights that were gathered for it. DeepSpeed (0.19)
therefore puts a function of its own in the place of torch.nn.functional.linear, for good; that one keeps its input as
well, for the gradient of the weight, which a frozen weight has not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

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


def recompute(model: PreTrainedModel) -> None:
    """Have a frozen base compute its activations again in the backward pass, without dropout.

    transformers recomputes in training mode only, in which it would switch on dropout in some bases. A student's result
    must not depend on the random numbers that its neighbours draw.
    """
    # Before transformers 5.23 it has its old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
