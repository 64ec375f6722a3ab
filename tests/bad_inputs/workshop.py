"""Materials for bad inputs: good bases, adapters and bundles, made once, to be spoiled in copies."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny import make_adapter, make_base, make_bundle
from translora.bundle import BaseInfo, inspect_base, read_bundle, verify_bundle
from translora.config import FleetConfig
from translora.errors import InputError
from translora.fleet import migrate
from translora.run.files import sha256_file
from translora.run.state import AdapterState

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MANIFEST = "translora/manifest.json"
SEEDS = "translora/seeds.jsonl"
JUDGE = "translora/discriminator"


def make_untied(directory: Path, base: Path) -> Path:
    """A copy of a base whose output head has weights of its own."""
    shutil.copytree(base, directory)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    model.save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Materials:
    """Good inputs below one directory; never changed."""

    root: Path
    base: BaseInfo

    @classmethod
    def make(cls, root: Path) -> Materials:
        """Write two bases of one shape, a deeper, a wider and one with a head of its own, and a bundle of each."""
        base = make_base(root / "old-base", seed=0)
        untied = make_untied(root / "untied" / "old-base", base)
        bases = {
            "good": base,
            "other": make_base(root / "new-base", "gemma3", seed=1),
            "retrained": make_base(root / "retrained" / "old-base", seed=2),
            "deeper": make_base(root / "deeper" / "old-base", seed=3, num_layers=3),
            "untied": untied,
            "wider": make_base(root / "wider" / "old-base", seed=4, hidden_size=64),
        }
        make_base(root / "sharded-base", seed=0, max_shard_size="40KB")
        for name, path in bases.items():
            make_bundle(root / "bundles" / name, path, seed=5)
        make_adapter(root / "bundles" / "pissa", base, init_lora_weights="pissa")
        return cls(root, inspect_base(str(base)))


@dataclass(frozen=True)
class Bench:
    """One case's own directory and the materials it copies from."""

    directory: Path
    materials: Materials

    def bundle(self, kind: str = "good") -> Path:
        """A fresh copy of a bundle."""
        path = self.directory / "orders"
        shutil.copytree(self.materials.root / "bundles" / kind, path)
        return path

    def base(self, kind: str = "old-base") -> Path:
        """A fresh copy of a base."""
        path = self.directory / kind
        shutil.copytree(self.materials.root / kind, path)
        return path

    def file(self, name: str, content: str | bytes) -> Path:
        """A file with this content."""
        path = self.directory / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def verify(self, bundle: Path) -> None:
        """What `migrate` does with a bundle before anything else."""
        verify_bundle(read_bundle(bundle), self.materials.base)

    def migrate(self, bundle: Path, entry: dict[str, Any] | None = None, **settings: Any) -> AdapterState:
        """What `migrate` does with one bundle of a fleet before Ray starts: the state of the quarantined adapter."""
        target = settings.pop("target", self.materials.root / "new-base")
        config = FleetConfig.model_validate(
            {
                "run_dir": self.directory / "run",
                "source": {"model": str(self.materials.base.path)},
                "target": {"model": str(target)},
                "adapters": [{"bundle": str(bundle), **(entry or {})}],
                **settings,
            }
        )
        (state,) = migrate(config, _no_cluster)
        return state


def _no_cluster() -> None:
    raise AssertionError("accepted: the fleet went on to start Ray")


@dataclass(frozen=True)
class Case:
    """One bad input: what is wrong, how to make and use it, and a part of the message that it must give."""

    what: str
    act: Callable[[Bench], object]
    expect: str

    @property
    def id(self) -> str:
        """A name for pytest."""
        return re.sub(r"[^a-z0-9]+", "-", self.what.lower()).strip("-")[:60]

    def message(self, directory: Path, materials: Materials) -> str:
        """The real message, on one line, without this machine's paths and without digits that chance decides."""
        bench = Bench(directory, materials)
        try:
            found = self.act(bench)
        except InputError as error:
            text = str(error)
        else:
            assert isinstance(found, AdapterState) and found.status == "quarantined", f"accepted: {self.what}"
            text = found.reason
        text = text.replace(f"{directory}/", "").replace(f"{materials.root}/", "").replace(str(directory), ".")
        text = re.sub(r"\b[0-9a-f]{12}\b", "<fingerprint>", text)
        assert text.replace("\n", "").isprintable(), repr(text)
        return re.sub(r"\s+", " ", text).strip()


def change_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    data = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def rehash(bundle: Path, **manifest: Any) -> None:
    """Make the manifest agree with the spoiled files again, as a bundle that was made wrong would."""
    files = {
        path.relative_to(bundle).as_posix(): sha256_file(path)
        for path in bundle.rglob("*")
        if path.is_file() and path.name not in {"README.md", "manifest.json"}
    }
    change_json(bundle / MANIFEST, files=files, **manifest)


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite a safetensors file after `change` edited its tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
