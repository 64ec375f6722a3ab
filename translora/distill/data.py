"""Training samples of one adapter: tokens, order and batches, all a function of the adapter's own seed.

Shapes: T tokens of a packed batch, L of them predict a token of an answer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from translora.engine.attention import packed_inputs
from translora.engine.prompts import PromptFormat
from translora.errors import InputError
from translora.lora.banked import Segment
from translora.run.files import derive_seed

logger = logging.getLogger(__name__)
TokenOdds = dict[int, float]
"""A teacher's log-probabilities of its most likely tokens at one place, by token."""


@dataclass(frozen=True)
class Sample:
    """One training sample: the loss is taken on the answer alone."""

    prompt_ids: list[int]
    answer_ids: list[int]
    teacher: list[TokenOdds] | None = None
    """For each of `answer_ids`; None where there is no teacher, who then gives the answer's tokens for certain."""
    chosen: list[bool] | None = None
    """Which of `answer_ids` the loss is on; None is all."""
    probability: float = 1.0
    """How likely the teacher finds this answer: what its cross-entropy is weighted with."""
    others: tuple[Sample, ...] = ()
    """The same input with the other answers that the teacher finds possible (soft labels)."""

    @property
    def answers(self) -> tuple[Sample, ...]:
        """The input with each of its answers, whose probabilities add up to 1."""
        return (self, *self.others)

    @property
    def num_tokens(self) -> int:
        """Tokens of a pass over the input with each of its answers."""
        return sum(len(one.prompt_ids) + len(one.answer_ids) for one in self.answers)

    @property
    def num_trained(self) -> float:
        """Tokens that the loss is on; of several answers the mean, weighted by their probabilities."""
        counts = [len(one.answer_ids) if one.chosen is None else sum(one.chosen) for one in self.answers]
        return sum(one.probability * count for one, count in zip(self.answers, counts, strict=True))


def encode_samples(
    rows: Sequence[dict[str, Any]],
    prompts: PromptFormat,
    max_length: int,
    name: str,
    *,
    with_end: bool = True,
    token_share: float = 1,
) -> list[Sample]:
    """Tokenise rows of `input` and `answer`; those longer than `max_length` are dropped with a warning.

    `with_end` puts the end of the answer behind it; a discriminator's loss is on yes or no alone. A row's `teacher`
    (see translora.distill.teacher) is used where it saw the same tokens, which another template may have changed.
    `token_share` is that of TrainConfig, for rows whose teacher gave an excess. Where the teacher gave
    `probabilities`, a sample has several answers, without those that would be too long.

    Raises:
        InputError: no row is left.
    """
    samples, vocabulary = [], len(prompts.tokenizer)
    for row in rows:
        prompt_ids, answer_ids = prompts.encode_pair(row["input"], row["answer"], with_end=with_end)
        teacher = row.get("teacher", {})
        chosen = None
        if "excess" in teacher:
            chosen = chosen_tokens(teacher, prompts.answer_spans(row["input"], row["answer"]), token_share)
        sample = Sample(prompt_ids, answer_ids, teacher_odds(row, answer_ids, vocabulary), chosen)
        if "probabilities" in teacher:
            sample = with_all_answers(sample, row, prompts, max_length, with_end=with_end)
        samples.append(sample)
    if others := sum(
        "tokens" in row.get("teacher", {}) and one.teacher is None for row, one in zip(rows, samples, strict=True)
    ):
        logger.warning("%s: %d of %d answers have other tokens for the teacher: sft for these", name, others, len(rows))
    kept = [sample for sample in samples if len(sample.prompt_ids) + len(sample.answer_ids) <= max_length]
    if len(kept) < len(samples):
        logger.warning(
            "%s: %d of %d samples exceed max_length %d", name, len(samples) - len(kept), len(samples), max_length
        )
    if not kept:
        raise InputError(f"{name}: no training sample of at most {max_length} tokens; raise max_length")
    return kept


def with_all_answers(
    sample: Sample, row: Mapping[str, Any], prompts: PromptFormat, max_length: int, *, with_end: bool
) -> Sample:
    """A sample with each answer that its teacher gave a probability to, and that is short enough."""
    probabilities = row["teacher"]["probabilities"]
    others = [
        Sample(*prompts.encode_pair(row["input"], text, with_end=with_end), probability=probability)
        for text, probability in probabilities.items()
        if text != row["answer"]
    ]
    others = [one for one in others if len(one.prompt_ids) + len(one.answer_ids) <= max_length]
    own = probabilities[row["answer"]]
    total = own + sum(one.probability for one in others)
    return replace(
        sample,
        probability=own / total,
        others=tuple(replace(one, probability=one.probability / total) for one in others),
    )


def num_too_long(rows: Sequence[tuple[str, str]], prompts: PromptFormat, max_length: int) -> int:
    """How many of some inputs and answers `encode_samples` leaves out."""
    return sum(sum(map(len, prompts.encode_pair(*row))) > max_length for row in rows)


def teacher_odds(row: Mapping[str, Any], answer_ids: Sequence[int], vocabulary: int) -> list[TokenOdds] | None:
    """A row's teacher at each token of the answer; None where the row has none, or the teacher saw other tokens.

    Args:
        vocabulary: tokens of it; heads are padded beyond them, each base's in its own way.
    """
    teacher = row.get("teacher", {})
    if "tokens" not in teacher or teacher["answer_ids"] != list(answer_ids):
        return None
    places = zip(teacher["tokens"], teacher["log_p"], strict=True)
    return [
        {token: value for token, value in zip(tokens, log_p, strict=True) if token < vocabulary}
        for tokens, log_p in places
    ]


