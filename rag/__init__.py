"""Text and vectors: parse, chunk, embed, store, search."""
