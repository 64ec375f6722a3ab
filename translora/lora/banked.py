"""A linear module of the bank: the frozen base plus, for each row or each segment of a batch, its own LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

BASE_SLOT = -1
"""Rows and segments routed here get the frozen base alone."""
Factors = Sequence[torch.Tensor]
"""A [r, in] and B [out, r] of one module, or their gradients."""


class Segment(NamedTuple):
    """Tokens start..end (exclusive) of a packed batch, and their slot."""

    slot: int
    start: int
    end: int


class SegmentHook(Protocol):
    """What a student in training has in a module beside its factors; see translora.distill.hooks."""

    def forward(self, x_SI: torch.Tensor) -> torch.Tensor | None:
        """Sees the inputs of a segment [S, in]; what is added to its outputs [S, out], if anything."""

    def backward(self, grad_SO: torch.Tensor) -> torch.Tensor | None:
        """What that adds to the gradient of the inputs [S, in], from that of the outputs [S, out]."""


class Slot(NamedTuple):
    """One adapter's part of one module: A [r, in] and B [out, r] in the base's dtype.

    In training a backward pass adds the gradients to `grad_A` and `grad_B`, float32, of the factors' shapes.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float
    grad_A: torch.Tensor | None = None
    grad_B: torch.Tensor | None = None
    hook: SegmentHook | None = None


class Route:
    """Who owns what in the batch that is being computed; shared by every module of a bank."""

    def __init__(self) -> None:
        self.slots_B: torch.Tensor | None = None
        self.single: int | None = None
        self.segments: tuple[Segment, ...] = ()
        self.anchor = torch.zeros((), requires_grad=True)
        """Gives a first layer, whose input is frozen, a backward pass."""


Part = tuple[slice, Slot | None]
"""Tokens of a packed batch and what they meet in one module; None is the base alone."""


class SegmentLora(torch.autograd.Function):
    """out + scaling * B A x for each part, with its own factors.

    Written by hand: autograd of slices costs a zero-filled copy of the whole batch per part, and its accumulation of
    float32 gradients two more passes over every factor. Here backward adds to the slots' own gradients, each in one
    operation. out [1, T, out] and x [1, T, in] are of the base's dtype; out is changed in place.
    """

    @staticmethod
    def forward(
        ctx: Any, out_1TO: torch.Tensor, x_1TI: torch.Tensor, anchor: torch.Tensor, parts: Sequence[Part]
    ) -> torch.Tensor:
        """Each part's addmm goes straight into the base's output."""
        x_TI, out_TO = x_1TI[0], out_1TO[0]
        hidden = []
        for where, slot in parts:
            if slot is not None:
                hidden_SR = x_TI[where] @ slot.lora_A.T
                out_TO[where].addmm_(hidden_SR, slot.lora_B.T, alpha=slot.scaling)
                hidden.append(hidden_SR)
                if slot.hook is not None and (added_SO := slot.hook.forward(x_TI[where])) is not None:
                    out_TO[where].add_(added_SO)
        ctx.save_for_backward(x_TI, *hidden)
        ctx.parts = parts
        ctx.mark_dirty(out_1TO)
        return out_1TO

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the base's output (unchanged) and of x; those of the factors go to their slots."""
        (grad_1TO,) = grads
        x_TI, *saved = ctx.saved_tensors
        hidden = iter(saved)
        grad_TO = grad_1TO[0]
        grad_x_TI = torch.empty_like(x_TI) if ctx.needs_input_grad[1] else None
        for where, slot in ctx.parts:
            if slot is None:
                if grad_x_TI is not None:
                    grad_x_TI[where] = 0
                continue
            grad_SO, hidden_SR = grad_TO[where], next(hidden)
            grad_SR = grad_SO @ slot.lora_B
            if slot.grad_A is not None and slot.grad_B is not None:
                slot.grad_A.add_(grad_SR.T @ x_TI[where], alpha=slot.scaling)
                slot.grad_B.add_(grad_SO.T @ hidden_SR, alpha=slot.scaling)
            if grad_x_TI is not None:
                own = grad_x_TI[where]
                torch.addmm(own, grad_SR, slot.lora_A, beta=0, alpha=slot.scaling, out=own)
                if slot.hook is not None and (added_SI := slot.hook.backward(grad_SO)) is not None:
                    own.add_(added_SI)
        return grad_1TO, None if grad_x_TI is None else grad_x_TI[None], None, None


