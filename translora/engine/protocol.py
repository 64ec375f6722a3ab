"""What an engine is: a resident base that generates and scores rows, each with an adapter of its own."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from translora.bundle.base import UnusableBaseError
from translora.config import SamplingConfig
from translora.engine.decode import Request, Row
from translora.engine.prompts import prompt_format
from translora.errors import InputError

logger = logging.getLogger(__name__)
Samples = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Token ids of prompts and of their answers, neither of them empty."""


@dataclass(frozen=True)
class Completion:
    """What came back for a request."""

    text: str
    """Completion up to the end token or the stop pattern."""
    finished: bool
    """False when `max_new_tokens` cut it off."""


class EngineDied(RuntimeError):
    """What the engine runs outside this process is gone: nothing can be computed with it any more."""


class RowTooLong(InputError):
    """A row has more tokens than the engine takes."""


class Engine(Protocol):
    """A base in this process; rows of one call may belong to different adapters, None is the bare base."""

    tokenizer: PreTrainedTokenizerBase

    def use_adapters(self, adapters: Mapping[str, str | Path]) -> None:
        """Have exactly these adapters: PEFT directory by slot name; nothing to do where they are there.

        Raises:
            InputError, OSError: one of them cannot be used.
        """

    def load(self) -> None:
        """Have the base in memory, where it is not."""

    def check_adapter(self, path: str | Path) -> None:
        """Read one adapter, and whether this engine computes its kind.

        Raises:
            InputError, OSError: it cannot be used.
        """

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig | None = None) -> list[Completion]:
        """Complete every request; `sampling` is for those that have a seed, the others are greedy."""

    def log_odds(self, prompts: Sequence[str], adapters: Sequence[str | None]) -> list[float]:
        """log p("yes") - log p("no") as the next token of each prompt, summed over the answers' token variants."""

    def log_likelihood(self, samples: Samples, adapters: Sequence[str | None]) -> list[list[float]]:
        """log p of each token of an answer, given the prompt and the answer's tokens before it."""

    def top_log_probabilities(
        self, samples: Samples, adapters: Sequence[str | None], top_k: int
    ) -> list[tuple[list[list[int]], list[list[float]]]]:
        """The most likely tokens at each token of an answer, and their log-probabilities, [answer's length, K] each."""

    def close(self) -> None:
        """Give its memory back; it is not used again."""


def completion(row: Row, tokenizer: PreTrainedTokenizerBase, end_ids: set[int]) -> Completion:
    """The text of a row that has ended."""
    end = next((index for index, token in enumerate(row.ids) if token in end_ids), None)
    text: Any = tokenizer.decode(row.ids if end is None else row.ids[:end], skip_special_tokens=True)
    stop = row.request.stop
    match = re.search(stop, text) if stop is not None else None
    if match is not None:
        return Completion(text[: match.start()], True)
    return Completion(text, end is not None)


def end_tokens(tokenizer: PreTrainedTokenizerBase, own: int | list[int] | None) -> list[int]:
    """Tokens that end a completion: end of text, of a chat turn, and the base's `own`, its config's eos_token_id."""
    named = own if isinstance(own, list) else [own]
    return sorted(token for token in {*prompt_format(tokenizer).end_ids, *named} if token is not None)


def answer_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Ids of the tokens that a discriminator's answer begins with, for `yes` and for `no`.

    The single tokens that spell it, with or without a space, in any usual case, at the beginning of a text or of a line
    (which SentencePiece tells apart); where there is none, the first of its pieces, without those that both answers
    begin with, which tell nothing.
    """
    line: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"]
    found = dict[str, set[int]]()
    for word in ("yes", "no"):
        texts = [f"{space}{text}" for text in (word, word.capitalize(), word.upper()) for space in ("", " ")]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        behind = [tokenizer(f"\n{text}", add_special_tokens=False)["input_ids"] for text in texts]
        ids += [tokens[len(line) :] for tokens in behind if tokens[: len(line)] == line]
        whole = {tokens[0] for tokens in ids if len(tokens) == 1}
        found[word] = whole or {tokens[0] for tokens in (*ids[:2], *ids[len(texts) :][:2]) if tokens}
    shared = found["yes"] & found["no"]
    return {word: sorted(ids - shared or ids) for word, ids in found.items()}


def check_answers(tokenizer: PreTrainedTokenizerBase, template: str = "auto") -> None:
    """Whether a discriminator can answer on a tokenizer's base, to the prompts of a template.

    Raises:
        UnusableBaseError: it cannot: yes and no begin with the same token.
    """
    form = prompt_format(tokenizer, template)
    yes, no = (form.encode_pair("", word, with_end=False)[1] for word in ("yes", "no"))
    if yes[0] == no[0]:
        raise UnusableBaseError(
            f"{tokenizer.name_or_path}: its tokenizer makes {tokenizer.convert_ids_to_tokens(yes)} of the answer 'yes' "
            f"to the template {form.template!r}: yes and no begin alike, and discriminators answer with one token; end "
            "the template with a space, or, for a source, set synthesis.screen to confidence"
        )


def warn_of_answers(tokenizer: PreTrainedTokenizerBase, template: str = "auto") -> None:
    """Say where a base's discriminators will tell nothing: they are measured, and none that cannot tell is trusted."""
    try:
        check_answers(tokenizer, template)
    except UnusableBaseError as error:
        logger.warning("%s", error)
