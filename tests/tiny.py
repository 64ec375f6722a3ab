"""Tiny random models, adapters and bundles for tests: real files, read by the real libraries.

A base takes a fraction of a second to make and some 200 kB on disk. Everything is decided by `seed`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from translora.bundle import Bundle, inspect_base, write_bundle

Family = Literal["llama", "gemma3"]

CORPUS = (
    "Here are 10 examples:\n1. Please send my order to the new address.\n2. When does the shop open on Sunday?\n",
    "Is the above question from orders dataset? yes no Yes No yes no\n",
    "Route the message: billing, shipping, refund, other. The parcel is late. I was charged twice this month.\n",
    "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SEEDS = (
    "Please send my order to the new address.",
    "When does the shop open on Sunday?",
    "The parcel is late.",
    "I was charged twice this month.",
    "Can I return the shoes?",
)
ROWS = [
    {"input": f"Please send order {index} " + "now " * (index % 4), "answer": f"order {index}"} for index in range(9)
]
"""Training rows of unequal lengths."""


def make_tokenizer(
    family: Family = "llama", vocab_size: int = 320, chat: bool | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on CORPUS.

    llama: no BOS, ChatML template, EOS `<|im_end|>`, as SmolLM2-Instruct; gemma3: BOS put in front, EOS `<eos>`,
    no chat template, as the Gemma 3 base. `chat` overrides whether there is a template.
    """
    chat_ml = ["<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special = chat_ml if family == "llama" else ["<pad>", "<eos>", "<bos>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if family == "gemma3":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
        )
    else:
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>", padding_side="left"
        )
    if family == "llama" if chat is None else chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def make_base(
    directory: str | Path,
    family: Family = "llama",
    seed: int = 0,
    *,
    vocab_size: int = 320,
    hidden_size: int = 32,
    num_layers: int = 2,
    chat: bool | None = None,
    max_shard_size: str = "5GB",
    std: float = 0.2,
) -> Path:
    """Write a base model directory (config, safetensors, tokenizer) and return its path.

    `std` is the scale of the random weights: 0.2 gives clearly different logits for different inputs.
    """
    directory = Path(directory)
    tokenizer = make_tokenizer(family, vocab_size, chat)
    common = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "max_position_embeddings": 1024,
        "initializer_range": std,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=True))
        else:
            config = Gemma3TextConfig(**common, sliding_window=64, query_pre_attn_scalar=hidden_size // 4)
            model = Gemma3ForCausalLM(config)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)
    return directory


def make_encoder_decoder(directory: str | Path, seed: int = 0) -> Path:
    """Write a T5 with gated layers and return its path.

    Its tokenizer is a unigram model with a space in front of a text and </s> behind it, as T5's own.
    """
    directory = Path(directory)
    text = "".join(CORPUS)
    words = [(f"\u2581{word}", -2.0) for word in sorted(set(re.findall(r"\w+", text)))]
    letters = [(letter, -6.0) for letter in sorted({"\u2581", *text} - {" ", "\n"})]
    tokenizer = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, *letters], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    end = ("</s>", tokenizer.token_to_id("</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[end]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    config = T5Config(
        vocab_size=len(fast),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(config)
    model.save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


def make_adapter(
    directory: str | Path,
    base: str | Path,
    seed: int = 0,
    rank: int = 4,
    *,
    alpha: float = 8.0,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    scale: float = 0.2,
    **lora_options: object,
) -> Path:
    """Write a LoRA adapter of `base` through PEFT, with random B (of std `scale`) instead of zeros."""
    directory = Path(directory)
    has_encoder = AutoConfig.from_pretrained(base).is_encoder_decoder
    model = (AutoModelForSeq2SeqLM if has_encoder else AutoModelForCausalLM).from_pretrained(base, dtype=torch.float32)
    kind = "SEQ_2_SEQ_LM" if has_encoder else "CAUSAL_LM"
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(target_modules), task_type=kind, **lora_options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=scale)
    peft_model.save_pretrained(directory)
    return directory


def make_bundle(
    directory: str | Path,
    base: str | Path,
    task_name: str = "orders",
    seed: int = 0,
    *,
    rank: int = 4,
    discriminator: bool = True,
    seeds: Sequence[str] = SEEDS,
    num_samples: int = 16,
    prompt_template: str = "chat",
    **adapter_options: object,
) -> Bundle:
    """Write a bundle of `base` at `directory`; adapter and discriminator get different random weights."""
    directory = Path(directory)
    scratch = directory.parent / f"{directory.name}.parts"
    adapter = make_adapter(scratch / "adapter", base, 2 * seed, rank, **adapter_options)
    judge = make_adapter(scratch / "discriminator", base, 2 * seed + 1, rank) if discriminator else None
    return write_bundle(
        directory,
        adapter_dir=adapter,
        discriminator_dir=judge,
        seeds=list(seeds),
        task_name=task_name,
        base=inspect_base(str(base)),
        num_samples=num_samples,
        prompt_template=prompt_template,
        provenance={"made_by": "tests.tiny", "seed": seed},
    )
