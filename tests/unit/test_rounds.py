from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from translora.actors.rows import Row, block_order, cut_blocks, read_block
from translora.bundle.bundle import Bundle
from translora.bundle.manifest import Manifest
from translora.config import BaseModelConfig, ResourceConfig, SynthesisConfig
from translora.run.state import ScreenName
from translora.synthesis import rounds
from translora.synthesis.phase import draw_heldout
from translora.synthesis.pool import Pool, admit, choose_screen, close
from translora.synthesis.quality import answer_classes
from translora.synthesis.rounds import clean, plan_round, stops, synthesise

SEEDS = ["send a red box", "ship a blue bag", "pack a green cup", "lend a black hat", "sell a red pen"]


def pool(name: str = "task", needed: int = 10, budget: int = 100) -> Pool:
    manifest = Manifest(
        task_name=name,
        base_name="base",
        base_fingerprint="0" * 64,
        num_samples=needed,
        prompt_template="chat",
        discriminator=True,
        provenance={},
        files={},
    )
    return Pool(name, Bundle(Path(name), manifest, SEEDS, "0" * 64), needed, budget)


def generated(name: str, *texts: str, finished: bool = True) -> list[dict[str, object]]:
    return [
        {"adapter": name, "sample_id": index, "text": text, "finished": finished} for index, text in enumerate(texts)
    ]


def labelled(
    name: str, count: int, score: float | None = 1.0, answer: str = "red", finished: bool = True, start: int = 0
):  # type: ignore[no-untyped-def]
    return [
        {
            "adapter": name,
            "sample_id": start + index,
            "input": f"x{start + index}",
            "answer": answer,
            "score": score,
            "finished": finished,
        }
        for index in range(count)
    ]


def test_a_teacher_that_never_ends_is_ended_where_its_owner_says() -> None:
    one, other = pool("one"), pool("other")
    one.stop = "\n###"
    rows = clean(
        [*generated("one", "a cat"), *generated("other", "a dog")], {"one": one, "other": other}, SynthesisConfig()
    )
    assert [row["stop"] for row in rows] == [r"(?<=\S)\s*" + re.escape("\n###"), None]
    assert stops(one) != stops(other) == [], "a set of the same name is made again, and that of others is not"
    for text, kept in (("\n###\nred \n### Input: b\n###", "\n###\nred"), ("red", "red")):
        assert re.split(rows[0]["stop"], text)[0] == kept


def test_a_round_asks_for_what_is_missing_over_the_expected_acceptance() -> None:
    one = pool(needed=30, budget=1000)
    config = SynthesisConfig(oversample=1.0)
    assert len(plan_round([one], config, seed=0)) == 50, "prior acceptance 3 of 5"
    admit(labelled("task", 10), {"task": one})
    second = plan_round([one], config, seed=0)
    assert len(second) == 103, "103 p - sqrt(103 p (1 - p)) is 20 at p = (10 + 3) / (50 + 5)"
    assert [row["sample_id"] for row in second] == list(range(50, 153))


def test_generation_stops_at_the_budget_and_when_enough_is_accepted() -> None:
    short, full = pool("short", needed=30, budget=20), pool("full", needed=2)
    config = SynthesisConfig(oversample=1.0)
    plan_round([short], config, seed=0)
    assert short.stats.generated == 20
    admit(labelled("full", 2), {"full": full, "short": short})
    assert plan_round([short, full], config, seed=0) == []


def test_a_request_depends_on_its_adapter_and_number_alone() -> None:
    config = SynthesisConfig()
    alone = plan_round([pool("a")], config, seed=5)
    beside = [row for row in plan_round([pool("b"), pool("a")], config, seed=5) if row["adapter"] == "a"]
    assert alone == beside
    assert len({row["seed"] for row in alone}) == len(alone)


def test_the_seeds_come_in_as_many_orders_as_are_asked_for() -> None:
    for num_orderings in (1, 3):
        rows = plan_round([pool(needed=30)], SynthesisConfig(num_orderings=num_orderings), seed=0)
        prompts = Counter(row["prompt"] for row in rows)
        assert len(prompts) == num_orderings
        assert max(prompts.values()) - min(prompts.values()) <= 1, "each as often as the others"
        assert all(seed in prompt for prompt in prompts for seed in SEEDS)


