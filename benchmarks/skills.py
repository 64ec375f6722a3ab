"""Skills to be merged, and test sets that need two of them, for benchmarks.merging and benchmarks.composition.

routing  the bundle examples/bundles/ticket-routing: a customer's message -> one of four teams
mood     the bundle examples/bundles/review-weather: a guest's review -> sunny, stormy or cloudy
tag      trained here: "Answer as a tag: QUESTION" -> "<<ANSWER>>", on questions about facts

"tagged routing" is "Answer as a tag: Route this ticket: ..." -> "<<TEAM>>"; no adapter has seen one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.facts import facts
from examples.tasks import NUM_TEST, NUM_TRAIN, generate, split
from translora.bundle import read_bundle
from translora.config import BaseModelConfig, SamplingConfig
from translora.distill.data import batch_indices, encode_samples, num_steps
from translora.engine.decode import Request
from translora.engine.prompts import prompt_format, raw_prompt
from translora.engine.transformers import TransformersEngine
from translora.evaluate.statistics import Estimate, Resample, all_different
from translora.gate.verdict import is_equal
from translora.merge.data import pad_batch
from translora.run.files import replace_directory, write_jsonl
from translora.synthesis.prompts import generation_row

TASKS = {"routing": "ticket-routing", "mood": "review-weather"}
"""Skills that are bundles, and their names in examples/bundles."""
TAG = "Answer as a tag: "
NUM_ROWS = 394
"""All tickets that the task's word lists give."""
Rows = list[dict[str, str]]


def bundle(skill: str) -> Path:
    """The bundle of a skill."""
    return Path(__file__).parents[1] / "examples" / "bundles" / TASKS[skill]


def train_rows(skill: str) -> Rows:
    """What a skill was trained on."""
    return facts("train") if skill == "tag" else split(TASKS[skill], NUM_TRAIN, NUM_TEST, seed=0)[0]


def tests(size: int, skills: Sequence[str]) -> dict[str, Rows]:
    """Test rows of each skill, of the tag, and of each skill tagged; none is one that an adapter was trained on.

    Raises:
        SystemExit: there are not as many.
    """
    single, tagged = {}, {}
    for skill in skills:
        known = {row["input"] for row in train_rows(skill)}
        rows = [row for row in generate(TASKS[skill], NUM_ROWS, seed=0) if row["input"] not in known][:size]
        if len(rows) < size:
            raise SystemExit(f"--tests {size}: there are {len(rows)} of {skill}; ask for fewer")
        single[skill] = rows
        tagged[f"tagged {skill}"] = [{"input": TAG + row["input"], "target": f"<<{row['target']}>>"} for row in rows]
    return {**single, "tag": facts("test")[:size], **tagged}


def train_tag(base: Path, out: Path, epochs: float) -> None:
    """The second skill: a LoRA like the bundle's, by a plain loop."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    prompts = prompt_format(AutoTokenizer.from_pretrained(base))
    rows = [{"input": row["input"], "answer": row["target"]} for row in facts("train")]
    samples = encode_samples(rows, prompts, 160, "tag")
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    steps = num_steps(len(samples), epochs, 8)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        batch = pad_batch([samples[index] for index in batch_indices(len(samples), 8, step, 0)], 0, with_labels=True)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        print(f"tag: step {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    with replace_directory(out) as directory:
        model.save_pretrained(directory)


def complete(engine: TransformersEngine, slot: str | None, texts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy answers of one adapter."""
    prompts = prompt_format(engine.tokenizer)
    found = []
    for start in range(0, len(texts), 32):
        requests = [Request(prompts.render(text), slot, max_new_tokens) for text in texts[start : start + 32]]
        found += [one.text.strip() for one in engine.generate(requests)]
    return found


def score(engine: TransformersEngine, rows: Rows) -> list[bool]:
    """Which rows the adapter "it" answers right."""
    answers = complete(engine, "it", [row["input"] for row in rows], 16)
    return [is_equal(answer, row["target"]) for answer, row in zip(answers, rows, strict=True)]


def accuracy(correct: Sequence[bool], name: str) -> Estimate:
    """With a bootstrap interval over the rows."""
    return Resample(all_different(1, len(correct)), name, over_seeds=False).estimate(np.array([correct], dtype=float))


def seeds(skill: str) -> list[str]:
    """Five inputs, as its owner would leave them."""
    return [row["input"] for row in facts("train")[:5]] if skill == "tag" else list(read_bundle(bundle(skill)).seeds)


def synthesise(base: Path, adapters: Mapping[str, Path], num: int, work: Path) -> None:
    """Inputs that the base invents from five seeds, answered by each skill's own adapter: no real data at all."""
    engine = TransformersEngine(BaseModelConfig(model=str(base)), adapters)
    for skill in adapters:
        known, texts = seeds(skill), list[str]()
        for start in range(0, 8 * num, 24):
            rows = [generation_row(skill, known, index, 0, index % 5) for index in range(start, start + 24)]
            requests = [
                Request(raw_prompt(engine.tokenizer, row["prompt"]), None, 48, row["stop"], row["seed"]) for row in rows
            ]
            for one in engine.generate(requests, SamplingConfig(max_new_tokens=48)):
                text = one.text.strip()
                if one.finished and text and text not in texts and text not in known:
                    texts.append(text)
            if len(texts) >= num + num // 8:  # an answer may be empty
                break
        answers = complete(engine, skill, texts, 16)
        pairs = [{"input": text, "answer": answer} for text, answer in zip(texts, answers, strict=True) if answer]
        if len(pairs) < num:
            raise SystemExit(f"{skill}: {len(pairs)} of {num} synthetic samples; ask for fewer --samples")
        write_jsonl(work / f"{skill}.synthetic.jsonl", pairs[:num])


def once(path: Path, work: Callable[[], object]) -> None:
    """Do the work unless its result is there."""
    if not path.exists():
        print(f"{path.name} ...", flush=True)
        work()


def cell(estimate: Estimate, sign: str = "") -> str:
    """Percent with its interval."""
    return f"{100 * estimate.value:{sign}.0f} ({100 * estimate.low:{sign}.0f} to {100 * estimate.high:{sign}.0f})"
