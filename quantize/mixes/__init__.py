"""A type for every tensor within a budget of bytes, and the file that comes of it."""