def test_a_finished_set_says_how_various_its_inputs_are() -> None:
    one = pool(needed=4)
    rows = labelled("task", 4)
    for row, text in zip(rows, ("a red box", "a red bag", "a red cup", "a red box of tin"), strict=True):
        row["input"] = text
    admit(rows, {"task": one})
    close(one)
    assert one.stats.distinct == {"distinct-1": round(7 / 14, 4), "distinct-2": round(6 / 10, 4)}


def test_malformed_copied_and_repeated_inputs_are_dropped_and_counted() -> None:
    one = pool()
    cut_off = {"adapter": "task", "sample_id": 9, "text": "cut off", "finished": False}
    rows = [*generated("task", "sell a red toy", "Sell a  RED toy", SEEDS[0].upper(), ""), cut_off]
    kept = clean(rows, {"task": one}, SynthesisConfig())
    assert [row["input"] for row in kept] == ["sell a red toy"]
    assert one.stats.dropped == {"duplicate": 1, "seed_copy": 1, "malformed": 1, "long_input": 1}
    assert clean(generated("task", "sell a red toy"), {"task": one}, SynthesisConfig()) == [], (
        "a later round knows the earlier ones"
    )


def test_what_repeats_a_seed_or_an_earlier_input_but_for_a_trifle_is_dropped() -> None:
    one = pool()
    one.bundle = dataclasses.replace(
        one.bundle, seeds=["Please close my account at the branch in Leeds.", "What does a new card cost me abroad?"]
    )
    texts = (
        "Please close my account at the branch in Leeds",  # a seed without its full stop
        "Which of the two savings accounts of yours pays me 3 percent?",
        "Which of the two savings accounts of yours pays me 3 percent!",
        "Which of the two savings accounts of yours pays me 4 percent?",  # another number: another input
    )
    kept = clean(generated("task", *texts), {"task": one}, SynthesisConfig())
    assert [row["sample_id"] for row in kept] == [1, 3]
    assert one.stats.dropped == {"seed_copy": 1, "near_duplicate": 1}
    off = pool()
    off.bundle = one.bundle
    strict = SynthesisConfig(seed_similarity=1, duplicate_similarity=1)
    assert len(clean(generated("task", *texts), {"task": off}, strict)) == 4


@pytest.mark.parametrize("screen", ["none", "discriminator", "confidence", "excess"])
def test_what_is_over_is_laid_aside_whatever_the_screen_and_all_is_counted(screen: ScreenName) -> None:
    one = pool(needed=3)
    one.screen, one.stats.generated = screen, 6
    admit([*labelled("task", 5, 1.0), *labelled("task", 1, -1.0, start=5)], {"task": one})
    close(one)
    assert len(one.accepted) == 3 and len(one.refused) == 3
    assert one.stats.dropped == {"refused": 1, "outranked": 2} and one.stats.accepted == 5
    assert len(one.accepted) + sum(one.stats.dropped.values()) == one.stats.generated
    rows = [row | {"split": "train"} for row in one.accepted] + [row | {"split": "refused"} for row in one.refused]
    more = pool(needed=5)
    more.carry_on(one.stats, rows)
    assert len(more.accepted) == 5 and plan_round([more], SynthesisConfig(), seed=0) == [], "nothing to be generated"


def test_of_a_surplus_those_with_the_greatest_excess_are_kept() -> None:
    one = pool(needed=2)
    one.screen, one.surplus = "excess", 2.0
    assert one.wanted == 4 and len(plan_round([one], SynthesisConfig(oversample=1.0), seed=0)) == 7
    scores = (0.5, 2.0, -0.1, 0.7, 1.5)
    admit([labelled("task", 1, score, start=index)[0] for index, score in enumerate(scores)], {"task": one})
    assert one.stats.dropped == {"refused": 1}
    close(one)
    assert [row["sample_id"] for row in one.accepted] == [1, 4]
    assert sorted(row["sample_id"] for row in one.refused) == [0, 2, 3]
    assert one.stats.dropped == {"refused": 1, "outranked": 2} and one.stats.shortfall == ""


