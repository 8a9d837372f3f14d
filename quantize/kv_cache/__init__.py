"""What smaller types of cached keys and values cost a model, and which to serve it with."""
