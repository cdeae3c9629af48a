"""What is illegal together, and what would train without learning."""

import pytest
from findings import only
from omegaconf import OmegaConf
from wrong_settings import CASES

from hpo_verl.checks.configuration import (
    check_algorithm,
    check_learnable,
    check_lengths,
    check_names,
    check_records,
    check_steps,
    is_group_relative,
)
from hpo_verl.checks.list import CHECKS, run_checks
from hpo_verl.checks.values import check_settings

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"


NAMES = ("settings", "learning", "steps", "lengths", "names", "algorithm", "verl's checks")


def check_configuration(planned):
    return list(run_checks(planned, [check for check in CHECKS if check.name in NAMES]))


def test_the_small_run_is_legal_and_learns(planned):
    findings = check_configuration(planned())
    assert [f.status for f in findings] == ["ok"] * 7
    detail = only(findings, "learning").detail
    assert detail == "a step is 64 prompts x 8 responses, 4 updates"
    assert only(findings, "steps").detail == "30 steps"
    assert only(findings, "names").detail.startswith("adv_estimator a_hpo, loss_mode hpo, trainer")


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
    without = {"gae", "reinforce_plus_plus", "remax", "spo", "psr", "nsr", "w_reinforce"}
    known = names["algorithm.adv_estimator"]
    assert {name for name in known if not is_group_relative(name)} == without
    assert not is_group_relative("somebodys_own")


def test_without_groups_one_response_is_enough(planned):
    changes = {f"{ROLLOUT}.n": 1, "algorithm.adv_estimator": "reinforce_plus_plus"}
    assert [finding.status for finding in check_learnable(planned(changes))] == ["ok"]


def test_a_run_that_only_validates_is_warned_of(planned):
    assert [finding.status for finding in check_records(planned())] == ["ok"]
    (finding,) = check_records(planned({"trainer.val_only": True}))
    assert (finding.status, "val_only=true" in finding.detail) == ("warning", True)


def test_epochs_give_steps_where_no_number_is_set(planned):
    changes = {"trainer.total_training_steps": None, "trainer.total_epochs": 2}
    assert check_steps(planned(changes)).detail == "6 steps"
    absent = planned({**changes, "data.train_files": "/nowhere/train.parquet"})
    assert check_steps(absent).status == "skipped"


def test_epochs_that_end_before_the_steps(planned):
    changes = {"trainer.total_epochs": 1}
    assert check_steps(planned(changes)).status == "error"
    # Its sampler has no end, verl's loop has one: see test_stopping.py.
    spo = {**changes, "algorithm.adv_estimator": "spo"}
    assert check_steps(planned(spo)).status == "error"
    own = {**changes, "data.custom_cls.path": "mine.py"}
    assert check_steps(planned(own)).detail == "30 steps"


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


@pytest.mark.parametrize(("changes", "name", "words"), [case for case in CASES if case[1] in NAMES])
def test_wrong_settings_are_named(planned, changes, name, words):
    finding, *_ = run_checks(planned(changes), [check for check in CHECKS if check.name == name])
    assert (finding.name, finding.status) == (name, "error")
    assert words in finding.detail
    assert finding.fix


def test_one_logger_may_be_a_text_and_an_optional_section_may_be_left_out(planned):
    assert check_settings(planned({"trainer.logger": "file"})).status == "ok"
    assert check_settings(planned({"actor_rollout_ref.rollout.engine_kwargs": None})).status == "ok"


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


def test_a_response_that_just_fits(planned):
    changes = {f"{ACTOR}.use_dynamic_bsz": True, f"{ACTOR}.ppo_max_token_len_per_gpu": 40}
    assert check_lengths(planned({**changes, f"{ROLLOUT}.max_model_len": 40})).status == "ok"
