"""A discriminator's training rows, what is kept out of them, and the verdict on it."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import make_base, make_bundle
from translora.bundle import read_bundle
from translora.bundle.manifest import MANIFEST, DiscriminatorQuality
from translora.config import SynthesisConfig
from translora.synthesis.discriminator import Inputs, discriminator_rows, hold_out, quality
from translora.synthesis.pool import choose_screen
from translora.synthesis.prompts import discriminator_question, normalise

REAL = [f"send the {word} box number {number}" for word in ("red", "blue") for number in range(25)]
INVENTED = [f"a {word} box numbered {number}" for word in ("red", "blue") for number in range(20)]


def test_discriminator_rows_are_balanced_and_topped_up_by_shuffled_words() -> None:
    positives = [f"send the {word} box to me" for word in "abcdefghij"]
    rows = discriminator_rows(Inputs(positives, ["bad one", "bad two"]), "boxes", max_samples=12, seed=0)
    answers = [row["answer"] for row in rows]
    assert answers.count("yes") == answers.count("no") == 6
    questions = {row["input"] for row in rows if row["answer"] == "no"}
    assert {discriminator_question(text, "boxes") for text in ("bad one", "bad two")} <= questions
    assert not questions & {discriminator_question(text, "boxes") for text in positives}
    assert rows == discriminator_rows(Inputs(positives, ["bad one", "bad two"]), "boxes", max_samples=12, seed=0)


def test_few_negatives_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    words = ["red", "blue", "green", "black"]
    rows = discriminator_rows(Inputs(words, []), "colours", max_samples=12, seed=0)
    assert [row["answer"] for row in rows] == ["yes"] * 4
    assert "colours: 4 inputs, but only 0 negatives for its discriminator, which then accepts every" in caplog.text
    caplog.clear()
    discriminator_rows(Inputs(words, ["cup"]), "colours", max_samples=12, seed=0)
    assert "only 1 negatives" in caplog.text and "nearly every" in caplog.text
    caplog.clear()
    discriminator_rows(Inputs(words, ["cup", "box"]), "colours", max_samples=12, seed=0)
    assert not caplog.records


def test_a_fifth_of_either_kind_is_held_out_and_none_of_it_is_trained_on() -> None:
    again = [text.upper() for text in REAL[:10]]  # the same inputs, spelt otherwise
    known, unseen = hold_out(Inputs(REAL + again, INVENTED), seed=3)
    assert unseen is not None and (len(unseen.real), len(unseen.invented)) == (10, 8)
    for trained, measured, whole in (
        (known.real, unseen.real, REAL + again),
        (known.invented, unseen.invented, INVENTED),
    ):
        assert not set(map(normalise, trained)) & set(map(normalise, measured))
        assert set(map(normalise, [*trained, *measured])) == set(map(normalise, whole))
    assert hold_out(Inputs(REAL + again, INVENTED), seed=3) == (known, unseen)
    assert hold_out(Inputs(REAL + again, INVENTED), seed=4) != (known, unseen)


def test_of_few_inputs_none_is_held_out() -> None:
    few = Inputs(REAL, INVENTED[:39])
    assert hold_out(few, seed=0) == (few, None)


def test_the_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(0)
    real, invented = rng.normal(0.5, size=30).round(1), rng.normal(size=20).round(1)
    pairs = [1.0 if one > other else 0.5 if one == other else 0.0 for one, other in itertools.product(real, invented)]
    found = quality(list(real), list(invented))
    assert found.auc == pytest.approx(sum(pairs) / len(pairs), abs=1e-4)
    assert (found.num_real, found.num_invented) == (30, 20)
    assert found.accepts_real == pytest.approx((real > 0).mean(), abs=1e-4)
    assert found.accepts_invented == pytest.approx((invented > 0).mean(), abs=1e-4)


def test_the_verdict_keeps_its_level_where_scores_say_nothing() -> None:
    """A twentieth of discriminators that guess may pass; nearly all of those that are good must."""
    rng = np.random.default_rng(1)
    guessing = [quality(*rng.normal(size=(2, 20))).tells_apart for _ in range(2000)]
    assert 0.03 < np.mean(guessing) < 0.07
    good = [quality(rng.normal(1.5, size=20).tolist(), rng.normal(size=20).tolist()).tells_apart for _ in range(200)]
    assert np.mean(good) > 0.97
    assert not quality([-1.0 + place / 100 for place in range(20)], [-2.0] * 20).tells_apart, "it accepts nothing"


@pytest.mark.parametrize(
    ("auc", "provenance", "screen"),
    [
        (None, {}, "realness"),
        (0.9, {}, "realness"),
        (0.49, {}, "confidence"),
        (0.9, {"migrated_from": "old"}, "realness"),
        (None, {"migrated_from": "old"}, "confidence"),
    ],
)
def test_auto_passes_over_a_discriminator_that_cannot_tell(
    tmp_path: Path, auc: float | None, provenance: dict[str, str], screen: str
) -> None:
    bundle = make_bundle(tmp_path / "orders", make_base(tmp_path / "base"))
    path, measured = bundle.path / MANIFEST, None
    if auc is not None:
        measured = DiscriminatorQuality(num_real=20, num_invented=20, auc=auc, accepts_real=0.3, accepts_invented=0.2)
    more = {"provenance": provenance, "discriminator_quality": measured and measured.model_dump()}
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    bundle = read_bundle(bundle.path)
    assert bundle.manifest.discriminator_quality == measured
    assert choose_screen(SynthesisConfig(), bundle) == screen
    assert choose_screen(SynthesisConfig(screen="discriminator"), bundle) == "discriminator", "who asks for it has it"
