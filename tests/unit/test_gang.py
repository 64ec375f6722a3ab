"""The gang on a whole base in one process; tests/integration has the same loop on ZeRO-3."""

import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.whole import WholeBase
from tests.tiny import ROWS, make_base
from translora.config import BaseModelConfig, TrainConfig
from translora.distill.checkpoint import (
    ASKED,
    ask_for_checkpoints,
    read_checkpoints,
    saved_gang_size,
    write_checkpoint,
)
from translora.distill.data import Sample, encode_samples, pack
from translora.distill.frozen import recompute
from translora.distill.gang import Gang
from translora.distill.job import FAILURE, TrainJob
from translora.distill.plan import GangBytes, JobSize, Layout, choose_gang_size, lay_out
from translora.distill.shrink import read_notes
from translora.distill.train import run_pass, train, train_on
from translora.engine.loading import load_model
from translora.engine.prompts import prompt_format
from translora.lora.banked import BASE_SLOT, Segment
from translora.lora.peft_io import read_lora
from translora.run.files import sha256_path, write_json, write_jsonl

CPU = torch.device("cpu")
TARGETS = ("q_proj", "v_proj", "down_proj")
CONFIG = TrainConfig.model_validate(
    {"lora": {"rank": 4, "alpha": 8}, "batch_size": 5, "micro_batch_size": 2, "max_length": 64, "epochs": 3}
)
pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def base_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("gang") / "base", request.param, std=0.1)


def make_job(root: Path, name: str, rows: Sequence[Mapping[str, object]] = ROWS, **changes: object) -> TrainJob:
    data = root / f"{name}.jsonl"
    write_jsonl(data, rows)
    paths = {"data": str(data), "output": str(root / name / "adapter"), "work_dir": str(root / name / "work")}
    job = TrainJob(name=name, **paths, seed=len(name), epochs=3, learning_rate=1e-2)
    return replace(job, **changes)  # type: ignore[arg-type]


def make_gang(base: WholeBase, queue: list[TrainJob], num_slots: int) -> Gang:
    return Gang(base, queue, CONFIG, num_slots, base_name="base", group=None)


def run(path: Path, queue: list[TrainJob], num_slots: int, dtype: torch.dtype, checkpoint: Path) -> None:
    base = WholeBase(path, dtype, TARGETS)
    train(base, make_gang(base, queue, num_slots), checkpoint, every_steps=2)


def losses(job: TrainJob) -> list[float]:
    return json.loads((Path(job.output) / "losses.json").read_text())


def test_samples_of_a_packed_batch_do_not_see_each_other(base_path: Path) -> None:
    base = WholeBase(base_path, torch.float32, TARGETS)
    samples = [Sample([5, 6, 7, 8, 9, 10, 11], [12, 13]), Sample([9], [10, 11, 12]), Sample([30] * 20, [5])]
    base.bank.route_segments([Segment(BASE_SLOT, 0, 31)])
    with torch.no_grad():
        batch = pack([(0, samples[:2], 0.5), (1, samples[2:], 1.0)], CPU)
        packed = base(batch.inputs)
        alone = []
        for sample in samples:
            inputs = pack([(0, [sample], 1.0)], CPU).inputs
            base.bank.route_segments([Segment(BASE_SLOT, 0, sum(inputs["packed_lengths"]))])
            alone.append(base(inputs))
        padded = load_model(BaseModelConfig(model=str(base_path)), torch.float32, CPU).base_model
        usual = [padded(torch.tensor([s.prompt_ids + s.answer_ids[:-1]])).last_hidden_state[0] for s in samples]
    torch.testing.assert_close(packed, torch.cat(alone))
    torch.testing.assert_close(packed, torch.cat(usual), rtol=1e-4, atol=1e-5)
    assert batch.positions_L.tolist() == [6, 7, 8, 9, 10, 30]
    assert batch.labels_L.tolist() == [12, 13, 10, 11, 12, 5]
    assert batch.weights_L.tolist() == [0.5] * 5 + [1.0]
    assert [tuple(segment) for segment in batch.segments] == [(0, 0, 11), (1, 11, 31)]
    assert batch.answers == {0: slice(0, 5), 1: slice(5, 6)}


