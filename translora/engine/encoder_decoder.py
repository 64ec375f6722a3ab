"""The engine of encoder-decoders (T5), whose adapters move to a decoder-only base: they teach, and nothing else.

The encoder reads a prompt with its end token, as these bases were trained; the decoder answers from its start token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from translora.bundle.base import UnusableBaseError
from translora.config import BaseModelConfig, SamplingConfig
from translora.engine.decode import Request, Row
from translora.engine.loading import load_model, num_gpus, resolve_dtype
from translora.engine.protocol import Samples
from translora.engine.transformers import TransformersEngine


class EncoderDecoderEngine(TransformersEngine):
    """A TransformersEngine whose passes have two sides; the bank routes the rows of both."""

    def _load(self, base: BaseModelConfig) -> PreTrainedModel:
        model = load_model(base, resolve_dtype(base.dtype), self.device, spread=num_gpus() > 1, encoder_decoder=True)
        own, named = model.generation_config, getattr(model.config, "decoder_start_token_id", None)
        start = named if own.decoder_start_token_id is None else own.decoder_start_token_id
        if start is None:
            raise UnusableBaseError(f"{base.model}: its config.json has no decoder_start_token_id; add it")
        self._start_id = int(start)
        # Of a base's own settings no other holds: beams, forced tokens, penalties.
        model.generation_config = GenerationConfig(decoder_start_token_id=start, eos_token_id=own.eos_token_id)
        return model

    def _encoded(self, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """What the encoder reads; the ids of the prompts come without an end."""
        end = self.tokenizer.eos_token_id
        adds_end = end is not None and self.tokenizer("a")["input_ids"][-1] == end
        return self._padded([[*prompt, end] if adds_end else prompt for prompt in prompts])

    def _padded(self, rows: Sequence[Sequence[int]], prefix: str = "") -> dict[str, torch.Tensor]:
        """Token ids [B, T] with padding on the right, and its mask."""
        width, pad = max(map(len, rows)), int(self.tokenizer.pad_token_id)
        ids_BT = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=self.device)
        mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        return {f"{prefix}input_ids": ids_BT, f"{prefix}attention_mask": mask_BT}

    def _decode(self, requests: Sequence[Request], end_ids: set[int], sampling: SamplingConfig) -> list[Row]:
        """Greedy answers; nothing is invented with a source base."""
        assert all(request.seed is None for request in requests), "an encoder-decoder is no generator"
        self._route([request.adapter for request in requests])
        ids = self.tokenizer([request.prompt for request in requests], add_special_tokens=False)["input_ids"]
        plain = GenerationConfig(
            max_new_tokens=max(request.max_new_tokens for request in requests),
            do_sample=False,
            decoder_start_token_id=self._start_id,
            eos_token_id=sorted(end_ids),
            pad_token_id=int(self.tokenizer.pad_token_id),
        )
        found: Any = self.model.generate(**self._encoded(ids), generation_config=plain)
        rows = zip(requests, found[:, 1:].tolist(), strict=True)
        return [Row(request, None, own[: request.max_new_tokens], ended=True) for request, own in rows]

    def _hidden(
        self, prompts: Sequence[Sequence[int]], decoded: Sequence[Sequence[int]], adapters: Sequence[str | None]
    ) -> torch.Tensor:
        """What the head gets [B, U, D] at every token of `decoded`, which begins with the start token."""
        self._route(adapters)
        seen: list[torch.Tensor] = []

        def take(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            seen.append(args[0])
            return (args[0][:, :1],)  # the logits of all tokens are not wanted

        # Of the head and not of the decoder: some bases scale what is between the two.
        hook = self.model.get_output_embeddings().register_forward_pre_hook(take, prepend=True)
        try:
            self.model(**self._encoded(prompts), **self._padded(decoded, "decoder_"), use_cache=False)
        finally:
            hook.remove()
        return seen[0]

    def _last_states(self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> torch.Tensor:
        return self._hidden(prompts, [[self._start_id]] * len(prompts), adapters)[:, 0]

    def _answer_states(self, samples: Samples, adapters: Sequence[str | None]) -> tuple[torch.Tensor, list[int]]:
        decoded = [[self._start_id, *answer[:-1]] for _, answer in samples]
        hidden_BUD = self._hidden([prompt for prompt, _ in samples], decoded, adapters)
        lengths = [len(answer) for _, answer in samples]
        return torch.cat([own[:length] for own, length in zip(hidden_BUD, lengths, strict=True)]), lengths
