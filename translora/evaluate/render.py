"""results.json as Markdown: every number of it comes from there, and the same results make the same text."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from translora.config import GateConfig
from translora.errors import InputError
from translora.evaluate.calibration import calibration_page
from translora.evaluate.cells import MISSING, counted_noun, points, ratio, table
from translora.evaluate.config import REAL, REFERENCE_ARMS, SOURCE_ADAPTER, TARGET_BASE
from translora.evaluate.items import TaskResult
from translora.evaluate.plot import draw_calibration
from translora.evaluate.results import DECIDING_VERSIONS, SCHEMAS, BaseSize, Results, Setup
from translora.evaluate.tables import ARM_WORDS, UNDEFINED, accuracies, arms_side_by_side, remarks, retentions, samples
from translora.run.files import write_bytes, write_json


def write_results(results: Results, output: Path) -> None:
    """Write the JSON, the plot and the Markdown; the Markdown last, so that it never speaks of what is not there."""
    write_json(output.with_suffix(".json"), results.model_dump(mode="json"))
    write_report(results, output)


def write_report(results: Results, output: Path) -> None:
    """Write the plot and the Markdown."""
    write_bytes(output.with_suffix(".svg"), draw_calibration(results).encode())
    write_bytes(output, to_markdown(results, output.stem).encode())


def read_results(output: Path) -> Results:
    """The results that an earlier evaluation wrote beside the Markdown.

    Raises:
        InputError: there are none, or they are damaged or of another version.
    """
    path = output.with_suffix(".json")
    try:
        text = path.read_bytes()
        return Results.model_validate_json(text)
    except (OSError, ValidationError) as error:
        fault = error.strerror if isinstance(error, OSError) else _damage(text)
        raise InputError(f"{path}: cannot be read ({fault}); run the evaluation again") from error


def _damage(text: bytes) -> str:
    """Why results cannot be read."""
    with contextlib.suppress(ValueError, AttributeError):
        version = json.loads(text).get("schema_version")
        if isinstance(version, int) and version not in SCHEMAS:
            known = " and ".join(map(str, SCHEMAS))
            return f"written by another version of translora: schema {version}, and this one reads {known}"
    return "damaged"


def to_markdown(results: Results, name: str) -> str:
    """The whole page; `name` is that of the files beside it, without its end."""
    setup = results.setup
    counted = [task for task in results.tasks if task.counted]
    apart = [task for task in results.tasks if not task.counted]
    lines = ["# What a migration keeps", "", *_setup(results, f"{name}.json"), "", "## Headline", ""]
    lines += _headline(results, len(counted))
    if counted:
        lines += ["", "## Task by task", "", *accuracies(setup, counted), "", *retentions(setup, counted)]
    if apart:
        lines += [
            "",
            "## Tasks listed apart",
            "",
            "Here the source adapter does not beat the majority class beyond its interval: there is no skill whose "
            "survival could be measured, and none of these tasks is part of the headline.",
            "",
            *accuracies(setup, apart),
            "",
            *retentions(setup, apart),
        ]
    lines += ["", "## The arms side by side", "", *arms_side_by_side(results)]
    if what := samples(results):
        lines += ["", "## What they were trained on", "", *what]
    lines += ["", "## What the gate's agreement says about real accuracy", ""]
    lines += calibration_page(results.calibration, GateConfig(**setup.gate), f"{name}.svg")
    if noted := [one for one in results.migrations if one.note]:
        lines += ["", "## Remarks on single adapters", "", *remarks(noted)]
    return "\n".join(lines) + "\n"


def _setup(results: Results, json_name: str) -> list[str]:
    setup, tasks = results.setup, results.tasks
    sizes = sorted({(task.num_train, task.num_test) for task in tasks})
    rows = "; ".join(f"{num_train} training rows and {num_test} test items" for num_train, num_test in sizes)
    seeds = ", ".join(map(str, setup.seeds))
    unless = " unless an arm says otherwise" if any("num_samples" in arm for arm in setup.arms.values()) else ""
    return [
        f"**{_base(setup.source)} → {_base(setup.target)}, {counted_noun(len(tasks), 'task')}, "
        f"{counted_noun(len(setup.seeds), 'seed')} ({seeds}), \\|D_syn\\| = {setup.num_samples}{unless}.** "
        f"Per task and seed: {rows}, no input in both, and a source adapter, seed examples and migrations of its own.",
        "",
        f"Accuracy is exact match, case and white space aside, in percent{_harness(tasks)}; a bare base is cut at its "
        f"first line. In brackets are 95 % bootstrap intervals ({setup.num_replicates} replicates), the same items for "
        f"all arms: {_drawn(len(setup.seeds))} Retention ρ = (migrated − target base) / (real-data "
        "adapter on the target − target base): 0 is the bare target base, 1 is as good as training on the real data, "
        "and the source adapter's own ρ is that of a perfect copy: what is missing from 1 there is the teacher's, not"
        " the migration's. Where the bare base does not know the form of the answers, an adapter that learnt the form"
        " alone is above 0; *ρ above the majority class* therefore has the accuracy of one answer to everything in "
        "the target base's place, where that is greater. An arm that answers all items alike right or wrong has an "
        "interval of "
        "width zero, which is the bootstrap's limit, not certainty.",
        "",
        f"Source adapter and real-data adapter: {_training(setup.train)}{_given(setup)}. "
        f"Students: {_training(setup.distill)}{_loss(setup)}{_synthesis(results)}. "
        f"Written by `translora evaluate` from [`{json_name}`]({json_name}); "
        + ", ".join(f"{name} {version}" for name, version in setup.versions.items() if name in DECIDING_VERSIONS)
        + ".",
    ]


def _drawn(num_seeds: int) -> str:
    """What the bootstrap draws, and what is therefore not in its intervals."""
    if num_seeds == 1:
        return (
            "over the test items alone. Everything was trained once, and how far another seed would be away is not in "
            "them."
        )
    return (
        "of accuracies over the test items, of retention and differences over seeds and the items within; with few "
        "seeds that differ they are somewhat too narrow."
    )


def _harness(tasks: Sequence[TaskResult]) -> str:
    """Which tasks lm-evaluation-harness scored."""
    scored = [f"{task.name} ({task.metric})" for task in tasks if task.metric]
    return f", but for what lm-evaluation-harness scored: {', '.join(scored)}" if scored else ""


def _base(base: BaseSize) -> str:
    dtype = f", {base.dtype}" if base.dtype else ""
    return f"{base.name} ({base.num_parameters / 1e6:,.{1 if base.num_parameters < 1e7 else 0}f} M parameters{dtype})"


def _training(settings: dict[str, object]) -> str:
    if settings.get("peft"):
        peft = settings["peft"]
        assert isinstance(peft, dict)
        student = ", ".join(f"{key} {value}" for key, value in peft.items())
    else:
        lora = settings["lora"]
        assert isinstance(lora, dict)
        targets = lora["target_modules"]
        student = f"rank {lora['rank']} on {targets if isinstance(targets, str) else ', '.join(targets)}"
    return (
        f"{student}, {settings['epochs']:g} epochs, "
        f"learning rate {settings['learning_rate']:g}, batch {settings['batch_size']}"
    )


def _loss(setup: Setup) -> str:
    """Whether students learn more of their teachers than the answers."""
    words = {"auto": "soft labels where answers are few", "kl": "the teachers' probabilities token by token"}
    found = words.get(str(setup.distill.get("loss")), "")
    own = any("loss" in arm.get("distill", {}) for arm in setup.arms.values())
    return f", {found}{', but for arms with another loss' if own else ''}" if found else ""


def _given(setup: Setup) -> str:
    """The tasks whose source adapter is their owner's."""
    return f", but for the source adapters of {', '.join(setup.adapters)}, which were given" if setup.adapters else ""


