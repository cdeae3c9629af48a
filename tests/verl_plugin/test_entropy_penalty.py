"""The entropy penalty of a loss in the actor, and token fields that an estimator gives."""

import re

import numpy as np
import pytest
import torch
from composed_recipes import View, merged, with_algorithm
from policy_batches import actor_config as plain_config
from policy_batches import counts_of, make_batch
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.utils import tensordict_utils as tu

from hpo_verl.algorithms.epo import HISTORY, SMOOTHING
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.config import SECTIONS
from hpo_verl.verl_plugin.engine import replay
from hpo_verl.verl_plugin.engine.actor_loss import ENTROPY_PENALTY
from hpo_verl.verl_plugin.engine.loss_statistics import loss_with_statistics
from hpo_verl.verl_plugin.validation import check_algorithm

LENGTHS = (2, 1)
COEFFICIENT = 0.5


def nested(rows):
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def micro_batch(entropies, history=2.0, weight=1.0):
    """Two responses of 2 and 1 tokens behind a prompt of one token; on-policy, advantages 1."""
    flat = [torch.tensor([0.0, *one]).roll(-1) for one in entropies]
    output = {
        "log_probs": nested(torch.zeros(1 + n) for n in LENGTHS).requires_grad_(),
        "entropy": nested(flat).requires_grad_(),
    }
    data = tu.get_tensordict(
        {
            "prompts": nested(torch.zeros(1, dtype=torch.long) for _ in LENGTHS),
            "responses": nested(torch.zeros(n, dtype=torch.long) for n in LENGTHS),
            "response_mask": nested(torch.ones(n, dtype=torch.long) for n in LENGTHS),
            "old_log_probs": nested(torch.zeros(n) for n in LENGTHS),
            "advantages": nested(torch.ones(n) for n in LENGTHS),
            HISTORY: nested(torch.full((n,), history) for n in LENGTHS),
            SMOOTHING: nested(torch.full((n,), weight) for n in LENGTHS),
        },
        non_tensor_dict={"dp_size": 1, "batch_num_tokens": 3, "global_batch_size": 2},
    )
    return output, data


def actor_config(**changes):
    section = SECTIONS["epo"](**changes)
    return plain_config(policy_loss=section, entropy_coeff=COEFFICIENT)


def test_the_penalty_is_taken_off_the_entropy_with_its_gradient_by_hand():
    # The corridor is [1, 3]: 0.5 is 0.5 below, 5 is 2 above; means over three tokens.
    output, data = micro_batch([(0.5, 2.0), (5.0,)])
    loss, metrics = loss_with_statistics(actor_config(), output, data)
    entropy, penalty = 7.5 / 3, 2.5 / 3
    assert loss.item() == pytest.approx(-1.0 - COEFFICIENT * (entropy - penalty))
    assert metrics[ENTROPY_PENALTY].values == pytest.approx([penalty])
    assert metrics["actor/entropy_loss"].values == pytest.approx([entropy])
    (slopes,) = torch.autograd.grad(loss, output["entropy"])
    # Where it is too low the bonus counts twice, where it is too high nothing is left.
    expected = [-2 * COEFFICIENT / 3, -COEFFICIENT / 3, 0.0, 0.0, 0.0]
    assert slopes.values().tolist() == pytest.approx(expected)


def test_the_public_codes_constant_changes_the_loss_and_no_gradient():
    output, data = micro_batch([(0.5, 2.0), (5.0,)])
    config = actor_config(repo_compatible=True)
    loss, metrics = loss_with_statistics(config, output, data)
    assert metrics[ENTROPY_PENALTY].values == pytest.approx([0.2 / 3])
    (slopes,) = torch.autograd.grad(loss, output["entropy"])
    expected = [-COEFFICIENT / 3, -COEFFICIENT / 3, 0.0, -COEFFICIENT / 3, 0.0]
    assert slopes.values().tolist() == pytest.approx(expected)


def test_without_entropies_or_with_another_loss_there_is_no_penalty():
    output, data = micro_batch([(0.5, 2.0), (5.0,)])
    loss, metrics = loss_with_statistics(actor_config(), output | {"entropy": None}, data)
    assert loss.item() == pytest.approx(-1.0)
    assert ENTROPY_PENALTY not in metrics
    _, metrics = loss_with_statistics(plain_config(entropy_coeff=COEFFICIENT), output, data)
    assert ENTROPY_PENALTY not in metrics


def test_a_file_of_an_update_gives_the_loss_with_its_penalty_again():
    batch = make_batch()
    config = actor_config()
    tensors = {
        **batch,
        "entropy": torch.linspace(0.0, 5.0, 96).view(8, 12),
        HISTORY: torch.full((8, 12), 2.0),
        SMOOTHING: torch.full((8, 12), 0.7),
    }
    counts = counts_of(batch["response_mask"])
    recording = {**replay.loss_settings_of(config), "counts": counts}
    loss, _, found = replay.evaluate(tensors, recording)
    without, _, _ = replay.evaluate(tensors | {SMOOTHING: torch.zeros(8, 12)}, recording)
    entropy, mask = tensors["entropy"], batch["response_mask"]
    outside = (entropy - 3).clamp(min=0) + (1 - entropy).clamp(min=0)
    assert found is None
    expected = COEFFICIENT * 0.7 * outside[mask].mean().item()
    assert loss - without == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- who gives and who reads


def recipe(algorithm=None, **actor):
    """EPO's recipe with changes in `algorithm` and in the actor's section."""
    plain = with_algorithm("countdown3-1.5b", (), "8gpu", "epo")
    changes = {"algorithm": algorithm or {}, "actor_rollout_ref": {"actor": actor}}
    return View(merged(plain, changes))


@pytest.mark.parametrize("coefficient", [0, 0.0, -0.1, None, "0.1"])
def test_a_penalty_without_a_weight_is_refused(coefficient):
    assert check_algorithm(recipe()) == []
    message = (
        f"actor_rollout_ref.actor.entropy_coeff = {coefficient!r}: policy_loss.loss_mode = 'epo' "
        "is weighed by it; must be a number above 0"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_algorithm(recipe(entropy_coeff=coefficient))


def test_a_loss_needs_an_estimator_that_gives_its_fields():
    message = (
        "adv_estimator = 'grpo' with policy_loss.loss_mode = 'epo': that loss reads "
        "entropy_history and entropy_smoothing of every token; use epo"
    )
    config = recipe({"adv_estimator": "grpo", "epo": None})
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_algorithm(config)


def test_fields_that_nobody_reads_are_told():
    (warning,) = check_algorithm(recipe(policy_loss={"loss_mode": "gpg"}))
    assert warning == (
        "adv_estimator = 'epo' with policy_loss.loss_mode = 'gpg': that loss does not read "
        "entropy_history and entropy_smoothing"
    )


def test_a_weight_in_front_keeps_what_the_estimator_remembers():
    reported = []
    given = {"entropy": torch.ones(4, 1), "memory": {"alpha": 1.0}, "progress": 0.0}
    with extras.provide(report=reported.append, **given):
        get_adv_estimator_fn("epo")(
            token_level_rewards=torch.tensor([[1.0], [0.0], [0.0], [0.0]]),
            response_mask=torch.ones(4, 1),
            index=np.zeros(4),
            config={"hpo": {"alpha_min": 0.0, "ema": 0.5}},
        )
    memory = reported[0].result.memory
    assert memory == {"alpha": pytest.approx(2 / 3), "epo_entropy": 1.0, "epo_steps": 1.0}
