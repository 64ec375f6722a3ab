"""One adapter in training, with everything that is its own."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from translora.config import TrainConfig
from translora.distill.data import Sample, batch_indices, check_links, num_steps
from translora.distill.hooks import StudentHooks
from translora.distill.job import RECIPE, TrainJob
from translora.distill.options import LoraProAdamW, riemannian, update_rates
from translora.distill.slots import Slots
from translora.lora.banked import Factors
from translora.run.files import replace_directory

logger = logging.getLogger(__name__)
MOMENTS = ("exp_avg", "exp_avg_sq")


class Student:
    """One adapter in training: its samples, its weights and its AdamW.

    All weights lie in one flat float32 parameter, their gradients in its gradient: one norm to clip, one optimizer
    step. Passes use a copy of it in the slots' dtype, made anew after each step. `factors` and `gradients` are views
    of the copy and of the gradient, in the shapes of `weights`: A [r, in] and B [out, r] by module for a LoRA.
    """

    def __init__(
        self,
        job: TrainJob,
        recipe: str,
        samples: list[Sample],
        weights: Mapping[str, Factors],
        config: TrainConfig,
        place: torch.device,
        dtype: torch.dtype,
        hooks: StudentHooks = StudentHooks(),  # noqa: B008 (has no state)
    ) -> None:
        self.job, self.recipe, self.samples = job, recipe, samples
        self.config = job.settings(config)
        self.num_steps = num_steps(len(samples), job.epochs, config.batch_size)
        self.shapes = {name: [factor.shape for factor in factors] for name, factors in weights.items()}
        tensors = [factor.flatten() for factors in weights.values() for factor in factors]
        self.flat = nn.Parameter(torch.cat(tensors).float().to(place))
        self.flat.grad = torch.zeros_like(self.flat)
        self.working = self.flat.detach().to(dtype)
        self.factors, self.gradients = self._views(self.working), self._views(self.flat.grad)
        self.optimizer = self._make_optimizer()
        self.num_links = 1 if job.peft is not None else self.config.lora.num_links
        self.hooks = hooks
        self.num_init_steps = int(hooks.have_sketches and self.num_steps > 1)
        """Steps before the first update, which only see the inputs."""
        check_links(self.num_links, self.num_steps, self.num_init_steps, job.name)
        if hooks.have_sketches and not self.num_init_steps:
            logger.warning("%s: has one step in all, and none for eva: A begins at random", job.name)
        self.rates: torch.Tensor | None = None
        """What each weight's update is multiplied with, where an option asks for it (see translora.distill.options)."""
        self.rated_link = -1
        """The link that `rates` are of."""
        self.losses: list[float] = []
        self.loss = torch.zeros((), device=place)
        self.start = time.monotonic()

    def _views(self, flat: torch.Tensor) -> dict[str, Factors]:
        """The weights by name, as views of a flat tensor."""
        shapes = [shape for own in self.shapes.values() for shape in own]
        pieces = flat.detach().split([shape.numel() for shape in shapes])
        views = iter([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)])
        return {name: [next(views) for _ in own] for name, own in self.shapes.items()}

    def _make_optimizer(self) -> torch.optim.Optimizer:
        rate, lora = self.job.learning_rate, self.config.lora
        if self.job.peft is None and lora.gradient == "lora-pro":
            return LoraProAdamW(self.flat, lora, self._views(self.flat), self.gradients, rate)
        return torch.optim.AdamW([self.flat], lr=rate, weight_decay=0.0, fused=True)

    def _refresh(self) -> None:
        """Copy the weights for the next passes; nothing to do in float32: there both are one."""
        if self.working.dtype != self.flat.dtype:
            self.working.copy_(self.flat.detach())

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return len(self.losses)

    @property
    def is_done(self) -> bool:
        """Whether all steps are done."""
        return self.step == self.num_steps

    def begin_step(self) -> None:
        """Tell the hooks of the step whose passes come next."""
        self.hooks.begin(self.step, self.num_steps)

    def batch(self) -> list[Sample]:
        """The samples of the next step."""
        order = batch_indices(len(self.samples), self.config.batch_size, self.step, self.job.seed)
        return [self.samples[index] for index in order]

    def update(self, group: dist.ProcessGroup | None) -> None:
        """One AdamW step on the gradients of its passes.

        Args:
            group: the ranks that shared its batch, if several did.

        Raises:
            FloatingPointError: loss or gradient is not finite.
        """
        assert self.flat.grad is not None
        if group is not None:
            dist.all_reduce(self.flat.grad, group=group)
            dist.all_reduce(self.loss, group=group)
        self._begin_link()
        loss = float(self.loss)
        norm = float(nn.utils.clip_grad_norm_([self.flat], self.config.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"{self.job.name}: loss {loss}, gradient norm {norm} at step {self.step}; lower the learning rate"
            )
        if self.job.peft is None and self.config.lora.gradient == "riemannian":
            riemannian(self.config.lora, self._views(self.flat), self.gradients, self.link)
            self._rest()
        first, behind = self.first_step(self.link), self.first_step(self.link + 1)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.job.learning_rate * (1 - (self.step - first) / (behind - first))
            parameters["link"] = self.link
        if self.step < self.num_init_steps:
            self.hooks.initialise(self._views(self.flat), group)
        elif self.rates is None:
            self.optimizer.step()
        else:
            before = self.flat.detach().clone()
            self.optimizer.step()
            self.flat.data.sub_(before).mul_(self.rates).add_(before)
        self.optimizer.zero_grad(set_to_none=False)
        self._refresh()
        self.losses.append(loss)
        self.loss.zero_()

    def _begin_link(self) -> None:
        """Find out which weights the options have move in this step; all by default, or where PEFT trains."""
        if self.job.peft is not None:
            return
        if self.link != self.rated_link:  # the first step, a resumed one, or the next link of a chain
            self.rated_link = self.link
            if self.link_steps == 0:
                self.optimizer.state.clear()
            rates = update_rates(self.config.lora, self._views(self.flat), self.job.seed, self.link)
            if rates is not None:
                self.rates = torch.cat([factor.flatten() for factors in rates.values() for factor in factors])
        self._rest()

    def _rest(self) -> None:
        """Have no gradient where no weight moves."""
        if self.rates is not None:
            assert self.flat.grad is not None
            self.flat.grad.mul_(self.rates != 0)

    @property
    def link(self) -> int:
        """Which LoRA of its chain is trained in the next step; 0 where it is no chain."""
        return min(self.step * self.num_links // self.num_steps, self.num_links - 1)

    def first_step(self, link: int) -> int:
        """The step that a link of the chain begins with; behind the last one, the number of steps."""
        return math.ceil(link * self.num_steps / self.num_links)

    @property
    def link_steps(self) -> int:
        """Steps done since AdamW began: each link has one of its own."""
        return max(0, self.step - max(self.num_init_steps, self.first_step(self.link)))

    def state(self) -> dict[str, torch.Tensor]:
        """Flat weights, and AdamW's moments after the first step, to go on from later."""
        moments = {key: self.optimizer.state[self.flat][key] for key in MOMENTS} if self.link_steps else {}
        return {"weights": self.flat.detach(), **moments}

    def restore(self, state: Mapping[str, torch.Tensor], losses: list[float]) -> None:
        """Go on from a `state` and its losses."""
        self.losses = list(losses)
        self.flat.data.copy_(state["weights"])
        self._refresh()
        if self.link_steps:
            moments = {key: state[key].to(self.flat.device) for key in MOMENTS}
            self.optimizer.state[self.flat] = {
                "step": torch.tensor(float(self.link_steps), device=self.flat.device),
                **moments,
            }

    def write(self, slots: Slots, base_model: str) -> None:
        """Write the trained adapter in PEFT's format.

        Raises:
            FloatingPointError: a weight is not finite.
        """
        if not self.flat.isfinite().all():
            raise FloatingPointError(f"{self.job.name}: weights are not finite at the end; lower the learning rate")
        weights = self._views(self.flat.cpu())
        with replace_directory(Path(self.job.output)) as directory:
            slots.write(directory, weights, base_model, self.config.lora)
            (directory / "losses.json").write_text(json.dumps(self.losses))
            (directory / RECIPE).write_text(self.recipe)
