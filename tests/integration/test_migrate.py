"""The command line on a tiny world: prepare, migrate, kill it in every phase, damage a bundle."""

import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import fmean

import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tests.integration.world import (
    ROOT,
    TASKS,
    World,
    command,
    environment,
    kill_when,
    make_trained_encoder_decoder,
    make_world,
)
from tests.secrets import PLANTED
from tests.tiny import make_adapter
from translora.bundle import inspect_base, read_bundle, verify_bundle, write_bundle
from translora.distill.teacher import MIN_MASS, MIN_PROBABILITY
from translora.engine.prompts import prompt_format
from translora.lora.peft_io import read_lora
from translora.run.files import read_jsonl, sha256_file, sha256_path
from translora.run.state import AdapterState, load_states

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    world.run("prepare", world.write("prepare.yaml", world.prepare_config()))
    return world


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Path:
    """With keys in its environment, and Ray's own files below ray/: a short path, for the sake of its sockets."""
    tracking = {"tracking": {"wandb_project": "test", "wandb_mode": "offline"}}
    fleet = world.write("fleet.yaml", world.fleet_config("undisturbed") | tracking)
    run_dir = world.root / "runs" / "undisturbed"
    with tempfile.TemporaryDirectory(dir="/tmp") as ray:
        done = world.run("migrate", fleet, RAY_TMPDIR=ray, **PLANTED)
        shutil.copytree(
            ray,
            world.root / "ray",
            symlinks=True,
            ignore=lambda folder, names: [
                name for name in names if not (Path(folder, name).is_dir() or Path(folder, name).is_file())
            ],
        )
    (world.root / "output.txt").write_text(done.stdout + done.stderr)
    return run_dir


def results(run_dir: Path) -> dict[str, dict[str, object]]:
    """What must not depend on how often a run was killed: everything but wall times and bundle paths."""
    return {state.name: state.model_dump(exclude={"seconds"}) for state in load_states(run_dir)}


def test_prepare_writes_bundles_that_peft_loads_and_whose_adapter_learnt_the_task(world: World) -> None:
    base = inspect_base(str(world.source))
    for task in TASKS:
        path = world.root / "source-bundles" / task
        bundle = read_bundle(path)
        verify_bundle(bundle, base)
        assert len(bundle.seeds) == 5 and bundle.manifest.discriminator
        model = AutoModelForCausalLM.from_pretrained(world.source)
        PeftModel.from_pretrained(PeftModel.from_pretrained(model, path).unload(), bundle.discriminator_dir)
        losses = json.loads((world.root / f"runs/prepare/adapters/{task}/adapter/losses.json").read_text())
        assert sum(losses[-6:]) < 0.75 * sum(losses[:6])


def test_prepare_again_makes_nothing_anew(world: World) -> None:
    before = {path: path.stat().st_mtime_ns for path in (world.root / "source-bundles").rglob("*")}
    world.run("prepare", world.root / "prepare.yaml")
    assert before == {path: path.stat().st_mtime_ns for path in (world.root / "source-bundles").rglob("*")}


def test_a_migrated_adapter_is_a_bundle_of_the_target_base(world: World, undisturbed: Path) -> None:
    target = inspect_base(str(world.target))
    for state in load_states(undisturbed):
        assert state.status == "migrated" and state.gate is not None and state.accuracy is not None
        bundle = read_bundle(undisturbed / state.output)
        verify_bundle(bundle, target)
        assert bundle.manifest.discriminator and bundle.manifest.num_samples == 12
        assert any(lora_B.abs().max() > 1e-3 for _, lora_B in read_lora(bundle.path).modules.values())
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.target), bundle.path)
        card = ModelCard.load(bundle.path / "README.md")
        assert card.data.base_model == target.name and state.bundle_digest in card.text
        assert str(world.root) not in card.content
        assert state.synthesis.accepted >= 16 and state.num_steps == len(state.losses) == 16
    assert (undisturbed / "report.html").is_file()
    assert not list(undisturbed.rglob(".tmp-*"))


