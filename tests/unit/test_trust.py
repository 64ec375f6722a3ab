"""Whose code runs: a base's own only where it is trusted by name, a bundle's never."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import dynamic_module_utils

from tests.bad_inputs.base_cases import give_code
from tests.bad_inputs.workshop import CONFIG, change_json, rehash
from tests.methods import METHODS
from tests.tiny import make_base, make_bundle
from translora.bundle import BaseInfo, Bundle, BundleError, inspect_base, read_bundle, verify_bundle
from translora.bundle import base as base_module
from translora.bundle.modules import linear_modules
from translora.config import BaseModelConfig
from translora.engine.loading import load_model, load_tokenizer
from translora.engine.transformers import TransformersEngine
from translora.lora.peft_io import _UNSUPPORTED


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("trust")
    return make_bundle(root / "orders", make_base(root / "base"))


@pytest.fixture(scope="module")
def base(bundle: Bundle) -> BaseInfo:
    return inspect_base(str(bundle.path.parent / "base"))


def test_the_setting_is_off_and_belongs_to_one_base() -> None:
    assert BaseModelConfig(model="x").trust_remote_code is False
    assert inspect.signature(inspect_base).parameters["trust_remote_code"].default is False


def test_a_bases_own_code_runs_only_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    base_module._warn_of_code.cache_clear()
    path, ran = make_base(tmp_path / "own-base"), tmp_path / "ran"
    plain = linear_modules(inspect_base(str(make_base(tmp_path / "plain"))))
    give_code(path, ran)
    with pytest.raises(ValueError, match=r"config\.json: .* read that code, then set trust_remote_code: true"):
        linear_modules(inspect_base(str(path)))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(BaseModelConfig(model=str(path)), torch.float32, torch.device("cpu"))
    assert not ran.exists()

    trusted = BaseModelConfig(model=str(path), trust_remote_code=True)
    with caplog.at_level(logging.WARNING):
        info = inspect_base(str(path), trust_remote_code=True)
        inspect_base(str(path), trust_remote_code=True)
    assert [record.message for record in caplog.records] == [
        "own-base: trust_remote_code is set: Python code that comes with this base is run"
    ]
    assert not ran.exists(), "looking at a base runs nothing"
    assert linear_modules(info) == plain and ran.exists()
    assert type(load_model(trusted, torch.float32, torch.device("cpu"))).__name__ == "OwnModel"
    assert load_tokenizer(trusted).pad_token_id is not None


def test_python_in_a_bundle_is_never_run(bundle: Bundle, base: BaseInfo, tmp_path: Path) -> None:
    """What PEFT and transformers would import: auto_mapping's library, Megatron's core, a model's own code."""
    ran = tmp_path / "ran"
    path = make_bundle(tmp_path / "hostile", base.path).path
    (path / "hostile_code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    change_json(
        path / CONFIG,
        auto_mapping={"base_model_class": "Own", "parent_library": "hostile_code"},
        megatron_config={"x": 1},
        megatron_core="hostile_code",
    )
    code = {"auto_map": {"AutoModelForCausalLM": "hostile_code.Own"}, "model_type": "own"}
    for name in ("config.json", "tokenizer_config.json"):
        (path / name).write_text(json.dumps(code))
    rehash(path)
    hostile = read_bundle(path)
    verify_bundle(hostile, base)
    TransformersEngine(BaseModelConfig(model=str(base.path)), {"teacher": hostile.path})
    assert not ran.exists() and "hostile_code" not in sys.modules


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("(a+)+"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)
OPTIONS = sorted(
    {*_UNSUPPORTED, "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights"}
    | {"peft_type", "target_modules", "base_model_name_or_path", "use_dora", "lora_bias", "megatron_config"}
    | {"num_virtual_tokens", "token_dim", "num_layers", "layers_pattern", "layers_to_transform", "exclude_modules"}
)


@settings(max_examples=250, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    option=st.sampled_from(OPTIONS), value=VALUES, method=st.sampled_from([{}, {"use_dora": True}, *METHODS.values()])
)
def test_any_value_in_an_adapters_config_is_sound_or_a_bundle_error(
    bundle: Bundle, base: BaseInfo, option: str, value: Any, method: dict[str, Any]
) -> None:
    before = (bundle.path / CONFIG).read_bytes()
    try:
        change_json(bundle.path / CONFIG, **method | {option: value})
        rehash(bundle.path)
        verify_bundle(read_bundle(bundle.path), base)
    except BundleError as error:
        assert str(error).isprintable()
    finally:
        (bundle.path / CONFIG).write_bytes(before)
        rehash(bundle.path)