def chosen_tokens(teacher: Mapping[str, Any], spans: Sequence[tuple[int, int]], share: float) -> list[bool]:
    """Which tokens of an answer are trained on: the share of them, rounded up, with the greatest excess (TiTok).

    The tokens of two tokenizers meet in the characters: a token has the mean excess of the teacher's tokens that it
    shares any with. Tokens that share none, as the answer's end does, are always trained on.

    Args:
        teacher: `spans`, the first character of each of its tokens and the one behind the last, and their `excess`.
        spans: those of the student's tokens.
    """
    scores: dict[int, float] = {}
    for index, (start, end) in enumerate(spans):
        own = zip(teacher["spans"], teacher["excess"], strict=True)
        shared = [value for (first, behind), value in own if first < end and start < behind]
        if start < end and shared:
            scores[index] = sum(shared) / len(shared)
    best = set(sorted(scores, key=lambda index: -scores[index])[: math.ceil(share * len(scores) - 1e-9)])
    return [index in best or index not in scores for index in range(len(spans))]


def num_steps(num_samples: int, epochs: float, batch_size: int) -> int:
    """Optimizer steps of a run; the last batch of an epoch may be smaller."""
    return max(1, math.ceil(epochs * math.ceil(num_samples / batch_size)))


def check_links(num_links: int, num_steps: int, num_init_steps: int, where: str) -> None:
    """Whether the steps of a run are enough for each link of its chain, the first of which an initialisation precedes.

    Raises:
        InputError: they are not.
    """
    if num_links > num_steps or (num_links > 1 and math.ceil(num_steps / num_links) <= num_init_steps):
        init = ", the first of which eva takes" * bool(num_init_steps)
        raise InputError(
            f"{where}: a chain of {num_links} links in {num_steps} steps{init}; lower lora.chain.links, or raise epochs"
        )


def batch_indices(num_samples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Sample indices of one optimizer step: a new order each epoch, drawn from the adapter's seed."""
    steps_per_epoch = math.ceil(num_samples / batch_size)
    epoch, position = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
    order = torch.randperm(num_samples, generator=generator).tolist()
    return order[position * batch_size : (position + 1) * batch_size]


@dataclass(frozen=True)
class Packed:
    """Samples of several adapters in one row without padding, adapter-major."""

    inputs: dict[str, object]
    """What the model is called with; input_ids is [1, T]."""
    segments: tuple[Segment, ...]
    """Which tokens belong to which slot."""
    positions_L: torch.Tensor
    """Places in 0..T-1 that predict an answer's token."""
    labels_L: torch.Tensor
    """The tokens they predict."""
    weights_L: torch.Tensor
    """Weight of each token's cross-entropy, float32."""
    answers: dict[int, slice]
    """Each slot's part of L."""
    teacher: tuple[torch.Tensor, torch.Tensor] | None = None
    """Tokens [L, K] and their log-probabilities [L, K], -inf where a place has fewer than K."""


def pack(
    shards: Sequence[tuple[int, Sequence[Sample], float]], place: torch.device, *, top_k: int | None = None
) -> Packed:
    """Pack (slot, samples, weight of an answer's token) one behind the other.

    The last token of an answer predicts nothing and stays out. Each answer of a sample is a sequence of its own.

    Args:
        top_k: K; adds the teacher. Without one a sample's own tokens are certain.
    """
    ids: list[int] = []
    lengths: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    segments, answers = [], {}
    for slot, samples, weight in shards:
        start, first = len(ids), len(labels)
        for sample in (one for every in samples for one in every.answers):
            tokens = sample.prompt_ids + sample.answer_ids[:-1]
            predicting = len(ids) + len(sample.prompt_ids) - 1
            positions += range(predicting, predicting + len(sample.answer_ids))
            labels += sample.answer_ids
            own = weight * sample.probability
            weights += [own * chosen for chosen in sample.chosen or [True] * len(sample.answer_ids)]
            ids += tokens
            lengths.append(len(tokens))
        segments.append(Segment(slot, start, len(ids)))
        answers[slot] = slice(first, len(labels))
    teacher = None
    if top_k is not None:
        odds = [
            place_odds
            for _, samples, _ in shards
            for every in samples
            for sample in every.answers
            for place_odds in sample.teacher or [{token: 0.0} for token in sample.answer_ids]
        ]
        teacher = pad_odds(odds, top_k, place)
    return Packed(
        inputs={"input_ids": torch.tensor([ids], device=place), **packed_inputs(lengths, place)},
        segments=tuple(segments),
        positions_L=torch.tensor(positions, device=place),
        labels_L=torch.tensor(labels, device=place),
        weights_L=torch.tensor(weights, dtype=torch.float32, device=place),
        answers=answers,
        teacher=teacher,
    )


def pad_odds(odds: Sequence[TokenOdds], top_k: int, place: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-probabilities [L, K] of L places, filled up with token 0 of probability 0."""
    tokens = torch.zeros(len(odds), top_k, dtype=torch.long)
    log_p = torch.full((len(odds), top_k), -math.inf)
    for row, one in enumerate(odds):
        tokens[row, : len(one)] = torch.tensor(list(one), dtype=torch.long)
        log_p[row, : len(one)] = torch.tensor(list(one.values()))
    return tokens.to(place), log_p.to(place)
