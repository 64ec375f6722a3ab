"""Typed configuration of merging: the methods and their settings, for the command's flags and for a fleet file.

Importing this module loads neither torch nor ray.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from translora.config.own import OwnSettings
from translora.config_file import NAME_PATTERN, Attention, DType, Strict, faults_text
from translora.errors import InputError

Combination = Literal[
    "linear",
    "static_cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
"""PEFT's combinations; `static_cat` is its `cat`."""
Method = Literal["cat", "iteris", "regmean", "fedex", "component_mean"] | Combination
METHODS: tuple[str, ...] = tuple(name for part in get_args(Method) for name in (get_args(part) or (part,)))
COMBINATIONS: tuple[str, ...] = get_args(Combination)
STACKED = ("cat", "static_cat", "iteris", "regmean")
"""Methods whose result has the sum of the ranks."""
NEED_OWN_DATA = ("iteris", "regmean")
"""Methods that want one data file for each adapter."""


class IterisSettings(Strict):
    """IterIS (arXiv 2411.15231); RegMean is one solve with equal weights and no regularisation."""

    max_iter: int = Field(default=10, ge=1, le=100)
    """Solves; the first takes the inputs of the single adapters, each later one those of the model merged so far."""
    a1: float = Field(default=1e-5, ge=0)
    """Regularisation of G, relative to its norm (paper: 1e-7 to 1e-4)."""
    a2: float = Field(default=1e-5, ge=0)
    """Regularisation of H, relative to its norm (paper: 1e-7 to 1e-4)."""
    reg_coef: float = Field(default=0.0, ge=0, le=1)
    """Share of the single adapter's inputs that is mixed into the merged model's."""
    norm: Literal["delta", "base+delta", "equal"] = "delta"
    """Whose norm weighs a task: the LoRA's (paper), base and LoRA together, or every task alike."""
    max_gram_gigabytes: float = Field(default=16.0, gt=0)
    """Most memory for Grams; more modules than fit take turns, with a pass over the data each. Solving takes three
    to five matrices of a module's width more for each thread."""
    num_threads: int = Field(default=4, ge=1)
    """Modules that are solved side by side."""


REGMEAN: dict[str, Any] = {"max_iter": 1, "a1": 0.0, "a2": 0.0, "norm": "equal"}
"""What makes RegMean of IterIS."""


class CatSettings(Strict):
    """CAT (LoRA Soups, arXiv 2410.13025): one learned scalar per adapter and module."""

    coefficients: Literal["softmax", "unconstrained"] = "unconstrained"
    """`unconstrained`: any real number; `softmax`: convex in each module (paper), see docs/merging.md."""
    learning_rate: float = Field(default=0.02, gt=0)
    """Peak learning rate of AdamW, linear decay; the paper's 1e-4 hardly moves the coefficients."""
    epochs: float = Field(default=3, gt=0)
    """Passes over the mixture (paper: 1)."""
    batch_size: int = Field(default=6, ge=1)
    """Rows of an optimizer step."""


SPARSE = tuple(name for name in COMBINATIONS if name.startswith(("ties", "dare", "magnitude")))
SETTINGS_OF: dict[str, tuple[Sequence[str], str]] = {
    "density": (SPARSE, "ties, dare and magnitude_prune"),
    "majority_sign_method": ([name for name in SPARSE if "ties" in name], "ties"),
    "max_length": (("cat", *NEED_OWN_DATA), "cat, iteris and regmean"),
    "max_samples": (("cat", *NEED_OWN_DATA), "cat, iteris and regmean"),
    "batch_size": (NEED_OWN_DATA, "iteris and regmean (for cat see cat.batch_size)"),
    "iteris": (NEED_OWN_DATA, "iteris and regmean"),
    "cat": (("cat",), "cat"),
}
"""Methods that follow a setting, and their names in words."""


