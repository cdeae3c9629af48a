"""Agent loops with tools on the tiny tokenizer, against a server that says what a test scripts."""

from functools import lru_cache
from types import SimpleNamespace

from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.workers.rollout.replica import TokenOutput

from data_prep.policies.tokenizer import build_tokenizer

QUESTION = [{"role": "user", "content": "3 7 2 = 8"}]


@lru_cache
def tokenizer():
    return build_tokenizer()


def text_of(ids):
    return tokenizer().decode(ids)


class Server:
    """Answers every request with what `script(prompt text, request)` returns.

    That is a text, or a text and the log-probability of each of its tokens.
    """

    def __init__(self, script):
        self.script = script
        self.requests = []

    async def generate(self, request_id, *, prompt_ids, sampling_params, **media):
        request = SimpleNamespace(
            id=request_id, prompt=text_of(prompt_ids), sampling=dict(sampling_params)
        )
        self.requests.append(request)
        answer = self.script(request.prompt, request)
        text, log_prob = answer if isinstance(answer, tuple) else (answer, -0.5)
        ids = [*tokenizer().encode(text, add_special_tokens=False), tokenizer().eos_token_id]
        return TokenOutput(
            token_ids=ids,
            log_probs=[log_prob] * len(ids),
            stop_reason="completed",
            extra_fields={"global_steps": 1, "min_global_steps": 1, "max_global_steps": 1},
        )


def make_loop(kind, server, *, turns=4, prompt=64, response=256, form="last_line", custom=None):
    multi_turn = {
        "max_user_turns": None,
        "max_assistant_turns": turns,
        "max_parallel_calls": 1,
        "max_tool_response_length": 256,
        "tool_response_truncate_side": "middle",
        "format": form,
    }
    rollout = {
        "multi_turn": multi_turn,
        "prompt_length": prompt,
        "response_length": response,
        "full_determinism": False,
        "seed": 0,
        "custom": custom or {},
    }
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "data": {}})
    return kind(
        trainer_config=DictConfigWrap(config),
        server_manager=server,
        tokenizer=tokenizer(),
        processor=None,
        hf_model_type="qwen2",
        dataset_cls=None,
        data_config=DictConfigWrap(config.data),
        tools=None,
    )


def columns(session=0, uid="u"):
    """What the worker gives a loop of a prompt."""
    return {
        "raw_prompt": QUESTION,
        "global_steps": 1,
        "index": 0,
        "session_id": session,
        "uid": uid,
    }
