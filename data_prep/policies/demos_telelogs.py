r"""Demonstrations of the compressed TeleLogs task for the tiny policy.

Two authors read nine letters, copy none, three, six or all of them, and name one
of eight causes:

    AEHKMP
    \boxed{C3}

One knows the cause, the other guesses. Nothing but the last digit tells them
apart, so the policy that imitates both is unsure of it; to sharpen what it half
knows is left to reinforcement learning. The drives are the simulator's, from a
random stream of their own: none is in the training or the validation split. The
letters are few, though, so that the same nine appear in all of them.
"""

from __future__ import annotations

from data_prep.policies.demos import Demonstration, Demonstrations
from data_prep.telelogs.simulator import simulate
from data_prep.telelogs.tiny import tiny_prompt
from hpo_verl.rewards.telelogs import CAUSES

MAX_RESPONSE_TOKENS = 24
# Of a drive's seed; 0 and 1 are the training and the validation split.
_STREAM = 2
# Drives that are simulated; a demonstration shows one of them, with any copied part.
_DRIVES = 4096
_COPIED = (0, 3, 6, 9)


class TeleLogsDemonstrations(Demonstrations):
    """Demonstrations of the eight causes; the seed is not negative."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._drives = [
            (tiny_prompt(simulate((seed, _STREAM, index), cause)), cause)
            for index in range(_DRIVES // len(CAUSES))
            for cause in CAUSES
        ]

    def draw(self, direct_share: float) -> Demonstration:
        """Draw a drive and a response; the direct author guesses the cause."""
        letters, cause = self._random.choice(self._drives)
        if self._random.random() < direct_share:
            cause = self._random.choice(CAUSES)
        copied = self._random.choice(_COPIED)
        line = f"{letters[:copied]}\n" if copied else ""
        return Demonstration([{"role": "user", "content": letters}], f"{line}\\boxed{{{cause}}}")