def test_no_key_of_the_environment_is_left_anywhere(world: World, undisturbed: Path) -> None:
    paths = [path for folder in (undisturbed, world.root / "ray") for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in paths}
    assert {"config.json", "metrics.jsonl", "report.html", "raylet.out", "state.json"} <= names
    assert any(name.endswith(".wandb") for name in names) and any(name.startswith("worker-") for name in names)
    for path in [*paths, world.root / "output.txt"]:
        content = path.read_bytes()
        found = [name for name, value in PLANTED.items() if value.encode() in content]
        assert not found, f"{path} holds {found}"


def test_metrics_are_in_the_jsonl_file_and_in_the_offline_wandb_run(undisturbed: Path) -> None:
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    for state in load_states(undisturbed):
        own = [row["metrics"] for row in rows if row["adapter"] == state.name]
        assert [metrics["loss/student"] for metrics in own if "loss/student" in metrics] == pytest.approx(state.losses)
    (written,) = undisturbed.glob("wandb/offline-run-*/*.wandb")
    assert b"adapter/colour/loss/student" in written.read_bytes()


def test_students_learn_from_their_teachers(undisturbed: Path) -> None:
    for state in load_states(undisturbed):
        assert sum(state.losses[-4:]) < 0.9 * sum(state.losses[:4])


def test_soft_labels_are_what_peft_gives_the_teachers_answers(world: World, undisturbed: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.source)
    checked = 0
    for state in load_states(undisturbed):
        bundle = world.root / "source-bundles" / state.name
        data = undisturbed / "adapters" / state.name / "train/student/data.jsonl"
        rows = read_jsonl(data, required=("input", "answer"))
        classes = list(state.synthesis.classes)
        assert all(("teacher" in row) == (len(classes) > 1) for row in rows)
        prompts = prompt_format(tokenizer, read_bundle(bundle).manifest.prompt_template)
        teacher = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.source), bundle).eval()
        for row in (row for row in rows if "teacher" in row):
            logliks = []
            for answer in classes:
                prompt_ids, answer_ids = prompts.encode_pair(row["input"], answer)
                with torch.no_grad():
                    logits = teacher(torch.tensor([prompt_ids + answer_ids[:-1]])).logits[0, len(prompt_ids) - 1 :]
                logliks.append(logits.log_softmax(-1).gather(1, torch.tensor(answer_ids)[:, None]).sum())
            odds = dict(zip(classes, torch.stack(logliks).softmax(0).tolist(), strict=True))
            mass, given = float(torch.stack(logliks).exp().sum()), row["answer"]
            likely = {answer: p for answer, p in odds.items() if p >= MIN_PROBABILITY}
            found = row["teacher"]["probabilities"]
            if abs(mass - MIN_MASS) < 0.01 or abs(odds[given] - MIN_PROBABILITY) < 0.001:
                continue  # rounding decides which it is
            if mass < MIN_MASS or given not in likely:
                assert found == {given: 1.0}
                continue
            assert found.keys() <= odds.keys() and sum(found.values()) == pytest.approx(1, abs=1e-3)
            for answer, p in likely.items():
                assert found.get(answer, 0.0) == pytest.approx(p / sum(likely.values()), abs=0.011)
            checked += len(found) > 1
        sizes = [len(row["teacher"]["probabilities"]) for row in rows if "teacher" in row]
        assert state.answers_per_sample == (pytest.approx(fmean(sizes), abs=0.01) if sizes else None)
    assert checked > 0, "the tasks have few answers, of which teachers are unsure"


