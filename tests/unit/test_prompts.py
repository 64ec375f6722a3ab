import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.tiny import make_base, make_tokenizer
from translora.config import BaseModelConfig
from translora.engine.loading import load_tokenizer, without_clock
from translora.engine.prompts import PLAIN_TEMPLATE, PromptFormat, prompt_format, raw_prompt
from translora.engine.protocol import answer_tokens
from translora.synthesis.prompts import (
    discriminator_question,
    generation_prompt,
    generation_row,
    generation_stop,
    normalise,
)


def test_chat_format_uses_the_tokenizers_own_template() -> None:
    prompts = prompt_format(make_tokenizer("llama"))
    assert prompts.render("Hello") == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.end == "<|im_end|>"
    answer = prompts.encode_pair("", "billing")[1]
    assert answer[-1] == prompts.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert prompts.end_ids == [answer[-1]]


def test_plain_format_without_a_chat_template_puts_bos_in_front_and_eos_behind() -> None:
    tokenizer = make_tokenizer("gemma3")
    prompts = prompt_format(tokenizer)
    assert prompts.template == PLAIN_TEMPLATE
    ids = prompts.encode_prompt("Hello")
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids[1:]) == "Hello\nAnswer:"
    assert tokenizer.decode(prompts.encode_pair("", "red")[1]) == " red<eos>"
    assert raw_prompt(tokenizer, "1. a") == "<bos>1. a"


LLAMA_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<s>Q {{ message['content'] }} A"
    "{% else %} {{ message['content'] }} </s>{% endif %}{% endfor %}"
)


def make_llama_tokenizer(*, prepends: bool) -> PreTrainedTokenizerBase:
    """Of a few words, as transformers makes Llama's, or as the tokenizer.json of Llama 2 has it."""
    mark = "\u2581"
    pieces = ("<unk>", "<s>", "</s>", mark, "\n", *"yesnoanwr:QAUI", "ye", "yes", "no")
    marked = (f"{mark}y", f"{mark}ye", f"{mark}yes", f"{mark}n", f"{mark}no", mark + mark)
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys((*pieces, *marked)))}
    merges = [(mark, mark), ("y", "e"), ("ye", "s"), ("n", "o"), (mark, "yes"), (mark, "no")]
    if not prepends:
        return LlamaTokenizer(vocab=vocabulary, merges=merges)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(mark), normalizers.Replace(" ", mark)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("prepends", [False, True])
@pytest.mark.parametrize("template", ["Q: {input}\nA:", "Q: {input}\nA:\n"])
def test_an_answer_has_the_tokens_that_it_has_behind_its_prompt(template: str, prepends: bool) -> None:
    """A tokenizer that marks where a text begins marks no answer: the adapter was trained on whole texts."""
    tokenizer = make_llama_tokenizer(prepends=prepends)
    prompts = prompt_format(tokenizer, template)
    prompt, answer = prompts.encode_pair("Q", "yes")
    assert prompt == prompts.encode_prompt("Q")
    assert [*prompt, *answer] == prompts.encode(f"{prompts.render('Q')}{prompts.lead}yes</s>")
    expected = ["yes", "</s>"] if template.endswith("\n") else ["\u2581yes", "</s>"]
    assert tokenizer.convert_ids_to_tokens(answer) == expected
    assert prompts.answer_spans("Q", "yes") == [(0, 3), (3, 3)]
    assert prompts.encode_pair("Q", "yes", with_end=False)[1] == answer[:-1]


@pytest.mark.parametrize("prepends", [False, True])
@pytest.mark.parametrize("template", ["Q: {input}\nA:", "Q: {input}\nA: ", "Q: {input}\nA:\n", "chat"])
def test_what_a_discriminator_learns_to_answer_is_what_is_scored(template: str, prepends: bool) -> None:
    tokenizer = make_llama_tokenizer(prepends=prepends)
    tokenizer.chat_template = LLAMA_CHAT
    prompts, scored = prompt_format(tokenizer, template), answer_tokens(tokenizer)
    for word in ("yes", "no"):
        assert prompts.encode_pair("Q", word, with_end=False)[1][0] in scored[word]
    assert not set(scored["yes"]) & set(scored["no"])


def test_an_answer_is_led_by_what_the_chat_template_puts_before_it() -> None:
    """Llama 2's: `[/INST] yes </s>`; the model writes the space."""
    tokenizer = make_llama_tokenizer(prepends=True)
    tokenizer.chat_template = LLAMA_CHAT
    prompts = prompt_format(tokenizer, "chat")
    assert (prompts.lead, prompts.end) == (" ", "</s>")
    assert tokenizer.convert_ids_to_tokens(prompts.encode_pair("Q", "yes")[1]) == ["\u2581yes", "</s>"]


