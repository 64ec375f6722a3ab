from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from translora.actors.blocks import token_block
from translora.actors.hosts import Hosts
from translora.config import OPEN_GATE, BaseModelConfig, FleetConfig, GateConfig, ResourceConfig
from translora.gate import agreement, questions
from translora.gate.agreement import _judge_member, run_gate
from translora.gate.questions import GateMember, answer_limit, answer_rows, token_rows
from translora.gate.verdict import chance_agreement, chance_gain, chance_likelihood, informedness, judge, share_equal
from translora.report.table import agreement_text, remarks
from translora.run.state import Accuracy, AdapterState, GateResult


@pytest.fixture(autouse=True)
def bases_without_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not there; all that is asked of them is how long the answers are on the target."""

    def answer_limit(least: int, source: object, target: object, answers: list[str], context: object) -> int | None:
        return 100 + len(answers[0]) if answers else None

    monkeypatch.setattr(agreement, "answer_limit", answer_limit)
    monkeypatch.setattr(agreement, "load_tokenizer", lambda base: base)


COLOURS = ["red", "blue", "green", "black"]
RIGHT = {"source_base": 0, "source_adapter": 4, "target_base": 1, "migrated": 3}
"""Of four real items, how many each arm answers as their target: all different, so that no two can be swapped."""

LOGLIKS = {("paint", "gate_student"): -0.5, ("paint", "gate_base"): -3.0}


def member(name: str = "paint") -> GateMember:
    return GateMember(
        name=name,
        student_dir=Path("student"),
        teacher_dir=Path("teacher"),
        template="Q: {input}\nA:",
        teacher_template="chat",
        heldout=[{"input": f"held out {colour}", "answer": colour} for colour in COLOURS],
        eval_rows=[{"input": f"real {colour}", "target": colour} for colour in COLOURS],
    )


def right(count: int) -> list[str | None]:
    """The first `count` answers right, then one that did not end, then wrong ones."""
    wrong: list[str | None] = [None, "pink", "pink", "pink"]
    return [*COLOURS[:count], *wrong[: len(COLOURS) - count]]


def answers(student: int, base: int) -> dict[tuple[str, str], list[str | None]]:
    counts = {"gate_student": student, "gate_base": base} | RIGHT
    return {("paint", arm): right(count) for arm, count in counts.items()}


def test_agreement_is_exact_match_after_normalising() -> None:
    assert share_equal([" Red ", "blue", "red  hat", None], ["red", "red", "Red hat", "x"]) == 0.5


def gate_of(
    members: list[GateMember], run_dir: Path
) -> tuple[dict[str, tuple[GateResult, Accuracy | None]], dict[str, str]]:
    """The gate over bases called source and target."""
    return run_gate(
        members,
        source=BaseModelConfig(model="source"),
        target=BaseModelConfig(model="target"),
        max_answer_tokens=8,
        hosts=Hosts(ResourceConfig(), run_dir, 3),
        weights={},
    )


def measured(student: float, base: float, **more: Any) -> GateResult:
    return GateResult(num_heldout=20, agreement_student=student, agreement_base=base, passed=False, **more)


def test_a_student_has_room_for_the_teachers_answers_in_its_own_tokens() -> None:
    def tokenizer(cut: Callable[[str], list[str]]) -> Any:
        return lambda text, add_special_tokens: {"input_ids": cut(text)}

    words, letters = tokenizer(str.split), tokenizer(list)
    answers = ["send the box", "one two three four", "ok"]
    assert answer_limit(4, words, letters, answers, None) == len("send the box") + 1, "the second has no room to end"
    assert answer_limit(4, words, letters, answers, 16) == 8, "half of the context is the inputs'"
    assert answer_limit(12, letters, words, answers, None) is None and answer_limit(4, words, letters, [], None) is None
    assert answer_limit(4, words, words, answers, None) is None, "of one tokenizer it is the same limit"


def test_the_gate_names_each_limit_that_was_missed() -> None:
    config = GateConfig(min_agreement=0.6, min_gain=0.1)
    assert judge(measured(0.9, 0.2), config).passed
    low = judge(measured(0.5, 0.0), config)
    assert not low.passed and low.reason == "agreement 0.50 < gate.min_agreement 0.60"
    no_gain = judge(measured(0.8, 0.75), config)
    assert not no_gain.passed and no_gain.reason == "gain over the target base +0.05 < gate.min_gain +0.10"


def test_agreement_with_a_teacher_of_one_answer_does_not_pass() -> None:
    verdict = judge(measured(1.0, 0.0, only_answer="no"), GateConfig())
    assert not verdict.passed and "answers 'no' to every sample, so agreement says nothing" in verdict.reason
    open_gate = GateConfig(**OPEN_GATE)
    assert not judge(verdict, open_gate).passed, "whatever the thresholds"
    assert judge(measured(0.0, 0.5, p_value=1.0), open_gate).passed


def test_informedness_is_the_adjusted_balanced_accuracy() -> None:
    """Reference: scikit-learn."""
    rng = random.Random(0)
    for num_classes in (2, 3, 5):
        references = [str(rng.randrange(num_classes)) for _ in range(40)]
        answers = [reference if rng.random() < 0.6 else str(rng.randrange(num_classes)) for reference in references]
        expected = balanced_accuracy_score(references, answers, adjusted=True)
        assert informedness(answers, references) == pytest.approx(expected)
    assert informedness([" No", "yes", None, "no"], ["no", "Yes", "yes", "NO"]) == pytest.approx(0.5)
    assert informedness(["a"] * 4, ["a"] * 4) == 0, "nothing is shown"


def test_the_p_value_is_the_share_of_all_orders_of_the_answers_that_agree_as_often() -> None:
    references, given = ["a", "a", "b", "b", "c", "d"], ["a", "A ", "b", "c", None, "x"]
    orders = list(itertools.permutations(given))
    as_many = [share_equal(order, references) >= share_equal(given, references) for order in orders]
    assert chance_agreement(given, references) == pytest.approx(np.mean(as_many), abs=0.01)
    assert chance_agreement(["a"] * 6, references) == chance_agreement(given, ["a"] * 6) == 1, "nothing is shown"
    texts = [f"text {index}" for index in range(10)]
    assert chance_agreement([*texts[:2], *"abcdefgh"], texts) == pytest.approx(1 / 90, abs=0.003)


def test_the_p_value_of_few_answers_is_the_share_of_all_orders_that_are_as_likely() -> None:
    logliks = np.random.default_rng(0).normal(size=(6, 3)).tolist()
    references = ["A", "a ", "b", "b", "b", "c"]
    codes = ["abc".index(text.strip().lower()) for text in references]
    sums = [sum(row[code] for row, code in zip(logliks, order, strict=True)) for order in itertools.permutations(codes)]
    found = sum(row[code] for row, code in zip(logliks, codes, strict=True))
    expected = np.mean([value >= found - 1e-9 for value in sums])
    assert chance_likelihood(logliks, ["a", "b", "c"], references) == pytest.approx(expected, abs=0.01)
    assert chance_likelihood([[-1.0, -2.0, -3.0]] * 6, ["a", "b", "c"], references) == 1, "as sure whatever the input"


def asked(labels: list[str], signal: float, rng: np.random.Generator) -> tuple[list[str | None], list[list[float]]]:
    """A student's answers and how likely it finds yes and no: the label as far as it reads the input, and its share."""
    share = labels.count("yes") / len(labels)
    side = np.where(np.array(labels) == "yes", 1.0, -1.0)
    margins = signal * side + rng.normal(0, 2, len(labels)) + np.log((share + 0.02) / (1.02 - share))
    logliks = np.stack([-np.logaddexp(0, -margins), -np.logaddexp(0, margins)], axis=1)
    return ["yes" if margin > 0 else "no" for margin in margins], logliks.tolist()


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.8, 0.2), (0.9, 0.1)])
def test_students_that_do_not_read_their_inputs_pass_one_time_in_twenty_at_most(shares: tuple[float, float]) -> None:
    rng = np.random.default_rng(2)

    def passes(signal: float) -> float:
        found = []
        for _ in range(300):
            labels = rng.choice(["yes", "no"], 50, p=shares).tolist()
            own, likely = asked(labels, signal, rng)
            arms = {("paint", "gate_student"): own, ("paint", "gate_base"): [None] * 50}
            judged = dataclasses.replace(classified(labels), config=GateConfig(min_agreement=0.01))
            found.append(_judge_member(judged, arms, {}, {}, likely)[0].passed)
        return float(np.mean(found))

    assert passes(0.0) <= 0.07 and passes(4.0) >= 0.9, "by the permutation test alone"