def test_a_run_killed_in_every_phase_ends_as_if_it_had_not_been(world: World, undisturbed: Path) -> None:
    config = world.write("killed.yaml", world.fleet_config("killed"))
    run_dir = world.root / "runs" / "killed"
    finished: dict[Path, int] = {}
    for pattern, count in (
        ("rounds/000-generate-*/*.parquet", 3),
        ("rounds/000-label-*/*.parquet", 2),
        ("gangs/*/gang-*.safetensors", 1),
        ("adapters/*/student/adapter_config.json", 1),
        ("gate/*/*.parquet", 2),
        ("bundles/*/adapter_config.json", 1),
    ):
        kill_when(world, "migrate", config, f"runs/killed/{pattern}", count)
        # What was finished before a kill is never written again.
        assert all(path.stat().st_mtime_ns == written for path, written in finished.items())
        finished = {path: path.stat().st_mtime_ns for path in run_dir.glob("rounds/*/*.parquet")}
        finished |= {
            path: path.stat().st_mtime_ns for path in run_dir.glob("adapters/*/student/adapter_model.safetensors")
        }
    world.run("migrate", config)
    assert results(run_dir) == results(undisturbed)
    for task in TASKS:
        assert sha256_path(run_dir / "bundles" / task) == sha256_path(undisturbed / "bundles" / task)
    assert not list(run_dir.rglob(".tmp-*"))


def test_a_run_that_is_told_to_end_writes_checkpoints_first(world: World, undisturbed: Path) -> None:
    """None is due by itself here, so a start after a kill would begin again."""
    run_dir = world.root / "runs" / "terminated"
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "adapters/colour/train")
    fleet = world.fleet_config("terminated")
    fleet["distill"] |= {"epochs": 300, "num_workers": 1, "checkpoint_every_steps": 10**6}
    config = world.write("terminated.yaml", fleet)

    def steps() -> list[int]:
        """Of one student, in the order in which they were done."""
        found = run_dir.glob("adapters/colour/train/student/train.jsonl")
        return [json.loads(line)["step"] for path in found for line in path.read_text().splitlines()]

    driver = subprocess.Popen(command("migrate", config), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while (asked := len(steps())) < 20:
        assert driver.poll() is None and time.monotonic() < deadline, "it has not trained"
        time.sleep(0.02)
    driver.terminate()
    assert driver.wait(timeout=120) == 143
    done = len(steps())
    assert done < 600, "it was told while it trained"
    world.run("migrate", config)
    again = steps()[done:]
    assert asked <= again[0] <= done + 1 and again[-1] == 600, "it goes on where it stood when it was told"


def test_a_prepare_killed_in_every_phase_makes_the_same_bundles(world: World) -> None:
    config = world.prepare_config() | {"output_dir": "killed-bundles", "run_dir": "runs/killed-prepare"}
    path = world.write("killed-prepare.yaml", config)
    for pattern in (
        "runs/killed-prepare/negatives/*/*.parquet",
        "runs/killed-prepare/gangs/*/gang-*.safetensors",
        "killed-bundles/*/adapter_config.json",
    ):
        kill_when(world, "prepare", path, pattern)
    world.run("prepare", path)
    for task in TASKS:
        assert sha256_path(world.root / "killed-bundles" / task) == sha256_path(world.root / "source-bundles" / task)


def test_a_finished_run_does_nothing_again(world: World, undisturbed: Path) -> None:
    before = results(undisturbed)
    kept = {path: path.stat().st_mtime_ns for path in (undisturbed / "bundles").rglob("*")}
    cohort = undisturbed / "cohort-gate.json"
    cohort.write_text('["colour"]')  # of a driver that was killed in the instant after the last adapter
    done = world.run("migrate", world.root / "fleet.yaml")
    assert not cohort.exists()
    assert results(undisturbed) == before
    assert kept == {path: path.stat().st_mtime_ns for path in (undisturbed / "bundles").rglob("*")}
    assert "generate" not in done.stderr and "distill" not in done.stderr


def test_other_thresholds_on_a_finished_run_repeat_the_gate_alone(world: World, undisturbed: Path) -> None:
    run_dir = world.root / "runs" / "thresholds"
    shutil.copytree(undisturbed, run_dir)
    fleet = world.fleet_config("thresholds")
    kept = {path: path.stat().st_mtime_ns for path in (run_dir / "adapters").glob("*/student/*")}
    for min_gain, code, status in ((1.0, 1, "failed_gate"), (-1.0, 0, "migrated")):
        fleet["gate"] |= {"min_gain": min_gain, "retries": 0}
        done = world.run("migrate", world.write("thresholds.yaml", fleet), check=False)
        assert done.returncode == code, done.stderr
        assert f"gate.min_gain {-min_gain if code == 0 else -1.0} -> {min_gain}" in done.stderr
        assert "generate" not in done.stderr and "distill" not in done.stderr
        assert {state.status for state in load_states(run_dir)} == {status}
        assert len(list((run_dir / "bundles").glob("*"))) == (2 if code == 0 else 0)
    assert kept == {path: path.stat().st_mtime_ns for path in (run_dir / "adapters").glob("*/student/*")}
    for task in TASKS:
        assert sha256_path(run_dir / "bundles" / task) == sha256_path(undisturbed / "bundles" / task)


def test_a_finished_fleet_merges_before_and_after_and_migrates_only_what_is_new(
    world: World, undisturbed: Path
) -> None:
    run_dir = world.root / "runs" / "merged"
    shutil.copytree(undisturbed, run_dir)
    fleet = world.fleet_config("merged")
    fleet["distill"]["num_workers"] = 1
    sources = [f"source-bundles/{task}" for task in TASKS]
    fleet["merges"] = [
        {"name": "early", "when": "before", "method": "static_cat", "adapters": sources, "num_samples": 8},
        {"name": "late", "when": "after", "method": "iteris", "adapters": list(TASKS), "iteris": {"max_iter": 2}},
    ]
    kept = {path: path.stat().st_mtime_ns for path in (run_dir / "adapters").glob("*/student/*")}
    config = world.write("merged.yaml", fleet)
    done = world.run("migrate", config)
    assert "3 of 3 migrated, 1 merged" in done.stdout
    assert kept == {path: path.stat().st_mtime_ns for path in kept}, "what was migrated before is not touched"
    target = inspect_base(str(world.target))
    for name, num_samples in (("early", 8), ("late", 24)):
        bundle = read_bundle(run_dir / "bundles" / name)
        verify_bundle(bundle, target)
        assert bundle.manifest.num_samples == num_samples and len(bundle.seeds) == 10
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.target), bundle.path)
    record = json.loads((run_dir / "merging" / "late" / "merge.json").read_text())
    synthetic = {sha256_file(run_dir / "adapters" / task / "synthetic.parquet") for task in TASKS}
    assert {part["data_sha256"] for part in record["adapters"]} == synthetic, "no data but what the run invented"
    assert json.loads(world.run("status", run_dir, "--json").stdout)["statuses"] == {"migrated": 3, "merged": 1}
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "bundles").rglob("*")}
    again = world.run("migrate", config)
    assert before == {path: path.stat().st_mtime_ns for path in (run_dir / "bundles").rglob("*")}
    assert "merging" not in again.stderr and "generate" not in again.stderr


