"""Tasks of lm-evaluation-harness: offline task files as rows, scored as the harness itself scores."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import make_base
from translora.actors.blocks import choice_block
from translora.config import BaseModelConfig
from translora.engine.transformers import TransformersEngine
from translora.evaluate.answers import Repetition, item_rows
from translora.evaluate.config import EvaluateTask
from translora.evaluate.data import Split, load_task, split

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
COLOURS = ("red", "blue", "green", "grey")


def rows(part: str, count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"{part} box {index} is of which colour?", "options": list(COLOURS), "answer": index % 4}
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files of both kinds, and some that cannot be used, over one small data set."""
    root = tmp_path_factory.mktemp("tasks")
    files = {part: str(root / f"{part}.jsonl") for part in ("train", "test")}
    data = {"train": [*rows("train", 12), *rows("train", 3)], "test": [*rows("test", 10), *rows("train", 2)]}
    for part, path in files.items():
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in data[part]))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "training_split": "train",
        "test_split": "test",
        "description": "Say the colour.\n",
        "doc_to_text": "{{question}}",
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{options}}", "doc_to_target": "{{answer}}"}
    accuracy = [{"metric": "acc"}, {"metric": "acc_norm"}]
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}]
    written = {
        "output_type": "generate_until",
        "doc_to_target": "{{options[answer]}}",
        "generation_kwargs": {"until": ["\n", "."]},
        "metric_list": exact,
    }
    first_word = [
        {"name": "first", "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}]}
    ]
    tasks: dict[str, dict[str, Any]] = {
        "box_choice": common | choice | {"metric_list": accuracy},
        # The harness makes the description a system message; translora's prompts are one message.
        "box_plain": common | choice | {"metric_list": accuracy, "description": ""},
        "box_words": common | written,
        "box_filtered": common | written | {"filter_list": first_word},
        "box_asking": common
        | written
        | {"num_fewshot": 3, "gen_prefix": "It is", "filter_list": [*first_word, {**first_word[0], "name": "again"}]}
        | {"generation_kwargs": {"until": ["\n"], "do_sample": True, "temperature": 0.7, "max_gen_toks": 90}},
        "box_untrained": {key: value for key, value in (common | written).items() if key != "training_split"},
        "box_rolling": common
        | {
            "output_type": "loglikelihood_rolling",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "box_lost": common | written | {"dataset_kwargs": {"data_files": {"train": str(root / "none.jsonl")}}},
        "box_exact": common | choice | {"metric_list": [{"metric": "exact_match"}]},
        "box_twice": common | written | {"repeats": 2},
        "box_unlabelled": common | choice | {"metric_list": accuracy, "doc_to_target": "{{answer - 9}}"},
        "box_mutual": common | choice | {"metric_list": [{"metric": "acc_mutual_info"}]},
    }
    for name, task in tasks.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task}))
    (root / "boxes.yaml").write_text(yaml.safe_dump({"group": "boxes", "task": ["box_choice", "box_words"]}))
    return root


def entry(folder: Path, lm_eval: str, **sizes: int | str) -> EvaluateTask:
    given = {"num_train": 8, "num_test": 6, **sizes}
    return EvaluateTask.model_validate({"name": "boxes", "lm_eval": lm_eval, "include_path": str(folder), **given})


def test_what_the_harness_would_do_otherwise_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_task(entry(folder, "box_asking"))
    for said in ("3 examples", "'It is' into the model's mouth", "samples its answers", "have 90 tokens"):
        assert said in caplog.text
    caplog.clear()
    load_task(entry(folder, "box_words"))
    assert not caplog.records


def test_metric_and_filter_can_be_chosen_by_name(folder: Path) -> None:
    assert (found := load_task(entry(folder, "box_choice", metric="acc_norm")).harness) is not None
    assert found.scored_by == "acc_norm"
    assert (found := load_task(entry(folder, "box_asking", filter="again")).harness) is not None
    assert found.scored_by == "exact_match, again"
    with pytest.raises(ValueError, match=r"has no metric f1 that can be used; give one of acc, acc_norm"):
        load_task(entry(folder, "box_choice", metric="f1"))
    with pytest.raises(ValueError, match=r"has no filter third that can be used; give one of first, again"):
        load_task(entry(folder, "box_asking", filter="third"))


def part(folder: Path, lm_eval: str) -> Split:
    return split(load_task(entry(folder, lm_eval)), seed=0)


@pytest.mark.parametrize("name", ["box_choice", "box_words"])
def test_rows_are_of_the_harness_own_splits_and_prompts(folder: Path, name: str) -> None:
    found = part(folder, name)
    assert len(found.train) == 8 and len(found.test) == len(found.documents) == 6
    assert all(row["input"].startswith("Say the colour.\ntrain box") for row in found.train)
    for row, document in zip(found.test, found.documents, strict=True):
        assert row == {"input": f"Say the colour.\n{document['question']}", "target": COLOURS[document["answer"]]}
    assert not {row["input"] for row in found.train} & {row["input"] for row in found.test}
    again = part(folder, name)
    assert (again.train, again.test) == (found.train, found.test), "drawn by seed"


