"""Two FSDP2 ranks and two rollout servers train as one of each does; their shards merge."""

import subprocess

import pytest
import torch
from checkpoint_states import saved_weights
from real_runs import BIN, SMALL, STEPS, read_metrics, start
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.timeout(900)

# Rounding of sums over ranks; a response that differed by one token would be far beyond it.
RELATIVE = 1e-4
# Of the order of the rounding itself: differences between rollout and actor.
ROUNDING = ("training/rollout_", "rollout_corr/")
# Tokens of a rank.
PER_RANK = ("global_seqlen/",)
# verl averages the token means of the ranks, whatever the number of tokens of each.
UNWEIGHTED = ("actor/ppo_kl", "actor/pg_clipfrac", "actor/log_ratio_bounded_fraction")
WALL_CLOCK = ("timing", "perf/", "actor/perf/")


@pytest.fixture(scope="module")
def two_ranks(trained, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    process = start(
        [
            *(BIN / "hpo-verl", "train", "countdown-tiny", *SMALL),
            *("hardware=cpu", "trainer.n_gpus_per_node=2", f"hydra.run.dir={folder}"),
        ],
        cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return folder


def test_losses_and_gradients_equal_those_of_one_rank(trained, two_ranks):
    one, two = read_metrics(trained.folder), read_metrics(two_ranks)
    assert one.keys() == two.keys() == set(range(STEPS + 1))
    for step, metrics in one.items():
        compared = {
            name: value
            for name, value in metrics.items()
            if not name.startswith(ROUNDING + PER_RANK + UNWEIGHTED + WALL_CLOCK)
        }
        if step:
            assert {"actor/pg_loss", "actor/loss", "actor/grad_norm"} <= compared.keys()
            assert {"hpo/alpha", "hpo/clipped_fraction_negative"} <= compared.keys()
        for name, value in compared.items():
            assert two[step][name] == pytest.approx(value, rel=RELATIVE, abs=1e-9), (step, name)
        assert two[step].get("training/rollout_probs_diff_max", 0) < 1e-5


def test_export_puts_the_ranks_shards_together(trained, two_ranks, tmp_path):
    checkpoint = two_ranks / "checkpoints" / f"global_step_{STEPS}" / "actor"
    assert (checkpoint / "model_world_size_2_rank_1.pt").is_file()
    finished = subprocess.run(
        [BIN / "hpo-verl", "export", two_ranks, "--out", tmp_path / "policy"],
        text=True,
        capture_output=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"{checkpoint} -> {tmp_path / 'policy'}\n"
    # Each rank holds one half of the rows, in float32.
    exported = load_file(tmp_path / "policy" / "model.safetensors")
    halves = [saved_weights(two_ranks, STEPS, rank, 2) for rank in range(2)]
    assert exported.keys() == halves[0].keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, torch.cat([half[name] for half in halves]).bfloat16()), name
    made = load_file(two_ranks / "policy" / "model.safetensors")
    assert all(torch.equal(made[name], tensor) for name, tensor in exported.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype="auto")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "policy")("1+2", return_tensors="pt")
    assert torch.isfinite(model(**tokens).logits).all()
