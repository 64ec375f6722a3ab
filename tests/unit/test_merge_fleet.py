"""Merges of a fleet file, on tiny bundles and without Ray: what is merged, from what, and when it is done again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_base, make_bundle
from translora.bundle import BaseInfo, inspect_base, read_bundle, verify_bundle
from translora.config import FleetConfig, load_config
from translora.lora.peft_io import read_lora
from translora.merge.fleet import entries_before, merge_after, merge_before
from translora.report.table import summary
from translora.run.files import write_jsonl
from translora.run.state import AdapterState, load_state
from translora.synthesis.prompts import generation_prompt

ORDERS = [f"send order {number}" for number in range(5)]
MAILS = [f"answer mail {number}" for number in range(3)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    base = make_base(tmp_path / "source")
    make_bundle(tmp_path / "orders", base, "orders", 1, seeds=ORDERS, num_samples=12)
    make_bundle(tmp_path / "mails", base, "mails", 2, rank=3, seeds=MAILS, num_samples=30)
    return tmp_path


def fleet(root: Path, *merges: dict[str, Any]) -> FleetConfig:
    base = {"model": str(root / "source")}
    settings = {"run_dir": root / "run", "source": base, "target": base, "adapters": [{"bundle": "none"}]}
    return FleetConfig.model_validate({**settings, "merges": list(merges)})


def before(root: Path, *names: str, **settings: Any) -> dict[str, Any]:
    paths = [str(root / name) for name in names or ("orders", "mails")]
    return {"name": "desk", "when": "before", "method": "static_cat", "adapters": paths, **settings}


def no_cluster() -> None:
    raise AssertionError("static_cat needs no worker")


def base_of(root: Path) -> BaseInfo:
    return inspect_base(str(root / "source"))


def test_merged_before_is_a_bundle_with_the_seeds_of_all_parts(root: Path) -> None:
    config = fleet(root, before(root))
    assert merge_before(config, base_of(root), no_cluster) == {}
    (entry,) = entries_before(config, []).values()
    bundle = read_bundle(entry.bundle)
    verify_bundle(bundle, base_of(root))
    assert bundle.path == root / "run" / "merges" / "desk"
    assert bundle.seeds == [ORDERS[0], MAILS[0], ORDERS[1], MAILS[1], ORDERS[2], MAILS[2], ORDERS[3], ORDERS[4]]
    lasts = {generation_prompt(bundle.seeds, ordering, 0).splitlines()[-2].split()[1] for ordering in range(5)}
    assert lasts == {"send", "answer"}, "five orders of the seeds end with either skill"
    manifest = bundle.manifest
    assert (manifest.num_samples, manifest.task_name, bundle.discriminator_dir) == (42, "desk", None)
    assert manifest.provenance["merged_from"] == "orders, mails"
    assert "orders" in (bundle.path / "README.md").read_text()
    merged, orders, mails = (read_lora(path) for path in (bundle.path, root / "orders", root / "mails"))
    for name, (A, B) in merged.modules.items():
        parts = [one.scaling[name] * one.modules[name][1] @ one.modules[name][0] for one in (orders, mails)]
        torch.testing.assert_close(merged.scaling[name] * B @ A, sum(parts, torch.zeros(())) / 2)


def test_what_is_merged_before_has_settings_of_its_own_and_they_merge_nothing_again(root: Path) -> None:
    own = {"epochs": 3.0, "stop": "###", "screen": "none", "min_agreement": 0.4, "prompt_template": "Mail: {input}"}
    plain, config = fleet(root, before(root)), fleet(root, before(root, **own))
    (entry,) = entries_before(config, []).values()
    assert entry.model_dump(include=set(own)) == own
    assert plain.merges[0].model_dump().keys().isdisjoint(own), "an older run's settings are still the same"
    assert merge_before(plain, base_of(root), no_cluster) == {}
    made = (root / "run" / "merges" / "desk" / "adapter_model.safetensors").stat().st_mtime_ns
    assert merge_before(config, base_of(root), no_cluster) == {}
    assert (root / "run" / "merges" / "desk" / "adapter_model.safetensors").stat().st_mtime_ns == made
    for name, value in own.items():
        late = {"name": "late", "when": "after", "method": "static_cat", "adapters": ["a", "b"], name: value}
        with pytest.raises(ValueError, match=f"{name}: what is merged after the migration is not trained or judged"):
            fleet(root, late)


def test_parts_may_lie_behind_urls(root: Path) -> None:
    urls = [f"file://{root}/orders", f"file://{root}/mails"]
    config = fleet(root, before(root) | {"adapters": urls})
    assert merge_before(config, base_of(root), no_cluster) == {}
    assert read_bundle(root / "run" / "merges" / "desk").manifest.num_samples == 42
    missing = fleet(root, before(root) | {"adapters": [urls[0], f"file://{root}/gone"]})
    assert "gone" in merge_before(missing, base_of(root), no_cluster)["desk"]


def test_a_rerun_merges_again_only_what_changed(root: Path) -> None:
    weights = root / "run" / "merges" / "desk" / "adapter_model.safetensors"

    def made(**settings: Any) -> int:
        assert merge_before(fleet(root, before(root, **settings)), base_of(root), no_cluster) == {}
        return weights.stat().st_mtime_ns

    first = made()
    assert made() == first
    second = made(rank=3)
    assert second != first and made(rank=3) == second
    shutil.rmtree(root / "mails")
    make_bundle(root / "mails", root / "source", "mails", 9, seeds=MAILS)
    third = made(rank=3)
    assert third != second
    weights.write_bytes(weights.read_bytes()[:-1])
    assert made(rank=3) != third, "a damaged one is made anew"


def test_merged_after_is_a_bundle_of_the_target_beside_the_others(root: Path) -> None:
    config = fleet(root, {"name": "desk", "when": "after", "method": "svd", "rank": 2, "adapters": ["orders", "mails"]})
    states = []
    for name in ("orders", "mails"):
        shutil.copytree(root / name, root / "run" / "bundles" / name)
        states.append(AdapterState(name=name, bundle=name, phase="done", status="migrated", output=f"bundles/{name}"))
    (state,) = merge_after(config, base_of(root), states, no_cluster)
    assert (state.status, state.output, state.num_samples) == ("merged", "bundles/desk", 42)
    failed = state.model_copy(update={"status": "quarantined", "reason": "cannot be merged"})
    assert (summary([state]), summary([failed])) == ("0 of 0 migrated, 1 merged", "0 of 0 migrated, 1 quarantined")
    assert state == load_state(root / "run", "desk")
    bundle = read_bundle(root / "run" / state.output)
    verify_bundle(bundle, base_of(root))
    assert read_lora(bundle.path).max_rank == 2

    states[1].status, states[1].reason = "quarantined", "orders: cannot be reached"
    (state,) = merge_after(config, base_of(root), states, no_cluster)
    assert state.status == "quarantined" and "mails was not migrated (quarantined: orders: cannot" in state.reason
    assert read_bundle(bundle.path).digest == bundle.digest, "what an earlier run made of it is kept"

    states[1].status, states[1].reason = "failed_gate", "agreement 20 % is below 60 %"
    (state,) = merge_after(config, base_of(root), states, no_cluster)
    assert state.status == "quarantined"
    assert "mails was not migrated (failed_gate: agreement 20 % is below 60 %)" in state.reason
    assert not bundle.path.exists(), "what an earlier run made of it is withdrawn"


def test_a_merge_that_cannot_be_made_gives_its_reason(root: Path) -> None:
    make_bundle(root / "plain", root / "source", "plain", 3, prompt_template="{input}")
    data = [str(root / "orders.jsonl"), str(root / "mails.jsonl")]
    write_jsonl(root / "orders.jsonl", [{"input": "a"}])
    for entry, reason in (
        (before(root, "orders", "gone"), "gone: no such directory"),
        (before(root, "orders", "plain"), "desk: its parts have different prompt templates (chat, {input})"),
        (before(root, method="regmean", data=data), "mails.jsonl: no such file; correct `data` of the merge desk"),
    ):
        faults = merge_before(fleet(root, entry), base_of(root), no_cluster)
        assert reason in faults["desk"], faults
        assert not (root / "run" / "merges" / "desk").exists()


def test_the_names_of_merges_and_adapters_are_all_different(root: Path) -> None:
    after = {"name": "desk", "when": "after", "method": "svd", "adapters": ["orders", "mails"]}
    with pytest.raises(ValueError, match="merges: the name desk is taken by another adapter"):
        entries_before(fleet(root, before(root)), ["desk"])
    with pytest.raises(ValueError, match="merges: desk: no adapter of this fleet is named mails"):
        entries_before(fleet(root, after), ["orders"])
    chained = {"name": "all", "when": "after", "method": "svd", "adapters": ["orders", "desk"]}
    (entry,) = entries_before(fleet(root, chained, before(root, num_samples=30_000)), ["orders"]).values()
    assert entry.num_samples == 30_000, "which the operator has chosen: no limit applies"


def test_paths_in_the_fleet_file_are_relative_to_it(root: Path) -> None:
    path = root / "fleet.yaml"
    path.write_text(
        "run_dir: run\nsource: {model: ./source}\ntarget: {model: ./source}\nadapters: [orders, mails]\nmerges:\n"
        "  - {name: desk, when: before, method: cat, adapters: [orders, mails], data: [mix.jsonl]}\n"
        "  - {name: late, when: after, method: iteris, adapters: [orders, mails]}\n"
    )
    first, second = load_config(path, FleetConfig).merges
    assert first.adapters == [str(root / "orders"), str(root / "mails")] and first.data == [str(root / "mix.jsonl")]
    assert second.adapters == ["orders", "mails"] and second.data == []
