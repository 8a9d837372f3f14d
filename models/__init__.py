"""Files: names to files, hub and package downloads, GGUF headers, LoRA adapters."""
