"""What every engine must do, by float32 references of PEFT and transformers; vLLM's part runs where it is installed."""

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.tiny import make_adapter, make_base
from translora.actors.blocks import answer_block
from translora.actors.calls import FAULT
from translora.actors.host import compute_rows
from translora.config import BaseModelConfig, SamplingConfig
from translora.engine.decode import Request
from translora.engine.protocol import Engine, RowTooLong
from translora.engine.transformers import TransformersEngine
from translora.engine.vllm import VllmEngine
from translora.engine.vllm_settings import check_engine
from translora.lora.peft_io import write_lora

HAS_VLLM = importlib.util.find_spec("vllm") is not None
NEEDS_VLLM = pytest.mark.skipif(
    not HAS_VLLM or torch.cuda.is_available(),
    reason="vLLM is not installed, or on a GPU, where it has no LoRAs in float32",
)
PROMPTS = ["Route the message:", "The parcel is late. I was charged twice", "When does the shop open", "a"]
NAMES = ["plain", "scaled", "patterned", None]
SAMPLES = [([5, 6, 7], [8, 9]), ([10] * 9, [11]), ([12], [13, 14, 15, 16])]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("contract") / "base", hidden_size=128)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, str]:
    """Different ranks, scalings and modules."""
    options: dict[str, dict[str, object]] = {
        "plain": {"rank": 2},
        "scaled": {"rank": 3, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
        "patterned": {"rank": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7}},
    }
    return {
        name: str(make_adapter(base.parent / name, base, seed=seed, **own))  # type: ignore[arg-type]
        for seed, (name, own) in enumerate(options.items())
    }


@pytest.fixture(
    scope="module",
    params=["transformers", *(pytest.param(name, marks=NEEDS_VLLM) for name in ("vllm", "vllm, tensor parallel"))],
)
def engine(request: pytest.FixtureRequest, base: Path, adapters: dict[str, str]) -> Iterator[Engine]:
    config = BaseModelConfig(model=str(base), dtype="float32")
    engine: Engine
    if request.param != "transformers":
        settings = {"enforce_eager": True, "max_model_len": 256, "gpu_memory_utilization": 0.3}
        settings["tensor_parallel_size"] = 2 if "parallel" in request.param else 1
        engine = VllmEngine(config.model_copy(update={"vllm": settings}), 1)
    else:
        engine = TransformersEngine(config, {}, 1)
    engine.use_adapters(adapters)
    yield engine
    engine.close()


def reference(base: Path, adapter: str | None) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


def test_mixed_greedy_generation_is_that_of_peft(engine: Engine, base: Path, adapters: dict[str, str]) -> None:
    requests = [Request(prompt, name, 12) for prompt, name in zip(PROMPTS, NAMES, strict=True)]
    for request, found in zip(requests, engine.generate(requests), strict=True):
        model = reference(base, adapters.get(request.adapter or ""))
        inputs = engine.tokenizer(request.prompt, add_special_tokens=False, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=12, pad_token_id=0)
        expected = engine.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert found.text == expected, request
    bare = engine.generate([Request(prompt, None, 12) for prompt in PROMPTS])
    own = engine.generate([Request(prompt, "plain", 12) for prompt in PROMPTS])
    assert all(one.text != other.text for one, other in zip(bare, own, strict=True))


def test_a_sample_is_its_seeds(engine: Engine) -> None:
    sampling = SamplingConfig(temperature=1.3, top_k=40)
    request = Request(PROMPTS[0], "scaled", 16, seed=2**62 + 7)
    alone = engine.generate([request], sampling)[0]
    neighbours = [Request(PROMPTS[1], "plain", 16, seed=1), Request(PROMPTS[3], None, 24, seed=2)]
    assert engine.generate([neighbours[0], request, neighbours[1]], sampling)[1] == alone
    assert engine.generate([Request(PROMPTS[0], "scaled", 16, seed=8)], sampling)[0].text != alone.text


