"""Algorithms with hooks of their own, three steps each through the real trainer."""

import subprocess

import pytest
from real_runs import BIN, SMALL, STEPS, read_metrics, start

pytestmark = pytest.mark.timeout(900)

# What each must show beside the common metrics: key, smallest and largest value.
SHOWN = {
    "bapo": [("actor/bapo_low", 0.6, 0.9), ("actor/bapo_high", 1.2, 3.0),
             ("actor/bapo_positive_share", 0.0, 1.0)],
    "hapo": [("actor/entropy", 0.01, 5.0)],
    "aepo_advantage": [("actor/entropy", 0.01, 5.0)],
}  # fmt: skip


@pytest.mark.parametrize("algorithm", SHOWN)
def test_three_steps(trained, cache, tmp_path, algorithm):
    folder = tmp_path / algorithm
    with (tmp_path / "output").open("w") as output:
        process = start(
            [
                *(BIN / "hpo-verl", "train", "countdown-tiny", f"algo={algorithm}", *SMALL),
                *("trainer.val_before_train=false", "trainer.save_freq=-1", "trainer.test_freq=-1"),
                f"hydra.run.dir={folder}",
            ],
            cache,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        assert process.wait(300) == 0, (tmp_path / "output").read_text()
    metrics = read_metrics(folder)
    assert set(metrics) == set(range(1, STEPS + 1))
    for data in metrics.values():
        assert data["hpo/alpha"] == 1.0
        assert 0 < data["actor/grad_norm"] < 100
        for key, low, high in SHOWN[algorithm]:
            assert low <= data[key] <= high
    assert max(data["hpo/gradient_weight_positive"] for data in metrics.values()) > 0
