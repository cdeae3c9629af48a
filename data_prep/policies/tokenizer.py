r"""Tokenizer of the tiny policy: byte-level BPE in Qwen2's form.

transformers builds a `Qwen2Tokenizer` for every checkpoint whose config says Qwen2, whatever was
saved beside it. Every byte is in the vocabulary, so that any text can be encoded. What answers
hold often is an ordinary added token, which decoding never strips: the answer tags, `\boxed{`,
numbers of two digits, and the parts of a step such as `-2` and `=15`.
"""

from __future__ import annotations

import re

from transformers import AddedToken, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"
BOX_OPEN = "\\boxed{"
MAX_NUMBER = 15
MAX_VALUE = 3 * MAX_NUMBER
# Words of the chat template, and the " =" of a prompt in byte letters.
_WORDS = ("system", "user", "assistant", "Ġ=")
_STEP_PART = re.compile(r"([-+*/=])?([0-9]{1,2})")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer() -> Qwen2Tokenizer:
    """Return the tiny policy's tokenizer; `len(tokenizer)` is the vocabulary size.

    `<|im_end|>` ends a response, `<|endoftext|>` pads.
    """
    letters = bytes_to_unicode()
    vocabulary = {letters[byte]: byte for byte in range(256)}
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,  # pyright: ignore[reportArgumentType] - pairs are what it passes on
        unk_token=None,  # pyright: ignore[reportArgumentType] - every byte is known
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[TURN_START],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    ordinary = [
        ANSWER_OPEN,
        ANSWER_CLOSE,
        BOX_OPEN,
        *(str(number) for number in range(10, MAX_VALUE + 1)),
        *(f"{operator}{number}" for operator in "+-*/" for number in range(1, MAX_NUMBER + 1)),
        *(f"={value}" for value in range(MAX_VALUE + 1)),
    ]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in ordinary])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def step_part(token: str) -> tuple[str, int] | None:
    """Split a token such as `*3` into its mark and its number; None for any other token."""
    match = _STEP_PART.fullmatch(token)
    return (match[1] or "", int(match[2])) if match else None