def test_one_bad_bundle_and_one_starved_adapter_leave_the_rest_of_the_fleet_alone(world: World) -> None:
    broken, starved = world.root / "broken", world.root / "starved"
    for copy in (broken, starved):
        shutil.copytree(world.root / "source-bundles" / "colour", copy)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    fleet = world.fleet_config("bad")
    fleet["distill"]["num_workers"] = 1
    # 24 colours, verbs and things make 192 different sentences: 300 cannot be had.
    starving = {"bundle": "starved", "num_samples": 300}
    fleet["adapters"] = [{"bundle": "broken"}, starving, fleet["adapters"][1]]
    fleet["synthesis"] |= {"max_generated_factor": 1.0, "max_rounds": 2, "min_accepted_fraction": 0.9}
    fleet["synthesis"]["batch_size"] = 64
    fleet["adapters"][2]["num_samples"] = 4
    fleet["gate"] |= {"min_holdout": 1, "min_agreement": 0.0}
    fleet["synthesis"]["max_generated_factor"] = 3.0
    done = world.run("migrate", world.write("bad.yaml", fleet), check=False)
    assert done.returncode == 1
    states: dict[str, AdapterState] = {state.name: state for state in load_states(world.root / "runs" / "bad")}
    assert states["broken"].status == "quarantined" and "adapter_model.safetensors" in states["broken"].reason
    assert states["starved"].status == "quarantined"
    assert "too few synthetic samples" in states["starved"].reason and "dropped" in states["starved"].reason
    assert states["thing"].status == "migrated"
    assert "broken: quarantined" in done.stdout and "starved: quarantined" in done.stdout


