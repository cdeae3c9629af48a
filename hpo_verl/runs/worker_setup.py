"""What every Ray process of a run on the CPU does first.

Importing verl leaves half a million objects, and a step makes enough small ones
for Python's collector to walk all of them about three times, for 0.3 s each.

This module must not import torch: Ray sets the number of a worker's threads only
after the setup hook, and torch reads it once. So it cannot stand in verl_plugin.
"""

from __future__ import annotations

import gc


def collect_garbage_seldom() -> None:
    """Collect the young every 50,000 objects, and all of them at 20 x 20 times that."""
    gc.set_threshold(50_000, 20, 20)
