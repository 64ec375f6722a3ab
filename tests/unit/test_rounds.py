from pathlib import Path

from translora.bundle.bundle import Bundle
from translora.bundle.manifest import Manifest
from translora.config import SynthesisConfig
from translora.synthesis.actors import cut_blocks
from translora.synthesis.rounds import Pool, admit, clean, plan_round

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


def test_a_round_asks_for_what_is_missing_over_the_expected_acceptance() -> None:
    one = pool(needed=30, budget=1000)
    config = SynthesisConfig(oversample=1.0)
    assert len(plan_round([one], config, seed=0)) == 50, "prior acceptance 3 of 5"
    admit(labelled("task", 10), {"task": one})
    second = plan_round([one], config, seed=0)
    assert len(second) == 85, "20 missing at (10 + 3) / (50 + 5)"
    assert [row["sample_id"] for row in second] == list(range(50, 135))


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


def test_malformed_copied_and_repeated_inputs_are_dropped_and_counted() -> None:
    one = pool()
    cut_off = {"adapter": "task", "sample_id": 9, "text": "cut off", "finished": False}
    rows = [*generated("task", "sell a red toy", "Sell a  RED toy", SEEDS[0].upper(), ""), cut_off]
    kept = clean(rows, {"task": one})
    assert [row["input"] for row in kept] == ["sell a red toy"]
    assert one.stats.dropped == {"duplicate": 1, "seed_copy": 1, "malformed": 2}
    assert clean(generated("task", "sell a red toy"), {"task": one}) == [], "a later round knows the earlier ones"


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
