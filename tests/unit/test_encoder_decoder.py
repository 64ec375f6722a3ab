"""A T5 as the source of a fleet: its engine by PEFT and transformers, and what it is not asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, PeftModelForSeq2SeqLM, PromptTuningConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from tests.tiny import make_adapter, make_base, make_bundle, make_encoder_decoder
from translora.actors.blocks import answer_block
from translora.actors.host import EngineHost
from translora.bundle import inspect_base, verify_bundle
from translora.bundle.adapter import check_adapter
from translora.config import BaseModelConfig, FleetConfig, PrepareConfig
from translora.config.merge import MergeConfig
from translora.engine.decode import Request
from translora.engine.encoder_decoder import EncoderDecoderEngine
from translora.engine.protocol import answer_tokens
from translora.merge.run import merge
from translora.prepare import prepare
from translora.run.check import check_training

PROMPTS = ["Route the message:", "The parcel is late. I was charged twice", "When does the shop open", "yes"]
PLAIN = {"num_beams": 1, "no_repeat_ngram_size": 0, "num_return_sequences": 1, "forced_bos_token_id": None}
NAMES = ["attention", "everywhere", "scaled", None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = make_encoder_decoder(tmp_path_factory.mktemp("encoder-decoder") / "t5")
    own = json.loads((base / "generation_config.json").read_text())
    beams = {"num_beams": 4, "no_repeat_ngram_size": 1, "num_return_sequences": 2, "forced_bos_token_id": 9}
    (base / "generation_config.json").write_text(json.dumps(own | beams))  # what no engine follows
    return base


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, str]:
    """LoRAs for the bank, `wo` and the cross-attention among their modules, and one that PEFT has to put on."""
    paths = {
        "attention": make_adapter(base.parent / "attention", base, 1, 2, target_modules=["q", "v"], scale=1.0),
        "everywhere": make_adapter(
            base.parent / "everywhere", base, 2, 4, target_modules=["q", "k", "v", "o", "wi_0", "wi_1", "wo"], scale=1.0
        ),
    }
    model = AutoModelForSeq2SeqLM.from_pretrained(base, dtype=torch.float32)
    ia3 = IA3Config(task_type="SEQ_2_SEQ_LM", target_modules=["k", "v", "wo"], feedforward_modules=["wo"])
    scaled = get_peft_model(model, ia3)
    torch.manual_seed(3)
    for parameter in scaled.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 1.0, 0.5)
    scaled.save_pretrained(base.parent / "scaled")
    return {name: str(path) for name, path in {**paths, "scaled": base.parent / "scaled"}.items()}


@pytest.fixture(scope="module")
def engine(base: Path, adapters: dict[str, str]) -> EncoderDecoderEngine:
    host = EngineHost(1, 1)
    engine = host._engine(BaseModelConfig(model=str(base), dtype="float32"))
    assert isinstance(engine, EncoderDecoderEngine), "chosen by the base's config"
    engine.use_adapters(adapters)
    return engine


def reference(base: Path, adapter: str | None) -> PreTrainedModel:
    model = AutoModelForSeq2SeqLM.from_pretrained(base, dtype=torch.float32).eval()
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


@torch.inference_mode()
def test_answers_in_mixed_batches_are_those_of_peft(
    engine: EncoderDecoderEngine, base: Path, adapters: dict[str, str]
) -> None:
    limits = [12, 6, 12, 9]
    requests = [Request(text, name, limit) for text, name, limit in zip(PROMPTS, NAMES, limits, strict=True)]
    found = engine.generate(requests)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for request, completion in zip(requests, found, strict=True):
        model = reference(base, request.adapter and adapters[request.adapter])
        ids = tokenizer(request.prompt, return_tensors="pt")  # with </s>, as an owner trains
        length = request.max_new_tokens
        own = model.generate(**ids, do_sample=False, max_new_tokens=length, **PLAIN)[0]
        assert completion.text == tokenizer.decode(own, skip_special_tokens=True)
        assert completion.finished == (tokenizer.eos_token_id in own.tolist())
    assert len({completion.text for completion in found}) > 1
    rows = [
        {"slot": name, "input": text, "template": "{input}", "stop": None}
        for text, name in zip(PROMPTS, NAMES, strict=True)
    ]
    answers = answer_block(engine, rows, {"max_answer_tokens": 6})
    assert answers[1]["answer"] == found[1].text.strip()


@torch.inference_mode()
def test_likelihoods_and_odds_are_those_of_the_whole_logits(
    engine: EncoderDecoderEngine, base: Path, adapters: dict[str, str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers = [[7, 8, 9, 1], [10, 1], [11, 12, 1], [13, 14, 15, 16, 1]]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    samples = list(zip(prompts, answers, strict=True))
    found = engine.log_likelihood(samples, NAMES)
    most_likely = engine.top_log_probabilities(samples, NAMES, 3)
    odds = engine.log_odds(PROMPTS, NAMES)
    yes, no = answer_tokens(tokenizer).values()
    for index, name in enumerate(NAMES):
        model = reference(base, name and adapters[name])
        labels = torch.tensor([answers[index]])
        logits = model(input_ids=torch.tensor([[*prompts[index], 1]]), labels=labels).logits[0]
        log_p = logits.log_softmax(-1)
        own = log_p.gather(1, labels[0][:, None])[:, 0]
        assert found[index] == pytest.approx(own.tolist(), rel=1e-5, abs=1e-4)
        assert torch.tensor(most_likely[index][1]) == pytest.approx(log_p.topk(3).values, abs=1e-4)
        expected = log_p[0, yes].logsumexp(-1) - log_p[0, no].logsumexp(-1)
        assert odds[index] == pytest.approx(float(expected), abs=1e-4)


def fleet(source: Path, target: Path, run_dir: Path, **settings: Any) -> FleetConfig:
    distill = {"num_workers": 1, "lora": {"target_modules": ["q_proj", "v_proj"]}}
    return FleetConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "source": {"model": str(source)},
            "target": {"model": str(target)},
            "adapters": [{"bundle": "none"}],
            "distill": distill,
            **settings,
        }
    )


def test_it_teaches_and_nothing_else(base: Path, tmp_path: Path) -> None:
    target, info = make_base(tmp_path / "new-base", "gemma3"), inspect_base(str(base))
    check_training(fleet(base, target, tmp_path), info, inspect_base(str(target)))
    with pytest.raises(ValueError, match="t5: distill is for decoder-only bases, and this one has an encoder"):
        check_training(
            fleet(target, base, tmp_path, synthesis={"generator": {"model": str(target)}}),
            inspect_base(str(target)),
            info,
        )
    with pytest.raises(ValueError, match="t5: inputs are invented by decoder-only bases"):
        check_training(
            fleet(base, target, tmp_path, synthesis={"generator": {"model": str(base)}}),
            info,
            inspect_base(str(target)),
        )


def test_its_bundles_are_checked_like_others_and_virtual_tokens_are_refused(base: Path, tmp_path: Path) -> None:
    bundle = make_bundle(
        tmp_path / "orders", base, target_modules=["q", "wo"], discriminator=False, prompt_template="{input}"
    )
    verify_bundle(bundle, inspect_base(str(base)))
    model = AutoModelForSeq2SeqLM.from_pretrained(base)
    tuned = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, num_transformer_submodules=1)
    get_peft_model(model, tuned).save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="PROMPT_TUNING: virtual tokens in front of an encoder are not supported"):
        check_adapter(tmp_path / "tuned", inspect_base(str(base)))


def test_its_bundles_are_prepared_without_data(base: Path, adapters: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "seeds.jsonl").write_text('{"input": "The parcel is late."}\n{"input": "Can I return the shoes?"}\n')
    (tmp_path / "rows.jsonl").write_text('{"input": "late", "target": "a"}\n{"input": "shoes", "target": "b"}\n')
    task = {"name": "orders", "adapter": adapters["everywhere"], "seeds": str(tmp_path / "seeds.jsonl")}
    files = {"output_dir": tmp_path / "bundles", "run_dir": tmp_path / "run", "source": {"model": str(base)}}
    with_data = {**task, "name": "boxes", "data": str(tmp_path / "rows.jsonl")}
    with pytest.raises(
        ValueError, match=r"t5: train is for decoder-only .*; give no `data`, but `adapter` and `seeds`"
    ):
        prepare(PrepareConfig.model_validate({**files, "tasks": [with_data, task]}))
    (bundle,) = prepare(PrepareConfig.model_validate({**files, "tasks": [task]}))
    assert bundle.manifest.prompt_template == "{input}", "an encoder reads an input as it is"
    config = json.loads((base / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).symlink_to(file)
    (other / "config.json").unlink()
    (other / "config.json").write_text(json.dumps({**config, "model_type": "longt5"}))
    with pytest.raises(ValueError, match="other: a source with an encoder has to be one of t5, mt5, umt5; longt5 is"):
        prepare(PrepareConfig.model_validate({**files, "source": {"model": str(other)}, "tasks": [task]}))


def test_its_adapters_are_merged_without_data_only(base: Path, adapters: dict[str, str], tmp_path: Path) -> None:
    parts = {"adapters": [adapters["attention"], adapters["everywhere"]], "base": str(base)}
    merge(MergeConfig(method="static_cat", out=tmp_path / "merged", **parts))
    check_adapter(tmp_path / "merged", inspect_base(str(base)))
    loaded = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), tmp_path / "merged")
    assert type(loaded) is PeftModelForSeq2SeqLM
    card = (tmp_path / "merged/README.md").read_text()
    assert "AutoModelForSeq2SeqLM.from_pretrained(base)" in card and "pipeline_tag: text2text-generation" in card
    data = tmp_path / "data.jsonl"
    data.write_text('{"input": "The parcel is late.", "answer": "shipping"}\n' * 2)
    with pytest.raises(ValueError, match="t5: merge cat runs decoder-only bases, and this one has an encoder"):
        merge(MergeConfig(method="cat", out=tmp_path / "learnt", data=[data], **parts))
