"""Labelling with many adapters: one mixed batch through the adapter bank, against PEFT one adapter at a time.

    python -m benchmarks.synthesis [--adapters 1 4 16] [--rows 64] [--shape smollm2]

Both arms answer the same prompts greedily, in bfloat16, in batches as large as each of them can have: the bank all
rows at once, `PeftModel.generate` the rows of one adapter. Random weights; every answer has the full length.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from benchmarks.gang import make_model, make_parser, ratio_cell, seconds_of
from tests.tiny import make_adapter
from translora.config import BaseModelConfig
from translora.engine.decode import Request
from translora.engine.loading import give_head_plain_strides
from translora.engine.transformers import TransformersEngine

PROMPT = "Route the message: billing, shipping, refund, other. The parcel number {} is late.\nAnswer:"
NEW_TOKENS = 16


class PeftArm:
    """PEFT with all adapters loaded, switched for each one's batch."""

    def __init__(self, path: Path, adapters: dict[str, Path]) -> None:
        base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        names = list(adapters)
        model = PeftModel.from_pretrained(base, adapters[names[0]], names[0], autocast_adapter_dtype=False)
        for name in names[1:]:
            model.load_adapter(adapters[name], name, autocast_adapter_dtype=False)
        give_head_plain_strides(base)  # torch's slow product with a strided input is in neither arm
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @torch.inference_mode()
    def label(self, tokenizer: PreTrainedTokenizerBase, prompts: dict[str, list[str]]) -> None:
        """Answer each adapter's prompts in one batch."""
        for name, own in prompts.items():
            encoded = tokenizer(own, padding=True, return_tensors="pt").to(self.model.device)
            batch = {key: encoded[key] for key in ("input_ids", "attention_mask")}
            self.model.set_adapter(name)
            self.model.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0)


def measure(path: Path, directory: Path, num_adapters: int, num_rows: int, rounds: int) -> dict[str, list[float]]:
    """Seconds to label all rows, by arm and round; the arms take turns."""
    adapters = {
        f"adapter{index}": make_adapter(directory / f"adapter{num_adapters}-{index}", path, seed=index, rank=8)
        for index in range(num_adapters)
    }
    names = list(adapters)
    prompts = [(names[row % num_adapters], PROMPT.format(row)) for row in range(num_rows)]
    engine = TransformersEngine(BaseModelConfig(model=str(path), dtype="bfloat16"), adapters)
    peft = PeftArm(path, adapters)
    requests = [Request(prompt, name, NEW_TOKENS) for name, prompt in prompts]
    by_adapter = {name: [prompt for owner, prompt in prompts if owner == name] for name in names}
    arms: dict[str, Callable[[], object]] = {
        "one at a time": lambda: peft.label(engine.tokenizer, by_adapter),
        "mixed": lambda: engine.generate(requests),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, work in arms.items():
            taken = seconds_of(work)
            if number > 0:  # the first is the warm-up
                seconds[name].append(taken)
    return seconds


def main() -> None:
    """Print the table."""
    parser = make_parser(__doc__, adapters=[1, 4, 16], rounds=5)
    parser.add_argument("--rows", type=int, default=64, help="prompts in all (default: 64)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table(title=f"{arguments.rows} rows, {arguments.shape}, bfloat16, {NEW_TOKENS} new tokens")
    for column in ("adapters", "one at a time", "mixed", "ratio (quartiles)"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        path = make_model(directory / "base", arguments.shape, arguments.vocab_size)
        for count in arguments.adapters:
            seconds = measure(path, directory, count, arguments.rows, arguments.rounds)
            cells = [f"{statistics.median(values):.2f} s" for values in seconds.values()]
            table.add_row(str(count), *cells, ratio_cell(seconds["one at a time"], seconds["mixed"]))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