def test_of_few_prompts_with_one_answer_the_likelihood_tells_what_agreement_cannot() -> None:
    """21 yes and 3 no, of which the student gives one: 92 % agree, maybe by chance; how sure it is, is no chance."""
    labels = ["yes"] * 21 + ["no"] * 3
    margins = np.array([3.0] * 21 + [-1.0, 0.4, 0.6])
    own: list[str | None] = ["yes" if margin > 0 else "no" for margin in margins]
    likely = np.stack([-np.logaddexp(0, -margins), -np.logaddexp(0, margins)], axis=1).tolist()
    arms = {("paint", "gate_student"): own, ("paint", "gate_base"): [None] * 24}
    assert chance_agreement(own, labels) > 0.1
    gate, _ = _judge_member(classified(labels), arms, {}, {}, likely)
    assert gate.passed and gate.p_value is not None and gate.p_value < 0.01
    arms["paint", "gate_student"] = ["yes"] * 24
    gate, _ = _judge_member(classified(labels), arms, {}, {}, likely)
    assert not gate.passed and "informedness 0.00 < gate.min_informedness 0.30" in gate.reason


def classified(labels: list[str]) -> GateMember:
    heldout = [{"input": f"held out {index}", "answer": label} for index, label in enumerate(labels)]
    return dataclasses.replace(member(), heldout=heldout, eval_rows=[], classes=("yes", "no"))


