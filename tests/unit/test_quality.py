from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from translora.synthesis.prompts import normalise
from translora.synthesis.quality import (
    MOST_CLASSES,
    KnownInputs,
    SeedCopies,
    answer_classes,
    by_answer,
    deal,
    deal_evenly,
    distinct_ngrams,
    is_copy,
    own_cutoff,
    similarity,
)


def test_similarity_is_one_for_equal_texts_alone() -> None:
    assert similarity("pay now", "pay now") == 1 and similarity("abc", "xyz") == 0
    assert 0.9 < similarity("please pay the bill now", "please pay the bill now.") < 1


def test_seeds_of_one_template_raise_the_cutoff() -> None:
    free = ["Please close my account.", "What does a card cost?"]
    template = ["not ( True ) and ( True ) is", "not ( True ) and ( False ) is"]
    assert own_cutoff(0.9, free) == 0.9
    cutoff = own_cutoff(0.85, template)
    assert 0.85 < cutoff < 1
    assert not is_copy(template[1], {template[0]}, cutoff), "as similar as the seeds are to each other is no copy"
    assert is_copy(template[0], {template[0]}, cutoff)
    assert own_cutoff(0.9, ["a seed", "A  seed"]) == own_cutoff(0.9, ["one"]) == 0.9, "one seed, given twice"


def test_an_input_that_holds_a_seed_or_nearly_is_one_repeats_it() -> None:
    seed = "Please close my account at the branch in Leeds."
    seeds = SeedCopies([seed, "Is 3 + 4 equal to 7?", "Is 3 + 5 equal to 7?", "lost card"], 0.9)
    for text in (seed, f"{seed} And what does that cost me?", f"Hello, {seed} Thank you very much.", seed[:-1]):
        assert normalise(text) in seeds, text
    near = "please close my account at the branch of leeds."
    assert 0.94 < similarity(near, normalise(seed)) < 0.96 and near in seeds, "the sums' likeness does not excuse it"
    assert "is 3 + 6 equal to 7?" not in seeds, "as like the seeds as they are to each other"
    assert "say: is 3 + 4 equal to 7?" not in seeds and "is 3 + 4 equal to 7?" in seeds
    assert "i have lost card and key" not in seeds, "a turn of phrase"


def test_a_seed_of_a_script_without_spaces_is_found_within_an_input() -> None:
    seeds = SeedCopies(["请关闭王小明在利兹分行的账户,他的电话号码是一三八零零零", "请问"], 0.9)
    assert (
        "你好!请关闭王小明在利兹分行的账户,他的电话号码是一三八零零零。谢谢你,请问还需要我提供什么材料吗?我今天都在家"
        in seeds
    )
    assert "请问还需要我提供什么材料吗" not in seeds, "a turn of phrase"


@given(st.text(max_size=30), st.lists(st.text(max_size=30), max_size=5), st.floats(0.01, 1))
def test_a_known_text_is_always_a_copy(text: str, others: list[str], cutoff: float) -> None:
    assert is_copy(text, {text, *others}, 1.0)
    assert KnownInputs([text, *others]).has_near(text, cutoff)


def test_other_numbers_make_another_input() -> None:
    known = KnownInputs(["i have 3 apples and 2 pears, how many fruits is that in all?"])
    assert not known.has_near("i have 4 apples and 2 pears, how many fruits is that in all?", 0.95)
    assert known.has_near("i have 3 apples and 2 pears; how many fruits is that in all?", 0.95)
    assert not known.has_near("i have 3 apples and 2 pears; how many fruits is that in all?", 1.0)


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 50), min_size=1, max_size=8), st.floats(0, 1))
def test_a_smaller_total_is_dealt_out_in_the_same_shares(counts: dict[str, int], share: float) -> None:
    whole = sum(counts.values())
    total = int(share * whole)
    dealt = deal(counts, total)
    assert sum(dealt.values()) == total and dealt.keys() == counts.keys()
    for key, count in counts.items():
        assert abs(dealt[key] - count * total / whole) < 1 and 0 <= dealt[key] <= count


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 50), max_size=8), st.floats(0, 1))
def test_what_is_dealt_evenly_differs_by_one_where_the_counts_let(counts: dict[str, int], share: float) -> None:
    total = int(share * sum(counts.values()))
    dealt = deal_evenly(counts, total)
    assert sum(dealt.values()) == total and all(0 <= dealt[key] <= count for key, count in counts.items())
    short = [dealt[key] for key, count in counts.items() if dealt[key] < count]
    assert not short or max(dealt.values()) <= min(short) + 1


def test_answers_that_came_once_are_one_kind() -> None:
    assert by_answer(["Yes", "no", "yes ", "maybe", "never"]) == {"yes": [0, 2], "": [1, 3, 4]}


def test_distinct_ngrams() -> None:
    assert distinct_ngrams(["a b", "a c"], 1) == pytest.approx(3 / 4)
    assert distinct_ngrams(["a b c", "A b d"], 2) == pytest.approx(3 / 4)
    assert distinct_ngrams(["a b c", "a b c"], 3) == pytest.approx(1 / 2)
    assert distinct_ngrams([], 1) == distinct_ngrams(["one"], 2) == 0.0


def test_classes_are_counted_where_answers_recur() -> None:
    assert answer_classes(["Yes", "no", "yes ", "no", "no"]) == {"no": 3, "Yes": 2}
    assert answer_classes(["one text", "another", "a third"]) == {}, "every answer is another"
    assert answer_classes([str(n) for n in range(MOST_CLASSES + 1)] * 3) == {}, "too many"
    assert answer_classes(["only"] * 3) == {"only": 3} and answer_classes([]) == {}
