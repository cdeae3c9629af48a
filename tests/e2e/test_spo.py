"""Three steps of the real trainer with SPO, and on from a checkpoint."""

import pytest
import torch
from real_runs import STEPS, repeatable, train

# Few prompts, so that they come back within three steps.
FEW = ["algo=spo", "data.train_max_samples=24"]

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]


@pytest.fixture(scope="module")
def spo(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "spo"
    return folder, train(cache, folder, *FEW, "trainer.save_freq=2")


def test_spo_tracks_prompts_that_come_back(spo):
    folder, metrics = spo
    steps = [metrics[step] for step in range(1, STEPS + 1)]
    assert steps[0]["hpo/spo_value"] == 0.5
    assert steps[0]["hpo/spo_revisited_fraction"] == 0
    for data in steps[1:]:
        # 16 of 24 prompts a step: at least 8 of the last step's come back.
        assert data["hpo/spo_revisited_fraction"] >= 0.5
        assert data["hpo/spo_drift"] > 0
        assert 0.875 <= data["hpo/spo_forgetting"] <= 0.96
        assert 0 < data["hpo/spo_value"] < 0.5
        assert data["actor/grad_norm"] > 0
    state = torch.load(folder / "checkpoints/global_step_2/data.pt", weights_only=False)
    saved = state["_sampler_iter_state"]["sampler_state"]
    counts = saved["tracker"]["alpha"] + saved["tracker"]["beta"]
    assert counts.shape == (24,)
    # Two steps of 16 prompts: a prompt seen once has weight .96 + 1.
    assert int((counts != 1).sum()) == len(saved["last"]["rows"])
    assert counts.max() > 1.96


def test_spo_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(spo, cache, tmp_path):
    folder, metrics = spo
    again = train(
        cache, tmp_path, *FEW, "trainer.save_freq=-1", "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={folder}/checkpoints/global_step_2",
    )  # fmt: skip
    assert set(again) == {STEPS}
    assert repeatable(again)[STEPS] == repeatable(metrics)[STEPS]
