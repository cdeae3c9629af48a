"""Kills a whole run with SIGKILL at a named point; Python imports this where it is on PYTHONPATH.

`KILL_AT` is `POINT:STEP`. Every process of the run inherits it and this module; the one that
gets to the point kills the command first, so that it cannot tidy up, then all others, then itself.
"""

import importlib.abc
import importlib.machinery
import os
import signal
import sys

LAUNCHER = "KILL_AT_LAUNCHER"
MARKER = "HPO_VERL_RUN"
TRACKER = "latest_checkpointed_iteration.txt"
POINT, _, STEP = os.environ.get("KILL_AT", "").partition(":")
FOLDER = f"global_step_{STEP}/"


def end_run():
    """SIGKILL for every process of this run."""
    import psutil

    own = os.environ[MARKER]
    os.kill(int(os.environ[LAUNCHER]), signal.SIGKILL)
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(MARKER) == own and process.pid != os.getpid()
        except (psutil.Error, OSError):
            continue
        if ours:
            process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def tear(path):
    """Leave the first half of a file."""
    os.truncate(path, os.path.getsize(path) // 2)


def rollout(module):
    """After 20 responses of the step are stored."""
    worker, stored = module.CoalescingAgentLoopWorker, []
    store = worker._agent_loop_postprocess

    async def counted(self, output, validate, **kwargs):
        result = await store(self, output, validate, **kwargs)
        if not validate and kwargs["global_steps"] == int(STEP):
            stored.append(output)
            if len(stored) == 20:
                end_run()
        return result

    worker._agent_loop_postprocess = counted


def backward(module):
    """When the gradient of the loss begins to flow in the second mini-batch of the step."""
    import torch

    step, plain = torch.optim.AdamW.step, torch.Tensor.backward
    # Two mini-batches a step; the optimizer counts them, in earlier starts too.
    wanted, updates = 2 * int(STEP) - 1, [0]

    def counted(self, *arguments, **options):
        result = step(self, *arguments, **options)
        updates[0] = int(next(iter(self.state.values()))["step"])
        return result

    def watched(self, *arguments, **options):
        if updates[0] == wanted:
            self.register_hook(lambda gradient: end_run())
        return plain(self, *arguments, **options)

    torch.optim.AdamW.step = counted
    torch.Tensor.backward = watched


def shards(module):
    """When half of the optimizer's shard is written."""
    save = module.torch.save

    def torn(content, path, *arguments, **options):
        save(content, path, *arguments, **options)
        if FOLDER in str(path) and "optim_" in str(path):
            tear(path)
            end_run()

    module.torch.save = torn


def before_tracker(module):
    """After all shards and the data loader's state, before the tracker file."""
    save = module.torch.save

    def last(content, path, *arguments, **options):
        save(content, path, *arguments, **options)
        if str(path).endswith(f"{FOLDER}data.pt"):
            end_run()

    module.torch.save = last


def tracker(module):
    """When the tracker file is open and empty."""

    def opened(path, *arguments, **options):
        stream = open(path, *arguments, **options)  # noqa: SIM115
        if str(path).endswith(TRACKER) and os.path.exists(str(path).replace(TRACKER, FOLDER)):
            end_run()
        return stream

    # verl looks the name up in its own module first.
    module.open = opened


def metrics(module):
    """When half of the step's row of metrics is written, and its checkpoint is not sealed."""
    log = module.FileLogger.log

    def torn(self, data, step):
        before = os.path.getsize(self.fp.name)
        log(self, data, step)
        if step == int(STEP):
            os.truncate(self.fp.name, (before + os.path.getsize(self.fp.name)) // 2)
            end_run()

    module.FileLogger.log = torn


def seal(module):
    """When the seal is written under its temporary name."""
    replace = os.replace

    def never(source, target):
        if str(target).endswith(f"{FOLDER}complete.json"):
            end_run()
        replace(source, target)

    module.os.replace = never


POINTS = {
    "rollout": ("hpo_verl.verl_plugin.rollout.worker", rollout),
    "backward": ("verl.workers.engine.fsdp.transformer_impl", backward),
    "shards": ("verl.utils.checkpoint.fsdp_checkpoint_manager", shards),
    "before_tracker": ("verl.trainer.ppo.v1.trainer_base", before_tracker),
    "tracker": ("verl.trainer.ppo.v1.trainer_base", tracker),
    "metrics": ("verl.utils.tracking", metrics),
    "seal": ("hpo_verl.runs.files", seal),
}


class After(importlib.abc.MetaPathFinder):
    """Runs a function on a module right after it is loaded."""

    def __init__(self, name, change):
        self.name, self.change = name, change

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def load_and_change(module):
            load(module)
            self.change(module)

        spec.loader.exec_module = load_and_change
        return spec


if POINT:
    os.environ.setdefault(LAUNCHER, str(os.getpid()))
    sys.meta_path.insert(0, After(*POINTS[POINT]))
