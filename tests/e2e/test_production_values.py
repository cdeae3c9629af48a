"""A real run on the CPU with the values of a GPU run, as far as a CPU can have them.

What `hardware/cpu.yaml` replaces for speed or repeatability goes back to what verl or
`backend/fsdp2_vllm` says: packed sequences through flash attention (its stand-in), several
micro-batches of dynamic size, DataLoader workers, verl's own manager of agent loops, more than
one worker of each kind, validation after every step. The first start keeps what makes responses
repeat, and is compared with the run of `trained`; the second goes on from its checkpoint with
the rest: verl's own agent loop, bfloat16, no determinism of the actor.
"""

import json
import math
import os

import pytest
from flash_attention import with_flash_attention
from omegaconf import OmegaConf
from real_runs import STEPS, read_metrics, rollouts, run_to_end

from hpo_verl.config.recipes import compose_recipe, without_hydra
from hpo_verl.runs import checkpoints

pytestmark = pytest.mark.timeout(1200)

ROLLOUT, ACTOR = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
PRODUCTION = [
    "data.dataloader_num_workers=8",
    # verl has eight of these; on two cores they take minutes to start.
    "reward.num_workers=2",
    "~trainer.v1.sampler.poll_interval",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=2",
    "actor_rollout_ref.model.use_remove_padding=true",
    "~actor_rollout_ref.model.override_config.attn_implementation",
    f"{ACTOR}.entropy_from_logits_with_chunking=true",
    f"{ROLLOUT}.max_num_seqs=1024",
    f"{ROLLOUT}.agent.num_workers=2",
    f"~{ROLLOUT}.agent.agent_loop_manager_class",
]
NOT_REPEATABLE = [
    f"{ROLLOUT}.agent.default_agent_loop=single_turn_agent",
    f"{ACTOR}.fsdp_config.full_determinism=false",
    f"~{ACTOR}.fsdp_config.mixed_precision",
]
# A sequence has at most 40 tokens, an update 64 of them.
TOKENS = 512
# Rounding of other shapes and orders; a response that differed by one token would be far beyond.
RELATIVE = 1e-5
# Of the order of the rounding itself: differences between rollout and actor.
ROUNDING = ("training/rollout_", "rollout_corr/")
# verl averages the token means of the micro-batches, whatever the number of tokens of each.
UNWEIGHTED = ("actor/ppo_kl", "actor/pg_clipfrac", "actor/log_ratio_bounded_fraction")
WALL_CLOCK = ("timing", "perf/", "actor/perf/")
VALIDATION = "val-core/countdown/acc/mean@1"
SAMPLES = 8
CPU_ONLY = {
    "trainer.device",
    "reward.num_workers",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units",
    f"{ROLLOUT}.agent.num_workers",
    f"{ACTOR}.fsdp_config.use_torch_compile",
    f"{ROLLOUT}.name",
    f"{ROLLOUT}.gpu_memory_utilization",
    "ray_kwargs.ray_init",
    # verl repeats the rollout's values here; nothing in a run reads them.
    "distillation.teacher_models",
}
"""Settings and sections that stay those of a CPU; all others are in the run below."""


def settings(*overrides):
    """Every value of a recipe by its key."""
    config = without_hydra(compose_recipe("countdown-tiny", list(overrides)))

    def flat(node, path):
        if not isinstance(node, dict):
            yield ".".join(path), node
            return
        for key, value in node.items():
            yield from flat(value, (*path, str(key)))

    return dict(flat(OmegaConf.to_container(config, resolve=True), ()))


def test_the_runs_below_have_all_values_of_a_gpu_but_those_listed():
    ours = settings("hardware=cpu", *PRODUCTION, *NOT_REPEATABLE)
    gpu = settings("hardware=1gpu")
    vllm = settings("hardware=1gpu", "+backend@_global_=vllm_cpu")
    different = {key for key in ours.keys() | gpu.keys() if ours.get(key) != gpu.get(key)}
    of_vllm = {key for key in vllm if vllm[key] != gpu.get(key)}
    left = {
        key
        for key in different - of_vllm
        if key not in CPU_ONLY and not any(key.startswith(f"{section}.") for section in CPU_ONLY)
    }
    assert left == set()


