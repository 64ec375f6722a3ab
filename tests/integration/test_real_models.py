"""The two real bases and the bundles in examples/: loading, the adapter's answers, generation."""

import random
from pathlib import Path

import pytest
import yaml

from examples.bases import default_cache, ensure_base
from examples.tasks import generate
from translora.bundle import inspect_base, read_bundle, verify_bundle
from translora.config import BaseModelConfig, SamplingConfig
from translora.engine.decode import Request
from translora.engine.prompts import prompt_format, raw_prompt
from translora.engine.transformers import TransformersEngine
from translora.synthesis.prompts import generation_prompt, generation_stop, normalise

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BUNDLES = EXAMPLES / "bundles"
# One bundle for each task that the owner's example prepares, and no other.
SHIPPED = [task["name"] for task in yaml.safe_load((EXAMPLES / "prepare.yaml").read_text(encoding="utf-8"))["tasks"]]
NUM_ITEMS = 12
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def smollm2() -> str:
    return str(ensure_base("smollm2", default_cache()))


@pytest.fixture(scope="module")
def gemma3() -> str:
    return str(ensure_base("gemma3", default_cache()))


def test_the_shipped_bundles_belong_to_the_converted_base(smollm2: str) -> None:
    base = inspect_base(smollm2)
    assert sorted(path.name for path in BUNDLES.iterdir()) == sorted(SHIPPED)
    for task in SHIPPED:
        bundle = read_bundle(BUNDLES / task)
        verify_bundle(bundle, base)
        assert len(bundle.seeds) == 5 and bundle.manifest.discriminator


def test_the_shipped_adapters_know_their_task_and_the_base_does_not(smollm2: str) -> None:
    engine = TransformersEngine(
        BaseModelConfig(model=smollm2), {task: str(BUNDLES / task) for task in SHIPPED}, num_threads=2
    )
    rows = [(task, row) for task in SHIPPED for row in generate(task, NUM_ITEMS, seed=99)]
    prompts = prompt_format(engine.tokenizer)
    right = {}
    for arm in ("adapter", "base"):
        requests = [Request(prompts.render(row["input"]), task if arm == "adapter" else None, 16) for task, row in rows]
        answers = engine.generate(requests)
        right[arm] = [normalise(a.text) == normalise(row["target"]) for a, (_, row) in zip(answers, rows, strict=True)]
    assert sum(right["adapter"]) >= 0.75 * len(rows)
    assert sum(right["base"]) <= 0.1 * len(rows)


def test_the_target_base_invents_new_inputs_of_the_task(gemma3: str) -> None:
    engine = TransformersEngine(BaseModelConfig(model=gemma3), {}, num_threads=2)
    seeds = read_bundle(BUNDLES / "name-badge").seeds
    requests = [
        Request(
            raw_prompt(engine.tokenizer, generation_prompt(seeds, seed, seed)), None, 48, generation_stop(seeds), seed
        )
        for seed in random.Random(0).sample(range(1000), 6)
    ]
    texts = [
        completion.text.strip() for completion in engine.generate(requests, SamplingConfig()) if completion.finished
    ]
    assert len({normalise(text) for text in texts} - {normalise(seed) for seed in seeds}) >= 4
