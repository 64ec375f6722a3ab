"""Every arm's answers to the test items of one repetition, and what is recorded of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from translora.actors.calls import Row
from translora.actors.hosts import Hosts
from translora.bundle import BaseInfo, read_bundle
from translora.engine.loading import load_tokenizer
from translora.evaluate.config import REAL, REFERENCE_ARMS, SOURCE_ADAPTER, SOURCE_BASE, TARGET_BASE, EvaluateConfig
from translora.evaluate.data import Split
from translora.evaluate.items import ItemScores, TaskItems
from translora.evaluate.results import Migration
from translora.gate.questions import Answers, Logliks, answer_limit, answer_rows, run_answers, run_choices
from translora.gate.verdict import judge
from translora.report.table import note
from translora.run.check import context_of
from translora.run.files import digest, sha256_path, write_parquet
from translora.run.state import SYNTHETIC, AdapterState
from translora.synthesis.prompts import normalise
from translora.synthesis.quality import num_seen


@dataclass(frozen=True)
class Repetition:
    """What one seed came to."""

    seed: int
    splits: Mapping[str, Split]
    """By task."""
    states: Mapping[str, Sequence[AdapterState]]
    """What became of the migrations, by arm."""
    answers: Answers
    logliks: Logliks = field(default_factory=dict)
    auc: Mapping[str, float] = field(default_factory=dict)
    """Of the bundles' discriminators, by task, where they were measured."""

    @cached_property
    def scores(self) -> dict[tuple[str, str], list[float]]:
        """What each answer is worth, 1 is right; by task and arm."""
        found: dict[tuple[str, str], Sequence[Any]] = {**self.answers, **self.logliks}
        return {(task, arm): self.splits[task].score(own) for (task, arm), own in found.items()}

    def correct(self, task: str, arm: str) -> list[float] | None:
        """What each of the arm's answers is worth; None where it has no adapter."""
        return self.scores.get((task, arm))

    def text(self, task: str, arm: str) -> list[str | None]:
        """The arm's answers; of choices, the likeliest."""
        logliks, part = self.logliks.get((task, arm)), self.splits[task]
        if logliks is None or part.harness is None:
            return self.answers[task, arm]
        choices = map(part.harness.choices, part.documents)
        return [own[values.index(max(values))] for own, values in zip(choices, logliks, strict=True)]


def answer(
    config: EvaluateConfig,
    seed: int,
    splits: Mapping[str, Split],
    adapters: Mapping[str, Path],
    source: BaseInfo,
    target: BaseInfo,
) -> tuple[Answers, Logliks]:
    """Let every arm answer the test items, or rate their choices: an arm that comes later is the only one to answer.

    Args:
        adapters: PEFT directory on the target base by `arm/task`.
    """
    bundles = {task: read_bundle(config.bundle_dir(seed, task)) for task in splits}
    paths = {**{f"{SOURCE_ADAPTER}/{task}": bundle.path for task, bundle in bundles.items()}, **adapters}
    context = context_of(config.target, target)
    least = config.synthesis.max_answer_tokens
    tokenizers = load_tokenizer(config.source), load_tokenizer(config.target)
    limits = {
        task: answer_limit(least, *tokenizers, [row["target"] for row in part.test], context)
        for task, part in splits.items()
    }
    stops = {task.name: task.stop for task in config.tasks}
    answers: Answers = {}
    logliks: Logliks = {}
    with Hosts(config.resources, config.seed_dir(seed), config.synthesis.batch_size) as hosts:
        for arm in (SOURCE_BASE, SOURCE_ADAPTER, TARGET_BASE, REAL, *config.arms):
            on_source, is_bare = arm in (SOURCE_BASE, SOURCE_ADAPTER), arm in (SOURCE_BASE, TARGET_BASE)
            info, base = (source, config.source) if on_source else (target, config.target)
            slots = {task: None if is_bare else f"{arm}/{task}" for task in splits}
            slots = {task: slot for task, slot in slots.items() if slot is None or slot in paths}
            rows: list[Row] = []
            for task, slot in slots.items():
                template = bundles[task].manifest.prompt_template if on_source else "auto"
                stop = stops[task] if arm == SOURCE_ADAPTER else None
                rows += item_rows(task, arm, splits[task], slot, template, None if on_source else limits[task], stop)
            own = {slot: paths[slot] for slot in slots.values() if slot is not None}
            where: dict[str, Any] = {
                "base": base,
                "adapters": {slot: str(path) for slot, path in own.items()},
                "hosts": hosts,
                "weights": {slot: sha256_path(path) for slot, path in own.items()} | {"base": info.identity},
            }
            label = f"seed {seed}: test items, {arm}"
            if texts := [row for row in rows if "choices" not in row]:
                answers |= run_answers(label, texts, max_answer_tokens=least, **where)[0]
            if choices := [row for row in rows if "choices" in row]:
                logliks |= run_choices(label, choices, **where)
    return answers, logliks


