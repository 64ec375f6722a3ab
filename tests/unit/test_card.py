"""The model card of a migrated bundle: read by the hub's own library, its code run on real files."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from tests.reports import full_stats, migrated
from tests.tiny import SEEDS, Family, make_adapter, make_base
from translora.bundle import inspect_base, read_bundle, verify_bundle, write_bundle
from translora.engine.prompts import prompt_format
from translora.report.card import Began, model_card
from translora.run.state import AdapterState, SynthesisStats


def state(**changes: object) -> AdapterState:
    return migrated().model_copy(update={"bundle_digest": "ab" * 32, "bundle": "/home/me/bundles/routing"} | changes)


def card(of: AdapterState, template: str = "chat", before: str = "") -> str:
    return model_card(of, source="org/old", target="org/new", prompt_template=template, before=before)


def cells(text: str) -> dict[str, str]:
    """The provenance table by its first column."""
    rows = [line.replace("\\|", "/").strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def test_the_hub_reads_its_metadata() -> None:
    text = card(state())
    assert text.startswith("---\n")
    assert ModelCard(text).data.to_dict() == {
        "base_model": "org/new",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["translora", "lora"],
    }
    assert str(ModelCard(text)) == text


def test_it_says_where_the_adapter_comes_from_and_how_well_it_survived() -> None:
    text = card(state(synthesis=full_stats()), before="org/older")
    assert cells(text) == {
        "---": "---",
        "moved": "`org/old` → `org/new`",
        "moved before": "`org/older` → `org/old`",
        "source bundle, sha256": f"`{'ab' * 32}`",
        "synthetic samples trained on, /D_syn/": "120",
        "screen of the synthetic inputs": "discriminator",
        "acceptance": "72%: 144 of 200 generated inputs",
        "distinct-1 of the kept inputs": "0.31",
        "distinct-2 of the kept inputs": "0.73",
        "different answers of the teacher": "3",
    }
    flat = " ".join(text.split())
    assert "(n = 24) it agrees with its teacher" in flat and "in 88% of the answers" in flat and "does in 12%." in flat
    assert "on 50 real held-out items" in flat and "| 10% | 90% | 20% | 84% |" in flat
    assert "- two answers of three are billing\n" in text, "what a person should look at"


def test_what_was_not_measured_is_left_out() -> None:
    text = card(state(accuracy=None))
    assert "was not measured" in text and "source adapter |" not in text and "log-likelihood" not in text
    assert (
        not {"moved before", "screen of the synthetic inputs", "different answers of the teacher"} & cells(text).keys()
    )
    assert "\n\n\n" not in text and "{" not in text.partition("```")[0]


@pytest.mark.parametrize("changes", [{}, {"accuracy": None}, {"synthesis": full_stats()}])
def test_headings_tables_and_fences_stand_apart(changes: dict[str, object]) -> None:
    lines = card(state(**changes)).splitlines()
    for before, line in pairwise(lines):
        starts = line.startswith(("# ", "## ", "```python")) or (line.startswith("| ") and not before.startswith("| "))
        assert not starts or before == "", (before, line)


@pytest.mark.parametrize(
    ("began", "said", "unsaid"),
    [
        ("fresh", "It was never trained on that task's own data", "put on the new base"),
        ("warm", "whose weights were trained on that task's own data, and trained it on synthetic", "never trained"),
        ("copy", "its weights were trained on that task's own data, and on nothing else", "synthetic samples trained"),
    ],
)
def test_it_says_what_data_its_weights_have_seen(began: Began, said: str, unsaid: str) -> None:
    text = model_card(state(), source="old", target="new", prompt_template="chat", began=began)
    flat = " ".join(text.split())
    assert said in flat and unsaid not in flat
    moved = model_card(state(), source="old", target="new", prompt_template="chat", before="older", began=began)
    assert began == "fresh" or ("was moved to that base before" in " ".join(moved.split()) and said not in moved)
    assert "synthetic inputs only" in flat and "\n\n\n" not in text


@pytest.mark.parametrize("template", ["\U0001f9fe {input}", "'{input}'\n\"```\"", "\\{input}"])
def test_its_code_has_the_template_itself(template: str) -> None:
    text = model_card(state(), source="old", target="new", prompt_template=template)
    code = text.partition("```python\n")[2].partition("```")[0]
    (line,) = [line for line in code.splitlines() if line.startswith("prompt = ")]
    assert ast.literal_eval(line.removeprefix("prompt = ").partition(".replace(")[0]) == template


def test_samples_that_were_too_long_are_not_counted_as_trained_on() -> None:
    stats = SynthesisStats(num_train=120, num_too_long=20)
    text = card(state(synthesis=stats))
    assert cells(text)["synthetic samples trained on, /D_syn/"] == "100"
    assert "20 of 120 samples are longer than distill.max\\_length, and were not trained on" in " ".join(text.split())


def test_a_discriminator_is_spoken_of_where_there_is_one() -> None:
    files = {"adapters/routing/student": "ab", "adapters/routing/discriminator": "cd"}
    assert "example inputs and a\ndiscriminator" in card(state(name="routing", artifacts=files))
    files.popitem()
    assert "discriminator." not in card(state(name="routing", artifacts=files))


def test_a_template_that_writes_out_its_first_token_is_not_given_another() -> None:
    text = model_card(state(), source="a", target="b", prompt_template="<bos>{input}\nA:", holds_bos=True)
    assert 'tokenizer(prompt, return_tensors="pt", add_special_tokens=False)' in text
    assert 'tokenizer(prompt, return_tensors="pt")' in card(state(), template="{input}\nA:")


def test_it_depends_on_the_migration_alone() -> None:
    later = state(seconds={"gate": 5.0}, bundle="/elsewhere/routing", output="bundles/routing")
    assert card(state()) == card(later)
    assert "/home" not in card(state()) and "61.7" not in card(state())
    assert card(state()) != card(state(num_samples=121))


def test_names_cannot_leave_their_place() -> None:
    text = model_card(state(name="a\n# b"), source="x` | y\nz", target="new", prompt_template="chat")
    assert "# a \\# b\n" in text
    assert r"| moved | `x' \| y z` → `new` |" in text


def test_what_models_said_is_no_markup() -> None:
    said = "<img src=x onerror=alert(1)> [click](javascript:alert(1)) ![](http://evil) `code` *x* | y"
    stats = full_stats().model_copy(update={"warning": f"the teacher answers {said!r}", "screen": "<b>"})
    text = card(state(name="<script>", synthesis=stats))
    assert "# \\<script\\>\n" in text and re.search(r"(?<!\\)<(?!u)[a-z]", text) is None
    line = next(line for line in text.splitlines() if "the teacher answers" in line)
    assert re.search(r"(?<!\\)[<>\[\]`*|]", line) is None


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_its_code_loads_the_bundle_and_asks_as_the_adapter_was_trained(family: Family, tmp_path: Path) -> None:
    path = make_base(tmp_path / "new", family)
    base, form = inspect_base(str(path)), prompt_format(AutoTokenizer.from_pretrained(path))
    text = model_card(state(), source="old", target=base.name, prompt_template=form.template)
    bundle = write_bundle(
        tmp_path / "bundle",
        adapter_dir=make_adapter(tmp_path / "adapter", path),
        discriminator_dir=None,
        seeds=list(SEEDS),
        task_name="tickets",
        base=base,
        num_samples=120,
        prompt_template=form.template,
        provenance={},
        model_card=text,
    )
    match = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert match is not None
    code = match[1].replace('"new"', repr(str(path))).replace("path/to/this/directory", str(bundle.path))
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(names["answer"], str)
    assert names["inputs"]["input_ids"][0].tolist() == form.encode_prompt("an input of the task")  # type: ignore[index]


def test_the_bundle_has_its_card_from_the_first_moment_and_the_same_digest(tmp_path: Path) -> None:
    base = inspect_base(str(make_base(tmp_path / "new")))
    adapter = make_adapter(tmp_path / "adapter", base.path)
    bundles = [
        write_bundle(
            tmp_path / name,
            adapter_dir=adapter,
            discriminator_dir=None,
            seeds=list(SEEDS),
            task_name="tickets",
            base=base,
            num_samples=120,
            prompt_template="chat",
            provenance={},
            model_card=text,
        )
        for name, text in (("with", card(state())), ("without", None))
    ]
    assert bundles[0].digest == bundles[1].digest
    assert (tmp_path / "with/README.md").read_text() == card(state())
    assert (tmp_path / "without/README.md").read_text() != card(state()), "the adapter's own"
    verify_bundle(read_bundle(tmp_path / "with"), base)
