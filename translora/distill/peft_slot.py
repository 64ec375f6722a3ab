"""Students of methods that the bank does not have (DoRA, prompt tuning, IA3, ...): PEFT puts them on the base.

One at a time, and all ranks share its batch: PEFT gathers partitioned weights where a method begins from the base's
own, which every rank must do at once. Everything else of a training is the gang's.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from translora.distill.data import Packed, pack
from translora.distill.slots import ResidentBase, Shard
from translora.lora.bank import Factors
from translora.lora.methods import PATTERNS, parse_method, put_on, saved_tensors, take_off
from translora.run.files import write_json

TREE = "base_model.model."
"""Before the names of the layers in PEFT's files."""


class PeftSlot:
    """The one slot of a student that PEFT puts on the trunk of a base.

    Args:
        base: resident; its bank must be aside.
        settings: PEFT's own, see translora.lora.methods.parse_method.
    """

    dtype = torch.float32

    def __init__(self, base: ResidentBase, settings: Mapping[str, Any]) -> None:
        self.base, self.settings = base, settings
        self.peft_model: PeftModel | None = None

    def _config(self) -> PeftConfig:
        config = parse_method(self.settings, "distill.peft", self.base.model.name_or_path)
        config.task_type = "FEATURE_EXTRACTION"  # of the trunk: the head is gathered once a pass, by the caller
        return config

    def new_weights(self, seed: int) -> dict[str, Factors]:
        """What PEFT begins with, by parameter. Collective: some methods begin from the base's weights."""
        self.close(0)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.peft_model = put_on(self.base.model.base_model, self._config())
        self.peft_model.eval()
        return {name: [parameter.detach().float()] for name, parameter in self._trained().items()}

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        assert self.peft_model is not None
        return {name: one for name, one in self.peft_model.named_parameters() if one.requires_grad}

    def open(self, slot: int, weights: Mapping[str, Factors], gradients: Mapping[str, Factors]) -> None:
        """Have the parameters that `new_weights` made share their memory with the student's."""
        for name, parameter in self._trained().items():
            (parameter.data,), (parameter.grad,) = weights[name], gradients[name]

    def close(self, slot: int) -> None:
        """Take the student off the base."""
        if self.peft_model is not None:
            take_off(self.peft_model)
            self.peft_model = None

    def pack(self, shards: Sequence[Shard], top_k: int | None) -> Packed:
        """One sample a row, padded on the right: virtual tokens come before each."""
        return padded(pack(shards, self.base.place, top_k=top_k))

    def hidden(self, batch: Packed) -> torch.Tensor:
        """Last hidden states of the rows, one behind the other, without those of virtual tokens."""
        assert self.peft_model is not None
        ids_BT = batch.inputs["input_ids"]
        assert isinstance(ids_BT, torch.Tensor)
        with virtual_embeddings(self.peft_model, ids_BT, batch.inputs["attention_mask"]) as (compute, inputs):
            hidden_BTD = compute(**inputs, use_cache=False).last_hidden_state
        return hidden_BTD[:, -ids_BT.shape[1] :].flatten(0, 1)

    def write(self, directory: Path, weights: Mapping[str, Factors], base_model: str) -> None:
        """As PEFT saves it, for the whole causal LM; `weights` are those of the student in the slot."""
        assert self.peft_model is not None
        trunk = f"{TREE}{self.base.model.base_model_prefix}."
        tensors = {
            f"{trunk}{name.removeprefix(TREE)}" if name.startswith(TREE) else name: tensor.detach()
            .cpu()
            .clone(memory_format=torch.contiguous_format)
            for name, tensor in saved_tensors(self.peft_model).items()
        }
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        self.peft_model.active_peft_config.save_pretrained(directory)
        path = directory / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        own: dict[str, Any] = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True}
        if config.get("tokenizer_name_or_path"):
            own["tokenizer_name_or_path"] = base_model
        own |= {name: sorted(config[name]) for name in PATTERNS if isinstance(config.get(name), list)}  # were sets
        write_json(path, config | own)


@contextlib.contextmanager
def virtual_embeddings(
    peft_model: PeftModel, ids_BT: torch.Tensor, mask_BT: Any
) -> Iterator[tuple[Callable[..., Any], dict[str, torch.Tensor]]]:
    """What to call, and with what, so that a method's virtual tokens come before each row.

    PEFT calls the embedding before it calls the trunk. Under ZeRO-3 (DeepSpeed 0.19) a module's weights can only be
    gathered inside the trunk's own pass, so virtual embeddings take the places of tokens behind the embedding there.
    """
    config = peft_model.active_peft_config
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    if not config.is_prompt_learning or config.peft_type == "PREFIX_TUNING":
        yield peft_model, inputs
        return
    trunk, count = peft_model.get_base_model(), config.num_virtual_tokens
    prompts_BPD = peft_model.get_prompt(len(ids_BT))

    def insert(_: object, __: object, embedded_BTD: torch.Tensor) -> torch.Tensor:
        return torch.cat([prompts_BPD.to(embedded_BTD.dtype), embedded_BTD[:, count:]], dim=1)

    handle = trunk.get_input_embeddings().register_forward_hook(insert)
    try:
        before = ids_BT.new_zeros(len(ids_BT), count)
        yield (
            trunk,
            {
                "input_ids": torch.cat([before, ids_BT], dim=1),
                "attention_mask": torch.cat([torch.ones_like(before), mask_BT], dim=1),
            },
        )
    finally:
        handle.remove()


def padded(batch: Packed) -> Packed:
    """The same batch with one sample a row [B, T]; places in it count through the rows, 0..B*T-1."""
    position_T = batch.inputs["position_ids"][0]  # type: ignore[index]
    starts = (position_T == 0).nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_tensor([len(position_T)])).tolist()
    ids_BT = pad_sequence(batch.inputs["input_ids"][0].split(lengths), batch_first=True)  # type: ignore[index]
    mask_BT = pad_sequence([position_T.new_ones(length) for length in lengths], batch_first=True)
    row_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(position_T.device)
    place_T = row_T * ids_BT.shape[1] + position_T
    return replace(
        batch,
        inputs={"input_ids": ids_BT, "attention_mask": mask_BT},
        positions_L=place_T[batch.positions_L],
    )


@contextlib.contextmanager
def peft_slot(base: ResidentBase, settings: Mapping[str, Any]) -> Iterator[PeftSlot]:
    """A slot for students of one method, on the base without its bank."""
    packed = base.model.config._attn_implementation
    slot = PeftSlot(base, settings)
    with base.bank.aside(base.model):
        base.model.set_attn_implementation(base.attention)
        try:
            yield slot
        finally:
            slot.close(0)
            base.model.set_attn_implementation(packed)
