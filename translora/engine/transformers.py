"""The embedded engine: one resident base with a bank of adapters, driven through transformers.

An engine offers `generate` and `log_odds`; rows of one call may belong to different adapters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from translora.config import BaseModelConfig, SamplingConfig
from translora.engine.loading import device, load_model, load_tokenizer, resolve_dtype
from translora.engine.prompts import prompt_format
from translora.lora.bank import load_bank
from translora.lora.peft_io import read_lora


@dataclass(frozen=True)
class Request:
    """One row of `generate`."""

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


@dataclass(frozen=True)
class Completion:
    """What came back for a request."""

    text: str
    """Completion up to the end token or the stop pattern."""
    finished: bool
    """False when `max_new_tokens` cut it off."""


class _SeededSampling(LogitsProcessor):
    """Turns greedy decoding into sampling with a generator per row, so that neighbours never change a sample.

    Adding Gumbel noise to the scaled logits of the top k tokens and taking the maximum draws from their softmax.
    """

    def __init__(self, seeds: Sequence[int | None], sampling: SamplingConfig) -> None:
        self.generators = [None if seed is None else torch.Generator().manual_seed(seed) for seed in seeds]
        self.sampling = sampling

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        top_k = min(self.sampling.top_k, scores.shape[-1])
        values_BK, tokens_BK = scores.float().topk(top_k, dim=-1)
        values_BK = torch.log_softmax(values_BK / self.sampling.temperature, dim=-1)
        noise_BK = torch.zeros(values_BK.shape)
        for row, generator in enumerate(self.generators):
            if generator is None:
                noise_BK[row, 0] = float("inf")
            else:
                uniform = torch.rand(top_k, generator=generator).clamp_(1e-20, 1 - 1e-7)
                noise_BK[row] = -torch.log(-torch.log(uniform))
        chosen_B1 = (values_BK + noise_BK.to(values_BK.device)).argmax(dim=-1, keepdim=True)
        result = torch.full_like(scores, float("-inf"))
        result.scatter_(1, tokens_BK.gather(1, chosen_B1), 0.0)
        return result  # type: ignore[return-value]


class _StopRows(StoppingCriteria):
    """Ends a row at its stop pattern or at its own `max_new_tokens`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], prompt_length: int) -> None:
        self.tokenizer = tokenizer
        self.requests = requests
        self.prompt_length = prompt_length
        self.done = [False] * len(requests)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: object) -> torch.BoolTensor:
        for row, request in enumerate(self.requests):
            if self.done[row]:
                continue
            new_ids = input_ids[row, self.prompt_length :].tolist()
            if len(new_ids) >= request.max_new_tokens:
                self.done[row] = True
            elif request.stop is not None:
                text = self.tokenizer.decode(new_ids, skip_special_tokens=True)
                self.done[row] = re.search(request.stop, text) is not None
        return torch.tensor(self.done, device=input_ids.device)  # type: ignore[return-value]


class TransformersEngine:
    """A base, its tokenizer and a bank of adapters, resident in this process.

    Args:
        base: which base, and how it is loaded.
        adapters: PEFT directory by slot name.
        num_threads: torch's CPU threads; None leaves them.
    """

    def __init__(
        self, base: BaseModelConfig, adapters: Mapping[str, str | Path], num_threads: int | None = None
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.device = device()
        self.tokenizer = load_tokenizer(base.model)
        self.model = load_model(base, resolve_dtype(base.dtype), self.device)
        self.bank = load_bank(self.model, {name: read_lora(path) for name, path in adapters.items()})
        self._answer_ids: dict[str, torch.Tensor] = {}

    def _encode(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        batch = self.tokenizer(list(prompts), add_special_tokens=False, padding=True, return_tensors="pt")
        return {
            "input_ids": batch["input_ids"].to(self.device),
            "attention_mask": batch["attention_mask"].to(self.device),
        }

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: SamplingConfig | None = None) -> list[Completion]:
        """Complete every request, in one batch.

        Args:
            requests: the rows; each is routed to its own adapter.
            sampling: settings of the rows that have a seed.
        """
        inputs = self._encode([request.prompt for request in requests])
        length = inputs["input_ids"].shape[1]
        self.bank.route_rows([request.adapter for request in requests], self.device)
        seeds = [request.seed for request in requests]
        processors = LogitsProcessorList()
        if any(seed is not None for seed in seeds):
            processors.append(_SeededSampling(seeds, sampling or SamplingConfig()))
        end_ids = self.end_ids()
        stops = _StopRows(self.tokenizer, requests, length)
        output = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max(request.max_new_tokens for request in requests),
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([stops]),
            eos_token_id=end_ids,
            pad_token_id=self.tokenizer.pad_token_id,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        return [
            self._completion(request, output[row, length:].tolist(), set(end_ids))
            for row, request in enumerate(requests)
        ]

    def _completion(self, request: Request, ids: list[int], end_ids: set[int]) -> Completion:
        ids = ids[: request.max_new_tokens]
        end = next((index for index, token in enumerate(ids) if token in end_ids), None)
        text = self.tokenizer.decode(ids if end is None else ids[:end], skip_special_tokens=True)
        match = re.search(request.stop, text) if request.stop is not None else None
        if match is not None:
            return Completion(text[: match.start()], True)
        return Completion(text, end is not None)

    def end_ids(self) -> list[int]:
        """Tokens that end a completion: end of text, and of a chat turn."""
        own = self.model.generation_config.eos_token_id
        return sorted({*prompt_format(self.tokenizer).end_ids, *(own if isinstance(own, list) else [own])} - {None})

    def _variants(self, words: Iterable[str]) -> torch.Tensor:
        """Ids of the single tokens that spell one of the words, with or without a space, in any usual case."""
        ids = set()
        for word in words:
            for variant in (word, word.capitalize(), word.upper()):
                for text in (variant, f" {variant}"):
                    tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                    if len(tokens) == 1:
                        ids.add(tokens[0])
        assert ids, f"the tokenizer has no single token for {list(words)}"
        return torch.tensor(sorted(ids), device=self.device)

    @torch.inference_mode()
    def log_odds(self, prompts: Sequence[str], adapters: Sequence[str | None]) -> list[float]:
        """log p("yes") - log p("no") as the next token of each prompt, summed over the answers' token variants.

        The answers' logits are computed again in float32: bfloat16 knows steps of 1/8 only at their size, and half of
        the odds would be ties.
        """
        if not self._answer_ids:
            self._answer_ids = {"yes": self._variants(["yes"]), "no": self._variants(["no"])}
        self.bank.route_rows(adapters, self.device)
        inputs = self._encode(prompts)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        head = self.model.get_output_embeddings()
        seen: list[torch.Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -1].float()))
        try:
            self.model(**inputs, position_ids=positions, logits_to_keep=1, use_cache=False)
        finally:
            hook.remove()
        yes, no = (self._answer_logits(head, seen[0], word).logsumexp(-1) for word in ("yes", "no"))
        return [float(value) for value in yes - no]

    def _answer_logits(self, head: torch.nn.Module, hidden_BD: torch.Tensor, word: str) -> torch.Tensor:
        """Logits [B, number of variants] of an answer, in float32, from the head's input."""
        ids = self._answer_ids[word]
        weight, bias = head.get_parameter("weight"), getattr(head, "bias", None)
        logits = torch.nn.functional.linear(hidden_BD, weight[ids].float(), None if bias is None else bias[ids].float())
        logits = logits * getattr(self.model.config, "logit_scale", 1.0)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)