def item_rows(
    task: str,
    arm: str,
    part: Split,
    slot: str | None,
    template: str,
    limit: int | None = None,
    stop: str | None = None,
) -> list[Row]:
    """One arm's rows of a task's test items: `gate_block`'s, or `choice_block`'s where a task offers choices."""
    if part.harness is None or not part.harness.is_choice:
        samples = [(row["input"], row["target"]) for row in part.test]
        rows = answer_rows(task, arm, samples, slot, template, limit=limit, stop=stop)
        # The harness ends every model's answer at the same texts, and scores what there is at the longest length.
        own = {} if part.harness is None else {"stop": part.harness.stop, "cut": True}
        return [row | own for row in rows]
    common = {"adapter": task, "arm": arm, "slot": slot, "template": template}
    return [
        {**common, "index": index, "input": row["input"], "choices": part.harness.choices(document)}
        for index, (row, document) in enumerate(zip(part.test, part.documents, strict=True))
    ]


def write_items(path: Path, repetition: Repetition) -> None:
    """Write every arm's answer to every test item: seed, task, arm, index, input, target, answer, correct (0 to 1)."""
    rows = []
    for (task, arm), correct in sorted(repetition.scores.items()):
        answers = repetition.text(task, arm)
        for index, (row, text, good) in enumerate(zip(repetition.splits[task].test, answers, correct, strict=True)):
            own = {"seed": repetition.seed, "task": task, "arm": arm, "index": index}
            rows.append({**own, **row, "answer": text, "correct": good})
    write_parquet(path, pa.Table.from_pylist(rows))


def task_items(config: EvaluateConfig, name: str, repetitions: Sequence[Repetition]) -> TaskItems:
    """One task's items over all seeds."""
    (task,) = [task for task in config.tasks if task.name == name]
    arms = (*REFERENCE_ARMS, *config.arms)
    seeds = [item_scores(name, arms, one) for one in sorted(repetitions, key=lambda one: one.seed)]
    harness = repetitions[0].splits[name].harness
    return TaskItems(name, task.num_train, task.num_test, seeds, harness.scored_by if harness else "")


def item_scores(name: str, arms: Sequence[str], repetition: Repetition) -> ItemScores:
    """One task's items in one repetition."""
    part = repetition.splits[name]
    found = {arm: repetition.correct(name, arm) for arm in arms}
    return ItemScores(
        task=name,
        seed=repetition.seed,
        data=digest(part.train, part.test),
        inputs=[digest(normalise(row["input"])) for row in part.test],
        commonest=is_commonest([row["target"] for row in part.test]),
        chance=part.chance(),
        auc=repetition.auc.get(name),
        correct={arm: good for arm, good in found.items() if good is not None},
    )


def is_commonest(targets: Sequence[str]) -> list[float]:
    """1 for each target that is the commonest one, the first of equals."""
    texts = [normalise(target) for target in targets]
    ((most, _),) = Counter(texts).most_common(1)
    return [float(text == most) for text in texts]


def inputs_trained_on(synthetic: Path) -> list[str]:
    """What a student was trained on; nothing where there is no synthetic set."""
    if not synthetic.is_file():
        return []
    rows = pq.read_table(synthetic, columns=["input", "split"]).to_pylist()
    return [row["input"] for row in rows if row["split"] == "train"]


def migrations(config: EvaluateConfig, repetition: Repetition) -> list[Migration]:
    """Every adapter of a repetition: the gate's verdict by the configured thresholds beside its real accuracy."""
    found = []
    for arm, states in repetition.states.items():
        fleet = config.fleet(repetition.seed, arm)
        for state in states:
            good, source = repetition.correct(state.name, arm), repetition.correct(state.name, SOURCE_ADAPTER) or []
            found.append(
                Migration(
                    task=state.name,
                    seed=repetition.seed,
                    arm=arm,
                    note=note(state),
                    synthesis=state.synthesis,
                    gate=judge(state.gate, fleet.gate) if state.gate else None,
                    accuracy=sum(good) / len(good) if good else None,
                    source_accuracy=sum(source) / len(source),
                    answers_per_sample=state.answers_per_sample,
                    num_seen=num_seen(
                        inputs_trained_on(fleet.run_dir / "adapters" / state.name / SYNTHETIC),
                        repetition.splits[state.name].test if fleet.distill.epochs > 0 else [],
                    ),
                )
            )
    return found
