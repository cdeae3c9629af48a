"""Small random policies for the lab's tests."""

from types import SimpleNamespace

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from data_prep.policies.folder import save_policy
from data_prep.policies.tokenizer import build_tokenizer
from hpo_verl.algorithms.registry import ALGORITHMS
from hpo_verl.lab import warm_start
from hpo_verl.lab.policy import Policy, Responses
from hpo_verl.lab.rollout import Rollout
from hpo_verl.lab.settings import read_study, warm_start_versions

# The lab gives no response its beginning, a loss nothing of the model's head, and compares no
# gradients of single rewards.
IN_LAB = {
    name: one
    for name, one in ALGORITHMS.items()
    if one.estimator.openings is None
    and one.estimator.updated is None
    and one.loss.head_fields is None
}
END, PAD = 0, 1
QUICK = [
    "seeds=2", "training.steps=2", "training.prompts_per_step=4", "training.mini_batches=2",
    "training.responses_per_prompt=4", "training.questions=16", "evaluation.questions=8",
    "evaluation.every=1", "evaluation.sampled_questions=8",
]  # fmt: skip


def random_model(vocabulary=32, seed=0, std=0.3):
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model


def random_policy(vocabulary=32, seed=0):
    model = random_model(vocabulary, seed)
    model.generation_config.eos_token_id = END
    return Policy(model, SimpleNamespace(eos_token_id=END, pad_token_id=PAD))


def tiny_random_policy(seed=0):
    """A random policy with the tiny policy's tokenizer."""
    tokenizer = build_tokenizer()
    model = random_model(len(tokenizer), seed, std=0.1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return Policy(model, tokenizer)


def keep_warm_starts(study, seed=0):
    """Put a random policy of a seed where the cells of a study look for their warm starts."""
    policy = tiny_random_policy(seed)
    facts = {"versions": warm_start_versions(), "success": 0.05}
    for folder in {warm_start.policy_folder(cell) for cell in study.cells()}:
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_policy(folder, policy.model, policy.tokenizer, warm_start.FACTS, facts)


def quick_study(name="rates", *overrides, only=()):
    """A study of few and short runs; `rates` with a single learning rate, if none is given."""
    given = ["training.learning_rate=3e-4", *overrides] if name == "rates" else overrides
    return read_study(name, [*QUICK, *given], only)


def random_rollout(policy, rewards, width=6):
    """Random responses of several lengths with these rewards, four to each prompt."""
    generator = torch.Generator().manual_seed(0)
    count = len(rewards)
    groups = [tuple(torch.randint(2, 32, (n,), generator=generator).tolist()) for n in (3, 5, 4, 2)]
    prompts = [groups[i // 4] for i in range(count)]
    mask = torch.arange(width) < torch.randint(1, width + 1, (count, 1), generator=generator)
    tokens = torch.randint(2, 32, mask.shape, generator=generator)
    with torch.no_grad():
        log_probs = policy.log_probs(prompts, tokens, mask)
    numbers = {"score": torch.tensor(rewards, dtype=torch.float32)}
    return Rollout(torch.arange(count), prompts, Responses(tokens, mask, log_probs), numbers)


def surrogate(policy, rollout, advantages, rows):
    """GRPO's loss over rows of a batch, by its definition and unclipped, with its graph.

    The mean over all responses of the batch of the mean over a response's tokens.
    """
    tokens, mask, old = rollout.responses
    log_prob = policy.log_probs(rollout.prompts, tokens, mask)
    ratio = (log_prob - old).exp()
    per_response = (-ratio * advantages * mask).sum(dim=-1) / mask.sum(dim=-1)
    return per_response[rows].sum() / len(mask)