def test_a_student_of_one_answer_does_not_pass_however_well_it_agrees() -> None:
    labels = ["yes"] * 22 + ["no"] * 2
    arms: dict[tuple[str, str], list[str | None]] = {("paint", "gate_base"): [None] * 24}
    constant, _ = _judge_member(classified(labels), arms | {("paint", "gate_student"): ["yes"] * 24}, {}, {})
    assert constant.agreement_student > 0.9 and constant.informedness == 0 and not constant.passed
    assert constant.p_value == 1 and "p = 1 > gate.max_p_value 0.05" in constant.reason
    assert (
        "informedness 0.00 < gate.min_informedness 0.30: it gives too few of the teacher's rarer answers"
        in constant.reason
    )
    assert constant.commonest == constant.agreement_student
    arms["paint", "gate_student"] = ["yes"] * 20 + ["no"] * 4
    some, _ = _judge_member(classified(labels), arms, {}, {})
    assert some.agreement_student == constant.agreement_student and some.passed, "both that have the other answer"
    arms["paint", "gate_student"] = ["yes"] * 20 + ["no"] * 3 + ["yes"]
    lucky, _ = _judge_member(classified(labels), arms, {}, {})
    assert not lucky.passed and lucky.p_value == pytest.approx(66 / 276, abs=0.02), "one of two, by three tries"
    unseen, _ = _judge_member(classified(["yes"] * 24), arms | {("paint", "gate_student"): ["yes"] * 24}, {}, {})
    assert unseen.agreement_student == 1 and not unseen.passed, "no prompt that shows the other answer"
    assert unseen.reason == (
        "all held-out prompts have one answer, so agreement says nothing; ship seeds of every answer"
    ), "more of them would not help: an answer that came once is trained on"


def test_a_student_of_little_more_than_the_commonest_answer_does_not_pass() -> None:
    """Of 24 prompts 16 have one answer; with those and two more it agrees on 75 %."""
    labels = ["repair"] * 16 + ["login"] * 4 + ["billing"] * 4
    own: list[str | None] = ["repair"] * 16 + ["login"] * 2 + ["repair"] * 6
    one = dataclasses.replace(classified(labels), classes=("repair", "login", "billing"))
    gate, _ = _judge_member(one, {("paint", "gate_student"): own, ("paint", "gate_base"): [None] * 24}, {}, {})
    assert gate.agreement_student == 0.75 and gate.p_value is not None and gate.p_value > 0.01
    assert gate.reason.startswith("informedness 0.25 < gate.min_informedness 0.30") and not gate.passed
    assert gate.min_informedness == 0.3
    lenient = judge(gate, GateConfig(min_informedness=0.2, max_p_value=0.1))
    assert lenient.passed and lenient.min_informedness == 0.2
    nothing_asked = judge(gate, GateConfig(**OPEN_GATE))
    assert nothing_asked.passed and nothing_asked.min_informedness is None