ODD = {"short": {"rows": ROWS[:2]}, "long": {"epochs": 9.0}, "mad": {}, "unusable": {}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_ends_the_same_whoever_its_neighbours_are(
    base_path: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Neighbours that are shorter, longer, not a number, of another rank, without a usable sample; and none at all."""
    company, alone = tmp_path / "company", tmp_path / "alone"
    company.mkdir(), alone.mkdir()
    odd = [make_job(company, name, **changes) for name, changes in ODD.items()]
    write_jsonl(Path(odd[-1].data), [{"input": "far too long " * 40, "answer": "x"}])
    queue = [odd[0], make_job(company, "one"), *odd[1:], make_job(company, "late")]
    base = WholeBase(base_path, dtype, TARGETS)
    gang = make_gang(base, queue, num_slots=4)
    gang.fill()
    gang.close(0)
    gang.config = CONFIG.model_copy(update={"lora": CONFIG.lora.model_copy(update={"rank": 7})})
    gang.open(0, 0)
    gang.config = CONFIG
    gang.students[3].flat.data.fill_(float("nan"))
    train(base, gang, tmp_path / "company.safetensors", every_steps=100)
    for name in ("one", "late"):
        job = make_job(alone, name)
        run(base_path, [job], 1, dtype, tmp_path / "alone.safetensors")
        with_others = make_job(company, name)
        if dtype == torch.bfloat16:
            assert losses(job) == losses(with_others)
            one, other = (Path(j.output) / "adapter_model.safetensors" for j in (job, with_others))
            assert one.read_bytes() == other.read_bytes()
        torch.testing.assert_close(losses(job), losses(with_others), rtol=1e-5, atol=1e-5)
        for module, pair in read_lora(job.output).modules.items():
            for mine, theirs in zip(pair, read_lora(with_others.output).modules[module], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
        assert losses(job)[-1] < losses(job)[0] - 0.1, "it was trained"
    assert len(losses(make_job(company, "short"))) == 3 and len(losses(make_job(company, "long"))) == 18
    assert read_lora(company / "short" / "adapter").max_rank == 7
    assert "lower the learning rate" in (company / "mad" / "work" / FAILURE).read_text()
    assert "raise max_length" in (company / "unusable" / "work" / FAILURE).read_text()
    assert not (company / "mad" / "adapter").exists()


def test_a_student_comes_closer_to_its_teachers_probabilities_whoever_its_neighbours_are(
    base_path: Path, tmp_path: Path
) -> None:
    """The loss kl: equal to the divergence on the whole vocabulary, falling, and bitwise the same beside others."""
    config = CONFIG.model_copy(update={"loss": "kl", "kl_top_k": 3, "batch_size": len(ROWS), "epochs": 8})
    base = WholeBase(base_path, torch.float32, TARGETS)
    prompts = prompt_format(base.tokenizer)
    rows = []
    for row in ROWS:
        ids = prompts.encode_pair(row["input"], row["answer"])[1]
        thought = {
            "answer_ids": ids,
            "tokens": [[token, 7, 9] for token in ids],
            "log_p": [[-0.5, -1.5, -3.0]] * len(ids),
        }
        rows.append({**row, "teacher": thought})
    answers: dict[str, list[bytes]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for company in (["one"], ["other", "one"]):
            root = tmp_path / f"{dtype}-{len(company)}"
            root.mkdir()
            queue = [
                make_job(root, name, rows if name == "one" else ROWS, epochs=30, learning_rate=3e-2) for name in company
            ]
            base = WholeBase(base_path, dtype, TARGETS)
            gang = Gang(base, queue, config, 2, base_name="base", group=None)
            train(base, gang, root / "gang.safetensors", every_steps=100)
            answers.setdefault(str(dtype), []).append((root / "one/adapter/adapter_model.safetensors").read_bytes())
            if dtype == torch.float32:
                found = losses(queue[-1])
    assert answers["torch.bfloat16"][0] == answers["torch.bfloat16"][1]
    assert found[-1] < 0.7 * found[0]

    model = load_model(BaseModelConfig(model=str(base_path)), torch.float32, CPU)
    total, count = 0.0, 0
    for row, sample in zip(rows, encode_samples(rows, prompts, 64, "one"), strict=True):
        tokens, log_p = (torch.tensor(row["teacher"][key]) for key in ("tokens", "log_p"))  # type: ignore[index]
        with torch.no_grad():
            logits = model(torch.tensor([sample.prompt_ids + sample.answer_ids[:-1]])).logits[0]
        q = logits[len(sample.prompt_ids) - 1 :].softmax(-1).gather(1, tokens)
        p, q = (torch.cat([part, 1 - part.sum(-1, keepdim=True)], dim=-1) for part in (log_p.exp(), q))
        total, count = total + float((p * (p / q).log()).sum()), count + len(tokens)
    assert found[0] == pytest.approx(total / count, rel=1e-4)


def test_a_student_learns_each_of_its_teachers_answers_by_its_probability(base_path: Path, tmp_path: Path) -> None:
    """Soft labels: the first loss is transformers' own of each answer, weighted; the same bytes beside others."""
    config = CONFIG.model_copy(update={"batch_size": len(ROWS), "epochs": 1})
    rows = [{**row, "teacher": {"probabilities": {row["answer"]: 0.7, "no idea": 0.3}}} for row in ROWS]
    made: list[bytes] = []
    for company in (["one"], ["other", "one"]):
        root = tmp_path / str(len(company))
        root.mkdir()
        queue = [make_job(root, name, rows if name == "one" else ROWS) for name in company]
        base = WholeBase(base_path, torch.bfloat16, TARGETS)
        train(base, Gang(base, queue, config, 2, base_name="base", group=None), root / "gang.safetensors", 100)
        made.append((root / "one/adapter/adapter_model.safetensors").read_bytes())
    assert made[0] == made[1]

    base = WholeBase(base_path, torch.float32, TARGETS)
    job = make_job(tmp_path, "one", rows)
    train(base, Gang(base, [job], config, 1, base_name="base", group=None), tmp_path / "gang.safetensors", 100)
    model, prompts = (
        load_model(BaseModelConfig(model=str(base_path)), torch.float32, CPU),
        prompt_format(base.tokenizer),
    )
    total, count = 0.0, 0.0
    for row in rows:
        for answer, p in ((row["answer"], 0.7), ("no idea", 0.3)):
            prompt_ids, answer_ids = prompts.encode_pair(str(row["input"]), str(answer))
            with torch.no_grad():
                logits = model(torch.tensor([prompt_ids + answer_ids[:-1]])).logits[0, len(prompt_ids) - 1 :]
            total -= p * float(logits.log_softmax(-1).gather(1, torch.tensor(answer_ids)[:, None]).sum())
            count += p * len(answer_ids)
    assert losses(job)[0] == pytest.approx(total / count, rel=1e-4)


def test_a_gang_goes_on_from_its_checkpoint_to_the_same_bytes(base_path: Path, tmp_path: Path) -> None:
    roots = [tmp_path / name for name in ("whole", "cut", "other_slots")]
    for root in roots:
        root.mkdir()
    queues = [[make_job(root, "a"), make_job(root, "bb", ROWS[:3]), make_job(root, "ccc", epochs=5)] for root in roots]
    run(base_path, queues[0], 2, torch.bfloat16, roots[0] / "gang.safetensors")

    # The same, killed after the fourth step: bb has left, ccc has begun.
    base = WholeBase(base_path, torch.bfloat16, TARGETS)
    gang = make_gang(base, queues[1], 2)
    for _ in range(4):
        gang.fill()
        for shards in gang.shards():
            run_pass(base, gang, shards)
        gang.update()
    assert {student.job.name for student in gang.students.values()} == {"a", "ccc"}
    write_checkpoint(roots[1] / "gang-0000.safetensors", gang)
    (roots[2] / "gang-0000.safetensors").write_bytes((roots[1] / "gang-0000.safetensors").read_bytes())

    for root, queue, num_slots in ((roots[1], queues[1], 2), (roots[2], queues[2], 3)):
        base = WholeBase(base_path, torch.bfloat16, TARGETS)
        gang = make_gang(base, queue, num_slots)
        read_checkpoints(root, "gang-0000.safetensors", gang)
        # Recipes depend on the data, not on where it lies: another layout goes on from each student's own state.
        assert len(gang.students) == (2 if num_slots == 2 else 0)
        assert len(gang.saved) == (0 if num_slots == 2 else 2)
        train(base, gang, root / "gang-0000.safetensors", every_steps=100)
        for job, whole in zip(queue, queues[0], strict=True):
            assert sha256_path(Path(job.output)) == sha256_path(Path(whole.output)), job.name
    steps = [json.loads(line)["step"] for line in (roots[1] / "a" / "work" / "train.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 7)), "no step is done twice"


def test_a_job_that_was_given_up_is_not_opened_from_a_checkpoint(base_path: Path, tmp_path: Path) -> None:
    queue = [make_job(tmp_path, "a"), make_job(tmp_path, "bb")]
    gang = make_gang(WholeBase(base_path, torch.bfloat16, TARGETS), queue, 1)
    gang.fill()
    write_checkpoint(tmp_path / "gang-0000.safetensors", gang)
    for refused, opened in ((set(), "a"), ({"a"}, "bb")):
        base = WholeBase(base_path, torch.bfloat16, TARGETS)
        again = Gang(base, queue, CONFIG, 1, base_name="base", group=None, refused=refused)
        read_checkpoints(tmp_path, "gang-0000.safetensors", again)
        again.fill()
        assert [student.job.name for student in again.students.values()] == [opened]


def test_jobs_that_were_given_up_before_a_kill_are_given_up_after_it(base_path: Path, tmp_path: Path) -> None:
    unusable = [{"input": "far too long " * 40, "answer": "x"}]
    queue = [make_job(tmp_path, "unusable", unusable), make_job(tmp_path, "mad"), make_job(tmp_path, "good")]
    checkpoint = tmp_path / "gang-0000.safetensors"
    gang = make_gang(WholeBase(base_path, torch.float32, TARGETS), queue, 2)
    gang.fill()
    next(one for one in gang.students.values() if one.job.name == "mad").flat.data.fill_(math.nan)
    for _ in range(3):
        for shards in gang.shards():
            run_pass(gang.slots.base, gang, shards)  # type: ignore[attr-defined]
        gang.update()
        write_checkpoint(checkpoint, gang)
        gang.fill()
    before = {job.name: job.failure() for job in queue}
    assert "max_length" in str(before["unusable"]) and "loss nan" in str(before["mad"]) and before["good"] is None

    for job in queue:  # as a driver does that starts again
        (Path(job.work_dir) / FAILURE).unlink(missing_ok=True)
    gang = make_gang(WholeBase(base_path, torch.float32, TARGETS), queue, 2)
    read_checkpoints(tmp_path, checkpoint.name, gang)
    train(gang.slots.base, gang, checkpoint, every_steps=1)  # type: ignore[attr-defined]
    assert {job.name: job.failure() for job in queue} == before
    assert [Path(job.output).exists() for job in queue] == [False, False, True]


def test_a_rank_takes_the_states_of_its_own_queue_alone(base_path: Path, tmp_path: Path) -> None:
    queue = [make_job(tmp_path, "a"), make_job(tmp_path, "bb")]
    gang = make_gang(WholeBase(base_path, torch.bfloat16, TARGETS), queue, 2)
    gang.fill()
    write_checkpoint(tmp_path / "gang-0000.safetensors", gang)
    other = make_gang(WholeBase(base_path, torch.bfloat16, TARGETS), queue[1:], 1)
    read_checkpoints(tmp_path, "gang-0001.safetensors", other)
    assert set(other.saved) == set(other.recipes)


def test_recomputed_activations_give_the_same_bytes(base_path: Path, tmp_path: Path) -> None:
    outputs = []
    for name in ("kept", "recomputed"):
        (tmp_path / name).mkdir()
        queue = [make_job(tmp_path / name, "a"), make_job(tmp_path / name, "bb", ROWS[:3])]
        base = WholeBase(base_path, torch.bfloat16, TARGETS)
        calls: list[int] = []
        base.model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if name == "recomputed":
            recompute(base.model)
        train(base, make_gang(base, queue, 2), tmp_path / name / "gang.safetensors", every_steps=100)
        outputs.append(([sha256_path(Path(job.output)) for job in queue], len(calls)))
    assert outputs[0][0] == outputs[1][0]
    assert outputs[1][1] == 2 * outputs[0][1], "every forward pass is done twice"


def test_data_that_cannot_be_read_any_more_ends_that_job_alone(base_path: Path, tmp_path: Path) -> None:
    gone, good = make_job(tmp_path, "gone"), make_job(tmp_path, "good")
    Path(gone.data).unlink()
    base = WholeBase(base_path, torch.bfloat16, TARGETS)
    train(base, make_gang(base, [gone, good], 2), tmp_path / "gang.safetensors", every_steps=1)
    assert "cannot be read" in (tmp_path / "gone" / "work" / FAILURE).read_text()
    assert len(losses(good)) == 6


class NarrowBase(WholeBase):
    """A base that takes more memory than any machine has for a pass of more than so many tokens."""

    most_tokens = 60

    def __call__(self, inputs: dict[str, object]) -> torch.Tensor:
        ids = inputs["input_ids"]
        assert isinstance(ids, torch.Tensor)
        if ids.shape[1] > self.most_tokens:
            torch.empty(10**15)
        return super().__call__(inputs)

    def free_bytes(self) -> int:
        return 10**12

    def gang_bytes(self, train: TrainConfig, num_samples: int, num_tokens: int) -> GangBytes:
        return GangBytes(backward=(0, 1))


def test_passes_that_are_too_large_are_made_smaller_and_an_adapter_that_is_too_large_is_given_up(
    base_path: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "gang"
    directory.mkdir()
    long = [{"input": "far too long " * 8, "answer": "yes"}]
    queue = [make_job(tmp_path, "a"), make_job(tmp_path, "bb", [*ROWS, *long]), make_job(tmp_path, "ccc")]
    config = CONFIG.model_copy(update={"max_length": 256, "checkpoint_every_steps": 1})
    for _ in range(12):  # as Ray Train's restarts
        base = NarrowBase(base_path, torch.float32, TARGETS)
        try:
            train_on(base, queue, config, directory, "base")  # type: ignore[arg-type]
            break
        except RuntimeError as error:
            assert "can't allocate memory" in str(error)
    notes = read_notes(directory)
    assert len(notes) > 1 and notes[0]["gang_size"] == 3 and notes[-1]["micro_batch_size"] == 1
    reason = json.loads((tmp_path / "bb" / "work" / FAILURE).read_text())["reason"]
    assert reason.startswith("bb: out of memory with one sample in the pass") and "lower max_length" in reason
    for name in ("a", "ccc"):
        alone = tmp_path / "alone"
        alone.mkdir(exist_ok=True)
        job = make_job(alone, name)
        run(base_path, [job], 1, torch.float32, tmp_path / "alone.safetensors")
        torch.testing.assert_close(losses(job), losses(make_job(tmp_path, name)), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_is_never_older_than_its_time(base_path: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "gang-0000.safetensors"
    base = WholeBase(base_path, torch.float32, TARGETS)
    gang = make_gang(base, [make_job(tmp_path, "a")], 1)
    written: list[int] = []
    update = gang.update

    def update_and_look() -> bool:
        written.append(checkpoint.is_file())
        return update()

    gang.update = update_and_look  # type: ignore[method-assign]
    train(base, gang, checkpoint, every_steps=1000, every_seconds=0.0)
    assert written == [False, True, True, True, True, True]


def test_a_checkpoint_is_written_when_the_driver_asks_for_it(base_path: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "gang-0000.safetensors"
    write_json(tmp_path / "plan.json", {"checkpoints": [checkpoint.name]})
    base = WholeBase(base_path, torch.float32, TARGETS)
    gang = make_gang(base, [make_job(tmp_path, "a", epochs=60)], 1)
    asking: list[threading.Thread] = []
    update = gang.update

    def update_and_ask() -> bool:
        if gang.students[0].step == 3:
            asking.append(threading.Thread(target=ask_for_checkpoints, args=(tmp_path, 20.0)))
            asking[0].start()
            while not (tmp_path / ASKED).is_file():
                time.sleep(0.01)
        if gang.students[0].step == 4:
            assert saved_gang_size(tmp_path) == 1, "written after the step in which it was asked for"
            asking[0].join(5)
            assert not asking[0].is_alive(), "and waited for no longer than that"
        return update()

    gang.update = update_and_ask  # type: ignore[method-assign]
    train(base, gang, checkpoint, every_steps=1000)
    assert len(asking) == 1


def test_states_that_wait_for_their_turn_survive_further_checkpoints(base_path: Path, tmp_path: Path) -> None:
    queue = [make_job(tmp_path, "a"), make_job(tmp_path, "bb")]
    base = WholeBase(base_path, torch.float32, TARGETS)
    gang = make_gang(base, queue, 1)
    waiting = {"weights": torch.ones(3), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    gang.saved[gang.recipes[1]] = (waiting, [3.0, 2.0])
    gang.saved["another run's"] = (waiting, [1.0])
    gang.fill()
    write_checkpoint(tmp_path / "gang-0000.safetensors", gang)
    stale = make_gang(base, queue, 1)
    stale.saved[gang.recipes[1]] = (waiting, [3.0])
    write_checkpoint(tmp_path / "gang-0007.safetensors", stale)
    again = make_gang(base, queue, 3)
    read_checkpoints(tmp_path, "gang-0000.safetensors", again)
    assert again.saved[gang.recipes[1]][1] == [3.0, 2.0], "the longest wins, whatever file it lies in"
    assert again.saved.keys() == set(gang.recipes) and not again.students


def test_a_checkpoint_that_cannot_be_read_costs_no_more_than_its_steps(base_path: Path, tmp_path: Path) -> None:
    (tmp_path / "gang-0000.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    base = WholeBase(base_path, torch.float32, TARGETS)
    gang = make_gang(base, [make_job(tmp_path, "a")], 1)
    read_checkpoints(tmp_path, "gang-0000.safetensors", gang)
    gang.fill()
    assert gang.students[0].step == 0


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4))
def test_passes_hold_every_sample_of_a_step_once(size: int, num_ranks: int, micro_batch_size: int) -> None:
    batch = [Sample([index], [index]) for index in range(size)]
    seen = []
    for rank in range(num_ranks):
        share = Gang.__new__(Gang)
        share.rank, share.num_ranks = rank, num_ranks
        share.config = CONFIG.model_copy(update={"micro_batch_size": micro_batch_size})
        share.students = {3: type("Stand-in", (), {"begin_step": lambda self: None, "batch": lambda self: batch})()}  # type: ignore[dict-item]
        for shards in share.shards():
            for slot, samples, weight in shards:
                assert slot == 3 and weight == 1 / size and len(samples) <= micro_batch_size
                seen += [sample.prompt_ids[0] for sample in samples]
    assert sorted(seen) == list(range(size))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 8))
def test_every_job_has_one_group_and_no_group_waits_long(steps: list[int], num_workers: int) -> None:
    layout = lay_out([JobSize(count, 10.0, 20) for count in steps], num_workers)
    assert sorted(index for queue in layout.queues for index in queue) == list(range(len(steps)))
    assert layout.ranks_per_group * len(layout.queues) == num_workers
    if len(steps) >= num_workers:
        assert layout.ranks_per_group == 1
        loads = [sum(steps[index] for index in queue) for queue in layout.queues]
        assert max(loads) <= 4 / 3 * max(sum(steps) / num_workers, max(steps)) + max(steps) / 3
    assert all(steps[a] >= steps[b] for queue in layout.queues for a, b in pairwise(queue))


def test_ranks_share_an_adapter_only_where_there_are_fewer_adapters_than_ranks() -> None:
    size = JobSize(10, 50.0, 60)
    assert lay_out([size], 8).ranks_per_group == 8
    assert lay_out([size] * 3, 8).ranks_per_group == 2
    assert lay_out([size] * 5, 8).ranks_per_group == 1
    assert lay_out([size], 3).ranks_per_group == 3


def test_the_gang_fills_a_pass_unless_memory_or_the_queue_ends_before() -> None:
    sizes, layout = [JobSize(10, 32.0, 64)] * 40, Layout(1, (tuple(range(40)),))
    config = TrainConfig(batch_size=8, micro_batch_size=8)
    mib = 2**20

    def need(num_samples: int, num_tokens: int) -> GangBytes:
        return GangBytes(backward=(100 * mib, num_samples * num_tokens * mib), loss=((0, mib), (10**4 * mib, 1)))

    def chosen(config: TrainConfig = config, layout: Layout = layout, free: int = 10**6, device: str = "cpu") -> int:
        return choose_gang_size(sizes, layout, config, device=device, free_bytes=free * mib, gang_bytes=need)

    assert chosen() == 16  # 4096 tokens at 8 samples of 32
    assert chosen(device="cuda") == 40  # 64 would fill it, 40 are there
    assert chosen(free=2000) == 3  # (0.85 * 2000 - 100) / (8 samples of 64 tokens at 1 MiB)
    assert chosen(config.model_copy(update={"tokens_per_pass": 512})) == 2
    assert chosen(free=1) == 1
    assert chosen(layout=Layout(1, ((0, 1, 2),))) == 3
    assert chosen(config.model_copy(update={"gang_size": 5})) == 5
    assert chosen(config.model_copy(update={"gang_size": 99})) == 40
