"""What a rerun keeps of an adapter: the state an earlier run left, as far as files, settings and bases still agree."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from translora.bundle import BaseInfo, BundleError, read_bundle, verify_bundle
from translora.bundle.manifest import MANIFEST, read_manifest
from translora.run.files import remove_directory, sha256_path
from translora.run.recipes import BUDGET
from translora.run.state import (
    BUNDLES,
    DISCRIMINATOR,
    PHASES,
    STUDENT,
    SYNTHETIC,
    AdapterState,
    Phase,
    load_state,
    reached,
    state_path,
    training_fields,
)

logger = logging.getLogger(__name__)


def artifact_digest(run_dir: Path, relative: str, target: BaseInfo) -> str:
    """What a rerun compares: a path's hash, or the digest of a bundle, to which its readers may add a model card.

    Empty for a file that is missing and for a bundle that is missing or damaged.
    """
    path = run_dir / relative
    if not relative.startswith(f"{BUNDLES}/"):
        return sha256_path(path) if path.exists() else ""
    try:
        bundle = read_bundle(path)
        verify_bundle(bundle, target)
    except BundleError:
        return ""
    return bundle.digest


def continue_state(run_dir: Path, fresh: AdapterState, target: BaseInfo) -> AdapterState:
    """The state an earlier run left, as far as its files still are what it recorded; else `fresh`.

    A changed bundle starts from the beginning. A missing or changed file sends the adapter back to the phase that
    makes it, a changed setting or base to the first phase that it touches. A quarantined adapter is tried again; one
    that failed the gate is not.
    """
    if not state_path(run_dir, fresh.name).is_file():
        return begun_anew(run_dir, fresh)
    state = load_state(run_dir, fresh.name)
    if (state.bundle_digest, state.num_samples) != (fresh.bundle_digest, fresh.num_samples):
        logger.info("%s: the bundle or its size changed: migrated anew", fresh.name)
        return begun_anew(run_dir, fresh)
    state.bundle = fresh.bundle
    state = touched_again(state, fresh)
    earlier = [name for name in state.artifacts if name.startswith(f"adapters/{fresh.name}/synthetic-")]
    if any(artifact_digest(run_dir, name, target) != state.artifacts[name] for name in earlier):
        logger.warning("%s: the samples of its first attempt are missing or changed: migrated anew", fresh.name)
        return begun_anew(run_dir, fresh)
    made_by: dict[str, Phase] = {
        f"adapters/{fresh.name}/{SYNTHETIC}": "synthesis",
        f"adapters/{fresh.name}/{STUDENT}": "distill",
        f"adapters/{fresh.name}/{DISCRIMINATOR}": "distill",
        f"{BUNDLES}/{fresh.name}": "gate",
    }
    for relative, phase in made_by.items():
        recorded = state.artifacts.get(relative)
        if recorded is None or artifact_digest(run_dir, relative, target) == recorded:
            continue
        logger.warning("%s: %s is missing or changed: made anew", fresh.name, run_dir / relative)
        for later in [other for other, maker in made_by.items() if PHASES.index(maker) >= PHASES.index(phase)]:
            state.artifacts.pop(later, None)
            if later.startswith(BUNDLES) and later != relative:
                continue  # what was published is sound: it stays until it is replaced
            if later.endswith(SYNTHETIC):
                (run_dir / later).unlink(missing_ok=True)
            else:
                remove_directory(run_dir / later)
        return sent_back(state, fresh, phase)
    if state.status == "quarantined":
        state.status, state.reason = "pending", ""
        if state.phase == "done":  # its bundle was broken for a while, after it had been migrated
            passed = f"{BUNDLES}/{fresh.name}" in state.artifacts
            state.status = "migrated" if passed else "failed_gate"
            state.reason = "" if passed or state.gate is None else state.gate.reason
    return state


def begun_anew(run_dir: Path, fresh: AdapterState) -> AdapterState:
    """`fresh`, with nothing left of an earlier run: a next hop would take its bundle for the new one."""
    remove_directory(run_dir / "adapters" / fresh.name)
    remove_directory(run_dir / BUNDLES / fresh.name)
    return fresh


def withdraw_others(run_dir: Path, target: BaseInfo) -> None:
    """Remove what earlier runs published for another base, also of adapters that have left the fleet."""
    for path in sorted((run_dir / BUNDLES).glob("*")):
        try:
            fits = read_manifest(path / MANIFEST).base_fingerprint == target.fingerprint
        except (OSError, ValueError):
            continue  # damaged: made anew
        if not fits:
            logger.info("%s: is for another base than %s: removed", path, target.name)
            remove_directory(path)


def first_touched(state: AdapterState, fresh: AdapterState) -> Phase | None:
    """The first phase that was made from something else than now, or of a failed adapter with less to spend on it."""
    failed = state.phase == "done" and f"{BUNDLES}/{state.name}" not in state.artifacts
    more = {name for name, value in fresh.spending.items() if value > state.spending.get(name, value)}
    lacked = {
        "synthesis": failed and bool(state.synthesis.shortfall) and not more.isdisjoint(BUDGET),
        "gate": failed and "retries" in more,
    }
    for phase in PHASES:
        if state.recipes.get(phase) != fresh.recipes.get(phase) or lacked.get(phase, False):
            return phase
    return None


def touched_again(state: AdapterState, fresh: AdapterState) -> AdapterState:
    """The state, sent back to the first phase that was made from something else than now.

    What was published stays until it is replaced, and so do student and discriminator, because a training recognises by
    itself what it made. An attempt beyond the first keeps its number and its samples unless the samples themselves are
    touched.
    """
    touched = first_touched(state, fresh)
    begun = touched is not None and (reached(state, touched) and (state.phase != touched or state.attempt > 1))
    if touched is None or not state.recipes or not begun:
        return state.model_copy(update={"recipes": fresh.recipes, "spending": fresh.spending})
    logger.info("%s: settings or a base changed: done again from the phase %s on", state.name, touched)
    if touched == "synthesis":
        return fresh
    dropped = {f"{BUNDLES}/{state.name}"}
    if touched == "distill":
        dropped |= {f"adapters/{state.name}/{kind}" for kind in (STUDENT, DISCRIMINATOR)}
    state.artifacts = {name: value for name, value in state.artifacts.items() if name not in dropped}
    return sent_back(state, fresh, touched)


def sent_back(state: AdapterState, fresh: AdapterState, phase: Phase) -> AdapterState:
    """`fresh` with what the phases before `phase` have come to."""
    of_attempts = ("artifacts", "attempt", "earlier", "earlier_agreement")
    kept: dict[str, Any] = {"phase": phase} | {key: getattr(state, key) for key in of_attempts}
    if phase != "synthesis":
        kept["synthesis"] = state.synthesis
    if phase == "gate":
        kept |= training_fields(state)
    return fresh.model_copy(update=kept)
