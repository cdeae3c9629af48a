"""Openings: from the estimator to the agent loop, back to it, and what forbids them."""

import asyncio
import json
import re

import numpy as np
import pytest
import torch
from algorithm_steps import submitted
from composed_recipes import View, merged, with_algorithm
from estimator_calls import call
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.utils import tensordict_utils as tu
from verl.workers.rollout.replica import TokenOutput

from data_prep.policies.tokenizer import build_tokenizer
from hpo_verl.algorithms.base import Opening
from hpo_verl.algorithms.registry import ESTIMATORS
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.verl_plugin.advantages import trainer_modes
from hpo_verl.verl_plugin.extras import OPENING, OPENINGS
from hpo_verl.verl_plugin.rollout.agent_loop import SeededSingleTurnAgentLoop
from hpo_verl.verl_plugin.trainer.algorithm_step import AlgorithmStep
from hpo_verl.verl_plugin.trainer.batches import opening_numbers
from hpo_verl.verl_plugin.validation import check_algorithm

BOTH = pytest.mark.parametrize("algorithm", ["ahpo", "apo"])


def recipe(algorithm, section=None, **rollout):
    plain = with_algorithm("countdown3-1.5b", (), "8gpu", algorithm)
    changes = {"algorithm": section or {}, "actor_rollout_ref": {"rollout": rollout}}
    return View(merged(plain, changes))


# ---------------------------------------------------------------- trainer


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("ahpo", [["", "expert"]]),
        ("apo", [["<reasoning>\n", ""]] * 3 + [["<instant>\n", ""]] * 3),
    ],
)
def test_prompts_carry_the_openings(algorithm, expected):
    batch = submitted(recipe(algorithm), {})
    # As an agent-loop worker reads it, of a share of the prompts.
    for part in batch.chunk(2):
        assert json.loads(tu.get(part, OPENINGS)) == expected


def test_the_number_of_an_opening_is_read_from_what_the_agent_loop_left():
    fields = [{OPENING: 0}, {OPENING: -1}, {"turn_scores": []}, None]
    assert opening_numbers(fields).tolist() == [0, -1, -1, -1]
    assert opening_numbers([]).tolist() == []


def test_the_trainer_reads_them_for_the_estimator_that_needs_them():
    trainer = object.__new__(AlgorithmStep)
    trainer.config = recipe("ahpo")
    estimator, loss = trainer._selected()
    assert trainer._fields(estimator, loss) == ["extra_fields", "entropy"]
    column = np.array([{OPENING: 0}, {OPENING: -1}, {}], dtype=object)
    provided = trainer._provided(estimator, tu.get_tensordict({"extra_fields": column}))
    assert list(provided) == [OPENING]
    assert provided[OPENING].tolist() == [0, -1, -1]


def test_the_estimator_gets_the_openings_of_the_trainer():
    given = {OPENING: torch.tensor([0, -1, -1, -1])}
    advantages = call("ahpo", [1.0, 0, 0, 0], list("aaaa"), {"ahpo": {"weight": 0.5}},
                      provided=given)  # fmt: skip
    assert advantages[:, 0].tolist() == [2.0, 0.0, 0.0, 0.0]
    with pytest.raises(DataError, match=r"^opening \(3,\): must be \(4,\)"):
        call("ahpo", [1.0, 0, 0, 0], list("aaaa"), provided={OPENING: torch.zeros(3).long()})
    with pytest.raises(ConfigError, match=r"needs opening from the trainer: .* must be hpo_sync$"):
        call("apo", [1.0, 0, 0, 0], list("aaaa"), provided={})


# ---------------------------------------------------------------- agent loop

TOKENIZER = build_tokenizer()
PROMPT = [{"role": "user", "content": "3 7 2 = 8"}]
LENGTH = 24


def encode(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


class Servers:
    """Rollout servers that always say the same, as verl's client returns it."""

    def __init__(self, says):
        self.says, self.asked = encode(says), []

    async def generate(self, *, prompt_ids, sampling_params, **request):
        self.asked.append((tuple(prompt_ids), sampling_params))
        log_probs = [-0.5] * len(self.says) if sampling_params["logprobs"] else None
        return TokenOutput(token_ids=self.says, log_probs=log_probs, extra_fields=versions(4))


def versions(step):
    return dict.fromkeys(("global_steps", "min_global_steps", "max_global_steps"), step)


def sample(openings, sessions=1, says="5", log_probs=True, **columns):
    """Outputs of the first sessions of a prompt in verl's own loop, and what was asked for."""
    servers, data = Servers(says), OmegaConf.create({"apply_chat_template_kwargs": {}})
    rollout = {"seed": 0, "prompt_length": 32, "response_length": LENGTH}
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}})
    if openings is not None:
        columns[OPENINGS] = json.dumps(openings)

    async def run():
        loop = SeededSingleTurnAgentLoop(
            DictConfigWrap(config), servers, TOKENIZER, None, None, DictConfigWrap(data)
        )
        runs = (
            loop.run(
                {"temperature": 1.0, "logprobs": log_probs}, global_steps=5, index=0,
                session_id=session, raw_prompt=PROMPT, **columns,
            )
            for session in range(sessions)
        )  # fmt: skip
        return await asyncio.gather(*runs)

    return asyncio.run(run()), servers.asked


def texts(outputs):
    return [TOKENIZER.decode(one.response_ids) for one in outputs]


PLAIN = tuple(TOKENIZER.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=False))
MODES = [Opening("<r>"), Opening("<r>"), Opening("<i>"), Opening("<i>")]
FIELDS = {**versions(4), "turn_scores": [], "tool_rewards": []}