@pytest.mark.parametrize(("screen", "kept"), [("realness", [1, 3]), ("none", [0, 1])])
def test_a_screen_that_ranks_does_so_without_a_surplus_too(screen: ScreenName, kept: list[int]) -> None:
    """A round brings more than it was asked for."""
    one = pool(needed=2)
    one.screen = screen
    admit(
        [labelled("task", 1, score, start=index)[0] for index, score in enumerate((0.1, 2.0, 0.2, 1.0))],
        {"task": one},
    )
    close(one)
    assert [row["sample_id"] for row in one.accepted] == kept


def test_every_answer_is_there_however_little_the_adapter_has_to_say_with_it() -> None:
    """Excess is a mean over an answer's tokens: ranked over all, longer answers would be left out whole."""
    one = pool(needed=10)
    one.screen, one.surplus = "excess", 2.0
    for answer, count, start, best in (("login", 14, 0, 12.0), ("repair", 4, 14, 5.0), ("error", 1, 18, 20.0)):
        for index in range(count):
            admit(labelled("task", 1, best - index / 100, answer=answer, start=start + index), {"task": one})
    close(one)
    assert one.stats.classes == {"login": 5, "repair": 4, "error": 1}
    assert {row["sample_id"] for row in one.accepted} == {*range(5), *range(14, 18), 18}, "the best of each"
    assert one.stats.dropped == {"outranked": 9}


@pytest.mark.parametrize("screen", ["none", "discriminator"])
def test_what_is_over_goes_by_answers_too_and_within_one_by_its_place(screen: ScreenName) -> None:
    one = pool(needed=6)
    one.screen = screen
    for answer, count, start in (("yes", 7, 0), ("no", 3, 7)):
        admit(labelled("task", count, 1.0, answer=answer, start=start), {"task": one})
    close(one)
    assert [row["sample_id"] for row in one.accepted] == [0, 1, 2, 7, 8, 9]
    texts = pool("texts", needed=3)
    for index in range(5):
        admit(labelled("texts", 1, answer=f"free text {index}", start=index), {"texts": texts})
    close(texts)
    assert [row["sample_id"] for row in texts.accepted] == [0, 1, 2]


def test_a_score_that_is_not_a_number_lets_nothing_pass() -> None:
    one = pool("task", needed=3)
    admit(labelled("task", 2, float("nan")) + labelled("task", 1, 0.0, start=2), {"task": one})
    assert one.accepted == [] and len(one.refused) == 3 and one.stats.dropped == {"refused": 3}
    ranked = pool("task", needed=3)
    ranked.screen = "realness"
    admit(labelled("task", 2, float("nan")) + labelled("task", 1, -9.0, start=2), {"task": ranked})
    assert len(ranked.accepted) == 1 and ranked.stats.dropped == {"refused": 2}


def test_a_teacher_with_one_answer_is_warned_of_and_one_that_answers_nothing_leaves_the_set_empty() -> None:
    one, silent = pool("one", needed=3), pool("silent", needed=3)
    admit(labelled("one", 3) + labelled("silent", 3, answer=""), {"one": one, "silent": silent})
    close(one)
    close(silent)
    assert one.stats.classes == {"red": 3} and "answers 'red' to all 3 samples" in one.stats.warning
    assert silent.accepted == [] and "0 of 3 samples" in silent.stats.shortfall
    assert "'empty_answer': 3" in silent.stats.shortfall and silent.stats.warning == ""


def test_another_attempt_goes_on_from_the_samples_of_the_first() -> None:
    one = pool(needed=4)
    one.stats.rounds, one.stats.generated = 2, 9
    admit(labelled("task", 3) + labelled("task", 2, score=-1.0, start=3), {"task": one})
    rows = [{**row, "split": "train"} for row in one.accepted] + [{**row, "split": "refused"} for row in one.refused]
    again = pool(needed=8)
    again.carry_on(one.stats, rows)
    assert (again.accepted, again.refused) == (one.accepted, one.refused)
    assert again.stats.generated == 9 and again.stats.needed == 8 and again.stats.dropped == {"refused": 2}
    new = plan_round([again], SynthesisConfig(), seed=0)
    assert min(row["sample_id"] for row in new) == 9, "no sample is drawn twice"
    assert clean(generated("task", "x0"), {"task": again}, SynthesisConfig()) == []
    assert one.stats.generated == 9, "the state of the first attempt is not touched"