class BankedLinear(nn.Module):
    """A frozen linear module plus the bank's slots for it.

    The factors are plain tensors, not parameters: ZeRO-3 partitions and gathers the base and never sees them.
    """

    def __init__(self, base: nn.Linear, route: Route) -> None:
        super().__init__()
        self.base = base
        self.route = route
        self.slots: dict[int, Slot] = {}
        """Each slot's own factors; where there are stacks, views of them."""
        self.lora_A = self.lora_B = self.scaling = self.places = torch.empty(0)
        self.own_places: dict[int, int] = {}

    @property
    def weight(self) -> torch.Tensor:
        """The base's own, which some blocks ask for its dtype (T5's)."""
        return self.base.weight

    def stack(self, slots: Sequence[int], num_slots: int, rank: int) -> None:
        """Allocate stacks of zeros for routing by rows, for those M of the bank's N slots that adapt this module.

        lora_A is [M + 1, r, in], lora_B [M + 1, out, r], scaling [M + 1]. `places` [N + 1] leads from a slot to its
        place in them; all other slots, and the bare base, are led to the last place, which stays zero.
        """
        kwargs: Any = {"dtype": self.base.weight.dtype, "device": self.base.weight.device}
        self.lora_A = torch.zeros(len(slots) + 1, rank, self.base.in_features, **kwargs)
        self.lora_B = torch.zeros(len(slots) + 1, self.base.out_features, rank, **kwargs)
        self.scaling = torch.ones(len(slots) + 1, device=self.base.weight.device)
        self.own_places = {slot: place for place, slot in enumerate(slots)}
        everyone = [self.own_places.get(slot, len(slots)) for slot in range(num_slots)]
        self.places = torch.tensor([*everyone, len(slots)], device=self.base.weight.device)

    def fill(self, slot: int, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> None:
        """Copy an adapter's factors, of the stacks' rank or less, to the place of its slot."""
        place, rank = self.own_places[slot], len(lora_A)
        self.slots[slot] = Slot(self.lora_A[place, :rank], self.lora_B[place, :, :rank], scaling)
        self.slots[slot].lora_A.copy_(lora_A)
        self.slots[slot].lora_B.copy_(lora_B)
        self.scaling[place] = scaling

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """W x + scaling * B A x, with A and B of each row's or segment's slot; x is [B, T, in]."""
        out_BTO = self.base(x_BTI)
        route = self.route
        if route.segments:
            assert route.segments[-1].end == x_BTI.shape[1] and len(x_BTI) == 1, "route the batch before the pass"
            parts = [(slice(start, end), self.slots.get(slot)) for slot, start, end in route.segments]
            if all(slot is None for _, slot in parts):
                return out_BTO
            result: torch.Tensor = SegmentLora.apply(out_BTO, x_BTI, route.anchor, parts)
            return result
        if route.single is not None:
            if (own := self.slots.get(route.single)) is None:
                return out_BTO
            hidden_BTR = F.linear(x_BTI, own.lora_A) * own.scaling
            return torch.addmm(out_BTO.flatten(0, 1), hidden_BTR.flatten(0, 1), own.lora_B.T).view_as(out_BTO)
        assert route.slots_B is not None and len(route.slots_B) == len(x_BTI), "route the batch before the forward pass"
        places_B = self.places[route.slots_B.to(self.places.device)]  # a base may be spread over GPUs
        hidden_BTR = torch.bmm(x_BTI, self.lora_A[places_B].transpose(1, 2))
        hidden_BTR = (hidden_BTR * self.scaling[places_B][:, None, None]).to(x_BTI.dtype)
        return torch.baddbmm(out_BTO, hidden_BTR, self.lora_B[places_B].transpose(1, 2))
