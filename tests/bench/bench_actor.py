"""The actor of `hardware=cpu` against a plain loop: `python tests/bench/bench_actor.py MODEL`.

MODEL is a folder in Hugging Face format, such as SmolLM2-135M's. verl's engine, of vendor `hpo` as
the recipes select it, and a loop of plain PyTorch score the same 32 responses (log-probabilities
and entropies) and then update on them, in float32 and in turns in one process, so that other work
on the machine meets both: only the ratios mean something. Exits with 1 if a limit is missed.
"""

import argparse
import os
import statistics
import sys
import time
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

RESPONSES, TOKENS, LIMIT = 32, 64, 1.3
# Of model=smollm2-135m.
TOKENS_AT_ONCE = 4096
# Rows that the plain loop takes at once; they are sorted by length.
ROWS = 16


def make_engine(model):
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ.update(VERL_ENGINE_VENDOR="hpo", VERL_PLATFORM="cpu")
    import verl  # noqa: F401
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=HFModelConfig(
            path=model, load_tokenizer=False, use_remove_padding=False,
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", use_torch_compile=False, dtype="float32",
            mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32"},
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-6, total_training_steps=100),
        checkpoint_config=CheckpointConfig(),
    )  # fmt: skip
    engine.initialize()
    return engine


def make_rows(vocabulary):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 201, (RESPONSES,), generator=generator).tolist()
    return [
        (
            torch.randint(vocabulary, (length + TOKENS,), generator=generator),
            length,
            1.0 if index % 4 == 0 else -0.3,
        )
        for index, length in enumerate(lengths)
    ]


def for_verl(rows, *, entropy):
    from verl.utils import tensordict_utils as tu

    def nested(tensors):
        return torch.nested.as_nested_tensor(list(tensors), layout=torch.jagged)

    ones = torch.ones(TOKENS, dtype=torch.long)
    return tu.get_tensordict(
        {
            "prompts": nested(ids[:length] for ids, length, _ in rows),
            "responses": nested(ids[length:] for ids, length, _ in rows),
            "input_ids": nested(ids for ids, _, _ in rows),
            "position_ids": nested(torch.arange(len(ids)) for ids, _, _ in rows),
            "loss_mask": nested(
                torch.cat([torch.zeros(length, dtype=torch.long), ones]) for _, length, _ in rows
            ),
            "response_mask": nested(ones for _ in rows),
            "old_log_probs": nested(torch.full((TOKENS,), -10.0) for _ in rows),
            "advantages": nested(torch.full((TOKENS,), value) for _, _, value in rows),
        },
        non_tensor_dict={
            "temperature": 1.0,
            "global_batch_size": len(rows),
            "use_dynamic_bsz": True,
            "max_token_len_per_gpu": TOKENS_AT_ONCE,
            "use_remove_padding": False,
            "use_fused_kernels": False,
            "calculate_entropy": entropy,
        },
    )


def plain_log_probs(model, part):
    """Log-probabilities of the responses, and all logits; nothing is left out or shared."""
    width = max(len(ids) for ids, _, _ in part)
    padded = torch.zeros(len(part), width, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, (ids, _, _) in enumerate(part):
        padded[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
    log_probs = -cross_entropy(logits[:, :-1].transpose(1, 2), padded[:, 1:], reduction="none")
    return [
        (row[length - 1 : length - 1 + TOKENS], value)
        for row, (_, length, value) in zip(log_probs, part, strict=True)
    ], logits


def plain_score(model, parts):
    with torch.no_grad():
        for part in parts:
            _, logits = plain_log_probs(model, part)
            share = logits.softmax(-1)
            logits.logsumexp(-1) - (share * logits).sum(-1)


def plain_update(model, optimizer, parts):
    optimizer.zero_grad()
    for part in parts:
        rows, _ = plain_log_probs(model, part)
        loss = 0
        for log_probs, value in rows:
            ratio = (log_probs + 10.0).exp()
            loss -= torch.min(ratio * value, ratio.clamp(0.8, 1.2) * value).sum()
        (loss / (RESPONSES * TOKENS)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    engine = make_engine(options.model)
    from verl.workers.config import ActorConfig, PolicyLossConfig

    from hpo_verl.verl_plugin.engine.loss_statistics import loss_with_statistics

    actor = ActorConfig(
        strategy="fsdp2", rollout_n=4, ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode="vanilla"),
    )  # fmt: skip
    loss = partial(loss_with_statistics, config=actor)
    plain = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-6)
    rows = make_rows(plain.config.vocab_size)
    ordered = sorted(rows, key=lambda row: len(row[0]))
    parts = [ordered[at : at + ROWS] for at in range(0, len(ordered), ROWS)]

    def score():
        with engine.eval_mode():
            engine.infer_batch(for_verl(rows, entropy=True), loss_function=None)

    def update():
        with engine.train_mode():
            engine.train_batch(for_verl(rows, entropy=False), loss_function=loss)

    missed = 0
    for name, ours, theirs in (
        ("scoring", score, partial(plain_score, plain, parts)),
        ("update", update, partial(plain_update, plain, optimizer, parts)),
    ):
        times = {"verl": [], "plain": []}
        for _ in range(options.rounds):
            begin = time.perf_counter()
            ours()
            middle = time.perf_counter()
            theirs()
            times["verl"].append(middle - begin)
            times["plain"].append(time.perf_counter() - middle)
        ratio = statistics.median(times["verl"]) / statistics.median(times["plain"])
        missed += ratio > LIMIT
        print(
            f"{name}, {options.threads} threads: {ratio:.2f} times the plain loop's seconds, "
            f"at most {LIMIT}; {times}",
            flush=True,
        )
    dist.destroy_process_group()
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
