"""The guard of updates around a stand-in for verl's engine; with verl's own: tests/contract."""

import copy
import dataclasses
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from policy_batches import actor_config
from verl.utils import tensordict_utils as tu
from verl.workers.config import PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from hpo_verl.errors import ConfigError, NotFiniteError
from hpo_verl.verl_plugin.engine import step_guard as plugin
from hpo_verl.verl_plugin.engine.replay import load

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def one_rank(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


class Parent:
    """verl's engine as far as needed: a model of one logit per token, and Adam."""

    scaler = None

    def __init__(self):
        self.module = torch.nn.ParameterDict(
            {"first": torch.zeros(4), "second": torch.ones(1), "unused": torch.ones(2)}
        )
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        self.factor = 1.0

    def optimizer_zero_grad(self):
        self.optimizer.zero_grad()

    def forward_backward_batch(self, data, loss_function, forward_only=False):
        weights = self.module["first"] * self.module["second"]
        log_probs = torch.nested.nested_tensor_from_jagged(
            -(weights.exp()).repeat(4), offsets=torch.arange(0, 17, 4)
        )
        loss, metrics = loss_function(model_output={"log_probs": log_probs}, data=data)
        (loss * self.factor).backward()
        return {"loss": [loss.item()], "metrics": metrics}

    def optimizer_step(self):
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0).item()
        if math.isfinite(norm):
            self.optimizer.step()
        return norm

    def train_batch(self, data, loss_function):
        self.optimizer_zero_grad()
        output = self.forward_backward_batch(data, loss_function)
        output["metrics"]["grad_norm"] = self.optimizer_step()
        return output

    def state(self):
        return copy.deepcopy((dict(self.module.items()), self.optimizer.state_dict()["state"]))


def unchanged(engine, before):
    weights, moments = engine.state()
    return all(torch.equal(before[0][name], weights[name]) for name in weights) and all(
        torch.equal(entries[key], moments[index][key])
        for index, entries in before[1].items()
        for key in entries
    )


def data(advantage=1.0, old=-1.0):
    """Four responses of three tokens after a prompt of one."""

    def nested(rows):
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    signs = (1, -1, 1, -1)
    return tu.get_tensordict(
        {
            "prompts": nested([torch.zeros(1, dtype=torch.long)] * 4),
            "responses": nested([torch.zeros(3, dtype=torch.long)] * 4),
            "response_mask": nested([torch.tensor([1, 1, 0])] * 4),
            "old_log_probs": nested([torch.full((3,), old) for _ in signs]),
            "advantages": nested([torch.full((3,), s * advantage) for s in signs]),
        },
        non_tensor_dict={"dp_size": 1, "batch_num_tokens": 8, "global_batch_size": 4},
    )


@pytest.fixture
def engine():
    made = plugin.guarded_engine(Parent)()
    made.train_batch(data(), guarded(Path("nowhere")))
    return made


def guarded(folder, limit=3, **settings):
    function = partial(named, config=actor_config(**settings))
    return plugin.GuardedLoss(function, plugin.StepGuardSettings(limit), folder)


def named(config, model_output, data, dp_group=None):
    return ppo_loss(config, model_output, data, dp_group)


def test_an_update_that_is_finite_is_verls_own(engine):
    before, plain = engine.state(), Parent()
    for _ in range(2):
        expected = plain.train_batch(data(), guarded(Path("nowhere")).function)
    output = engine.train_batch(data(), guarded(Path("nowhere")))
    assert not unchanged(engine, before)
    assert unchanged(engine, plain.state())
    counted = {plugin.NOT_FINITE: [0.0], plugin.NO_ADVANTAGE: [0.0]}
    for name, value in counted.items():
        assert output["metrics"].pop(name) == value
    assert output["metrics"]["grad_norm"] == expected["metrics"]["grad_norm"]
    assert set(output["metrics"]) == set(expected["metrics"])


def test_a_masked_value_that_is_not_finite_is_no_fault(engine, tmp_path):
    batch = data()
    batch["advantages"].values()[2] = NAN
    output = engine.train_batch(
        batch, guarded(tmp_path, policy_loss=PolicyLossConfig(loss_mode="hpo"))
    )
    assert output["metrics"][plugin.NOT_FINITE] == [0.0]


