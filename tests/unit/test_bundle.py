from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.bad_inputs.workshop import change_json, change_tensors
from tests.tiny import SEEDS, make_adapter, make_base, make_bundle
from translora.bundle import BaseInfo, Bundle, BundleError, inspect_base, read_bundle, verify_bundle, write_bundle
from translora.bundle.adapter import check_adapter, check_recorded_base
from translora.lora.peft_io import read_lora
from translora.run.files import sha256_file


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bases") / "old-base")


@pytest.fixture(scope="module")
def base(base_path: Path) -> BaseInfo:
    return inspect_base(str(base_path))


@pytest.fixture(scope="module")
def adapter(base_path: Path) -> Path:
    return make_adapter(base_path.parent / "adapter", base_path, seed=7)


@pytest.fixture(scope="module")
def judge(base_path: Path) -> Path:
    return make_adapter(base_path.parent / "judge", base_path, seed=8, rank=2)


def write(path: Path, adapter: Path, base: BaseInfo, judge: Path | None = None, **changes: object) -> Bundle:
    arguments: dict[str, object] = {
        "seeds": list(SEEDS),
        "task_name": "orders",
        "num_samples": 120,
        "prompt_template": "chat",
        "provenance": {"rank": 4, "loss": 0.5, "made_by": "a test"},
    }
    return write_bundle(path, adapter_dir=adapter, discriminator_dir=judge, base=base, **(arguments | changes))  # type: ignore[arg-type]


def test_round_trip(adapter: Path, judge: Path, base: BaseInfo, tmp_path: Path) -> None:
    written = write(tmp_path / "orders", adapter, base, judge)
    bundle = read_bundle(tmp_path / "orders")
    assert bundle == written
    verify_bundle(bundle, base)
    assert bundle.seeds == list(SEEDS)
    assert bundle.discriminator_dir == tmp_path / "orders" / "translora" / "discriminator"
    assert bundle.manifest.num_samples == 120
    assert bundle.manifest.base_name == "old-base"
    assert bundle.manifest.base_fingerprint == base.fingerprint
    assert bundle.manifest.provenance == {"rank": 4, "loss": 0.5, "made_by": "a test"}
    assert bundle.digest == sha256_file(bundle.path / "translora/manifest.json")
    for directory, source in ((bundle.path, adapter), (bundle.discriminator_dir, judge)):
        assert directory is not None
        copied, original = read_lora(directory), read_lora(source)
        assert copied.scaling == original.scaling
        for module, (lora_A, lora_B) in original.modules.items():
            assert torch.equal(copied.modules[module][0], lora_A)
            assert torch.equal(copied.modules[module][1], lora_B)


def test_bundle_without_discriminator(adapter: Path, base: BaseInfo, tmp_path: Path) -> None:
    bundle = write(tmp_path / "orders", adapter, base)
    verify_bundle(bundle, base)
    assert bundle.discriminator_dir is None
    assert not (bundle.path / "translora" / "discriminator").exists()


def test_peft_loads_a_bundle_as_it_is(adapter: Path, base_path: Path, base: BaseInfo, tmp_path: Path) -> None:
    bundle = write(tmp_path / "orders", adapter, base, None)
    batch = AutoTokenizer.from_pretrained(base_path)("Please send my order", return_tensors="pt")
    logits = []
    for directory in (adapter, bundle.path):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_path), directory)
        logits.append(model(input_ids=batch["input_ids"]).logits)
    plain = AutoModelForCausalLM.from_pretrained(base_path)(input_ids=batch["input_ids"]).logits
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], plain)


def test_bundle_tells_nothing_of_the_machine(adapter: Path, judge: Path, base: BaseInfo, tmp_path: Path) -> None:
    assert str(base.path) in (adapter / "README.md").read_text()
    bundle = write(tmp_path / "orders", adapter, base, judge)
    for path in bundle.path.rglob("*"):
        if path.is_file():
            assert str(base.path.parent).encode() not in path.read_bytes(), path


