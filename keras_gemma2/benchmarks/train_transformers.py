"""transformers' Gemma 2 with peft's LoRA for `benchmarks train`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras_gemma2.benchmarks.train_contenders import LEARNING_RATE, RANK, tokens


def transformers_peft(
    numbers: dict[str, Any], dtype: str, batch: int, length: int, checkpointing: bool = False
) -> Callable[[], float]:
    """transformers' `Gemma2ForCausalLM` in peft's `LoraModel`, with torch's AdamW."""
    import peft
    import transformers

    names = {
        "vocabulary_size": "vocab_size",
        "num_layers": "num_hidden_layers",
        "num_query_heads": "num_attention_heads",
        "intermediate_dim": "intermediate_size",
        "hidden_dim": "hidden_size",
    }
    config = transformers.Gemma2Config(**{names.get(name, name): value for name, value in numbers.items()})
    config._attn_implementation = "eager"  # the one that has the soft cap
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    model.train()
    settings = transformers.TrainingArguments("unused", optim="adamw_torch", learning_rate=LEARNING_RATE, report_to=[])
    optimizer_class, arguments = transformers.Trainer.get_optimizer_cls_and_kwargs(settings)
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], **arguments)
    token_ids = tokens(numbers["vocabulary_size"], batch, length).astype("int64")
    inputs = transformers.BatchEncoding({"input_ids": token_ids, "labels": token_ids}, tensor_type="pt")

    def step() -> float:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step
