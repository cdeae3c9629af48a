"""The rollout `hf` against `transformers.generate`: `python tests/bench/bench_generation.py MODEL`.

MODEL is a folder in Hugging Face format, such as SmolLM2-135M's. Both continue 64 random prompts of
20 to 200 tokens by 64 tokens, in float32 and with the same number of threads, in turns in one
process, so that other work on the machine meets both: only the ratios mean something. Then the
prompts are those of eight groups of 8 responses. Exits with 1 if a limit is missed, or if a
response is another in other company.
"""

import argparse
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM

from hpo_verl.verl_plugin.cpu.generation import BatchGenerator, GenerationRequest

PROMPTS, GROUP, TOKENS = 64, 8, 64


def random_prompts(count, vocabulary):
    generator = torch.Generator().manual_seed(count)
    return [
        tuple(torch.randint(vocabulary, (int(length),), generator=generator).tolist())
        for length in torch.randint(20, 201, (count,), generator=generator)
    ]


def by_transformers(model, prompts, threads):
    torch.set_num_threads(threads)
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        pad_token_id=0,
    )
    torch.set_num_threads(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    plain, ours = (
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        for _ in range(2)
    )
    generator = BatchGenerator(ours, [], 0, block_rows=256, num_threads=options.threads)
    single = random_prompts(PROMPTS, plain.config.vocab_size)
    grouped = [
        p for p in random_prompts(PROMPTS // GROUP, plain.config.vocab_size) for _ in range(8)
    ]
    missed = 0
    for name, prompts, limit in (("64 prompts", single, 1.0), ("8 groups of 8", grouped, 2.0)):
        requests = [GenerationRequest(prompt, i, TOKENS) for i, prompt in enumerate(prompts)]
        times = {"transformers": [], "hf": []}
        for _ in range(options.rounds):
            begin = time.perf_counter()
            by_transformers(plain, prompts, options.threads)
            middle = time.perf_counter()
            results = generator.generate(requests)
            times["transformers"].append(middle - begin)
            times["hf"].append(time.perf_counter() - middle)
        ratio = statistics.median(times["transformers"]) / statistics.median(times["hf"])
        again = generator.generate([requests[i] for i in (40, 3)])
        same = again == [results[40], results[3]]
        missed += ratio < limit or not same
        print(
            f"{name}, {options.threads} threads: {ratio:.2f} times transformers' tokens/s, "
            f"at least {limit}; same in other company: {same}; seconds {times}",
            flush=True,
        )
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
