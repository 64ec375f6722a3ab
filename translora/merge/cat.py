"""CAT with learned coefficients (LoRA Soups, arXiv 2410.13025).

A module of the merged model has the update sum_i alpha_i s_i B_i A_i: one scalar an adapter and module is trained on a
small mixture of the skills' data, everything else is frozen. The result is exported by PEFT's `cat` as one plain
adapter of rank sum r_i.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from translora.config.merge import CatSettings
from translora.distill.data import Sample, batch_indices, num_steps
from translora.errors import InputError
from translora.lora.peft_io import LoraWeights
from translora.merge.data import pad_batch
from translora.merge.peft_methods import Merged, combine, exact

logger = logging.getLogger(__name__)


class CatLinear(nn.Module):
    """W x + sum_i alpha_i s_i B_i A_i x, alpha = softmax(logits) or free; the adapters stacked to one A and one B.

    An adapter that does not have the module keeps its share alpha_i of nothing.
    """

    def __init__(self, base: nn.Linear, name: str, loras: Sequence[LoraWeights], softmax: bool) -> None:
        super().__init__()
        self.base, self.softmax = base, softmax
        pairs = [lora.modules.get(name) for lora in loras]
        present = [(lora, pair) for lora, pair in zip(loras, pairs, strict=True) if pair is not None]
        self.lora_A = torch.cat([lora_A for _, (lora_A, _) in present]).to(base.weight)
        self.lora_B = torch.cat([lora_B * lora.scaling[name] for lora, (_, lora_B) in present], 1).to(base.weight)
        ranks = torch.tensor([0 if pair is None else len(pair[0]) for pair in pairs])
        self.owner_R = torch.repeat_interleave(torch.arange(len(loras)), ranks).to(base.weight.device)
        start = torch.zeros(len(loras)) if softmax else torch.full((len(loras),), 1 / len(loras))
        self.values_N = nn.Parameter(start.to(base.weight.device, torch.promote_types(base.weight.dtype, start.dtype)))

    @property
    def alpha_N(self) -> torch.Tensor:
        """The coefficients, one an adapter."""
        return self.values_N.softmax(0) if self.softmax else self.values_N

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] to [..., out]."""
        hidden = F.linear(x.to(self.lora_A.dtype), self.lora_A) * self.alpha_N[self.owner_R].to(self.lora_A.dtype)
        out: torch.Tensor = self.base(x)
        return out + F.linear(hidden, self.lora_B).to(out.dtype)


@dataclass(frozen=True)
class Coefficients:
    """What CAT learnt."""

    by_module: dict[str, list[float]]
    """alpha_i of each module, in the adapters' order."""
    losses: list[float]
    """Mean loss of an answer's token at each step, before the step."""


@contextmanager
def cat_modules(model: nn.Module, adapters: Sequence[LoraWeights], softmax: bool) -> Iterator[dict[str, CatLinear]]:
    """Have the adapters on the frozen base while the block runs, their coefficients uniform and trainable.

    Raises:
        InputError: an adapter names a module that the base lacks.
    """
    model.requires_grad_(False)
    names = sorted({name for adapter in adapters for name in adapter.modules})
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    missing = [name for name in names if name not in linears]
    if missing:
        raise InputError(f"the base has no linear module {missing[0]}; the adapter belongs to another base")
    modules = {name: CatLinear(linears[name], name, adapters, softmax) for name in names}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield modules
    finally:
        for name in names:
            model.set_submodule(name, linears[name])


def answer_loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens; `labels` [B, T] are -100 elsewhere."""
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=-100)


def with_answers(data: Sequence[Sample]) -> list[Sample]:
    """Those samples that can be learnt from; says how many are left out.

    Raises:
        InputError: there is none.
    """
    answered = [sample for sample in data if sample.answer_ids]
    if not answered:
        raise InputError("data: no row has an answer, and cat learns from answers; give rows with `answer` or `target`")
    if len(answered) < len(data):
        logger.warning("cat: %d of %d rows have no answer and are left out", len(data) - len(answered), len(data))
    return answered


def train_coefficients(
    model: nn.Module,
    adapters: Sequence[LoraWeights],
    data: Sequence[Sample],
    settings: CatSettings,
    *,
    pad_token_id: int = 0,
    seed: int = 0,
) -> Coefficients:
    """Learn alpha_i of every module on `data`: Delta W = sum_i alpha_i s_i B_i A_i, alpha uniform (1/N) at first.

    Args:
        model: the causal LM, whole on its device(s); frozen, else left as it was.
        adapters: N of them, any ranks, scalings and modules.
        data: the mixture: a small share of each skill's samples (paper: 5 %), the loss is on the answers.
        settings: AdamW without weight decay, linear decay of the learning rate.
        pad_token_id: what rows are filled up with.
        seed: of the order of the samples.

    Raises:
        InputError: there is no answer in `data` to learn from, or the loss is not finite.
    """
    data = with_answers(data)
    steps = num_steps(len(data), settings.epochs, settings.batch_size)
    losses: list[float] = []
    with cat_modules(model, adapters, settings.coefficients == "softmax") as modules:
        parameters = [module.values_N for module in modules.values()]
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        place = parameters[0].device
        for step in range(steps):
            chosen = [data[index] for index in batch_indices(len(data), settings.batch_size, step, seed)]
            batch = pad_batch(chosen, pad_token_id, with_labels=True)
            loss = answer_loss(model, {key: value.to(place) for key, value in batch.items()})
            if not torch.isfinite(loss):
                raise InputError(f"cat: the loss is {loss.item()} at step {step}; lower cat.learning_rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        found = {name: module.alpha_N.detach().tolist() for name, module in modules.items()}
    return Coefficients(found, losses)


def export(adapters: Sequence[LoraWeights], by_module: Mapping[str, Sequence[float]]) -> Merged:
    """The merged adapter, A [R, in] and B [out, R] by module of rank sum r_i, by PEFT's `cat`.

    Each adapter's B is multiplied by its coefficient of the module first, so PEFT's one weight an adapter is 1.
    """
    scaled = [
        LoraWeights(
            modules={name: (A, exact(B) * by_module[name][index]) for name, (A, B) in adapter.modules.items()},
            scaling=adapter.scaling,
            config=adapter.config,
        )
        for index, adapter in enumerate(adapters)
    ]
    return combine(scaled, [1.0] * len(scaled), "static_cat")
