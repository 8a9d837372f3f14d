"""The base of every expected failure of this floor; `lq` prints it as one line and exits 1.

Each exception lives beside the code that raises it and derives from this one.
"""


class QuantizeError(Exception):
    """Something about the model, the options or the machine that the user can put right."""