@pytest.mark.parametrize("name", ["hpo", "vanilla", "gspo", "sapo"])
@pytest.mark.parametrize("field", ["advantages", "old_log_probs"])
def test_nothing_changes_where_an_input_is_not_finite(engine, tmp_path, name, field):
    before, batch = engine.state(), data()
    batch[field].values()[4] = INF
    mode = "token-mean" if name in ("hpo", "vanilla") else "seq-mean-token-mean"
    output = engine.train_batch(
        batch, guarded(tmp_path, mode=mode, policy_loss=PolicyLossConfig(loss_mode=name))
    )
    assert unchanged(engine, before)
    assert all(p.grad is None for p in engine.module.values())
    assert output["loss"] == [0.0]
    assert output["metrics"] == {plugin.NOT_FINITE: [1.0], plugin.NO_ADVANTAGE: [0.0]}
    (path,) = tmp_path.glob("not_finite_*")
    shown = field.removesuffix("s") if field == "old_log_probs" else field
    assert load(path)["found"].startswith(f"micro-batch 0: {shown}: 1 of 8 live values")


def test_a_gradient_that_is_not_finite_is_named_by_its_parameter(engine, tmp_path):
    before, engine.factor = engine.state(), NAN
    engine.train_batch(data(), guarded(tmp_path))
    assert unchanged(engine, before)
    (path,) = tmp_path.glob("not_finite_*")
    # Two of the three tokens are live, and the last weight is no token's.
    assert load(path)["found"] == (
        "gradient of first: 2 of 4 values are not finite; so in 2 of 2 parameters, the last second"
    )


def test_a_norm_that_overflows_is_told_apart(engine, tmp_path, monkeypatch):
    before = engine.state()
    monkeypatch.setattr(plugin, "gradient_norm", lambda module: INF)
    engine.train_batch(data(), guarded(tmp_path))
    assert unchanged(engine, before)
    (path,) = tmp_path.glob("not_finite_*")
    assert load(path)["found"] == "gradient: finite, but its norm is not"


