"""Fine-tuning: chats in, a LoRA adapter out that `lq serve` and `lq quantize --lora` take."""
