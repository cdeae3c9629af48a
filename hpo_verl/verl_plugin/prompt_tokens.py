"""The tokenizer and the prompts of a run, as verl's workers make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf


def read_tokenizer(config: DictConfig, model: str) -> Any:
    """The tokenizer as verl's workers read it: from the folder of the model, or another's."""
    from verl.utils import hf_tokenizer

    settings = config.actor_rollout_ref.model
    tokenizer = hf_tokenizer(settings.get("tokenizer_path") or model, trust_remote_code=False)
    if settings.get("custom_chat_template"):
        tokenizer.chat_template = settings.custom_chat_template
    return tokenizer


def prompt_counter(config: DictConfig, tokenizer: Any) -> Callable[[Any], int]:
    """A function that counts the tokens of a prompt as verl's agent loops make them."""
    from verl.utils.tokenizer import normalize_token_ids

    options: Any = OmegaConf.to_container(
        config.data.get("apply_chat_template_kwargs") or OmegaConf.create({}), resolve=True
    )

    def count(messages: Any) -> int:
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, **options
        )
        return len(normalize_token_ids(tokens))

    return count
