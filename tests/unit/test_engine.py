import math
import types
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.tiny import make_adapter, make_base, make_tokenizer
from translora.actors.blocks import token_block
from translora.bundle.base import UnusableBaseError
from translora.config import BaseModelConfig, SamplingConfig
from translora.engine.decode import Request, Row, choose_tokens
from translora.engine.loading import resolve_dtype
from translora.engine.prompts import prompt_format
from translora.engine.protocol import Engine, answer_tokens, check_answers, warn_of_answers
from translora.engine.transformers import TransformersEngine
from translora.synthesis.screens import ANSWER_SCORES, discriminator_scores, screen_and_label_block

PROMPTS = ["Route the message:", "The parcel is late. I was charged twice", "When does the shop open", "a"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("engine") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, str]:
    return {
        f"a{seed}": str(make_adapter(base.parent / f"a{seed}", base, seed=seed, rank=2 + seed)) for seed in range(3)
    }


@pytest.fixture(scope="module")
def engine(base: Path, adapters: dict[str, str]) -> TransformersEngine:
    return TransformersEngine(BaseModelConfig(model=str(base), dtype="float32"), adapters, 1)


def test_mixed_greedy_generation_equals_peft_generate(
    engine: TransformersEngine, base: Path, adapters: dict[str, str]
) -> None:
    names: list[str | None] = ["a0", "a1", "a2", None]
    requests = [Request(prompt, name, 12) for prompt, name in zip(PROMPTS, names, strict=True)]
    completions = engine.generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        if request.adapter is not None:
            model = PeftModel.from_pretrained(model, adapters[request.adapter]).eval()
        inputs = engine.tokenizer(request.prompt, add_special_tokens=False, return_tensors="pt")
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=12, eos_token_id=engine.end_ids(), pad_token_id=0
        )
        expected = engine.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert completion.text == expected, request


def test_a_teachers_tokens_are_agreed_with_where_they_are_the_likeliest_of_peft(
    engine: TransformersEngine, base: Path, adapters: dict[str, str]
) -> None:
    """Answers that an adapter likes in part: its own first half, and half a text of somebody else."""
    form, names = prompt_format(engine.tokenizer, "{input}"), ["a0", "a1", None]
    own = engine.generate([Request(form.render(PROMPTS[1]), "a0", 12)])[0].text
    rows = [{"slot": name, "input": PROMPTS[1], "answer": own + PROMPTS[0], "template": "{input}"} for name in names]
    found = token_block(engine, [dict(row) for row in rows], {})
    for row, seen in zip(rows, found, strict=True):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        if row["slot"] is not None:
            model = PeftModel.from_pretrained(model, adapters[str(row["slot"])]).eval()
        prompt, answer = form.encode_pair(PROMPTS[1], str(row["answer"]))
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        expected = (logits.argmax(-1) == torch.tensor(answer)).float().mean()
        assert seen["agreed"] == pytest.approx(float(expected))
    assert found[0]["agreed"] > max(found[1]["agreed"], found[2]["agreed"])


def test_an_adapter_answers_otherwise_than_its_base(engine: TransformersEngine) -> None:
    with_adapter = engine.generate([Request(prompt, "a0", 12) for prompt in PROMPTS])
    bare = engine.generate([Request(prompt, None, 12) for prompt in PROMPTS])
    assert all(one.text != other.text for one, other in zip(with_adapter, bare, strict=True))


def test_neighbours_never_change_a_sample(engine: TransformersEngine) -> None:
    sampling = SamplingConfig(temperature=1.3, top_k=40)
    request = Request(PROMPTS[0], "a1", 16, seed=7)
    alone = engine.generate([request], sampling)[0]
    neighbours = [Request(PROMPTS[1], "a0", 16, seed=1), Request(PROMPTS[3], None, 24, seed=2)]
    together = engine.generate([neighbours[0], request, neighbours[1]], sampling)[1]
    assert together == alone
    assert engine.generate([Request(PROMPTS[0], "a1", 16, seed=8)], sampling)[0].text != alone.text


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_seeded_sampling_draws_from_the_softmax(temperature: float) -> None:
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])
    rows = [Row(Request("", None, 1, seed=seed), torch.Generator().manual_seed(seed)) for seed in range(4000)]
    logits = torch.log(weights).repeat(4000, 1)
    drawn = Counter(choose_tokens(logits, rows, SamplingConfig(temperature=temperature, top_k=3)))
    assert 3 not in drawn, "outside the top k"
    powers = weights[:3] ** (1 / temperature)
    for token, probability in enumerate((powers / powers.sum()).tolist()):
        deviation = math.sqrt(probability * (1 - probability) / 4000)
        assert abs(drawn[token] / 4000 - probability) < 4 * deviation
    greedy = Row(Request("", None, 1), None)
    assert choose_tokens(logits[:2], [greedy, rows[0]], SamplingConfig(top_k=1)) == [0, 0]


