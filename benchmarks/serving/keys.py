"""API keys of a scenario's groups, and the lq.toml that gives each its weight.

llama-server has no such thing: it is asked with the same keys, which it does not look at.
"""

import hashlib
from collections.abc import Mapping


def secret(group: str) -> str:
    """The key of one group; nothing that is worth anything to anybody."""
    return f"benchmark-key-of-{group}"


def settings(weights: Mapping[str, float]) -> str:
    """The text of an lq.toml with a key for each group."""
    tables = []
    for group, weight in weights.items():
        digest = hashlib.sha256(secret(group).encode()).hexdigest()
        tables.append(f'[keys.{group}]\nkey_sha256 = "{digest}"\nweight = {weight}\n')
    return "\n".join(tables)
