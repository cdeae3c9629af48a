"""Qwen3 in the recipes: pinned, without thinking, and small enough for its hardware."""

import re

import pytest

from hpo_verl.checks.memory import RECIPE_CARD_GIB, ModelSize, card_memory
from hpo_verl.config.recipes import compose_recipe, without_hydra

SIZES = {
    "Qwen/Qwen3-0.6B": ModelSize(596_049_920, 1024, 3072, 28, 8, 128, 151_936, tied=True),
    "Qwen/Qwen3-1.7B": ModelSize(1_720_574_976, 2048, 6144, 28, 8, 128, 151_936, tied=True),
    "Qwen/Qwen3-4B": ModelSize(4_022_468_096, 2560, 9728, 36, 8, 128, 151_936, tied=True),
}


@pytest.mark.parametrize("hardware", ["1gpu", "8gpu"])
@pytest.mark.parametrize("model", ["qwen3-0.6b", "qwen3-1.7b", "qwen3-4b"])
def test_it_is_pinned_and_fits(model, hardware):
    recipe = compose_recipe("countdown3-1.5b", [f"model={model}", f"hardware={hardware}"])
    config = without_hydra(recipe)
    policy = config.prepare.policy.arguments
    assert policy.repo.lower() == f"qwen/{model}"
    assert re.fullmatch("[0-9a-f]{40}", policy.revision)
    assert config.data.apply_chat_template_kwargs == {"enable_thinking": False}
    memory = card_memory(SIZES[policy.repo], config, RECIPE_CARD_GIB)
    assert max(memory.update, memory.sampling) < RECIPE_CARD_GIB - 5
    if hardware == "1gpu":
        longest = config.data.max_prompt_length + config.data.max_response_length
        held = memory.cache_tokens // longest // 128 * 128
        assert config.actor_rollout_ref.rollout.max_num_seqs == held