def test_rows_that_end_early_and_rows_that_begin_alike_change_nothing(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same prompt with several seeds, limits of all lengths: as if each row were generated alone."""
    sampling = SamplingConfig(temperature=1.3, top_k=40)
    limits = (3, 20, 7, 16, 2, 11)
    requests = [Request(PROMPTS[i % 2], "a1", limit, seed=i) for i, limit in enumerate(limits)]
    requests.append(Request(PROMPTS[0], "a0", 9, seed=5))
    widths: list[int] = []
    route = engine.bank.route_rows
    monkeypatch.setattr(engine.bank, "route_rows", lambda rows, place: (widths.append(len(rows)), route(rows, place)))
    together = engine.generate(requests, sampling)
    assert widths[:2] == [3, 7], "three different prompts are computed, seven rows go on"
    assert widths[2:] == sorted(widths[2:], reverse=True) and widths[-1] <= 2, "rows that ended leave"
    assert together == [engine.generate([request], sampling)[0] for request in requests]


def test_a_stop_pattern_ends_a_completion_and_a_limit_leaves_it_unfinished(engine: TransformersEngine) -> None:
    free = engine.generate([Request(PROMPTS[1], None, 24)])[0]
    assert not free.finished
    middle = free.text[len(free.text) // 2]
    stopped = engine.generate([Request(PROMPTS[1], None, 24, stop=f"[{middle}]")])[0]
    assert stopped.finished
    assert stopped.text == free.text.split(middle)[0]


def test_an_answer_in_pieces_is_known_by_its_first() -> None:
    tokenizer = make_tokenizer(vocab_size=262)
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in answer_tokens(tokenizer).values()] == [["y"], ["n"]]
    check_answers(tokenizer)


def test_a_discriminator_must_answer_with_a_token_that_its_odds_are_read_from() -> None:
    """A tokenizer that has `yes` and no ` yes`: behind a space the answer is two tokens, the first the same for no."""
    letters = {text: index for index, text in enumerate(["<eos>", *"yesnoa \n:QA?", "ye", "yes", "no"])}
    whole = Tokenizer(models.BPE(letters, [("y", "e"), ("ye", "s"), ("n", "o")]))
    whole.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<eos>")
    assert letters[" "] not in {token for ids in answer_tokens(tokenizer).values() for token in ids}
    check_answers(tokenizer, "Q: {input} A: ")
    with pytest.raises(
        UnusableBaseError, match=r"of the answer 'yes' to the template 'Q: {input} A:': yes and no begin alike"
    ):
        check_answers(tokenizer, "Q: {input} A:")


def test_a_base_whose_discriminators_can_tell_nothing_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """SentencePiece as Llama 2 has it: a space before every text, so that yes and no behind one begin alike."""
    texts = ["<eos>", "\u2581", *"yesno", "ye", "yes", "no", "\u2581\u2581"]
    pieces = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    whole = Tokenizer(models.BPE(pieces, [("y", "e"), ("ye", "s"), ("n", "o"), ("\u2581", "\u2581")]))
    whole.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<eos>")
    assert all(answer_tokens(tokenizer).values()), "odds of nothing at all are no number"
    warn_of_answers(tokenizer, "{input}\nAnswer:")
    assert "yes and no begin alike" in caplog.text


def test_the_bank_changes_its_adapters_on_a_resident_base(base: Path, adapters: dict[str, str]) -> None:
    config = BaseModelConfig(model=str(base), dtype="float32")
    engine = TransformersEngine(config, {}, 1)
    bare = engine.generate([Request(PROMPTS[0], None, 8)])
    modules = {name for name, _ in engine.model.named_modules()}
    for names in (["a0", "a1"], ["a2"], ["a1"]):
        engine.use_adapters({name: adapters[name] for name in names})
        expected = TransformersEngine(config, {name: adapters[name] for name in names}, 1)
        requests = [Request(PROMPTS[0], name, 8) for name in names]
        assert engine.generate(requests) == expected.generate(requests) != bare * len(names)
        assert engine.bank.names == names
    engine.use_adapters({})
    assert engine.generate([Request(PROMPTS[0], None, 8)]) == bare
    assert {name for name, _ in engine.model.named_modules()} == modules


@pytest.mark.parametrize("num_rows", [1, 3])
def test_the_heads_input_has_plain_strides(engine: TransformersEngine, num_rows: int) -> None:
    """Last positions are a strided view, for which torch copies the head's weight; one row hides its strides."""
    strides = []
    head = engine.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, args, __: strides.append(args[0].stride()))
    engine.generate([Request(prompt, None, 1) for prompt in PROMPTS[:num_rows]])
    hook.remove()
    assert strides == [(32, 32, 1)]


