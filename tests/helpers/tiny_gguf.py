"""A GGUF with the parts of SmolLM2's, of two small layers and a vocabulary of bytes."""

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from transformers.convert_slow_tokenizer import bytes_to_unicode

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KEY_VALUE_HEADS = 64, 96, 2, 4, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Two spaces and two line feeds are a token each.
MERGES = ("Ġ Ġ", "Ċ Ċ", "h i")
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = (*SPECIAL, *bytes_to_unicode().values(), *(pair.replace(" ", "") for pair in MERGES))


def tensors():
    """Name and float32 values of every tensor."""
    draw, width = np.random.default_rng(0), HIDDEN // HEADS * KEY_VALUE_HEADS
    shapes = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (width, HIDDEN), "attn_v": (width, HIDDEN)}
    shapes |= {"attn_output": (HIDDEN, HIDDEN), "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
    shapes |= dict.fromkeys(("ffn_gate", "ffn_up"), (INTERMEDIATE, HIDDEN))
    shapes["ffn_down"] = (HIDDEN, INTERMEDIATE)
    named = {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()}
    named |= {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    return {
        f"{name}.weight": draw.normal(0, 0.1, shape).astype(np.float32)
        for name, shape in named.items()
    }


def write_gguf(
    path, architecture="llama", pre="smollm", eos=2, pad=2, template=TEMPLATE, weights=True
):
    """Write such a file; what is None is left out."""
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    kinds = [TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in TOKENS]
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_unk_token_id(0)
    if eos is not None:
        writer.add_eos_token_id(eos)
    if pad is not None:
        writer.add_pad_token_id(pad)
    if template is not None:
        writer.add_chat_template(template)
    for name, values in tensors().items() if weights else ():
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