def test_a_norm_over_all_ranks_that_is_not_finite_counts_too(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(Parent, "optimizer_step", lambda self: INF)
    output = engine.train_batch(data(), guarded(tmp_path))
    assert output["metrics"] == {plugin.NOT_FINITE: [1.0], plugin.NO_ADVANTAGE: [0.0]}
    (path,) = tmp_path.glob("not_finite_*")
    assert load(path)["found"] == "gradient: finite on each rank, but the norm over all is not"


def test_with_a_scaler_such_gradients_are_its_own_business(engine, tmp_path):
    engine.scaler, engine.factor = object(), INF
    output = engine.train_batch(data(), guarded(tmp_path))
    assert output["metrics"][plugin.NOT_FINITE] == [0.0]
    batch = data()
    batch["advantages"].values()[0] = NAN
    output = engine.train_batch(batch, guarded(tmp_path))
    assert output["metrics"][plugin.NOT_FINITE] == [1.0]


def test_without_an_advantage_momentum_does_not_move_the_weights(engine, tmp_path):
    before = engine.state()
    output = engine.train_batch(data(advantage=0.0), guarded(tmp_path))
    assert unchanged(engine, before)
    assert output["metrics"][plugin.NO_ADVANTAGE] == [1.0]
    assert output["metrics"]["grad_norm"] == 0.0
    # verl alone moves them.
    engine.train_batch(data(advantage=0.0), guarded(tmp_path).function)
    assert not unchanged(engine, before)


def test_the_skip_can_be_turned_off_and_is_still_counted(engine, tmp_path):
    loss = guarded(tmp_path)
    settings = plugin.StepGuardSettings(skip_without_advantage=False)
    alone = copy.deepcopy(engine)
    output = engine.train_batch(data(advantage=0.0), dataclasses.replace(loss, settings=settings))
    assert output["metrics"][plugin.NO_ADVANTAGE] == [1.0]
    alone.train_batch(data(advantage=0.0), loss.function)
    assert unchanged(engine, alone.state())
    before = engine.state()
    engine.train_batch(data(advantage=NAN), dataclasses.replace(loss, settings=settings))
    assert unchanged(engine, before)


def test_advantages_whose_gradient_is_clipped_away_are_an_update(engine, tmp_path):
    """verl's algorithm makes a step there, so it is made."""
    batch = data(old=-60.0)
    positive = batch["advantages"].values().abs()
    batch["advantages"].values().copy_(positive)
    before = engine.state()
    output = engine.train_batch(batch, guarded(tmp_path))
    assert output["metrics"]["grad_norm"] == 0.0
    assert output["metrics"][plugin.NO_ADVANTAGE] == [0.0]
    assert not unchanged(engine, before)


def test_the_run_ends_after_the_set_number_in_a_row(engine, tmp_path):
    bad = data(advantage=NAN)
    for _ in range(2):
        engine.train_batch(bad, guarded(tmp_path))
    engine.train_batch(data(), guarded(tmp_path))
    for _ in range(2):
        engine.train_batch(bad, guarded(tmp_path))
    before = engine.state()
    with pytest.raises(NotFiniteError, match=r"^3 updates in a row .*advantages: 8 of 8") as ended:
        engine.train_batch(bad, guarded(tmp_path))
    assert unchanged(engine, before)
    assert f"{tmp_path}/not_finite_0005_rank0.pt" in str(ended.value)
    assert len(list(tmp_path.glob("not_finite_*"))) == 5


def test_one_is_enough_where_the_setting_says_so(engine, tmp_path):
    with pytest.raises(NotFiniteError, match="1 updates in a row"):
        engine.train_batch(data(advantage=NAN), guarded(tmp_path, limit=1))


def test_a_folder_that_takes_no_file_does_not_hide_the_fault(engine, tmp_path, capfd):
    folder = tmp_path / "file"
    folder.write_text("")
    output = engine.train_batch(data(advantage=NAN), guarded(folder))
    assert output["metrics"][plugin.NOT_FINITE] == [1.0]
    printed = capfd.readouterr().out
    assert "could not be written" in printed
    assert "update 1 in a row not finite: micro-batch 0: advantages: 8 of 8" in printed


def test_not_more_files_than_a_limit(engine, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(plugin, "FILES_KEPT", 2)
    for _ in range(4):
        engine.train_batch(data(advantage=NAN), guarded(tmp_path, limit=9))
    assert len(list(tmp_path.glob("not_finite_*"))) == 2
    assert capfd.readouterr().out.count("mini-batch: not kept") == 2


def test_other_loss_functions_and_engines_are_left_alone(engine, tmp_path):
    loss = guarded(tmp_path)
    plain = engine.train_batch(data(), loss.function)
    assert plugin.NOT_FINITE not in plain["metrics"]
    other = Parent().train_batch(data(), loss)
    assert set(other["metrics"]) == set(plain["metrics"])


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ({"max_not_finite_in_a_row": 0}, r"a_row = 0: must be an integer of at least 1"),
        ({"max_not_finite_in_a_row": 1.5}, "a_row = 1.5: must be an integer"),
        ({"max_not_finite_in_a_row": True}, "a_row = True: must be an integer of at least 1"),
        ({"skip_without_advantage": 1}, "advantage = 1: must be true or false"),
        ({"max_in_a_row": 2}, r"trainer\.guard\.max_in_a_row = 2: unknown setting"),
        (3, "must be a mapping"),
    ],
)
def test_settings_are_checked(guard, message):
    with pytest.raises(ConfigError, match=message):
        plugin.step_guard_settings(OmegaConf.create({"trainer": {"guard": guard}}))


def test_the_default_is_three_in_a_row():
    config = OmegaConf.create({"trainer": {}})
    assert plugin.step_guard_settings(config) == plugin.StepGuardSettings(3)


def test_shares_become_numbers():
    metrics = {plugin.NOT_FINITE: 1 / 3, plugin.NO_ADVANTAGE: 0.0, "other": 1.0}
    assert plugin.pop_counts(metrics, 12) == {
        "hpo/updates_not_finite": 4,
        "hpo/updates_without_advantage": 0,
    }
    assert metrics == {"other": 1.0}
    assert plugin.pop_counts(metrics, 12) == {}
