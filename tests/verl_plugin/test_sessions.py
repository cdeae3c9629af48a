"""Sessions with several outputs, rejected responses, a KL penalty, and parts of a step."""

import uuid
from collections import deque

import numpy as np
import pytest
import torch
from estimator_calls import PER_OUTPUT, call, named_rewards, token_rewards
from verl import DataProto
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

from hpo_verl.algorithms.registry import OUR_ESTIMATORS
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin.estimator_input import TOKEN_VALUES, joined, make_rollout
from hpo_verl.verl_plugin.trainer.batches import final_outputs, output_numbers

# SPO whitens over the batch, one response a prompt; the others compare within a prompt.
EVERY = pytest.mark.parametrize("name", OUR_ESTIMATORS)
GROUPED = pytest.mark.parametrize(
    "name", [n for n, one in OUR_ESTIMATORS.items() if not one.history]
)
PLAIN = {"hpo": {"alpha": 1.0}}


def given(rows, width=4, **more):
    generator = torch.Generator().manual_seed(0)
    return {
        "entropy": torch.rand(rows, width, generator=generator),
        "old_log_prob": -torch.rand(rows, width, generator=torch.Generator().manual_seed(1)),
        "progress": 0.5,
        "memory": {},
        "values": dict.fromkeys("abc", 0.5),
        **named_rewards(rows),
        **more,
    }


# ---------------------------------------------------------------- sessions

# One prompt: session 0 succeeds with five outputs, three fail with one each.
KEYS = [f"a_0_{output}" for output in (0, 3, 1, 4, 2)] + ["a_1_0", "a_2_0", "a_3_0"]
SCORES = [1.0] * 5 + [0.0] * 3


def of_sessions(name, config=None, keys=KEYS, scores=SCORES, **options):
    uids = [key.rsplit("_", 2)[0] for key in keys]
    provided = given(len(keys), final=final_outputs(keys), output=output_numbers(keys))
    return call(name, scores, uids, config, provided=provided, **options)


def test_the_final_output_is_the_one_with_the_highest_number():
    assert final_outputs(KEYS).tolist() == [3] * 5 + [5, 6, 7]
    # Prompts and sessions may hold underscores, and ten outputs sort by number.
    assert final_outputs(["x_y_0_9", "x_y_0_10", "x_y_1_0"]).tolist() == [1, 1, 2]
    assert final_outputs([]).tolist() == []
    assert output_numbers(["x_y_0_9", "x_y_0_10", "x_y_1_0"]).tolist() == [9, 10, 0]
    assert output_numbers([]).tolist() == []


def test_a_session_counts_once_by_hand():
    advantages = of_sessions("hpo", PLAIN)[:, 0].tolist()
    assert advantages == pytest.approx([1.5] * 5 + [-0.5] * 3, rel=1e-5)
    # alpha = 1/3: one success, three failures.
    adaptive = of_sessions("a_hpo")[:, 0].tolist()
    assert adaptive == pytest.approx([1.5] * 5 + [-0.5 / 3] * 3, rel=1e-5)


def test_sessions_agree_with_verls_grpo():
    sessions = [(prompt, number) for prompt in "ab" for number in range(4)]
    keys = [f"{prompt}_{number}_{i}" for prompt, number in sessions for i in range(1 + number % 3)]
    scores = torch.rand(len(keys), generator=torch.Generator().manual_seed(1)).tolist()
    uids = np.array([key[0] for key in keys], dtype=object)
    data = DataProto.from_dict(
        tensors={
            "token_level_rewards": token_rewards(scores),
            "response_mask": torch.ones(len(keys), 4),
        },
        non_tensors={"uid": uids},
    )
    theirs = compute_advantage_for_multi_trajectories(data, keys, "grpo").batch["advantages"]
    torch.testing.assert_close(of_sessions("hpo", PLAIN, keys, scores), theirs, rtol=1e-5, atol=0)


@EVERY
def test_outputs_before_the_final_one_bring_no_reward_of_their_own(name):
    other = [0.5, 1.0, 0.0, 1.0, 0.5, 0.0, 0.0, 0.0]
    assert torch.equal(of_sessions(name, scores=other), of_sessions(name))


