"""What is illegal together, and what would train without learning."""

import pytest
from omegaconf import OmegaConf

from hpo_verl.checks.configuration import (
    GROUP_RELATIVE,
    check_algorithm,
    check_learnable,
    check_lengths,
    check_names,
    check_settings,
    check_steps,
    check_with_verl,
)

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"


def only(findings, name):
    (finding,) = [f for f in findings if f.name == name]
    return finding


CHECKS = (
    *(check_settings, check_learnable, check_steps, check_lengths),
    *(check_names, check_algorithm, check_with_verl),
)


NAMES = ("settings", "learning", "steps", "lengths", "names", "algorithm", "verl's checks")


def check_configuration(planned):
    return [check(planned) for check in CHECKS]


def test_the_small_run_is_legal_and_learns(planned):
    findings = check_configuration(planned())
    assert [f.status for f in findings] == ["ok"] * 7
    detail = only(findings, "learning").detail
    assert detail == "a step is 64 prompts x 8 responses, 4 updates"
    assert only(findings, "steps").detail == "30 steps"
    assert only(findings, "names").detail.startswith("adv_estimator a_hpo, loss_mode hpo, trainer")


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({f"{ROLLOUT}.n": 1}, "rollout.n=1: the estimator a_hpo compares the responses"),
        ({f"{ROLLOUT}.n": 1, "algorithm.adv_estimator": "rloo"}, "the estimator rloo compares"),
        ({f"{ROLLOUT}.temperature": 0.0}, "rollout.temperature=0.0: sampling is greedy"),
        ({f"{ROLLOUT}.top_k": 1}, "rollout.top_k=1: sampling is greedy"),
        ({f"{ACTOR}.optim.lr": 0.0}, "optim.lr=0: no update"),
        ({f"{ACTOR}.grad_clip": 0}, "grad_clip=0: no update"),
    ],
)
def test_nothing_would_be_learned(planned, changes, detail):
    finding = check_learnable(planned(changes))
    assert finding.status == "error"
    assert detail in finding.detail
    assert finding.fix


def test_a_warmup_that_never_ends(planned):
    finding = check_steps(planned({"trainer.critic_warmup": 31}))
    assert finding.status == "error"
    assert "critic_warmup=31: the policy is first updated after it" in finding.detail
    assert check_steps(planned({"trainer.critic_warmup": 30})).status == "ok"


def test_every_estimator_is_known_to_compare_responses_or_not():
    from hpo_verl.verl_plugin import registered

    names = {
        key: known
        for key, _, known in registered.selected(
            OmegaConf.create({"algorithm": {"adv_estimator": "any"}})
        )
    }
    without = {"gae", "reinforce_plus_plus", "remax", "spo"}
    assert set(names["algorithm.adv_estimator"]) == {*GROUP_RELATIVE} ^ without


def test_without_groups_one_response_is_enough(planned):
    changes = {f"{ROLLOUT}.n": 1, "algorithm.adv_estimator": "reinforce_plus_plus"}
    assert check_learnable(planned(changes)).status == "ok"


def test_epochs_give_steps_where_no_number_is_set(planned):
    changes = {"trainer.total_training_steps": None, "trainer.total_epochs": 2}
    assert check_steps(planned(changes)).detail == "6 steps"
    absent = planned({**changes, "data.train_files": "/nowhere/train.parquet"})
    assert check_steps(absent).status == "skipped"


@pytest.mark.parametrize(("done", "status"), [("29", "ok"), ("30", "error"), ("", "ok")])
def test_a_run_that_is_finished_has_no_step_left(planned, tmp_path, done, status):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text(done)
    changes = {"trainer.default_local_dir": str(folder)}
    finding = check_steps(planned(changes))
    assert finding.status == status
    assert ("step 30 of 30" in finding.detail) == (status == "error")
    assert check_steps(planned({**changes, "trainer.resume_mode": "disable"})).status == "ok"