def test_a_failed_gate_is_tried_again_with_more_samples_also_without_a_discriminator(
    world: World,
) -> None:
    whole = read_bundle(world.root / "source-bundles" / "thing")
    write_bundle(
        world.root / "bare",
        adapter_dir=whole.path,
        discriminator_dir=None,
        seeds=whole.seeds,
        task_name="thing",
        base=inspect_base(str(world.source)),
        num_samples=4,
        prompt_template=whole.manifest.prompt_template,
        provenance={"made_by": "a test"},
    )
    fleet = world.fleet_config("retried")
    fleet["distill"]["num_workers"] = 1
    fleet["adapters"] = [{"bundle": "bare"}, {"bundle": "source-bundles/colour", "num_samples": 4}]
    fleet["distill"] |= {"epochs": 1, "learning_rate": 1e-7}
    fleet["gate"] = {"min_holdout": 2, "min_agreement": 1.0, "retry_factor": 2.0}
    fleet["synthesis"] |= {"batch_size": 32}
    done = world.run("migrate", world.write("retried.yaml", fleet), check=False)
    assert done.returncode == 1
    for state in load_states(world.root / "runs" / "retried"):
        assert (state.status, state.attempt) == ("failed_gate", 2) and "min_agreement 1.00" in state.reason
        assert state.num_samples == 4 and state.synthesis.needed == 12, "both are doubled"
        assert f"{state.name}: did not pass the gate" in done.stderr
        directory = world.root / "runs" / "retried" / "adapters" / state.name
        first, second = (pq.read_table(directory / f"synthetic{part}.parquet").to_pylist() for part in ("-1", ""))
        inputs = [{row["sample_id"]: row["input"] for row in rows} for rows in (first, second)]
        assert inputs[0].items() <= inputs[1].items(), "what was drawn is kept"
        kept = [sum(row["split"] != "refused" for row in rows) for rows in (first, second)]
        assert kept[0] <= 6 < kept[1] <= 12
    bare = next(state for state in load_states(world.root / "runs" / "retried") if state.name == "bare")
    assert bare.synthesis.screen == "confidence" and bare.gate is not None and bare.gate.loglik_student is not None
    rows = pq.read_table(world.root / "runs/retried/adapters/bare/synthetic.parquet").to_pylist()
    assert all(row["score"] > 0 for row in rows if row["split"] != "refused")
    assert not (world.root / "runs" / "retried" / "bundles").exists()
    again = world.run("migrate", world.root / "retried.yaml", check=False)
    assert again.returncode == 1 and "generate" not in again.stderr, "given up is given up"


def test_students_learn_the_probabilities_of_teachers_of_the_same_vocabulary(world: World) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.source)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.002 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(world.root / "sibling")
    AutoTokenizer.from_pretrained(world.source).save_pretrained(world.root / "sibling")
    fleet = world.fleet_config("divergence")
    fleet["distill"]["num_workers"] = 1
    fleet["target"] = {"model": "./sibling"}
    fleet["adapters"] = [{"bundle": "source-bundles/thing", "num_samples": 8}]
    fleet["distill"] |= {"loss": "kl", "kl_top_k": 4, "token_share": 0.7}
    done = world.run("migrate", world.write("divergence.yaml", fleet))
    run_dir = world.root / "runs" / "divergence"
    (state,) = load_states(run_dir)
    assert state.status == "migrated" and state.losses[-1] < 0.8 * state.losses[0], done.stderr
    rows = read_jsonl(next((run_dir / "adapters/thing/train/student").glob("data.jsonl")), ("input", "answer"))
    thoughts = [row["teacher"] for row in rows]
    assert all([len(tokens) for tokens in one["tokens"]] == [4] * len(one["answer_ids"]) for one in thoughts)
    assert all(len(one["spans"]) == len(one["excess"]) == len(one["answer_ids"]) for one in thoughts)
    assert sum(max(one["excess"]) for one in thoughts) > 0, "the adapter knows more than its base"
    first = [one["tokens"][0][0] == one["answer_ids"][0] for one in thoughts]
    assert sum(first) >= 0.8 * len(first), "the teacher's answers were its most likely ones"
    assert "sft for these" not in done.stderr
    fleet["distill"] |= {"loss": "sft", "token_share": 1, "warm_start": True}
    again = world.run("migrate", world.write("divergence.yaml", fleet))
    assert "generate" not in again.stderr and "ask the teachers" not in again.stderr, "the same set, another loss"
    (warm,) = load_states(run_dir)
    # A random start's cross-entropy is no less than its divergence, and the source adapter's is less than that.
    assert warm.status == "migrated" and warm.losses[0] < state.losses[0], "it begins as its source adapter"
    moved = read_bundle(run_dir / warm.output)
    assert moved.manifest.provenance["began_as"] == "the source adapter"