def _synthesis(results: Results) -> str:
    """How the arms' inputs were chosen, where they do not say otherwise."""
    setup = results.setup
    plain = [arm for arm, own in setup.arms.items() if "screen" not in own.get("synthesis", {})]
    chosen = " and ".join(sorted({one.synthesis.screen for one in results.migrations if one.arm in plain} - {""}))
    if not setup.synthesis:  # of an older version
        return f"; inputs screened by {chosen}" if chosen else ""
    screen = setup.synthesis["screen"]
    if screen == "auto" and chosen:
        screen = f"auto, which chose {chosen},"
    temperature = setup.synthesis["sampling"]["temperature"]
    return f"; inputs sampled at temperature {temperature:g} and screened by {screen} unless an arm says otherwise"


def _headline(results: Results, num_counted: int) -> list[str]:
    of_tasks = f"{num_counted} of {counted_noun(len(results.tasks), 'task')} count"
    if num_counted == 0:
        return [f"{of_tasks}: no source adapter beats the majority class beyond its interval."]
    rows = []
    for arm in REFERENCE_ARMS:
        fixed = {
            SOURCE_ADAPTER: [ratio(results.copy_retention), ratio(results.copy_skill)],
            TARGET_BASE: ["0, by definition", MISSING],
            REAL: ["1, by definition"] * 2,
        }
        rho = fixed.get(arm, [MISSING] * 2)
        rows.append([ARM_WORDS[arm], points(results.references[arm]), *rho, MISSING])
    for arm, found in results.arms.items():
        rows.append(
            [
                f"migrated: {arm}",
                points(found.accuracy),
                ratio(found.retention),
                ratio(found.skill),
                f"{found.num_not_below_source} of {num_counted}",
            ]
        )
    headers = [
        "",
        "mean accuracy",
        "mean retention ρ",
        "ρ above the majority class",
        "tasks ≥ source adapter",
    ]
    lines = [
        f"{of_tasks}: their source adapter beats the majority class beyond its interval. Means are over these tasks.",
        "",
        *table(headers, rows),
    ]
    first, found = next(iter(results.arms.items()))
    with_rho = found.num_defined
    with_skill = sum(task.skill[first] is not None for task in results.tasks if task.counted)
    if with_rho < num_counted or with_skill < num_counted:
        lines += [
            "",
            f"{UNDEFINED} The mean is of {counted_noun(with_rho, 'task')}, above the majority class of {with_skill}.",
        ]
    counted = {task.name for task in results.tasks if task.counted}
    lost = Counter(one.arm for one in results.migrations if one.accuracy is None and one.task in counted)
    if lost:
        arms = ", ".join(f"{counted_noun(number, 'adapter')} of {arm}" for arm, number in lost.items())
        lines += ["", f"Not made, and counted as the bare target base, which their owners are left with: {arms}."]
    return lines
