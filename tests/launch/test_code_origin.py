"""`train`, `prepare` and `submit` refuse code of others before any of it runs."""

import json

import pytest

from data_prep.policies.folder import check_no_code_in
from hpo_verl.checks.composition import compose_resolved
from hpo_verl.errors import CheckFailedError, DataError

ROLLOUT = "actor_rollout_ref.rollout"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("actor_rollout_ref.actor.policy_loss._target_=os.system", "_target_=os.system"),
        ("+hydra.callbacks.mine._target_=evil.Callback", "mine._target_=evil.Callback"),
        ("actor_rollout_ref.actor._target_=${seed}", r"_target_=\$\{seed\}"),
        ("actor_rollout_ref.actor.optim.optimizer_impl=evil", "optim.optimizer_impl=evil"),
        ("actor_rollout_ref.model.external_lib=evil", "model.external_lib=evil"),
        ("reward.custom_reward_function.path=pkg://evil", "path=pkg://evil"),
        ("reward.reward_manager.module.path=pkg://evil", "path=pkg://evil"),
        (f"{ROLLOUT}.agent.agent_loop_manager_class=evil.M", "manager_class=evil.M"),
        (
            "actor_rollout_ref.model.trust_remote_code=true",
            "model.trust_remote_code=True: would",
        ),
        ("data.trust_remote_code=true", "data.trust_remote_code=True"),
        ("critic.model.trust_remote_code=true", "critic.model.trust_remote_code=True"),
    ],
)
def test_a_recipe_with_code_of_others_does_not_compose(override, message):
    with pytest.raises(CheckFailedError, match=message):
        compose_resolved("countdown-tiny", [override])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", json.dumps({"auto_map": {"AutoModel": "m.M"}})),
        ("tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": ["t.T", None]}})),
        ("modeling_own.py", "pass"),
    ],
)
def test_a_model_that_brings_code_is_refused(tmp_path, name, text):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    check_no_code_in(tmp_path, "actor_rollout_ref.model.path")
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"actor_rollout_ref\.model\.path: .*" + name):
        check_no_code_in(tmp_path, "actor_rollout_ref.model.path")
