"""A base model, and the machine that it is held on."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, field_validator

from translora.config_file import Attention, DType, Strict
from translora.errors import InputError

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
VLLM_COUNTS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_loras",
    "max_cpu_loras",
)
"""Engine arguments that are counted and planned with here."""


def _quoted(value: object) -> object:
    if isinstance(value, dict):  # what YAML makes of {input}
        raise InputError("is no text; put it in quotation marks, as it begins with a brace")
    return value


PromptTemplate = Annotated[str, Field(min_length=1, max_length=20_000), BeforeValidator(_quoted)]
"""A setting that says how a base is prompted; see translora.engine.prompts."""


class BaseModelConfig(Strict):
    """A base model: where it is and how it is loaded."""

    added: ClassVar[frozenset[str]] = frozenset({"revision", "vllm"})

    model: str
    """Local directory (config.json, *.safetensors, tokenizer) or hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; main when unset. A run keeps to the commit that it began with, which is in
    RUN/commits.json."""
    dtype: DType = "auto"
    """Weights' dtype in synthesis and gate; `auto` is bfloat16 where the device gains by it."""
    attn_implementation: Attention = "auto"
    """`auto` is the FlashAttention (3, 4 or 2) that is installed and made for the GPU, SDPA elsewhere."""
    trust_remote_code: bool = False
    """Run the Python code that lies in this base's directory, on every node and with all rights of the run: for a base
    that transformers cannot build by itself, and whose code you have read."""
    vllm: dict[str, Any] | None = None
    """Generate and score with vLLM, by engine arguments in vLLM's own words, {} for none (gpu_memory_utilization,
    max_model_len, ...); transformers when unset."""

    @field_validator("vllm")
    @classmethod
    def _check_numbers(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        value = {name: own for name, own in value.items() if own is not None}  # vLLM's own word for its default
        for name in VLLM_COUNTS:
            count = value.get(name, 1)
            if type(count) is not int or (count < 1 and (name, count) != ("max_model_len", -1)):
                raise InputError(f"{name}: {count!r} is no positive number; give one, or leave it out")
        share = value.get("gpu_memory_utilization", 1.0)
        if type(share) not in (int, float) or not 0 < share <= 1:
            raise InputError(f"gpu_memory_utilization: {share!r} is no share of a GPU's memory, above 0 and at most 1")
        return value

    def decides(self) -> dict[str, Any]:
        """What of it decides results, but for rounding."""
        found = self.model_dump(exclude={"revision"})  # what it stands for is hashed
        if self.vllm is not None:
            found["vllm"] = {key: value for key, value in self.vllm.items() if key not in VLLM_EXECUTION_ONLY}
        return found


class ResourceConfig(Strict):
    """What synthesis and gate actors get."""

    num_actors: int = Field(default=1, ge=1)
    """Actors that hold the base (data parallel)."""
    gpus_per_actor: float = Field(default=0, ge=0)
    """GPUs per actor; 0 runs on the CPU. Above 1 a base's layers are spread over them, for one that no GPU can hold."""
    cpus_per_actor: float = Field(default=1, gt=0)
    """CPUs that Ray reserves per actor, and its number of torch threads; training workers on CPUs have as many threads
    at most, and no more than their share of the machine."""
    worker_timeout_seconds: float = Field(default=3600, gt=0)
    """A worker that finishes no block, or in training no pass, for so long is taken to hang: it is ended, and its work
    tried again. Loading the base counts."""
    ray_address: str | None = None
    """Address of a running Ray cluster; unset starts or joins as `ray.init` does."""