def test_a_forced_beginning_is_masked_and_belongs_to_the_response():
    outputs, asked = sample(MODES, 5)
    assert texts(outputs) == ["<r>5", "<r>5", "<i>5", "<i>5", "5"]
    assert all(tuple(one.prompt_ids) == PLAIN for one in outputs)
    count = len(encode("<r>"))
    assert [one.response_mask for one in outputs] == [[*[0] * count, 1]] * 4 + [[1]]
    assert [one.response_logprobs for one in outputs] == [[*[0.0] * count, -0.5]] * 4 + [[-0.5]]
    numbers = [0, 0, 1, 1, -1]
    assert [one.extra_fields for one in outputs] == [{**FIELDS, OPENING: n} for n in numbers]
    # The servers go on after the beginning, as far as a response may be long.
    beginnings = [tuple(encode(text)) for text in ("<r>", "<r>", "<i>", "<i>", "")]
    assert [prompt for prompt, _ in asked] == [(*PLAIN, *one) for one in beginnings]
    assert [one.get("max_tokens") for _, one in asked] == [LENGTH - count] * 4 + [None]


@pytest.mark.parametrize(
    ("says", "number"), [("<r>5", 0), ("<i>", 1), ("<i", -1), (" <r>5", -1), ("5<r>", -1)]
)
def test_a_free_response_chooses_by_how_it_begins(says, number):
    (*_, output), _ = sample(MODES, 5, says)
    assert texts([output]) == [says]
    assert output.response_mask == [1] * len(output.response_ids)
    assert output.extra_fields[OPENING] == number


def test_a_response_without_log_probabilities_and_one_that_is_cut():
    (output,), _ = sample(MODES, log_probs=False)
    assert output.response_logprobs is None
    (output,), _ = sample(MODES, says="7" * 3 * LENGTH)
    lengths = (output.response_ids, output.response_mask, output.response_logprobs)
    assert [len(one) for one in lengths] == [LENGTH] * 3


def test_without_openings_nothing_is_added():
    (output,), asked = sample(None)
    assert output.extra_fields == FIELDS
    assert asked == [(PLAIN, {"temperature": 1.0, "logprobs": True, "seed": asked[0][1]["seed"]})]


EXPERT = [Opening(whole="expert")]


def test_a_whole_response_is_the_rows_text_ended_and_nobody_samples_it():
    outputs, asked = sample(EXPERT, 2, extra_info={"expert": "3+7=10"})
    assert texts(outputs) == ["3+7=10<|im_end|>", "5"]
    # The other one is the policy's.
    assert [prompt for prompt, _ in asked] == [PLAIN]
    given, own = outputs
    assert tuple(given.prompt_ids) == PLAIN
    assert given.response_ids == [*encode("3+7=10"), TOKENIZER.eos_token_id]
    assert given.response_mask == [1] * len(given.response_ids)
    assert given.response_logprobs == [0.0] * len(given.response_ids)
    # The weights that sample the others of step 5 are those after step 4.
    assert given.extra_fields == {**FIELDS, OPENING: 0}
    assert own.extra_fields == {**FIELDS, OPENING: -1}
    assert given.as_dict().keys() == own.as_dict().keys()
    assert given.metrics.model_dump().keys() == own.metrics.model_dump().keys()
    (given,), _ = sample(EXPERT, log_probs=False, extra_info={"expert": "5"})
    assert given.response_logprobs is None


@pytest.mark.parametrize(
    "extra_info", [None, {}, {"expert": None}, {"expert": 5}, {"expert": ""}, {"expert": "7" * 99}]
)
def test_a_row_without_a_fitting_text_is_sampled_as_usual(extra_info):
    (output,), asked = sample(EXPERT, extra_info=extra_info)
    assert texts([output]) == ["5"]
    assert output.extra_fields[OPENING] == -1
    assert "max_tokens" not in asked[0][1]


# ---------------------------------------------------------------- validation


@BOTH
def test_the_recipe_is_accepted_and_needs_the_synchronous_mode(algorithm):
    assert check_algorithm(recipe(algorithm)) == []
    assert trainer_modes(ESTIMATORS[algorithm], {}) == ("hpo_sync",)


@BOTH
@pytest.mark.parametrize(
    ("section", "rollout", "message"),
    [
        ({}, {"agent": {"default_agent_loop": "tool_agent"}},
         "actor_rollout_ref.rollout.agent.default_agent_loop = 'tool_agent': adv_estimator = {} "
         "gives responses their beginning; must be seeded_single_turn_agent"),
        ({"rollout_correction": {"rollout_is": "token"}}, {},
         "algorithm.rollout_correction.rollout_is = 'token': adv_estimator = {}"),
        ({}, {"enable_rollout_routing_replay": True},
         "actor_rollout_ref.rollout.enable_rollout_routing_replay = True: adv_estimator = {}"),
        ({}, {"custom": {"knapsack": {"enable": True}}},
         "actor_rollout_ref.rollout.custom.knapsack.enable = True: adv_estimator = {} gives"),
        ({}, {"custom": {"hints": {"enable": True}}},
         "actor_rollout_ref.rollout.custom.hints.enable = True: adv_estimator = {} gives"),
        ({}, {"n": 2}, "actor_rollout_ref.rollout.n = 2: "),
    ],
)  # fmt: skip
def test_what_would_undo_it_is_refused(algorithm, section, rollout, message):
    expected = re.escape(message.format(repr(algorithm)))
    with pytest.raises(ConfigError, match=f"^{expected}"):
        check_algorithm(recipe(algorithm, section, **rollout))
