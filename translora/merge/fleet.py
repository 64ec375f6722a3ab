"""Merges of a fleet file: bundles that become one bundle before they migrate, or after.

RUN/merges/NAME is a bundle of the source base that migrates like any other; what is merged after the migration is a
bundle of the target base, RUN/bundles/NAME. RUN/merging/NAME holds what `translora merge` wrote: the adapter and its
record. A rerun merges again what has other parts, data or settings.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from translora.bundle import BaseInfo, Bundle, BundleError, common_template, read_bundle, verify_bundle, write_bundle
from translora.bundle.remote import fetch_all, is_remote
from translora.config import AdapterEntry, BaseModelConfig, FleetConfig
from translora.config.merge import MergeConfig, MergeEntry, MergeSettings, merge_config
from translora.config.own import OwnSettings
from translora.engine.loading import load_tokenizer
from translora.engine.prompts import prompt_format
from translora.errors import InputError
from translora.run.entries import bundle_name
from translora.run.files import digest, remove_directory, sha256_file
from translora.run.member import Member
from translora.run.redact import first_line, printable, redact
from translora.run.state import BUNDLES, SYNTHETIC, AdapterState, save_state

logger = logging.getLogger(__name__)
MERGES, MERGING = "merges", "merging"


def entries_before(config: FleetConfig, names: Sequence[str]) -> dict[str, AdapterEntry]:
    """The adapters that are merged before they migrate, as entries of the fleet.

    Args:
        names: of the fleet's other adapters.

    Raises:
        InputError: two adapters of the run would have one name.
    """
    taken = set(names)
    for merge in config.merges:
        if merge.name in taken:
            raise InputError(f"merges: the name {merge.name} is taken by another adapter; give another name")
        taken.add(merge.name)
    found = {
        merge.name: AdapterEntry(
            bundle=str(config.run_dir / MERGES / merge.name), **merge.model_dump(include=set(OwnSettings.model_fields))
        )
        for merge in config.merges
        if merge.when == "before"
    }
    for merge in config.merges:
        unknown = sorted(set(merge.adapters) - set(names) - found.keys())
        if merge.when == "after" and unknown:
            raise InputError(f"merges: {merge.name}: no adapter of this fleet is named {', '.join(unknown)}")
        if missing := [path for path in merge.data if not Path(path).is_file()]:
            raise InputError(f"merges: {merge.name}: {missing[0]}: no such file; correct its `data`")
    return found


def merge_before(config: FleetConfig, source: BaseInfo, before_work: Callable[[], None]) -> dict[str, str]:
    """Make the bundles of `entries_before`; returns the reasons, by name, of those that cannot be made."""
    faults = {}
    for entry in (entry for entry in config.merges if entry.when == "before"):
        data = [Path(path) for path in entry.data]
        output = config.run_dir / MERGES / entry.name
        try:
            parts = [read_bundle(path) for path in fetch_parts(config, entry)]
            merge_bundles(config, entry, parts, data, config.source, source, output, before_work)
        except ValueError as error:
            faults[entry.name] = str(error)
    return faults


def fetch_parts(config: FleetConfig, entry: MergeEntry) -> list[str]:
    """Directories of a merge's bundles; remote ones are copied below RUN/merging/NAME.parts.

    Raises:
        InputError: one cannot be had.
    """
    directory = config.run_dir / MERGING / f"{entry.name}.parts"
    urls = {f"{number}-{bundle_name(path)}": path for number, path in enumerate(entry.adapters) if is_remote(path)}
    if faults := fetch_all(urls, directory):
        raise InputError("; ".join(faults.values()))
    copies = {url: str(directory / name) for name, url in urls.items()}
    return [copies.get(path, path) for path in entry.adapters]


def merge_after(
    config: FleetConfig, target: BaseInfo, states: Sequence[AdapterState], before_work: Callable[[], None]
) -> list[AdapterState]:
    """Merge migrated adapters; returns a state for each merge. One that cannot be made is quarantined, with its reason.

    Args:
        states: of the fleet's adapters.
    """
    by_name = {state.name: state for state in states}
    found = []
    for entry in (entry for entry in config.merges if entry.when == "after"):
        state = AdapterState(name=entry.name, bundle=f"merge of {', '.join(entry.adapters)}", task_name=entry.name)
        state.phase, state.is_merge = "done", True
        output = config.run_dir / BUNDLES / entry.name
        try:
            parts = [published(config, by_name[name]) for name in entry.adapters]
            synthetic = [config.run_dir / "adapters" / name / SYNTHETIC for name in entry.adapters]
            data = [Path(path) for path in entry.data] or (synthetic if entry.needs_data else [])
            bundle = merge_bundles(config, entry, parts, data, config.target, target, output, before_work)
            state.status, state.output, state.bundle_digest = "merged", f"{BUNDLES}/{entry.name}", bundle.digest
            state.num_samples = bundle.manifest.num_samples
        except ValueError as error:
            if any(by_name[name].status == "failed_gate" for name in entry.adapters):
                remove_directory(output)  # of an earlier run: what does not pass any more is in it
            reason = printable(redact(f"cannot be merged: {error}"))
            logger.error("%s: %s", entry.name, reason)
            state.status, state.reason = "quarantined", reason
        save_state(config.run_dir, state)
        found.append(state)
    return found


def warn_of_templates(config: FleetConfig, members: Sequence[Member]) -> None:
    """Say before the migration which merges after it will fail, because their parts are prompted in different ways."""
    tokenizer = load_tokenizer(config.target)
    templates = {member.name: prompt_format(tokenizer, member.template(config)).template for member in members}
    for entry in (entry for entry in config.merges if entry.when == "after"):
        found = sorted({templates[name] for name in entry.adapters if name in templates})
        if len(found) > 1:
            logger.warning(
                "%s: cannot be merged after the migration, its parts will have different prompt templates (%s); give "
                "them one prompt_template",
                entry.name,
                ", ".join(map(repr, found)),
            )


def published(config: FleetConfig, state: AdapterState) -> Bundle:
    """The bundle that an adapter of the fleet became.

    Raises:
        InputError: it was not migrated.
    """
    if state.status != "migrated":
        raise InputError(f"{state.name} was not migrated ({state.status}: {state.reason}); mend it, or leave it out")
    return read_bundle(config.run_dir / state.output)


def merge_bundles(
    config: FleetConfig,
    entry: MergeEntry,
    parts: Sequence[Bundle],
    data: Sequence[Path],
    settings: BaseModelConfig,
    base: BaseInfo,
    output: Path,
    before_work: Callable[[], None],
) -> Bundle:
    """Merge bundles of one base into a bundle at `output`, unless it was made of the same before.

    Its seeds are those of all parts, in turn; it has no discriminator: no owner saw data of all skills together.

    Raises:
        InputError: a part, the data or a setting cannot be used, or the workers that ran the base were lost.
    """
    for path in data:
        if not path.is_file():
            raise InputError(f"{path}: no such file; correct `data` of the merge {entry.name}")
    others = {"adapters", "data", "when", *OwnSettings.model_fields} - {"num_samples"}
    recipe = digest(
        entry.model_dump(mode="json", exclude=others),
        [part.digest for part in parts],
        [sha256_file(path) for path in data],
        (settings.dtype, base.identity, config.seed),
    )
    if (made := made_before(output, recipe, base)) is not None:
        return made
    for part in parts:
        verify_bundle(part, base)
    template = common_template(parts, f"{entry.name}: its parts")
    assert template is not None, "a merge has two parts or more"
    command = merge_config(
        entry.model_dump(include=set(MergeSettings.model_fields), exclude_unset=True)
        | {
            "adapters": [part.path for part in parts],
            "data": list(data),
            "out": config.run_dir / MERGING / entry.name,
            "base": str(base.path),
            "dtype": settings.dtype,
            "attn_implementation": settings.attn_implementation,
            "trust_remote_code": settings.trust_remote_code,
            "prompt_template": template,
            "seed": config.seed,
        }
    )
    run_merge(command, config, before_work)
    in_turn = itertools.zip_longest(*(part.seeds for part in parts))
    return write_bundle(
        output,
        adapter_dir=command.out,
        discriminator_dir=None,
        seeds=list(dict.fromkeys(seed for row in in_turn for seed in row if seed is not None)),
        task_name=entry.name,
        base=base,
        num_samples=entry.num_samples or sum(part.manifest.num_samples for part in parts),
        prompt_template=command.prompt_template,
        provenance={
            "merged_by": entry.method,
            "merged_from": ", ".join(part.path.name for part in parts),
            "merge_recipe": recipe,
        },
        model_card=(command.out / "README.md").read_text(encoding="utf-8"),
    )


def made_before(output: Path, recipe: str, base: BaseInfo) -> Bundle | None:
    """The bundle of an earlier run, if it is whole and was made of the same."""
    try:
        bundle = read_bundle(output)
        if bundle.manifest.provenance.get("merge_recipe") != recipe:
            return None
        verify_bundle(bundle, base)
    except BundleError:
        return None
    return bundle


def run_merge(command: MergeConfig, config: FleetConfig, before_work: Callable[[], None]) -> None:
    """`translora merge`, on a worker of the cluster where the base is run.

    Raises:
        InputError: as merge does, or the memory does not suffice, or the worker was lost more than once.
    """
    from translora.merge.run import MORE_MEMORY, merge

    logger.info("merging %s by %s: %d adapters", command.out.name, command.method, len(command.adapters))
    if not command.needs_data:
        merge(command)
        return
    before_work()
    import ray

    resources = config.resources
    worker = ray.remote(num_cpus=resources.cpus_per_actor, num_gpus=resources.gpus_per_actor, max_retries=1)(merge)
    try:
        ray.get(worker.remote(command))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from None
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise InputError(f"the worker that merged was lost ({first_line(error)}); {MORE_MEMORY}") from error
