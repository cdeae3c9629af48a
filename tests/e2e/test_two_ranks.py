"""Two FSDP2 ranks and two rollout servers train as one of each does."""

import subprocess

import pytest
from real_runs import BIN, SMALL, STEPS, read_metrics, start

pytestmark = pytest.mark.timeout(900)

# Rounding of sums over ranks; a response that differed by one token would be far beyond it.
RELATIVE = 1e-4
# Of the order of the rounding itself: differences between rollout and actor.
ROUNDING = ("training/rollout_", "rollout_corr/")
# Tokens of a rank.
PER_RANK = ("global_seqlen/",)
WALL_CLOCK = ("timing", "perf/", "actor/perf/")


def test_losses_and_gradients_equal_those_of_one_rank(trained, cache, tmp_path):
    folder = tmp_path / "run"
    process = start(
        [
            *(BIN / "hpo-verl", "train", "countdown-tiny", *SMALL),
            *("hardware=cpu", "trainer.n_gpus_per_node=2", f"hydra.run.dir={folder}"),
        ],
        cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, _ = process.communicate()
    assert process.returncode == 0, output
    checkpoint = folder / "checkpoints" / f"global_step_{STEPS}" / "actor"
    assert (checkpoint / "model_world_size_2_rank_1.pt").is_file()
    one, two = read_metrics(trained[0]), read_metrics(folder)
    assert one.keys() == two.keys() == set(range(STEPS + 1))
    for step, metrics in one.items():
        compared = {
            name: value
            for name, value in metrics.items()
            if not name.startswith(ROUNDING + PER_RANK + WALL_CLOCK)
        }
        if step:
            assert {"actor/pg_loss", "actor/grad_norm", "hpo/alpha"} <= compared.keys()
        for name, value in compared.items():
            assert two[step][name] == pytest.approx(value, rel=RELATIVE, abs=1e-9), (step, name)
        assert two[step].get("training/rollout_probs_diff_max", 0) < 1e-5