def test_an_answer_that_changes_its_prompts_tokens_is_cut_by_itself() -> None:
    """What is generated follows the prompt's own tokens."""
    tokenizer = make_llama_tokenizer(prepends=False)
    glued = PromptFormat(tokenizer, "{input}", "</s>", "")
    assert tokenizer.convert_ids_to_tokens(glued.encode("noyes")) == ["\u2581no", "yes"]
    prompt, answer = glued.encode_pair("y", "es")
    assert prompt == glued.encode_prompt("y") and answer == glued.encode("es</s>")
    assert glued.encode("yes</s>") != [*prompt, *answer]


def test_a_template_that_writes_the_beginning_of_the_text_gets_no_second_one() -> None:
    tokenizer = make_tokenizer("gemma3")
    written = prompt_format(tokenizer, "<bos>Q: {input}\nA:")
    assert written.encode_prompt("red") == prompt_format(tokenizer, "Q: {input}\nA:").encode_prompt("red")


def test_an_input_with_braces_is_left_alone() -> None:
    prompts = prompt_format(make_tokenizer("gemma3"), "Q: {input}\nA:")
    assert prompts.render("{input} {name}").endswith("Q: {input} {name}\nA:")


def test_templates_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        prompt_format(make_tokenizer("gemma3"), "chat")
    with pytest.raises(ValueError, match=r"lacks \{input\}"):
        prompt_format(make_tokenizer("llama"), "Question:")
    with pytest.raises(ValueError, match="2 times; put it once"):
        prompt_format(make_tokenizer("llama"), "{input} {input}")


def test_generation_prompt_numbers_all_seeds_and_leaves_the_next_number_open() -> None:
    seeds = ["one", "two", "three", "four", "five"]
    prompt = generation_prompt(seeds, ordering=0, seed=1)
    lines = prompt.split("\n")
    assert lines[0] == "Here are 10 examples:"
    assert lines[-1] == "6."
    assert sorted(line.split(". ")[1] for line in lines[1:-1]) == sorted(seeds)
    assert prompt == generation_prompt(seeds, ordering=0, seed=1)
    assert len({generation_prompt(seeds, ordering=0, seed=seed) for seed in range(20)}) > 10, "orders differ"


def test_the_seeds_take_turns_as_the_last_example() -> None:
    seeds = ["one", "two", "three", "four", "five"]
    rows = [generation_row("task", seeds, sample_id, 0, sample_id % 10) for sample_id in range(40)]
    last = [row["prompt"].split("\n")[-2].removeprefix("5. ") for row in rows]
    assert last == seeds * 8
    assert len({row["prompt"] for row in rows}) == 10, "rows of one order share their prompt"
    assert len({row["seed"] for row in rows}) == 40, "and nothing else"


def test_generation_stops_at_the_line_end_or_at_the_next_number() -> None:
    import re

    one_line = re.search(generation_stop(["a", "b"]), " first\nsecond")
    assert one_line is not None and one_line.start() == len(" first")
    assert re.search(generation_stop(["a", "b"]), "\n first") is None, "leading white space is not an end"
    many_lines = generation_stop(["a\nb", "c"])
    assert re.search(many_lines, "x\ny") is None
    assert re.search(many_lines, "x\ny\n4. z") is not None


def test_discriminator_question_is_the_papers() -> None:
    assert discriminator_question("2 + {name}", "sums") == "2 + {name}\n Is the above question from sums dataset?"


def test_normalise_ignores_how_unicode_writes_a_letter() -> None:
    for text in ("caf\u00e9", "\ud55c\uad6d"):
        apart = unicodedata.normalize("NFD", text)
        assert apart != text and normalise(apart) == normalise(text)


def test_normalise_ignores_case_and_white_space() -> None:
    assert normalise("  A\n b ") == normalise("a B")


def test_seeds_cover_the_answer_classes_the_frequent_ones_first() -> None:
    from translora.bundle.task import choose_seeds

    targets = ["a"] * 6 + ["b"] * 4 + ["c"]
    rows = [{"input": f"text {index}", "target": target} for index, target in enumerate(targets)]
    of = {row["input"]: row["target"] for row in rows}
    assert [of[text] for text in choose_seeds(rows, 5, seed=0)] == ["a", "b", "c", "a", "b"]
    assert len(choose_seeds([*rows, rows[0]], 20, seed=0)) == len(rows), "no input twice"
    assert choose_seeds(rows, 5, seed=0) != choose_seeds(rows, 5, seed=1)


def test_a_prompt_is_the_same_on_every_day(tmp_path: Path) -> None:
    """Llama 3.1's and SmolLM3's templates write today's date where nobody gives one."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{%- if strftime_now is defined %}{%- set date = strftime_now('%d %b %Y') %}{%- endif %}"
        "Today Date: {{ date }} {{ messages[0]['content'] }}"
    )
    base = make_base(tmp_path / "base")
    tokenizer.save_pretrained(base)
    found = load_tokenizer(BaseModelConfig(model=str(base)))
    assert prompt_format(found).render("a") == "Today Date: 26 Jul 2024 a"
    plain = "{{ messages[0]['content'] }}"
    assert without_clock(plain) == plain
