"""What a LoRA student may have in its passes beside its factors: weight noise (Flat-LoRA), a sketch of inputs (EVA).

Both work on the student's own tokens, so it rides in a gang with others, and both are a function of its own seed and
step: a resumed student, and every rank that shares its batch, draws the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from translora.config import LoraSettings
from translora.lora.bank import AdapterBank
from translora.lora.banked import Factors
from translora.run.files import derive_seed

OVERSAMPLED = 8
"""Columns that a sketch has beyond twice the rank that is asked of it."""


class WeightNoise:
    """Gaussian noise on one module's weights, drawn anew in each step and never stored (Flat-LoRA, arXiv 2409.14396).

    A student that is good with noise on all of W, and not on its few weights alone, is in a flat place of the whole
    space: E_ij ~ N(0, sigma^2 |W_i|^2 / in). The paper has the norm of a row of W + s B A; a LoRA's part of it is
    small, and W is frozen and partitioned, so its own norm is measured once.

    Args:
        norms_O: |W_i| of the module's rows, [out].
        num_in: columns of W.
        sigma: at its greatest.
        seed: of the student and module.
    """

    def __init__(self, norms_O: torch.Tensor, num_in: int, sigma: float, seed: int) -> None:
        self.scale_O, self.num_in, self.most, self.seed = norms_O / math.sqrt(num_in), num_in, sigma, seed
        self.begin(0, 1)

    def begin(self, step: int, num_steps: int) -> None:
        """Begin a step: sigma rises from 0 along half a cosine."""
        self.step, self.sigma = step, self.most * (1 - math.cos(math.pi * step / num_steps)) / 2

    def matrix(self, like: torch.Tensor) -> torch.Tensor:
        """E [out, in] of the present step, in the dtype and on the device of a tensor."""
        generator = torch.Generator(like.device).manual_seed(derive_seed(self.seed, self.step))
        shape = (len(self.scale_O), self.num_in)
        noise_OI = torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
        return noise_OI.mul_((self.sigma * self.scale_O[:, None]).to(like))


def sketch_width(num_in: int, rank: int) -> int:
    """Columns of a sketch."""
    return min(2 * rank + OVERSAMPLED, num_in)


def sketch_bytes(num_in: int, rank: int) -> int:
    """What a sketch takes: Omega, Y, the inputs' sum and number."""
    return 8 * (2 * num_in * sketch_width(num_in, rank) + num_in + 1)


class InputSketch:
    """The principal components of one module's inputs X [S, in], from one pass over them.

    EVA (arXiv 2410.07170) begins with A = the first components of the module's inputs. Here they are the eigenvectors
    of the covariance, from Y = X^T X Omega with a random Omega (Nystrom's method, arXiv 1706.05736): the memory is that
    of a few LoRAs, and nothing is decomposed that is larger. All in float64: a few tokens of some bases are thousands
    of times as large as the others.

    Args:
        num_in: columns of X.
        rank: components that are wanted.
        seed: of the student and module.
        place: device.
    """

    def __init__(self, num_in: int, rank: int, seed: int, place: torch.device) -> None:
        self.rank, width = rank, sketch_width(num_in, rank)
        generator = torch.Generator().manual_seed(seed)
        omega_IW = torch.randn(num_in, width, generator=generator, dtype=torch.float64)
        self.omega_IW = torch.linalg.qr(omega_IW)[0].to(place)
        self.product_IW = torch.zeros_like(self.omega_IW)
        self.sum_I = self.omega_IW.new_zeros(num_in)
        self.count = self.omega_IW.new_zeros(1)

    def update(self, x_SI: torch.Tensor) -> None:
        """Add inputs."""
        x_SI = x_SI.double()
        self.product_IW.addmm_(x_SI.T, x_SI @ self.omega_IW)
        self.sum_I += x_SI.sum(dim=0)
        self.count += len(x_SI)

    def all_reduce(self, group: dist.ProcessGroup) -> None:
        """Add what the other ranks of a group saw."""
        for tensor in (self.product_IW, self.sum_I, self.count):
            dist.all_reduce(tensor, group=group)

    def principal_components(self) -> torch.Tensor:
        """Unit rows [rank, in] by falling variance; fewer, where the inputs vary in fewer directions."""
        mean_I = self.sum_I / self.count.clamp(min=1)
        Y_IW = self.product_IW - self.count * mean_I[:, None] * (mean_I @ self.omega_IW)
        shift = torch.finfo(torch.float64).eps * self.product_IW.norm()  # keeps the root of the core real
        Y_IW = Y_IW + shift * self.omega_IW
        values_W, vectors_WW = torch.linalg.eigh(self.omega_IW.T @ Y_IW)
        root_IW = Y_IW @ vectors_WW / values_W.clamp(min=float(shift) or 1.0).sqrt()
        U_IW, sizes_W, _ = torch.linalg.svd(root_IW, full_matrices=False)
        found = int((sizes_W**2 > 100 * shift).sum())
        return U_IW[:, : min(found, self.rank)].T.float()


