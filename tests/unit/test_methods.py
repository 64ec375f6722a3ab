"""Adapters that the bank does not have, against PEFT itself: answers, training, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from benchmarks.whole import WholeBase
from tests.methods import METHODS, answer_logits, load, make_method, plain_losses
from tests.tiny import ROWS, make_adapter, make_base
from translora.bundle import inspect_base
from translora.bundle.adapter import check_adapter, is_in_bank
from translora.config import BaseModelConfig, TrainConfig
from translora.distill.data import encode_samples
from translora.distill.gang import Gang
from translora.distill.job import TrainJob
from translora.distill.peft_slot import peft_slot
from translora.distill.train import train
from translora.engine.decode import Request
from translora.engine.loading import load_tokenizer
from translora.engine.prompts import prompt_format
from translora.engine.transformers import TransformersEngine
from translora.lora.kinds import METHODS as KINDS
from translora.lora.kinds import SOURCES_ONLY
from translora.lora.method_settings import parse_method
from translora.run.check import check_section
from translora.run.files import write_jsonl

PROMPTS = ["Route the message:", "The parcel is late. I was charged twice", "When does the shop open", "a"]
CONFIG = TrainConfig.model_validate(
    {"batch_size": 5, "micro_batch_size": 2, "max_length": 64, "learning_rate": 1e-2, "gang_size": 1}
)
pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("methods") / "base", request.param, std=0.1)


def test_every_method_that_is_offered_is_tried_here() -> None:
    assert {settings["peft_type"] for settings in METHODS.values()} == KINDS


@pytest.mark.parametrize("name", METHODS)
def test_an_engine_answers_as_peft_does_beside_adapters_of_the_bank(base: Path, tmp_path: Path, name: str) -> None:
    adapter = make_method(tmp_path / "other", base, METHODS[name])
    assert not is_in_bank(adapter)
    info = inspect_base(str(base))
    check_adapter(adapter, info)
    settings = TrainConfig.model_validate({"peft": METHODS[name]})
    if METHODS[name]["peft_type"] in SOURCES_ONLY:
        with pytest.raises(ValueError, match="cannot be trained on a partitioned base"):
            check_section(settings, info, "distill")
    else:
        check_section(settings, info, "distill")
    lora = make_adapter(tmp_path / "lora", base, seed=3)
    engine = TransformersEngine(BaseModelConfig(model=str(base), dtype="float32"), {"other": adapter, "lora": lora}, 1)
    names: list[str | None] = ["other", "lora", "other", None]
    completions = engine.generate([Request(text, one, 12) for text, one in zip(PROMPTS, names, strict=True)])
    ids = [(engine.tokenizer(text, add_special_tokens=False)["input_ids"], [5, 6, 7]) for text in PROMPTS]
    likelihoods = engine.log_likelihood(ids, names)
    odds = engine.log_odds(PROMPTS, names)
    yes, no = (engine._answer_ids[word] for word in ("yes", "no"))
    for index, (one, directory) in enumerate(zip(names, [adapter, lora, adapter, None], strict=True)):
        model = load(base)
        if directory is not None:
            model = PeftModel.from_pretrained(model, directory).eval()
        inputs = engine.tokenizer(PROMPTS[index], add_special_tokens=False, return_tensors="pt")
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=12, eos_token_id=engine.end_ids(), pad_token_id=0
        )
        expected = engine.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert completions[index].text == expected, one
        with torch.no_grad():
            log_p = answer_logits(model, *ids[index]).log_softmax(-1)[torch.arange(3), torch.tensor([5, 6, 7])]
            last_V = model(inputs["input_ids"]).logits[0, -1]
        torch.testing.assert_close(torch.tensor(likelihoods[index]), log_p, rtol=1e-4, atol=1e-4)
        expected_odds = float(last_V[yes].logsumexp(-1) - last_V[no].logsumexp(-1))
        assert odds[index] == pytest.approx(expected_odds, abs=1e-3)


def test_a_shared_beginning_is_computed_once_behind_virtual_tokens(base: Path, tmp_path: Path) -> None:
    """Long prompts that begin alike, of an adapter with virtual tokens: the same answers as one at a time."""
    adapter = make_method(tmp_path / "prompt", base, METHODS["prompt"])
    engine = TransformersEngine(BaseModelConfig(model=str(base), dtype="float32"), {"one": adapter}, 1)
    common = "Please send my order to the new address. When does the shop open on Sunday? "
    requests = [Request(common + text, "one", 10) for text in PROMPTS]
    together = [completion.text for completion in engine.generate(requests)]
    assert together == [engine.generate([request])[0].text for request in requests]


@pytest.mark.parametrize("name", METHODS)
def test_training_gives_the_losses_of_a_plain_training_with_peft(base: Path, tmp_path: Path, name: str) -> None:
    settings = METHODS[name]
    data = tmp_path / "data.jsonl"
    write_jsonl(data, ROWS)
    job = TrainJob("a", str(data), str(tmp_path / "out"), str(tmp_path), 7, 3, CONFIG.learning_rate, peft=settings)
    whole = WholeBase(base, torch.float32, ("q_proj", "v_proj"))
    with peft_slot(whole, settings) as slots:
        train(whole, Gang(whole, [job], CONFIG, 1, base_name="base", group=None, slots=slots), tmp_path / "c", 100)
    losses = json.loads((tmp_path / "out" / "losses.json").read_text())
    samples = encode_samples(ROWS, prompt_format(whole.tokenizer), CONFIG.max_length, "a")
    expected = plain_losses(base, samples, settings, CONFIG, 7, 3)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
    check_adapter(tmp_path / "out", inspect_base(str(base)))
    loaded = PeftModel.from_pretrained(load(base), tmp_path / "out").eval()
    with torch.no_grad():
        engine = TransformersEngine(BaseModelConfig(model=str(base), dtype="float32"), {"a": tmp_path / "out"}, 1)
        sample = samples[0]
        log_p = answer_logits(loaded, sample.prompt_ids, sample.answer_ids).log_softmax(-1)
        own = log_p[torch.arange(len(sample.answer_ids)), torch.tensor(sample.answer_ids)]
        found = engine.log_likelihood([(sample.prompt_ids, sample.answer_ids)], ["a"])[0]
    torch.testing.assert_close(torch.tensor(found), own, rtol=1e-4, atol=1e-4)
    assert str(base) not in (tmp_path / "out" / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "distill.peft.peft_type is None; supported are"),
        ({"peft_type": "XLORA"}, "peft_type is 'XLORA'; supported are"),
        ({"peft_type": "IA3", "rank": 3}, "distill.peft.rank: PEFT's IA3 has no such setting"),
        ({"peft_type": "LORA", "use_dora": True, "lora_dropout": 0.1}, "lora_dropout: 0.1; students are trained"),
        ({"peft_type": "LORA", "bias": "all"}, "only bias='none' is supported"),
        ({"peft_type": "LORA", "modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"peft_type": "LORA", "use_dora": True, "init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 99999}, "num_virtual_tokens is 99999, the limit is 4096"),
        ({"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "x"}, "is set by translora; leave it out"),
        (
            {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "num_transformer_submodules": 2},
            "num_transformer_submodules is for the virtual tokens of encoder-decoders",
        ),
        (
            {"peft_type": "LORA", "use_dora": True, "layers_to_transform": [0], "layers_pattern": ["([a-z]+)+!"]},
            "layers_pattern has the key",
        ),
        (
            {"peft_type": "LORA", "use_dora": True, "rank_pattern": {f"q{i}": 1 for i in range(3000)}},
            "rank_pattern: 3000 entries, the limit is 2000",
        ),
        ({"peft_type": "LORA", "use_dora": True, "lora_alpha": float("nan")}, "lora_alpha is nan"),
        (
            {"peft_type": "LORA", "use_dora": True, "lora_alpha": 0},
            "lora_alpha is 0, expected a positive number, below 1e9; correct",
        ),
        ({"peft_type": "lora", "r": -4}, "r is -4, expected a positive number, whole and below 1e9; correct it"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "leave it out, or use distill.lora with init: eva"),
        ({"peft_type": "LORA", "bias": "all"}, "only bias='none' is supported; train it without biases"),
        (
            {"peft_type": "IA3", "task_type": "SEQ_CLS"},
            "task_type: 'SEQ_CLS'; what is trained writes answers, leave it",
        ),
        (
            {
                "peft_type": "PROMPT_TUNING",
                "num_virtual_tokens": 4,
                "prompt_tuning_init": "TEXT",
                "prompt_tuning_init_text": 5,
            },
            "prompt_tuning_init_text: 5 is no text",
        ),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "prompt_tuning_init": "TEXT"}, "PEFT refuses it"),
        ({"peft_type": "IA3", "target_modules": "(a*)*b"}, "target_modules has the key"),
        ({"peft_type": "LORA", "use_dora": True, "rank_pattern": {"(a*)*b": 2}}, "rank_pattern has the key"),
        (
            {"peft_type": "LORA", "use_dora": True, "rank_pattern": {"q": 9999}},
            "rank_pattern is {'q': 9999}, the limit",
        ),
        ({"peft_type": "LORA", "megatron_config": {"x": 1}}, "megatron_config is set, which is not supported"),
        ({"peft_type": "LORA", "corda_config": {"cache_file": "x"}}, "corda_config is set, which is not supported"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "token_dim": 999}, "token_dim: is set by translora"),
        ({"peft_type": "LORA", "use_dora": True, "inference_mode": True}, "inference_mode: is set by translora"),
        ({"peft_type": "LORA", "use_dora": True, "init_lora_weights": "eva"}, "use distill.lora.init: eva instead"),
        (
            {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "prompt_tuning_init_text": "hello"},
            "prompt_tuning_init_text: is read for prompt_tuning_init: TEXT alone",
        ),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_method(settings, "distill.peft")
    assert message in str(error.value)


def test_what_could_not_be_read_again_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    info = inspect_base(str(make_base(tmp_path / "base", std=0.1)))
    for kind in ("LORA", "lora"):
        settings = {"peft_type": kind, "target_modules": r".*\.(q_proj|embed_tokens)"}
        with pytest.raises(ValueError, match=r"distill.peft: what it makes: unexpected tensor .*lora_embedding"):
            check_section(TrainConfig.model_validate({"peft": settings}), info, "distill")


def test_each_module_that_is_named_must_be_there(base: Path) -> None:
    """PEFT is content with one of them: a name of another family would be left out without a word."""
    info = inspect_base(str(base))
    wrong = {"peft_type": "LORA", "use_dora": True, "target_modules": ["q_proj", "query"]}
    with pytest.raises(ValueError, match=r"distill.peft.target_modules: query not in .*; it has "):
        check_section(TrainConfig.model_validate({"peft": wrong}), info, "distill")
    for option, names, message in (
        (
            "target_modules",
            ["layers.7.q_proj", "v_proj"],
            r"target_modules: layers.7.q_proj not in .* named like model",
        ),
        ("feedforward_modules", "all-linear", "feedforward_modules: PEFT knows no all-linear here; name the modules"),
    ):
        settings = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": [], option: names}
        with pytest.raises(ValueError, match=message):
            check_section(TrainConfig.model_validate({"peft": settings}), info, "distill")
    ends = {"peft_type": "LORA", "use_dora": True, "target_modules": ["self_attn.q_proj", "down_proj"]}
    check_section(TrainConfig.model_validate({"peft": ends}), info, "distill")


def test_a_text_that_the_virtual_tokens_have_no_room_for_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    info = inspect_base(str(make_base(tmp_path / "base", std=0.1)))
    for count in (2, 64):
        settings = {**METHODS["prompt-text"], "num_virtual_tokens": count}
        caplog.clear()
        check_section(TrainConfig.model_validate({"peft": settings}), info, "distill")
        assert ("its first 2 are taken" in caplog.text) is (count == 2)


def test_the_initial_text_is_taken_however_its_kind_is_written_and_refused_where_it_is_none(base: Path) -> None:
    """PEFT compares with "TEXT" and takes anything else for RANDOM."""
    info = inspect_base(str(base))
    own = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    lower = {**own, "prompt_tuning_init": "text", "prompt_tuning_init_text": "Answer:"}
    assert parse_method(lower, "distill.peft", base).prompt_tuning_init == "TEXT"
    with pytest.raises(ValueError, match=r"distill.peft.prompt_tuning_init: 'ZERO'; expected TEXT"):
        parse_method({**own, "prompt_tuning_init": "ZERO"}, "distill.peft", base)
    if not load_tokenizer(BaseModelConfig(model=str(base)))("")["input_ids"]:
        empty = {**lower, "prompt_tuning_init_text": ""}
        with pytest.raises(ValueError, match=r"prompt_tuning_init_text: '' has no token"):
            check_section(TrainConfig.model_validate({"peft": empty}), info, "distill")


def test_a_plain_lora_of_peft_is_warned_of(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    info = inspect_base(str(base))
    for extra, warned in (({}, True), ({"use_dora": True}, False)):
        caplog.clear()
        peft = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], **extra}
        check_section(TrainConfig.model_validate({"peft": peft}), info, "distill")
        assert any("as distill.lora it would be one of a gang" in line for line in caplog.messages) is warned


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", std=0.1)
    wide = inspect_base(str(make_base(tmp_path / "wide", hidden_size=64)))
    for name in ("dora", "prompt", "prefix"):
        adapter = make_method(tmp_path / name, base, METHODS[name])
        with pytest.raises(ValueError, match="belongs to another base"):
            check_adapter(adapter, wide)
    head = make_method(tmp_path / "head", base, {**METHODS["dora"], "target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(ValueError, match="adapts lm_head, the output head of 'base'"):
        check_adapter(head, inspect_base(str(base)))
    config = json.loads((tmp_path / "prompt" / "adapter_config.json").read_text())
    (tmp_path / "prompt" / "adapter_config.json").write_text(json.dumps(config | {"num_virtual_tokens": 4}))
    with pytest.raises(ValueError, match="on 'base' it is"):
        check_adapter(tmp_path / "prompt", inspect_base(str(base)))
