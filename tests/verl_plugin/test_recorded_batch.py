"""A mini-batch that was not finite: what is recorded, its file, and its evaluation."""

import json
import pickle
import stat

import pytest
import torch
from policy_batches import BOTH, actor_config, counts_of, evaluate, make_batch, supplied
from safetensors.torch import save_file
from typer.testing import CliRunner
from verl.workers.config import PolicyLossConfig

from hpo_verl.cli import app
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.verl_plugin.engine import batch_file
from hpo_verl.verl_plugin.engine import recorded_batch as plugin
from hpo_verl.verl_plugin.engine.batch_file import load, save

VERLS = [
    ("vanilla", "token-mean"),
    ("gspo", "seq-mean-token-mean"),
    ("sapo", "seq-mean-token-mean"),
]
NAN, INF = float("nan"), float("inf")


def recorded(name="vanilla", mode="token-mean", batch=None, parts=1, **settings):
    """A batch as the guard records it, split into micro-batches."""
    batch = batch or make_batch()
    config = actor_config(mode, PolicyLossConfig(loss_mode=name), **settings)
    config = supplied(name, config, batch)
    tensors = dict(batch)
    if name == "hapo":
        tensors["entropy_deviation"] = config.policy_loss.batch_info.pop("entropy_deviation")
    counts = counts_of(batch["response_mask"])
    counts.pop("loss_scale_factor")
    info = {**plugin.loss_settings_of(config), "counts": counts, "found": "what was seen"}
    pieces = [
        dict(zip(tensors, rows, strict=True))
        for rows in zip(*(tensor.chunk(parts) for tensor in tensors.values()), strict=True)
    ]
    return plugin.RecordedBatch(info, pieces), config


@pytest.mark.parametrize(("name", "mode"), [*BOTH.args[1], *VERLS])
@pytest.mark.parametrize("parts", [1, 4])
def test_a_file_gives_the_loss_and_gradient_of_the_actor_again(tmp_path, name, mode, parts):
    made, config = recorded(name, mode, parts=parts)
    save(tmp_path / "batch.safetensors", made)
    batch = load(tmp_path / "batch.safetensors")
    assert len(batch.micro_batches) == parts
    results = [plugin.evaluate(tensors, batch.info) for tensors in batch.micro_batches]
    config.global_batch_info.update(counts_of(make_batch()["response_mask"]))
    loss, gradient, _ = evaluate(name, make_batch(), mode, config)
    assert sum(result.loss for result in results) == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
    largest = max(result.largest for result in results)
    assert largest == pytest.approx(gradient.abs().max().item(), rel=1e-5)
    assert [result.found for result in results] == [None] * parts


def test_entropy_and_kl_terms_are_part_of_the_loss():
    made, _ = recorded(entropy_coeff=0.5, use_kl_loss=True, kl_loss_coef=2.0, kl_loss_type="kl")
    (tensors,) = made.micro_batches
    plain = plugin.evaluate(tensors, recorded()[0].info).loss
    tensors["entropy"] = torch.full_like(tensors["log_prob"], 0.25)
    tensors["ref_log_prob"] = tensors["log_prob"] - 0.125
    # Means over tokens: 0.5 x 0.25 of entropy off, 2 x 0.125 of KL on.
    result = plugin.evaluate(tensors, made.info)
    assert result.loss == pytest.approx(plain - 0.125 + 0.25, rel=1e-5)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["log_prob", "old_log_prob", "advantages"])
def test_the_first_tensor_is_named_with_its_micro_batch(name, value):
    batch = make_batch()
    batch[name][5, 0] = value
    made, _ = recorded(batch=batch, parts=2)
    shown = plugin.first_found(made)
    assert shown.startswith(f"micro-batch 1: {name}: 1 of ")
    assert shown.endswith(f"the first at (1, 0) ({value})")


def test_of_several_tensors_the_one_that_is_made_first_is_named():
    made, _ = recorded()
    (tensors,) = made.micro_batches
    for name in ("log_prob", "advantages", "old_log_prob"):
        tensors[name][0, 0] = NAN
        assert plugin.first_not_finite(tensors).startswith(name)


def test_masked_values_that_are_not_finite_do_not_count():
    batch = make_batch()
    batch["log_prob"][~batch["response_mask"]] = NAN
    batch["advantages"][~batch["response_mask"]] = INF
    made, _ = recorded("hpo", batch=batch)
    assert plugin.first_found(made) is None


def test_a_loss_or_gradient_that_overflows_is_named():
    batch = make_batch()
    batch["advantages"] = batch["advantages"].sign() * 3e38
    made, _ = recorded(batch=batch)
    assert plugin.first_found(made) in (f"micro-batch 0: loss: {v}" for v in (INF, -INF, NAN))

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, log_prob):
            return log_prob.sum()

        @staticmethod
        def backward(ctx, gradient):
            return torch.full((8, 12), INF)

    from verl.trainer.ppo import core_algos

    core_algos.POLICY_LOSS_REGISTRY["steep"] = lambda log_prob, **_: (Steep.apply(log_prob), {})
    try:
        made, _ = recorded("steep")
        found = "micro-batch 0: gradient of log_prob: 96 of 96 live values are not finite"
        assert plugin.first_found(made).startswith(found)
    finally:
        del core_algos.POLICY_LOSS_REGISTRY["steep"]


# ---------------------------------------------------------------- file


