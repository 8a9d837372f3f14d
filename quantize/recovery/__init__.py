"""Training of what a quantized file holds beside its codes, until it predicts what its source does."""
