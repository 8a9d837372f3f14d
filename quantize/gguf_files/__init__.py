"""GGUF files and the formats of their tensors: laid out, rounded by ggml, packed, written piece by piece."""
