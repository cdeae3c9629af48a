"""Spoils an update of vLLM's weights; Python imports this where it is on PYTHONPATH.

`FAIL_UPDATE` says what becomes of the second update in vLLM's worker: `raise` an error, `hang`,
or `die` by SIGKILL.
"""

import os
import signal
import time

from wrapt import register_post_import_hook

MESSAGE = "an error of this test"


def fail():
    if HOW == "raise":
        raise RuntimeError(MESSAGE)
    if HOW == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)


def spoil(module):
    worker, updates = module.vLLMColocateWorkerExtension, []
    update = worker._update_weights

    def spoilt(self, *arguments, **options):
        updates.append(1)
        if len(updates) == 2:
            fail()
        return update(self, *arguments, **options)

    worker._update_weights = spoilt


if HOW := os.environ.get("FAIL_UPDATE"):
    register_post_import_hook(spoil, "verl.workers.rollout.vllm_rollout.utils")
