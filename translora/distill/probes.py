"""What a LoRA student may have in its passes beside its factors, module by module: weight noise, a sketch of inputs.

Both work on the student's own tokens, so it rides in a gang with others, and both are a function of its own seed and
step: a resumed student, and every rank that shares its batch, draws the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist

from translora.config import LoraSettings
from translora.lora.bank import AdapterBank, Factors
from translora.run.files import derive_seed

OVERSAMPLED = 8
"""Columns that a sketch has beyond twice the rank that is asked of it."""


class Noise:
    """Gaussian noise on one module's weights, drawn anew in each step and never stored (Flat-LoRA, arXiv 2409.14396).

    A student that is good with noise on all of W, and not on its few weights alone, is in a flat place of the whole
    space: E_ij ~ N(0, sigma^2 |W_i|^2 / in). The paper has the norm of a row of W + s B A; a LoRA's part of it is
    small, and W is frozen and partitioned, so its own norm is measured once.

    Args:
        norms_O: |W_i| of the module's rows, [out].
        num_in: columns of W.
        seed: of the student and module.
    """

    def __init__(self, norms_O: torch.Tensor, num_in: int, seed: int) -> None:
        self.scale_O, self.num_in, self.seed = norms_O / math.sqrt(num_in), num_in, seed
        self.step, self.sigma = 0, 0.0

    def matrix(self, like: torch.Tensor) -> torch.Tensor:
        """E [out, in] of the present step, in the dtype and on the device of a tensor."""
        generator = torch.Generator(like.device).manual_seed(derive_seed(self.seed, self.step))
        shape = (len(self.scale_O), self.num_in)
        noise_OI = torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
        return noise_OI.mul_((self.sigma * self.scale_O[:, None]).to(like))

    def forward(self, x_SI: torch.Tensor) -> torch.Tensor:
        """E x for each token."""
        return x_SI @ self.matrix(x_SI).T

    def backward(self, grad_SO: torch.Tensor) -> torch.Tensor:
        """E^T of the gradient of each token."""
        return grad_SO @ self.matrix(grad_SO)


def sketch_width(num_in: int, rank: int) -> int:
    """Columns of a sketch."""
    return min(2 * rank + OVERSAMPLED, num_in)


def sketch_bytes(num_in: int, rank: int) -> int:
    """What a sketch takes, Omega and Y."""
    return 2 * 4 * num_in * sketch_width(num_in, rank)


class Sketch:
    """The directions in which one module's inputs vary most, from one pass over them (EVA, arXiv 2410.07170).

    EVA begins with A = the first right singular vectors of the inputs X [S, in]. Here these are the eigenvectors of
    X^T X, from Y = X^T X Omega with a random Omega (Nystrom's method, arXiv 1706.05736): the memory is that of a few
    LoRAs, and nothing is decomposed that is larger.

    Args:
        num_in: columns of X.
        rank: directions that are wanted.
        seed: of the student and module.
        place: device.
    """

    def __init__(self, num_in: int, rank: int, seed: int, place: torch.device) -> None:
        self.rank, width = rank, sketch_width(num_in, rank)
        generator = torch.Generator().manual_seed(seed)
        self.omega_IW = torch.linalg.qr(torch.randn(num_in, width, generator=generator))[0].to(place)
        self.sketch_IW = torch.zeros_like(self.omega_IW)

    def note(self, x_SI: torch.Tensor) -> None:
        """Add inputs."""
        x_SI = x_SI.float()
        self.sketch_IW.addmm_(x_SI.T, x_SI @ self.omega_IW)

    def directions(self) -> torch.Tensor:
        """Unit rows [rank, in] by falling variance; fewer, where the inputs vary in fewer directions."""
        sketch_IW, omega_IW = self.sketch_IW.double(), self.omega_IW.double()
        shift = torch.finfo(torch.float32).eps * sketch_IW.norm()  # keeps the root of the core real
        sketch_IW = sketch_IW + shift * omega_IW
        values_W, vectors_WW = torch.linalg.eigh(omega_IW.T @ sketch_IW)
        root_IW = sketch_IW @ vectors_WW / values_W.clamp(min=float(shift) or 1.0).sqrt()
        U_IW, sizes_W, _ = torch.linalg.svd(root_IW, full_matrices=False)
        found = int((sizes_W**2 > 10 * shift).sum())
        return U_IW[:, : min(found, self.rank)].T.float()


class ModuleProbes:
    """Those of one module; see translora.lora.bank.Probe."""

    def __init__(self, noise: Noise | None, sketch: Sketch | None) -> None:
        self.noise, self.sketch = noise, sketch

    def forward(self, x_SI: torch.Tensor) -> torch.Tensor | None:
        """Note the inputs; what the noise adds to the outputs."""
        if self.sketch is not None:
            self.sketch.note(x_SI)
        return None if self.noise is None else self.noise.forward(x_SI)

    def backward(self, grad_SO: torch.Tensor) -> torch.Tensor | None:
        """What the noise adds to the gradient of the inputs."""
        return None if self.noise is None else self.noise.backward(grad_SO)


class Probes:
    """The probes of one student, by module.

    Args:
        lora: says which.
        shapes: (out, in) by module.
        norms: see `row_norms`; for the noise alone.
        seed: the student's.
    """

    def __init__(
        self,
        lora: LoraSettings,
        shapes: Mapping[str, tuple[int, int]],
        norms: Mapping[str, torch.Tensor],
        seed: int,
        place: torch.device,
    ) -> None:
        self.sigma = lora.flat_sigma
        self.by_module: dict[str, ModuleProbes] = {}
        for name, (_, num_in) in shapes.items():
            noise = Noise(norms[name], num_in, derive_seed(seed, "flat", name)) if self.sigma else None
            own = derive_seed(seed, "eva", name)
            sketch = Sketch(num_in, lora.total_rank, own, place) if lora.init == "eva" else None
            self.by_module[name] = ModuleProbes(noise, sketch)

    def begin(self, step: int, num_steps: int) -> None:
        """Begin a step: noise that rises from 0 to its full strength along half a cosine; inputs of the first alone."""
        for probe in self.by_module.values():
            if probe.noise is not None:
                probe.noise.step, probe.noise.sigma = step, self.sigma * (1 - math.cos(math.pi * step / num_steps)) / 2
            if step > 0:
                probe.sketch = None

    def write_directions(self, weights: Mapping[str, Factors], group: dist.ProcessGroup | None) -> None:
        """Put what the sketches of all ranks found into the A of each module; what they leave free stays random."""
        for name, probe in self.by_module.items():
            if probe.sketch is not None:
                if group is not None:
                    dist.all_reduce(probe.sketch.sketch_IW, group=group)
                found_RI = probe.sketch.directions()
                weights[name][0][: len(found_RI)] = found_RI


def row_norms(bank: AdapterBank) -> dict[str, torch.Tensor]:
    """The norm of each row of the adapted weights [out], by module. Collective: gathers partitioned weights."""
    import deepspeed  # only here: a plan knows of probes, and needs no DeepSpeed

    norms: dict[str, torch.Tensor] = {}
    for name, module in bank.modules.items():
        with deepspeed.zero.GatheredParameters([module.base.weight]):
            norms[name] = module.base.weight.detach().float().norm(dim=1)
    return norms
