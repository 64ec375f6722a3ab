from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_adapter, make_base
from translora.config import BaseModelConfig, SamplingConfig
from translora.engine import prefix
from translora.engine.decode import Request
from translora.engine.transformers import TransformersEngine

BEGINNING = "You are a helpful assistant. Read the message and answer it. "
QUESTIONS = ["When does the shop open", "a", "The parcel is late. I was charged twice", "Where", "a refund", "Why now"]
SLOTS: list[str | None] = ["a0", "a1", None, "a1", "a0", "a0"]
PROMPTS = [BEGINNING + question for question in QUESTIONS]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    directory = tmp_path_factory.mktemp("prefix")
    base = make_base(directory / "base")
    adapters = {f"a{seed}": str(make_adapter(directory / f"a{seed}", base, seed=seed)) for seed in range(2)}
    return TransformersEngine(BaseModelConfig(model=str(base), dtype="float32"), adapters, 1)


@pytest.fixture
def computed(engine: TransformersEngine) -> Iterator[list[int]]:
    """Positions of each pass, padding included."""
    seen: list[int] = []

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"].numel())

    hook = engine.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


def ids(engine: TransformersEngine, text: str) -> list[int]:
    return list(engine.tokenizer(text, add_special_tokens=False)["input_ids"])


def works(engine: TransformersEngine) -> dict[str, Callable[[], Any]]:
    greedy = [Request(prompt, slot, 8) for prompt, slot in zip(PROMPTS, SLOTS, strict=True)]
    sampled = [
        Request(prompt, slot, 8, seed=index) for index, (prompt, slot) in enumerate(zip(PROMPTS, SLOTS, strict=True))
    ]
    samples = [(ids(engine, prompt), ids(engine, " the answer")) for prompt in PROMPTS]
    return {
        "greedy": lambda: engine.generate(greedy),
        "sampled": lambda: engine.generate(sampled, SamplingConfig(temperature=1.2)),
        "log odds": lambda: engine.log_odds(PROMPTS, SLOTS),
        "log likelihood": lambda: [value for row in engine.log_likelihood(samples, SLOTS) for value in row],
    }


@pytest.mark.parametrize("name", ["greedy", "sampled", "log odds", "log likelihood"])
def test_a_shared_beginning_changes_nothing_and_is_computed_once_for_each_adapter(
    engine: TransformersEngine, computed: list[int], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    work = works(engine)[name]
    shared = work()
    passes = list(computed)
    computed.clear()
    monkeypatch.setattr(prefix, "MIN_SHARED", 10_000)
    whole = work()
    if name.startswith("log"):
        assert shared == pytest.approx(whole, abs=1e-4)
    else:
        assert shared == whole
    length = len(ids(engine, BEGINNING.strip()))
    assert passes[0] == 3 * length, "two adapters and the bare base"
    assert computed[0] - passes[1] == len(PROMPTS) * length


def test_what_a_row_needs_itself_is_not_shared(engine: TransformersEngine) -> None:
    sample = (ids(engine, BEGINNING), ids(engine, " the same long answer for everybody"))
    together = engine.log_likelihood([sample] * 4, ["a0"] * 4)
    assert together[0] == pytest.approx(engine.log_likelihood([sample], ["a0"])[0], abs=1e-4)


def test_nothing_is_shared_where_it_does_not_pay_or_would_change_the_window(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = engine.model, [ids(engine, prompt) for prompt in PROMPTS]
    own, longest = [1] * len(prompts), max(map(len, prompts))

    def length(rows: list[list[int]] = prompts, slots: Sequence[str | None] = SLOTS, num_new: int = 8) -> int:
        return prefix.shared_length(rows, slots, own, num_new, model)

    assert length() >= prefix.MIN_SHARED
    assert length(slots=["a", "b", "c", "d", "e", "e"]) == 0, "almost an adapter for each row"
    assert length(rows=[prompt[3 * row :] for row, prompt in enumerate(prompts)]) == 0
    monkeypatch.setattr(model.config, "sliding_window", longest + 8, raising=False)
    assert length() > 0
    assert length(num_new=9) == 0


@pytest.mark.parametrize("num_new", [4, 40])
def test_a_base_with_a_short_window_answers_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_new: int
) -> None:
    engine = TransformersEngine(
        BaseModelConfig(model=str(make_base(tmp_path / "base", family="gemma3")), dtype="float32"), {}, 1
    )
    window = engine.model.config.sliding_window
    prompts = [prompt for prompt in PROMPTS if len(ids(engine, prompt)) + 4 <= window]
    assert len(prompts) > 2 and min(len(ids(engine, prompt)) for prompt in prompts) + 40 > window
    requests = [Request(prompt, None, num_new) for prompt in prompts]
    shared = engine.generate(requests)
    monkeypatch.setattr(prefix, "MIN_SHARED", 10_000)
    assert engine.generate(requests) == shared
