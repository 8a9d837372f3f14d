"""The one error that every error of this floor is: an explanation for the user, in one line."""


class RagError(Exception):
    """Expected: the message names what is wrong, the value, and the remedy."""