def test_odd_answers_of_a_teacher_weigh_nothing_in_the_informedness() -> None:
    """A student that is right but for three odd ones agrees on 21 of 24, and has learnt the task."""
    labels = ["yes"] * 11 + ["no"] * 10 + ["maybe", "both", "neither"]
    own = [*labels[:21], "yes", "no", "no"]
    assert informedness(own, labels) == 1 and informedness(["yes"] * 24, labels) == 0
    assert informedness(["a", "b", "a"], ["a", "b", "c"]) == pytest.approx(0.5), "each came once: all count"
    assert informedness(["a"] * 4, ["a", "a", "a", "b"]) == 0, "one other remains: both count"


def test_a_member_is_judged_by_its_student_and_measured_by_every_arm() -> None:
    gate, accuracy = _judge_member(member(), answers(student=3, base=0), LOGLIKS, {})
    assert gate == GateResult(
        num_heldout=4,
        agreement_student=0.75,
        agreement_base=0.0,
        loglik_student=-0.5,
        loglik_base=-3.0,
        min_agreement=0.6,
        commonest=0.25,
        p_value=gate.p_value,
        passed=True,
    )
    assert gate.p_value == pytest.approx(1 / 24, abs=0.01)
    assert accuracy == Accuracy(num_items=4, source_base=0.0, source_adapter=1.0, target_base=0.25, migrated=0.75)


def test_a_student_worse_than_the_bare_base_fails() -> None:
    gate, _ = _judge_member(member(), answers(student=1, base=3), {}, {})
    assert (gate.agreement_student, gate.agreement_base, gate.passed) == (0.25, 0.75, False)
    assert gate.reason == (
        "agreement 0.25 < gate.min_agreement 0.60; gain over the target base -0.50 < gate.min_gain +0.00; p = 0.25 > "
        "gate.max_p_value 0.05: its answers may well agree by chance, whatever the inputs; ship seeds of every answer, "
        "or raise gate.min_holdout"
    )


def test_the_p_value_of_a_gain_is_the_share_of_all_signs_that_gain_as_much() -> None:
    shares, others = [0.9, 0.8, 0.7, 0.6, 1.0, 0.9, 0.5, 0.9], [0.5, 0.7, 0.75, 0.4, 0.6, 0.9, 0.4, 0.1]
    gains = np.subtract(shares, others)
    as_much = [np.dot(signs, gains) >= gains.sum() - 1e-9 for signs in itertools.product([-1, 1], repeat=8)]
    assert chance_gain(shares, others) == pytest.approx(np.mean(as_much), abs=0.01)
    assert chance_gain(shares, shares) == 1 and chance_gain(others, shares) > 0.9


LETTERS = [
    f"Dear customer {index}, thank you for your message; we have looked into it, and {'x' * 40}" for index in range(20)
]


def letters(answers: list[str] | None = None) -> GateMember:
    heldout = [{"input": f"complaint {index}", "answer": text} for index, text in enumerate(answers or LETTERS)]
    return dataclasses.replace(member(), heldout=heldout, eval_rows=[])


def by_tokens(student: float, base: float, elsewhere: float, unfinished: int = 0) -> GateResult:
    """The verdict on a student that writes none of the letters to the letter, and leaves some without an end."""
    noise = np.random.default_rng(1).normal(0, 0.05, 20)
    shares = {
        ("paint", arm): np.clip(share + noise * sign, 0, 1).tolist()
        for arm, share, sign in (("student", student, 1), ("base", base, -1), ("elsewhere", elsewhere, -1))
    }
    texts: list[str | None] = [None if index < unfinished else "Dear Sir" for index in range(20)]
    arms = {("paint", "gate_student"): texts, ("paint", "gate_base"): [None] * 20}
    return _judge_member(letters(), arms, {}, shares)[0]


