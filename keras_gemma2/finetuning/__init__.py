"""Fine-tuning a preset on a .jsonl file with LoRA: what `keras-gemma2 finetune` runs."""
