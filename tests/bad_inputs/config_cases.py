"""Bad fleet files, prepare files and JSONL files."""

from __future__ import annotations

from collections.abc import Callable

from tests.bad_inputs.workshop import Bench, Case
from translora.config import AdapterEntry, FleetConfig, PrepareConfig, load_config
from translora.merge.data import answer_of
from translora.merge.fleet import entries_before
from translora.run.entries import expand_entries
from translora.run.files import read_jsonl

FLEET = """\
run_dir: run
source: {model: ./old-base}
target: {model: ./new-base}
adapters: [bundles/orders]
"""
PREPARE = """\
output_dir: bundles
run_dir: run
source: {model: ./old-base}
tasks:
  - {name: orders, data: orders.jsonl}
"""


def fleet(text: str) -> Callable[[Bench], object]:
    """Load this text as a fleet file."""
    return lambda bench: load_config(bench.file("fleet.yaml", text), FleetConfig)


MERGE = FLEET.replace("{", "{{").replace("}", "}}") + "merges: [{{name: desk, when: {0}, {1}}}]\n"


def merge(settings: str) -> Callable[[Bench], object]:
    """Load a fleet file with this merge before the migration."""
    return fleet(MERGE.format("before", settings))


def prepare(text: str) -> Callable[[Bench], object]:
    """Load this text as a prepare file."""
    return lambda bench: load_config(bench.file("prepare.yaml", text), PrepareConfig)


def adapters(*bundles: str) -> Callable[[Bench], object]:
    """Expand these entries of a fleet file whose run_dir is `run`."""
    return lambda bench: expand_entries(
        [AdapterEntry(bundle=str(bench.directory / path)) for path in bundles], bench.directory / "run"
    )


def jsonl(content: str | bytes) -> Callable[[Bench], object]:
    """Read this content as task data."""
    return lambda bench: read_jsonl(bench.file("orders.jsonl", content), ("input", "target"))