def test_the_screen_of_a_bundle() -> None:
    bundle = pool().bundle
    without = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"discriminator": False}))
    assert choose_screen(SynthesisConfig(), bundle) == "realness"
    assert choose_screen(SynthesisConfig(), without) == "confidence"
    assert choose_screen(SynthesisConfig(screen="none"), bundle) == "none"
    for screen in ("discriminator", "realness"):
        with pytest.raises(
            ValueError, match=r"has no discriminator; set synthesis.screen to auto, confidence, excess or none"
        ):
            choose_screen(SynthesisConfig.model_validate({"screen": screen}), without)


def test_the_screen_and_the_teacher_decide_what_is_accepted() -> None:
    one = pool()
    admit(
        labelled("task", 2)
        + labelled("task", 1, score=-0.1, start=2)
        + labelled("task", 1, answer="", start=3)
        + labelled("task", 1, finished=False, start=4)
        + labelled("task", 1, score=None, start=5),
        {"task": one},
    )
    assert [row["sample_id"] for row in one.accepted] == [0, 1, 5]
    assert [row["sample_id"] for row in one.refused] == [2]
    assert one.stats.dropped == {"refused": 1, "empty_answer": 1, "long_answer": 1}


def test_blocks_hold_rows_of_similar_length_and_depend_on_the_rows_alone() -> None:
    rows = [{"text": "x" * length} for length in (5, 1, 4, 2, 3)]
    blocks = cut_blocks(rows, 2, lambda row: len(row["text"]))
    assert [[len(row["text"]) for row in block] for block in blocks] == [[1, 2], [3, 4], [5]]


def test_blocks_for_vllm_hold_rows_of_few_adapters() -> None:
    rows = [{"text": "x" * length, "slot": name} for length in (1, 2, 3, 4) for name in ("b", None, "a")]
    plain, vllm = BaseModelConfig(model="m"), BaseModelConfig(model="m", vllm={})
    by_length = [cut_blocks(rows, 4, block_order(base, lambda row: len(row["text"]))) for base in (plain, vllm)]
    assert [len({row["slot"] for row in block}) for block in by_length[0]] == [3, 3, 3]
    assert [[row["slot"] for row in block] for block in by_length[1]] == [[None] * 4, ["a"] * 4, ["b"] * 4]
    assert [len(row["text"]) for row in by_length[1][0]] == [1, 2, 3, 4]


def fleet_run(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path, *pools: Pool, on_round: Callable[[], None] = lambda: None
) -> list[list[str]]:
    """Synthesise with a stand-in for the actors that accepts every input; returns the adapters of each call."""
    calls = []

    def run_rows(label: str, rows: list[Row], function: object, **rest: Any) -> list[Row]:
        calls.append(sorted({row["adapter"] for row in rows}))
        if rows and "prompt" in rows[0]:
            return [{**row, "text": f"{row['adapter']} {row['sample_id']}", "finished": True} for row in rows]
        return [{**row, "score": 1.0, "answer": "red", "finished": True} for row in rows]

    monkeypatch.setattr(rounds, "run_rows", run_rows)
    synthesise(
        pools,
        generator=BaseModelConfig(model="new"),
        source=BaseModelConfig(model="old"),
        identities=("1", "2"),
        config=SynthesisConfig(max_rounds=2),
        resources=ResourceConfig(),
        seed=0,
        run_dir=run_dir,
        on_round=on_round,
    )
    return calls


def test_a_starved_adapter_is_not_computed_again_without_its_neighbours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    full, starved = pool("full"), pool("starved", needed=30, budget=12)
    assert fleet_run(monkeypatch, tmp_path, full, starved)[0] == ["full", "starved"]
    assert len(full.accepted) == 10 and not full.stats.shortfall
    assert starved.stats.shortfall.startswith("12 of 30 samples")
    again = pool("starved", needed=30, budget=12)
    assert fleet_run(monkeypatch, tmp_path, again) == []
    assert (again.stats, again.accepted, again.refused) == (starved.stats, starved.accepted, starved.refused)
    beside = pool("starved", needed=30, budget=12), pool("new")
    assert fleet_run(monkeypatch, tmp_path, *beside)[0] == ["new"]
    assert beside[0].stats == starved.stats and len(beside[1].accepted) == 10