def dumped(folder, step):
    """What verl wrote of a step's responses, in the order of their names."""
    lines = (rollouts(folder) / f"{step}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def train(cache, folder, *arguments):
    """Start the run, which must succeed, and return its metrics and output."""
    output = run_to_end(
        cache,
        folder,
        *(*PRODUCTION, "trainer.save_freq=1", "trainer.test_freq=1"),
        f"{ACTOR}.ppo_max_token_len_per_gpu={TOKENS}",
        *(f"trainer.rollout_data_dir={rollouts(folder)}", *arguments),
    )
    return read_metrics(folder), output


@pytest.fixture(scope="module")
def starts(trained, cache, tmp_path_factory):
    """Folder of the run, and metrics and output of its first and its second start."""
    folder = tmp_path_factory.mktemp("production") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in with_flash_attention(os.environ).items():
            patch.setenv(name, value)
        first = train(cache, folder, f"trainer.total_training_steps={STEPS - 1}")
        second = train(cache, folder, *NOT_REPEATABLE, "--resume")
    return folder, first, second


@pytest.mark.slow
def test_both_starts_end_well_and_validate_before_between_and_last(starts):
    folder, (first, _), (metrics, output) = starts
    assert f"success on held-out prompts: {metrics[0][VALIDATION]:.1%} before" in output
    assert metrics.keys() == set(range(STEPS + 1))
    assert {step: metrics[step] for step in first} == first
    for step, values in metrics.items():
        assert 0 <= values[VALIDATION] <= 1, step
        assert all(math.isfinite(value) for value in values.values()), step
    for step in range(1, STEPS + 1):
        assert metrics[step]["hpo/updates_not_finite"] == 0
        assert metrics[step]["actor/grad_norm"] > 0
    chosen = checkpoints.choose(folder / "checkpoints")
    assert (chosen.step, chosen.left_out) == (STEPS, ())


@pytest.mark.slow
def test_responses_losses_and_gradients_are_those_of_the_recipe(trained, starts):
    """Responses bit for bit; sums of the actor to the rounding of another order."""
    folder, (first, _), _ = starts
    expected = read_metrics(trained.folder)
    for step in range(1, STEPS):
        assert dumped(folder, step) == dumped(trained.folder, step)
    for step, values in first.items():
        compared = {
            name: value
            for name, value in expected[step].items()
            if not name.startswith(ROUNDING + UNWEIGHTED + WALL_CLOCK)
        }
        if step:
            assert {"actor/pg_loss", "actor/entropy", "actor/grad_norm"} <= compared.keys()
            assert {"critic/advantages/max", "hpo/alpha", "hpo/ratio_negative"} <= compared.keys()
        for name, value in compared.items():
            assert values[name] == pytest.approx(value, rel=RELATIVE, abs=1e-9), (step, name)
        assert values.get("training/rollout_probs_diff_max", 0) < 1e-5


@pytest.mark.slow
def test_the_second_start_goes_on_with_the_next_prompts(trained, starts):
    folder, _, (_, output) = starts
    assert f"step {STEPS}/{STEPS}" in output
    got, expected = dumped(folder, STEPS), dumped(trained.folder, STEPS)
    assert [row["input"] for row in got] == [row["input"] for row in expected]
    # verl's own agent loop names its requests at random.
    assert [row["output"] for row in got] != [row["output"] for row in expected]


@pytest.mark.slow
def test_the_statistics_follow_from_the_dumped_rewards(starts):
    folder, _, (metrics, _) = starts
    for step in range(1, STEPS + 1):
        scores = [row["score"] for row in dumped(folder, step)]
        groups = [scores[first : first + SAMPLES] for first in range(0, len(scores), SAMPLES)]
        above = sum(score > sum(group) / SAMPLES for group in groups for score in group)
        below = sum(score < sum(group) / SAMPLES for group in groups for score in group)
        assert metrics[step]["hpo/alpha"] == pytest.approx(min(1.0, max(0.1, above / below)))
        assert metrics[step]["hpo/positive_fraction"] == pytest.approx(above / len(scores))
        assert metrics[step]["hpo/solve_rate"] == pytest.approx(
            sum(map(bool, scores)) / len(scores)
        )


@pytest.mark.slow
def test_sequences_were_packed(starts):
    folder, _, _ = starts
    # The second start's output follows that of the first.
    log = (folder / "train.log").read_text()
    for number_type in ("float32", "bfloat16"):
        assert f"packed sequences of torch.{number_type}" in log
