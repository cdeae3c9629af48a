"""Every algorithm, three steps through the real trainer; those with hooks of their own first."""

import math
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from real_runs import BIN, SMALL, STEPS, read_metrics, start, train

from hpo_verl.algorithms.registry import ALGORITHMS

pytestmark = pytest.mark.timeout(1800)

# Those that every test run has, for their hooks of entropies, rewards and rows. The hook into the
# engine has contract tests.
HOOKS = ("hapo", "hypervolume", "d3s")

# What some must show at every step: key, smallest and largest value.
SHOWN = {
    "bapo": [("actor/bapo_low", 0.6, 0.9), ("actor/bapo_high", 1.2, 3.0),
             ("actor/bapo_positive_share", 0.0, 1.0)],
    # Few of this policy's first responses succeed, so that negatives are damped at every step.
    "hysteretic_grpo": [("hpo/alpha", 0.1, 0.9)],
    "hapo": [("actor/entropy", 0.01, 5.0)],
    "aepo_advantage": [("actor/entropy", 0.01, 5.0)],
    "constrained_grpo": [("hpo/constrained_multiplier/format", 0.4, 0.6),
                         ("hpo/reward/format", 0.0, 1.0)],
    "hypervolume": [("hpo/hypervolume_factor", 0.5, 2.0), ("hpo/reward/brevity", 0.01, 1.0)],
    "capo": [("actor/curvature_masked", 0.0, 0.9), ("actor/head_seconds_fraction", 0.0, 1.0)],
    "ahpo": [("hpo/ahpo_expert_fraction", 1.0, 1.0)],
    "reward_gradients": [("hpo/reward_weight/acc", 0.01, 0.99),
                         ("hpo/reward_weight/brevity", 0.01, 0.99),
                         ("actor/objective_score/format", -100.0, 100.0)],
    "d3s": [("hpo/d3s_response_fraction", 0.25, 0.5), ("hpo/d3s_token_fraction", 0.01, 0.5)],
}  # fmt: skip

# Further settings: of one whose bounds follow the learning rate, of one with a temperature per
# token, of those that read three rewards, one of which follows validations; and of prefixes.
SETTINGS = {
    # The recipe's bounds belong to a learning rate of 1.5e-5; these leave out few tokens.
    "capo": [
        "actor_rollout_ref.actor.policy_loss.hessian_low=-1.0",
        "actor_rollout_ref.actor.policy_loss.hessian_high=1.0",
        "actor_rollout_ref.actor.policy_loss.fisher_high=2e-4",
    ],
    "hapo": ["algorithm.hapo.temperature_scale=0.1"],
    "hypervolume": [
        "algorithm.hypervolume.rewards=[acc,format,brevity]",
        "algorithm.hypervolume.weights=[0.5,0.25,0.25]",
        "+reward.custom_reward_function.reward_kwargs.brevity_characters=48",
        *("trainer.val_before_train=true", "trainer.test_freq=1"),
    ],
    "reward_gradients": [
        "algorithm.reward_gradients.rewards=[acc,format,brevity]",
        "algorithm.reward_gradients.weights=[0.5,0.25,0.25]",
        # As much as in the paper, at this task's learning rate.
        "algorithm.reward_gradients.mu=3e-3",
        "+reward.custom_reward_function.reward_kwargs.brevity_characters=48",
    ],
    # Short enough for responses of 24 tokens.
    "apo": ["algorithm.apo.modes=['<r>','<i>']"],
}


def launch(algorithm, place, cache):
    """Start a run in `place/algorithm`, with its output in a file beside it."""
    with (place / f"{algorithm}.txt").open("w") as output:
        return start(
            [
                *(BIN / "hpo-verl", "train", "countdown-tiny", f"algo={algorithm}", *SMALL),
                *("trainer.val_before_train=false", "trainer.save_freq=-1"),
                *("trainer.test_freq=-1", f"hydra.run.dir={place}/{algorithm}"),
                *SETTINGS.get(algorithm, ()),
            ],
            cache,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture(scope="module")
def folders(trained, cache, tmp_path_factory):
    """Run folders of those with hooks, which ran at the same time."""
    place = tmp_path_factory.mktemp("neighbours")

    def run(algorithm):
        return launch(algorithm, place, cache).wait()

    # Each takes 3 GB.
    with ThreadPoolExecutor(len(HOOKS)) as pool:
        codes = dict(zip(HOOKS, pool.map(run, HOOKS), strict=True))
    return place, codes


def check(algorithm, place, code):
    assert code == 0, (place / f"{algorithm}.txt").read_text()
    # Step 0 is a validation, of one that follows these.
    metrics = {step: data for step, data in read_metrics(place / algorithm).items() if step}
    assert set(metrics) == set(range(1, STEPS + 1))
    norms = [data["actor/grad_norm"] for data in metrics.values()]
    assert all(math.isfinite(norm) for norm in norms)
    assert 0 < max(norms) < 100
    assert max(data["hpo/gradient_weight_positive"] for data in metrics.values()) > 0
    for data in metrics.values():
        for key, low, high in SHOWN.get(algorithm, ()):
            assert low <= data[key] <= high, key
    return metrics


@pytest.mark.parametrize("algorithm", HOOKS)
def test_three_steps(folders, algorithm):
    place, codes = folders
    metrics = check(algorithm, place, codes[algorithm])
    assert all(data["hpo/alpha"] == 1.0 for data in metrics.values())


def test_d3s_keeps_more_from_step_to_step(folders):
    metrics = read_metrics(folders[0] / "d3s")
    steps = [metrics[step] for step in range(1, STEPS + 1)]
    assert [data["hpo/d3s_response_fraction"] for data in steps] == [0.25, 0.375, 0.5]
    tokens = [data["hpo/d3s_token_fraction"] for data in steps]
    assert tokens == sorted(tokens)
    for data in steps:
        assert data["hpo/positive_fraction"] + data["hpo/negative_fraction"] <= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name not in HOOKS])
def test_three_steps_of_every_other(algorithm, cache, tmp_path):
    check(algorithm, tmp_path, launch(algorithm, tmp_path, cache).wait())


@pytest.mark.slow
def test_another_mode_that_a_cpu_has(cache, tmp_path):
    metrics = train(cache, tmp_path / "run", "trainer.v1.trainer_mode=hpo_colocate_async")
    assert set(metrics) == set(range(1, STEPS + 1))
    assert all(0.1 <= data["hpo/alpha"] <= 1.0 for data in metrics.values())
    assert max(data["actor/grad_norm"] for data in metrics.values()) > 0
