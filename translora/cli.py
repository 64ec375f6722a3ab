"""The command line: translora migrate | prepare | evaluate | merge | plan | status | report.

EXIT_CODES says what the numbers mean that a command ends with.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import io
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from translora import __version__
from translora.config import FleetConfig, PrepareConfig, ResourceConfig, load_config
from translora.config.merge import METHODS, merge_config
from translora.config.prepare import NUM_SAMPLES
from translora.errors import InputError
from translora.evaluate.config import EvaluateConfig
from translora.plan.hardware import ACCEPTANCE, ACCEPTANCE_REFUSING, GPUS, Hardware
from translora.run.cluster import BROKEN
from translora.run.faults import RunFailedError, cluster_faults
from translora.run.files import full_disk
from translora.run.lease import LeaseLostError
from translora.run.redact import printable, redact
from translora.run.rundir import check_free
from translora.run.signals import INTERRUPTED, exit_code, unwind_on_sigterm

if TYPE_CHECKING:
    from rich.console import Console

    from translora.run.state import AdapterState

logger = logging.getLogger(__name__)
MIGRATED, FAILED, UNUSABLE, CRASHED = 0, 1, 2, 70
UNREACHABLE = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR}
"""What is wrong with a path that somebody gave."""
EXIT_CODES = """\
exit codes: 0 everything was done, 1 some adapters failed or were quarantined, 2 the input cannot be used, 70 an error
that nobody foresaw (with its traceback), 3 a worker, the cluster or the disk failed, 130 Ctrl-C, 143 SIGTERM; after the
last three the same command continues (a merge begins again)"""


def build_parser() -> argparse.ArgumentParser:
    """The argument parser; importing it loads neither torch nor ray."""
    parser = argparse.ArgumentParser(
        prog="translora",
        description="Move fleets of LoRA adapters to a new base model, nearly without data.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"translora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    migrate = commands.add_parser("migrate", help="migrate a fleet of bundles; a rerun continues where it stopped")
    migrate.add_argument("config", type=Path, help="fleet.yaml")
    migrate.set_defaults(work=run_migrate)
    prepare = commands.add_parser(
        "prepare", help="the owner's side: make bundles from task data, or an adapter and seeds"
    )
    prepare.add_argument("config", type=Path, help="prepare.yaml")
    prepare.set_defaults(work=run_prepare)
    evaluate = commands.add_parser("evaluate", help="measure on real task data what migrations keep, and report it")
    evaluate.add_argument("config", type=Path, help="evaluate.yaml")
    evaluate.add_argument("--report-only", action="store_true", help="write the report again from its JSON")
    evaluate.set_defaults(work=run_evaluate)
    add_merge(commands.add_parser("merge", help="merge LoRA adapters of one base into one plain adapter"))
    add_plan(commands.add_parser("plan", help="what a fleet takes of which GPUs, before anything is loaded"))
    status = commands.add_parser("status", help="show where a run stands, also while it goes on")
    status.add_argument("run", type=Path, help="run directory")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.add_argument("--watch", type=seconds, metavar="SECONDS", help="show it again every so often, until Ctrl-C")
    status.set_defaults(work=run_status)
    report = commands.add_parser("report", help="write the HTML report of a run again and print its table")
    report.add_argument("run", type=Path, help="run directory")
    report.set_defaults(work=run_report)
    for command in (migrate, prepare, evaluate):
        command.add_argument("--verbose", action="store_true", help="show the libraries' own logs too")
    return parser


def add_merge(merge: argparse.ArgumentParser) -> None:
    """The flags of `translora merge`; each is a field of MergeConfig."""
    merge.add_argument("method", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    merge.add_argument("--adapters", type=Path, nargs="+", required=True, help="PEFT directories (bundles too)")
    merge.add_argument(
        "--data", type=Path, nargs="+", help="JSONL or synthetic.parquet: one for each adapter, for cat any number"
    )
    merge.add_argument("--out", type=Path, required=True, help="directory of the merged adapter")
    merge.add_argument("--base", help="model directory or hub id; default: what the adapters name")
    merge.add_argument("--weights", type=float, nargs="+", help="one for each adapter")
    merge.add_argument("--rank", type=int, help="truncate the result to this rank")
    merge.add_argument("--seed", type=int, help="root of every random number")
    merge.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings, such as iteris.max_iter=5")
    merge.add_argument("--verbose", action="store_true", help="show the libraries' own logs too")
    merge.set_defaults(work=run_merge)


def add_plan(plan: argparse.ArgumentParser) -> None:
    """The flags of `translora plan`."""
    plan.add_argument("config", type=Path, help="fleet.yaml; of the bases their config.json is enough")
    plan.add_argument("--gpu", choices=GPUS, default="h100-80gb", metavar="GPU", help=", ".join(GPUS))
    plan.add_argument("--gpus", type=positive, nargs="+", default=[8], metavar="N", help="a plan for each (default: 8)")
    plan.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="default: 8")
    plan.add_argument("--network", type=positive, default=3200, metavar="GBIT", help="Gbit/s of a node (default: 3200)")
    plan.add_argument("--adapters", type=positive, metavar="N", help="plan for so many; the bundles are not looked at")
    plan.add_argument("--samples", type=positive, metavar="N", help=f"|D| of each of them (default: {NUM_SAMPLES})")
    usual = f"{ACCEPTANCE}, and {ACCEPTANCE_REFUSING} with `screen: discriminator`"
    plan.add_argument(
        "--acceptance", type=share, help=f"share of generated inputs neither dropped nor refused (default: {usual})"
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(work=run_plan)


MOST = 1_000_000
"""Of what `plan` counts."""


def positive(text: str) -> int:
    """A whole number above 0."""
    if not 1 <= (value := int(text)) <= MOST:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not within 1 and {MOST:,}")
    return value


def seconds(text: str) -> float:
    """A time above 0."""
    if not 0 < (value := float(text)) < threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text} is no time above 0")
    return value


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an arrow in a terminal that has none is no reason to end
    try:
        code = int(arguments.work(arguments))
        with closed_pipe_is_no_fault():
            sys.stdout.flush()
        return code
    except (RunFailedError, LeaseLostError) as error:
        say(f"{error}; what is finished is kept, the same command continues")
        return BROKEN
    except InputError as error:
        logger.debug("", exc_info=True)
        say(str(error))
        return UNUSABLE
    except OSError as error:
        if error.errno in UNREACHABLE and error.filename:
            logger.debug("", exc_info=True)
            say(f"{error.filename}: {error.strerror}; correct the path, or ask for permission")
            return UNUSABLE
        if not full_disk(error):
            return crashed()
        where = f"{error.filename}: " if error.filename else ""
        say(f"{where}{error.strerror}; free some space: what is finished is kept, the same command continues")
        return BROKEN
    except KeyboardInterrupt:
        code = exit_code()
        what = "interrupted" if code == INTERRUPTED else "terminated"
        say(f"{what}; what is finished is kept, the same command continues")
        return code
    except Exception:
        return crashed()


@contextlib.contextmanager
def closed_pipe_is_no_fault() -> Iterator[None]:
    """Write no more to a reader that has gone away, `head` for instance; the exit code stays the command's."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def crashed() -> int:
    """Show the traceback of an error that no part foresaw, with an exit code that none of the foreseen ends has."""
    logger.exception("an error that was not foreseen; what is finished is kept")
    return CRASHED


