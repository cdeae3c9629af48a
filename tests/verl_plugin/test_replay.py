"""A mini-batch that was not finite: what is recorded, its file, and its evaluation."""

import pickle
import stat
import zipfile

import pytest
import torch
from policy_batches import BOTH, actor_config, counts_of, evaluate, make_batch, provided_to
from typer.testing import CliRunner
from verl.workers.config import PolicyLossConfig

from hpo_verl.algorithms.registry import OUR_LOSSES
from hpo_verl.cli import app
from hpo_verl.errors import DataError
from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.engine import replay as plugin
from hpo_verl.verl_plugin.engine.replay import load, report, save

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
    provided = provided_to(name, config, batch) if name in OUR_LOSSES else {}
    fields = {key: value for key, value in provided.items() if isinstance(value, torch.Tensor)}
    tensors = {**batch, **fields}
    counts = counts_of(batch["response_mask"])
    counts.pop("loss_scale_factor")
    with extras.provide(**provided):
        settings_of_loss = plugin.loss_settings_of(config)
    pieces = [
        dict(zip(tensors, rows, strict=True))
        for rows in zip(*(tensor.chunk(parts) for tensor in tensors.values()), strict=True)
    ]
    made = {**settings_of_loss, "counts": counts, "found": "seen", "micro_batches": pieces}
    return made, config


@pytest.mark.parametrize(("name", "mode"), [*BOTH.args[1], *VERLS])
@pytest.mark.parametrize("parts", [1, 4])
def test_a_file_gives_the_loss_and_gradient_of_the_actor_again(tmp_path, name, mode, parts):
    made, config = recorded(name, mode, parts=parts)
    save(tmp_path / "batch.pt", made)
    batch = load(tmp_path / "batch.pt")
    assert len(batch["micro_batches"]) == parts
    losses, largest, found = zip(
        *(plugin.evaluate(tensors, batch) for tensors in batch["micro_batches"]), strict=True
    )
    config.global_batch_info.update(counts_of(make_batch()["response_mask"]))
    loss, gradient, _ = evaluate(name, make_batch(), mode, config)
    assert sum(losses) == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
    assert max(largest) == pytest.approx(gradient.abs().max().item(), rel=1e-5)
    assert found == (None,) * parts


def test_entropy_and_kl_terms_are_part_of_the_loss():
    made, _ = recorded(entropy_coeff=0.5, use_kl_loss=True, kl_loss_coef=2.0, kl_loss_type="kl")
    (tensors,) = made["micro_batches"]
    plain, _, _ = plugin.evaluate(tensors, recorded()[0])
    tensors["entropy"] = torch.full_like(tensors["log_prob"], 0.25)
    tensors["ref_log_prob"] = tensors["log_prob"] - 0.125
    # Means over tokens: 0.5 x 0.25 of entropy off, 2 x 0.125 of KL on.
    loss, _, _ = plugin.evaluate(tensors, made)
    assert loss == pytest.approx(plain - 0.125 + 0.25, rel=1e-5)


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
    (tensors,) = made["micro_batches"]
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
    path = tmp_path / "run" / "batch.pt"
    save(path, made)
    save(path, made)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = load(path)
    theirs_and_ours = zip(made.pop("micro_batches"), again.pop("micro_batches"), strict=True)
    assert again == made
    for theirs, ours in theirs_and_ours:
        assert set(ours) == set(theirs)
        for name, tensor in theirs.items():
            assert torch.equal(ours[name].nan_to_num(7), tensor.nan_to_num(7)), name


def write(path, tensors=None, actor=None, policy_loss=None, **changes):
    """A file of a batch that is finite, with something changed."""
    made, _ = recorded("hpo")
    made["actor"] |= {"clip_ratio_low": None, "clip_ratio_high": None, **(actor or {})}
    made["actor"]["policy_loss"] |= policy_loss or {}
    made["micro_batches"][0] |= tensors or {}
    torch.save(made | changes, path)
    return path


