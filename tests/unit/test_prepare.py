"""The owner's side without its training: what is refused at once, kept, made anew and warned of."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_adapter, make_base
from translora import cli
from translora import prepare as module
from translora.bundle import inspect_base, read_bundle, verify_bundle
from translora.bundle.task import read_task
from translora.config import BaseModelConfig, PrepareConfig
from translora.engine.loading import load_tokenizer
from translora.engine.prompts import prompt_format
from translora.prepare import TasksFailedError, prepare, train_jobs
from translora.synthesis import negatives
from translora.synthesis.negatives import part_inputs

INPUTS = [f"send the {word} box to me" for word in "abcdefgh"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter of it that stands for every training's outcome."""
    root = tmp_path_factory.mktemp("parts")
    make_adapter(root / "adapter", make_base(root / "old-base"))
    return root


class Owner:
    """Prepares one task; the training is replaced by a copy of an adapter, and counted."""

    def __init__(self, root: Path, parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.parts, self.trainings = root, parts, 0
        self.diverging: set[str] = set()
        self.write_rows("boxes.jsonl", INPUTS)
        monkeypatch.setattr(
            module, "invent_negatives", lambda config, tasks, base, faults: {task.entry.name: [] for task in tasks}
        )
        monkeypatch.setattr(module, "train", self.train)
        monkeypatch.setattr(module, "try_adapters", lambda config, tasks, base: None)

    def train(self, config: PrepareConfig, tasks: list[Any], *rest: object) -> dict[str, str]:
        self.trainings += 1
        for task in tasks:
            for kind in ("adapter", "discriminator"):
                target = config.run_dir / "adapters" / task.entry.name / kind
                shutil.copytree(self.parts / "adapter", target, dirs_exist_ok=True)
        return {
            task.entry.name: f"{task.entry.name}: its loss is not finite"
            for task in tasks
            if task.entry.name in self.diverging
        }

    def write_rows(self, name: str, inputs: list[str]) -> str:
        rows = [{"input": text, "target": text.split()[-1]} for text in inputs]
        (self.root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(self.root / name)

    def config(self, run: str = "one", task: dict[str, Any] | None = None, **settings: Any) -> PrepareConfig:
        entry = {"name": "boxes", "data": str(self.root / "boxes.jsonl")} | (task or {})
        places = {"output_dir": self.bundle.parent, "run_dir": self.root / run}
        source = {"model": str(self.parts / "old-base")}
        return PrepareConfig.model_validate({**places, "source": source, "tasks": [entry], **settings})

    @property
    def bundle(self) -> Path:
        return self.root / "bundles" / "boxes"


@pytest.fixture
def owner(tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Owner:
    caplog.set_level(logging.INFO, logger="translora")
    return Owner(tmp_path, parts, monkeypatch)


def test_a_sound_bundle_of_the_same_data_and_settings_is_kept(owner: Owner, caplog: pytest.LogCaptureFixture) -> None:
    (first,) = prepare(owner.config())
    caplog.clear()
    execution = {"micro_batch_size": 2, "num_workers": 1, "ds_config": "/elsewhere/zero3.json"}
    settings = {"train": execution, "resources": {"num_actors": 3}}
    assert prepare(owner.config("two", **settings)) == [first], "how it is executed does not matter"
    assert owner.trainings == 1 and not caplog.records


@pytest.mark.parametrize(
    "settings",
    [
        {"train": {"epochs": 1}},
        {"train": {"lora": {"rank": 16}}},
        {"num_seeds": 7},
        {"seed": 1},
        {"discriminator": {"epochs": 3}},
        {"synthesis": {"sampling": {"temperature": 0.5}}},
        {"prompt_template": "Q: {input}\nA:"},
    ],
    ids=str,
)
def test_other_settings_make_the_bundle_anew_and_say_so(
    owner: Owner, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    (first,) = prepare(owner.config())
    (second,) = prepare(owner.config("two", **settings))
    assert owner.trainings == 2 and second.digest != first.digest
    assert caplog.text.count("was made with other settings: made anew") == 1
    assert prepare(owner.config("three", **settings)) == [second] and owner.trainings == 2


def test_other_data_or_an_adapter_of_the_owner_makes_the_bundle_anew(
    owner: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"adapter": str(owner.parts / "adapter")}
    for task in ({}, given, {}):
        prepare(owner.config(task=task))
    assert owner.trainings == 3 and caplog.text.count("was made with other data: made anew") == 2
    owner.write_rows("boxes.jsonl", INPUTS[1:])
    assert prepare(owner.config())[0].manifest.num_samples == len(INPUTS) - 1
    assert owner.trainings == 4


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "translora/seeds.jsonl"])
def test_a_damaged_bundle_is_made_anew(owner: Owner, caplog: pytest.LogCaptureFixture, name: str) -> None:
    (first,) = prepare(owner.config())
    damaged = bytearray((owner.bundle / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (owner.bundle / name).write_bytes(damaged)
    (second,) = prepare(owner.config())
    assert owner.trainings == 2 and second == first
    assert f"boxes: made anew: {owner.bundle / name}: changed or damaged" in caplog.text
    verify_bundle(second, inspect_base(str(owner.parts / "old-base")))


def test_a_bundle_that_does_not_tell_its_settings_is_kept(owner: Owner, caplog: pytest.LogCaptureFixture) -> None:
    prepare(owner.config())
    path = owner.bundle / "translora" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["provenance"]["recipe"]
    path.write_text(json.dumps(manifest))
    prepare(owner.config("two", train={"epochs": 1}))
    assert f"{owner.bundle} does not tell its settings: kept" in caplog.text
    assert owner.trainings == 1 and "recipe" not in read_bundle(owner.bundle).manifest.provenance


def test_rows_that_leave_with_a_bundle_are_warned_of(owner: Owner, caplog: pytest.LogCaptureFixture) -> None:
    (bundle,) = prepare(owner.config())
    assert set(bundle.seeds) < set(INPUTS)
    data = owner.root / "boxes.jsonl"
    assert f"boxes: translora/seeds.jsonl of the bundle will hold 5 inputs of {data} word for word" in caplog.text
    assert "set `seeds` to ship cleaned ones" in caplog.text
    caplog.clear()
    cleaned = owner.write_rows("cleaned.jsonl", ["send the * box to me", "send * to me"])
    assert prepare(owner.config(task={"seeds": cleaned}))[0].seeds == ["send the * box to me", "send * to me"]
    assert "word for word" not in caplog.text


@pytest.mark.parametrize("twice", [1, 2])
def test_too_few_seeds_are_refused_at_once(owner: Owner, twice: int) -> None:
    config = owner.config(task={"seeds": owner.write_rows("cleaned.jsonl", ["send a box"] * twice)})
    with pytest.raises(ValueError, match=r"cleaned.jsonl: 1 different seed\(s\); give 2 or more"):
        prepare(config)
    assert not config.run_dir.exists()


def test_too_few_rows_are_refused_with_the_remedy(owner: Owner) -> None:
    owner.write_rows("boxes.jsonl", INPUTS[:3])
    with pytest.raises(ValueError, match="3 different inputs, but num_seeds is 5; lower num_seeds or give `seeds`"):
        prepare(owner.config())
    owner.write_rows("boxes.jsonl", INPUTS[:1])
    seeds = owner.write_rows("cleaned.jsonl", INPUTS[:2])
    with pytest.raises(ValueError, match=r"boxes\.jsonl: 1 row; give 2 or more"):
        prepare(owner.config(task={"seeds": seeds}))
    assert owner.trainings == 0


def test_without_data_an_adapter_and_its_seeds_become_a_bundle_and_nothing_is_trained(
    owner: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    gone = {
        "data": None,
        "adapter": str(owner.parts / "adapter"),
        "seeds": owner.write_rows("five.jsonl", INPUTS[:5]),
    }
    started: list[bool] = []
    (bundle,) = prepare(owner.config(task=gone), lambda: started.append(True))
    assert not started and owner.trainings == 0
    assert bundle.discriminator_dir is None and bundle.seeds == INPUTS[:5] and bundle.manifest.num_samples == 250
    verify_bundle(bundle, inspect_base(str(owner.parts / "old-base")))
    other_training = {"train": {"epochs": 1}, "num_seeds": 7}
    assert prepare(owner.config("two", task=gone, **other_training)) == [bundle], "nothing of it was trained"
    assert "made anew" not in caplog.text
    assert prepare(owner.config("two", task={**gone, "num_samples": 40}))[0].manifest.num_samples == 40
    assert "was made with other settings: made anew" in caplog.text
    owner.write_rows("five.jsonl", INPUTS[:4])
    assert prepare(owner.config(task=gone))[0].seeds == INPUTS[:4]
    (trained,) = prepare(owner.config(), lambda: started.append(True))
    assert started == [True] and owner.trainings == 1 and trained.discriminator_dir is not None
    assert prepare(owner.config(task=gone)) == [trained], "what cannot be trained again is not lost"
    moved = str(shutil.copytree(owner.parts / "adapter", owner.root / "moved"))
    (Path(moved) / "README.md").write_text("a note beside it makes no other adapter")
    assert prepare(owner.config(task={**gone, "adapter": moved})) == [trained]
    other = str(make_adapter(owner.root / "other", owner.parts / "old-base", seed=5))
    for change, what in (({"adapter": other}, "adapter"), ({"prompt_template": "Q: {input}"}, "prompt_template")):
        reason = rf"boxes was made with another {what}, and its discriminator cannot be trained"
        with pytest.raises(TasksFailedError, match=reason) as error:
            prepare(owner.config(task={**gone, **change}))
        assert error.value.bundles == [] and read_bundle(owner.bundle) == trained, "and it is not lost"
    with pytest.raises(ValueError, match="boxes: is a bundle already; name it in the fleet file as it is"):
        prepare(owner.config(task={**gone, "adapter": str(owner.bundle)}))
    with pytest.raises(ValueError, match=r"shelf\.jsonl: cannot be read"):
        prepare(owner.config(task={**gone, "seeds": str(owner.root / "shelf.jsonl")}))


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_an_adapter_with_another_chat_template_than_its_base_has_to_say_how_it_is_prompted(
    owner: Owner, name: str
) -> None:
    adapter = Path(shutil.copytree(owner.parts / "adapter", owner.root / "trl"))
    own = "{{ messages[0]['content'] }} =>"
    (adapter / name).write_text(own if name.endswith("jinja") else json.dumps({"chat_template": own}))
    seeds = owner.write_rows("five.jsonl", INPUTS[:5])
    gone = {"data": None, "adapter": str(adapter), "seeds": seeds}
    with pytest.raises(ValueError, match=r"trl: brings a chat template, and the base has another one; set the task's"):
        prepare(owner.config(task=gone))
    (bundle,) = prepare(owner.config(task={**gone, "prompt_template": "{input} =>"}))
    assert bundle.manifest.prompt_template == "{input} =>"
    chat = prompt_format(load_tokenizer(BaseModelConfig(model=str(owner.parts / "old-base")))).tokenizer.chat_template
    (adapter / name).write_text(chat if name.endswith("jinja") else json.dumps({"chat_template": chat}))
    assert prepare(owner.config("two", task=gone))[0].manifest.prompt_template == "chat"


def test_a_readme_that_leads_out_of_the_adapter_is_left_out(owner: Owner, caplog: pytest.LogCaptureFixture) -> None:
    """The platform makes bundles of its tenants' adapters; but the files of the hub's cache are links to its blobs."""
    secret = owner.root / "id_rsa"
    secret.write_text("a key")
    snapshot = owner.root / "models--a--b" / "snapshots" / "c0ffee"
    adapter = Path(shutil.copytree(owner.parts / "adapter", snapshot))
    (snapshot.parent.parent / "blobs").mkdir()
    (snapshot.parent.parent / "blobs" / "1").write_text("of the hub")
    seeds = owner.write_rows("five.jsonl", INPUTS[:5])
    for run, place, kept in (("one", secret, False), ("two", snapshot.parent.parent / "blobs" / "1", True)):
        (adapter / "README.md").unlink(missing_ok=True)
        (adapter / "README.md").symlink_to(place)
        (bundle,) = prepare(owner.config(run, task={"data": None, "adapter": str(adapter), "seeds": seeds}))
        assert (bundle.path / "README.md").is_file() is kept
        shutil.rmtree(bundle.path)
    assert "outside the adapter: left out" in caplog.text


def test_a_task_may_have_a_prompt_template_of_its_own(owner: Owner) -> None:
    shared, own = "Q: {input}\nA:", "Box? {input}"
    (first,) = prepare(owner.config(task={"prompt_template": own}, prompt_template=shared))
    assert first.manifest.prompt_template == own
    assert prepare(owner.config("two", prompt_template=own)) == [first] and owner.trainings == 1, "it is the same"
    assert prepare(owner.config("two", prompt_template=shared))[0].manifest.prompt_template == shared
    with pytest.raises(ValueError, match=r"boxes: .*'Box\?' lacks \{input\}|boxes: .*contains \{input\}"):
        prepare(owner.config(task={"prompt_template": "Box?"}))
    (training,) = train_jobs_of(owner.config(task={"prompt_template": own}), owner)
    assert training.template == own


def train_jobs_of(config: PrepareConfig, owner: Owner) -> list[Any]:
    (task,) = module.read_tasks(config, inspect_base(str(owner.parts / "old-base")))
    known = part_inputs(config, [task], {"boxes": ["a b", "c d", "e f", "g h"]})[0]["boxes"]
    return train_jobs(config, task, known)[:1]


def test_a_task_that_cannot_be_trained_costs_the_others_nothing(
    owner: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    owner.diverging = {"jars"}
    entry = {"name": "jars", "data": owner.write_rows("jars.jsonl", INPUTS[:6])}
    config = owner.config()
    config = config.model_copy(update={"tasks": [*config.tasks, config.tasks[0].model_copy(update=entry)]})
    with pytest.raises(TasksFailedError, match="jars: its loss is not finite") as failed:
        prepare(config)
    assert [bundle.path for bundle in failed.value.bundles] == [owner.bundle]
    verify_bundle(read_bundle(owner.bundle), inspect_base(str(owner.parts / "old-base")))
    owner.diverging = set()
    assert [bundle.path.name for bundle in prepare(config)] == ["boxes", "jars"] and owner.trainings == 2
    places = {"run_dir": str(owner.root / "cli"), "output_dir": str(owner.root / "made")}
    settings = {**places, "source": {"model": str(owner.parts / "old-base")}}
    owner.diverging = {"jars"}
    tasks = [{"name": "boxes", "data": str(owner.root / "boxes.jsonl")}, {"name": "jars", "data": entry["data"]}]
    (owner.root / "prepare.yaml").write_text(json.dumps({**settings, "tasks": tasks}))
    assert cli.main(["prepare", str(owner.root / "prepare.yaml")]) == cli.FAILED
    shown = capsys.readouterr()
    assert shown.out.split() == [str(owner.root / "made" / "boxes")] and "jars: its loss is not finite" in shown.err


def test_every_task_that_cannot_be_read_is_named_before_anything_begins(owner: Owner) -> None:
    bad = [{"name": name, "data": str(owner.root / f"{name}.jsonl")} for name in ("jars", "tins")]
    config = owner.config()
    tasks = [*config.tasks, *(config.tasks[0].model_copy(update=entry) for entry in bad)]
    with pytest.raises(ValueError, match=r"jars\.jsonl: cannot be read.*; .*tins\.jsonl: cannot be read"):
        prepare(config.model_copy(update={"tasks": tasks}))
    assert owner.trainings == 0 and not owner.bundle.exists()


def test_a_size_that_no_bundle_can_have_is_refused_before_the_training(owner: Owner) -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        owner.config(task={"num_samples": 1})


def test_too_many_seeds_are_refused_before_the_training(owner: Owner) -> None:
    seeds = owner.write_rows("seeds.jsonl", [f"send box {number}" for number in range(201)])
    with pytest.raises(ValueError, match=r"seeds\.jsonl: 201 seeds, the limit is 200; about five are usual"):
        prepare(owner.config(task={"seeds": seeds}))
    assert owner.trainings == 0


def test_what_is_no_bundle_is_not_replaced_and_found_at_once(owner: Owner) -> None:
    owner.bundle.mkdir(parents=True)
    read_task(owner.config(), owner.config().tasks[0])
    (owner.bundle / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="boxes: exists and is not a bundle, so it is not replaced; move it away"):
        prepare(owner.config())
    assert owner.trainings == 0 and (owner.bundle / "notes.txt").read_text() == "mine"


def test_negatives_are_invented_once_for_each_task(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run_rows(label: str, rows: list[dict[str, Any]], *_: object, **__: object) -> list[dict[str, Any]]:
        asked.extend(row["adapter"] for row in rows)
        texts = [" Send the A box to me", "new one", "New  one", "cut", ""]
        finished = [True, True, True, False, True]
        found = [
            {**row, "text": texts[row["sample_id"] % 5], "finished": finished[row["sample_id"] % 5]} for row in rows
        ]
        return found[::-1]

    monkeypatch.setattr(negatives, "run_rows", run_rows)
    config = owner.config()
    other = {"name": "jars", "data": owner.write_rows("jars.jsonl", INPUTS[:6])}
    base = inspect_base(str(owner.parts / "old-base"))
    both = [read_task(config, entry) for entry in (config.tasks[0], config.tasks[0].model_copy(update=other))]
    first = negatives.invent_negatives(config, both[:1], base, {})
    assert first == {"boxes": ["new one"]}, "neither a real input nor the same twice"
    assert negatives.invent_negatives(config, both, base, {}) == first | {"jars": ["new one"]}
    assert asked == ["boxes"] * 8 + ["jars"] * 6, "what was invented for a task is kept"
    (kept,) = (owner.root / "one" / "negatives").glob("boxes-*.json")
    kept.write_text("half")
    assert negatives.invent_negatives(config, both, base, {})["boxes"] == ["new one"], "a damaged file is made again"
    del asked[14:]
    warmer = owner.config(synthesis={"sampling": {"temperature": 1.5}})
    negatives.invent_negatives(warmer, both[:1], base, {})
    assert asked[14:] == ["boxes"] * 8

    def faulty(label: str, rows: list[dict[str, Any]], *_: object, faults: dict[str, str], **__: object) -> list[Any]:
        faults["boxes"] = "out of memory"
        return run_rows(label, [row for row in rows if row["adapter"] != "boxes"])

    monkeypatch.setattr(negatives, "run_rows", faulty)
    hotter, found = owner.config(synthesis={"sampling": {"temperature": 1.7}}), dict[str, str]()
    assert negatives.invent_negatives(hotter, both, base, found) == {"jars": ["new one"]}
    assert found == {"boxes": "out of memory"}, "a task whose rows cannot be computed costs the others nothing"


def test_a_discriminator_without_negatives_is_refused(owner: Owner) -> None:
    owner.write_rows("boxes.jsonl", ["red", "blue", "green", "black", "white"])
    config = owner.config()
    task = read_task(config, config.tasks[0])
    with pytest.raises(ValueError, match=r"boxes: no negatives for its discriminator.*give longer inputs in .*boxes"):
        train_jobs(config, task, part_inputs(config, [task], {"boxes": []})[0]["boxes"])
    known, _ = part_inputs(config, [task], {"boxes": ["a", "b", "c", "d", "e"]})
    jobs = train_jobs(config, task, known["boxes"])
    assert [job.name for job in jobs] == ["boxes/adapter", "boxes/discriminator"]