def test_long_answers_agree_by_their_tokens() -> None:
    good = by_tokens(0.85, 0.5, 0.5)
    assert good.passed and good.unit == "tokens" and good.has_long_answers
    assert good.agreement_student == pytest.approx(0.85, abs=0.02) and good.agreement_base < 0.55
    low, high = good.agreement_interval or (0.0, 1.0)
    assert low < good.agreement_student < high and high - low < 0.07, "a mean of 20 alike shares is known well"
    assert f"({100 * low:.0f}–{100 * high:.0f}) of tokens" in agreement_text(
        AdapterState(name="a", bundle="a", gate=good)
    )
    assert not by_tokens(0.55, 0.3, 0.3).passed, "too few"
    for idle in (by_tokens(0.85, 0.85, 0.5), by_tokens(0.85, 0.5, 0.85)):
        assert not idle.passed and "no better than the bare target base, or whatever the inputs" in idle.reason
    endless = by_tokens(0.85, 0.2, 0.2, unfinished=8)
    assert endless.agreement_student == pytest.approx(0.6 * 0.85, abs=0.02) and not endless.passed


def test_a_gate_that_asks_for_long_texts_to_the_letter_says_what_to_set() -> None:
    arms: dict[tuple[str, str], list[str | None]] = {("paint", "gate_student"): ["Dear Sir"] * 20}
    verdict, _ = _judge_member(letters(), arms | {("paint", "gate_base"): [None] * 20}, {}, {})
    assert verdict.unit == "answers" and "set gate.long_answers to tokens" in verdict.reason
    short, _ = _judge_member(member(), answers(student=1, base=0), {}, {})
    assert "long_answers" not in short.reason


def test_tokens_are_asked_for_where_answers_are_long_and_the_config_says_so() -> None:
    assert letters().has_long_answers and not member().has_long_answers
    assert not letters([*LETTERS[:9], *["short"] * 11]).has_long_answers
    assert not dataclasses.replace(letters(), classes=("one", "two")).has_long_answers
    rows = token_rows(letters(), "student/paint")
    arms = {arm: [row for row in rows if row["arm"] == arm] for arm in ("student", "base", "elsewhere")}
    assert [row["answer"] for row in arms["student"]] == [row["answer"] for row in arms["elsewhere"]] == LETTERS
    assert {row["slot"] for row in arms["base"]} == {None}
    pairs = zip(arms["student"], arms["elsewhere"], strict=True)
    assert all(own["input"] != other["input"] and own["slot"] == other["slot"] for own, other in pairs)


