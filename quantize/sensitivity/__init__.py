"""What each type costs each tensor: gradients projected onto rounding errors."""
