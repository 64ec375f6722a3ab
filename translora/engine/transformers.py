"""The embedded engine: one resident base with a bank of adapters, driven through transformers.

Rows of adapters in the bank are computed in one batch, those of each other adapter in one of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from translora.config import BaseModelConfig, SamplingConfig
from translora.engine.decode import Request, Row, check_cache, decode
from translora.engine.head import Head, check_head, log_probabilities, top_log_probabilities
from translora.engine.loading import device, load_model, load_tokenizer, num_gpus, resolve_dtype
from translora.engine.prefix import begin, window
from translora.engine.protocol import Completion, Samples, answer_tokens, completion, end_tokens
from translora.lora.bank import load_bank
from translora.lora.methods import Method, VirtualTokens, applied, read_adapter
from translora.lora.peft_io import LoraWeights

T = TypeVar("T")


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
        self.tokenizer = load_tokenizer(base)
        self.model = self._load(base)
        self.bank, self._adapters = load_bank(self.model, {}), dict[str, str]()
        self._alone: dict[str, Method] = {}
        """Of the adapters, those that PEFT puts on the base when their rows come."""
        self._virtual: VirtualTokens | None = None
        self.use_adapters(adapters)
        self._answer_ids: dict[str, torch.Tensor] = {}

    def _load(self, base: BaseModelConfig) -> PreTrainedModel:
        model = load_model(base, resolve_dtype(base.dtype), self.device, spread=num_gpus() > 1)
        check_cache(model)
        check_head(model)
        return model

    def use_adapters(self, adapters: Mapping[str, str | Path]) -> None:
        """Have exactly these adapters: PEFT directory by slot name; nothing to do where they are there."""
        wanted = {name: str(path) for name, path in adapters.items()}
        if wanted != self._adapters:
            read = {name: read_adapter(path) for name, path in wanted.items()}
            banked = {name: adapter for name, adapter in read.items() if isinstance(adapter, LoraWeights)}
            alone = {name: adapter for name, adapter in read.items() if not isinstance(adapter, LoraWeights)}
            self.bank.detach(self.model)
            self._adapters = {}
            self.bank = load_bank(self.model, banked)
            self._adapters, self._alone = wanted, alone

    def load(self) -> None:
        """It was loaded when it was made."""

    def check_adapter(self, path: str | Path) -> None:
        """Read an adapter."""
        read_adapter(path)

    def close(self) -> None:
        """Nothing that the garbage collector does not do."""

    @contextlib.contextmanager
    def _on_base(self, alone: str | None) -> Iterator[None]:
        """The base with the bank, or with one adapter that the bank does not have."""
        if alone is None:
            yield
            return
        with self.bank.aside(self.model), applied(self.model, self._alone[alone]) as self._virtual:
            try:
                yield
            finally:
                self._virtual = None

    def _together(
        self,
        adapters: Sequence[str | None],
        lengths: Sequence[int],
        compute: Callable[[list[int]], Sequence[T]],
        *,
        num_new: int = 0,
    ) -> list[T]:
        """What `compute` gives for the rows that can share a batch, in the order of all rows.

        Args:
            adapters, lengths: of the rows, these in tokens; num_new more are generated.
        """
        groups: dict[str | None, list[int]] = {}
        for index, name in enumerate(adapters):
            groups.setdefault(name if name in self._alone else None, []).append(index)
        found: dict[int, T] = {}
        for alone, own in groups.items():
            with self._on_base(alone):
                for part in self._batches(own, lengths, num_new):
                    found |= dict(zip(part, compute(part), strict=True))
        return [found[index] for index in range(len(adapters))]

    def _batches(self, rows: list[int], lengths: Sequence[int], num_new: int) -> list[list[int]]:
        """All rows, or those of one length: padding behind virtual tokens moves them out of a base's sight."""
        if self._virtual is None:
            return [rows]
        longest = max(lengths[row] for row in rows) + self._virtual.count + num_new
        if longest <= window(self.model):
            return [rows]
        by_length: dict[int, list[int]] = {}
        for row in rows:
            by_length.setdefault(lengths[row], []).append(row)
        return list(by_length.values())

    def _route(self, adapters: Sequence[str | None]) -> None:
        if adapters[0] not in self._alone:
            self.bank.route_rows(adapters, self.device)

    def _begin(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[str | None],
        num_own: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        pad_id = int(self.tokenizer.pad_token_id)
        return begin(self.model, prompts, adapters, self._route, pad_id, num_own=num_own, virtual=self._virtual)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: SamplingConfig | None = None) -> list[Completion]:
        """Complete every request.

        Args:
            requests: the rows; each is routed to its own adapter.
            sampling: settings of the rows that have a seed.
        """
        end_ids = set(self.end_ids())

        def complete(own: list[int]) -> list[Row]:
            return self._decode([requests[index] for index in own], end_ids, sampling or SamplingConfig())

        lengths = [0] * len(requests)
        if self._alone:
            ids = self.tokenizer([request.prompt for request in requests], add_special_tokens=False)["input_ids"]
            lengths = list(map(len, ids))
        num_new = max(request.max_new_tokens for request in requests)
        rows = self._together([request.adapter for request in requests], lengths, complete, num_new=num_new)
        return [completion(row, self.tokenizer, end_ids) for row in rows]

    def _decode(self, requests: Sequence[Request], end_ids: set[int], sampling: SamplingConfig) -> list[Row]:
        return decode(self.model, self.tokenizer, requests, self._route, end_ids, sampling, self._virtual)

    def end_ids(self) -> list[int]:
        """Tokens that end a completion: end of text, and of a chat turn."""
        return end_tokens(self.tokenizer, self.model.generation_config.eos_token_id)

    @torch.inference_mode()
    def log_odds(self, prompts: Sequence[str], adapters: Sequence[str | None]) -> list[float]:
        """log p("yes") - log p("no") as the next token of each prompt, summed over the answers' token variants.

        The answers' logits are computed again in float32: bfloat16 knows steps of 1/8 only at their size, and half of
        the odds would be ties.
        """
        if not self._answer_ids:
            self._answer_ids = {word: torch.tensor(ids) for word, ids in answer_tokens(self.tokenizer).items()}
        ids = self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]

        def odds(own: list[int]) -> list[float]:
            return self._log_odds([ids[index] for index in own], [adapters[index] for index in own])

        return self._together(adapters, list(map(len, ids)), odds)

    def _log_odds(self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> list[float]:
        states_BD, head = self._last_states(prompts, adapters).float(), Head.of(self.model)
        yes, no = (head.logits(states_BD, self._answer_ids[word]).logsumexp(-1) for word in ("yes", "no"))
        return [float(value) for value in yes - no]

    def _last_states(self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> torch.Tensor:
        """Last hidden states [B, D] of the places that predict the answers' first tokens."""
        hidden_BTD: torch.Tensor = self.model.base_model(**self._begin(prompts, adapters)).last_hidden_state
        return hidden_BTD[:, -1]

    @torch.inference_mode()
    def log_likelihood(self, samples: Samples, adapters: Sequence[str | None]) -> list[list[float]]:
        """log p of each token of an answer, given the prompt and the answer's tokens before it.

        Args:
            samples: token ids of prompt and answer, neither of them empty.
            adapters: each sample's own.
        """

        def likelihoods(own: list[int]) -> list[list[float]]:
            hidden_LD, lengths = self._answer_states([samples[i] for i in own], [adapters[i] for i in own])
            labels_L = torch.tensor([token for i in own for token in samples[i][1]], device=self.device)
            found = log_probabilities(hidden_LD, Head.of(self.model), labels_L)
            return [part.tolist() for part in found.split(lengths)]

        return self._together(adapters, [len(prompt) + len(answer) for prompt, answer in samples], likelihoods)

    @torch.inference_mode()
    def top_log_probabilities(
        self, samples: Samples, adapters: Sequence[str | None], top_k: int
    ) -> list[tuple[list[list[int]], list[list[float]]]]:
        """The most likely tokens at each token of an answer, and their log-probabilities, [answer's length, K] each.

        Args:
            samples, adapters: as in `log_likelihood`.
            top_k: K.
        """

        def most_likely(own: list[int]) -> list[tuple[list[list[int]], list[list[float]]]]:
            hidden_LD, lengths = self._answer_states([samples[i] for i in own], [adapters[i] for i in own])
            tokens_LK, log_p_LK = top_log_probabilities(hidden_LD, Head.of(self.model), top_k)
            parts = zip(tokens_LK.split(lengths), log_p_LK.split(lengths), strict=True)
            return [(tokens.tolist(), log_p.tolist()) for tokens, log_p in parts]

        return self._together(adapters, [len(prompt) + len(answer) for prompt, answer in samples], most_likely)

    def _answer_states(self, samples: Samples, adapters: Sequence[str | None]) -> tuple[torch.Tensor, list[int]]:
        """Last hidden states [L, D] of the places that predict the answers' tokens, and how many each answer has."""
        rows = [[*prompt, *answer][:-1] for prompt, answer in samples]  # the last token predicts nothing
        lengths = [len(answer) for _, answer in samples]
        hidden_BTD = self.model.base_model(**self._begin(rows, adapters, lengths)).last_hidden_state
        states = [hidden_TD[-length:] for hidden_TD, length in zip(hidden_BTD, lengths, strict=True)]
        return torch.cat(states), lengths
