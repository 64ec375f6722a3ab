"""A -> B -> C -> A, each hop with another PEFT method: every migrated bundle is the source of the next hop.

The first hop is screened by the owner's discriminator and leaves one for the next; where nothing is screened, none.
"""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.integration.world import make_trained_base, make_world
from translora.bundle import inspect_base, read_bundle, verify_bundle
from translora.run.state import load_states

pytestmark = pytest.mark.timeout(1500)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj"]
DORA = {"peft_type": "LORA", "use_dora": True, "r": 8, "lora_alpha": 16, "target_modules": LINEARS}
PROMPTS = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 6}
HOPS: list[tuple[str, str, dict[str, Any]]] = [
    ("source", "target", {"peft": DORA}),
    ("target", "third", {}),
    ("third", "source", {"peft": PROMPTS, "learning_rate": 5e-2}),
]


def test_an_adapter_goes_round_three_bases_and_changes_its_method_at_each(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    make_trained_base(tmp_path / "third", "llama", 3)
    prepare = world.prepare_config()
    prepare |= {"tasks": prepare["tasks"][:1], "source": {"model": "./source", "dtype": "float32"}}
    prepare["train"] |= {"dtype": "float32", "num_workers": 1, "micro_batch_size": 8}
    world.run("prepare", world.write("prepare.yaml", prepare))
    bundles, before = "source-bundles", ""
    for number, (source, target, distill) in enumerate(HOPS):
        config = world.fleet_config(f"hop-{number}")
        for side, base in (("source", source), ("target", target)):
            config[side] = {"model": f"./{base}", "dtype": "float32"}
        config["adapters"] = [
            {"bundle": f"{bundles}/colour", "num_samples": 24, "screen": "none" if number else "auto"}
        ]
        config["distill"] |= {"epochs": 16, "dtype": "float32", "num_workers": 1, "micro_batch_size": 8} | distill
        world.run("migrate", world.write(f"hop-{number}.yaml", config))
        (state,) = load_states(tmp_path / config["run_dir"])
        assert state.status == "migrated" and sum(state.losses[-3:]) < sum(state.losses[:3])
        moved, info = read_bundle(tmp_path / config["run_dir"] / state.output), inspect_base(str(tmp_path / target))
        verify_bundle(moved, info)
        assert moved.manifest.discriminator == (state.synthesis.screen == "realness") == (number == 0)
        assert moved.manifest.provenance["migrated_from"] == source
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(info.path), moved.path)
        text = ModelCard.load(moved.path / "README.md").text
        assert f"`{source}` → `{target}`" in text and (not before or f"`{before}` → `{source}`" in text)
        bundles, before = f"{config['run_dir']}/bundles", source
