"""What is told of an error that nobody foresaw."""

import traceback

from engine.request import EngineError


def told(error: Exception) -> EngineError:
    """What is not an EngineError is a defect: its traceback goes to stderr, its text to the caller."""
    if isinstance(error, EngineError):
        return error
    traceback.print_exception(error)
    return EngineError(f"internal error: {type(error).__name__}: {error}")
