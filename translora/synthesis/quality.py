"""What makes a synthetic set good or bad besides the screen: copies, diversity, the classes of the answers."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations

from rapidfuzz import fuzz, process

from translora.synthesis.prompts import normalise

MOST_CLASSES = 20
"""More different answers than this are free text."""
PHRASE_WORDS, PHRASE_CHARACTERS = 5, 20
"""From so many words on, or characters where none are set apart, a seed in an input is the seed, no turn of phrase."""
_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"\w+|[^\w\s]")


def similarity(one: str, other: str) -> float:
    """Normalised edit similarity in 0..1 (RapidFuzz's ratio); 1 is equal."""
    return fuzz.ratio(one, other) / 100


def own_cutoff(cutoff: float, seeds: Sequence[str]) -> float:
    """The similarity from which on an input is a copy in this task.

    Where the task's own inputs resemble each other more than `cutoff` allows (all of one template), resembling them
    is no sign of a copy: it takes more than the most similar pair of seeds.
    """
    pairs = combinations({normalise(seed) for seed in seeds}, 2)
    most = max((similarity(one, other) for one, other in pairs), default=0.0)
    return max(cutoff, min(1.0, most + 1e-6))


def is_copy(text: str, known: Collection[str], cutoff: float) -> bool:
    """Whether a normalised text is as similar as `cutoff` to one that is known; equal ones always are.

    Args:
        text: normalised.
        known: normalised texts.
        cutoff: in 0..1; 1 finds equal texts only.
    """
    if cutoff >= 1:
        return text in known
    return process.extractOne(text, known, scorer=fuzz.ratio, score_cutoff=100 * cutoff) is not None


class SeedCopies:
    """Finds the inputs that would leak a seed: those as similar to one as `cutoff`, or that hold one word for word.

    A seed that resembles another seed more than that is of a template that the task's inputs share. It takes more than
    this resemblance then, and holding it is no sign (`not A` holds `A`); nor is it for a seed of a few words.

    Args:
        seeds: as the bundle has them.
        cutoff: in 0..1; 1 finds equal texts and those that hold a seed.
    """

    def __init__(self, seeds: Sequence[str], cutoff: float) -> None:
        texts = sorted({normalise(seed) for seed in seeds})
        self._cutoffs: dict[str, float] = {}
        self._phrases: list[str] = []
        for text in texts:
            own = max((own_cutoff(cutoff, (text, other)) for other in texts if other != text), default=cutoff)
            self._cutoffs[text] = own
            if own == cutoff and _is_phrase(text):
                self._phrases.append(text)

    def __contains__(self, text: str) -> bool:
        """Whether a normalised input repeats a seed."""
        similar = any(is_copy(text, (seed,), own) for seed, own in self._cutoffs.items())
        return similar or any(phrase in text for phrase in self._phrases)


def _is_phrase(text: str) -> bool:
    words = len(text.split())
    return words >= PHRASE_WORDS or (len(text) >= PHRASE_CHARACTERS and len(text) >= PHRASE_CHARACTERS * words)


class KnownInputs:
    """Normalised inputs, kept by the numbers in them: a text is compared with those of the same numbers alone."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._by_numbers: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Know one more."""
        self._alike(text).add(text)

    def __contains__(self, text: str) -> bool:
        return text in self._alike(text)

    def has_near(self, text: str, cutoff: float) -> bool:
        """As `is_copy`, but a text with other numbers is another input: in arithmetic tasks one digit is all."""
        return text in self or is_copy(text, self._alike(text), cutoff)

    def _alike(self, text: str) -> set[str]:
        return self._by_numbers[tuple(_NUMBER.findall(text))]


def distinct_ngrams(texts: Iterable[str], n: int) -> float:
    """distinct-n (arXiv 1510.03055): different word n-grams over all word n-grams; 0 where there is none."""
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = _WORD.findall(normalise(text))
        counts.update(zip(*(words[start:] for start in range(n)), strict=False))
    return len(counts) / total if (total := counts.total()) else 0.0


def num_seen(trained: Iterable[str], rows: Iterable[Mapping[str, str]]) -> int:
    """Rows of real data whose `input` is, word for word, one of those that were trained on."""
    known = set(map(normalise, trained))
    return sum(normalise(row["input"]) in known for row in rows)


def majority_share(targets: Sequence[str]) -> float:
    """Share of the commonest target: the most that one answer to every item can reach."""
    return Counter(map(normalise, targets)).most_common(1)[0][1] / len(targets)


def by_answer(answers: Sequence[str]) -> dict[str, list[int]]:
    """Places of each answer, normalised, in their order; of all that came once together, under the empty string."""
    keys = [normalise(answer) for answer in answers]
    counts = Counter(keys)
    found: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        found.setdefault(key if counts[key] > 1 else "", []).append(place)
    return found


def deal(counts: Mapping[str, int], total: int) -> dict[str, int]:
    """Deal a smaller total out in the same shares, by largest remainders; the first of equal ones is served first.

    Args:
        counts: by key.
        total: at most their sum.
    """
    whole = sum(counts.values())
    found = {key: count * total // whole for key, count in counts.items()}
    by_remainder = sorted(counts, key=lambda key: -(counts[key] * total % whole))
    for key in by_remainder[: total - sum(found.values())]:
        found[key] += 1
    return found


def deal_evenly(counts: Mapping[str, int], total: int) -> dict[str, int]:
    """Deal a smaller total out as evenly as the counts let; what a small one lacks goes to the greater ones.

    Args:
        counts: by key.
        total: at most their sum.
    """
    found: dict[str, int] = {}
    for place, key in enumerate(sorted(counts, key=counts.__getitem__)):
        found[key] = min(counts[key], (total - sum(found.values())) // (len(counts) - place))
    return found


def answer_classes(answers: Sequence[str]) -> dict[str, int]:
    """The answers by frequency, as the first one spells them; empty where they are free text.

    Free text: more than MOST_CLASSES different answers, or nearly every answer another.
    """
    spelling: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for answer in answers:
        key = normalise(answer)
        spelling.setdefault(key, answer)
        counts[key] += 1
    if len(counts) > MOST_CLASSES or len(counts) > max(1, len(answers) // 2):
        return {}
    return {spelling[key]: count for key, count in counts.most_common()}