def test_another_size_or_bundle_is_computed_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fleet_run(monkeypatch, tmp_path, pool("a"))
    assert fleet_run(monkeypatch, tmp_path, pool("a", needed=11)) != []
    other = pool("a")
    other.bundle = dataclasses.replace(other.bundle, digest="1" * 64)
    assert fleet_run(monkeypatch, tmp_path, other) != []
    assert fleet_run(monkeypatch, tmp_path, pool("a")) == []


def test_a_synthesis_that_was_killed_keeps_nothing_but_its_blocks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fleet_run(monkeypatch, tmp_path, pool("a"), pool("b"), on_round=killed)
    assert fleet_run(monkeypatch, tmp_path, pool("a"), pool("b"))[0] == ["a", "b"]


def test_a_damaged_outcome_is_computed_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fleet_run(monkeypatch, tmp_path, pool("a"))
    (path,) = (tmp_path / "rounds").glob("outcome-*.json")
    path.write_bytes(path.read_bytes()[:-20])
    assert fleet_run(monkeypatch, tmp_path, pool("a")) != []
    assert f"{path}: cannot be read" in caplog.text


def test_a_damaged_block_is_as_good_as_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"adapter": "a", "text": f"text {index}"} for index in range(3)]
    path = tmp_path / "000001.parquet"
    assert read_block(path, 3) is None and not caplog.records, "nothing to warn of where there was nothing"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert read_block(path, 3) == rows
    assert read_block(path, 4) is None and "has 3 rows, not 4: computed again" in caplog.text
    whole = path.read_bytes()
    for damaged in (whole[:-30], whole[: len(whole) // 2], b"", whole[:-8] + b"\0" * 8):
        caplog.clear()
        path.write_bytes(damaged)
        assert read_block(path, 3) is None
        assert f"{path}: cannot be read" in caplog.text and "computed again" in caplog.text


def test_the_gate_gets_every_answer_in_its_share_and_free_text_at_random() -> None:
    answers = ["yes"] * 24 + ["No"] * 8 + ["no"] * 8
    drawn = draw_heldout(answers, 10, seed=1)
    assert len(drawn) == 10 and sum(answers[index] == "yes" for index in drawn) == 6
    assert draw_heldout(answers, 10, seed=1) == drawn != draw_heldout(answers, 10, seed=2)
    free = [f"answer {index}" for index in range(40)]
    assert len(draw_heldout(free, 20, seed=1)) == 20
    assert draw_heldout(free, 10, seed=1) != draw_heldout(free, 10, seed=2)
    assert draw_heldout(["yes", "no"], 1, seed=0) < {0, 1}


def test_the_gate_gets_a_rare_answer_too_unless_the_training_would_have_none() -> None:
    for seed in range(20):
        answers = ["yes"] * 50 + ["no"] * 2
        drawn = draw_heldout(answers, 12, seed)
        assert len(drawn) == 12 and sum(answers[index] == "no" for index in drawn) == 1
        alone = draw_heldout(["yes"] * 51 + ["no"], 12, seed)
        assert len(alone) == 12 and 51 not in alone
        many = ["no"] * 240 + ["yes"] * 39 + [f"other {index}" for index in range(21)]
        assert answer_classes(many) == {}, "as if it were free text"
        kinds = Counter(many[index][:2] for index in draw_heldout(many, 50, seed))
        assert (kinds["no"], kinds["ye"], kinds["ot"]) in ((40, 6, 4), (40, 7, 3))
        rare = ["a"] * 40 + ["b"] * 21 + ["c"] * 3
        assert sum(rare[index] == "c" for index in draw_heldout(rare, 24, seed)) == 1, "a share of 1.1"
        few = [letter for letter in "abcdef" for _ in range(3)]
        assert len({few[index] for index in draw_heldout(few, 3, seed)}) == 3, "room for three of six"
