"""Forward passes of a Qwen2 policy, arranged for many short responses to few prompts.

transformers' own forward pass computes a prompt once per response and every padding token like
a real one; at the size of the lab's policy that is most of the work. Here a prompt is
computed once for its whole group, and the layers see live tokens only, in one row: what needs
the shape `[batch, time]`, the attention, gets it and gives it back. Weights and values are those of
`Qwen2ForCausalLM`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from hpo_verl.errors import DataError


class Prompts(NamedTuple):
    """Prompts, padded on the right.

    Attributes:
        tokens: `[prompts, longest]` int64.
        lengths: `[prompts]` int64.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor


class PromptState(NamedTuple):
    """What a prompt leaves for its responses.

    Attributes:
        keys: Of every layer, `[prompts, kv_heads, longest, head_dim]`, rotated.
        values: The same shape.
        hidden: Last layer's output at the last token of every prompt, `[prompts, hidden]`.
        lengths: `[prompts]` int64.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    hidden: torch.Tensor
    lengths: torch.Tensor

    def repeated(self, counts: int) -> PromptState:
        """Return the state with every prompt `counts` times in a row."""

        def repeat(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.repeat_interleave(counts, dim=0)

        return PromptState(
            [repeat(keys) for keys in self.keys],
            [repeat(values) for values in self.values],
            repeat(self.hidden),
            repeat(self.lengths),
        )


class Policy:
    """A Qwen2 model and its tokenizer.

    Args:
        model: In evaluation mode, float32; its parameters are used in place.
        tokenizer: With an end-of-sequence and a padding token.
    """

    def __init__(self, model: Qwen2ForCausalLM, tokenizer: Any) -> None:
        config = model.config
        self.model = model
        self.tokenizer = tokenizer
        self.device = model.device
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads or self.heads
        self.head_dim = config.hidden_size // self.heads
        self.eps: float = config.rms_norm_eps
        self.end: int = tokenizer.eos_token_id
        self.pad: int = tokenizer.pad_token_id
        positions = torch.arange(config.max_position_embeddings, device=self.device)[None]
        cosine, sine = model.model.rotary_emb(model.lm_head.weight, positions)
        self._rotation = (cosine[0, :, None], sine[0, :, None])

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> Policy:
        """Load a policy in Hugging Face format.

        Raises:
            DataError: The folder holds no Qwen2 policy.
        """
        # A bar for each of hundreds of small files tells nobody anything.
        disable_progress_bar()
        try:
            model = Qwen2ForCausalLM.from_pretrained(
                str(folder), dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: holds no policy: {str(error).splitlines()[0]}") from error
        return cls(model.to(device).eval(), tokenizer)  # pyright: ignore[reportArgumentType]

    def encode(self, conversations: list[list[dict[str, str]]]) -> Prompts:
        """Put conversations into tokens with the chat template, ready for the response."""
        rows = [
            list(
                self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=False
                )
            )
            for messages in conversations
        ]
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        tokens = torch.full((len(rows), int(lengths.max())), self.pad)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        return Prompts(tokens.to(self.device), lengths)

    def read_prompts(self, prompts: Prompts) -> PromptState:
        """Compute the prompts once, for all their responses."""
        tokens, lengths = prompts
        count, longest = tokens.shape
        times = torch.arange(longest, device=self.device)
        live = times < lengths[:, None]
        causal = times[:, None] >= times
        x = self._embed(tokens[live])
        rotation = self._rotate_at(times.expand(count, longest)[live])
        keys, values = [], []
        for layer in self._layers():
            q, k, v = self._project(layer, x, rotation)
            padded_k, padded_v = _pad(k, live), _pad(v, live)
            attended = self._attend(_pad(q, live), padded_k, padded_v, causal)
            x = self._finish(layer, x, attended[live])
            keys.append(padded_k)
            values.append(padded_v)
        last = lengths.cumsum(0) - 1
        return PromptState(keys, values, x[last], lengths)

    def next_token_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the token after each hidden state, `[tokens, vocabulary]`."""
        normed = functional.rms_norm(
            hidden, hidden.shape[-1:], self.model.model.norm.weight, self.eps
        )
        return self.model.lm_head(normed)

    def response_log_probs(
        self, prompts: Prompts, responses: torch.Tensor, response_mask: torch.Tensor
    ) -> torch.Tensor:
        """Log-probabilities of the responses' tokens under the policy.

        Args:
            prompts: Each has the same number of responses.
            responses: `[prompts * group, time]` int64, a prompt's responses in a row.
            response_mask: Bool, same shape; true from the start of a response to its end.

        Returns:
            `[prompts * group, time]`, nats; 0 where the mask is false.
        """
        group = len(responses) // len(prompts.lengths)
        state = self.read_prompts(prompts).repeated(group)
        # The last token of a response predicts nothing: time t reads token t - 1.
        live = response_mask[:, 1:]
        rows, time = live.shape
        times = torch.arange(time, device=self.device)
        x = self._embed(responses[:, :-1][live])
        rotation = self._rotate_at((state.lengths[:, None] + times)[live])
        prompt_length = state.keys[0].shape[2]
        visible = torch.ones((rows, 1, time, prompt_length + time), dtype=torch.bool)
        visible = visible.to(self.device)
        before = torch.arange(prompt_length, device=self.device) < state.lengths[:, None]
        visible[..., :prompt_length] = before[:, None, None]
        visible[..., prompt_length:] = times[:, None] >= times
        for i, layer in enumerate(self._layers()):
            q, k, v = self._project(layer, x, rotation)
            keys = torch.cat([state.keys[i], _pad(k, live)], dim=2)
            values = torch.cat([state.values[i], _pad(v, live)], dim=2)
            x = self._finish(layer, x, self._attend(_pad(q, live), keys, values, visible)[live])
        first = response_mask[:, 0]
        logits = self.next_token_logits(torch.cat([state.hidden[first], x]))
        targets = torch.cat([responses[:, 0][first], responses[:, 1:][live]])
        flat = -functional.cross_entropy(logits, targets, reduction="none")
        where = torch.cat([first.nonzero() * responses.shape[1], _flat_places(live)])
        result = flat.new_zeros(responses.numel())
        return result.index_copy(0, where.squeeze(1), flat).view_as(responses)

    def decode(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        time: int,
        visible: torch.Tensor | None,
    ) -> torch.Tensor:
        """Read one more token of every row and extend the cache.

        Args:
            tokens: `[rows]` int64.
            positions: `[rows]` int64, place of each token in its own sequence.
            keys: Cache of every layer, `[rows, kv_heads, capacity, head_dim]`; written at `time`.
            values: The same.
            time: Place in the cache.
            visible: Bool, `[rows, 1, 1, time + 1]`; None where all of it is.

        Returns:
            Hidden state after each token, `[rows, hidden]`.
        """
        x = self._embed(tokens)
        rotation = self._rotate_at(positions)
        for i, layer in enumerate(self._layers()):
            q, k, v = self._project(layer, x, rotation)
            keys[i][:, :, time], values[i][:, :, time] = k, v
            seen_keys, seen_values = keys[i][:, :, : time + 1], values[i][:, :, : time + 1]
            attended = self._attend(q[:, :, None], seen_keys, seen_values, visible)
            x = self._finish(layer, x, attended[:, 0])
        return x

    def _layers(self) -> nn.ModuleList:
        return self.model.model.layers

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.embedding(tokens, self.model.model.embed_tokens.weight)

    def _rotate_at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cosine, sine = self._rotation
        return cosine[positions], sine[positions]

    def _project(
        self, layer: Any, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of every token, `[tokens, heads, head_dim]`."""
        attention = layer.self_attn
        normed = functional.rms_norm(x, x.shape[-1:], layer.input_layernorm.weight, self.eps)
        q = attention.q_proj(normed).view(len(x), self.heads, self.head_dim)
        k = attention.k_proj(normed).view(len(x), self.kv_heads, self.head_dim)
        v = attention.v_proj(normed).view(len(x), self.kv_heads, self.head_dim)
        return _rotated(q, rotation), _rotated(k, rotation), v

    def _attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        visible: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of `[rows, heads, time, head_dim]`; returns `[rows, time, hidden]`."""
        attended = functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=visible, enable_gqa=True
        )
        return attended.transpose(1, 2).flatten(2)

    def _finish(self, layer: Any, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output projection and the MLP, each added to the residual stream."""
        x = x + layer.self_attn.o_proj(attended)
        weight = layer.post_attention_layernorm.weight
        return x + layer.mlp(functional.rms_norm(x, x.shape[-1:], weight, self.eps))


def _rotated(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cosine, sine = rotation
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-high, low], dim=-1) * sine


def _pad(x: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Put live tokens `[tokens, heads, dim]` into `[rows, heads, time, dim]`, 0 elsewhere."""
    rows, time = live.shape
    padded = x.new_zeros(rows * time, *x.shape[1:]).index_copy(
        0, live.flatten().nonzero().squeeze(1), x
    )
    return padded.view(rows, time, *x.shape[1:]).transpose(1, 2)


def _flat_places(live: torch.Tensor) -> torch.Tensor:
    """Places of the live inputs' targets in a flattened `[rows, time + 1]`, `[tokens, 1]`."""
    rows, times = live.nonzero(as_tuple=True)
    return (rows * (live.shape[1] + 1) + times + 1)[:, None]
