import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import make_base, make_tokenizer
from translora.bundle import inspect_base
from translora.config import BaseModelConfig, ResourceConfig, TrainConfig
from translora.distill.data import batch_indices, chosen_tokens, encode_samples, num_steps, num_too_long, pack
from translora.distill.job import RECIPE, TrainJob
from translora.distill.launch import train_adapters
from translora.distill.teacher import (
    MIN_MASS,
    MIN_PROBABILITY,
    NoSoftLabelsError,
    check_vocabularies,
    probabilities,
    soft_labels,
)
from translora.engine.prompts import prompt_format
from translora.run.files import derive_seed, digest, write_jsonl


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_every_epoch_visits_every_sample_once(num_samples: int, batch_size: int, epoch: int) -> None:
    per_epoch = num_steps(num_samples, 1, batch_size)
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    visited = [index for step in steps for index in batch_indices(num_samples, batch_size, step, seed=3)]
    assert sorted(visited) == list(range(num_samples))


def test_order_depends_on_the_seed_and_the_epoch() -> None:
    first = batch_indices(50, 50, 0, seed=1)
    assert first == batch_indices(50, 50, 0, seed=1)
    assert first != batch_indices(50, 50, 1, seed=1)
    assert first != batch_indices(50, 50, 0, seed=2)


def test_long_samples_are_dropped_with_a_warning_and_none_left_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    prompts = prompt_format(make_tokenizer("llama"))
    rows = [{"input": "a", "answer": "b"}, {"input": "a " * 50, "answer": "b"}]
    with caplog.at_level(logging.WARNING):
        assert len(encode_samples(rows, prompts, 40, "task")) == 1
    assert num_too_long([(row["input"], row["answer"]) for row in rows], prompts, 40) == 1
    assert "task: 1 of 2 samples exceed max_length 40" in caplog.text
    with pytest.raises(ValueError, match="no training sample of at most 8 tokens; raise max_length"):
        encode_samples(rows, prompts, 8, "task")


def test_a_teacher_is_used_where_it_saw_the_same_tokens(caplog: pytest.LogCaptureFixture) -> None:
    prompts = prompt_format(make_tokenizer("llama"))
    ids = prompts.encode_pair("a", "b")[1]
    padding = len(prompts.tokenizer)  # a place of the teacher's head that no token has, and the student's head may lack
    tokens = [[token, 1, padding] for token in ids]
    thought = {"answer_ids": ids, "tokens": tokens, "log_p": [[-0.1, -2.5, -9.0]] * len(ids)}
    rows = [
        {"input": "a", "answer": "b", "teacher": thought},
        {"input": "a", "answer": "b", "teacher": {**thought, "answer_ids": [*ids, 1]}},
        {"input": "a", "answer": "b"},
    ]
    with caplog.at_level(logging.WARNING):
        samples = encode_samples(rows, prompts, 40, "task")
    assert "task: 1 of 3 answers have other tokens for the teacher: sft for these" in caplog.text
    assert [sample.teacher is not None for sample in samples] == [True, False, False]
    batch = pack([(0, samples, 1.0)], torch.device("cpu"), top_k=3)
    assert batch.teacher is not None
    found, log_p = batch.teacher
    assert found.shape == log_p.shape == (3 * len(ids), 3)
    assert found[0].tolist() == [ids[0], 1, 0] and log_p[0].exp().tolist() == pytest.approx(
        [0.9048, 0.0821, 0], abs=1e-4
    )
    assert found[-1].tolist() == [ids[-1], 0, 0] and log_p[-1].exp().tolist() == [1, 0, 0]
    assert pack([(0, samples, 1.0)], torch.device("cpu")).teacher is None


def test_a_share_of_the_tokens_is_trained_on_by_their_excess_in_the_teachers_own_tokens() -> None:
    """TiTok's rule by hand: Lopez of two tokens has their mean, Oslo's two that of the teacher's one."""
    teacher = {
        "spans": [[0, 1], [1, 5], [5, 6], [6, 11], [11, 11]],
        "excess": [0.5, 2.5, -1.0, 1.0, 9.0],
    }  # L|opez|,| Oslo|end
    spans = [(0, 5), (5, 6), (6, 9), (9, 11), (11, 11)]  # Lopez|,| Os|lo|end: 1.5, -1, 1, 1
    assert chosen_tokens(teacher, spans, 0.25) == [True, False, False, False, True]
    assert chosen_tokens(teacher, spans, 0.26) == [True, False, True, False, True], "rounded up, ties in order"
    assert chosen_tokens(teacher, spans, 0.75) == [True, False, True, True, True]
    assert chosen_tokens(teacher, spans, 1) == [True] * 5


