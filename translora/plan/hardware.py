"""GPUs and how they are joined: what the planner computes with.

Importing this module loads neither torch nor ray.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TRAINING_SHARE = 0.4
"""Of the peak FLOP/s: what large dense matrix products reach over a whole training step (Llama 3: 38 to 43 %, arXiv
2407.21783, table 4)."""
READING_SHARE = 0.6
"""Of the memory's rate: what token-by-token decoding reaches, which reads every weight for each token of a batch."""
LINK_SHARE = 0.55
"""Of the links' rate: what ZeRO-3's gathering of a base, layer by layer, reaches."""
ACCEPTANCE, ACCEPTANCE_REFUSING = 0.85, 0.3
"""Of generated inputs, where nothing else is said, and behind a discriminator that refuses: in docs/results.md 0.86 and
0.26."""
RESERVED_BYTES = 3_000_000_000
"""Of a GPU: context, communication buffers, what the allocator cannot use."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, by its data sheet."""

    name: str
    memory_bytes: float
    """Of its own memory."""
    flops: float
    """bfloat16, dense, a second."""
    memory_rate: float
    """Bytes a second of its own memory."""
    link_rate: float
    """Bytes a second from the other GPUs of its machine (NVLink, one way)."""
    host_rate: float
    """Bytes a second from its machine's memory (PCIe x16, one way)."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 40e9, 312e12, 1.555e12, 300e9, 32e9),
        Gpu("a100-80gb", 80e9, 312e12, 2.039e12, 300e9, 32e9),
        Gpu("h100-80gb", 80e9, 989e12, 3.35e12, 450e9, 64e9),
        Gpu("h200-141gb", 141e9, 989e12, 4.8e12, 450e9, 64e9),
        Gpu("b200-180gb", 180e9, 2250e12, 7.7e12, 900e9, 64e9),
    )
}
"""SXM modules, from NVIDIA's data sheets."""


@dataclass(frozen=True)
class Hardware:
    """The GPUs of a run."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int = 8
    load_rate: float = 2e9
    """Bytes a second at which one machine reads files."""
    network_rate: float = 400e9
    """Bytes a second into one machine: eight adapters of 400 Gbit/s."""

    @property
    def gpus_at_hand(self) -> int:
        """GPUs of one machine that the run has."""
        return min(self.gpus_per_node, self.num_gpus)

    @property
    def num_nodes(self) -> int:
        """Machines; the last one may have fewer GPUs."""
        return math.ceil(self.num_gpus / self.gpus_per_node)

    def num_groups(self, size: int) -> int:
        """How often so many GPUs of one machine are there."""
        whole, rest = divmod(self.num_gpus, self.gpus_per_node)
        return whole * (self.gpus_per_node // size) + rest // size

    @property
    def gather_rate(self) -> float:
        """Bytes a second that each GPU receives when all gather a base.

        A ring passes every byte once over each machine's border, whatever the number of its GPUs: they have the
        machine's whole network for it.
        """
        one_node = self.num_gpus <= self.gpus_per_node
        rate = self.gpu.link_rate if one_node else min(self.gpu.link_rate, self.network_rate)
        return LINK_SHARE * rate

    @property
    def train_flops(self) -> float:
        """FLOP/s of one GPU in training and in the pass over a prompt."""
        return TRAINING_SHARE * self.gpu.flops

    @property
    def read_rate(self) -> float:
        """Bytes a second of weights and cache in decoding."""
        return READING_SHARE * self.gpu.memory_rate

    @property
    def room(self) -> float:
        """Bytes of a GPU that a run can use."""
        return self.gpu.memory_bytes - RESERVED_BYTES
