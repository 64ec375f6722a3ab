"""How a task input becomes a prompt, and an answer its continuation, for a given base.

A template is `chat` (the tokenizer's own chat template, the input as the only user message), a string
that contains {input}, or `auto`: chat where the tokenizer has a chat template, PLAIN_TEMPLATE elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from translora.errors import InputError

PLAIN_TEMPLATE = "{input}\nAnswer:"
_MARK = "\u2063answer\u2063"


@dataclass(frozen=True)
class PromptFormat:
    """Prompt and answer texts of one base. Build it with `prompt_format`."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    end: str
    """What follows an answer: the end-of-turn or end-of-text token."""
    lead: str
    """What stands between prompt and answer: a space after a plain template, what the chat template has there."""

    @property
    def holds_bos(self) -> bool:
        """Whether the template begins with the token that begins a text, as a chat template that is written out."""
        bos = self.tokenizer.bos_token
        return bool(bos) and self.template.startswith(bos)

    def render(self, text: str) -> str:
        """The prompt for a task input, special tokens included."""
        if self.template == "chat":
            message = [{"role": "user", "content": text}]
            rendered = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            assert isinstance(rendered, str)
            return rendered
        bos = self.tokenizer.bos_token if _adds_bos(self.tokenizer) and not self.holds_bos else ""
        return f"{bos}{self.template.replace('{input}', text)}"

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of the prompt."""
        return self.encode(self.render(text))

    def encode_pair(self, text: str, answer: str, *, with_end: bool = True) -> tuple[list[int], list[int]]:
        """Token ids of the prompt for a task input, and of an answer and its end as they follow it.

        Tokenizers that mark the beginning of a text cut an answer by itself otherwise than behind its prompt. Where the
        prompt has other tokens once an answer follows it, the answer is cut by itself all the same: an adapter that
        writes answers sees the prompt alone.
        """
        prompt, behind = self.render(text), f"{self.lead}{answer}{self.end if with_end else ''}"
        prompt_ids, whole = self.encode(prompt), self.encode(prompt + behind)
        follows = whole[: len(prompt_ids)] == prompt_ids
        return prompt_ids, whole[len(prompt_ids) :] if follows else self.encode(behind)

    def answer_spans(self, text: str, answer: str) -> list[tuple[int, int]]:
        """Characters start..end of the answer in each of its tokens of `encode_pair`; none (start = end) in its end's.

        Raises:
            InputError: the tokenizer does not know which characters a token stands for.
        """
        if not self.tokenizer.is_fast:
            raise InputError(f"{type(self.tokenizer).__name__} does not tell the characters of a token; token_share: 1")
        prompt, behind = self.render(text), f"{self.lead}{answer}{self.end}"
        prompt_ids, before = self.encode(prompt), len(prompt) + len(self.lead)
        found = self.tokenizer(prompt + behind, add_special_tokens=False, return_offsets_mapping=True)
        if found["input_ids"][: len(prompt_ids)] == prompt_ids:
            spans = found["offset_mapping"][len(prompt_ids) :]
        else:
            before = len(self.lead)
            spans = self.tokenizer(behind, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        clipped = [[min(max(place - before, 0), len(answer)) for place in span] for span in spans]
        return [(start, end) for start, end in clipped]

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a text whose special tokens are already in it."""
        ids: list[int] = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return ids

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer."""
        ends = {self.tokenizer.eos_token_id, *self.encode(self.end)[-1:]}
        return sorted(token for token in ends if token is not None)


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def raw_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text to be continued, with the tokenizer's beginning-of-text token where it uses one."""
    return f"{tokenizer.bos_token}{text}" if _adds_bos(tokenizer) else text


def prompt_format(tokenizer: PreTrainedTokenizerBase, template: str = "auto") -> PromptFormat:
    """The format of a base's prompts.

    Raises:
        InputError: `chat` without a chat template, or a template without {input} or with several.
    """
    has_chat = bool(tokenizer.chat_template)
    if template == "auto":
        template = "chat" if has_chat else PLAIN_TEMPLATE
    eos = tokenizer.eos_token or ""
    if template != "chat":
        if (count := template.count("{input}")) != 1:
            fault = "lacks {input}" if count == 0 else f"has {{input}} {count} times"
            remedy = "put it once, where the task input goes, or use auto"
            raise InputError(f"prompt template {template!r} {fault}; {remedy}")
        return PromptFormat(tokenizer, template, eos, "" if template[-1:].isspace() else " ")
    if not has_chat:
        raise InputError("prompt template is 'chat', but the tokenizer has no chat template; use a string with {input}")
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert isinstance(asked, str) and isinstance(rendered, str)
    before, _, after = rendered.rpartition(_MARK)
    lead = before.removeprefix(asked)
    return PromptFormat(tokenizer, "chat", after.strip() or eos, lead if lead.isspace() else "")