def test_of_choices_the_likeliest_is_the_answer(folder: Path) -> None:
    found = part(folder, "box_choice")
    right = [document["answer"] for document in found.documents]
    logliks = [
        [-1.0 if place == (answer + (index > 2)) % 4 else -2.0 for place in range(4)]
        for index, answer in enumerate(right)
    ]
    assert found.harness is not None and found.harness.metric == "acc"
    assert found.score(logliks) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert found.chance() == 0.25
    whole = Repetition(0, {"boxes": found}, {}, {}, {("boxes", "real"): logliks})
    assert whole.correct("boxes", "real") == found.score(logliks) and whole.correct("boxes", "other") is None
    assert whole.text("boxes", "real")[0] == found.test[0]["target"] != whole.text("boxes", "real")[5]


def test_texts_are_filtered_and_compared_by_the_harness(folder: Path) -> None:
    for name, wordy in (("box_words", 0.0), ("box_filtered", 1.0)):
        found = part(folder, name)
        targets = [row["target"] for row in found.test]
        answers = [targets[0].upper(), targets[1], f"{targets[2]} box", "", "no", "no"]
        assert found.score(answers) == [1.0, 1.0, wordy, 0.0, 0.0, 0.0]
        (row, *_), (bare, *_) = (item_rows("boxes", "arm", found, slot, "auto") for slot in ("it", None))
        assert row["cut"] and row["stop"] == bare["stop"] and re.split(row["stop"], "red.\nQ: blue")[0] == "red"


def test_a_bare_base_scores_what_the_harness_itself_gives_it(folder: Path, tmp_path: Path) -> None:
    """The harness with its own model class, prompts and loop, document by document."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    base = make_base(tmp_path / "base", std=0.3)
    lm = HFLM(pretrained=str(base), dtype="float32", device="cpu", batch_size=4)
    whole = simple_evaluate(
        lm,
        tasks=["box_plain"],
        task_manager=TaskManager(include_path=str(folder)),
        apply_chat_template=True,
        verbosity="ERROR",
    )
    samples = {one["doc"]["question"]: one for one in whole["samples"]["box_plain"]}
    found = split(load_task(entry(folder, "box_plain", num_test=10)), seed=0)
    engine = TransformersEngine(BaseModelConfig(model=str(base), dtype="float32"), {}, 1)
    rated = choice_block(engine, item_rows("boxes", "base", found, None, "chat"), {})
    for row, document in zip(rated, found.documents, strict=True):
        expected = [float(response[0][0]) for response in samples[document["question"]]["resps"]]
        # The harness counts the line end of the chat template's last line to each choice.
        line_end = expected[0] - row["logliks"][0]
        assert [loglik + line_end for loglik in row["logliks"]] == pytest.approx(expected, abs=1e-3)
    scores = found.score([row["logliks"] for row in rated])
    assert scores == [samples[document["question"]]["acc"] for document in found.documents]
    assert 0 < sum(scores) < len(scores), "the base guesses"


@pytest.mark.parametrize("name", ["box_words", "box_filtered"])
def test_written_answers_are_worth_what_they_are_worth_to_the_harness(folder: Path, name: str) -> None:
    """The harness's own loop over a model that says what it is told to, right and wrong in several ways."""
    from lm_eval.api.model import LM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    ways = ("{}", "{}!", "Red", "{} it is", "", "{} or {}", "the {}")

    def reply(document: dict[str, Any]) -> str:
        number = int(re.findall(r"\d+", document["question"])[0])
        text = ways[number % len(ways)].replace("{}", document["options"][document["answer"]])
        return text.upper() if number % 2 else text

    class Scripted(LM):
        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [reply(request.doc) for request in requests]

        def loglikelihood(self, requests: Any) -> Any:
            raise AssertionError("asked for by no task of written answers")

        loglikelihood_rolling = loglikelihood

    manager = TaskManager(include_path=str(folder))
    whole = simple_evaluate(Scripted(), tasks=[name], task_manager=manager, bootstrap_iters=0, verbosity="ERROR")
    expected = {one["doc"]["question"]: one["exact_match"] for one in whole["samples"][name]}
    found = split(load_task(entry(folder, name, num_test=10)), seed=0)
    scores = found.score([reply(document) for document in found.documents])
    assert scores == [expected[document["question"]] for document in found.documents]
    assert 0 < sum(scores) < len(scores)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_task", "no_such_task: is not known; `lm_eval ls tasks` lists them"),
        ("boxes", "is a group; name one of its tasks"),
        ("box_untrained", "has no training split, from which the source adapter could be trained"),
        ("box_rolling", "is of loglikelihood_rolling, not generate_until or multiple_choice"),
        ("box_lost", r"cannot be loaded \(.*\); check its data files"),
        ("box_mutual", r"none of its metrics \(acc_mutual_info\) can be had"),
        ("box_exact", r"none of its metrics \(exact_match\) can be had"),
        ("box_twice", "asks for 2 answers to a document"),
        ("box_unlabelled", r"its documents cannot be scored \(.*is none of its document's choices"),
    ],
)
def test_a_task_that_cannot_be_measured_is_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"tasks.boxes: lm_eval task .*{message}"):
        load_task(entry(folder, name))


def test_too_few_documents_are_refused(folder: Path) -> None:
    data = load_task(entry(folder, "box_words", num_test=11))
    with pytest.raises(ValueError, match="has 10 different inputs to test on, but num_test is 11; lower it"):
        split(data, seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give either data or lm_eval"),
        ({"data": "a.jsonl", "lm_eval": "boolq"}, "give either data or lm_eval"),
        ({"data": "a.jsonl", "include_path": "tasks"}, "include_path holds task files of lm_eval, which is not set"),
    ],
)
def test_a_task_has_one_source(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateTask.model_validate({"name": "boxes", **fields})
