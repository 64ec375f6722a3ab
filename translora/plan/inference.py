"""What the phases of inference take: generate, screen and label, gate."""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from translora.bundle.modules import linears
from translora.config import FleetConfig
from translora.engine.fake import FEW_LAYERS, LiveBytes, fake_base, inner_size, num_layers, with_layers
from translora.lora.bank import empty_bank
from translora.plan.hardware import Hardware
from translora.plan.shape import Shape
from translora.plan.work import QUESTION_TOKENS, SCORING_PASSES, Work
from translora.run.redact import first_line

logger = logging.getLogger(__name__)
ROUNDS = 3
"""Of generate and screen, mostly."""


@dataclass(frozen=True)
class Calls:
    """The rows of a phase on one base, summed over the fleet."""

    num_rows: float
    """Rows that decode; the others are scored only."""
    prompt_tokens: float
    """Of all passes over prompts together."""
    new_tokens: float
    """Longest completion of a row: a batch is as long as its longest."""
    context_tokens: float
    """Of a row, prompt and completion."""
    num_rounds: int = ROUNDS
    """That come one after the other."""
    distinct: float = 1.0
    """Share of a batch's prompts that are computed; rows with the same one share it."""


def generate_calls(config: FleetConfig, work: Work) -> Calls:
    """Inputs that the generator invents: rows of an adapter share the prompts of the seeds' few orders."""
    rows = prompts = longest = 0.0
    for one in work.adapters:
        own = work.num_generated(one, config)
        seeds = 8 + one.num_seeds * (one.input_tokens + 4)
        rows += own
        prompts += seeds * max(ROUNDS * min(config.synthesis.num_orderings, own), own / config.synthesis.batch_size)
        longest = max(longest, seeds)
    new, batch = config.synthesis.sampling.max_new_tokens, config.synthesis.batch_size
    # A round's rows lie in the batches by adapter and order of the seeds.
    per_prompt = rows / len(work.adapters) / ROUNDS / config.synthesis.num_orderings
    return Calls(rows, prompts, new, longest + new, distinct=min(1.0, max(1 / batch, 1 / max(1.0, per_prompt))))


def label_calls(config: FleetConfig, work: Work) -> Calls:
    """A discriminator's verdict comes before the answers, of what it accepts alone; other screens score all of them."""
    rows = prompts = longest = 0.0
    for one in work.adapters:
        own, all_of_them = one.input_tokens + QUESTION_TOKENS, work.num_generated(one, config)
        kept = all_of_them * work.accepted(one)
        if one.screen == "discriminator":
            rows += kept
            prompts += own * (all_of_them + kept)
        else:
            rows += all_of_them
            scoring = SCORING_PASSES.get(one.screen, 0)
            prompts += (own + scoring * (own + one.answer_tokens)) * all_of_them
        longest = max(longest, own)
    new = config.synthesis.max_answer_tokens
    return Calls(rows, prompts, new, longest + new)


def gate_calls(config: FleetConfig, work: Work) -> Calls:
    """Held-out prompts, answered by the student and by the bare base, and the teacher's answers scored by both.

    Without those that say how likely each of few answers is, which are short: how many there are is not known.
    """
    rows = prompts = longest = 0.0
    for one in work.adapters:
        kept = config.gate.sizes(one.num_samples)[1]
        own = one.input_tokens + QUESTION_TOKENS
        rows += 2 * kept
        prompts += 2 * kept * (2 * own + one.answer_tokens)
        if config.gate.long_answers == "tokens":
            prompts += 3 * kept * (own + one.answer_tokens)
        longest = max(longest, own)
    new = config.synthesis.max_answer_tokens
    return Calls(rows, prompts, new, longest + new, num_rounds=1)


def seconds(
    calls: Calls, shape: Shape, hardware: Hardware, batch_size: int, num_actors: int, speed: float = 1.0
) -> dict[str, float]:
    """GPU-bound seconds of a phase by what bounds them: `prompts` (arithmetic) and `decoding` (reading memory).

    Args:
        batch_size: rows that decode together.
        speed: of an actor, in GPUs.
    """
    prompts = 2 * shape.num_active * calls.prompt_tokens / hardware.train_flops
    # However many actors there are, a round takes as long as one batch.
    batches = max(math.ceil(calls.num_rows / batch_size) / num_actors, calls.num_rounds)
    step_bytes = shape.num_bytes + batch_size * calls.context_tokens * shape.cache_bytes
    step = max(step_bytes / hardware.read_rate, 2 * shape.num_active * batch_size / hardware.train_flops)
    return {"prompts": prompts / (num_actors * speed), "decoding": batches * calls.new_tokens * step / speed}


@functools.cache
def prompt_pass_bytes(shape: Shape, num_rows: int, num_tokens: int, ranks: tuple[tuple[str, int], ...] = ()) -> int:
    """The most that a pass over prompts has in memory beside weights, cache and logits, from the pass on fake tensors.

    A layer's states are gone when the next one's are made, so that a few layers have as much of them as all.

    Args:
        ranks: of the adapter bank, by module: every row has an adapter.
    """
    text = shape.config.get_text_config()
    depth = min(num_layers(shape.config), FEW_LAYERS[0])
    config = with_layers(shape.config, depth)
    try:
        with fake_base(config, shape.dtype, "sdpa") as model, torch.no_grad():
            ids = torch.zeros(num_rows, num_tokens, dtype=torch.long)
            mask = torch.ones(num_rows, num_tokens, dtype=torch.long)
            here = {_in_layers(name): name for name in linears(model)}
            bank = empty_bank(model, {here[_in_layers(name)]: rank for name, rank in ranks if _in_layers(name) in here})
            bank.route_rows(["", *[None] * (num_rows - 1)], ids.device)
            stacks = [one for module in bank.modules.values() for one in (module.lora_A, module.lora_B)]
            with LiveBytes([*model.parameters(), *model.buffers(), *stacks]) as memory:
                cache = DynamicCache(config=config)
                model.base_model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        peak = memory.peak - num_rows * num_tokens * shape.cache_bytes * depth // num_layers(shape.config)
    except Exception as error:  # not every model can be run on fake tensors
        logger.info("%s: the memory of a pass over prompts is estimated (%s)", shape.name, first_line(error))
        peak = num_rows * num_tokens * (6 * text.hidden_size + 3 * inner_size(text)) * shape.dtype.itemsize
    return int(max(0, peak))


def _in_layers(module: str) -> str:
    """A module's name from the layers on: the decoder of a base with more parts has it under another name alone."""
    return module.rpartition(".layers.")[2]
