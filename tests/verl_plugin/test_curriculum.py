"""Prompts in stages by a number of their rows, in verl's loader, and on from a checkpoint."""

import io
import itertools

import pytest
import torch
from omegaconf import OmegaConf

from hpo_verl.errors import ConfigError, DataError
from hpo_verl.verl_plugin.curriculum import (
    CurriculumSettings,
    StagedSampler,
    curriculum_settings,
    difficulty,
)
from hpo_verl.verl_plugin.run_validation import check_sampling
from hpo_verl.verl_plugin.trainer.prompts import ROW, Curriculum

# Seven rows; by rank 1, 3, 5, 0, 6, 2, 4: the two of 2.0 as in the file.
NUMBERS = [2.0, -1.0, 5.0, 0.5, 9.0, 1, 2.0]
RANKED = [1, 3, 5, 0, 6, 2, 4]


def sampler(steps=6, batch=2, seed=0, **settings):
    return StagedSampler(NUMBERS, steps, batch, CurriculumSettings("d", **settings), seed)


def drawn(sampler, count):
    return list(itertools.islice(sampler, count))


def test_rows_are_ranked_and_parted():
    staged = sampler()
    assert staged.ranked == RANKED
    # 7 rows in 3 stages: up to ranks 2, 4 and 7.
    assert [staged.rows(stage) for stage in range(3)] == [[1, 3], [5, 0], [6, 2, 4]]
    assert sampler(descending=True).ranked == [4, 2, 0, 6, 5, 3, 1]
    assert [sampler(cumulative=True).rows(stage) for stage in range(3)] == [
        RANKED[:2], RANKED[:4], RANKED,
    ]  # fmt: skip
    assert len(staged) == 7


def test_stages_have_whole_steps_and_the_last_goes_on():
    assert [sampler(7).stage(step) for step in range(1, 10)] == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    rows = drawn(sampler(steps=6, batch=2), 30)
    for step in range(15):
        stage = min(step // 2, 2)
        assert set(rows[2 * step : 2 * step + 2]) <= set(sampler().rows(stage))


def test_within_a_stage_every_row_comes_before_any_comes_again():
    rows = drawn(sampler(steps=3, batch=70, stages=1), 70)
    rounds = [rows[start : start + 7] for start in range(0, 70, 7)]
    assert all(sorted(one) == list(range(7)) for one in rounds)
    # In another order each time.
    assert len({tuple(one) for one in rounds}) > 7


def test_the_order_follows_from_the_seed():
    first = drawn(sampler(), 40)
    assert drawn(sampler(), 40) == first
    assert drawn(sampler(seed=1), 40) != first


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"by": 3}, r"data\.curriculum\.by = 3: must be a name in extra_info, or null"),
        ({"by": ""}, r"by = ''"),
        ({"stages": 0}, r"stages = 0: must be an integer of at least 1"),
        ({"stages": 2.5}, r"stages = 2\.5: must be an integer"),
        ({"descending": "no"}, r"descending = 'no': must be true or false"),
        ({"cumulative": 1}, r"cumulative = 1: must be true or false"),
        ({"stage": 1}, r"did you mean data\.curriculum\.stages\?"),
    ],
)
def test_bad_settings_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        curriculum_settings({"data": {"curriculum": values}})


def test_more_stages_than_steps_or_rows_are_refused():
    with pytest.raises(ConfigError, match=r"stages = 3: must be at most the 2 steps of the run$"):
        sampler(steps=2)
    with pytest.raises(ConfigError, match=r"stages = 8: must be at most the 7 rows$"):
        sampler(steps=9, stages=8)


@pytest.mark.parametrize("extra", [None, {}, {"d": None}, {"d": True}, {"d": "3"}, {"d": 1e999}])
def test_a_row_without_the_number_is_named(extra):
    with pytest.raises(DataError, match=r"by = 'd': row 4: extra_info\.d = .*, no number$"):
        difficulty({"extra_info": extra}, "d", "row 4")


# ---------------------------------------------------------------- trainer


class Parent:
    """What verl's trainer does around the part tested here."""

    total_training_steps, global_steps = 6, 1

    def _init_dataloader(self):
        self.train_dataset = [
            {"raw_prompt": [f"p{row}"], "extra_info": {"d": d}, "dummy": torch.zeros(1)}
            for row, d in enumerate(NUMBERS)
        ]
        self.train_dataloader = "verl's"

    def prepare_step(self):
        return {"verl": 1}


def trainer(**curriculum):
    result = type("Mode", (Curriculum, Parent), {})()
    data = {"train_batch_size": 2, "seed": 5, "curriculum": curriculum}
    result.config = OmegaConf.create({"data": data})
    result._init_dataloader()
    return result


def test_the_loader_of_verl_draws_in_stages():
    mode = trainer(by="d")
    batches = list(itertools.islice(mode.train_dataloader, 6))
    assert [row for batch in batches for row in batch[ROW]] == drawn(sampler(seed=5), 12)
    assert list(batches[0]["raw_prompt"]) == [[f"p{row}"] for row in batches[0][ROW]]
    logged = []
    for mode.global_steps in range(1, 7):
        logged.append(mode.prepare_step())
    stages = [metrics.pop("hpo/curriculum_stage") for metrics in logged]
    assert stages == [1, 1, 2, 2, 3, 3]
    assert logged == [{"verl": 1}] * 6


def test_it_goes_on_from_a_checkpoint():
    """As verl does it: the loader's state through torch.save, into a fresh trainer."""
    first, second = trainer(by="d"), trainer(by="d")
    batches = iter(first.train_dataloader)
    for _ in range(3):
        next(batches)
    file = io.BytesIO()
    torch.save(first.train_dataloader.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    second.train_dataloader.load_state_dict(state)
    restored = iter(second.train_dataloader)
    for _ in range(8):
        assert next(restored)[ROW].tolist() == next(batches)[ROW].tolist()


def test_without_a_name_verl_s_loader_stays():
    mode = trainer()
    assert mode.train_dataloader == "verl's"
    assert mode.prepare_step() == {"verl": 1}


# ---------------------------------------------------------------- whole configurations


def config(by="d", mode="hpo_sync", estimator="grpo"):
    return OmegaConf.create(
        {
            "algorithm": {"adv_estimator": estimator},
            "actor_rollout_ref": {"rollout": {"n": 8}},
            "data": {"curriculum": {"by": by}},
            "trainer": {"v1": {"trainer_mode": mode}},
        }
    )


def test_where_nothing_would_heed_it_it_is_refused():
    for mode in ("hpo_sync", "hpo_colocate_async", "hpo_separate_async"):
        check_sampling(config(mode=mode))
    check_sampling(config(None, "sync", "spo"))
    words = r"^trainer\.v1\.trainer_mode = 'sync': data\.curriculum\.by = 'd' needs hpo_sync or"
    with pytest.raises(ConfigError, match=words):
        check_sampling(config(mode="sync"))
    with pytest.raises(ConfigError, match="must be null, since adv_estimator = 'spo' draws its"):
        check_sampling(config(estimator="spo"))
