"""Runs a worker of tests/contract on two ranks of verl's engine, without Ray."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from flash_attention import with_flash_attention
from transformers import Qwen2Config, Qwen2ForCausalLM

WORKERS = Path(__file__).parents[1] / "contract"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def save_tiny_model(folder):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=True, architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)


def run_ranks(worker, folder, *ports):
    """Run `worker RANK FOLDER PORT...` on two ranks to the end; both must succeed."""
    environment = with_flash_attention(os.environ) | {
        "VERL_PLATFORM": "cpu",
        "OMP_NUM_THREADS": "1",
        "VERL_ENGINE_VENDOR": "hpo",
    }
    ranks = []
    for rank in (0, 1):
        with (folder / f"rank{rank}.log").open("w") as log:
            arguments = [str(WORKERS / worker), str(rank), str(folder), *map(str, ports)]
            ranks.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        deadline = time.monotonic() + 300
        # A rank that fails leaves the other one waiting for it.
        while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
            if any(process.poll() for process in ranks):
                break
            time.sleep(0.2)
    finally:
        for process in ranks:
            process.kill()
    codes = [process.wait() for process in ranks]
    logs = "\n".join((folder / f"rank{rank}.log").read_text()[-2000:] for rank in (0, 1))
    assert codes == [0, 0], logs