def say(text: str) -> None:
    """One line on stderr on how the command ended."""
    shown = printable(redact(text))
    sys.stderr.write(f"translora: {shown}\n")


def begin(arguments: argparse.Namespace) -> None:
    """What comes before a command that works: its logs, and a SIGTERM that unwinds."""
    from translora.run.log import setup_logging

    setup_logging(arguments.verbose)
    unwind_on_sigterm()


def start_cluster(resources: ResourceConfig, num_workers: int, verbose: bool) -> None:
    """Start or join Ray and refuse what it could never give; the nodes of launch/migrate.sbatch are all there is."""
    from translora.run.cluster import check_resources, start_ray

    is_local = start_ray(address=resources.ray_address, on_gpu=resources.gpus_per_actor > 0, verbose=verbose)
    is_fixed = is_local or "TRANSLORA_FIXED_CLUSTER" in os.environ
    check_resources(resources, num_workers, may_grow=not is_fixed)


def run_migrate(arguments: argparse.Namespace) -> int:
    """`translora migrate fleet.yaml`."""
    begin(arguments)
    config = load_config(arguments.config, FleetConfig)
    check_free(config.run_dir, config.command)
    from translora.fleet import migrate

    with cluster_faults():
        states = migrate(config, lambda: start_cluster(config.resources, config.distill.num_workers, arguments.verbose))
    print_report(config.run_dir, states)
    return MIGRATED if all(state.status in ("migrated", "merged") for state in states) else FAILED


def run_prepare(arguments: argparse.Namespace) -> int:
    """`translora prepare prepare.yaml`."""
    begin(arguments)
    config = load_config(arguments.config, PrepareConfig)
    check_free(config.run_dir, config.command)
    from translora.prepare import TasksFailedError, prepare

    reasons: list[str] = []
    try:
        with cluster_faults():
            num_workers = config.train.num_workers
            bundles = prepare(config, lambda: start_cluster(config.resources, num_workers, arguments.verbose))
    except TasksFailedError as error:
        bundles, reasons = error.bundles, list(error.reasons.values())
    for bundle in bundles:
        sys.stdout.write(f"{bundle.path}\n")
    for reason in reasons:
        say(reason)
    return MIGRATED if not reasons else FAILED if bundles else UNUSABLE


