"""Tasks of lm-evaluation-harness (EleutherAI, Zenodo 10.5281/zenodo.12608602): its documents, and its own scoring.

The harness says what a document's prompt and answer are, and what an arm's answers are worth; prompts are put to the
bases as every other input is, without examples before them. Importing this module does not load the harness.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from translora.errors import InputError
from translora.evaluate.config import EvaluateTask
from translora.run.redact import first_line

logger = logging.getLogger(__name__)
Document = dict[str, Any]
OUTPUT_TYPES = ("generate_until", "multiple_choice")
CHOICE_METRICS = ("acc", "acc_norm", "acc_bytes")
"""Those that need the choices' log-likelihoods alone."""
NUM_TRIED = 5
"""Documents that are scored before anything is trained."""


@dataclass(frozen=True)
class HarnessTask:
    """One task of the harness."""

    name: str
    task: Any
    """lm_eval.api.task.ConfigurableTask."""
    metric: str
    """One that is a mean over the documents and of which more is better."""
    filter: str | None = None
    """Which of the task's readings of an answer is scored; its first one when unset."""

    @property
    def scored_by(self) -> str:
        """The metric, and the reading where one was asked for."""
        return self.metric if self.filter is None else f"{self.metric}, {self.filter}"

    @property
    def filters(self) -> list[str]:
        """Names of the task's readings of an answer."""
        return [one["name"] for one in self.task.config.filter_list or []] or ["none"]

    @property
    def stop(self) -> str | None:
        """A regular expression for where a generated answer ends, whoever gives it; None where only its end does."""
        until = (self.task.config.generation_kwargs or {}).get("until") or []
        return "|".join(re.escape(text) for text in ([until] if isinstance(until, str) else until) if text) or None

    @property
    def is_choice(self) -> bool:
        """Whether an arm's answer is the likeliest of some choices; else it is generated."""
        return bool(self.task.OUTPUT_TYPE == "multiple_choice")

    def train(self) -> list[Document]:
        """The documents of the training split."""
        return [dict(document) for document in self.task.training_docs()]

    def test(self) -> list[Document]:
        """The documents that the harness scores models on: the test split, or validation where there is none."""
        return [dict(document) for document in self.task.eval_docs]

    def row(self, document: Document) -> dict[str, str]:
        """A document as `input` and `target`; of several right answers the first is trained on.

        Raises:
            InputError: prompt or answer is no text, or the answer is none of the choices.
        """
        text, target = self._prompt(document), self.task.doc_to_target(document)
        if isinstance(target, list) and target:
            target = target[0]
        if self.task.config.doc_to_choice is not None:
            choices = self.choices(document)
            if isinstance(target, int) and 0 <= target < len(choices):
                target = choices[target]
            if str(target).strip() not in choices or not all(choices):
                raise InputError(
                    f"lm_eval task {self.name}: the target {target!r} is none of its document's choices {choices}; "
                    "mend the task file, or leave the task out of `tasks`"
                )
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"lm_eval task {self.name}: a document's prompt is not text; give another task")
        if not str(target).strip():
            raise InputError(f"lm_eval task {self.name}: a document has no answer to train on; give another task")
        return {"input": text.strip(), "target": str(target).strip()}

    def choices(self, document: Document) -> list[str]:
        """The answers that a document offers."""
        return [str(choice).strip() for choice in self.task.doc_to_choice(document)]

    def score(self, documents: Sequence[Document], found: Sequence[Any]) -> list[float]:
        """What the harness gives for each document, 0 to 1.

        Args:
            documents: of the test split.
            found: an answer's text for each; of a task of choices the log-likelihood of each choice.

        Raises:
            InputError: a score is none, or not in 0 to 1.
        """
        instances = []
        for index, (document, answer) in enumerate(zip(documents, found, strict=True)):
            made = self.task.construct_requests(
                doc=document, ctx=self._prompt(document), metadata=(self.name, index, 1)
            )
            own = made if isinstance(made, list) else [made]
            answers = [(loglik, False) for loglik in answer] if self.is_choice else [answer]
            for instance, response in zip(own, answers, strict=True):
                instance.resps = [response]
            instances.append(own)
        self.task._instances = [instance for own in instances for instance in own]
        self.task.apply_filters()
        scores = []
        for document, own in zip(documents, instances, strict=True):
            key = self.filter or next(iter(own[0].filtered_resps))
            results = self.task.process_results(document, [instance.filtered_resps[key] for instance in own])
            scores.append(float(results[self.metric]))
            if not 0 <= scores[-1] <= 1:
                raise InputError(
                    f"lm_eval task {self.name}: its {self.metric} is {scores[-1]}, not between 0 and 1; set another "
                    "`metric` for it in `tasks`"
                )
        return scores

    def try_out(self) -> None:
        """Score a few documents with made-up answers: what cannot be scored is known before anything is trained.

        Raises:
            Exception: whatever the task's own code raises.
        """
        tried = [dict(document) for document in itertools.islice(self.task.eval_docs, NUM_TRIED)]
        rows = [self.row(document) for document in tried]
        if self.is_choice:
            self.score(tried, [[-1.0 - place for place in range(len(self.choices(one)))] for one in tried])
        else:
            self.score(tried, [row["target"] for row in rows])

    def _prompt(self, document: Document) -> Any:
        return self.task.fewshot_context(document, num_fewshot=0, gen_prefix=self.task.doc_to_prefix(document))