CASES = [
    Case("not YAML", fleet("run_dir: [run\n"), "not valid YAML"),
    Case(
        "a key that comes twice",
        fleet(FLEET + "distill: {epochs: 3}\ndistill: {batch_size: 4}\n"),
        "not valid YAML: the key 'distill' comes twice",
    ),
    Case(
        "a yes for a number",
        fleet(FLEET + "distill: {learning_rate: yes}\n"),
        "distill: learning_rate: expected a number, found True",
    ),
    Case(
        "a text for a list",
        fleet(FLEET + "distill: {lora: {target_modules: q_proj}}\n"),
        "distill.lora.target_modules: Input should be a valid list; write [q_proj] or Input should be 'all-linear'",
    ),
    Case(
        "a URL for a path",
        fleet(FLEET.replace("run_dir: run", "run_dir: s3://bucket/run")),
        "s3://bucket/run: is a URL, which only bundles may be",
    ),
    Case(
        "a merge by weights of 0",
        merge("method: svd, adapters: [orders, mails], weights: [0, 0]"),
        "weights: all are 0",
    ),
    Case("a seed beyond 64 bits", fleet(FLEET + "seed: 99999999999999999999\n"), "seed: Input should be less than"),
    Case(
        "a run directory among its bundles",
        prepare(PREPARE.replace("run_dir: run", "run_dir: bundles/orders/run")),
        "and the bundle",
    ),
    Case("a YAML file without end", fleet("run_dir: " + "[" * 3000), "not valid YAML: nested too deep"),
    Case(
        "more epochs than there can be",
        fleet(FLEET + "distill: {epochs: 1.0e+300}\n"),
        "distill.epochs: Input should be",
    ),
    Case(
        "a temperature of nothing",
        fleet(FLEET + "synthesis: {sampling: {temperature: 1.0e-300}}\n"),
        "sampling.temperature: Input should be greater",
    ),
    Case(
        "a |D| beyond what a bundle may have",
        prepare(PREPARE.replace("data:", "num_samples: 20000000, data:")),
        "tasks.0.num_samples: Input should be less",
    ),
    Case("an empty path", fleet(FLEET.replace("[bundles/orders]", '[""]')), "an empty path; leave it out, or write it"),
    Case("a section without settings", fleet(FLEET + "distill:\n"), "it is empty: leave it out, or give it a value"),
    Case(
        "a no for a screen",
        fleet(FLEET + "synthesis: {screen: no}\n"),
        "found False, as YAML reads yes, no, on and off; put it in quotation",
    ),
    Case("a date that is none", fleet("run_dir: 2026-02-30\n"), "not valid YAML: day is out of range for month"),
    Case("a path with a NUL", fleet('run_dir: "run\\0"\n'), "holds a NUL character; correct the path"),
    Case("binary", lambda bench: load_config(bench.file("fleet.yaml", b"\xff\xfe\x00"), FleetConfig), "cannot be read"),
    Case("an empty file", fleet(""), "expected a mapping"),
    Case("a YAML list", fleet("- run\n"), "expected a mapping"),
    Case("an unknown key", fleet(FLEET + "bases: []\n"), "bases: unknown setting; known are adapters, discriminator"),
    Case(
        "a misspelt key in a section",
        fleet(FLEET + "distill: {lora: {rnak: 4}}\n"),
        "distill.lora.rnak: unknown setting; did you mean rank?",
    ),
    Case(
        "a misspelt key of one adapter",
        fleet(FLEET.replace("[bundles/orders]", "[{bundle: bundles/orders, samples: 4}]")),
        "adapters.0.samples: unknown setting; did you mean num_samples?",
    ),
    Case("a missing key", fleet(FLEET.replace("target: {model: ./new-base}\n", "")), "target: Field required"),
    Case("a wrong type", fleet(FLEET + "distill: {epochs: many}\n"), "distill.epochs: Input should be a valid number"),
    Case(
        "a value out of range",
        fleet(FLEET + "distill: {learning_rate: 0}\n"),
        "distill.learning_rate: Input should be greater",
    ),
    Case(
        "no epoch and nothing to copy",
        fleet(FLEET + "distill: {epochs: 0}\n"),
        "distill: epochs: 0 trains nothing; give some, or copy the source adapters with warm_start",
    ),
    Case(
        "a number without end",
        fleet(FLEET + "synthesis: {max_generated_factor: .inf}\n"),
        "synthesis.max_generated_factor: Input should be a finite number",
    ),
    Case(
        "a variable that is not set",
        fleet(FLEET.replace("run_dir: run", "run_dir: $TRANSLORA_UNSET/run")),
        "the environment variable TRANSLORA_UNSET is not set",
    ),
    Case("a prepare file for migrate", fleet(PREPARE), "this is a prepare file; use `translora prepare`"),
    Case("a fleet file for prepare", prepare(FLEET), "this is a fleet file; use `translora migrate`"),
    Case("a section that is text", fleet(FLEET + "synthesis: fast\n"), "synthesis: Input should be"),
    Case("a base that is text", fleet(FLEET.replace("{model: ./old-base}", "./old-base")), "write {model: ./old-base}"),
    Case("no adapters", fleet(FLEET.replace("[bundles/orders]", "[]")), "adapters: List should have at least 1 item"),
    Case(
        "adapters that are text",
        fleet(FLEET.replace("[bundles/orders]", "bundles")),
        "adapters: Input should be a valid list; write [bundles]",
    ),
    Case("a rank over the limit", fleet(FLEET + "distill: {lora: {rank: 4096}}\n"), "distill.lora.rank: Input should"),
    Case("an unknown dtype", fleet(FLEET.replace("./new-base}", "./new-base, dtype: int4}")), "target.dtype: Input"),
    Case(
        "a merge that asks a discriminator",
        merge("method: svd, adapters: [orders, mails], screen: realness"),
        "merges.0: screen: realness asks a discriminator, which no merge has; leave it out",
    ),
    Case("a merge of one bundle", merge("method: svd, adapters: [orders]"), "merges.0.adapters: List should have"),
    Case("a merge without a method", merge("adapters: [orders, mails]"), "merges.0.method: Field required"),
    Case(
        "a misspelt setting of a merge",
        merge("method: svd, adapters: [orders, mails], rnak: 4"),
        "merges.0.rnak: unknown setting; did you mean rank?",
    ),
    Case(
        "a merge before the migration that has no data",
        merge("method: iteris, adapters: [orders, mails]"),
        "merges.0: data: 0 files for 2 adapters; iteris takes one for each",
    ),
    Case(
        "data for a merge that uses none",
        merge("method: svd, adapters: [orders, mails], data: [orders.jsonl]"),
        "merges.0: data: svd uses none; leave it out",
    ),
    Case("a merge that names a bundle twice", merge("method: svd, adapters: [orders, orders]"), "named twice"),
    Case(
        "a merge of adapters that the fleet has not",
        lambda bench: entries_before(
            load_config(
                bench.file("fleet.yaml", MERGE.format("after", "method: svd, adapters: [orders, mails]")), FleetConfig
            ),
            ["orders"],
        ),
        "merges: desk: no adapter of this fleet is named mails",
    ),
    Case(
        "a merge with the name of an adapter",
        lambda bench: entries_before(
            load_config(
                bench.file(
                    "fleet.yaml",
                    MERGE.replace("desk", "orders").format("before", "method: svd, adapters: [orders, mails]"),
                ),
                FleetConfig,
            ),
            ["orders"],
        ),
        "merges: the name orders is taken by another adapter",
    ),
    Case(
        "a warm start of what is no LoRA",
        fleet(FLEET + "distill: {warm_start: true, peft: {peft_type: IA3}}\n"),
        "distill: warm_start: copies a LoRA as a whole; leave peft, lora.chain and lora.init out",
    ),
    Case(
        "a warm start where there is no source adapter",
        prepare(PREPARE + "train: {warm_start: true}\n"),
        "train.warm_start: training on real data has no source adapter to begin with; set it to false",
    ),
    Case(
        "an initialisation that there is not",
        fleet(FLEET + "distill: {lora: {init: pissa}}\n"),
        "distill.lora.init: Input should be 'kaiming' or 'eva'",
    ),
    Case(
        "LoRA-Pro with an option that takes one factor out of its step",
        fleet(FLEET + "distill: {lora: {gradient: lora-pro, random_half: true}}\n"),
        "distill.lora: gradient: lora-pro moves A and B together",
    ),
    Case(
        "noise larger than the weights",
        fleet(FLEET + "distill: {lora: {flat_sigma: 5}}\n"),
        "distill.lora.flat_sigma: Input should be less than or equal to 1",
    ),
    Case(
        "a loss of a teacher where there is only the owner's data",
        prepare(PREPARE + "train: {loss: kl}\n"),
        "train.loss: kl wants a teacher, and training on real data has none; use sft",
    ),
    Case(
        "an unknown PEFT method",
        fleet(FLEET + "distill: {peft: {peft_type: PREFIX}}\n"),
        "distill.peft: peft_type is 'PREFIX'; supported are C3A",
    ),
    Case(
        "tokens chosen by a source adapter where there is only the owner's data",
        prepare(PREPARE + "train: {token_share: 0.7}\n"),
        "train.token_share: is by the source adapter, and training on real data has none; set it to 1",
    ),
    Case(
        "an unknown loss",
        fleet(FLEET + "distill: {loss: mse}\n"),
        "distill.loss: Input should be 'auto', 'sft' or 'kl'",
    ),
    Case(
        "a share of the GPUs' memory for vLLM that is none",
        fleet(
            FLEET.replace(
                "source: {model: ./old-base}", "source: {model: ./old-base, vllm: {gpu_memory_utilization: 45}}"
            )
        ),
        "source.vllm: gpu_memory_utilization: 45 is no share of a GPU's memory, above 0 and at most 1",
    ),
    Case(
        "GPUs for vLLM as text",
        fleet(
            FLEET.replace(
                "source: {model: ./old-base}", 'source: {model: ./old-base, vllm: {tensor_parallel_size: "8"}}'
            )
        ),
        "source.vllm: tensor_parallel_size: '8' is no positive number; give one, or leave it out",
    ),
    Case("a task name twice", prepare(PREPARE + "  - {name: orders, data: b.jsonl}\n"), "task names appear twice"),
    Case("a task name with a slash", prepare(PREPARE.replace("name: orders", "name: a/b")), "tasks.0.name: String"),
    Case(
        "a task without data, adapter and seeds",
        prepare(PREPARE.replace("data: orders.jsonl", "adapter: adapters/orders")),
        "tasks.0: give `data`; or, where the data is gone, `adapter` and `seeds`",
    ),
]

