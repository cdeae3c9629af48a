"""Qwen3 and Qwen3.5 in the recipes: pinned, without thinking, and small enough for its hardware."""

import re

import pytest
from model_sizes import MODEL_SIZES

from hpo_verl.checks.memory import RECIPE_CARD_GIB, card_memory
from hpo_verl.config.recipes import compose_recipe, without_hydra

MODELS = ["qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3.5-0.8b", "qwen3.5-2b"]


@pytest.mark.parametrize("hardware", ["1gpu", "8gpu"])
@pytest.mark.parametrize(
    "model", ["qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3.5-0.8b", "qwen3.5-2b"]
)
def test_it_is_pinned_and_fits(model, hardware):
    recipe = compose_recipe("countdown3-1.5b", [f"model={model}", f"hardware={hardware}"])
    config = without_hydra(recipe)
    policy = config.prepare.policy.arguments
    assert policy.repo.lower() == f"qwen/{model}"
    assert re.fullmatch("[0-9a-f]{40}", policy.revision)
    assert config.data.apply_chat_template_kwargs == {"enable_thinking": False}
    memory = card_memory(MODEL_SIZES[policy.repo], config, RECIPE_CARD_GIB)
    assert max(memory.update, memory.sampling) < RECIPE_CARD_GIB - 5