def test_only_what_is_needed_is_copied(adapter: Path, base: BaseInfo, tmp_path: Path) -> None:
    messy = tmp_path / "checkpoint-50"
    shutil.copytree(adapter, messy)
    (messy / "training_args.bin").write_bytes(b"pickle")
    (messy / "optimizer.pt").write_bytes(b"pickle")
    bundle = write(tmp_path / "orders", messy, base)
    files = {path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*") if path.is_file()}
    assert files == set(bundle.manifest.files) | {"README.md", "translora/manifest.json"}


def test_hub_files_may_be_added(adapter: Path, base: BaseInfo, tmp_path: Path) -> None:
    bundle = write(tmp_path / "orders", adapter, base)
    for name in ("README.md", ".gitattributes", "tokenizer.json", "LICENSE"):
        (bundle.path / name).write_text("added later")
    verify_bundle(read_bundle(bundle.path), base)


def test_writing_twice_gives_the_same_digest(adapter: Path, judge: Path, base: BaseInfo, tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", adapter, base, judge), write(tmp_path / "two", adapter, base, judge)
    assert one.digest == two.digest
    again = write(tmp_path / "one", adapter, base, judge)
    assert again == one


def test_failed_write_leaves_the_old_bundle(adapter: Path, base: BaseInfo, tmp_path: Path) -> None:
    before = write(tmp_path / "orders", adapter, base)
    with pytest.raises(BundleError, match="1 different seed"):
        write(tmp_path / "orders", adapter, base, seeds=["one"])
    with pytest.raises(BundleError, match="not a bundle, so it is not replaced"):
        write(adapter, adapter, base)
    assert read_bundle(tmp_path / "orders") == before
    assert [path.name for path in tmp_path.iterdir()] == ["orders"]


def test_what_a_killed_write_left_is_removed(adapter: Path, base: BaseInfo, tmp_path: Path) -> None:
    others = (".tmp-orders-a-0123abcd", ".tmp-orders-0123abcg", ".tmp-other-0123abcd", "orders-0123abcd")
    for name in (".tmp-orders-0123abcd", ".tmp-orders-ffff0000", *others):
        (tmp_path / name / "translora").mkdir(parents=True)
    write(tmp_path / "orders", adapter, base)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((*others, "orders"))


def test_names_are_compared_with_the_base_before_patterns_meet_them(
    adapter: Path, base: BaseInfo, tmp_path: Path
) -> None:
    foreign = tmp_path / "adapter"
    shutil.copytree(adapter, foreign)
    name = f"base_model.model.{'a.' * 1000}q_proj"
    change_tensors(
        foreign / "adapter_model.safetensors",
        lambda tensors: tensors.update(
            {f"{name}.lora_A.weight": torch.zeros(4, 32), f"{name}.lora_B.weight": torch.zeros(32, 4)}
        ),
    )
    with (
        patch("translora.lora.peft_io.read_lora", side_effect=AssertionError("patterns were matched")),
        pytest.raises(ValueError, match="which 'old-base' does not have"),
    ):
        check_adapter(foreign, base)


def test_another_name_of_one_model_has_a_remedy(adapter: Path, base: BaseInfo, tmp_path: Path) -> None:
    named = tmp_path / "adapter"
    shutil.copytree(adapter, named)
    change_json(named / "adapter_config.json", base_model_name_or_path="Org/Source-1B")
    with pytest.raises(BundleError, match="or, if both are one model, write 'old-base' there"):
        write(tmp_path / "orders", named, base)
    with pytest.raises(ValueError, match="give it, or, if both are one model, write 'old-base' there"):
        check_recorded_base(named, base.name, "give it")
    change_json(named / "adapter_config.json", base_model_name_or_path="old-base")
    verify_bundle(write(tmp_path / "orders", named, base), base)


def test_migrating_on_top_of_itself(adapter: Path, base: BaseInfo, tmp_path: Path) -> None:
    first = write(tmp_path / "orders", adapter, base)
    second = write(first.path, first.path, base, num_samples=60)
    verify_bundle(second, base)
    assert second.manifest.num_samples == 60


def test_renamed_base_is_a_warning(
    adapter: Path, base: BaseInfo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = write(tmp_path / "orders", adapter, base)
    shutil.copytree(base.path, tmp_path / "renamed")
    with caplog.at_level(logging.WARNING, logger="translora"):
        verify_bundle(bundle, inspect_base(str(tmp_path / "renamed")))
    assert "names the base 'old-base', not 'renamed', but the weights agree" in caplog.text


def test_adapter_with_zero_B_is_a_warning(
    base_path: Path, base: BaseInfo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base_path, scale=0.0)
    with caplog.at_level(logging.WARNING, logger="translora"):
        write(tmp_path / "orders", adapter, base)
    assert "answers as its base does" in caplog.text


def test_name_in_adapter_config_may_be_a_path(adapter: Path, base: BaseInfo, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name in ("/elsewhere/models/old-base", "org/old-base", "old-base", None):
        other = tmp_path / f"adapter-{name is None}"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(adapter, other)
        (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        verify_bundle(write(tmp_path / "orders", other, base), base)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_tiny_bundles(family: str, tmp_path: Path) -> None:
    path = make_base(tmp_path / "base", family, seed=3)  # type: ignore[arg-type]
    bundle = make_bundle(tmp_path / "bundle", path, "routing", seed=4)
    verify_bundle(bundle, inspect_base(str(path)))
    assert bundle.manifest.task_name == "routing"
    lora = read_lora(bundle.path)
    assert len(lora.modules) == 4
    assert all(lora_B.any() for _, lora_B in lora.modules.values())


@settings(derandomize=True, max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds=st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=6, unique=True))
def test_any_text_survives_as_a_seed(seeds: list[str], adapter: Path, base: BaseInfo, tmp_path: Path) -> None:
    assert write(tmp_path / "orders", adapter, base, seeds=seeds).seeds == seeds


@settings(
    derandomize=True, max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_changed_byte_is_refused(data: st.DataObject, adapter: Path, base: BaseInfo, tmp_path: Path) -> None:
    bundle = write(tmp_path / "orders", adapter, base) if not (tmp_path / "orders").exists() else None
    path = (
        tmp_path
        / "orders"
        / data.draw(st.sampled_from(sorted((bundle or read_bundle(tmp_path / "orders")).manifest.files)))
    )
    original = path.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        with pytest.raises(BundleError):
            verify_bundle(read_bundle(tmp_path / "orders"), base)
    finally:
        path.write_bytes(original)
    verify_bundle(read_bundle(tmp_path / "orders"), base)


@settings(
    derandomize=True, max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damaged_manifest_is_refused_or_read(
    data: st.DataObject, adapter: Path, base: BaseInfo, tmp_path: Path
) -> None:
    if not (tmp_path / "orders").exists():
        write(tmp_path / "orders", adapter, base)
    path = tmp_path / "orders" / "translora" / "manifest.json"
    original = path.read_bytes()
    value = json.loads(original)
    key = data.draw(st.sampled_from(sorted(value)))
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    value[key] = data.draw(scalars | st.lists(scalars) | st.dictionaries(st.text(), scalars))
    path.write_text(json.dumps(value))
    try:
        verify_bundle(read_bundle(tmp_path / "orders"), base)
    except BundleError as error:
        assert "orders" in str(error)
    finally:
        path.write_bytes(original)
