"""The migration as a competent user would script it today: transformers' generate, PEFT, a plain training loop.

One adapter after the other; both bases are loaded once and stay in memory; every batch is as large as the adapter's
own rows allow; bfloat16 where translora uses it. It does what a migration does: generate, screen, label, distill,
train the next hop's discriminator, and measure agreement on held-out prompts.

    python -m benchmarks.plain fleet.yaml HELDOUT results.json [mended]

`mended` is the script of a user who has profiled it: rows stop at the line's end, screening computes the last logits
alone, and it has the hook of translora.engine.loading, without which torch 2.13 copies the head's weight for each row
of a prompt on the CPU.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from translora.bundle import Bundle, read_bundle
from translora.config import FleetConfig, load_config
from translora.engine.loading import give_head_plain_strides


@dataclass
class Result:
    """What came of one adapter."""

    name: str
    num_generated: int
    num_accepted: int
    agreement: float


class PlainMigration:
    """Source and target base, and what is done with them for each adapter."""

    def __init__(self, config: FleetConfig, mended: bool) -> None:
        self.config, self.mended = config, mended
        self.source_tokenizer, self.target_tokenizer = (
            AutoTokenizer.from_pretrained(base.model, padding_side="left") for base in (config.source, config.target)
        )
        self.source, self.target = (
            AutoModelForCausalLM.from_pretrained(base.model, dtype=torch.bfloat16).eval()
            for base in (config.source, config.target)
        )

    def migrate(self, path: Path, num_samples: int, num_heldout: int) -> Result:
        """All steps for one adapter."""
        bundle = read_bundle(path)
        discriminator = PeftModel.from_pretrained(self.source, bundle.discriminator_dir, "discriminator")
        discriminator.load_adapter(str(path), "teacher")
        discriminator.eval()
        accepted: dict[str, str] = {}
        refused: list[str] = []
        num_generated, needed = 0, num_samples + num_heldout
        for number in range(self.config.synthesis.max_rounds):
            acceptance = (len(accepted) + 3) / (num_generated + 5)
            count = min(
                round((needed - len(accepted)) / acceptance),
                round(self.config.synthesis.max_generated_factor * needed) - num_generated,
            )
            if count <= 0:
                break
            texts = self.generate_inputs(bundle, count, number)
            num_generated += count
            fresh = [text for text in dict.fromkeys(texts) if text not in accepted and text not in refused]
            scores = self.screen(discriminator, fresh, bundle.manifest.task_name)
            kept = [text for text, score in zip(fresh, scores, strict=True) if score > 0]
            refused += [text for text, score in zip(fresh, scores, strict=True) if score <= 0]
            for text, answer in zip(kept, self.label(discriminator, kept), strict=True):
                if answer:
                    accepted[text] = answer
        self.source = discriminator.unload()
        rows = list(accepted.items())[:needed]
        random.Random(0).shuffle(rows)
        heldout, training = rows[:num_heldout], rows[num_heldout:]
        distill, next_hop = self.config.distill, self.config.discriminator
        student = self.train(training, distill.epochs, distill.learning_rate)
        answers = self.answer(student, [text for text, _ in heldout])
        self.answer_base(student, [text for text, _ in heldout])
        agreement = sum(a == b for a, (_, b) in zip(answers, heldout, strict=True)) / max(1, len(heldout))
        self.target = student.unload()
        half = next_hop.max_samples // 2
        ask = f"{{}}\n Is the above question from {bundle.manifest.task_name} dataset?"
        positives = [(ask.format(text), "yes") for text, _ in rows[:half]]
        self.target = self.train(
            positives + [(ask.format(text), "no") for text in refused[: len(positives)]],
            next_hop.epochs,
            next_hop.learning_rate,
        ).unload()
        return Result(bundle.manifest.task_name, num_generated, len(accepted), agreement)

    @torch.inference_mode()
    def generate_inputs(self, bundle: Bundle, count: int, number: int) -> list[str]:
        """Few-shot prompts to the target base, sampled in batches of the configured size."""
        sampling, size = self.config.synthesis.sampling, self.config.synthesis.batch_size
        rng, texts = random.Random(number), []
        torch.manual_seed(number)
        for start in range(0, count, size):
            prompts = []
            for _ in range(min(size, count - start)):
                seeds = rng.sample(bundle.seeds, len(bundle.seeds))
                lines = "\n".join(f"{index}. {seed}" for index, seed in enumerate(seeds, 1))
                prompts.append(f"Here are 10 examples:\n{lines}\n{len(seeds) + 1}.")
            batch = self.target_tokenizer(prompts, padding=True, return_tensors="pt")
            output = self.target.generate(
                **batch,
                do_sample=True,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                max_new_tokens=sampling.max_new_tokens,
                **({"stop_strings": ["\n"], "tokenizer": self.target_tokenizer} if self.mended else {}),
            )
            new = output[:, batch["input_ids"].shape[1] :]
            texts += self.target_tokenizer.batch_decode(new, skip_special_tokens=True)
        lines = [re.split(r"\n", text.strip())[0].strip() for text in texts]
        return [line for line in lines if line]

    @torch.inference_mode()
    def screen(self, model: PeftModel, texts: list[str], task_name: str) -> list[float]:
        """log p(yes) - log p(no) of the discriminator."""
        if not texts:
            return []
        model.set_adapter("discriminator")
        questions = [f"{text}\n Is the above question from {task_name} dataset?" for text in texts]
        batch = self.source_tokenizer([self.chat(text) for text in questions], padding=True, return_tensors="pt")
        logits = model(**batch, **({"logits_to_keep": 1} if self.mended else {})).logits[:, -1].float()
        yes, no = (self.source_tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("yes", "no"))
        return (logits[:, yes] - logits[:, no]).tolist()

    @torch.inference_mode()
    def label(self, model: PeftModel, texts: list[str]) -> list[str]:
        """The teacher's answers."""
        if not texts:
            return []
        model.set_adapter("teacher")
        batch = self.source_tokenizer([self.chat(text) for text in texts], padding=True, return_tensors="pt")
        output = model.generate(**batch, do_sample=False, max_new_tokens=self.config.synthesis.max_answer_tokens)
        new = output[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self.source_tokenizer.batch_decode(new, skip_special_tokens=True)]

    def chat(self, text: str) -> str:
        """A user message in the source base's chat template."""
        message = [{"role": "user", "content": text}]
        return str(self.source_tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))

    def train(self, rows: list[tuple[str, str]], epochs: float, learning_rate: float) -> PeftModel:
        """A LoRA on the target base: AdamW, linear decay, cross-entropy on the answers."""
        lora, size = self.config.distill.lora, self.config.distill.batch_size
        settings = LoraConfig(
            r=lora.rank, lora_alpha=int(lora.alpha), target_modules=lora.target_modules, task_type="CAUSAL_LM"
        )
        model = get_peft_model(self.target, settings)
        model.train()
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
        tokenizer = self.target_tokenizer
        samples = []
        for text, answer in rows:
            prompt = tokenizer(f"{text}\nAnswer:")["input_ids"]
            end = tokenizer(f" {answer}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
            samples.append((prompt + end, [-100] * len(prompt) + end))
        per_epoch = -(-len(samples) // size)
        total = max(1, round(epochs * per_epoch))
        rng = random.Random(0)
        for step in range(total):
            if step % per_epoch == 0:
                rng.shuffle(samples)
            batch = samples[step % per_epoch * size : (step % per_epoch + 1) * size]
            length = max(len(ids) for ids, _ in batch)
            ids = torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in batch])
            labels = torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in batch])
            mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in batch])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 - step / total)
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return model.eval()

    @torch.inference_mode()
    def answer(self, model: PeftModel, texts: list[str]) -> list[str]:
        """Greedy answers of the student."""
        if not texts:
            return []
        batch = self.target_tokenizer([f"{text}\nAnswer:" for text in texts], padding=True, return_tensors="pt")
        output = model.generate(**batch, do_sample=False, max_new_tokens=self.config.synthesis.max_answer_tokens)
        new = output[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self.target_tokenizer.batch_decode(new, skip_special_tokens=True)]

    def answer_base(self, model: PeftModel, texts: list[str]) -> list[str]:
        """Greedy answers of the bare target base, which the gate compares with."""
        with model.disable_adapter():
            return self.answer(model, texts)


def main() -> None:
    """Migrate the adapters of a fleet file one after the other."""
    path, num_heldout, output, *mended = sys.argv[1:]
    config, start = load_config(path, FleetConfig), time.monotonic()
    migration = PlainMigration(config, mended=bool(mended))
    for base in (migration.source, migration.target) if mended else ():
        give_head_plain_strides(base)
    results = []
    for entry in config.adapters:
        results.append(migration.migrate(Path(entry.bundle), entry.num_samples or 0, int(num_heldout)))
        print(f"plain: {Path(entry.bundle).name} after {time.monotonic() - start:.0f} s", flush=True)
    Path(output).write_text(json.dumps([dataclasses.asdict(result) for result in results]))


if __name__ == "__main__":
    main()
