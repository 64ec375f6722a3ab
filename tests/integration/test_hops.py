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
PROMPTS = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 6}
HOPS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("source", "target", PROMPTS),
    ("target", "third", {"peft_type": "LORA", "use_dora": True, "r": 4, "lora_alpha": 8, "target_modules": ["v_proj"]}),
    ("third", "source", None),
]


def test_an_adapter_goes_round_three_bases_and_changes_its_method_at_each(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    make_trained_base(tmp_path / "third", "llama", 3)
    prepare = world.prepare_config()
    world.run("prepare", world.write("prepare.yaml", prepare | {"tasks": prepare["tasks"][:1]}))
    bundle, before = "source-bundles/colour", ""
    for number, (source, target, method) in enumerate(HOPS):
        fleet = world.fleet_config(f"hop-{number}")
        fleet["source"], fleet["target"] = {"model": f"./{source}"}, {"model": f"./{target}"}
        fleet["adapters"] = [{"bundle": bundle, "num_samples": 12, "eval_data": "colour.test.jsonl"}]
        fleet["distill"] |= {"peft": method} | ({"learning_rate": 5e-2, "epochs": 16} if method is PROMPTS else {})
        world.run("migrate", world.write(f"hop-{number}.yaml", fleet))
        (state,) = load_states(tmp_path / fleet["run_dir"])
        assert state.status == "migrated" and state.gate is not None and state.accuracy is not None
        assert sum(state.losses[-4:]) < 0.9 * sum(state.losses[:4])
        bundle = f"{fleet['run_dir']}/{state.output}"
        moved, base = read_bundle(tmp_path / bundle), inspect_base(str(tmp_path / target))
        verify_bundle(moved, base)
        assert moved.manifest.discriminator and moved.manifest.provenance["migrated_from"] == source
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), moved.path)
        text = ModelCard.load(moved.path / "README.md").text
        assert f"`{source}` → `{target}`" in text and (not before or f"`{before}` → `{source}`" in text)
        before = source
