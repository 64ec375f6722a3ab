"""Typed configuration of `translora migrate` and `translora prepare`.

Importing this module loads neither torch nor ray. Every field is checked before a model is
touched; unknown keys are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from translora.config_file import NAME_PATTERN, Attention, ConfigFile, DType, Strict
from translora.config_file import load_config as load_config
from translora.lora.kinds import MAX_RANK, check_kind
from translora.merge.config import MergeEntry

VLLM_EXECUTION_ONLY = frozenset(
    {
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "swap_space",
        "enforce_eager",
        "compilation_config",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "distributed_executor_backend",
        "disable_custom_all_reduce",
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_loras",
        "max_cpu_loras",
        "max_parallel_loading_workers",
        "enable_prefix_caching",
        "block_size",
        "disable_log_stats",
    }
)
"""Engine arguments of vLLM that change no result, but for rounding."""
Screen = Literal["auto", "discriminator", "excess", "none"]


class BaseModelConfig(Strict):
    """A base model: where it is and how it is loaded."""

    model: str
    """Local directory (config.json, *.safetensors, tokenizer) or hub id."""
    dtype: DType = "auto"
    """Weights' dtype in synthesis and gate; `auto` is bfloat16 where the device multiplies it natively."""
    attn_implementation: Attention = "auto"
    """`auto` is the FlashAttention (3, 4 or 2) that is installed and made for the GPU, SDPA elsewhere."""
    trust_remote_code: bool = False
    """Run the Python code that lies in this base's directory, on every node and with all rights of the run: for a base
    that transformers cannot build by itself, and whose code you have read."""
    vllm: dict[str, Any] | None = None
    """Generate and score with vLLM, by engine arguments in vLLM's own words, {} for none (gpu_memory_utilization,
    max_model_len, ...); transformers when unset."""

    def decides(self) -> dict[str, Any]:
        """What of it decides results, but for rounding; without `vllm` where it is unset, as before there was any."""
        found = self.model_dump(exclude={"vllm"})
        if self.vllm is not None:
            found["vllm"] = {key: value for key, value in self.vllm.items() if key not in VLLM_EXECUTION_ONLY}
        return found


class AdapterEntry(Strict):
    """One bundle, or a glob over bundles."""

    bundle: str
    """Bundle directory or a glob pattern over bundle directories, or a URL of either (s3://bucket/bundles/*)."""
    num_samples: int | None = Field(default=None, ge=2)
    """|D_syn|; the bundle's own |D| when unset."""
    eval_data: str | None = None
    """JSONL with `input` and `target`: real held-out data, only measured on, never trained on."""
    screen: Screen | None = None
    """This adapter's own synthesis.screen."""
    epochs: float | None = Field(default=None, gt=0)
    """This adapter's own distill.epochs."""
    learning_rate: float | None = Field(default=None, gt=0)
    """This adapter's own distill.learning_rate."""


class SamplingConfig(Strict):
    """How the generator samples task inputs."""

    temperature: float = Field(default=0.9, gt=0)
    """Softmax temperature."""
    top_k: int = Field(default=50, ge=1)
    """Candidates kept at each step (a full sort of a 262k vocabulary costs more than the forward pass)."""
    max_new_tokens: int = Field(default=96, ge=1)
    """Longest task input, in tokens of the generator."""


class SynthesisConfig(Strict):
    """Rounds of generate, screen and label."""

    generator: BaseModelConfig | None = None
    """Model that invents task inputs; the target base when unset (as in the paper)."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling of task inputs."""
    batch_size: int = Field(default=24, ge=1)
    """Rows in one forward pass; rows of different adapters share it."""
    max_answer_tokens: int = Field(default=64, ge=1)
    """Longest answer of the teacher, in tokens of the source base; longer answers are dropped as malformed."""
    screen: Screen = "auto"
    """Which inputs are kept: those that the owner's `discriminator` takes for real (the paper), those on which the
    adapter has most to say beyond its base (`excess`, for bundles without a discriminator), or all (`none`); `auto` is
    the discriminator where the bundle has one that tells real inputs from invented ones, and excess elsewhere."""
    excess_surplus: float = Field(default=1.5, ge=1)
    """Excess screen: collect |D_syn| times this, and keep those with the greatest excess."""
    seed_similarity: float = Field(default=0.9, gt=0, le=1)
    """An input as similar as this to a seed (edit similarity, 1 is equal) is dropped: it would leak the seed."""
    duplicate_similarity: float = Field(default=0.97, gt=0, le=1)
    """An input as similar as this to an earlier one, with the same numbers in it, is dropped; 1 drops equal ones."""
    num_orderings: int = Field(default=5, ge=1)
    """Orders of the seeds in an adapter's few-shot prompts; rows of the same order share the prompt's computing."""
    oversample: float = Field(default=1.15, ge=1)
    """A round generates (missing / expected acceptance) times this."""
    max_rounds: int = Field(default=6, ge=1)
    """Rounds before an adapter that is still short gives up."""
    max_generated_factor: float = Field(default=10.0, ge=1)
    """Budget: generated inputs per adapter, as a multiple of |D_syn|."""
    min_accepted_fraction: float = Field(default=0.5, gt=0, le=1)
    """When the budget is spent: go on with fewer samples down to this fraction of |D_syn|, else quarantine."""


