"""What is illegal together, and what would train without learning."""

import pytest

from hpo_verl.doctor.configuration import check_configuration, check_learnable, check_lengths

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"


def only(findings, name):
    (finding,) = [f for f in findings if f.name == name]
    return finding


def test_the_small_run_is_legal_and_learns(subject):
    findings = check_configuration(subject())
    assert [f.status for f in findings] == ["ok"] * 5
    assert (
        only(findings, "learning").detail == "30 steps of 64 prompts x 8 responses, 4 updates each"
    )


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({f"{ROLLOUT}.n": 1}, "rollout.n=1: the estimator a_hpo compares the responses"),
        ({f"{ROLLOUT}.n": 1, "algorithm.adv_estimator": "rloo"}, "the estimator rloo compares"),
        ({f"{ROLLOUT}.temperature": 0.0}, "rollout.temperature=0.0: sampling is greedy"),
        ({f"{ROLLOUT}.top_k": 1}, "rollout.top_k=1: sampling is greedy"),
        ({f"{ACTOR}.optim.lr": 0.0}, "optim.lr=0: no update"),
        ({f"{ACTOR}.grad_clip": 0}, "grad_clip=0: no update"),
        ({"trainer.critic_warmup": 41}, "critic_warmup=41: the policy is first updated after it"),
        (
            {"trainer.total_training_steps": None, "data.train_batch_size": 512},
            "0 steps: the data hold fewer than data.train_batch_size=512 rows",
        ),
    ],
)
def test_nothing_would_be_learned(subject, changes, detail):
    finding = check_learnable(subject(changes))
    assert finding.status == "error"
    assert detail in finding.detail
    assert finding.fix


def test_without_groups_one_response_is_enough(subject):
    changes = {f"{ROLLOUT}.n": 1, "algorithm.adv_estimator": "reinforce_plus_plus"}
    assert check_learnable(subject(changes)).status == "ok"


def test_epochs_give_steps_where_no_number_is_set(subject):
    changes = {"trainer.total_training_steps": None, "trainer.total_epochs": 2}
    assert check_learnable(subject(changes)).detail.startswith("6 steps of 64")
    absent = subject({**changes, "data.train_files": "/nowhere/train.parquet"})
    assert check_learnable(absent).detail.startswith("an unknown number of steps")


@pytest.mark.parametrize(("done", "status"), [("29", "ok"), ("30", "error"), ("", "ok")])
def test_a_run_that_is_finished_has_no_step_left(subject, tmp_path, done, status):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text(done)
    changes = {"trainer.default_local_dir": str(folder)}
    finding = check_learnable(subject(changes))
    assert finding.status == status
    assert ("step 30 of 30" in finding.detail) == (status == "error")
    assert check_learnable(subject({**changes, "trainer.resume_mode": "disable"})).status == "ok"


@pytest.mark.parametrize(
    ("changes", "name", "detail"),
    [
        ({f"{ACTOR}.ppo_mini_batch_size": 128}, "settings", "must divide data.train_batch_size=64"),
        ({"trainer.total_training_steps": 0}, "settings", "total_training_steps=0"),
        ({f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean"}, "algorithm", "permits token-mean only"),
        ({f"{ACTOR}.policy_loss.loss_mode": "kl_cov"}, "algorithm", "covariance"),
        ({"algorithm.hpo.alpha_min": 1.5}, "algorithm", "alpha_min"),
        ({f"{ROLLOUT}.dtype_": 1}, "verl's checks", "actor_rollout_ref.rollout"),
    ],
)
def test_illegal_settings_are_named(subject, changes, name, detail):
    finding = only(check_configuration(subject(changes)), name)
    assert finding.status == "error"
    assert detail in finding.detail


def test_a_legal_combination_that_is_not_what_its_name_promises(subject):
    changes = {f"{ACTOR}.policy_loss.loss_mode": "dro", f"{ACTOR}.loss_agg_mode": "token-mean"}
    finding = only(check_configuration(subject(changes)), "algorithm")
    assert finding.status == "warning"
    assert "quadratic" in finding.detail


def test_a_response_that_does_not_fit(subject):
    changes = {f"{ACTOR}.use_dynamic_bsz": True, f"{ACTOR}.ppo_max_token_len_per_gpu": 39}
    finding = check_lengths(subject(changes))
    assert (finding.status, finding.fix) == (
        "error",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=40 or more",
    )
    finding = check_lengths(subject({f"{ROLLOUT}.max_model_len": 32}))
    assert finding.status == "error"
    assert "max_model_len=32" in finding.detail
    assert check_lengths(subject({f"{ROLLOUT}.max_model_len": 40})).status == "ok"
