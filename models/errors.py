"""The one base of every error this floor raises.

A light module: catching ModelsError must not import numpy or the hub.
"""


class ModelsError(Exception):
    """A model, reference, adapter or store problem that the user can act on; the message says how."""
