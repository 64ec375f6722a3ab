"""Starts one Ray Train worker group for all the adapters of a base and follows its progress."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from translora.bundle.base import info_of
from translora.config import BaseModelConfig, ResourceConfig, TrainConfig
from translora.distill.checkpoint import ask_for_checkpoints
from translora.distill.job import TrainJob
from translora.distill.shrink import read_notes
from translora.distill.train import train_worker
from translora.run.files import digest, remove_directory
from translora.run.progress import Progress
from translora.run.signals import TERMINATED, exit_code, interruptible_fit

logger = logging.getLogger(__name__)
OnStep = Callable[[TrainJob, dict[str, float]], None]
POLL_SECONDS = 0.5
CHECKPOINT_SECONDS = 20.0
"""How long a driver that was told to end waits for the gangs' checkpoints."""
MAX_NOTES = 30
"""Passes that may run out of memory until they are as small as can be; beyond them each note gives up a job."""


class Follower:
    """Reads the jobs' train.jsonl while they grow and hands each new step to `on_step(job, row)`."""

    def __init__(self, jobs: Sequence[TrainJob], on_step: OnStep) -> None:
        self._paths = [(job, Path(job.work_dir) / "train.jsonl") for job in jobs]
        # A rerun repeats no line that an earlier run already reported.
        self._offsets = {path: path.stat().st_size if path.is_file() else 0 for _, path in self._paths}
        self._on_step = on_step
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if kind is not None:
            return  # what went wrong goes before what could not be reported
        if self._error is not None:
            raise self._error
        self._poll()

    def _run(self) -> None:
        try:
            while not self._stop.wait(POLL_SECONDS):
                self._poll()
        except Exception as error:  # a full disk, say: the training goes on, and its end says so
            self._error = error

    def _poll(self) -> None:
        for job, path in self._paths:
            if not path.is_file():
                continue
            with open(path, encoding="utf-8") as handle:
                handle.seek(self._offsets[path])
                while (line := handle.readline()).endswith("\n"):
                    self._offsets[path] = handle.tell()
                    with contextlib.suppress(json.JSONDecodeError):  # half of it is from a worker that was killed
                        row = json.loads(line)
                        self._on_step(job, row)


def train_adapters(
    base: BaseModelConfig,
    base_name: str,
    jobs: Sequence[TrainJob],
    config: TrainConfig,
    resources: ResourceConfig,
    run_dir: Path,
    *,
    label: str,
    on_step: OnStep | None = None,
) -> None:
    """Train every job whose output does not exist yet, in gangs on one worker group that loads the base once.

    Args:
        base: the frozen base of all jobs.
        base_name: name written into the adapters' configs.
        jobs: trained in this order.
        config: shared settings; epochs and learning rate are each job's own.
        resources: `gpus_per_actor` > 0 gives every worker a GPU.
        run_dir: Ray Train's own files go below it.
        label: of the progress that is shown.
        on_step: called from a thread with each job and {step, num_steps, loss, seconds}.

    Raises:
        ray.train.TrainingFailedError: a worker failed more than `config.max_failures` times.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what is finished and the checkpoints are kept.
    """
    identity = info_of(base).identity
    missing = [job for job in jobs if not job.is_done(config, identity)]
    # All jobs, also those that are done: a resumed run must find the same gangs again.
    directory = run_dir / "gangs" / digest([job.name for job in jobs])
    if not missing:
        remove_directory(directory)  # of a driver that was killed after the last adapter
        return
    logger.info(
        "training on %s: %d adapters and discriminators, starting %d workers",
        base_name,
        len(missing),
        config.num_workers,
    )
    directory.mkdir(parents=True, exist_ok=True)
    trainer = functools.partial(make_trainer, base, base_name, jobs, config, resources, run_dir, directory)
    steps: dict[str, int] = {}

    def after_step(job: TrainJob, row: dict[str, float]) -> None:
        step = steps[job.name] = int(row["step"])
        progress.update(sum(steps.values()), f"{job.name} {step}/{int(row['num_steps'])} loss {row['loss']:.3f}")
        if on_step is not None:
            on_step(job, row)

    total = sum(job.expected_steps(config.batch_size) for job in missing)
    with Progress(label, total, run_dir) as progress, Follower(jobs, after_step):
        fit(trainer, directory, most_notes=len(jobs) + MAX_NOTES)
    if lost := [job.name for job in jobs if job.failure() is None and not job.is_done(config, identity)]:
        raise RuntimeError(f"neither trained nor given up: {', '.join(lost)}")
    remove_directory(directory)


def make_trainer(
    base: BaseModelConfig,
    base_name: str,
    jobs: Sequence[TrainJob],
    config: TrainConfig,
    resources: ResourceConfig,
    run_dir: Path,
    directory: Path,
) -> TorchTrainer:
    """A worker group of Ray Train for these jobs; `directory` is for the gangs' checkpoints, the rest as above."""
    use_gpu = resources.gpus_per_actor > 0
    per_worker: dict[str, float] = {"GPU": 1.0} if use_gpu else {"CPU": 1.0}
    spec = {
        "base": base.model_dump(),
        "base_name": base_name,
        "train": config.model_dump(),
        "jobs": [dataclasses.asdict(job) for job in jobs],
        "directory": str(directory),
        "use_gpu": use_gpu,
        "max_threads": int(resources.cpus_per_actor),
        "limit_seconds": resources.worker_timeout_seconds,
    }
    return TorchTrainer(
        train_worker,
        train_loop_config=spec,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers, use_gpu=use_gpu, resources_per_worker=per_worker
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(run_dir / "ray_train"),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
        ),
    )


def fit(trainer: Callable[[], TorchTrainer], directory: Path, most_notes: int) -> None:
    """Train to the end; a worker group that ran out of memory starts again with smaller passes.

    Args:
        trainer: makes a new one, because each can be run once.
        directory: of the gangs' checkpoints.
        most_notes: of passes that were too large.

    Raises:
        ray.train.TrainingFailedError, KeyboardInterrupt: as in train_adapters.
    """
    while True:
        num_notes = len(read_notes(directory))
        try:
            with interruptible_fit():
                trainer().fit()
            return
        except ray.train.TrainingFailedError:
            if not num_notes < len(read_notes(directory)) < most_notes:
                raise
        except KeyboardInterrupt:
            if exit_code() == TERMINATED:  # after Ctrl-C Ray Train has ended the workers already
                ask_for_checkpoints(directory, CHECKPOINT_SECONDS)
            raise