class ModuleHook:
    """What a student has in one module; see translora.lora.banked.SegmentHook."""

    def __init__(self, noise: WeightNoise | None, sketch: InputSketch | None) -> None:
        self.noise, self.sketch = noise, sketch

    def tensors(self) -> list[torch.Tensor]:
        """What it holds between passes."""
        held = [*vars(self.noise).values()] if self.noise is not None else []
        held += vars(self.sketch).values() if self.sketch is not None else ()
        return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]

    def forward(self, x_SI: torch.Tensor) -> torch.Tensor | None:
        """See the inputs; E x, which noise adds to the outputs."""
        if self.sketch is not None:
            self.sketch.update(x_SI)
        return None if self.noise is None else x_SI @ self.noise.matrix(x_SI).T

    def backward(self, grad_SO: torch.Tensor) -> torch.Tensor | None:
        """E^T g, which noise adds to the gradient of the inputs."""
        return None if self.noise is None else grad_SO @ self.noise.matrix(grad_SO)


@dataclass(frozen=True)
class StudentHooks:
    """The hooks of one student by module; none where no option asks for any."""

    by_module: Mapping[str, ModuleHook] = field(default_factory=dict)

    @property
    def have_sketches(self) -> bool:
        """Whether the first step is to look at the inputs."""
        return any(hook.sketch is not None for hook in self.by_module.values())

    def tensors(self) -> list[torch.Tensor]:
        """What they hold between passes."""
        return [tensor for hook in self.by_module.values() for tensor in hook.tensors()]

    def begin(self, step: int, num_steps: int) -> None:
        """Begin a step; the inputs of the first alone are looked at."""
        for hook in self.by_module.values():
            if hook.noise is not None:
                hook.noise.begin(step, num_steps)
            if step > 0:
                hook.sketch = None

    def initialise(self, weights: Mapping[str, Factors], group: dist.ProcessGroup | None) -> None:
        """Make each module's A the components of its inputs, of all ranks together.

        Rows for which there is no component stay random.
        """
        for name, hook in self.by_module.items():
            if hook.sketch is None:
                continue
            lora_A = weights[name][0]
            if group is not None:
                hook.sketch.all_reduce(group)
            found_RI = hook.sketch.principal_components()
            lora_A[: len(found_RI)] = found_RI
            if group is not None:  # a decomposition's signs are not the same on every device
                dist.broadcast(lora_A, src=dist.get_global_rank(group, 0), group=group)


def student_hooks(
    lora: LoraSettings,
    shapes: Mapping[str, tuple[int, int]],
    norms: Mapping[str, torch.Tensor],
    seed: int,
    place: torch.device,
) -> StudentHooks:
    """What the options of a LoRA ask for.

    Args:
        shapes: (out, in) by module.
        norms: see `row_norms`; for the noise alone.
        seed: the student's.
    """
    by_module = {}
    for name, (_, num_in) in shapes.items():
        noise = sketch = None
        if lora.flat_sigma:
            noise = WeightNoise(norms[name], num_in, lora.flat_sigma, derive_seed(seed, "flat", name))
        if lora.init == "eva":
            sketch = InputSketch(num_in, lora.total_rank, derive_seed(seed, "eva", name), place)
        if noise is not None or sketch is not None:
            by_module[name] = ModuleHook(noise, sketch)
    return StudentHooks(by_module)


def row_norms(bank: AdapterBank) -> dict[str, torch.Tensor]:
    """The norm of each row of the adapted weights [out], by module. Collective: gathers partitioned weights."""
    import deepspeed  # only here: a plan knows of hooks, and needs no DeepSpeed

    norms: dict[str, torch.Tensor] = {}
    for name, module in bank.modules.items():
        with deepspeed.zero.GatheredParameters([module.base.weight]):
            norms[name] = module.base.weight.detach().float().norm(dim=1)
    return norms
