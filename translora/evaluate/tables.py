"""The tables of an evaluation: task by task, the arms side by side, remarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import fmean

from translora.evaluate.cells import MISSING, counted_noun, points, ratio, table
from translora.evaluate.config import REAL, REFERENCE_ARMS, SOURCE_ADAPTER, TARGET_BASE
from translora.evaluate.items import TaskResult
from translora.evaluate.results import ArmResult, Migration, Results, Setup, items_by_task, mean_over
from translora.report.markdown import escape
from translora.run.state import BY_DISCRIMINATOR

ARM_WORDS = {
    "source_base": "source base",
    SOURCE_ADAPTER: "source adapter",
    TARGET_BASE: "target base",
    REAL: "real-data adapter on the target",
}


UNDEFINED = (
    "ρ is left undefined where the real-data adapter does not beat the target base (or the majority class) beyond its "
    "interval: there is no gain of which a share could be kept."
)


def accuracies(setup: Setup, tasks: Sequence[TaskResult]) -> list[str]:
    """Accuracy of every arm on each task, beside chance and the majority class."""
    arms = [*REFERENCE_ARMS, *setup.arms]
    headers = ["accuracy", "chance", "majority", *(ARM_WORDS.get(arm, arm) for arm in arms)]
    rows = [
        [task.name, f"{100 * task.chance:.1f}", f"{100 * task.majority:.1f}"]
        + [points(task.accuracy.get(arm)) for arm in arms]
        for task in tasks
    ]
    return table(headers, rows)


def retentions(setup: Setup, tasks: Sequence[TaskResult]) -> list[str]:
    """ρ of every arm on each task, and above the majority class."""
    arms = [SOURCE_ADAPTER, *setup.arms]
    headers = ["retention ρ", "gain of the real-data adapter", ARM_WORDS[SOURCE_ADAPTER], *setup.arms]
    rows = []
    for task in tasks:
        for word, kept in (("", task.retention), (", above the majority class", task.skill)):
            gain = MISSING if word else points(task.gain, signed=True)
            rows.append([task.name + word, gain, *(ratio(kept[arm], "undefined") for arm in arms)])
    lines = table(headers, rows)
    undefined = any(None in (*task.retention.values(), *task.skill.values()) for task in tasks)
    return [*lines, "", UNDEFINED] if undefined else lines


def arms_side_by_side(results: Results) -> list[str]:
    """Settings, counts and means of each arm, and what it has more than the first one."""
    first = next(iter(results.arms))
    headers = [
        "arm",
        "settings",
        "measured",
        "accepted of generated",
        "agreement",
        "passes the gate",
        "accuracy",
        "retention ρ",
        f"accuracy − {first}",
    ]
    rows = []
    for arm, found in results.arms.items():
        own = [one for one in results.migrations if one.arm == arm]
        rows.append([f"`{arm}`", _settings(results.setup.arms[arm]), *_migration_cells(own), *_arm_cells(found)])
    return [
        "Every arm migrates the same bundles. Counts and agreement are of all adapters (tasks × seeds), accuracy and "
        "retention of the tasks that count; the last column is paired by test item"
        + (f", each of its {len(rows) - 1} intervals by itself." if len(rows) > 2 else "."),
        "",
        *table(headers, rows, num_text=2),
        *differences(results),
        *_soft_labels(results),
        *_seen(results),
    ]


def differences(results: Results) -> list[str]:
    """What each arm has more than each of the others but the first, paired by test item."""
    _, *arms = results.arms
    if len(arms) < 2 or not results.items:
        return []
    counted = items_by_task([task for task in results.tasks if task.counted], results.items)
    rows = [
        [
            arm,
            *(
                points(mean_over(counted, arm, other) if place < row else None, signed=True)
                for place, other in enumerate(arms[:-1])
            ),
        ]
        for row, arm in enumerate(arms)
    ]
    return ["", "The same between the other arms, row minus column:", "", *table(["accuracy", *arms[:-1]], rows[1:])]


def samples(results: Results) -> list[str]:
    """What the arms were trained on, where they chose it differently; nothing where all had the same."""
    if not any({"synthesis", "num_samples"} & set(own) for own in results.setup.arms.values()):
        return []
    asked = any(one.synthesis.screen in BY_DISCRIMINATOR for one in results.migrations)
    is_measured = asked and any(one.auc is not None for one in results.items)
    rows = []
    for task in results.tasks:
        measured = [one.auc for one in results.items if one.task == task.name and one.auc is not None]
        auc = [f"{sum(measured) / len(measured):.2f}" if measured else MISSING] if is_measured else []
        own = [[one for one in results.migrations if (one.task, one.arm) == (task.name, arm)] for arm in results.arms]
        rows.append([task.name, *auc, *map(_sample_cell, own)])
    text = (
        "Which share of the invented inputs was accepted, neither dropped as a copy or unanswered nor refused by the "
        "screen; how many times as many these are as samples are needed (the answers as evenly as there are samples of "
        "them, and of an answer the best, are chosen from these); which share of the samples chosen has the commonest "
        "answer, where answers are few; and which share of all pairs of neighbouring words in them is of different "
        "ones (distinct-2), both of the sets that a student was trained on; means over seeds. One answer that has most "
        "of the samples leaves little to learn the others from."
    )
    if is_measured:
        text += (
            " The AUC is of real and invented inputs that the owner's discriminator was not trained on: 0.5 is chance."
        )
    headers = [
        "accepted of generated; times the need; commonest answer; distinct-2",
        *(["AUC of the discriminator"] if is_measured else []),
    ]
    return [text, "", *table([*headers, *results.setup.arms], rows)]


def _sample_cell(migrations: Sequence[Migration]) -> str:
    found = [one.synthesis for one in migrations if one.synthesis.generated]
    if not found:
        return MISSING
    cell = f"{100 * sum(one.acceptance for one in found) / len(found):.0f} %"
    if all(one.needed for one in found):
        cell += f"; {sum(one.accepted / one.needed for one in found) / len(found):.1f}"
    trained = [one for one in found if one.num_train] or found  # which results of an older version do not say
    few = [max(one.classes.values()) / sum(one.classes.values()) for one in trained if one.classes]
    if len(few) == len(trained):
        cell += f"; {100 * fmean(few):.0f} %"
    pairs = [one.distinct["distinct-2"] for one in trained if "distinct-2" in one.distinct]
    return f"{cell}; {fmean(pairs):.2f}" if pairs else cell


def _seen(results: Results) -> list[str]:
    """Test items that were invented, too: what an arm has right of these may be by heart."""
    sizes = {task.name: task.num_test for task in results.tasks}
    found = [
        f"{one.num_seen} of {sizes[one.task]} of {one.task} (seed {one.seed}, {one.arm})"
        for one in results.migrations
        if one.num_seen
    ]
    return (
        ["", f"Test items whose input was invented word for word, and trained on: {'; '.join(found)}."] if found else []
    )


def _soft_labels(results: Results) -> list[str]:
    """How many answers a sample the students of each arm learnt, where they learnt more than the teacher's own."""
    found = []
    for arm in results.arms:
        own = [one.answers_per_sample for one in results.migrations if one.arm == arm]
        soft = [count for count in own if count is not None]
        if soft:
            found.append(f"{fmean(soft):.1f} by {len(soft)} of {counted_noun(len(own), 'student')} ({arm})")
    return ["", f"Answers a sample that were learnt as soft labels, in the mean: {'; '.join(found)}."] if found else []


