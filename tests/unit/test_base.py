from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.bad_inputs.workshop import make_untied
from tests.tiny import Family, make_base
from translora.bundle import hub, inspect_base
from translora.bundle.adapter import same_name
from translora.bundle.base import info_of, pinned
from translora.bundle.modules import linear_modules, output_head
from translora.bundle.reading import read_header
from translora.config import BaseModelConfig
from translora.run.commits import COMMITS, info_as_begun, note_commits
from translora.run.files import read_object, write_json


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bases") / "old-base")


def test_info_agrees_with_the_loaded_model(base: Path) -> None:
    info = inspect_base(str(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert info.shapes == parameters
    assert info.name == "old-base"
    assert info.path == base
    assert info.config["model_type"] == "llama"


def test_linear_modules_are_the_loaded_models_without_its_head(base: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    for path in (base, make_untied(tmp_path / "untied", base), make_base(tmp_path / "gemma", "gemma3")):
        model = AutoModelForCausalLM.from_pretrained(path)
        expected = {
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        }
        info = inspect_base(str(path))
        assert linear_modules(info) == expected
        assert output_head(info) == "lm_head"
        assert "model.embed_tokens.weight" in info.shapes and "model.embed_tokens" not in expected
    assert torch.equal(torch.get_rng_state(), before)


def test_linear_modules_are_built_once(base: Path) -> None:
    linear_modules(inspect_base(str(base))).clear()
    with patch.object(AutoModelForCausalLM, "from_config", side_effect=AssertionError("built again")):
        assert len(linear_modules(inspect_base(str(base)))) == 14


def test_fingerprint_ignores_sharding_and_config(base: Path, tmp_path: Path) -> None:
    sharded = make_base(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    (sharded / "config.json").write_text('{"model_type": "llama", "transformers_version": "9"}')
    one, many = inspect_base(str(base)), inspect_base(str(sharded))
    assert one.fingerprint == many.fingerprint
    assert one.shapes == many.shapes


def test_an_identity_is_of_all_that_decides_an_answer(base: Path, tmp_path: Path) -> None:
    """A corrected chat template or config is another base for a rerun; where it lies and who saved it is not."""
    known = inspect_base(str(base)).identity
    assert inspect_base(str(shutil.copytree(base, tmp_path / "elsewhere"))).identity == known
    found = {known}
    for number, (file, key, value) in enumerate(
        [
            ("tokenizer_config.json", "chat_template", "{{ messages }}"),
            ("config.json", "rope_theta", 5e5),
            ("config.json", "transformers_version", "9"),
        ]
    ):
        directory = shutil.copytree(base, tmp_path / str(number))
        settings = json.loads((directory / file).read_text())
        (directory / file).write_text(json.dumps({**settings, key: value}))
        assert inspect_base(str(directory)).fingerprint == inspect_base(str(base)).fingerprint
        found.add(inspect_base(str(directory)).identity)
    assert len(found) == 3


def test_fingerprint_sees_weights_dtype_and_names(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    variants = {
        "changed": tensors | {name: tensors[name] + 1e-3},
        "half": {key: value.bfloat16() for key, value in tensors.items()},
        "renamed": {key.replace("v_proj", "w_proj"): value for key, value in tensors.items()},
        "reshaped": tensors | {name: tensors[name].T.contiguous()},
        "cut": {key: value for key, value in tensors.items() if key != name},
    }
    prints = {inspect_base(str(base)).fingerprint}
    for variant, changed in variants.items():
        directory = tmp_path / variant
        shutil.copytree(base, directory)
        save_file(changed, directory / "model.safetensors")
        prints.add(inspect_base(str(directory)).fingerprint)
    assert len(prints) == len(variants) + 1


def test_fingerprint_reads_the_first_4_kib_only(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    embeddings = tensors["model.embed_tokens.weight"]
    before = inspect_base(str(path.parent)).fingerprint
    embeddings.view(-1)[1024] += 1
    save_file(tensors, path)
    assert inspect_base(str(path.parent)).fingerprint == before
    embeddings.view(-1)[1023] += 1
    save_file(tensors, path)
    assert inspect_base(str(path.parent)).fingerprint != before


def test_names(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base)
    assert inspect_base(".").name == "old-base"
    assert inspect_base(f"{base}/").name == "old-base"
    snapshot = tmp_path / "models--org--Some-Model-1B" / "snapshots" / "0123abcd"
    shutil.copytree(base, snapshot)
    assert inspect_base(str(snapshot)).name == "Some-Model-1B"
    assert same_name("org/model", "/models/model/")
    assert same_name("org/Some-Model-1B", str(snapshot))
    assert not same_name("org/model", "org/model-2")


def test_hub_that_refuses_the_connection_gives_one_error(tmp_path: Path) -> None:
    with (
        patch.object(constants, "ENDPOINT", "http://127.0.0.1:9"),
        patch.object(constants, "HF_HUB_CACHE", str(tmp_path)),
        pytest.raises(ValueError, match=r"nobody/no-such-model: .*the hub cannot be reached"),
    ):
        inspect_base("nobody/no-such-model")


def test_hub_that_never_answers_gives_one_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with (
            patch.object(constants, "ENDPOINT", address),
            patch.object(constants, "HF_HUB_CACHE", str(tmp_path)),
            patch("translora.bundle.hub.HUB_TIMEOUT_SECONDS", 0.5),
            pytest.raises(ValueError, match="the hub cannot be reached"),
        ):
            inspect_base("nobody/no-such-model")


def test_hub_cache_is_used_when_the_hub_is_away(base: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    with patch.object(constants, "HF_HUB_OFFLINE", True), patch.object(constants, "HF_HUB_CACHE", str(tmp_path)):
        info = inspect_base("org/tiny")
        assert inspect_base("org/tiny", revision=commit).path == info.path
        base_of_a_run = pinned(BaseModelConfig(model="org/tiny"), info)
        (repository / "refs" / "main").write_text("f" * 40)
        assert info_of(base_of_a_run).path == info.path, "though the hub's main is another one by now"
        setting, run_dir = BaseModelConfig(model="org/tiny"), tmp_path / "run"
        assert info_as_begun(run_dir, setting).path == info.path
        note_commits(run_dir, (setting, info), (BaseModelConfig(model=str(base)), inspect_base(str(base))))
        hub._find_on_hub.cache_clear()  # as in another process
        assert info_as_begun(run_dir, setting).path == info.path, "a run goes on with what it began with"
        with pytest.raises(ValueError, match="org/tiny: not a directory here"):
            info_as_begun(tmp_path / "new", setting)
        write_json(tmp_path / "old" / COMMITS, {"org/tiny@": "e" * 40})
        with pytest.raises(ValueError, match=r"the run began with commit e{40}; remove .*commits.json to go on"):
            info_as_begun(tmp_path / "old", setting)
        assert read_object(run_dir / COMMITS) == {"org/tiny@": commit}, "a directory has no commit"
        with pytest.raises(ValueError, match=r"org/tiny: not a directory here, not in the hub's cache"):
            inspect_base("org/tiny", revision="other")
    assert info.revision == base_of_a_run.revision == commit
    assert base_of_a_run.decides() == BaseModelConfig(model="org/tiny").decides(), "what it holds decides, not its name"
    local = BaseModelConfig(model=str(base))
    assert pinned(local, info_of(local)) == local
    assert info.name == "org/tiny"
    assert info.path == repository / "snapshots" / commit
    assert info.fingerprint == inspect_base(str(base)).fingerprint


def test_importing_bundles_loads_no_torch() -> None:
    code = "import sys, translora.bundle; assert not {'torch', 'ray', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_header_reads_what_safetensors_writes(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, 5).to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
        "scalar": torch.ones(()).to(dtype),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: entry.shape for name, entry in header.items()} == {"a": (3, 5), "empty": (0, 4), "scalar": ()}
    assert header["a"].num_bytes == tensors["a"].nbytes


@settings(derandomize=True, max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_headers_only_raise_value_errors(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        header = read_header(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert sum(entry.num_bytes for entry in header.values()) < path.stat().st_size


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_tiny_bases_generate(family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    path = make_base(tmp_path / family, family)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    batch = tokenizer(["Here are 10 examples:", "yes"], return_tensors="pt", padding=True)
    output = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=4, do_sample=False
    )
    assert output.shape == (2, batch["input_ids"].shape[1] + 4)
    assert (tokenizer.chat_template is not None) == (family == "llama")
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id == 0
    again = make_base(tmp_path / "again", family)
    assert inspect_base(str(again)).fingerprint == inspect_base(str(path)).fingerprint