class ChainSettings(Strict):
    """A student as a sum of LoRAs that are trained one after the other."""

    links: int = Field(ge=2, le=64)
    """LoRAs of `rank` each; the exported one has `links` times the rank. The steps are shared out evenly."""
    layer_fraction: float = Field(default=1, gt=0, le=1)
    """Each link adapts a random share of the layers (XGBLoRA)."""
    freeze_A: bool = False
    """Each link keeps its random A and trains B alone (RAC-LoRA)."""


class LoraSettings(Strict):
    """The new adapter's shape, and ways to train it (translora/distill/options.py has the papers)."""

    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    """Rank r of A [r, in] and B [out, r]."""
    alpha: float = Field(default=16.0, gt=0)
    """The update is scaled by alpha / rank."""
    use_rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = ["q_proj", "v_proj"]
    """Names of the linear modules that are adapted, as the target base has them (paper: query and value projections),
    or `all-linear`: all but the head."""
    init: Literal["kaiming", "eva"] = "kaiming"
    """What A begins as: random, or the directions in which the inputs of the first step vary most (EVA), which that
    step is spent on. B begins as zero."""
    lora_plus_ratio: float = Field(default=1, gt=0)
    """Learning rate of B over that of A (LoRA+ takes 16)."""
    gradient: Literal["plain", "riemannian", "lora-pro"] = "plain"
    """What AdamW is given: the factors' gradients, or these made independent of the factors' scale."""
    random_half: bool = False
    """Train a random half of the weights (LoRA-SP)."""
    chain: ChainSettings | None = None
    """A chain of LoRAs instead of one (COLA)."""
    flat_sigma: float = Field(default=0, ge=0, le=1)
    """Noise on the weights of the adapted modules, relative to their rows' norms (Flat-LoRA takes 0.05)."""

    @model_validator(mode="after")
    def _is_readable(self) -> Self:
        if self.total_rank > MAX_RANK:
            raise ValueError(f"rank {self.rank} times chain.links is {self.total_rank}, the limit is {MAX_RANK}")
        return self

    @property
    def has_options(self) -> bool:
        """Whether it is trained in another way than plainly."""
        options = {"init", "lora_plus_ratio", "gradient", "random_half", "chain", "flat_sigma"}
        return self.model_dump(include=options) != LoraSettings().model_dump(include=options)

    @property
    def total_rank(self) -> int:
        """Rank of the exported LoRA."""
        return self.rank * (1 if self.chain is None else self.chain.links)

    @property
    def scaling(self) -> float:
        """What B A x is multiplied with."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)


Count = Annotated[int, Field(ge=1)] | Literal["auto"]


class TrainConfig(Strict):
    """Training of an adapter: one AdamW run with linear decay and no warm-up, no weight decay (paper)."""

    lora: LoraSettings = LoraSettings()
    """Shape of the new adapter."""
    peft: dict[str, Any] | None = None
    """Another method than `lora`, in PEFT's own words: `peft_type` (PROMPT_TUNING, PREFIX_TUNING, IA3, LORA with
    use_dora, ...) and the settings of its config class. Such students are trained one at a time, not in gangs;
    discriminators stay LoRAs."""
    warm_start: bool = False
    """Each student begins as its source adapter, where that is a LoRA and both bases are of one shape (as an update of
    one base is); an adapter of another kind begins as without."""
    epochs: float = Field(default=20, gt=0)
    """Passes over the training samples."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    batch_size: int = Field(default=8, ge=1)
    """Samples per optimizer step, over all workers."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Most samples of one adapter in one forward pass of a worker."""
    gang_size: Count = "auto"
    """Adapters that a worker trains side by side in one pass; `auto` fills the pass (see translora.distill.plan)."""
    tokens_per_pass: Count = "auto"
    """Tokens that a gang should fill a worker's pass with, as far as memory allows; `auto` is what hides the gathering
    of the base behind the computing on one machine, and `translora plan` says what does on several."""
    loss: Literal["sft", "kl"] = "sft"
    """Of a student: `sft` is the cross-entropy of the teacher's answer (paper); `kl` the divergence from the teacher's
    own probabilities of each token of it, where the two bases have one vocabulary. A discriminator has no teacher."""
    kl_top_k: int = Field(default=32, ge=1, le=1024)
    """kl: how many of the teacher's most likely tokens are told apart; the others count as one."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Each adapter's gradient is clipped to this norm."""
    max_length: int = Field(default=1024, ge=8)
    """Longest prompt plus answer, in tokens; longer samples are dropped with a warning."""
    num_workers: int = Field(default=2, ge=1)
    """Ray Train workers: one per GPU, or CPU processes."""
    dtype: DType = "auto"
    """Dtype of base and LoRA in forward and backward (AdamW's weights are float32); `auto` as for a base."""
    ds_config: str = "zero3.json"
    """DeepSpeed config: a path (relative to the file that names it), or the name of a file in ds_configs/."""
    checkpoint_every_steps: int = Field(default=50, ge=1)
    """Steps between two resumable checkpoints of the adapter in training."""
    checkpoint_every_seconds: float = Field(default=300, gt=0)
    """Seconds after which a checkpoint is written in any case: a kill costs no more."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    max_failures: int = Field(default=2, ge=0)
    """Times that Ray Train restarts the worker group after a worker died."""

    @field_validator("peft")
    @classmethod
    def _names_a_method(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            check_kind(value.get("peft_type"), "")
        return value

    @model_validator(mode="after")
    def _begins_in_one_way(self) -> Self:
        if self.warm_start and (self.peft is not None or self.lora.chain is not None or self.lora.init != "kaiming"):
            raise ValueError("warm_start: copies a LoRA as a whole; leave peft, lora.chain and lora.init out")
        return self

    @property
    def method(self) -> str:
        """What the new adapter is, for readers."""
        if self.peft is None:
            return "rsLoRA" if self.lora.use_rslora else "LoRA"
        kind = str(self.peft["peft_type"]).upper()
        if kind == "LORA":
            return "DoRA" if self.peft.get("use_dora") else "LoRA"
        return kind


class DiscriminatorConfig(Strict):
    """Training of the discriminator (yes/no over task inputs)."""

    epochs: float = Field(default=6, gt=0)
    """Passes over positives and negatives."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    max_samples: int = Field(default=400, ge=4)
    """Most training samples, half of them positives."""


