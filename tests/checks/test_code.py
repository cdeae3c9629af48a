"""Code of others that a configuration would run is found before anything runs it."""

import pytest
from omegaconf import OmegaConf

from hpo_verl.checks.code import check_code, check_targets


def test_what_verl_hydra_and_this_package_name_is_permitted():
    finding = check_targets(
        {
            "a": {"_target_": "verl.workers.config.FSDPActorConfig"},
            "b": [{"_target_": "hpo_verl.launch.preflight.Preflight"}],
            "hydra": {
                "launcher": {
                    "_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
                }
            },
        }
    )
    assert finding.status == "ok"
    assert finding.detail.startswith("3 ")


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "verlx.evil",
        "hpo_verl_evil.run",
        "builtins.exec",
        "hydra.utils.call",
        "hydra._internal.utils._locate",
        "omegaconf.OmegaConf.load",
        "${oc.env:TARGET}",
        "verl..os.system",
    ],
)
def test_any_other_target_is_named(target):
    finding = check_targets({"actor": [{"x": {"_target_": target}}]})
    assert finding.status == "error"
    assert f"actor.0.x._target_={target}" in finding.detail


def test_nothing_but_our_own_code(planned):
    assert check_code(OmegaConf.to_container(planned().config)).status == "ok"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("actor_rollout_ref.model.external_lib", "os"),
        ("actor_rollout_ref.model.external_lib", ["hpo_verl.core", "evil"]),
        ("reward.custom_reward_function.path", "pkg://evil.reward"),
        ("reward.custom_reward_function.path", "pkg://hpo_verl/../evil"),
        ("trainer.checkpoint_callback_class", "evil.Callback"),
        ("trainer.v1.sampler.custom_sampler.path", "pkg://evil"),
        ("actor_rollout_ref.rollout.agent.agent_loop_manager_class", "evil.Manager"),
    ],
)
def test_modules_of_others(planned, key, value):
    finding = check_code(OmegaConf.to_container(planned({key: value}).config))
    assert finding.status == "error"
    assert key in finding.detail
    assert "evil" in finding.detail or "=os" in finding.detail


def test_a_file_of_the_users_is_shown_and_a_missing_one_is_an_error(tmp_path):
    file = tmp_path / "mine.py"
    config = {"reward": {"custom_reward_function": {"path": str(file)}}}
    assert check_code(config).status == "error"
    assert "no such file" in check_code(config).detail
    file.write_text("raise SystemExit('this was executed')")
    finding = check_code(config)
    assert finding.status == "warning"
    assert f"reward.custom_reward_function.path={file} will be executed" in finding.detail


@pytest.mark.parametrize("key", ["actor_rollout_ref.model", "critic.model", "data"])
def test_trusting_the_models_code(planned, key):
    config = OmegaConf.to_container(planned({f"{key}.trust_remote_code": True}).config)
    finding = check_code(config)
    assert (finding.status, finding.fix) == ("error", f"{key}.trust_remote_code=false")
