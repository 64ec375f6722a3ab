"""Training of adapters: students, source adapters, discriminators."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from translora.config_file import DType, Epochs, Strict
from translora.errors import InputError
from translora.lora.kinds import MAX_RANK, check_kind


class ChainSettings(Strict):
    """A student as a sum of LoRAs that are trained one after the other."""

    links: int = Field(ge=2, le=64)
    """LoRAs of `rank` each; the exported one has `links` times the rank. The steps are shared out evenly, and each link
    has an AdamW and a decay of the learning rate of its own."""
    layer_fraction: float = Field(default=1, gt=0, le=1)
    """Each link adapts a random share of the layers (XGBLoRA)."""
    freeze_A: bool = False
    """Each link keeps its random A and trains B alone (RAC-LoRA)."""


class LoraSettings(Strict):
    """The new adapter's shape, and ways to train it (translora/distill/options.py and hooks.py have the papers).

    Discriminators have the shape alone.
    """

    added: ClassVar[frozenset[str]] = frozenset({"init", "flat_sigma"})

    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    """Rank r of A [r, in] and B [out, r]."""
    alpha: float = Field(default=16.0, gt=0)
    """The update is scaled by alpha / rank."""
    use_rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = ["q_proj", "v_proj"]
    """Names of the linear modules that are adapted, as the target base has them (paper: query and value projections),
    or `all-linear`: all but the head, and of a mixture the experts, which are no linear modules."""
    init: Literal["kaiming", "eva"] = "kaiming"
    """What A begins as: random, or the principal components of the module's inputs (EVA, with the same rank
    everywhere), which the first step is spent on: its whole batch, prompts and answers. B begins as zero."""
    lora_plus_ratio: float = Field(default=1, gt=0)
    """Learning rate of B over that of A (LoRA+ takes 16)."""
    gradient: Literal["plain", "riemannian", "lora-pro"] = "plain"
    """`riemannian` makes the factors' gradients independent of the factors' scale; `lora-pro` trains with the AdamW of
    LoRA-Pro, whose moments are of the modules' whole matrices: memory as if all of these were trained."""
    random_half: bool = False
    """Train a random half of the weights (LoRA-SP)."""
    chain: ChainSettings | None = None
    """A chain of LoRAs instead of one (COLA)."""
    flat_sigma: float = Field(default=0, ge=0, le=1)
    """Noise on the weights of the adapted modules, relative to their rows' norms (Flat-LoRA takes 0.05)."""

    @model_validator(mode="after")
    def _is_readable(self) -> Self:
        if self.total_rank > MAX_RANK:
            raise InputError(f"rank {self.rank} times chain.links is {self.total_rank}, the limit is {MAX_RANK}")
        return self

    @model_validator(mode="after")
    def _moves_both_factors(self) -> Self:
        frozen = self.chain is not None and self.chain.freeze_A
        if self.gradient == "lora-pro" and (self.lora_plus_ratio != 1 or self.random_half or frozen):
            raise InputError(
                "gradient: lora-pro moves A and B together, so that their product comes nearest to the whole gradient; "
                "leave lora_plus_ratio, random_half and chain.freeze_A out"
            )
        return self

    @property
    def has_options(self) -> bool:
        """Whether it is trained in another way than plainly."""
        return self != self.plain()

    @property
    def scales_updates(self) -> bool:
        """Whether the weights' updates differ by an option's factor; 0 leaves a weight as it is."""
        return self.lora_plus_ratio != 1 or self.random_half or self.chain is not None

    def plain(self) -> LoraSettings:
        """The same shape, trained plainly: what a discriminator is."""
        shape = ("rank", "alpha", "use_rslora", "target_modules")
        return LoraSettings.model_validate({name: getattr(self, name) for name in shape})

    @property
    def total_rank(self) -> int:
        """Rank of the exported LoRA."""
        return self.rank * self.num_links

    @property
    def num_links(self) -> int:
        """LoRAs that are trained one after the other."""
        return 1 if self.chain is None else self.chain.links

    @property
    def scaling(self) -> float:
        """What B A x is multiplied with."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)


Count = Annotated[int, Field(ge=1)] | Literal["auto"]


class TrainConfig(Strict):
    """Training of an adapter: one AdamW run with linear decay and no warm-up, no weight decay (paper)."""

    added: ClassVar[frozenset[str]] = frozenset({"warm_start", "token_share"})

    lora: LoraSettings = LoraSettings()
    """Shape of the new adapter."""
    peft: dict[str, Any] | None = None
    """Another method than `lora`, in PEFT's own words: `peft_type` (PROMPT_TUNING, PREFIX_TUNING, IA3, LORA with
    use_dora, ...) and the settings of its config class. Such students are trained one at a time, not in gangs;
    discriminators stay LoRAs."""
    warm_start: bool = False
    """Each student begins as its source adapter, where that is a LoRA and both bases are of one shape (as an update of
    one base is); an adapter of another kind begins as without."""
    epochs: float = Field(default=20, ge=0, le=10_000)
    """Passes over the training samples; 0 leaves a student as its warm start made it, a copy of its source adapter."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    batch_size: int = Field(default=8, ge=1, le=1_000_000)
    """Samples per optimizer step, over all workers."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Most samples of one adapter in one forward pass of a worker; one of several answers is a sequence for each."""
    gang_size: Count = "auto"
    """Adapters that a worker trains side by side in one pass; `auto` fills the pass (see translora.distill.plan)."""
    tokens_per_pass: Count = "auto"
    """Tokens that a gang should fill a worker's pass with, as far as memory allows; `auto` is what hides the gathering
    of the base behind the computing on one machine, and `translora plan` says what does on several."""
    loss: Literal["auto", "sft", "kl"] = "auto"
    """Of a student: `sft` is the cross-entropy of the teacher's answer (paper). `auto` takes it of each answer that the
    teacher has, weighted by the probability that it gives it (soft labels), whatever the vocabularies, where its
    answers to all samples are few: up to 20 different ones, and no more than half as many as samples. Where they are
    free text, the adapter has a `stop`, or `token_share` is less than 1, it is sft. `kl` is the divergence from the
    teacher's probabilities of each token of its answer, where the two bases have one vocabulary. Discriminators and
    what is trained on real data have no teacher: sft."""
    kl_top_k: int = Field(default=32, ge=1, le=1024)
    """kl: how many of the teacher's most likely tokens are told apart; the others count as one."""
    token_share: float = Field(default=1, gt=0, le=1)
    """Share of each answer's tokens, rounded up, that a student is trained on: those on which the source adapter has
    most to say beyond its base, and always the answer's end. TiTok (arXiv 2510.04682) takes 0.7."""
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
        return None if value is None else {**value, "peft_type": check_kind(value.get("peft_type"), "")}

    @model_validator(mode="after")
    def _begins_in_one_way(self) -> Self:
        if self.warm_start and (self.peft is not None or self.lora.chain is not None or self.lora.init != "kaiming"):
            raise InputError("warm_start: copies a LoRA as a whole; leave peft, lora.chain and lora.init out")
        if self.epochs == 0 and not self.warm_start:
            raise InputError("epochs: 0 trains nothing; give some, or copy the source adapters with warm_start")
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

    epochs: Epochs = 6
    """Passes over positives and negatives."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    max_samples: int = Field(default=400, ge=4)
    """Most training samples, half of them positives."""
