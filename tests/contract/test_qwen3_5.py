"""Qwen3.5 in verl's engine: its layers without attention keep packed sequences apart."""

import pytest
import torch
from composed_recipes import composed
from engine_ranks import free_port, run_ranks
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

LINEAR = {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"}
DENSE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def tiny_model():
    torch.manual_seed(0)
    config = Qwen3_5Config(
        text_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4,
            "linear_value_head_dim": 4, "vocab_size": 40, "tie_word_embeddings": True,
            # Large enough that a layer's output depends on what went before.
            "initializer_range": 0.5,
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2,
            "out_hidden_size": 16, "num_position_embeddings": 16,
        },
        image_token_id=36, video_token_id=37, vision_start_token_id=38, vision_end_token_id=39,
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3_5ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_5")
    tiny_model().save_pretrained(folder)
    run_ranks("qwen3_5_worker.py", folder, free_port())
    return folder


@pytest.fixture(scope="module", params=[0, 1])
def found(folder, request):
    # Written by the worker, in a folder of this test.
    return torch.load(folder / f"found{request.param}.pt", weights_only=True)


def farthest(found, how):
    """The largest difference of a row's log-probabilities from transformers' own, by row."""
    model, largest = tiny_model(), []
    for ids, row in zip(found["rows"], found[how]["log_probs"], strict=True):
        tokens = torch.tensor(ids)
        with torch.no_grad():
            logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        expected = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
        # The last one is of no token.
        largest.append(float((row[:-1] - expected).abs().max()))
    return largest


@pytest.mark.parametrize("how", ["packed", "alone", "positions"])
def test_every_row_gets_the_log_probabilities_of_transformers(found, how):
    assert max(farthest(found, how)) < 1e-5


def test_without_the_kernel_packed_rows_would_mix_which_is_why_the_doctor_wants_it(found):
    first, *others = farthest(found, "without kernel")
    assert first < 1e-5
    assert min(others) > 1e-3


def test_an_adapter_is_on_every_layer_that_the_doctor_counts_and_not_on_the_tower(found):
    model = composed("countdown3-1.5b", ("model=qwen3.5-0.8b",), "1gpu24").actor_rollout_ref.model
    assert model.exclude_modules == ".*visual.*"
    names = found["adapter"]
    assert not [name for name in names if "visual" in name]
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names} == LINEAR | DENSE