@GROUPED
def test_one_output_a_session_is_the_batch_without_sessions(name):
    rewards, uids = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0], list("aaaabbbb")
    keys = [f"{uid}_{row}_0" for row, uid in enumerate(uids)]
    plain = call(name, rewards, uids, provided=given(8))
    assert torch.equal(of_sessions(name, keys=keys, scores=rewards), plain)


def test_rounds_are_compared_with_each_other_by_hand():
    # gamma 1/2, the success in five rounds, in the order of `KEYS`: 1/16, 1/2, 1/8, 1, 1/4.
    plain = {"eapo": {"discount": 0.5}, "norm_adv_by_std_in_grpo": False}
    advantages = of_sessions("eapo", plain)[:, 0].tolist()
    discounted = [1 / 16, 1 / 2, 1 / 8, 1, 1 / 4, 0, 0, 0]
    mean = sum(discounted) / 8
    assert advantages == pytest.approx([one - mean for one in discounted], rel=1e-6)
    # In two parts, the rounds of the first are those of its own sessions.
    first = make_rollout(token_rewards(SCORES), torch.ones(8, 4), torch.zeros(8, dtype=torch.int64))
    first = first._replace(
        live=final_outputs(KEYS) == torch.arange(8),
        final=final_outputs(KEYS),
        extras={"output": output_numbers(KEYS)},
    )
    provided = given(8, final=final_outputs(KEYS), output=output_numbers(KEYS), earlier=[first])
    again = call("eapo", SCORES, ["b"] * 8, plain, provided=provided)
    assert again[:, 0].tolist() == pytest.approx(advantages)


def test_the_outputs_of_a_session_are_kept_or_dropped_together():
    shares = {f"{kind}_share_{end}": 0.5 for kind in ("response",) for end in ("start", "end")}
    shares |= {"token_share_start": 1.0, "token_share_end": 1.0}
    advantages = of_sessions("d3s", {"d3s": shares})
    # Two of four sessions: the success with all of its outputs, and one failure.
    assert (advantages[:5] > 0).all()
    assert int((advantages[5:] < 0).any(dim=-1).sum()) == 1


# ---------------------------------------------------------------- rejection


def test_a_rejected_response_stays_in_the_baseline():
    mask = torch.ones(4, 4)
    mask[0] = 0
    rewards = [1.0, 0.0, 0.0, 0.0]
    advantages = call("hpo", rewards, ["a"] * 4, PLAIN, mask)
    assert advantages[:, 0].tolist() == pytest.approx([0.0, -0.5, -0.5, -0.5], rel=1e-5)
    # It counts as the success that it was.
    adaptive = call("a_hpo", rewards, ["a"] * 4, None, mask)
    assert adaptive[1, 0].item() == pytest.approx(-0.5 / 3, rel=1e-5)


@GROUPED
def test_a_rejected_response_has_no_advantage_and_a_rejected_prompt_no_weight(name):
    mask = torch.ones(6, 4)
    mask[4:] = 0
    uids, rewards = list("aaaabb"), [1.0, 0.0, 0.0, 1.0]
    alone = call(name, rewards, uids[:4], mask=mask[:4], provided=given(4))
    of_tokens = {field: torch.cat([given(4)[field], torch.ones(2, 4)]) for field in TOKEN_VALUES}
    of_tokens |= {field: torch.cat([given(4)[field], torch.ones(2)]) for field in PER_OUTPUT}
    both = call(name, [*rewards, 1.0, 0.0], uids, mask=mask, provided=given(6) | of_tokens)
    assert torch.equal(both[:4], alone)
    assert (both[4:] == 0).all()


# ---------------------------------------------------------------- a KL penalty