def differences(task: Any) -> list[str]:
    """What a task asks of the harness and is done otherwise here, so that figures cannot be held against others'."""
    config, asked = task.config, task.config.generation_kwargs or {}
    found = []
    if config.num_fewshot:
        found.append(f"asks for {config.num_fewshot} examples before each prompt; none are given here")
    if config.gen_prefix:
        found.append(f"puts {config.gen_prefix!r} into the model's mouth; here it is the end of the prompt")
    if asked.get("do_sample") or asked.get("temperature"):
        found.append("samples its answers; here they are greedy")
    if (longest := asked.get("max_gen_toks")) is not None:
        found.append(f"lets an answer have {longest} tokens; here it has synthesis.max_answer_tokens")
    return found


@functools.cache
def task_manager(include_path: str | None) -> Any:
    """The harness's index of thousands of task files, read once."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def load_harness_task(entry: EvaluateTask) -> HarnessTask:
    """A task by its name in the harness, or in the task files below `include_path`.

    Raises:
        InputError: the harness is not installed, has no such task, cannot load its data, or scores it in a way that
            has no score for each document.
    """
    try:
        from lm_eval.api.metrics import mean
    except ImportError as error:
        raise InputError(
            f"tasks.{entry.name}: lm_eval needs lm-evaluation-harness; pip install '.[lm-eval]' in translora's checkout"
        ) from error
    where = f"tasks.{entry.name}: lm_eval task {entry.lm_eval}"
    if entry.include_path is not None and not Path(entry.include_path).is_dir():
        raise InputError(f"{where}: include_path {entry.include_path} is no folder; correct it")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = task_manager(entry.include_path)
    if entry.lm_eval not in manager.all_subtasks:
        known = "is a group; name one of its tasks" if entry.lm_eval in manager.all_tasks else "is not known"
        raise InputError(f"{where}: {known}; `lm_eval ls tasks` lists them, include_path adds task files of your own")
    try:
        task = manager.load([entry.lm_eval])["tasks"][entry.lm_eval]
        has_train = task.has_training_docs()
    except Exception as error:  # the hub, the data's own code, a damaged task file
        raise InputError(
            f"{where}: cannot be loaded ({first_line(error)}); check its data files, or that the hub can be reached"
        ) from error
    if task.OUTPUT_TYPE not in OUTPUT_TYPES or task.multiple_input:
        kind = "choices of prompts" if task.OUTPUT_TYPE in OUTPUT_TYPES else task.OUTPUT_TYPE
        raise InputError(f"{where}: is of {kind}, not {' or '.join(OUTPUT_TYPES)}; give a task of these")
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"{where}: runs code that a model writes, which is never done here; give another task")
    if (many := task.config.repeats or 1) > 1:
        raise InputError(f"{where}: asks for {many} answers to a document; one greedy answer is measured")
    if not has_train:
        raise InputError(f"{where}: has no training split, from which the source adapter could be trained")
    means, better = task.aggregation(), task.higher_is_better()
    metrics = [one for one in means if means[one] is mean and better.get(one, True)]
    if task.OUTPUT_TYPE == "multiple_choice":
        metrics = [one for one in CHOICE_METRICS if one in metrics and not callable(task.config.process_results)]
    if not metrics or "acc_mutual_info" in means:
        raise InputError(f"{where}: none of its metrics ({', '.join(means)}) can be had from its documents one by one")
    found = HarnessTask(entry.name, task, entry.metric or metrics[0], entry.filter)
    for setting, wanted, own in (("metric", entry.metric, metrics), ("filter", entry.filter, found.filters)):
        if wanted is not None and wanted not in own:
            raise InputError(f"{where}: has no {setting} {wanted} that can be used; give one of {', '.join(own)}")
    for difference in differences(task):
        logger.warning("%s: %s", where, difference)
    try:
        found.try_out()
    except Exception as error:  # the task's own code
        raise InputError(f"{where}: its documents cannot be scored ({first_line(error)}); give another task") from error
    return found
