"""A temperature per sample: from the estimator's memory to the agent loop, and what forbids it."""

import asyncio
import json
import re
from types import SimpleNamespace

import pytest
import torch
from algorithm_steps import submitted
from composed_recipes import View, merged, with_algorithm
from estimator_calls import call
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.utils import tensordict_utils as tu

from hpo_verl.algorithms.aepo_entropy import MEASURED
from hpo_verl.algorithms.base import TokenTemperature
from hpo_verl.algorithms.hapo import LOG_ENTROPY
from hpo_verl.algorithms.registry import ESTIMATORS
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin.advantages import trainer_modes
from hpo_verl.verl_plugin.cpu.server import request_from_sampling_params
from hpo_verl.verl_plugin.estimator_input import joined, make_rollout
from hpo_verl.verl_plugin.extras import TEMPERATURE_RULE, TEMPERATURES
from hpo_verl.verl_plugin.rollout.agent_loop import NAME, SeededSingleTurnAgentLoop
from hpo_verl.verl_plugin.trainer.algorithm_step import AlgorithmStep
from hpo_verl.verl_plugin.trainer.batches import session_numbers
from hpo_verl.verl_plugin.validation import check_algorithm


def recipe(algorithm="aepo_entropy", section=None, **rollout):
    plain = with_algorithm("countdown3-1.5b", (), "8gpu", algorithm)
    changes = {"algorithm": section or {}, "actor_rollout_ref": {"rollout": rollout}}
    return View(merged(plain, changes))


# ---------------------------------------------------------------- trainer


@pytest.mark.parametrize(("memory", "factor"), [({}, 1.0), ({MEASURED: 0.4}, 1.1)])
def test_prompts_carry_the_temperature_that_follows_from_the_last_step(memory, factor):
    batch = submitted(recipe("aepo_entropy"), memory)
    # As an agent-loop worker reads it, of a share of the prompts.
    for part in batch.chunk(2):
        assert json.loads(tu.get(part, TEMPERATURES)) == [pytest.approx(factor)]


def test_others_carry_none():
    assert TEMPERATURES not in submitted(recipe("a_hpo"), {})


def test_the_number_of_a_session_is_read_from_its_key():
    assert session_numbers(["x_y_0_9", "x_y_10_0", "b_2_1"]).tolist() == [0, 10, 2]
    assert session_numbers([]).tolist() == []


def test_sessions_of_the_parts_of_a_step_are_joined():
    def part():
        return make_rollout(torch.ones(2, 1), torch.ones(2, 1), torch.tensor([0, 0]))

    known = part()._replace(session=torch.tensor([0, 1]))
    assert joined([known, known]).session.tolist() == [0, 1, 0, 1]
    assert joined([part(), part()]).session is None


def test_the_estimator_gets_the_sessions_of_the_trainer():
    given = {"entropy": torch.ones(4, 4), "memory": {}, "session": torch.tensor([3, 2, 1, 0])}
    config = {"aepo_entropy": {"weight": 0.25}}
    advantages = call("aepo_entropy", [1.0, 0, 0, 1.0], list("aaaa"), config, provided=given)
    # Three of a group, times 4 / 3; and a success at the other temperature, 0.25 * 4 / 1.
    expected = [4 / 3 * 2 / 3**0.5, -4 / 3 / 3**0.5, -4 / 3 / 3**0.5, 1.0]
    assert advantages[:, 0].tolist() == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- agent loop


def sampling_of(monkeypatch, session, **columns):
    """What the loop asks a rollout server for."""
    seen = {}

    async def run(self, sampling_params, priority=0, **kwargs):
        seen.update(sampling_params, columns=set(kwargs))

    monkeypatch.setattr(SingleTurnAgentLoop, "run", run)
    loop = object.__new__(SeededSingleTurnAgentLoop)
    loop.rollout_config = SimpleNamespace(seed=0)
    prompt = [{"role": "user", "content": "?"}]
    asyncio.run(
        loop.run(
            {"temperature": 0.5, "top_p": 1.0}, global_steps=1, index=0, session_id=session,
            raw_prompt=prompt, **columns,
        )
    )  # fmt: skip
    return seen


