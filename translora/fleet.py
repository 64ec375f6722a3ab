"""`translora migrate`: the way of a fleet from its bundles to new bundles, top to bottom.

(merge) -> verify -> synthesis (generate, screen, label; in rounds) -> distill -> gate and publish -> (merge). Each
phase takes the adapters that reached it, works on all of them at once, and leaves files behind that a rerun verifies
and skips. The merges are those that the fleet file asks for.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

from translora.config import FleetConfig
from translora.distill.phase import distill_phase
from translora.engine.loading import load_tokenizer
from translora.errors import InputError
from translora.gate.phase import gate_phase
from translora.merge.fleet import entries_before, merge_after, merge_before, warn_of_templates
from translora.run.check import check_training
from translora.run.cohorts import cohort, end_cohort
from translora.run.commits import info_as_begun, note_commits
from translora.run.entries import expand_entries
from translora.run.member import Member, Run
from translora.run.recipes import Bases, Seals, at_commits, base_settings
from translora.run.rundir import open_run
from translora.run.state import AdapterState, Phase, note_fleet
from translora.run.tracker import Tracker
from translora.run.verify import verify_fleet
from translora.synthesis.phase import synthesis_phase

logger = logging.getLogger(__name__)


def migrate(config: FleetConfig, before_work: Callable[[], None] = lambda: None) -> list[AdapterState]:
    """Migrate a fleet; returns every adapter's state. A rerun continues where a killed run stopped.

    Args:
        config: the fleet file.
        before_work: called when everything has been checked, and only if there is work, with the run directory open:
            starts Ray.

    Raises:
        InputError: the config or a base cannot be used. A fault of one bundle quarantines that adapter alone.
    """
    entries, faults = expand_entries(config.adapters, config.run_dir)
    entries |= entries_before(config, list(entries))
    bases = Bases(*(info_as_begun(config.run_dir, base) for base in base_settings(config)))
    source, target, generator = bases
    if source.fingerprint == target.fingerprint:
        raise InputError(f"source and target are the same base ({source.path}); set `target` to the new base")
    with (
        open_run(config.run_dir, config, settings_may_change=True),
        Tracker(config.run_dir, config.tracking, config.model_dump(mode="json"), config.run_dir.name) as tracker,
    ):
        note_commits(config.run_dir, *zip(base_settings(config), bases, strict=True))
        config = at_commits(config, bases)
        run = Run(
            config=config,
            source=source,
            target=target,
            generator=generator,
            tracker=tracker,
            source_tokenizer=load_tokenizer(config.source),
            generator_tokenizer=load_tokenizer(config.generator),
        )
        check_training(config, source, target)
        seals = Seals(config.run_dir, config, bases)
        faults |= merge_before(config, source, before_work)
        verified = verify_fleet(run, entries, seals, faults)
        note_fleet(config.run_dir, verified.keys() | {merge.name for merge in config.merges})
        members = [member for member in verified.values() if isinstance(member, Member)]
        warn_of_templates(config, members)
        if todo := [member for member in members if member.state.status == "pending"]:
            before_work()
        while any(member.state.status == "pending" for member in todo):  # again for what the gate sent back
            for phase in PHASE_WORK:
                run_phase(run, phase, members)
        if todo:
            outcomes = Counter(member.state.status for member in todo)
            found = ", ".join(f"{count} {status}" for status, count in sorted(outcomes.items()))
            refused = sum(not isinstance(member, Member) for member in verified.values())
            logger.info("worked on %d of %d adapters: %s; not usable: %d", len(todo), len(verified), found, refused)
        for phase in PHASE_WORK:
            end_cohort(config.run_dir, phase)  # of a driver that was killed after the last of its adapters
        for member in members:
            seals.put(member.entry, member.state, member.looked)
        seals.save()
        states = [found.state if isinstance(found, Member) else found for found in verified.values()]
        return states + merge_after(config, target, states, before_work)


def run_phase(run: Run, phase: Phase, members: list[Member]) -> None:
    """Do a phase's work for all members that wait for it, those of a killed run's cohort first.

    One whose files were damaged meanwhile goes back to an earlier phase, and its neighbours go on without it.
    """
    while waiting := [member for member in members if member.waits_for(phase)]:
        todo = [member for member in waiting if run.is_whole(member)]
        if not todo:
            return
        group = cohort(run.config.run_dir, phase, todo, members)
        start = time.monotonic()
        PHASE_WORK[phase](run, group)
        seconds = time.monotonic() - start
        run.tracker.log({f"time/{phase}_seconds": seconds, "perf/adapters": float(len(group))})
        for member in group:
            member.state.seconds[phase] = round(member.state.seconds.get(phase, 0.0) + seconds, 1)
            run.save(member.state)
        end_cohort(run.config.run_dir, phase)


PHASE_WORK: dict[Phase, Callable[[Run, list[Member]], None]] = {
    "synthesis": synthesis_phase,
    "distill": distill_phase,
    "gate": gate_phase,
}
"""In order. A phase gets the adapters that are worked on together, some of which may have left it already."""
