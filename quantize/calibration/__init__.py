"""Texts that the model itself writes, and what its tensors are multiplied with meanwhile."""
