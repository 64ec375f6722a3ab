"""One step of K adapters on one base, four ways, side by side.

    python -m benchmarks.gang [--tokens 64] [--adapters 1 4 8 16] [--shape smollm2]

sequential  PEFT, one adapter after the other, its whole batch in one micro-batch
serial      every layer runs the K micro-batches in turn: what one gather of a layer would serve
gang        translora's: one packed batch, each adapter's tokens meet their own factors
ceiling     PEFT, one adapter with a K times larger batch: another algorithm, and all that can be hoped for

All four use the same samples, packing, loss and fused AdamW; PEFT's LoRA weights are bfloat16, the gang's float32. Each
round runs every arm once, in turn; the table has the median of the rounds' ratios and their quartiles. Random weights:
speed does not depend on them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.whole import WholeBase
from tests.tiny import make_tokenizer
from translora.config import LoraSettings, TrainConfig
from translora.distill.data import Sample, pack
from translora.distill.gang import Gang
from translora.distill.job import TrainJob
from translora.distill.student import Student
from translora.distill.train import run_pass
from translora.engine.attention import PACKED
from translora.engine.head import Head, cross_entropy

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 4},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
KV_HEADS = {"tiny": 2, "smollm2": 3, "8b": 8}
ANSWER_TOKENS = 4
RANK = 8
TARGETS = ("q_proj", "v_proj")


def make_model(directory: Path, shape: str, vocab_size: int) -> Path:
    """A random Llama of a real shape."""
    config = LlamaConfig(**SHAPES[shape], num_key_value_heads=KV_HEADS[shape], vocab_size=vocab_size)
    tokenizer = make_tokenizer("llama")
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, tokenizer.eos_token_id, None
    with torch.device("cpu"):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_samples(num_adapters: int, tokens: int, vocab_size: int) -> list[list[Sample]]:
    """Two samples per adapter that together have `tokens` input tokens."""
    generator = torch.Generator().manual_seed(0)
    length = tokens // 2 + 1
    ids = torch.randint(4, vocab_size, (num_adapters, 2, length), generator=generator).tolist()
    return [[Sample(row[:-ANSWER_TOKENS], row[-ANSWER_TOKENS:]) for row in own] for own in ids]


class PeftArm:
    """What a user of PEFT writes: one LoRA, AdamW, clipping; packed input and chunked loss as in the gang."""

    def __init__(self, path: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation=PACKED)
        settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        self.place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = get_peft_model(base.to(self.place), settings, autocast_adapter_dtype=False)
        self.base, self.head = base, Head.of(base)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, weight_decay=0.0, fused=True)

    def step(self, samples: list[Sample]) -> None:
        """One optimizer step on one batch."""
        batch = pack([(0, samples, 1.0)], self.place)
        hidden_TD = self.base.base_model(**batch.inputs, use_cache=False).last_hidden_state[0]
        cross_entropy(hidden_TD[batch.positions_L], self.head, batch.labels_L, batch.weights_L).sum().backward()
        self._update()

    def serial_step(self, shards: list[list[Sample]]) -> None:
        """All micro-batches through each layer in turn, forward and (autograd's order) backward."""
        trunk: nn.Module = self.base.base_model
        batches = [pack([(0, samples, 1.0)], self.place) for samples in shards]
        hidden = [trunk.embed_tokens(batch.inputs["input_ids"]) for batch in batches]
        positions = [trunk.rotary_emb(h, b.inputs["position_ids"]) for h, b in zip(hidden, batches, strict=True)]
        for layer in trunk.layers:
            for index, batch in enumerate(batches):
                kwargs = {key: value for key, value in batch.inputs.items() if key != "input_ids"}
                out = layer(hidden[index], position_embeddings=positions[index], attention_mask=None, **kwargs)
                hidden[index] = out[0] if isinstance(out, tuple) else out
        losses = []
        for h, batch in zip(hidden, batches, strict=True):
            h_LD = trunk.norm(h)[0][batch.positions_L]
            losses.append(cross_entropy(h_LD, self.head, batch.labels_L, batch.weights_L).sum())
        torch.stack(losses).sum().backward()
        for _ in shards:
            self._update(keep=True)
        self.optimizer.zero_grad()

    def _update(self, keep: bool = False) -> None:
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        if not keep:
            self.optimizer.zero_grad()


class GangArm:
    """K students of translora's gang, without queue and files."""

    def __init__(self, path: Path, shards: list[list[Sample]]) -> None:
        lora = LoraSettings(rank=RANK, alpha=2 * RANK, target_modules=list(TARGETS))
        config = TrainConfig(lora=lora, batch_size=2, micro_batch_size=2, max_length=1 << 20)
        self.base = WholeBase(path, torch.bfloat16, TARGETS)
        self.gang = Gang(self.base, [], config, len(shards), base_name="base", group=None)
        for slot, samples in enumerate(shards):
            job = TrainJob(str(slot), "", "", "", seed=slot, epochs=1e6, learning_rate=1e-4)
            weights = self.gang.slots.new_weights(slot, lora)
            student = Student(job, "", samples, weights, config, self.base.place, self.base.dtype)
            self.gang.students[slot] = student
            self.gang.slots.open(slot, student)

    def step(self) -> None:
        """One step of every student, without its files."""
        for shards in self.gang.shards():
            run_pass(self.base, self.gang, shards)
        for student in self.gang.students.values():
            student.update(None)


def seconds_of(work: Callable[[], None]) -> float:
    """Wall time of a call, the GPU's queue emptied."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(path: Path, num_adapters: int, tokens: int, vocab_size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of all adapters, by arm and round; the arms take turns."""
    shards = make_samples(num_adapters, tokens, vocab_size)
    everything = [sample for samples in shards for sample in samples]
    peft, gang = PeftArm(path), GangArm(path, shards)

    def sequential() -> None:
        for samples in shards:
            peft.step(samples)

    arms: dict[str, Callable[[], None]] = {
        "sequential": sequential,
        "serial": lambda: peft.serial_step(shards),
        "gang": gang.step,
        "ceiling": lambda: peft.step(everything),
    }
    for work in arms.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, work in arms.items():
            seconds[name].append(seconds_of(work))
    return seconds


def ratio(over: list[float], under: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the rounds' ratios."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return low, middle, high


def make_parser(description: str | None, adapters: list[int], rounds: int) -> argparse.ArgumentParser:
    """The arguments of every benchmark on a random model."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=adapters)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser


def ratio_cell(over: list[float], under: list[float]) -> str:
    """`ratio` as a table shows it."""
    low, middle, high = ratio(over, under)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def main() -> None:
    """Print the table."""
    parser = make_parser(__doc__, adapters=[1, 4, 8, 16], rounds=7)
    parser.add_argument("--tokens", type=int, default=64, help="input tokens per adapter and step (default: 64)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table(title=f"{arguments.shape}, bfloat16, {arguments.tokens} tokens an adapter, median (quartiles)")
    for column in ("K", "sequential", "serial", "gang", "ceiling", "sequential / gang", "ceiling / gang"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as directory:
        path = make_model(Path(directory) / "base", arguments.shape, arguments.vocab_size)
        for count in arguments.adapters:
            seconds = measure(path, count, arguments.tokens, arguments.vocab_size, arguments.rounds)
            cells = [f"{statistics.median(values) * 1e3:.0f} ms" for values in seconds.values()]
            ratios = [ratio_cell(seconds[arm], seconds["gang"]) for arm in ("sequential", "ceiling")]
            table.add_row(str(count), *cells, *ratios)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
