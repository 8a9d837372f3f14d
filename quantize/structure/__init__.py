"""What a model is made of: layers that can be left out, tensors that are hard to round, lattices."""
