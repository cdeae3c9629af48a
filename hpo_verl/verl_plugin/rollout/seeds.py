"""Seeds that follow from the name of a sample. No verl is imported: all agent loops share it."""

from __future__ import annotations

import hashlib


def sample_seed(
    rollout_seed: int, global_steps: int, index: object, session_id: int, messages: object
) -> int:
    """Seed in [0, 2**63) of one of a prompt's samples (`session_id`): a hash of what names it.

    The messages tell training from validation prompts.
    """
    name = repr((rollout_seed, int(global_steps), str(index), int(session_id), messages))
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
