"""The adapter bank: N LoRA adapters resident on one frozen base, each part of a batch routed to its own.

Discriminators, teachers and students are all slots of a bank. A batch is routed in one of two ways:
  rows      [B, T, in], row i belongs to slot slots_B[i]: batched matmuls over a module's stacks A [M, r, in] and
            B [M, out, r], of those that adapt it; smaller ranks are padded with zeros. Inference.
  segments  [1, T, in], adapter-major: tokens start..end belong to a slot. Each segment meets only its own A [r, in]
            and B [out, r], in their own shapes, so that no neighbour changes a bit of its result. Training.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from translora.bundle.modules import adaptable, linears
from translora.errors import InputError
from translora.lora.banked import BASE_SLOT, BankedLinear, Factors, Route, Segment, SegmentHook, Slot
from translora.lora.peft_io import LoraWeights
from translora.lora.targets import resolve_targets


class AdapterBank:
    """The banked modules of one model, and the routing of its batches."""

    def __init__(self, modules: dict[str, BankedLinear], route: Route, names: Sequence[str] = ()) -> None:
        self.modules = modules
        self.route = route
        self.names = list(names)
        self._slot = {name: slot for slot, name in enumerate(names)}

    def slot(self, name: str | None) -> int:
        """Slot of an adapter; None is the bare base."""
        return BASE_SLOT if name is None else self._slot[name]

    def route_rows(self, names: Sequence[str | None], device: torch.device) -> None:
        """Route row i of the next forward passes to adapter names[i] (None: the bare base)."""
        slots = [self.slot(name) for name in names]
        self.route.segments = ()
        self.route.single = slots[0] if len(set(slots)) == 1 else None
        self.route.slots_B = torch.tensor(slots, dtype=torch.long, device=device)

    def route_segments(self, segments: Sequence[Segment]) -> None:
        """Route the tokens of the next packed batch [1, T]; the segments are adjacent and cover it."""
        self.route.segments = tuple(segments)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) by module name."""
        return {name: (module.base.out_features, module.base.in_features) for name, module in self.modules.items()}

    def open_slot(
        self,
        slot: int,
        factors: Mapping[str, Factors],
        scaling: float,
        gradients: Mapping[str, Factors] | None = None,
        hooks: Mapping[str, SegmentHook] = MappingProxyType({}),
    ) -> None:
        """Put an adapter into a slot: A [r, in] and B [out, r] by module name.

        Args:
            factors: in the base's dtype.
            gradients: float32, of the same shapes: where backward passes add the factors' gradients.
            hooks: by module name, where the student has any.
        """
        for name, (lora_A, lora_B) in factors.items():
            grad_A, grad_B = (None, None) if gradients is None else gradients[name]
            self.modules[name].slots[slot] = Slot(lora_A, lora_B, scaling, grad_A, grad_B, hooks.get(name))

    def close_slot(self, slot: int) -> None:
        """Take an adapter out of its slot."""
        for module in self.modules.values():
            module.slots.pop(slot, None)

    @contextlib.contextmanager
    def aside(self, model: nn.Module) -> Iterator[None]:
        """The model with its own linear modules for as long as the context lasts; the adapters stay in memory."""
        for name, module in self.modules.items():
            model.set_submodule(name, module.base)
        try:
            yield
        finally:
            for name, module in self.modules.items():
                model.set_submodule(name, module)

    def detach(self, model: nn.Module) -> None:
        """Give the model its own linear modules back; the bank is not used any more."""
        for name, module in self.modules.items():
            model.set_submodule(name, module.base)
        self.modules = {}


def _attach(model: nn.Module, targets: Sequence[str], names: Sequence[str] = ()) -> AdapterBank:
    route = Route()
    banked: dict[str, BankedLinear] = {}
    for target in targets:
        parent_name, _, child_name = target.rpartition(".")
        parent = model.get_submodule(parent_name)
        banked[target] = BankedLinear(getattr(parent, child_name), route)
        setattr(parent, child_name, banked[target])
    return AdapterBank(banked, route, names)


def load_bank(model: nn.Module, adapters: Mapping[str, LoraWeights]) -> AdapterBank:
    """Put frozen adapters on a frozen model for inference; the model's linear modules are replaced in place.

    Args:
        model: a causal LM on one device.
        adapters: by slot name; may differ in rank, scaling and adapted modules.

    Raises:
        InputError: an adapter names a module that the model lacks, that is no nn.Linear, or of another shape.
    """
    modules = linears(model)
    ranks: dict[str, dict[int, int]] = {}
    for slot, (adapter, weights) in enumerate(adapters.items()):
        for module, (lora_A, lora_B) in weights.modules.items():
            ranks.setdefault(module, {})[slot] = len(lora_A)
            linear = modules.get(module)
            if linear is None:
                raise InputError(
                    f"adapter {adapter}: the base has no linear module {module}; it belongs to another base"
                )
            if (linear.out_features, linear.in_features) != (lora_B.shape[0], lora_A.shape[1]):
                raise InputError(
                    f"adapter {adapter}: {module} is {linear.in_features} -> {linear.out_features} in this base, but "
                    f"{lora_A.shape[1]} -> {lora_B.shape[0]} in the adapter; it belongs to another base"
                )
    bank = _attach(model, sorted(ranks), list(adapters))
    try:
        for module, banked in bank.modules.items():
            banked.stack(list(ranks[module]), len(adapters), max(ranks[module].values()))
    except RuntimeError:  # out of memory
        bank.detach(model)
        raise
    for name, weights in adapters.items():
        for module, factors in weights.modules.items():
            bank.modules[module].fill(bank.slot(name), *factors, weights.scaling[module])
    return bank


def empty_bank(model: nn.Module, ranks: Mapping[str, int]) -> AdapterBank:
    """A bank for inference of one adapter of zeros, named "", with these ranks by module; its memory is looked at."""
    bank = _attach(model, sorted(ranks), [""])
    for module, banked in bank.modules.items():
        banked.stack([0], 1, ranks[module])
        banked.slots[0] = Slot(banked.lora_A[0], banked.lora_B[0], 1.0)
    return bank


def new_bank(model: Any, target_modules: Sequence[str] | str) -> AdapterBank:
    """Prepare the linear modules that `target_modules` name for training; freezes the whole model.

    The bank has no slots yet: `open_slot` fills one with `initial_weights`.

    Args:
        model: a causal LM.
        target_modules: see translora.lora.targets.

    Raises:
        InputError: a target name matches no linear module of the model.
    """
    model.requires_grad_(False)
    return _attach(model, resolve_targets(adaptable(model), target_modules, "the base", "lora.target_modules"))


def initial_weights(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, Factors]:
    """A new adapter: A is Kaiming-uniform, B is zero (LoRA, arXiv 2106.09685), float32 on the CPU.

    Args:
        shapes: (out, in) by module name.
        rank: r of A [r, in] and B [out, r].
        seed: the adapter's own; the result does not depend on other adapters.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Factors] = {}
    for name, (num_out, num_in) in shapes.items():
        bound = 1 / math.sqrt(num_in)  # kaiming_uniform_(a=sqrt(5)), as PEFT and nn.Linear do
        lora_A = (torch.rand(rank, num_in, generator=generator) * 2 - 1) * bound
        weights[name] = (lora_A, torch.zeros(num_out, rank))
    return weights
