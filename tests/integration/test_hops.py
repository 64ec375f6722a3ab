"""A -> B -> C -> A, each hop with another PEFT method: every migrated bundle is the source of the next hop."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.integration.world import make_trained_base, make_world
from translora.bundle import inspect_base, read_bundle, verify_bundle
from translora.run.state import load_states

pytestmark = pytest.mark.timeout(900)
DORA = {"peft_type": "LORA", "use_dora": True, "r": 4, "lora_alpha": 8, "target_modules": ["v_proj"]}
HOPS: list[tuple[str, str, dict[str, Any]]] = [
    ("source", "target", {"peft": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 6}, "learning_rate": 5e-2}),
    ("target", "third", {"peft": DORA}),
    ("third", "source", {}),
]


def test_an_adapter_goes_round_three_bases_and_changes_its_method_at_each(tmp_path: Path) -> None:
    world, root = make_world(tmp_path), tmp_path
    make_trained_base(root / "third", "llama", 3)
    prepare = world.prepare_config()
    world.run("prepare", world.write("prepare.yaml", prepare | {"tasks": prepare["tasks"][:1]}))
    bundles, before = "source-bundles", ""
    for number, (source, target, distill) in enumerate(HOPS):
        config = world.fleet_config(f"hop-{number}")
        config |= {"source": {"model": f"./{source}"}, "target": {"model": f"./{target}"}}
        config["adapters"] = [{"bundle": f"{bundles}/colour", "num_samples": 24}]
        config["distill"] |= {"epochs": 16} | distill
        world.run("migrate", world.write(f"hop-{number}.yaml", config))
        for state in load_states(root / config["run_dir"]):
            assert state.status == "migrated" and state.gate is not None
            assert sum(state.losses[-3:]) < sum(state.losses[:3])
            moved, base = read_bundle(root / config["run_dir"] / state.output), inspect_base(str(root / target))
            verify_bundle(moved, base)
            assert moved.manifest.discriminator and moved.manifest.provenance["migrated_from"] == source
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), moved.path)
            text = ModelCard.load(moved.path / "README.md").text
            assert f"`{source}` → `{target}`" in text and (not before or f"`{before}` → `{source}`" in text)
        bundles, before = f"{config['run_dir']}/bundles", source
