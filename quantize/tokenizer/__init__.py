"""A checkpoint's tokenizer files become a GGUF's vocabulary."""