WIDE = torch.zeros(8, 12)
BAD = {
    "a tensor that is none": ({"tensors": {"\x1b": 3}}, r"u001b: must be a tensor like"),
    "another shape": ({"tensors": {"log_prob": torch.zeros(8, 11)}}, "log_prob: must be a tensor"),
    "three dimensions": ({"tensors": {"log_prob": torch.zeros(8, 12, 1)}}, "log_prob: must be"),
    "whole numbers": ({"tensors": {"log_prob": WIDE.int()}}, "only Tensors of floating point"),
    "a mask of numbers": ({"tensors": {"response_mask": WIDE}}, "cannot be evaluated"),
    "a list": ({"tensors": {"advantages": [[0.0] * 12] * 8}}, "advantages: must be a tensor"),
    "no data": ({"tensors": {"advantages": WIDE.to("meta")}}, "a.pt"),
    "a parameter": ({"tensors": {"advantages": torch.nn.Parameter(WIDE)}}, "must be a tensor"),
    "sparse values": ({"tensors": {"advantages": WIDE.to_sparse()}}, "is no file of an update"),
    "no advantages": ({"micro_batches": [{"response_mask": WIDE > 0}]}, "cannot be evaluated"),
    "no rows": (
        {"micro_batches": [{k: torch.zeros(0, 3) for k in ("log_prob", "response_mask")}]},
        "cannot be evaluated",
    ),
    "a mode that is none": ({"actor": {"loss_agg_mode": "sum"}}, "Invalid loss_agg_mode: sum"),
    "a stranger's setting": ({"actor": {"command": "x"}}, "unexpected keyword argument 'command'"),
    "no mapping": ({"counts": 3}, "cannot be evaluated"),
    "no counts": ({"counts": {}}, "dp_size"),
    "a count of text": ({"counts": dict.fromkeys(plugin.COUNTS, "x")}, "cannot be evaluated"),
    "sums of text": ({"policy_loss": {"loss_mode": "bapo"}, "mini_batch": ["a"]}, "missing"),
    "a text for a number": ({"actor": {"clip_ratio": "0.2\x1b[2J"}}, "must be"),
    "a mapping for a number": ({"actor": {"clip_ratio": {"a": 1}}}, "must be"),
    "an unknown loss": ({"policy_loss": {"loss_mode": "mine\x1b[2J"}}, r"mine\\u001b"),
    "a loss out of range": ({"policy_loss": {"loss_mode": "mhpo", "c": -1.0}}, "c = -1.0"),
}


def assert_refused(path, message):
    with pytest.raises(DataError, match=message) as caught:
        report(path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("case", BAD)
def test_content_that_fits_no_loss_is_one_line(tmp_path, case):
    changes, message = BAD[case]
    assert_refused(write(tmp_path / "a.pt", **changes), message)


def compressed(path):
    """The same file with its entries deflated, and its pickle grown to 10 MB of no-operations."""
    with zipfile.ZipFile(path) as plain:
        entries = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            grow = name.endswith("data.pkl")
            archive.writestr(
                name, content[:2] + b"N0" * 5_000_000 + content[2:] if grow else content
            )


class Payload:
    def __reduce__(self):
        return (open, ("executed", "w"))


DAMAGES = {
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Payload())), "not a zip file"),
    "a class": (lambda path: torch.save(Payload(), path), "Weights only load failed"),
    "a text": (lambda path: path.write_text("{}"), "not a zip file"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-50]), "is no file of an update"),
    "cut inside": (
        lambda path: path.write_bytes(path.read_bytes()[:500] + path.read_bytes()[900:]),
        "is no file of an update",
    ),
    "a list": (lambda path: torch.save([1], path), "is no file of an update"),
    "no settings": (lambda path: torch.save({"micro_batches": []}, path), "cannot be evaluated"),
    "a text for tensors": (lambda path: write(path, micro_batches=["a"]), "is no file"),
    "compressed": (compressed, "it is compressed"),
    "absent": (lambda path: path.unlink(), "no such file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "no such file"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_other_files_are_refused_and_nothing_of_them_runs(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    damage, message = DAMAGES[case]
    path = write(tmp_path / "a.pt")
    report(path)
    damage(path)
    assert_refused(path, message)
    assert not (tmp_path / "executed").exists()


def test_a_file_may_not_hold_more_than_its_size(tmp_path, monkeypatch):
    path = write(tmp_path / "a.pt")
    (plain,) = load(path)["micro_batches"]
    # Many micro-batches of the same tensors take a few bytes each.
    write(path, micro_batches=[plain] * 1000)
    assert_refused(path, "its tensors are larger than the file")
    monkeypatch.setattr(plugin, "MAX_BYTES", 1000)
    assert_refused(write(path), "bytes; at most 1000 are read")


# ---------------------------------------------------------------- command


def test_the_command_shows_each_micro_batch_and_what_came_first(tmp_path):
    batch = make_batch()
    batch["advantages"][6, 0] = INF
    made, _ = recorded("hpo", batch=batch, parts=2)
    made["found"] = "advantages \x1b[2J" + "x" * 5000
    path = tmp_path / "a.pt"
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
    path = write(tmp_path / "a.pt")
    lines = CliRunner().invoke(app, ["replay", str(path)]).output.splitlines()
    assert lines[3].startswith("first not finite: nothing that the loss reads or returns")


def test_the_command_refuses_another_file(tmp_path):
    result = CliRunner().invoke(app, ["replay", str(tmp_path / "none")])
    assert isinstance(result.exception, DataError)


def test_a_class_that_a_file_names_is_not_made(tmp_path):
    spoil = {"_target_": "os.getcwd"}
    plain, spoiled = (
        write(tmp_path / "a.pt"),
        write(tmp_path / "b.pt", actor=spoil, policy_loss=spoil),
    )
    assert report(spoiled)[1:] == report(plain)[1:]
