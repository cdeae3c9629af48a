"""The figures in docs/pages/recipes.md are those of the recipes."""

import math

import pytest
from composed_recipes import composed
from model_sizes import MODEL_SIZES

from hpo_verl.checks.memory import (
    RECIPE_CARD_GIB,
    adapter_parameters,
    card_memory,
    tokens_at_once,
)
from hpo_verl.config.recipes import recipes_directory
from hpo_verl.config.settings import cards_a_copy

HUB_IDS = {
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    **{f"qwen3-{size}": f"Qwen/Qwen3-{size.upper()}" for size in ("0.6b", "1.7b", "4b")},
    **{f"qwen3.5-{size}": f"Qwen/Qwen3.5-{size.upper()}" for size in ("0.8b", "2b")},
}
# What is left of the smallest cards of "24 GB".
SMALL_CARD_GIB = 22.5
ON_SMALL_CARDS = ("qwen2.5-1.5b", "qwen3-0.6b", "qwen3-1.7b", "qwen3.5-0.8b")
RECIPE_OF = {
    "qwen2.5-1.5b": ("countdown3-1.5b", ()),
    "qwen2.5-3b": ("countdown3-3b", ()),
    "llama3.2-3b": ("countdown3-3b", ("model=llama3.2-3b",)),
    "qwen2.5-7b": ("countdown3-7b", ()),
    **{name: ("countdown3-1.5b", (f"model={name}",)) for name in HUB_IDS if "qwen3" in name},
}


def test_the_doctor_knows_every_model_of_the_recipes():
    for name in HUB_IDS:
        config = composed(*RECIPE_OF[name], "8gpu")
        assert config.prepare.policy.arguments.repo == HUB_IDS[name]
    assert set(MODEL_SIZES) == set(HUB_IDS.values())


def test_parameter_counts_follow_from_the_dimensions():
    for name, size in MODEL_SIZES.items():
        hidden, query, width = size.hidden_size, size.query_width, size.key_width
        norms = 2 * hidden + 2 * size.head_size * size.head_norms
        bias = query + 2 * width if "Qwen2.5" in name else 0
        feed_forward = 3 * hidden * size.intermediate_size
        gate = hidden * query if size.delta else 0
        layer = 2 * hidden * query + 2 * hidden * width + gate + bias + feed_forward + norms
        layers = size.attention_layers * layer
        if delta := size.delta:
            mixed, narrow = 2 * delta.key_width + delta.value_width, 2 * delta.heads
            layer = hidden * (mixed + 2 * delta.value_width + narrow) + 4 * mixed + narrow
            layers += delta.layers * (layer + delta.value_size + feed_forward + 2 * hidden)
        matrices = 1 if size.tied else 2
        assert size.parameters == layers + hidden + matrices * size.vocabulary * hidden


def memory_row(name, hardware):
    """One line of the README's memory table, in GiB a card, by the doctor's arithmetic."""
    config = composed(*RECIPE_OF[name], hardware)
    card = SMALL_CARD_GIB if hardware == "1gpu24" else RECIPE_CARD_GIB
    memory = card_memory(MODEL_SIZES[HUB_IDS[name]], config, card)
    assert max(memory.update, memory.sampling) < card
    cells = (
        *(memory.weights, memory.gradients, memory.adam, memory.loss, memory.layer),
        *(memory.step, memory.scoring, memory.update, memory.resident, memory.sampling),
    )
    figures = " | ".join(f"{value:.1f}" for value in cells)
    tokens = tokens_at_once(config)
    return f"| {name} | {hardware} | {tokens} | {figures} | {memory.cache_tokens / 1e6:.2g} |"


@pytest.mark.parametrize("name", HUB_IDS)
def test_one_card_samples_as_many_responses_at_once_as_its_cache_holds(name):
    config = composed(*RECIPE_OF[name], "1gpu")
    memory = card_memory(MODEL_SIZES[HUB_IDS[name]], config, RECIPE_CARD_GIB)
    whole = memory.cache_tokens / (config.data.max_prompt_length + config.data.max_response_length)
    at_once = config.actor_rollout_ref.rollout.max_num_seqs
    assert at_once == min(1024, whole // 128 * 128)
    # With more cards each has no more responses of a step than verl's default.
    eight = composed(*RECIPE_OF[name], "8gpu")
    share = eight.data.train_batch_size * eight.actor_rollout_ref.rollout.n // 8
    assert eight.actor_rollout_ref.rollout.max_num_seqs == 256 >= share


@pytest.mark.parametrize("name", ON_SMALL_CARDS)
def test_a_small_card_trains_an_adapter_and_would_not_hold_all_moments(name):
    config = composed(*RECIPE_OF[name], "1gpu24")
    size, rollout = MODEL_SIZES[HUB_IDS[name]], config.actor_rollout_ref.rollout
    memory = card_memory(size, config, SMALL_CARD_GIB)
    assert adapter_parameters(size, config) < size.parameters / 50
    whole = memory.cache_tokens // (config.data.max_prompt_length + config.data.max_response_length)
    assert rollout.max_num_seqs == whole // 16 * 16
    # TeleLogs' longest response fits into the tokens at once, too.
    assert tokens_at_once(config) >= 6144


def test_the_cards_of_a_machine_share_one_copy():
    for hardware, cards in (("1gpu", 1), ("8gpu", 8), ("2x8gpu", 8)):
        config = composed("countdown3-7b", (), hardware)
        assert cards_a_copy(config) == cards
    sizes = (config.actor_rollout_ref.ref.fsdp_config.fsdp_size, config.critic.fsdp.fsdp_size)
    assert sizes == (8, 8)


def batch_row(task):
    """One line of the README's table of batches."""
    config = composed(f"{task}-7b", (), "8gpu")
    prompts, n = config.data.train_batch_size, config.actor_rollout_ref.rollout.n
    mini = config.actor_rollout_ref.actor.ppo_mini_batch_size
    steps = config.trainer.total_training_steps
    tokens = config.data.max_prompt_length + config.data.max_response_length
    shares = " / ".join(str(mini * n // gpus) for gpus in (1, 8, 16))
    return (
        f"| {task} | {prompts} x {n} = {prompts * n} | {mini} x {n} = {mini * n} | "
        f"{prompts // mini} | {shares} | {config.data.max_prompt_length} + "
        f"{config.data.max_response_length} = {tokens} | {steps} | {steps * prompts // mini} |"
    )


def readme_rows():
    yield from (batch_row(task) for task in ("countdown3", "countdown4", "telelogs"))
    yield from (memory_row(m, h) for m in HUB_IDS for h in ("1gpu", "8gpu", "2x8gpu"))
    yield from (memory_row(name, "1gpu24") for name in ON_SMALL_CARDS)


def test_the_readme_states_the_batches_and_the_memory_of_these_recipes():
    lines = (recipes_directory().parent / "docs" / "pages" / "recipes.md").read_text().splitlines()
    missing = [row for row in readme_rows() if row not in lines]
    assert not missing, "docs/pages/recipes.md lacks:\n" + "\n".join(missing)


def test_training_sees_every_countdown_puzzle_once_and_telelogs_as_often_as_its_paper():
    countdown = composed("countdown3-7b", (), "8gpu")
    prompts = countdown.trainer.total_training_steps * countdown.data.train_batch_size
    assert prompts == countdown.prepare.data.arguments.train_size
    telelogs = composed("telelogs-7b", (), "8gpu")
    prompts = telelogs.trainer.total_training_steps * telelogs.data.train_batch_size
    assert math.isclose(prompts, 10 * 2400)
