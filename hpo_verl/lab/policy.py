"""A causal language model of Hugging Face: its responses, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from hpo_verl.errors import DataError
from hpo_verl.verl_plugin.cpu.generation import BatchGenerator, GenerationRequest

# Rows of the generator's forward passes.
_BLOCK_ROWS = 256
Prompt = tuple[int, ...]


class Responses(NamedTuple):
    """Sampled responses, `[batch, time]` each."""

    tokens: torch.Tensor  # int64, the padding token after the end
    mask: torch.Tensor  # bool; the end token counts
    log_probs: torch.Tensor  # under the policy that sampled, nats; 0 beyond the end

    def ended(self, ends: Sequence[int]) -> torch.Tensor:
        """Whether each response came to one of the tokens that end one, bool `[batch]`."""
        place = (self.mask.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
        return torch.isin(self.tokens.gather(1, place).squeeze(1), torch.tensor(list(ends)))


class Policy:
    """A causal model in float32, trained in place, and its tokenizer, on the CPU."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        known = model.generation_config.eos_token_id
        ends = known if isinstance(known, list) else [known]
        self.ends = [end for end in ends if end is not None] or [tokenizer.eos_token_id]
        self.pad = self.ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._generator = BatchGenerator(model, self.ends, self.pad, _BLOCK_ROWS)

    @classmethod
    def load(cls, folder: str | Path) -> Policy:
        """Load a folder in Hugging Face format, or raise DataError; no code of it is run."""
        # A bar for each of hundreds of small files tells nobody anything.
        disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: holds no policy: {str(error).splitlines()[0]}") from error
        if tokenizer.chat_template is None:
            raise DataError(f"{folder}: its tokenizer has no chat template")
        return cls(model.eval(), tokenizer)

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        """All that is trained."""
        return list(self.model.parameters())

    def encode(self, messages: list[dict[str, str]]) -> Prompt:
        """Tokens of a conversation, ready for the response."""
        template = self.tokenizer.apply_chat_template
        return tuple(template(messages, add_generation_prompt=True, return_dict=False))

    def sample(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        longest: int,
        temperatures: Sequence[float] | None = None,
    ) -> Responses:
        """Draw a response of at most `longest` tokens for every prompt; without temperatures at 1.

        A response depends on its prompt, its seed and its temperature alone.
        """
        rows = zip(prompts, seeds, temperatures or [1.0] * len(prompts), strict=True)
        results = self._generator.generate(
            [GenerationRequest(p, s, longest, temperature) for p, s, temperature in rows]
        )
        lengths = torch.tensor([len(result.token_ids) for result in results])
        mask = torch.arange(longest) < lengths[:, None]
        tokens = torch.full(mask.shape, self.pad)
        tokens[mask] = torch.tensor([i for result in results for i in result.token_ids])
        log_probs = torch.zeros(mask.shape)
        log_probs[mask] = torch.tensor([p for result in results for p in result.log_probs])
        return Responses(tokens, mask, log_probs)

    def decode(self, responses: Responses) -> list[str]:
        """Texts of responses."""
        return self.tokenizer.batch_decode(responses.tokens, skip_special_tokens=True)

    def log_probs(
        self, prompts: Sequence[Prompt], tokens: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Log-probabilities `[batch, time]` of the responses' tokens in nats, with a graph.

        Args:
            prompts: One for every response.
            tokens: `[batch, time]` int64.
            mask: Bool, `[batch, time]`; true from the start of a response to its end.
        """
        log_prob, _ = self.scored(prompts, tokens, mask, with_entropy=False)
        return log_prob

    def scored(
        self,
        prompts: Sequence[Prompt],
        tokens: torch.Tensor,
        mask: torch.Tensor,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`log_probs`, and on demand the entropies of the same pass, with their graphs."""
        logits = self._logits(prompts, tokens, mask)
        live = -functional.cross_entropy(logits, tokens[mask], reduction="none")
        empty = live.new_zeros(mask.shape)
        log_prob = empty.masked_scatter(mask, live)
        if not with_entropy:
            return log_prob, None
        spread = logits.logsumexp(dim=-1) - (logits.softmax(dim=-1) * logits).sum(dim=-1)
        return log_prob, empty.masked_scatter(mask, spread)

    @torch.no_grad()
    def entropy(
        self, prompts: Sequence[Prompt], tokens: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Entropy of the distribution that each token is drawn from; shapes as of `log_probs`."""
        log_p = self._logits(prompts, tokens, mask).log_softmax(dim=-1)
        live = -(log_p.exp() * log_p).nansum(dim=-1)
        return live.new_zeros(mask.shape).masked_scatter(mask, live)

    def _logits(
        self, prompts: Sequence[Prompt], tokens: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Float32 logits before every live token, `[live tokens, vocabulary]`."""
        longest, (rows, time) = max(map(len, prompts)), tokens.shape
        # Prompts end, and responses begin, at the same place.
        before = torch.full((rows, longest), self.pad)
        seen = torch.zeros((rows, longest), dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            before[i, longest - len(prompt) :] = torch.tensor(prompt)
            seen[i, longest - len(prompt) :] = True
        attention = torch.cat([seen, mask], dim=1).long()
        output = self.model(
            input_ids=torch.cat([before, tokens.masked_fill(~mask, self.pad)], dim=1),
            attention_mask=attention,
            position_ids=(attention.cumsum(dim=-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=time + 1,
        )
        return output.logits[:, :-1][mask].float()
