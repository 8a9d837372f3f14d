"""A GGUF computed by torch, one layer in memory at a time, and the second moments of its products' inputs."""
