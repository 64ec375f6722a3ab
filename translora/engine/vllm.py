"""vLLM as an engine: tensor parallel, many LoRAs in a batch, prefix caching; for bases that fill several GPUs.

vLLM's own engine lives in the actor that would hold the transformers one, for as long as the actor does, and rows reach
it the same way: a processor of ray.data.llm is one stage of one dataset, and would load the base again for each of the
two datasets of every round, know no stop pattern, and neither score nor answer by what was scored.

Rows reach vLLM block by block, so `synthesis.batch_size` should be in the hundreds here. Checked against PEFT and the
transformers engine on the CPU by tests/unit/test_engine_contract.py (vLLM 0.32); on a GPU another of its model runners
computes, which nobody has tried here.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from translora.bundle.base import info_of
from translora.config import BaseModelConfig, SamplingConfig
from translora.engine.decode import Request, Row
from translora.engine.loading import load_tokenizer
from translora.engine.protocol import Completion, EngineDied, RowTooLong, Samples, answer_tokens, completion, end_tokens
from translora.engine.vllm_settings import RANKS, check_engine, check_rank, engine_arguments
from translora.errors import InputError
from translora.lora.methods import read_adapter
from translora.lora.peft_io import LoraWeights, pad_rank, write_lora
from translora.run.redact import first_line

logger = logging.getLogger(__name__)
CANARY = "1 2 3 4 5 6 7 8"


class VllmEngine:
    """A base in vLLM's hands.

    vLLM wants to know the greatest rank, and is told the modules, when it loads a base: it is loaded at its first use,
    and again when an adapter comes that has more of either.

    Args:
        base: which base, and in `base.vllm` engine arguments in vLLM's own words.
        num_threads: CPU threads of a host without a GPU.
    """

    def __init__(self, base: BaseModelConfig, num_threads: int | None = None) -> None:
        check_engine(base)
        assert base.vllm is not None
        self.base, self.num_threads = base, num_threads
        self.tokenizer = load_tokenizer(base)
        self.max_rank = 0
        """Greatest rank that the loaded engine can have; 0 has no adapters."""
        self.modules: set[str] = set()
        """Last parts of the names of the modules that it can adapt."""
        self._engine: Any = None
        self._adapters: dict[str, str] = {}
        self._loras: dict[str, Any] = {}
        """vLLM's name of each adapter, by slot."""
        self._refused: dict[str, str] = {}
        """Why vLLM does not compute an adapter, by its path."""
        self._copies = tempfile.TemporaryDirectory(prefix="translora-")
        self._numbers = itertools.count(1)
        info = info_of(base)
        has_own = (info.path / GENERATION_CONFIG_NAME).exists()
        own = GenerationConfig.from_pretrained(info.path).eos_token_id if has_own else info.config.get("eos_token_id")
        self._end_ids = set(end_tokens(self.tokenizer, own))

    def check_adapter(self, path: str | Path) -> None:
        """Read an adapter.

        Raises:
            InputError: vLLM does not compute its kind, or did not take it.
        """
        self._read(path)

    def _read(self, path: str | Path) -> LoraWeights:
        adapter = read_adapter(path)
        reason = self._refused.get(str(path))
        if not isinstance(adapter, LoraWeights):
            reason = "is no plain LoRA, and vLLM computes no others"
        if reason is not None:
            raise InputError(f"{path}: {reason}; leave `vllm` of its base out")
        assert isinstance(adapter, LoraWeights)
        check_rank(adapter.max_rank, self.base, str(path))
        return adapter

    def use_adapters(self, adapters: Mapping[str, str | Path]) -> None:
        """Have exactly these adapters: PEFT directory by slot name."""
        wanted = {slot: str(path) for slot, path in adapters.items()}
        new = {slot: self._read(path) for slot, path in wanted.items() if self._adapters.get(slot) != path}
        for slot, path in list(self._adapters.items()):
            if wanted.get(slot) != path:
                self._remove(slot)
        self._make_room(new.values())
        for slot, adapter in new.items():
            self._add(slot, wanted[slot], adapter)
        self._hear_canary(new)
        for path in wanted.values():
            if path in self._refused:
                raise InputError(f"{path}: {self._refused[path]}")

    def _make_room(self, adapters: Collection[LoraWeights]) -> None:
        largest = max((adapter.max_rank for adapter in adapters), default=0)
        modules = {name.rpartition(".")[2] for adapter in adapters for name in adapter.modules}
        if largest > self.max_rank or not modules <= self.modules:
            if self._engine is not None:
                logger.info("%s: loaded again, for other adapters", os.path.basename(self.base.model))
                self._stop()
            self.max_rank = next(rank for rank in RANKS if rank >= max(largest, self.max_rank))
            self.modules |= modules

    def _add(self, slot: str, path: str, adapter: LoraWeights) -> None:
        from vllm.lora.request import LoRARequest

        number = next(self._numbers)
        copy = Path(self._copies.name) / str(number)
        copy.mkdir()
        write_plain(copy, adapter, self.base.model)
        # vLLM's prefix cache knows an adapter by its name alone: a slot's next one must not find the last one's.
        lora = LoRARequest(f"{slot}#{number}", number, str(copy))
        for is_new in (self._engine is None, True):
            self.load()
            try:
                self._engine.add_lora(lora)
            except Exception as error:  # whatever vLLM's workers raised; some of their answers may still be on the way
                self._stop()
                if is_new:  # an old one may have died of something else
                    self._refused[path] = f"vLLM does not take it ({first_line(error, 300)})"
                    return
            else:
                break
        self._adapters[slot], self._loras[slot] = path, lora

    def _remove(self, slot: str) -> None:
        # vLLM itself drops what is not used any more.
        shutil.rmtree(self._loras[slot].lora_path, ignore_errors=True)
        del self._adapters[slot], self._loras[slot]

    def _hear_canary(self, adapters: Mapping[str, LoraWeights]) -> None:
        """Refuse adapters that change no more of what the base says than chance does, unless their weights are zero.

        vLLM looks for an adapter's modules by their names, and leaves out what it does not find. The bare base is asked
        beside each of them: on a GPU the same row is rounded otherwise in another batch.
        """
        slots = [slot for slot, one in adapters.items() if any(bool(B.any()) for _, B in one.modules.values())]
        slots = [slot for slot in slots if slot in self._loras]
        if not slots:
            return
        ids = self.tokenizer(CANARY, add_special_tokens=False)["input_ids"]
        asked: list[str | None] = [name for slot in slots for name in (None, slot)]
        found_ST = np.array(self.log_likelihood([(ids[:1], ids[1:])] * len(asked), asked))
        bare_ST, own_ST = found_ST[::2], found_ST[1::2]
        chance = np.abs(bare_ST - bare_ST[0]).max()
        for slot, change in zip(slots, np.abs(own_ST - bare_ST).max(1), strict=True):
            if change <= chance:
                self._refused[self._adapters[slot]] = "vLLM answers with it as without it"
                self._remove(slot)

    def load(self) -> None:
        """Start vLLM on the base, where it does not run.

        Raises:
            RuntimeError: it does not start.
        """
        if self._engine is None:
            from vllm.engine.arg_utils import EngineArgs
            from vllm.usage.usage_lib import UsageContext
            from vllm.v1.engine.llm_engine import LLMEngine

            os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would tell its makers what it runs on
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
            os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a host may have met CUDA before
            # Its scheduler in this process: from one of its own that is killed, vLLM (0.32) waits for ever to hear.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            if self.num_threads is not None:
                os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
                os.environ["OMP_NUM_THREADS"] = str(self.num_threads)
            arguments = engine_arguments(self.base, self.max_rank, self.modules)
            try:
                self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments), UsageContext.LLM_CLASS)
            except Exception as error:  # whatever vLLM's processes ended with
                raise RuntimeError(
                    f"{self.base.model}: vLLM does not start ({first_line(error)}), the lines above say why; it was "
                    f"given {arguments}: change `vllm`"
                ) from error
            logger.info("%s: vLLM, %s", os.path.basename(self.base.model), arguments)

    def _stop(self) -> None:
        if self._engine is not None:
            self._engine.engine_core.shutdown()
            self._engine = None

    def close(self) -> None:
        """End vLLM's processes, and remove the copies of adapters."""
        self._stop()
        self._copies.cleanup()

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: Sequence[Any],
        adapters: Sequence[str | None],
        take: Callable[[int, Any], bool],
    ) -> None:
        """Let vLLM work until every request has ended; `take(index, output)` says whether it needs no more of one.

        Raises:
            EngineDied: vLLM failed, or one of its processes did.
        """
        self.load()
        running: dict[str, int] = {}
        for index, (ids, one, slot) in enumerate(zip(prompts, parameters, adapters, strict=True)):
            name, lora = str(next(self._numbers)), None if slot is None else self._loras[slot]
            running[name] = index
            self._engine.add_request(name, {"prompt_token_ids": list(ids)}, one, lora_request=lora)
        while running:
            try:
                outputs = self._engine.step()
            except Exception as error:  # its scheduler stands in the middle of a step: it is of no use any more
                raise EngineDied(f"{self.base.model}: vLLM failed ({first_line(error)})") from error
            for output in outputs:
                if output.request_id not in running:  # it was aborted a moment ago
                    continue
                if take(running[output.request_id], output) or output.finished:
                    del running[output.request_id]
                    if not output.finished:
                        self._engine.abort_request([output.request_id])

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig | None = None) -> list[Completion]:
        """Complete every request.

        Raises:
            RowTooLong: a prompt leaves no room for an answer.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling, end_ids = sampling or SamplingConfig(), self._end_ids
        rows = [Row(request, None) for request in requests]
        ids = self.tokenizer([request.prompt for request in requests], add_special_tokens=False)["input_ids"]
        self._check_lengths(ids)
        parameters = []
        for request in requests:
            drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "seed": request.seed}
            parameters.append(
                SamplingParams(
                    max_tokens=request.max_new_tokens,
                    stop_token_ids=sorted(end_ids),
                    detokenize=False,
                    output_kind=RequestOutputKind.DELTA,
                    **({"temperature": 0.0} if request.seed is None else drawn),
                )
            )

        def take(index: int, output: Any) -> bool:
            row = rows[index]
            for token in output.outputs[0].token_ids:
                if not row.ended:
                    row.take(token, self.tokenizer, end_ids)
            return row.ended

        self._run(ids, parameters, [request.adapter for request in requests], take)
        return [completion(row, self.tokenizer, end_ids) for row in rows]

    @property
    def max_length(self) -> int:
        """Longest prompt and answer that vLLM takes, in tokens."""
        self.load()
        return int(self._engine.model_config.max_model_len)

    def log_odds(self, prompts: Sequence[str], adapters: Sequence[str | None]) -> list[float]:
        """log p("yes") - log p("no") as the next token of each prompt, summed over the answers' token variants."""
        from vllm import SamplingParams

        answer_ids = answer_tokens(self.tokenizer)
        wanted = sorted({token for tokens in answer_ids.values() for token in tokens})
        parameters = SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=wanted, detokenize=False)
        ids = self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        self._check_lengths(ids)
        found = [0.0] * len(prompts)

        def take(index: int, output: Any) -> bool:
            (log_p,) = output.outputs[0].logprobs
            yes, no = (
                torch.logsumexp(torch.tensor([log_p[token].logprob for token in answer_ids[word]]), 0)
                for word in ("yes", "no")
            )
            found[index] = float(yes - no)
            return True

        self._run(ids, [parameters] * len(ids), adapters, take)
        return found

    def log_likelihood(self, samples: Samples, adapters: Sequence[str | None]) -> list[list[float]]:
        """log p of each token of an answer, given the prompt and the answer's tokens before it."""
        scored = self._score(samples, adapters, 0)
        return [
            [places[token].logprob for places, token in zip(own, answer, strict=True)]
            for own, (_, answer) in zip(scored, samples, strict=True)
        ]

    def top_log_probabilities(
        self, samples: Samples, adapters: Sequence[str | None], top_k: int
    ) -> list[tuple[list[list[int]], list[list[float]]]]:
        """The most likely tokens at each token of an answer, and their log-probabilities, [answer's length, K] each."""
        found = []
        for own in self._score(samples, adapters, top_k):
            best = [sorted(places.items(), key=lambda item: -item[1].logprob)[:top_k] for places in own]
            tokens = [[token for token, _ in place] for place in best]
            found.append((tokens, [[one.logprob for _, one in place] for place in best]))
        return found

    def _score(self, samples: Samples, adapters: Sequence[str | None], top_k: int) -> list[list[dict[int, Any]]]:
        """vLLM's log-probabilities of the top tokens, and of the answer's own, at each place of each answer."""
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top_k, detokenize=False)
        whole = [[*prompt, *answer] for prompt, answer in samples]
        self._check_lengths(whole)
        found: list[list[dict[int, Any]]] = [[] for _ in samples]

        def take(index: int, output: Any) -> bool:
            found[index] = output.prompt_logprobs[-len(samples[index][1]) :]
            return True

        self._run(whole, [parameters] * len(whole), adapters, take)
        return found

    def _check_lengths(self, rows: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, rows))
        if longest >= self.max_length:
            raise RowTooLong(
                f"a row of {longest} tokens, vLLM takes {self.max_length - 1} of {os.path.basename(self.base.model)}; "
                "raise vllm.max_model_len"
            )


def write_plain(directory: Path, adapter: LoraWeights, base_model: str) -> None:
    """Write a LoRA as vLLM computes it: one rank, and a scaling of 1, whatever its patterns and its scaling are."""
    rank = adapter.max_rank
    modules = {
        name: pad_rank((lora_A, (lora_B.float() * adapter.scaling[name]).to(lora_B.dtype)), rank)
        for name, (lora_A, lora_B) in adapter.modules.items()
    }
    write_lora(directory, modules, alpha=rank, base_model=base_model)