def test_an_adapter_of_an_encoder_decoder_whose_data_is_gone_moves_to_a_decoder(world: World) -> None:
    base = make_trained_encoder_decoder(world.root / "t5", "colour")
    adapter = make_adapter(world.root / "t5-colour", base, target_modules=["q", "v", "wo"], scale=0.02)
    seeds = [row["input"] for row in read_jsonl(world.root / "colour.train.jsonl", required=("input",))][:5]
    (world.root / "seeds.jsonl").write_text("".join(json.dumps({"input": seed}) + "\n" for seed in seeds))
    prepare = {
        "output_dir": "t5-bundles",
        "run_dir": "runs/prepare-t5",
        "source": {"model": "./t5"},
        "prompt_template": "{input}",
        "tasks": [{"name": "colour", "adapter": "t5-colour", "seeds": "seeds.jsonl", "num_samples": 12}],
    }
    world.run("prepare", world.write("prepare-t5.yaml", prepare))
    fleet = world.fleet_config("from-t5") | {"source": {"model": "./t5", "dtype": "float32"}}
    fleet["distill"]["num_workers"] = 1
    fleet["prompt_template"] = "source"  # whoever calls the adapter goes on to send the bare input
    fleet["adapters"] = [{"bundle": "t5-bundles/colour", "eval_data": "colour.test.jsonl"}]
    world.run("migrate", world.write("from-t5.yaml", fleet))
    (state,) = load_states(world.root / "runs" / "from-t5")
    assert state.status == "migrated" and state.synthesis.screen == "confidence"
    assert state.accuracy is not None and state.accuracy.source_adapter > 0.5
    moved = read_bundle(world.root / "runs/from-t5" / state.output)
    verify_bundle(moved, inspect_base(str(world.target)))
    assert moved.manifest.prompt_template == "{input}" and state.losses[-1] < state.losses[0]
    tokenizer = AutoTokenizer.from_pretrained(base)
    teacher = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base, dtype=torch.float32), adapter)
    table = pq.read_table(world.root / "runs/from-t5/adapters/colour/synthetic.parquet").to_pylist()
    answered = [row for row in table if row["answer"]]
    assert len(answered) >= 16
    for row in answered:
        ids = tokenizer(row["input"], return_tensors="pt")
        own = teacher.generate(**ids, do_sample=False, max_new_tokens=12)[0]
        assert row["answer"] == tokenizer.decode(own, skip_special_tokens=True).strip()


def test_what_the_distillation_needs_is_checked_before_anything_is_generated(world: World) -> None:
    for settings, message in (
        ({"ds_config": "zero4.json"}, "zero4.json is no file and not in ds_configs/"),
        ({"lora": {"target_modules": ["qkv_proj"]}}, "qkv_proj not in target; it has"),
        (
            {"loss": "kl"},
            "distill.loss: kl compares token by token, and the bases have different vocabularies; use auto",
        ),
    ):
        fleet = world.fleet_config("early")
        fleet["distill"] |= settings
        done = world.run("migrate", world.write("early.yaml", fleet), check=False)
        assert done.returncode == 2 and message in done.stderr
        assert "Traceback" not in done.stderr
        assert not (world.root / "runs" / "early" / "rounds").exists()
