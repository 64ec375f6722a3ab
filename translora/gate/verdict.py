"""Whether a student passes: how far its answers are its teacher's, and what of that chance or the bare base would do.

References are the teacher's answers. Equal is what is equal after normalising case and white space.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from translora.config import GateConfig
from translora.run.state import GateResult
from translora.synthesis.prompts import normalise


def is_equal(answer: str | None, reference: str) -> bool:
    """Exact match after normalisation; None is never equal."""
    return answer is not None and normalise(answer) == normalise(reference)


def share_equal(answers: Sequence[str | None], references: Sequence[str]) -> float:
    """Share of answers equal to their reference."""
    return sum(is_equal(*pair) for pair in zip(answers, references, strict=True)) / len(references)


def informedness(answers: Sequence[str | None], references: Sequence[str]) -> float:
    """How far the answers follow the references: 0 is one answer to everything, 1 the reference every time.

    The mean over the different references of the share of them that is answered so, adjusted for what one answer
    reaches: scikit-learn's `balanced_accuracy_score(adjusted=True)`, for two references Youden's J. Unlike agreement
    it is not raised by references of which nearly all are the same; where all are, it is 0, for nothing is shown.
    References that one prompt has are left out where two others remain: teachers now and then give an odd answer, and
    each would weigh as much as all prompts of another.
    """
    found: defaultdict[str, list[bool]] = defaultdict(list)
    for answer, reference in zip(answers, references, strict=True):
        found[normalise(reference)].append(is_equal(answer, reference))
    counted = [right for right in found.values() if len(right) > 1]
    if len(counted) < 2:
        counted = list(found.values())
    if len(counted) < 2:
        return 0.0
    chance = 1 / len(counted)
    return (fmean(map(fmean, counted)) - chance) / (1 - chance)


NUM_DEALS = 10_000
"""Random orders of the answers, or signs of the gains, that a p-value is counted over."""
NUM_DRAWS = 2_000
"""Bootstrap replicates of an interval."""
MOST_DEALT = 4_000_000
"""Values that are dealt out at a time."""
ROUNDING = 1e-9
Integers = npt.NDArray[np.integer[Any]]


def portions(length: int) -> Iterator[int]:
    """How many deals of so many values are made at a time, NUM_DEALS in all."""
    most = max(1, MOST_DEALT // length)
    for start in range(0, NUM_DEALS, most):
        yield min(most, NUM_DEALS - start)


def deals(values_N: Integers) -> Iterator[Integers]:
    """The values in NUM_DEALS random orders, [deals, N] at a time; the same ones whenever it is asked."""
    generator = np.random.default_rng(0)
    for count in portions(len(values_N)):
        yield generator.permuted(np.tile(values_N, (count, 1)), axis=1)


def chance_agreement(answers: Sequence[str | None], references: Sequence[str]) -> float:
    """p-value of a permutation test: the chance that as many agree when the answers are dealt out to other prompts.

    It is small where the answers follow the prompts. One answer to everything has 1 whatever the references, and so has
    everything where all references are the same; answers drawn in the references' own shares are below 0.05 one time in
    twenty. Free text needs few: k right ones of n that all differ, the others like none, have (n - k)! / n!.

    Source: E. J. G. Pitman, Significance tests which may be applied to samples from any populations (1937); with one
    more deal than drawn, so that it is never 0 (Phipson and Smyth, arXiv 1603.05766).
    """
    codes = {text: code for code, text in enumerate(dict.fromkeys(map(normalise, references)))}
    right = np.array([codes[normalise(text)] for text in references])
    given = np.array([-1 if text is None else codes.get(normalise(text), -1) for text in answers])
    agreed = np.count_nonzero(given == right)
    as_many = sum(np.count_nonzero((dealt == right).sum(axis=1) >= agreed) for dealt in deals(given))
    return (as_many + 1) / (NUM_DEALS + 1)


def chance_likelihood(
    logliks_NK: Sequence[Sequence[float]], classes: Sequence[str], references: Sequence[str]
) -> float:
    """p-value of a permutation test: the chance that the references are as likely when they are dealt out anew.

    It sees how sure a student is, and not just what it would say: of few prompts, of which nearly all have one answer,
    agreement alone can hardly tell anything. One answer to everything, as sure of it whatever the input, has about 1.

    Args:
        logliks_NK: the student's log-likelihood of each class as the answer to each prompt.
        classes: the different answers; each reference is one of them.
    """
    codes = {normalise(text): code for code, text in enumerate(classes)}
    right_N = np.array([codes[normalise(text)] for text in references])
    scores_NK, places_N = np.asarray(logliks_NK), np.arange(len(references))
    found = scores_NK[places_N, right_N].sum()
    as_likely = sum(
        np.count_nonzero(scores_NK[places_N, dealt].sum(axis=1) >= found - ROUNDING) for dealt in deals(right_N)
    )
    return (as_likely + 1) / (NUM_DEALS + 1)


def chance_gain(shares: Sequence[float], others: Sequence[float]) -> float:
    """p-value of a paired permutation test: the chance of so great a sum of gains if each may as well be a loss.

    Source: R. A. Fisher, The design of experiments (1935), section 21; with one more deal than drawn, as above.
    """
    gains_N = np.subtract(shares, others)
    generator, as_much = np.random.default_rng(0), 0
    for count in portions(len(gains_N)):
        signs = generator.choice([-1.0, 1.0], size=(count, len(gains_N)))
        as_much += int(np.count_nonzero(signs @ gains_N >= gains_N.sum() - ROUNDING))
    return (as_much + 1) / (NUM_DEALS + 1)


def mean_interval(shares: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of the prompts' shares."""
    drawn = np.random.default_rng(0).choice(np.asarray(shares), size=(NUM_DRAWS, len(shares)))
    low, high = np.quantile(drawn.mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def judge(measured: GateResult, config: GateConfig) -> GateResult:
    """The verdict on one adapter: enough agreement, beyond that of the bare target base and beyond chance.

    Agreement with a teacher that gave one answer to every sample is no sign that anything but that answer was learnt,
    and such an adapter does not pass, whatever the thresholds.
    """
    reasons = []
    agreement, gain = measured.agreement_student, measured.agreement_student - measured.agreement_base
    if measured.only_answer is not None:
        reasons.append(
            f"the teacher answers {measured.only_answer!r} to every sample, so agreement says nothing; "
            "ship seeds of every answer"
        )
    if agreement < config.min_agreement:
        reasons.append(f"agreement {agreement:.2f} < gate.min_agreement {config.min_agreement:.2f}")
        if measured.has_long_answers and measured.unit == "answers":
            reasons.append("long texts are seldom the same to the letter: set gate.long_answers to tokens")
    if gain < config.min_gain:
        reasons.append(f"gain over the target base {gain:+.2f} < gate.min_gain {config.min_gain:+.2f}")
    most = config.max_p_value if config.min_agreement > 0 else 1.0
    has_several, informed = measured.only_answer is None, measured.informedness
    least = config.min_informedness if has_several and config.min_agreement > 0 else -1.0
    shows_little = informed is not None and informed < least
    by_chance = has_several and measured.p_value is not None and measured.p_value > most
    if (shows_little or by_chance) and measured.commonest == 1:
        reasons.append("all held-out prompts have one answer, so agreement says nothing; ship seeds of every answer")
        shows_little = by_chance = False
    if shows_little:
        reasons.append(
            f"informedness {informed:.2f} < gate.min_informedness {least:.2f}: it gives too few of the teacher's rarer "
            "answers; ship seeds of every answer, raise num_samples, or set its screen to auto if it is discriminator"
        )
    if by_chance:
        why = (
            "its answers may well agree by chance, whatever the inputs; ship seeds of every answer"
            if measured.unit == "answers"
            else "it may do no better than the bare target base, or whatever the inputs; train it for longer"
        )
        reasons.append(f"p = {measured.p_value:.2g} > gate.max_p_value {most:g}: {why}, or raise gate.min_holdout")
    verdict = {"passed": not reasons, "reason": "; ".join(reasons), "min_agreement": config.min_agreement}
    verdict |= {"min_informedness": least if informed is not None and least > -1 else None}
    return measured.model_copy(update=verdict)