def test_a_file_holds_every_bit_and_is_its_owners_alone(tmp_path):
    batch = make_batch()
    batch["log_prob"][0, 0] = NAN
    made, _ = recorded(batch=batch, parts=2)
    made.micro_batches[1]["responses"] = torch.full((4, 12), -1)
    path = tmp_path / "run" / "batch.safetensors"
    save(path, made)
    save(path, made)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = load(path)
    assert again.info == made.info
    for ours, theirs in zip(again.micro_batches, made.micro_batches, strict=True):
        assert set(ours) == set(theirs)
        for name, tensor in theirs.items():
            assert torch.equal(ours[name].nan_to_num(7), tensor.nan_to_num(7)), name


def write(path, tensors=None, info=None, header=None):
    made, _ = recorded()
    (plain,) = made.micro_batches
    plain = {f"0/{name}": tensor for name, tensor in plain.items()} | (tensors or {})
    plain = {name: tensor for name, tensor in plain.items() if tensor is not None}
    usual = {"format": batch_file.FORMAT, "info": json.dumps(made.info | (info or {}))}
    save_file(plain, path, usual | (header or {}))
    return path


BAD_TENSORS = {
    "a stranger's name": ({"0/weights": torch.zeros(8, 12)}, "tensor '0/weights': unknown"),
    "no micro-batch": ({"log_prob": torch.zeros(8, 12)}, "tensor 'log_prob': unknown"),
    "a gap": ({"2/log_prob": torch.zeros(8, 12)}, "micro-batch 2: lacks"),
    "another shape": ({"0/log_prob": torch.zeros(8, 11)}, "micro-batch 0: shapes"),
    "three dimensions": ({"0/log_prob": torch.zeros(8, 12, 1)}, r"\(8, 12, 1\)"),
    "whole numbers": ({"0/advantages": torch.zeros(8, 12, dtype=torch.int32)}, "torch.int32"),
    "a mask of numbers": ({"0/response_mask": torch.ones(8, 12)}, "torch.float32"),
    "no advantages": ({"0/advantages": None}, "micro-batch 0: lacks advantages"),
}
BAD_INFO = {
    "a class": ({"actor": {"_target_": "os.system"}}, r"actor._target_ = 'os.system': no setting"),
    "a class of the loss": ({"policy_loss": {"loss_mode": "vanilla", "_target_": "x"}}, "_target_"),
    "a nested setting": ({"actor": {"clip_ratio": {"a": 1}}}, "no setting of this loss"),
    "a text for a number": ({"actor": {"clip_ratio": "0.2"}}, "no setting of this loss"),
    "an unknown loss": ({"policy_loss": {"loss_mode": "mine"}}, "loss_mode = 'mine': unknown"),
    "a mode that is none": ({"actor": {"loss_agg_mode": "sum"}}, "Invalid loss_agg_mode: sum"),
    "no mapping": ({"actor": 3}, "actor: must be a mapping"),
    "a count of 0": ({"counts": {"dp_size": 0}}, "counts.dp_size = 0"),
    "no counts": ({"counts": {}}, "dp_size"),
    "a bound of text": ({"clip_bounds": ["a", "b", "c"]}, "must be three numbers"),
    "a number found": ({"found": 3}, "found: must be a text"),
    "a loss out of range": ({"policy_loss": {"loss_mode": "mhpo", "c": -1.0}}, "c = -1.0"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_fit_no_batch_are_refused(tmp_path, case):
    tensors, message = BAD_TENSORS[case]
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("case", BAD_INFO)
def test_settings_that_fit_no_loss_are_refused(tmp_path, case):
    info, message = BAD_INFO[case]
    path = write(tmp_path / "a.safetensors", info=info)
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))


class Payload:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize("kind", ["pickle", "torch", "json", "truncated", "format", "info", "none"])
def test_other_files_are_refused_and_nothing_of_them_runs(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.safetensors")
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload()))
    elif kind == "torch":
        torch.save(Payload(), path)
    elif kind == "json":
        path.write_text("{}")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif kind == "format":
        write(path, header={"format": "another"})
    elif kind == "info":
        write(path, header={"info": "[" * 100_000})
    else:
        path.unlink()
    with pytest.raises(DataError, match=str(path)):
        load(path)
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------- command


def test_the_command_shows_each_micro_batch_and_what_came_first(tmp_path):
    batch = make_batch()
    batch["advantages"][6, 0] = INF
    made, _ = recorded("hpo", batch=batch, parts=2)
    made.info["found"] = "advantages \x1b[2J" + "x" * 5000
    path = tmp_path / "a.safetensors"
    save(path, made)
    result = CliRunner().invoke(app, ["replay", str(path)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == f"{path}: loss hpo, token-mean"
    assert lines[1].startswith("recorded: advantages \\u001b[2Jxx")
    assert len(lines[1]) < 2100
    assert lines[2].startswith("micro-batch 0 [4 x 12]: loss ")
    assert "micro-batch 1 [4 x 12]: advantages: 1 of" in lines[3]
    assert lines[4].startswith("first not finite: micro-batch 1: advantages: 1 of")
    assert lines[5].startswith("not evaluated here: the model's forward and backward pass")


def test_the_command_says_where_a_finite_loss_leaves_the_fault(tmp_path):
    path = write(tmp_path / "a.safetensors")
    lines = CliRunner().invoke(app, ["replay", str(path)]).output.splitlines()
    assert lines[3].startswith("first not finite: nothing that the loss reads or returns")


def test_the_command_refuses_another_file(tmp_path):
    result = CliRunner().invoke(app, ["replay", str(tmp_path / "none")])
    assert isinstance(result.exception, DataError)