class MergeSettings(Strict):
    """What a merge by the command and one of a fleet file have in common."""

    added: ClassVar[frozenset[str]] = frozenset({"max_samples"})

    method: Method
    """How the adapters are merged."""
    weights: list[float] | None = None
    """One for each adapter; equal ones when unset: 1 for ties, which divides by the number that agree, else 1/N."""
    rank: int | None = Field(default=None, ge=1, le=1024)
    """Truncate the result to this rank: the best approximation of it, as PEFT's svd finds it."""
    density: float = Field(default=0.5, gt=0, lt=1)
    """Share of entries that ties, dare and magnitude_prune keep."""
    majority_sign_method: Literal["total", "frequency"] = "total"
    """How ties elects signs."""
    max_length: int = Field(default=1024, ge=8)
    """Longest prompt plus answer, in tokens; longer rows are dropped with a warning."""
    batch_size: int = Field(default=8, ge=1)
    """Rows of a forward pass of iteris and regmean."""
    max_samples: int = Field(default=512, ge=1)
    """Most rows of each file, drawn at random: a merge learns from few (paper: 20 to 60 for iteris, 5 % for cat)."""
    iteris: IterisSettings = IterisSettings()
    """Settings of iteris, and of regmean those of its memory."""
    cat: CatSettings = CatSettings()
    """Settings of cat."""

    @property
    def needs_data(self) -> bool:
        """Whether the method runs the base over data."""
        return self.method in ("cat", *NEED_OWN_DATA)

    @property
    def solving(self) -> IterisSettings:
        """IterIS's settings as the method uses them."""
        return self.iteris.model_copy(update=REGMEAN if self.method == "regmean" else {})

    def check(self, num_adapters: int, num_files: int) -> None:
        """Compare weights and data with the adapters.

        Raises:
            InputError: names the setting and the remedy.
        """
        if self.weights is not None and len(self.weights) != num_adapters:
            raise InputError(f"weights: {len(self.weights)} for {num_adapters} adapters; give one for each")
        if self.weights is not None and not any(self.weights):
            raise InputError("weights: all are 0, which leaves nothing of the adapters; give one that is not")
        if self.weights is not None and self.needs_data:
            raise InputError(f"weights: {self.method} finds its own; leave them out, or use another method")
        for setting, (methods, words) in SETTINGS_OF.items():
            if setting in self.model_fields_set and self.method not in methods:
                raise InputError(f"{setting}: {self.method} does not follow it, which is of {words}; leave it out")
        default = IterisSettings()
        for key in (*REGMEAN, "reg_coef") if self.method == "regmean" else ():
            if getattr(self.iteris, key) != getattr(default, key):
                raise InputError(
                    f"iteris.{key}: regmean is iteris with one solve, equal weights and no regularisation; leave it "
                    "out, or use iteris with max_iter 1 and norm equal"
                )
        averages = self.method in ("fedex", "component_mean")
        if self.weights is not None and averages and (min(self.weights) <= 0 or abs(sum(self.weights) - 1) > 1e-6):
            raise InputError(f"weights: {self.method} is an average; give positive weights that sum to 1")
        if self.method in NEED_OWN_DATA and num_files != num_adapters:
            raise InputError(
                f"data: {num_files} files for {num_adapters} adapters; {self.method} takes one for each, "
                "in the adapters' order"
            )
        if self.method == "cat" and not num_files:
            raise InputError("data: missing; cat learns from a small mixture of the skills' data")
        if num_files and not self.needs_data:
            raise InputError(f"data: {self.method} uses none; leave it out, or use cat, iteris or regmean")