def test_a_stop_pattern_ends_a_completion_and_a_limit_leaves_it_unfinished(engine: Engine) -> None:
    free = engine.generate([Request(PROMPTS[1], None, 24)])[0]
    assert not free.finished
    middle = free.text[len(free.text) // 2]
    rows = [Request(PROMPTS[1], None, 24, stop=f"[{middle}]"), Request(PROMPTS[1], None, 24)]
    stopped, again = engine.generate(rows)
    assert stopped.finished and stopped.text == free.text.split(middle)[0]
    assert again == free, "its neighbour goes on"


def test_log_odds_sum_what_yes_and_no_begin_with(engine: Engine, base: Path, adapters: dict[str, str]) -> None:
    scores = engine.log_odds(PROMPTS, NAMES)
    for prompt, name, score in zip(PROMPTS, NAMES, scores, strict=True):
        ids = engine.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            p = reference(base, adapters.get(name or ""))(ids).logits[0, -1].softmax(-1)
        firsts = {}
        for word in ("yes", "no"):
            texts = [f"{space}{one}" for one in (word, word.capitalize(), word.upper()) for space in ("", " ")]
            tokens = [engine.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            firsts[word] = {own[0] for own in tokens if len(own) == 1} or {own[0] for own in tokens[:2]}
        both = firsts["yes"] & firsts["no"]
        yes, no = (sum(float(p[token]) for token in own - both) for own in firsts.values())
        assert score == pytest.approx(math.log(yes) - math.log(no), abs=1e-3)


def test_likelihoods_are_those_of_the_whole_logits(engine: Engine, base: Path, adapters: dict[str, str]) -> None:
    names = ["plain", None, "patterned"]
    found = engine.log_likelihood(SAMPLES, names)
    best = engine.top_log_probabilities(SAMPLES, names, 5)
    for (prompt, answer), name, values, (tokens, log_p) in zip(SAMPLES, names, found, best, strict=True):
        with torch.no_grad():
            logits = (
                reference(base, adapters.get(name or ""))(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            )
        places = logits[len(prompt) - 1 : -1]
        assert values == pytest.approx([float(row[token]) for row, token in zip(places, answer, strict=True)], abs=1e-3)
        top = places.topk(5, dim=-1)
        assert tokens == top.indices.tolist()
        torch.testing.assert_close(torch.tensor(log_p), top.values, rtol=1e-3, atol=1e-3)


def test_adapters_come_and_go(engine: Engine, base: Path, adapters: dict[str, str]) -> None:
    """The last one has a greater rank than all before it."""
    large = str(make_adapter(base.parent / "large", base, seed=9, rank=12))
    request = {name: Request(PROMPTS[0], name, 8) for name in ("plain", "large", None)}
    before, bare = engine.generate([request["plain"], request[None]])
    engine.use_adapters({"plain": adapters["plain"], "large": large})
    again, other, still = engine.generate([request["plain"], request["large"], request[None]])
    assert (again, still) == (before, bare) and other.text not in (before.text, bare.text)
    engine.use_adapters({"plain": large})
    assert engine.generate([request["plain"]]) == [other], "a slot may change its adapter"
    engine.use_adapters(adapters)
    assert engine.generate([request["plain"]]) == [before]


@NEEDS_VLLM
def test_vllm_refuses_what_it_does_not_compute(base: Path, adapters: dict[str, str]) -> None:
    settings = {"enforce_eager": True, "max_model_len": 256, "gpu_memory_utilization": 0.3}
    engine = VllmEngine(BaseModelConfig(model=str(base), dtype="float32", vllm=settings), 1)
    scaled = get_peft_model(reference(base, None), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    scaled.save_pretrained(base.parent / "ia3")
    try:
        with pytest.raises(ValueError, match=r"ia3: is no plain LoRA.*leave `vllm` of its base out"):
            engine.use_adapters({"plain": adapters["plain"], "ia3": base.parent / "ia3"})
        with pytest.raises(ValueError, match="ia3: is no plain LoRA"):
            engine.check_adapter(base.parent / "ia3")
        mistyped = engine.base.model_copy(update={"vllm": {"max_modl_len": 256}})
        with pytest.raises(ValueError, match=r"vllm.max_modl_len: vLLM has no such .*; did you mean max_model_len\?"):
            check_engine(mistyped)
        engine.use_adapters({"plain": adapters["plain"]})
        with pytest.raises(RowTooLong, match=r"a row of 300 tokens, vLLM takes 255 of base; raise vllm.max_model_len"):
            engine.log_likelihood([([5] * 299, [6])], ["plain"])
        rows = [{"slot": "plain", "input": text, "template": "chat", "stop": None} for text in ("a", "a " * 300)]
        short, long = compute_rows(engine, answer_block, rows, {"max_answer_tokens": 4}, {})
        assert short["answer"] and "raise vllm.max_model_len" in long[FAULT]
        before = engine.generate([Request("a", "plain", 4)])
        damaged = base.parent / "damaged"
        damaged.mkdir()
        factors = torch.ones(2, 256), torch.ones(128, 2)  # the base is 128 wide
        write_lora(damaged, {"model.layers.0.self_attn.q_proj": factors}, alpha=2, base_model=str(base))
        with pytest.raises(ValueError, match=r"damaged: vLLM does not take it"):
            engine.use_adapters({"plain": adapters["plain"], "damaged": damaged})
        engine.use_adapters({"plain": adapters["plain"], "scaled": adapters["scaled"]})
        assert engine.generate([Request("a", "plain", 4)]) == before, "a healthy one is no worse for it"
    finally:
        engine.close()


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_a_missing_vllm_is_said(base: Path) -> None:
    with pytest.raises(ValueError, match=r"asks for vllm, which is not installed; pip install '\.\[vllm\]'"):
        VllmEngine(BaseModelConfig(model=str(base), vllm={}))
