"""The figures in recipes/README.md are those of the recipes."""

import math

from composed_recipes import composed

from hpo_verl.launch.recipes import recipes_directory

# What config.json of each model says: parameters, hidden size, intermediate
# size, layers, key-value heads of 128, vocabulary, matrices of vocabulary size.
MODELS = {
    "qwen2.5-1.5b": (1_543_714_304, 1536, 8960, 28, 2, 151_936, 1),
    "qwen2.5-3b": (3_085_938_688, 2048, 11_008, 36, 2, 151_936, 1),
    "llama3.2-3b": (3_212_749_824, 3072, 8192, 28, 8, 128_256, 1),
    "qwen2.5-7b": (7_615_616_512, 3584, 18_944, 28, 4, 152_064, 2),
}
RECIPE_OF = {
    "qwen2.5-1.5b": ("countdown3-1.5b", ()),
    "qwen2.5-3b": ("countdown3-3b", ()),
    "llama3.2-3b": ("countdown3-3b", ("model=llama3.2-3b",)),
    "qwen2.5-7b": ("countdown3-7b", ()),
}
GIB = 1 << 30


def test_parameter_counts_follow_from_the_dimensions():
    for name, (parameters, hidden, middle, layers, kv, vocabulary, matrices) in MODELS.items():
        width = kv * 128
        bias = 0 if name.startswith("llama") else hidden + 2 * width
        layer = 2 * hidden * hidden + 2 * hidden * width + bias + 3 * hidden * middle + 2 * hidden
        assert parameters == layers * layer + hidden + matrices * vocabulary * hidden


def memory_row(name, hardware):
    """One line of the README's memory table, in GiB a card, by the arithmetic it states."""
    parameters, hidden, middle, layers, kv, vocabulary, matrices = MODELS[name]
    config = composed(*RECIPE_OF[name], hardware)
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    gpus = config.trainer.nnodes * config.trainer.n_gpus_per_node
    tokens = actor.ppo_max_token_len_per_gpu
    host = actor.fsdp_config.offload_policy
    away = host or (actor.fsdp_config.param_offload and actor.fsdp_config.optimizer_offload)
    weights, gradients, adam = (0 if host else n * parameters / gpus / GIB for n in (4, 4, 8))
    layer = (parameters - matrices * vocabulary * hidden) / layers
    gathered = 2 * 2 * (matrices * vocabulary * hidden + layer) / GIB
    activations = 2 * tokens * (hidden * layers + 3 * middle + 8 * hidden) / GIB
    logits = 2 * 2 * tokens * vocabulary / GIB
    update = weights + gradients + adam + gathered + activations + logits + 4
    resident = 0 if away else weights + adam
    sampling = 80 * rollout.gpu_memory_utilization + resident + 4
    assert max(update, sampling) < 80
    cache = 80 * rollout.gpu_memory_utilization - 2 * parameters / GIB - 4
    per_token = 2 * layers * kv * 128 * 2
    millions = cache * GIB / per_token / 1e6
    cells = (weights, gradients, adam, gathered, activations, logits, update, resident, sampling)
    figures = " | ".join(f"{value:.1f}" for value in cells)
    return f"| {name} | {hardware} | {tokens} | {figures} | {millions:.1f} |"


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
    yield from (memory_row(m, h) for m in MODELS for h in ("1gpu", "8gpu", "2x8gpu"))


def test_the_readme_states_the_batches_and_the_memory_of_these_recipes():
    lines = (recipes_directory() / "README.md").read_text().splitlines()
    missing = [row for row in readme_rows() if row not in lines]
    assert not missing, "recipes/README.md lacks:\n" + "\n".join(missing)


def test_training_sees_every_countdown_puzzle_once_and_telelogs_as_often_as_its_paper():
    countdown = composed("countdown3-7b", (), "8gpu")
    prompts = countdown.trainer.total_training_steps * countdown.data.train_batch_size
    assert prompts == countdown.prepare.data.arguments.train_size
    telelogs = composed("telelogs-7b", (), "8gpu")
    prompts = telelogs.trainer.total_training_steps * telelogs.data.train_batch_size
    assert math.isclose(prompts, 10 * 2400)