class MergeConfig(MergeSettings):
    """`translora merge METHOD --adapters ... --data ... --out ...`."""

    adapters: list[Path] = Field(min_length=2)
    """PEFT directories of one base, bundles included; their order changes nothing."""
    out: Path
    """The merged adapter's directory."""
    data: list[Path] = []
    """JSONL (`input`, and `answer` or `target`) or a run's synthetic.parquet; for iteris and regmean one file for each
    adapter, in their order, for cat any number."""
    base: str | None = None
    """Model directory or hub id; what the adapters' configs name when unset."""
    dtype: DType = "auto"
    """Dtype of the base in the passes over the data; `auto` is bfloat16 where the device gains by it."""
    attn_implementation: Attention = "auto"
    """As for any base."""
    trust_remote_code: bool = False
    """As for any base: run the Python code that lies in its directory."""
    prompt_template: str = "auto"
    """As in prepare.yaml."""
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    """Root of every random number."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({path.resolve() for path in self.adapters}) < len(self.adapters):
            raise InputError("adapters: one is named twice; give it a larger weight instead")
        if self.out.resolve() in {path.resolve() for path in self.adapters}:
            raise InputError(f"out: {self.out} is one of the adapters; give another directory")
        out, base = self.out.resolve(), [Path(self.base)] if self.base and Path(self.base).exists() else []
        for path in [*self.adapters, *self.data, *base]:
            own = path.resolve()
            if own.is_relative_to(out):
                raise InputError(f"out: {self.out} would replace {path}; give another directory")
            if out.is_relative_to(own):
                raise InputError(f"out: {self.out} would lie in {path}; give another directory")
        self.check(len(self.adapters), len(self.data))
        self.out = out  # so that what a link points to is replaced, and not the link
        return self


class MergeEntry(MergeSettings, OwnSettings):
    """Adapters of a fleet that become one; what is merged before the migration may have settings of its own for it."""

    added: ClassVar[frozenset[str]] = MergeSettings.added | {
        "screen",
        "epochs",
        "learning_rate",
        "min_agreement",
        "prompt_template",
        "stop",
    }

    name: str = Field(pattern=NAME_PATTERN)
    """Name of the merged adapter within the run."""
    when: Literal["before", "after"]
    """`before`: the bundles are merged on the source base, and the result migrates like any other; `after`: adapters
    that were migrated are merged on the target base, into a bundle of it."""
    adapters: list[str] = Field(min_length=2)
    """Before: directories of bundles, which need not be adapters of the fleet. After: names of the fleet's adapters."""
    data: list[str] = []
    """As in `translora merge`. Before, cat, iteris and regmean need it; after, they take the adapters' synthetic sets
    when it is unset."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(map(os.path.normpath, self.adapters))) < len(self.adapters):
            raise InputError("adapters: one is named twice; give it a larger weight instead")
        synthetic = len(self.adapters) if self.when == "after" and self.needs_data else 0
        self.check(len(self.adapters), len(self.data) or synthetic)
        for name in OwnSettings.model_fields.keys() - {"num_samples"} if self.when == "after" else ():
            if getattr(self, name) is not None:
                raise InputError(f"{name}: what is merged after the migration is not trained or judged; leave it out")
        if self.screen in ("discriminator", "realness"):
            raise InputError(f"screen: {self.screen} asks a discriminator, which no merge has; leave it out")
        return self


def merge_config(settings: dict[str, Any], assignments: Sequence[str] = ()) -> MergeConfig:
    """A checked config of the command's flags and its `--set section.key=value` assignments.

    Raises:
        InputError: names the setting and what is wrong with it.
    """
    raw = {key: value for key, value in settings.items() if value is not None}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        *sections, last = key.strip().split(".")
        if not equals or not last:
            raise InputError(f"--set {assignment}: not of the form iteris.max_iter=5")
        if key.strip() in raw:
            raise InputError(f"--set {assignment}: {key.strip()} is given already; give it once")
        inner = raw
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise InputError(f"--set {assignment}: {section} has no settings of its own")
        if key.strip() == "prompt_template":  # {input} is no mapping
            inner[last] = text
            continue
        try:
            inner[last] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"--set {assignment}: the value is no plain value ({error})") from error
    try:
        return MergeConfig.model_validate(raw)
    except ValidationError as error:
        raise InputError(faults_text(MergeConfig, error)) from error


def merged_rank(method: str, ranks: Sequence[int], num_adapters: int) -> int:
    """Rank of a module after a merge that cuts none, from the ranks of those of the adapters that have it."""
    if method in STACKED:
        return sum(ranks)
    return max(ranks) * (num_adapters if method == "fedex" else 1)