def run_evaluate(arguments: argparse.Namespace) -> int:
    """`translora evaluate evaluate.yaml`."""
    begin(arguments)
    config = load_config(arguments.config, EvaluateConfig)
    from translora.evaluate.render import read_results, write_report, write_results

    if arguments.report_only:
        results = read_results(config.output)
        write_report(results, config.output)
    else:
        check_free(config.run_dir, config.command)
        from translora.evaluate.run import evaluate

        num_workers = max(config.train.num_workers, config.distill.num_workers)
        with cluster_faults():
            results = evaluate(config, lambda: start_cluster(config.resources, num_workers, arguments.verbose))
        write_results(results, config.output)
    sys.stdout.write(f"{config.output}\n")
    return MIGRATED if all(one.accuracy is not None for one in results.migrations) else FAILED


def run_merge(arguments: argparse.Namespace) -> int:
    """`translora merge METHOD --adapters ... --out ...`."""
    begin(arguments)
    flags = ("method", "adapters", "data", "out", "base", "weights", "rank", "seed")
    config = merge_config({flag: getattr(arguments, flag) for flag in flags}, arguments.set)
    from translora.merge.run import merge

    try:
        merged = merge(config)
    except KeyboardInterrupt:
        say("ended before the merge was done; nothing was written")
        return exit_code()
    sys.stdout.write(f"{merged}\n")
    return MIGRATED


def run_plan(arguments: argparse.Namespace) -> int:
    """`translora plan fleet.yaml`."""
    gc.set_threshold(100_000)  # by default the collector takes a seventh of these ten seconds, to find nothing
    config = load_config(arguments.config, FleetConfig)
    from translora.plan.fleet import plan_fleet
    from translora.plan.render import as_json, print_plans
    from translora.plan.shape import read_shapes
    from translora.plan.work import bundled_work, given_work

    if arguments.samples and not arguments.adapters:
        raise InputError("--samples: is of the N adapters of --adapters; give both, or num_samples in the fleet file")
    if arguments.adapters:
        work = given_work(config, arguments.adapters, arguments.samples or NUM_SAMPLES, arguments.acceptance)
    else:
        work = bundled_work(config, arguments.acceptance)
    gpu, rate = GPUS[arguments.gpu], arguments.network / 8 * 1e9
    machines = [Hardware(gpu, count, arguments.gpus_per_node, network_rate=rate) for count in arguments.gpus]
    shapes = read_shapes(config)
    plans = [plan_fleet(config, shapes, hardware, work) for hardware in machines]
    if arguments.json:
        sys.stdout.write(f"{as_json(plans)}\n")
    else:
        print_plans(plans, wide_console())
    return FAILED if any(plan.problems for plan in plans) else MIGRATED


def run_status(arguments: argparse.Namespace) -> int:
    """`translora status RUN`."""
    from translora.run.status import render_status

    if arguments.watch is None:
        text = render_status(arguments.run, as_json=arguments.json)
        with closed_pipe_is_no_fault():
            sys.stdout.write(f"{text.rstrip()}\n")
            sys.stdout.flush()
        return MIGRATED
    clear = "\x1b[H\x1b[J" if sys.stdout.isatty() else ""
    with contextlib.suppress(KeyboardInterrupt), closed_pipe_is_no_fault():
        while True:
            rows = max(5, shutil.get_terminal_size().lines - 8) if clear else None
            text = render_status(arguments.run, as_json=arguments.json, max_rows=rows)
            sys.stdout.write(f"{clear}{text.rstrip()}\n")
            sys.stdout.flush()
            time.sleep(arguments.watch)
    return MIGRATED


def run_report(arguments: argparse.Namespace) -> int:
    """`translora report RUN`."""
    from translora.run.state import load_states

    print_report(arguments.run, load_states(arguments.run))
    return MIGRATED


def wide_console() -> Console:
    """Prints tables as wide as the terminal, and wide enough for ours where there is none."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            with contextlib.suppress(SystemExit):  # rich writes no more, and would end the process with 1
                super().on_broken_pipe()

    return Plain(width=None if sys.stdout.isatty() else 140)


def print_report(run_dir: Path, states: Sequence[AdapterState]) -> None:
    """Print the table of these adapters, list what did not migrate, and write RUN/report.html."""
    from translora.report.html import REPORT_FILE, write_report
    from translora.report.table import notes, render_table
    from translora.run.state import BUNDLES, state_names

    console = wide_console()
    console.print(render_table(states))
    lines = notes(states)
    if earlier := set(state_names(run_dir)) - {state.name for state in states}:
        lines.append(f"earlier adapters of this run that are no longer in the fleet file: {len(earlier)}")
    if published := sum(bool(state.output) for state in states):
        lines.append(f"bundles: {run_dir / BUNDLES} ({published})")
    try:
        lines.append(f"report: {write_report(run_dir)}")
    except (OSError, ValueError) as error:
        lines.append(f"report: {run_dir / REPORT_FILE} cannot be written ({getattr(error, 'strerror', None) or error})")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
