"""What every Ray process of a run on the CPU does first.

Importing verl leaves half a million objects, and a step makes enough small ones
for Python's collector to walk all of them about three times, for 0.3 s each.

This module must not import torch: Ray sets the number of a worker's threads only
after the setup hook, and torch reads it once.
"""

from __future__ import annotations

import gc

# A collection of the young every 50,000 objects, of all of them at 20 x 20 times that.
THRESHOLDS = (50_000, 20, 20)


def collect_garbage_seldom() -> None:
    """Make the garbage collector run seldom; Ray's `worker_process_setup_hook`."""
    gc.set_threshold(*THRESHOLDS)