@given(st.text("ab é日, ", min_size=1).filter(lambda text: bool(text.strip())), st.floats(0.01, 1))
def test_the_characters_of_every_token_are_known_and_the_share_is_kept(answer: str, share: float) -> None:
    teacher, student = (prompt_format(make_tokenizer(kind)) for kind in ("llama", "gemma3"))
    spans = teacher.answer_spans("a", answer)
    assert len(spans) == len(teacher.encode_pair("a", answer)[1]) and spans[-1] == (len(answer), len(answer))
    assert {place for start, end in spans for place in range(start, end)} == set(range(len(answer)))
    excess = [float(index) for index in range(len(spans))]
    own = student.answer_spans("a", answer)
    chosen = chosen_tokens({"spans": spans, "excess": excess}, own, share)
    with_text = [flag for flag, (start, end) in zip(chosen, own, strict=True) if start < end]
    assert sum(with_text) == math.ceil(share * len(with_text) - 1e-9) and chosen[-1]


def test_a_token_that_the_teacher_has_no_character_of_is_trained_on() -> None:
    """A tokenizer that leaves white space out of its spans, and one with a token for it."""
    teacher = {"spans": [[0, 1], [2, 3]], "excess": [0.0, 1.0]}
    assert chosen_tokens(teacher, [(0, 1), (1, 2), (2, 3), (3, 3)], 0.5) == [False, True, True, True]


def test_tokens_that_are_not_chosen_weigh_nothing() -> None:
    prompts = prompt_format(make_tokenizer("llama"))
    spans = prompts.answer_spans("a", "a b c d")
    excess = [float(index == 2) for index in range(len(spans))]
    rows = [{"input": "a", "answer": "a b c d", "teacher": {"answer_ids": [], "spans": spans, "excess": excess}}]
    (sample,) = encode_samples(rows, prompts, 40, "task", token_share=0.01)
    assert sample.chosen is not None and sample.teacher is None
    assert [index for index, flag in enumerate(sample.chosen) if flag] == [2, len(spans) - 1]
    assert sample.num_trained == 2
    batch = pack([(0, [sample], 1 / sample.num_trained)], torch.device("cpu"))
    assert batch.weights_L.tolist() == [0.5 * flag for flag in sample.chosen]


def test_a_sample_has_each_answer_that_its_teacher_finds_possible() -> None:
    prompts = prompt_format(make_tokenizer("llama"))
    rows = [
        {"input": "a", "answer": "b c", "teacher": {"probabilities": {"b c": 0.75, "a": 0.25}}},
        {"input": "b", "answer": "a", "teacher": {"probabilities": {"a": 1.0}}},
        {"input": "b", "answer": "a"},
        {"input": "b", "answer": "a", "teacher": {"probabilities": {"a": 0.5, "b " * 50: 0.5}}},
    ]
    samples = encode_samples(rows, prompts, 40, "task")
    long, short = (prompts.encode_pair("a", answer)[1] for answer in ("b c", "a"))
    assert [(one.answer_ids, one.probability) for one in samples[0].answers] == [(long, 0.75), (short, 0.25)]
    assert samples[1] == samples[2] == samples[3], "an answer that is too long is no reason to lose the sample"
    assert samples[0].num_trained == 0.75 * len(long) + 0.25 * len(short)
    batch = pack([(0, samples[:1], 2.0)], torch.device("cpu"))
    assert batch.labels_L.tolist() == [*long, *short]
    assert batch.weights_L.tolist() == [1.5] * len(long) + [0.5] * len(short)
    assert batch.inputs["input_ids"].shape[1] == samples[0].num_tokens - 2, "last tokens predict nothing"  # type: ignore[attr-defined]


