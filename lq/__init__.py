"""The roof: the `lq` command."""
