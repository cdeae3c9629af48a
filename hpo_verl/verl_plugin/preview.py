"""How many tokens verl would make of a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf


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