def rated(logliks: Sequence[float], given: int, index: int = 0) -> list[dict[str, Any]]:
    """Rows of `likelihood_block` for one sample."""
    return [
        {"index": index, "answer": f"answer {number}", "given": number == given, "loglik": value}
        for number, value in enumerate(logliks)
    ]


@given(st.lists(st.floats(-30, 0), min_size=1, max_size=6), st.floats(MIN_MASS, 1), st.data())
def test_soft_labels_are_the_probabilities_of_the_likely_answers(
    odds: list[float], total: float, data: st.DataObject
) -> None:
    shares = torch.tensor(odds, dtype=torch.float64).softmax(0).tolist()
    own = data.draw(st.sampled_from([number for number, share in enumerate(shares) if share >= 1.01 * MIN_PROBABILITY]))
    found = probabilities(rated([math.log(1.001 * total * share) if share else -800.0 for share in shares], own))
    kept = {number: share for number, share in enumerate(shares) if share >= MIN_PROBABILITY}
    expected = {f"answer {number}": share / sum(kept.values()) for number, share in kept.items()}
    assert found == pytest.approx(expected, abs=1e-4) and next(iter(found)) == f"answer {own}"


@pytest.mark.parametrize("logliks", [(-25, -12), (-25, -0.01), (-1.5, -1.5), (math.nan, math.nan), (math.nan, -0.1)])
def test_a_sample_whose_likelihoods_do_not_tell_of_its_answer_has_that_answer_alone(logliks: Sequence[float]) -> None:
    """A teacher may write one of its answers otherwise than it is asked for, which must not teach another answer."""
    assert probabilities(rated(logliks, 0)) == {"answer 0": 1.0}


def test_a_teacher_that_writes_its_answers_otherwise_gives_no_soft_labels() -> None:
    sure, likely, never = (math.log(p) for p in (0.9, 0.06, 1e-9))
    rows = [*rated([sure, likely], 0, 0), *rated([likely, sure], 1, 1), *rated([never, never], 0, 2)]
    first, second, third = (one["probabilities"] for one in soft_labels(rows))
    assert first == {"answer 0": 0.9375, "answer 1": 0.0625} and second == {"answer 1": 0.9375, "answer 0": 0.0625}
    assert third == {"answer 0": 1.0}, "one sample of three says little of the others"
    reason = "all of its answers together a probability of 0 %, .*compare its prompt template"
    for bad in (never, float("nan")):
        with pytest.raises(NoSoftLabelsError, match=reason):
            soft_labels([*rated([sure, likely], 0), *rated([bad] * 2, 0, 1), *rated([bad] * 2, 0, 2)])


def test_only_bases_of_one_vocabulary_can_be_compared_token_by_token() -> None:
    check_vocabularies(make_tokenizer("llama"), make_tokenizer("llama"))
    with pytest.raises(ValueError, match="different vocabularies; use auto"):
        check_vocabularies(make_tokenizer("llama"), make_tokenizer("gemma3"))


def test_seeds_differ_by_every_part() -> None:
    assert len({derive_seed(0, "a"), derive_seed(1, "a"), derive_seed(0, "b"), derive_seed("0", "a", 0)}) == 4
    assert derive_seed(0, "a") == derive_seed(0, "a") < 2**63


def test_the_checkpoints_of_a_driver_that_died_after_the_last_adapter_are_removed(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    data, output = tmp_path / "data.jsonl", tmp_path / "adapter"
    write_jsonl(data, [{"input": "a", "answer": "b"}])
    job = TrainJob("client/student", str(data), str(output), str(tmp_path), seed=0, epochs=1, learning_rate=1e-3)
    config = TrainConfig()
    output.mkdir()
    (output / RECIPE).write_text(job.recipe(config, inspect_base(str(base)).identity))
    checkpoints = tmp_path / "run" / "gangs" / digest([job.name])
    checkpoints.mkdir(parents=True)
    (checkpoints / "plan.json").write_text("{}")
    settings = BaseModelConfig(model=str(base))
    train_adapters(settings, "base", [job], config, ResourceConfig(), tmp_path / "run", label="distill")
    assert list((tmp_path / "run").rglob("*")) == [tmp_path / "run" / "gangs"]
