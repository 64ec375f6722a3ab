"""Token-by-token generation of a batch whose rows begin alike and end at different times.

Rows with the same prompt and adapter are computed once up to the prompt's end, and share that part of the key-value
cache by copying it (for what different prompts have in common, see prefix.py). A row that has ended leaves the batch,
so that nobody computes its padding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from translora.bundle.base import UnusableBaseError
from translora.config import SamplingConfig
from translora.engine.prefix import Route, begin
from translora.lora.methods import VirtualTokens

CACHE_TOLERANCE = 0.2
"""Relative to the logits' mean deviation; bfloat16 alone makes some hundredths."""
COMPACT_BELOW = 0.75
"""Ended rows are taken out when fewer than this share of the batch still runs: taking out copies the cache."""


@dataclass(frozen=True)
class Request:
    """One row of a generation."""

    prompt: str
    """Rendered prompt, special tokens included."""
    adapter: str | None
    """Slot of the bank; None is the bare base."""
    max_new_tokens: int
    """Longest completion, in tokens."""
    stop: str | None = None
    """Regular expression; the completion ends before its first match."""
    seed: int | None = None
    """Sample with this seed; None decodes greedily."""


@dataclass
class Row:
    """A request on its way."""

    request: Request
    generator: torch.Generator | None
    ids: list[int] = field(default_factory=list)
    """New tokens, the end token among them."""
    ended: bool = False

    def take(self, token: int, tokenizer: PreTrainedTokenizerBase, end_ids: set[int]) -> None:
        """Append a token; the row ends at an end token, at its stop pattern or at its limit."""
        self.ids.append(token)
        self.ended = token in end_ids or len(self.ids) >= self.request.max_new_tokens
        if not self.ended and self.request.stop is not None:
            text = tokenizer.decode(self.ids, skip_special_tokens=True)
            self.ended = re.search(self.request.stop, text) is not None


@torch.inference_mode()
def check_cache(model: PreTrainedModel) -> None:
    """A text that is continued from its keys and values must get the probabilities that it gets as a whole.

    Raises:
        InputError: it does not: state-space bases, for example, keep something else and leave this out.
    """
    ids_1T = torch.tensor([[3, 4, 5, 6, 7]], device=model.device)
    whole_V = model(input_ids=ids_1T, use_cache=False).logits[0, -1].float()
    cache = DynamicCache(config=model.config)
    model(input_ids=ids_1T[:, :3], past_key_values=cache, use_cache=True)
    for place in (3, 4):
        step = {"input_ids": ids_1T[:, place : place + 1], "position_ids": torch.tensor([[place]], device=model.device)}
        continued_V = model(**step, past_key_values=cache, use_cache=True).logits[0, -1].float()
    difference = (continued_V - whole_V).abs().mean() / (whole_V - whole_V.mean()).abs().mean()
    if not difference < CACHE_TOLERANCE:
        raise UnusableBaseError(
            f"{model.config.model_type}: a text that is continued from its keys and values gets other logits (they "
            f"differ by {float(difference):.0%}); this base cannot generate in mixed batches"
        )


def choose_tokens(logits_BV: torch.Tensor, rows: Sequence[Row], sampling: SamplingConfig) -> list[int]:
    """The next token of each row: the likeliest, or drawn with the row's own generator.

    Adding Gumbel noise to the scaled logits of the top k tokens and taking the maximum draws from their softmax; one
    generator a row, so that neighbours never change a sample.
    """
    drawn = [index for index, row in enumerate(rows) if row.generator is not None]
    tokens = logits_BV.argmax(-1).tolist() if len(drawn) < len(rows) else [0] * len(rows)
    if drawn:
        own_SV = logits_BV if len(drawn) == len(rows) else logits_BV[drawn]
        top_k = min(sampling.top_k, own_SV.shape[-1])
        values_SK, tokens_SK = own_SV.topk(top_k, dim=-1)
        values_SK = torch.log_softmax(values_SK.float() / sampling.temperature, dim=-1)
        uniform_SK = torch.stack([torch.rand(top_k, generator=rows[index].generator) for index in drawn])
        noise_SK = -torch.log(-torch.log(uniform_SK.clamp_(1e-20, 1 - 1e-7)))
        best_S1 = (values_SK + noise_SK.to(values_SK.device)).argmax(-1, keepdim=True)
        for index, token in zip(drawn, tokens_SK.gather(1, best_S1)[:, 0].tolist(), strict=True):
            tokens[index] = token
    return tokens


def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    route: Route,
    end_ids: set[int],
    sampling: SamplingConfig,
    virtual: VirtualTokens | None = None,
) -> list[Row]:
    """Complete every request, in one batch.

    Args:
        model: causal LM in eval mode; call this in inference mode.
        tokenizer: has a padding token.
        route: routes the rows of the next passes to these adapters.
        end_ids: tokens that end a completion.
        sampling: for the rows that have a seed.
        virtual: see translora.engine.prefix.begin.
    """
    device = model.device
    prompts = list(dict.fromkeys((request.prompt, request.adapter) for request in requests))
    inputs = begin(
        model,
        tokenizer([text for text, _ in prompts], add_special_tokens=False)["input_ids"],
        [adapter for _, adapter in prompts],
        route,
        int(tokenizer.pad_token_id),
        num_new=max(request.max_new_tokens for request in requests),
        virtual=virtual,
    )
    cache, mask_BT = inputs["past_key_values"], inputs["attention_mask"]
    logits_BV = model(**inputs, logits_to_keep=1).logits[:, -1]

    rows = [Row(r, None if r.seed is None else torch.Generator().manual_seed(r.seed)) for r in requests]
    running = rows
    if len(prompts) < len(requests):
        place = {prompt: index for index, prompt in enumerate(prompts)}
        copies = torch.tensor([place[request.prompt, request.adapter] for request in requests])
        cache.batch_select_indices(copies)
        logits_BV, mask_BT = logits_BV[copies], mask_BT[copies]
    route([row.request.adapter for row in running])
    while True:
        tokens = choose_tokens(logits_BV, running, sampling)
        for row, token in zip(running, tokens, strict=True):
            if not row.ended:
                row.take(token, tokenizer, end_ids)
        left = [index for index, row in enumerate(running) if not row.ended]
        if not left:
            return rows
        if len(left) < COMPACT_BELOW * len(running):
            kept = torch.tensor(left)
            cache.batch_select_indices(kept)
            mask_BT, tokens = mask_BT[kept], [tokens[index] for index in left]
            running = [running[index] for index in left]
            route([row.request.adapter for row in running])
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(running), 1)], dim=1)
        logits_BV = model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            attention_mask=mask_BT,
            position_ids=mask_BT.sum(-1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