def test_a_penalty_leaves_the_counts_of_signs_as_they_are():
    """100 prompts of 8, ten with one success: 10 positives and 70 negatives, alpha = 1/7."""
    scores = torch.zeros(800)
    scores[:80:8] = 1.0
    uids = [f"p{row // 8}" for row in range(800)]
    noise = 5e-4 * torch.randn(800, generator=torch.Generator().manual_seed(0))
    config = {"use_kl_in_reward": True}
    penalized = call(
        "a_hpo",
        token_rewards((scores - noise).tolist()),
        uids,
        config,
        provided={"scores": token_rewards(scores.tolist())},
    )[:, 0]
    plain = call("a_hpo", token_rewards(scores.tolist()), uids)[:, 0]
    assert plain[1].item() == pytest.approx(-0.35355 / 7, rel=1e-4)
    torch.testing.assert_close(penalized, plain, rtol=0, atol=5e-3)
    assert (penalized[80:] == 0).all()


@GROUPED
def test_a_penalty_needs_a_trainer_that_hands_over_the_scores(name):
    with pytest.raises(
        ConfigError,
        match=r"use_kl_in_reward = True needs the scores .* must be hpo_sync",
    ):
        call(name, [1.0, 0.0], ["a", "a"], {"use_kl_in_reward": True}, provided=given(2))


# ---------------------------------------------------------------- parts of a step


def parts_of(rewards, uids, size):
    """What the trainer does in `separate_async`: the part, and the parts of a step before it."""
    earlier = deque(maxlen=len(rewards) // size - 1)
    for start in range(0, len(rewards), size):
        rows = slice(start, start + size)
        own = {field: given(len(rewards))[field][rows] for field in (*TOKEN_VALUES, *PER_OUTPUT)}
        yield (
            rewards[rows],
            uids[rows],
            earlier,
            own | {"progress": 0.5, "memory": {}, "values": {}},
        )


@GROUPED
def test_the_last_part_sees_the_whole_step(name):
    rewards = [1.0, 0.0, 0.0, 0.0] + [1.0, 0.0, 0.0, 0.0] + [0.0] * 4 + [1.0, 1.0, 0.0, 1.0]
    uids = [f"{prompt}{uuid.UUID(int=row // 4)}" for row, prompt in enumerate("aaaabbbbccccdddd")]
    whole = call(name, rewards, uids, provided=given(16))
    for own_rewards, own_uids, earlier, own in parts_of(rewards, uids, 4):
        seen = call(name, own_rewards, own_uids, provided=own | {"earlier": earlier})
        codes = torch.zeros(4, dtype=torch.int64)
        part = make_rollout(token_rewards(own_rewards), torch.ones(4, 4), codes)
        earlier.append(part._replace(extras=own))
    torch.testing.assert_close(seen, whole[12:], rtol=1e-6, atol=0)


def test_the_weight_of_each_part_by_hand():
    """Quarters with 1, 7, 7 and 2 positives of 8, the rest negative."""
    positives = [1, 7, 7, 2]
    rewards = [float(row < count) for count in positives for row in range(8)]
    uids = [f"p{row // 8}" for row in range(32)]
    weights = []
    for own_rewards, own_uids, earlier, _ in parts_of(rewards, uids, 8):
        advantages = call("a_hpo", own_rewards, own_uids, provided={"earlier": earlier})[:, 0]
        plain = call("hpo", own_rewards, own_uids, PLAIN)[:, 0]
        weights.append((advantages[-1] / plain[-1]).item())
        codes = torch.zeros(8, dtype=torch.int64)
        earlier.append(make_rollout(token_rewards(own_rewards), torch.ones(8, 4), codes))
    # 1/7; 8/8; 15/9 and 17/15, at most 1. By itself the last part has 2/6.
    assert weights == pytest.approx([1 / 7, 1.0, 1.0, 1.0], rel=1e-5)


def test_parts_of_different_widths_and_sessions_are_joined():
    narrow = make_rollout(torch.ones(2, 2), torch.ones(2, 2), torch.tensor([0, 0]))
    final = torch.tensor([1, 1, 2])
    wide = make_rollout(torch.ones(3, 4), torch.ones(3, 4), torch.tensor([0, 0, 1]))
    both = joined([narrow, wide._replace(final=final)])
    assert both.mask.sum(dim=-1).tolist() == [2, 2, 4, 4, 4]
    assert both.groups.tolist() == [0, 0, 2, 2, 3]
    assert both.final is not None
    assert both.final.tolist() == [0, 1, 3, 3, 4]
    assert joined([wide]) is wide
