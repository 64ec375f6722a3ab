"""The adapter bank: N LoRA adapters resident on one frozen base, each row of a batch routed to its own.

Discriminators, teachers and students are all slots of a bank. Shapes:
  B rows, T tokens, N slots, r rank (smaller ranks are padded with zeros, which changes nothing).
  lora_A [N, r, in], lora_B [N, out, r], scaling [N].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from translora.lora.peft_io import LoraWeights

BASE_SLOT = -1
"""Rows routed here get the frozen base alone."""


class Route:
    """The slots of the batch that is being computed, shared by every module of a bank."""

    def __init__(self) -> None:
        self.slots_B: torch.Tensor | None = None
        self.single: int | None = None


class BankedLinear(nn.Module):
    """A frozen linear module plus the bank's slots for it."""

    scaling: torch.Tensor

    def __init__(self, base: nn.Linear, num_slots: int, rank: int, route: Route, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        # A meta or ZeRO-partitioned weight has no usable shape or device of its own: take the declared sizes.
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.zeros(num_slots, rank, base.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(num_slots, base.out_features, rank, dtype=dtype, device=device))
        self.register_buffer("scaling", torch.ones(num_slots, device=device), persistent=False)
        self.route = route

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """W x + scaling * B A x, with A and B of each row's slot; x is [B, T, in]."""
        out_BTO = self.base(x_BTI)
        route = self.route
        if route.single == BASE_SLOT:
            return out_BTO
        x = x_BTI.to(self.lora_A.dtype)
        if route.single is not None:
            delta = F.linear(F.linear(x, self.lora_A[route.single]), self.lora_B[route.single])
            return out_BTO + (delta * self.scaling[route.single]).to(out_BTO.dtype)
        slots_B = route.slots_B
        assert slots_B is not None and slots_B.shape[0] == x.shape[0], "route the batch before the forward pass"
        # Rows of the base compute slot 0 and drop it, whatever it holds.
        safe_B = slots_B.clamp(min=0)
        hidden_BTR = torch.bmm(x, self.lora_A[safe_B].transpose(1, 2))
        delta_BTO = torch.bmm(hidden_BTR, self.lora_B[safe_B].transpose(1, 2))
        scaled_BTO = (delta_BTO * self.scaling[safe_B][:, None, None]).to(out_BTO.dtype)
        return out_BTO + torch.where((slots_B >= 0)[:, None, None], scaled_BTO, 0)


class AdapterBank:
    """The banked modules of one model, and the routing of its rows."""

    def __init__(self, modules: dict[str, BankedLinear], route: Route, names: list[str]) -> None:
        self.modules = modules
        self.route = route
        self.names = names
        self._slot = {name: slot for slot, name in enumerate(names)}

    def slot(self, name: str | None) -> int:
        """Slot of an adapter; None is the bare base."""
        return BASE_SLOT if name is None else self._slot[name]

    def route_rows(self, names: Sequence[str | None], device: torch.device) -> None:
        """Route row i of the next forward passes to adapter names[i] (None: the bare base)."""
        slots = [self.slot(name) for name in names]
        self.route.single = slots[0] if len(set(slots)) == 1 else None
        self.route.slots_B = torch.tensor(slots, dtype=torch.long, device=device)

    def parameters(self) -> list[nn.Parameter]:
        """The slots' parameters, in the order of the modules."""
        return [parameter for module in self.modules.values() for parameter in (module.lora_A, module.lora_B)]


def _attach(
    model: nn.Module, targets: Sequence[str], names: Sequence[str], rank: int, dtype: torch.dtype | None
) -> AdapterBank:
    route = Route()
    banked: dict[str, BankedLinear] = {}
    for target in targets:
        parent_name, _, child_name = target.rpartition(".")
        parent = model.get_submodule(parent_name)
        linear = getattr(parent, child_name)
        module = BankedLinear(linear, len(names), rank, route, dtype or linear.weight.dtype)
        setattr(parent, child_name, module)
        banked[target] = module
    return AdapterBank(banked, route, list(names))


def load_bank(model: nn.Module, adapters: Mapping[str, LoraWeights]) -> AdapterBank:
    """Put frozen adapters on a frozen model for inference; the model's linear modules are replaced in place.

    Args:
        model: a causal LM on one device.
        adapters: by slot name; may differ in rank, scaling and adapted modules.

    Raises:
        ValueError: an adapter names a module that the model lacks, that is no nn.Linear, or of another shape.
    """
    rank = max((weights.max_rank for weights in adapters.values()), default=1)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = sorted({module for weights in adapters.values() for module in weights.modules})
    for adapter, weights in adapters.items():
        for module, (lora_A, lora_B) in weights.modules.items():
            linear = linears.get(module)
            if linear is None:
                raise ValueError(
                    f"adapter {adapter}: the base has no linear module {module}; it belongs to another base"
                )
            if (linear.out_features, linear.in_features) != (lora_B.shape[0], lora_A.shape[1]):
                raise ValueError(
                    f"adapter {adapter}: {module} is {linear.in_features} -> {linear.out_features} in this base, but "
                    f"{lora_A.shape[1]} -> {lora_B.shape[0]} in the adapter; it belongs to another base"
                )
    bank = _attach(model, targets, list(adapters), rank, None)
    with torch.no_grad():
        for name, weights in adapters.items():
            slot = bank.slot(name)
            for module, (lora_A, lora_B) in weights.modules.items():
                banked = bank.modules[module]
                banked.lora_A[slot, : lora_A.shape[0]].copy_(lora_A)
                banked.lora_B[slot, :, : lora_B.shape[1]].copy_(lora_B)
                banked.scaling[slot] = weights.scaling[module]
    for parameter in bank.parameters():
        parameter.requires_grad_(False)
    return bank


def new_bank(
    model: nn.Module, names: Sequence[str], *, target_modules: Sequence[str], rank: int, alpha: float
) -> AdapterBank:
    """Put trainable slots on every linear module whose last name is in `target_modules`; freezes the rest.

    The weights are zero until `initial_weights` are copied in.

    Raises:
        ValueError: a target name matches no linear module of the model.
    """
    model.requires_grad_(False)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in target_modules:
        if not any(name.rsplit(".", 1)[-1] == target for name in linears):
            present = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise ValueError(
                f"lora.target_modules: no linear module {target!r} in the base; it has {', '.join(present)}"
            )
    targets = [name for name in linears if name.rsplit(".", 1)[-1] in target_modules]
    bank = _attach(model, targets, names, rank, None)
    for module in bank.modules.values():
        module.scaling.fill_(alpha / rank)
    return bank


def initial_weights(
    shapes: Mapping[str, tuple[int, int]], rank: int, seed: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A new adapter: A is Kaiming-uniform, B is zero (LoRA, arXiv 2106.09685), float32 on the CPU.

    Args:
        shapes: (out, in) by module name.
        rank: r of A [r, in] and B [out, r].
        seed: the adapter's own; the result does not depend on other adapters.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (num_out, num_in) in shapes.items():
        bound = 1 / math.sqrt(num_in)  # kaiming_uniform_(a=sqrt(5)), as PEFT and nn.Linear do
        lora_A = (torch.rand(rank, num_in, generator=generator) * 2 - 1) * bound
        weights[name] = (lora_A, torch.zeros(num_out, rank))
    return weights