@pytest.mark.parametrize(
    ("changes", "name", "detail"),
    [
        ({f"{ACTOR}.ppo_mini_batch_size": 128}, "settings", "must divide data.train_batch_size=64"),
        ({"trainer.total_training_steps": 0}, "settings", "total_training_steps=0"),
        (
            {"data.max_prompt_length": None},
            "settings",
            "max_prompt_length=None: must be an integer",
        ),
        ({"trainer.nnodes": None}, "settings", "nnodes=None: must be an integer"),
        ({f"{ACTOR}.optim.lr": -1e-6}, "settings", "lr=-1e-06: must be a number in [0, 1]"),
        ({f"{ACTOR}.optim.lr": "fast"}, "settings", "lr='fast': must be a number"),
        ({f"{ACTOR}.optim.lr": float("nan")}, "settings", "lr=nan"),
        ({f"{ROLLOUT}.n": 0}, "settings", "rollout.n=0: must be an integer >= 1"),
        ({f"{ROLLOUT}.n": 2.5}, "settings", "rollout.n=2.5: must be an integer"),
        ({f"{ROLLOUT}.n": True}, "settings", "rollout.n=True: must be an integer"),
        ({"seed": -1}, "settings", "seed=-1"),
        ({f"{ACTOR}.ppo_mini_batch_size": 3}, "settings", "must divide data.train_batch_size=64"),
        ({f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean"}, "algorithm", "permits token-mean only"),
        ({f"{ACTOR}.policy_loss.loss_mode": "kl_cov"}, "algorithm", "covariance"),
        ({"algorithm.hpo.alpha_min": 1.5}, "algorithm", "alpha_min"),
        ({f"{ROLLOUT}.dtype_": 1}, "verl's checks", "actor_rollout_ref.rollout"),
    ],
)
def test_illegal_settings_are_named(planned, changes, name, detail):
    (check,) = [check for check, known in zip(CHECKS, NAMES, strict=True) if known == name]
    finding = check(planned(changes))
    assert (finding.name, finding.status) == (name, "error")
    assert detail in finding.detail


UNKNOWN = {
    "algorithm.adv_estimator": ("a_hop", "a_hpo"),
    f"{ACTOR}.policy_loss.loss_mode": ("vanila", "vanilla"),
    "trainer.v1.trainer_mode": ("hpo_snc", "hpo_sync"),
    "reward.reward_manager.name": ("naiv", "naive"),
    f"{ROLLOUT}.name": ("vlm", "vllm"),
    f"{ROLLOUT}.agent.default_agent_loop": ("single_turn", "single_turn_agent"),
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_a_name_that_nobody_registered_comes_with_the_nearest(planned, key):
    name, near = UNKNOWN[key]
    finding = check_names(planned({key: name}))
    assert finding.status == "error"
    assert f"{key}={name}: not registered with verl; did you mean " in finding.detail
    assert near in finding.detail.split("did you mean")[1]


def test_what_a_file_or_another_source_names_is_not_looked_for(planned):
    manager = {"source": "importlib", "name": "Mine", "module": {"path": "mine.py"}}
    agent = {"default_agent_loop": "mine", "agent_loop_config_path": "loops.yaml"}
    changes = {"reward.reward_manager": manager, f"{ROLLOUT}.agent": agent}
    assert check_names(planned(changes)).status == "ok"


def test_a_legal_combination_that_is_not_what_its_name_promises(planned):
    changes = {f"{ACTOR}.policy_loss.loss_mode": "dro", f"{ACTOR}.loss_agg_mode": "token-mean"}
    finding = check_algorithm(planned(changes))
    assert finding.status == "warning"
    assert "quadratic" in finding.detail


def test_a_response_that_does_not_fit(planned):
    changes = {f"{ACTOR}.use_dynamic_bsz": True, f"{ACTOR}.ppo_max_token_len_per_gpu": 39}
    finding = check_lengths(planned(changes))
    assert (finding.status, finding.fix) == (
        "error",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=40 or more",
    )
    finding = check_lengths(planned({f"{ROLLOUT}.max_model_len": 32}))
    assert finding.status == "error"
    assert "max_model_len=32" in finding.detail
    assert check_lengths(planned({f"{ROLLOUT}.max_model_len": 40})).status == "ok"
