"""Puts a NaN into the model's log-probabilities in the updates that SPOILED_UPDATES names.

Its value is `first-last`, counted from 1. A folder of its own, so that only the environment of
a test finds it; verl loads it in every process, and it acts in the actor alone.
"""

import os


def spoil(module):
    engine = module.FSDPEngineWithLMHead
    train, outputs = engine.train_batch, engine.prepare_model_outputs
    first, last = map(int, os.environ["SPOILED_UPDATES"].split("-"))

    def count(self, *args, **kwargs):
        self.updates = getattr(self, "updates", 0) + 1
        return train(self, *args, **kwargs)

    def with_nan(self, *args, **kwargs):
        import torch

        found = outputs(self, *args, **kwargs)
        if torch.is_grad_enabled() and first <= self.updates <= last:
            # The log-probability of the first response's last token stands one place before it.
            log_probs = found["log_probs"]
            factor = torch.ones_like(log_probs.values())
            factor[log_probs.offsets()[1] - 2] = float("nan")
            found["log_probs"] = torch.nested.nested_tensor_from_jagged(
                log_probs.values() * factor, log_probs.offsets()
            )
        return found

    engine.train_batch, engine.prepare_model_outputs = count, with_nan


if "SPOILED_UPDATES" in os.environ:
    from wrapt import register_post_import_hook

    register_post_import_hook(spoil, "verl.workers.engine.fsdp.transformer_impl")