@pytest.mark.parametrize("screen", ["confidence", "excess"])
def test_an_answer_is_scored_by_the_adapter_and_its_base(engine: TransformersEngine, screen: str) -> None:
    """Confidence: the geometric mean of the answer's probabilities, its end's among them; excess: over the base's."""
    template = "{input} ->"
    rows = [
        {"slot": "a0", "screen": screen, "template": template, "stop": None, "input": f"Order {i}"} for i in range(3)
    ]
    answered = screen_and_label_block(engine, rows, {"max_answer_tokens": 6})
    assert [row["score"] is not None for row in answered] == [
        bool(row["answer"]) and row["finished"] for row in answered
    ]
    given = [{**row, "answer": answer} for row, answer in zip(rows, ("yes", "no, thanks", "ok"), strict=True)]
    for row, score in zip(given, ANSWER_SCORES[screen](engine, given), strict=True):
        prompts = prompt_format(engine.tokenizer, template)
        sample = prompts.encode_pair(row["input"], row["answer"])
        own, bare = (np.mean(engine.log_likelihood([sample], [slot])[0]) for slot in ("a0", None))
        assert score == pytest.approx(math.exp(own) if screen == "confidence" else own - bare, rel=1e-3)


def test_a_discriminator_refuses_by_its_odds_or_only_ranks_by_them(engine: TransformersEngine) -> None:
    common = {"slot": "a0", "discriminator": "a1", "task_name": "orders", "template": "{input} ->", "stop": None}
    rows = [
        {**common, "screen": screen, "input": f"Order {i}"}
        for screen in ("discriminator", "realness")
        for i in range(6)
    ]
    odds = discriminator_scores(engine, rows)
    assert odds[:6] == pytest.approx(odds[6:], abs=1e-5)
    middle = sorted(odds)[6]  # half of them are above: the untrained discriminator's odds, told from there
    shifted = types.SimpleNamespace(
        tokenizer=engine.tokenizer,
        generate=engine.generate,
        log_odds=lambda *asked: [value - middle for value in engine.log_odds(*asked)],
    )
    found = screen_and_label_block(cast(Engine, shifted), rows, {"max_answer_tokens": 6})
    assert [row["score"] for row in found] == pytest.approx([value - middle for value in odds], abs=1e-5)
    assert [row["answer"] is not None for row in found[:6]] == [row["score"] > 0 for row in found[:6]]
    assert any(row["answer"] is None for row in found[:6]) and all(row["answer"] is not None for row in found[6:])


@pytest.mark.parametrize("screen", ["confidence", "excess"])
def test_the_end_of_an_answer_that_ends_at_a_text_is_not_scored(engine: TransformersEngine, screen: str) -> None:
    """Its adapter never learnt to end an answer: what it thinks of an end says nothing of how sure it is."""
    common = {"slot": "a0", "screen": screen, "template": "{input} ->"}
    rows = [{**common, "stop": r"(?<=\S\S)", "input": f"Order {i}"} for i in range(3)]
    answered = screen_and_label_block(engine, rows, {"max_answer_tokens": 6})
    scored = [row for row in answered if row["answer"] and row["finished"]]
    assert scored
    for row in scored:
        sample = prompt_format(engine.tokenizer, row["template"]).encode_pair(
            row["input"], row["answer"], with_end=False
        )
        own, bare = (np.mean(engine.log_likelihood([sample], [slot])[0]) for slot in ("a0", None))
        assert row["score"] == pytest.approx(math.exp(own) if screen == "confidence" else own - bare, rel=1e-3)


def test_log_likelihood_is_that_of_the_whole_logits(engine: TransformersEngine, base: Path) -> None:
    samples = [([5, 6, 7], [8, 9]), ([10] * 9, [11]), ([12], [13, 14, 15, 16])]
    names = ["a0", None, "a2"]
    found = engine.log_likelihood(samples, names)
    assert [len(row) for row in found] == [2, 1, 4]
    for (prompt, answer), name, values in zip(samples, names, found, strict=True):
        engine.bank.route_rows([name], engine.device)
        with torch.no_grad():
            logits = engine.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = [float(row[token]) for row, token in zip(logits, answer, strict=True)]
        assert values == pytest.approx(expected, abs=1e-4)
        ((tokens, log_p),) = engine.top_log_probabilities([(prompt, answer)], [name], 5)
        top = logits.topk(5, dim=-1)
        assert tokens == top.indices.tolist()
        torch.testing.assert_close(torch.tensor(log_p), top.values, rtol=1e-4, atol=1e-4)
    assert found[0] != engine.log_likelihood(samples, [None] * 3)[0]
    batched = engine.top_log_probabilities(samples, names, 5)
    assert [len(tokens) for tokens, _ in batched] == [2, 1, 4]


@pytest.mark.parametrize(
    ("cpu", "dtype"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.float32),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, torch.bfloat16),
        ({"avx512_bf16": False, "cpu_name": "AMD EPYC"}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_the_dtype_of_auto_is_what_the_device_gains_by(
    monkeypatch: pytest.MonkeyPatch, cpu: dict[str, Any], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert resolve_dtype("auto") == dtype
    assert (resolve_dtype("float32"), resolve_dtype("bfloat16")) == (torch.float32, torch.bfloat16)
    assert resolve_dtype("auto", on_gpu=True) == torch.bfloat16, "of workers that have what this driver lacks"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert resolve_dtype("auto") == torch.bfloat16
    assert resolve_dtype("auto", on_gpu=False) == dtype, "of actors on the CPU beside a driver that sees a GPU"
