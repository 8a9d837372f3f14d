"""A Hugging Face checkpoint becomes GGUF: converted, calibrated, quantized, measured."""