@pytest.mark.parametrize("how", ["exact", "tokens"])
def test_only_long_answers_are_asked_for_their_tokens(
    how: Literal["exact", "tokens"], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shares, asked = {"student": 0.9, "base": 0.4, "elsewhere": 0.5}, list[set[str]]()

    def run_rows(
        label: str, rows: list[dict[str, Any]], function: object, *, base: BaseModelConfig, **rest: Any
    ) -> list[dict[str, Any]]:
        if function is token_block:
            assert base.model == "target"
            asked.append({row["adapter"] for row in rows})
            return [{**row, "agreed": shares[row["arm"]]} for row in reversed(rows)]
        if base.model == "target":
            assert {row["adapter"]: row["limit"] for row in rows} == {"letters": 100 + len(LETTERS[0]), "paint": 103}
        return [{**row, "answer": "Dear Sir", "finished": True, "loglik": -1.0} for row in rows]

    monkeypatch.setattr(questions, "run_rows", run_rows)
    results, _ = gate_of(
        [
            dataclasses.replace(letters(), name="letters", config=GateConfig(long_answers=how)),
            dataclasses.replace(member(), eval_rows=[]),
        ],
        tmp_path,
    )
    assert asked == ([{"letters"}] if how == "tokens" else [])
    assert results["letters"][0].agreement_student == pytest.approx(0.9 if how == "tokens" else 0.0)
    assert (results["paint"][0].unit, results["paint"][0].agreement_student) == ("answers", 0.0)


def test_without_real_data_there_is_no_accuracy() -> None:
    bare = GateMember("paint", Path("student"), Path("teacher"), "auto", "chat", member().heldout, [])
    gate, accuracy = _judge_member(bare, answers(student=4, base=0), {}, {})
    assert gate.passed and accuracy is None


def test_real_data_that_cannot_be_answered_costs_the_accuracy_and_not_the_adapter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run_rows(
        label: str, rows: list[dict[str, Any]], function: object, *, faults: dict[str, str], **rest: Any
    ) -> list[dict[str, Any]]:
        if "real data" in label:
            faults["paint"] = "too many tokens"
            return []
        return [{**row, "answer": COLOURS[row["index"]], "finished": True, "loglik": -1.0} for row in rows]

    monkeypatch.setattr(questions, "run_rows", run_rows)
    results, faults = gate_of([member()], tmp_path)
    assert not faults and results["paint"][0].agreement_student == 1 and results["paint"][1] is None
    assert "paint: its accuracy on real data is not measured: too many tokens" in caplog.text


def test_real_items_that_were_trained_on_are_counted() -> None:
    seen = dataclasses.replace(member(), trained=["Real  RED", "real blue", "another", "real blue"])
    _, accuracy = _judge_member(seen, answers(student=3, base=0), {}, {})
    assert accuracy is not None and accuracy.num_seen == 2
    state = AdapterState(name="paint", bundle="x", accuracy=accuracy)
    assert remarks(state) == ["2 of its 4 real items were invented word for word, and trained on"]


def test_a_teachers_own_stop_is_the_teachers_alone() -> None:
    rows = [
        *answer_rows("paint", "source_adapter", [("a", "red")], "teacher/paint", "chat", stop="###"),
        *answer_rows("paint", "migrated", [("a", "red")], "student/paint", "auto"),
    ]
    assert [row["stop"] for row in rows] == [r"(?<=\S)\s*\#\#\#", None]


def test_an_adapter_is_judged_by_its_own_threshold() -> None:
    strict = dataclasses.replace(member(), config=GateConfig(min_agreement=0.8))
    gate, _ = _judge_member(strict, answers(student=3, base=0), {}, {})
    assert not gate.passed and "agreement 0.75 < gate.min_agreement 0.80" in gate.reason and gate.min_agreement == 0.8
    fleet = FleetConfig.model_validate(
        {
            "run_dir": "run",
            "source": {"model": "a"},
            "target": {"model": "b"},
            "adapters": [{"bundle": "x", "min_agreement": 0.4}, {"bundle": "y"}],
        }
    )
    assert [fleet.gate_of(entry).min_agreement for entry in fleet.adapters] == [0.4, 0.6]


def test_each_arm_is_answered_by_its_own_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four models, known by base and slot, that answer different numbers of items right."""
    models = {
        ("source", None): RIGHT["source_base"],
        ("source", "teacher/paint"): RIGHT["source_adapter"],
        ("target", None): RIGHT["target_base"],
        ("target", "student/paint"): RIGHT["migrated"],
    }

    def run_rows(
        label: str, rows: list[dict[str, Any]], function: object, *, base: BaseModelConfig, **rest: Any
    ) -> list[dict[str, Any]]:
        assert set(rest["adapters"].values()) == {"student" if base.model == "target" else "teacher"}
        found = []
        for row in reversed(rows):
            assert row["template"] == ("chat" if base.model == "source" else "Q: {input}\nA:")
            answer = right(models[base.model, row["slot"]])[row["index"]]
            loglik = None if row["reference"] is None else -float(row["index"])
            found.append({**row, "answer": answer or "cut off", "finished": answer is not None, "loglik": loglik})
        return found

    monkeypatch.setattr(questions, "run_rows", run_rows)
    results, _ = gate_of([member()], tmp_path)
    gate, accuracy = results["paint"]
    assert (gate.agreement_student, gate.agreement_base) == (0.75, 0.25)
    assert (gate.loglik_student, gate.loglik_base) == (-1.5, -1.5), "the mean over held-out prompts alone"
    assert accuracy == Accuracy(num_items=4, source_base=0.0, source_adapter=1.0, target_base=0.25, migrated=0.75)