PATH_CASES = [
    Case(
        "no such fleet file", lambda bench: load_config(bench.directory / "fleet.yaml", FleetConfig), "cannot be read"
    ),
    Case(
        "a directory instead of a fleet file", lambda bench: load_config(bench.directory, FleetConfig), "cannot be read"
    ),
    Case("a glob that matches nothing", adapters("bundles/*"), "matches no directory; correct it"),
    Case(
        "a run directory in a bundle",
        lambda bench: expand_entries([AdapterEntry(bundle=str(bench.bundle()))], bench.directory / "orders/run"),
        "lies in the bundle",
    ),
    Case("bundles that the run would replace", adapters("run/bundles/orders"), "there; give another run_dir"),
    Case(
        "a bundle that is named twice, with other settings",
        lambda bench: expand_entries([AdapterEntry(bundle="bundles/orders", num_samples=number) for number in (5, 9)]),
        "is named twice, with different num_samples; name it once",
    ),
    Case("two bundles of one name", adapters("a/orders", "b/orders"), "are both named orders; rename one directory"),
]

JSONL_CASES = [
    Case(
        "a row that says two things",
        jsonl('{"input": "a", "target": "b", "input": "c"}'),
        "line 1: not JSON (the key 'input' comes twice)",
    ),
    Case(
        "a row of a merge whose answer is NaN",
        lambda bench: answer_of({"target": float("nan")}, "orders.jsonl, row 3"),
        "orders.jsonl, row 3: its answer is not a number; give text",
    ),
    Case("no such data file", lambda bench: read_jsonl(bench.directory / "orders.jsonl", ("input",)), "cannot be read"),
    Case("data that is empty", jsonl("\n\n"), "no rows"),
    Case("a line that is not JSON", jsonl('{"input": "a", "target": "b"}\nnonsense\n'), "line 2: not JSON"),
    Case("a line that is no object", jsonl('["a", "b"]\n'), "line 1: expected a JSON object"),
    Case("a row without target", jsonl('{"input": "a"}\n'), 'line 1: "target" must be a non-empty string'),
    Case("a target that is a number", jsonl('{"input": "a", "target": 1}\n'), '"target" must be a non-empty string'),
    Case("an input of spaces", jsonl('{"input": "  ", "target": "b"}\n'), '"input" must be a non-empty string'),
    Case("data in Latin-1", jsonl(b'{"input": "caf\xe9", "target": "b"}\n'), "cannot be read"),
    Case("half a surrogate pair", jsonl('{"input": "\\ud83d", "target": "b"}\n'), "half a surrogate pair"),
    Case("JSON nested without end", jsonl("[" * 200_000 + "\n"), "line 1: not JSON"),
]