class GateConfig(Strict):
    """The acceptance check on held-out synthetic prompts."""

    holdout_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of additional synthetic samples kept out of training (on top of |D_syn|)."""
    min_holdout: int = Field(default=8, ge=1)
    """Fewest held-out samples."""
    min_agreement: float = Field(default=0.6, ge=0, le=1)
    """Least share of held-out prompts on which the migrated student gives the teacher's answer."""
    min_gain: float = Field(default=0.0, ge=-1, le=1)
    """Least (student - bare target base) agreement."""
    retries: int = Field(default=1, ge=0, le=3)
    """Times that an adapter which did not pass is distilled again, from more samples, before it is given up."""
    retry_factor: float = Field(default=2.0, gt=1, le=4)
    """|D_syn| of a retry, as a multiple of that of the attempt before; what was accepted then is kept."""


class TrackingConfig(Strict):
    """Where metrics go; metrics.jsonl is always written."""

    wandb_project: str | None = None
    """W&B project; no W&B when unset."""
    wandb_mode: Literal["online", "offline"] = "online"
    """`offline` writes the W&B run below the run directory and sends nothing."""


class ResourceConfig(Strict):
    """What synthesis and gate actors get."""

    num_actors: int = Field(default=1, ge=1)
    """Actors that hold the base (data parallel)."""
    gpus_per_actor: float = Field(default=0, ge=0)
    """GPUs per actor; 0 runs on the CPU. Above 1 a base's layers are spread over them, for one that no GPU can hold."""
    cpus_per_actor: float = Field(default=1, gt=0)
    """CPUs that Ray reserves per actor, and its number of torch threads."""
    worker_timeout_seconds: float = Field(default=3600, gt=0)
    """A worker that finishes no block, or in training no pass, for so long is taken to hang: it is ended, and its work
    tried again. Loading the base counts."""
    ray_address: str | None = None
    """Address of a running Ray cluster; unset starts or joins as `ray.init` does."""


