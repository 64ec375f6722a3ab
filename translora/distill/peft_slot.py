"""Students of methods that the bank does not have (DoRA, prompt tuning, IA3, ...): PEFT puts them on the base.

One at a time, and all ranks share its batch: PEFT gathers partitioned weights where a method begins from the base's
own, which every rank must do at once. Everything else of a training is the gang's.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from translora.bundle.adapter import CONFIG, WEIGHTS, portable_config
from translora.config import LoraSettings
from translora.distill.data import Packed, pack
from translora.distill.hooks import StudentHooks
from translora.distill.slots import ResidentBase, Shard
from translora.distill.student import Student
from translora.lora.banked import Factors
from translora.lora.method_settings import parse_method
from translora.lora.methods import put_on, saved_tensors, take_off
from translora.run.files import write_bytes, write_json


class PeftSlot:
    """The one slot of a student that PEFT puts on a base.

    Args:
        base: resident; its bank must be aside.
        settings: PEFT's own, see translora.lora.method_settings.parse_method.
    """

    dtype = torch.float32

    def __init__(self, base: ResidentBase, settings: Mapping[str, Any]) -> None:
        self.base, self.settings = base, settings
        self.peft_model: PeftModel | None = None

    def new_weights(self, seed: int, lora: LoraSettings) -> dict[str, Factors]:
        """What PEFT begins with, by parameter. Collective: some methods begin from the base's weights."""
        self.close(0)
        model = self.base.model
        config, training = parse_method(self.settings, "distill.peft", model.name_or_path), model.training
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.peft_model = put_on(model, config)
        self.peft_model.train(training)  # recomputation needs it; there is no dropout
        if config.is_prompt_learning:
            self.peft_model.prompt_encoder.train()  # cuDNN has no backward pass of an LSTM (P_TUNING) in eval mode
        return {name: [parameter.detach().float()] for name, parameter in self._trained().items()}

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        assert self.peft_model is not None
        return {name: one for name, one in self.peft_model.named_parameters() if one.requires_grad}

    def hooks(self, seed: int, lora: LoraSettings) -> StudentHooks:
        """None: they are of the bank."""
        return StudentHooks()

    def open(self, slot: int, student: Student) -> None:
        """Have the parameters that `new_weights` made share their memory with the student's."""
        for name, parameter in self._trained().items():
            (parameter.data,), (parameter.grad,) = student.factors[name], student.gradients[name]

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
        ids_BT, mask_BT = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert isinstance(ids_BT, torch.Tensor) and isinstance(mask_BT, torch.Tensor)
        with self.base.readable(), virtual_tokens(self.peft_model, ids_BT, mask_BT) as inputs:
            hidden_BTD = self.base.model.base_model(**inputs, use_cache=False).last_hidden_state
        return hidden_BTD[:, -ids_BT.shape[1] :].flatten(0, 1)

    def write(self, directory: Path, weights: Mapping[str, Factors], base_model: str, lora: LoraSettings) -> None:
        """As PEFT saves it; `weights` are those of the student in the slot."""
        assert self.peft_model is not None
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in saved_tensors(self.peft_model).items()
        }
        write_bytes(directory / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        self.peft_model.active_peft_config.save_pretrained(directory)
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        write_json(directory / CONFIG, portable_config(config, base_model) | {"inference_mode": True})


@contextlib.contextmanager
def virtual_tokens(
    peft_model: PeftModel, ids_BT: torch.Tensor, mask_BT: torch.Tensor
) -> Iterator[dict[str, torch.Tensor | DynamicCache]]:
    """The trunk's arguments for rows with a method's virtual tokens before each; without, for the rows alone.

    PEFT calls the embedding before it calls the trunk. Under ZeRO-3 (DeepSpeed 0.19) a module's weights can only be
    gathered inside the trunk's own pass, so virtual embeddings take the places of tokens behind the embedding there.
    """
    config = peft_model.active_peft_config
    if not config.is_prompt_learning:
        yield {"input_ids": ids_BT, "attention_mask": mask_BT}
        return
    count, prompts = config.num_virtual_tokens, peft_model.get_prompt(len(ids_BT))
    before = mask_BT.new_ones(len(ids_BT), count)
    mask_BS = torch.cat([before, mask_BT], dim=1)
    if isinstance(prompts, DynamicCache):
        yield {"input_ids": ids_BT, "attention_mask": mask_BS, "past_key_values": prompts}
        return

    def insert(_: object, __: object, embedded_BSD: torch.Tensor) -> torch.Tensor:
        return torch.cat([prompts.to(embedded_BSD.dtype), embedded_BSD[:, count:]], dim=1)

    handle = peft_model.get_base_model().get_input_embeddings().register_forward_hook(insert)
    try:
        yield {"input_ids": torch.cat([torch.zeros_like(before), ids_BT], dim=1), "attention_mask": mask_BS}
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