def test_the_first_samples_of_a_prompt_have_their_factors_on_the_temperature(monkeypatch):
    column = {TEMPERATURES: json.dumps([1.2, 0.8])}
    samples = [sampling_of(monkeypatch, session, **column) for session in range(3)]
    assert [one["temperature"] for one in samples] == [0.6, 0.4, 0.5]
    assert TEMPERATURES not in samples[0]["columns"]
    plain = sampling_of(monkeypatch, 0)
    assert plain["temperature"] == 0.5
    assert plain["seed"] == samples[0]["seed"] != samples[1]["seed"]


def test_a_rule_for_every_token_goes_from_the_memory_to_the_rollout(monkeypatch):
    seen = []

    class Parent:
        def _submit_batch_to_rollout(self, batch):
            seen.append(batch)
            return len(batch)

    trainer = object.__new__(type("Mode", (AlgorithmStep, Parent), {}))
    trainer.config = by_token()
    trainer.memory = {LOG_ENTROPY: [-1.0, -3.0, 0.5]}
    trainer._submit_batch_to_rollout(tu.get_tensordict({"a": torch.zeros(3)}))
    column = tu.get(seen[0], TEMPERATURE_RULE)
    assert json.loads(column) == [0.1, -1.0, -3.0, 0.5]
    sample = sampling_of(monkeypatch, 0, **{TEMPERATURE_RULE: column})
    assert sample[TEMPERATURE_RULE] == [0.1, -1.0, -3.0, 0.5]
    assert TEMPERATURE_RULE not in sample["columns"]
    config = SimpleNamespace(max_model_len=None, prompt_length=4, response_length=4, seed=0)
    sample.pop("columns")
    request = request_from_sampling_params([1], sample, "id", config)
    assert request.sampling == (0.5, -1, 1.0, TokenTemperature(0.1, -1.0, -3.0, 0.5))
    assert TEMPERATURE_RULE not in submitted(recipe("hapo"), {})
    assert request_from_sampling_params([1], {}, "id", config).token_temperature is None


# ---------------------------------------------------------------- validation


def by_token(**rollout):
    rollout = {"name": "hf", "agent": {"default_agent_loop": NAME}, **rollout}
    return recipe("hapo", {"hapo": {"temperature_scale": 0.1}}, **rollout)


def test_a_temperature_per_token_needs_the_rollout_hf_and_the_synchronous_mode():
    assert check_algorithm(by_token()) == []
    assert check_algorithm(recipe("hapo")) == []
    estimator = ESTIMATORS["hapo"]
    assert trainer_modes(estimator, by_token().algorithm) == ("hpo_sync",)
    assert trainer_modes(estimator, recipe("hapo").algorithm) == ()
    message = (
        "actor_rollout_ref.rollout.name = 'vllm': algorithm.hapo asks for a temperature per "
        "token, which vLLM has not; must be hf"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_algorithm(by_token(name="vllm"))
    with pytest.raises(ConfigError, match="default_agent_loop = 'tool_agent'"):
        check_algorithm(by_token(agent={"default_agent_loop": "tool_agent"}))


def test_the_recipe_is_accepted_and_needs_the_synchronous_mode():
    assert check_algorithm(recipe()) == []
    assert trainer_modes(ESTIMATORS["aepo_entropy"], {}) == ("hpo_sync",)


@pytest.mark.parametrize(
    ("section", "rollout", "message"),
    [
        ({}, {"agent": {"default_agent_loop": "tool_agent"}},
         "actor_rollout_ref.rollout.agent.default_agent_loop = 'tool_agent': adv_estimator = "
         "'aepo_entropy' samples at several temperatures; must be seeded_single_turn_agent"),
        ({"rollout_correction": {"rollout_is": "token"}}, {},
         "algorithm.rollout_correction.rollout_is = 'token': adv_estimator = 'aepo_entropy'"),
        ({"rollout_correction": {"rollout_rs": "geometric"}}, {},
         "algorithm.rollout_correction.rollout_rs = 'geometric': adv_estimator ="),
        ({"aepo_entropy": {"responses": 7}}, {"n": 8},
         "algorithm.aepo_entropy.responses = 7: of actor_rollout_ref.rollout.n = 8 responses two "
         "must remain to be compared; at most 6"),
    ],
)  # fmt: skip
def test_what_would_not_sample_so_is_refused(section, rollout, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        check_algorithm(recipe(section=section, **rollout))
