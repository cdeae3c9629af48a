"""What verl would make of a row of data: its tokens and its reward."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

# What verl's reward managers add to a row's `extra_info`.
MANAGER_INFO = {"num_turns": 2, "rollout_reward_scores": {}}


def reward_function(config: DictConfig) -> Callable[[Mapping[str, Any], str], Any]:
    """The reward function of a run, called as verl's reward managers call it.

    Args:
        config: verl's whole configuration.

    Returns:
        A function of a row and a response; it gives a number or a dictionary with `score`.
    """
    from verl.trainer.ppo.reward import get_custom_reward_fn
    from verl.utils.reward_score import default_compute_score

    compute_score = get_custom_reward_fn(config) or default_compute_score

    def score(row: Mapping[str, Any], response: str) -> Any:
        result = compute_score(
            data_source=row["data_source"],
            solution_str=response,
            ground_truth=row["reward_model"]["ground_truth"],
            extra_info={**(row.get("extra_info") or {}), **MANAGER_INFO},
        )
        return asyncio.run(result) if inspect.iscoroutine(result) else result

    return score


def prompt_counter(config: DictConfig, model: str) -> Callable[[Any], int]:
    """A function that counts the tokens of a prompt as verl's agent loops make them.

    Args:
        config: verl's whole configuration.
        model: folder to read the tokenizer from.
    """
    from verl.utils import hf_tokenizer
    from verl.utils.tokenizer import normalize_token_ids

    settings = config.actor_rollout_ref.model
    tokenizer = hf_tokenizer(settings.get("tokenizer_path") or model, trust_remote_code=False)
    if settings.get("custom_chat_template"):
        tokenizer.chat_template = settings.custom_chat_template
    options: Any = OmegaConf.to_container(
        config.data.get("apply_chat_template_kwargs") or OmegaConf.create({}), resolve=True
    )

    def count(messages: Any) -> int:
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, **options
        )
        return len(normalize_token_ids(tokens))

    return count