def _settings(overrides: dict[str, object]) -> str:
    return f"`{json.dumps(overrides)}`" if overrides else "as configured"


def _migration_cells(migrations: Sequence[Migration]) -> list[str]:
    accepted = sum(one.synthesis.accepted for one in migrations)
    generated = sum(one.synthesis.generated for one in migrations)
    gates = [one.gate for one in migrations if one.gate is not None]
    agreement = f"{100 * sum(gate.agreement_student for gate in gates) / len(gates):.1f}" if gates else MISSING
    return [
        f"{sum(one.accuracy is not None for one in migrations)} of {len(migrations)}",
        f"{accepted}/{generated} ({100 * accepted / generated:.0f} %)" if generated else MISSING,
        agreement,
        f"{sum(gate.passed for gate in gates)} of {len(gates)}",
    ]


def _arm_cells(found: ArmResult) -> list[str]:
    return [points(found.accuracy), ratio(found.retention), points(found.against_first, signed=True)]


def remarks(migrations: Sequence[Migration]) -> list[str]:
    """What there is to say of single adapters."""
    rows = [
        [one.task, str(one.seed), one.arm, "yes" if one.accuracy is not None else MISSING, escape(one.note)]
        for one in migrations
    ]
    return table(["task", "seed", "arm", "measured", "remark"], rows, num_text=5)