class FleetConfig(ConfigFile):
    """`translora migrate fleet.yaml`: one hop of many bundles."""

    command = "migrate"
    run_dir: Path
    """Run directory; a rerun on it continues where it stopped."""
    source: BaseModelConfig
    """The base that is retired."""
    target: BaseModelConfig
    """The base that replaces it."""
    adapters: list[AdapterEntry] = Field(min_length=1)
    """The bundles."""
    merges: list[MergeEntry] = []
    """Bundles that become one adapter, before or after the migration."""
    max_num_samples: int = Field(default=20_000, ge=2)
    """Largest |D| that is taken over from a bundle, whose owner chose it; above it an adapter needs a `num_samples`."""
    seed: int = 0
    """Root of every random number of the run."""
    synthesis: SynthesisConfig = SynthesisConfig()
    """Generate, screen, label."""
    distill: TrainConfig = TrainConfig()
    """Training of the students."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    """Training of the discriminators for the next hop."""
    gate: GateConfig = GateConfig()
    """Acceptance of the migrated adapters."""
    tracking: TrackingConfig = TrackingConfig()
    """Metrics."""
    resources: ResourceConfig = ResourceConfig()
    """Actors."""

    @model_validator(mode="after")
    def _merges_what_it_trains(self) -> Self:
        if self.distill.peft is not None and any(merge.when == "after" for merge in self.merges):
            raise ValueError("merges: LoRAs alone can be merged after a migration; leave distill.peft or the merge out")
        return self

    @property
    def generator(self) -> BaseModelConfig:
        """What invents the task inputs."""
        return self.synthesis.generator or self.target


class PrepareEntry(Strict):
    """One bundle to make from task data."""

    name: str = Field(pattern=NAME_PATTERN)
    """Task name: the <NAME> of the discriminator's question, and the bundle's directory."""
    data: str
    """JSONL with `input` and `target`."""
    adapter: str | None = None
    """Existing PEFT adapter of the source base; trained from `data` when unset."""
    seeds: str | None = None
    """JSONL with five (cleaned) `input` lines to ship as seeds; chosen from `data` when unset."""


class PrepareConfig(ConfigFile):
    """`translora prepare prepare.yaml`: the owner's side, run once while the data is at hand."""

    command = "prepare"
    output_dir: Path
    """Bundles are written to output_dir/name."""
    run_dir: Path
    """Working directory; a rerun on it continues where it stopped."""
    source: BaseModelConfig
    """The base of the adapters."""
    tasks: list[PrepareEntry] = Field(min_length=1)
    """The bundles to make."""
    prompt_template: str = "auto"
    """`chat` (the tokenizer's template), a string that contains {input}, or `auto`: chat where there is a template."""
    num_seeds: int = Field(default=5, ge=2, le=50)
    """Seed examples per bundle."""
    seed: int = 0
    """Root of every random number of the run."""
    train: TrainConfig = TrainConfig()
    """Training of missing adapters."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    """Training of the discriminators."""
    synthesis: SynthesisConfig = SynthesisConfig()
    """Generation of the discriminator's negatives."""
    tracking: TrackingConfig = TrackingConfig()
    """Metrics."""
    resources: ResourceConfig = ResourceConfig()
    """Actors."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse_same_names([task.name for task in self.tasks])
        refuse_teacher(self.train)
        return self


def refuse_teacher(train: TrainConfig) -> None:
    """What is trained on real data has no teacher and no source adapter.

    Raises:
        ValueError: the loss is one of a teacher, or the training is to begin with a source adapter.
    """
    if train.loss != "sft":
        raise ValueError(f"train.loss: {train.loss} wants a teacher, and training on real data has none; use sft")
    if train.warm_start:
        raise ValueError("train.warm_start: training on real data has no source adapter to begin with; set it to false")


def refuse_same_names(names: Sequence[str]) -> None:
    """Each task has a directory of its own name.

    Raises:
        ValueError: a name appears twice.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"task names appear twice: {', '.join(twice)}; give each task its own `name`")
