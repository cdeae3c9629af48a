import json
import os
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.command import run
from data_prep.countdown import __main__ as countdown
from data_prep.countdown.puzzles import puzzles_digest, read_puzzles, tiny_messages
from data_prep.policies import folder, training
from data_prep.policies import tiny as tiny_policy
from data_prep.policies.demos import (
    IGNORED,
    CountdownDemonstrations,
    encode,
)
from data_prep.policies.tiny import Schedule
from data_prep.policies.tokenizer import build_tokenizer
from hpo_verl.errors import DataError
from hpo_verl.rewards.countdown import compute_score

SHORT = Schedule(skill_steps=3, habit_steps=2, batch_size=4)
PROMPT_TOKENS = 16
# That of the recipe.
MAX_RESPONSE_TOKENS = 24
HELD_OUT = {((2, 3, 7), 15), ((1, 1, 1), 3)}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "policy"
    tiny_policy.make_policy(out, 5, HELD_OUT, SHORT)
    return out


@pytest.fixture
def copy(policy, tmp_path):
    return shutil.copytree(policy, tmp_path / "policy")


@pytest.fixture(scope="module")
def tokenizer(policy):
    return AutoTokenizer.from_pretrained(policy)


def command(*arguments):
    try:
        return run(tiny_policy.main, [str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def sha256(out):
    return json.loads((out / "manifest.json").read_text())["files"]


# --- the folder ---


def test_the_same_seed_gives_the_same_bytes_whatever_the_threads(policy, tmp_path):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        tiny_policy.make_policy(tmp_path / "again", 5, list(HELD_OUT), SHORT)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    for file in policy.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    tiny_policy.make_policy(tmp_path / "other", 6, HELD_OUT, SHORT)
    assert sha256(tmp_path / "other")["model.safetensors"] != sha256(policy)["model.safetensors"]


def test_it_loads_as_a_float32_qwen2_that_ends_turns(policy, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(policy)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert 140_000 <= sum(weight.numel() for weight in model.parameters()) <= 160_000
    assert model.config.vocab_size == len(tokenizer) == model.lm_head.out_features
    assert model.config.hidden_size == 32 * model.config.num_attention_heads
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize(("where", "name"), [(training, "warm_start"), (folder, "write_manifest")])
def test_the_folder_is_complete_or_absent(tmp_path, monkeypatch, where, name):
    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, name, fail)
    with pytest.raises(KeyboardInterrupt):
        tiny_policy.make_policy(tmp_path / "deep" / "policy", 0, (), SHORT)
    assert list(tmp_path.iterdir()) == []


def test_an_older_policy_is_replaced(copy):
    (copy / "stray").write_text("")
    tiny_policy.make_policy(copy, 6, HELD_OUT, SHORT)
    assert tiny_policy.check(copy)["seed"] == 6
    assert not (copy / "stray").exists()
    assert list(copy.parent.iterdir()) == [copy]


def test_a_failed_replacement_leaves_the_older_policy(copy, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "write_manifest", fail)
    with pytest.raises(DataError, match="cannot be written: no space left"):
        tiny_policy.make_policy(copy, 6, HELD_OUT, SHORT)
    assert tiny_policy.check(copy)["seed"] == 5
    assert list(copy.parent.iterdir()) == [copy]


# --- check ---


def test_check_accepts_what_was_made(policy):
    manifest = tiny_policy.check(policy)
    assert manifest["seed"] == 5
    assert manifest["held_out"]["puzzles"] == 2
    assert set(manifest["files"]) == {file.name for file in policy.iterdir()} - {"manifest.json"}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_check_names_the_damaged_or_missing_file(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: its sha256 is not the one in"):
        tiny_policy.check(copy)
    (copy / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: no such file"):
        tiny_policy.check(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(recipe_version=0), "recipe_version is 0"),
        (lambda m: m["files"].update({"../x": "0"}), "is not a manifest"),
        (lambda m: m.pop("seed"), "is not a manifest"),
        (lambda m: m.update(files=3), "is not a manifest"),
    ],
)
def test_check_refuses_a_changed_manifest(copy, change, message):
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy.parent / "x").write_text("")
    with pytest.raises(DataError, match=message):
        tiny_policy.check(copy)


def test_check_refuses_a_folder_without_a_manifest(copy):
    (copy / "manifest.json").write_text("[")
    with pytest.raises(DataError, match="is not a manifest"):
        tiny_policy.check(copy)
    with pytest.raises(DataError, match=r"manifest\.json: cannot read"):
        tiny_policy.check(copy.parent / "nowhere")


# --- the command ---


def test_the_command_holds_out_the_puzzles_of_a_data_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tiny_policy.SCHEDULES, "countdown", SHORT)
    ranges = ["--max-number", 15, "--min-target", 1, "--max-target", 45, "--operators", "+-"]
    sizes = ["--numbers", 3, "--train-size", 8, "--val-size", 5, "--prompt", "tiny"]
    data = [str(part) for part in [*sizes, *ranges, "--out", tmp_path / "data"]]
    assert run(countdown.main, data) == 0
    val = tmp_path / "data" / "val.parquet"
    assert command("--out", tmp_path / "policy", "--seed", 3, "--held-out", val) == 0
    assert "5 puzzles held out" in capsys.readouterr().out
    manifest = tiny_policy.check(tmp_path / "policy")
    digest = puzzles_digest(read_puzzles(val))
    assert manifest["held_out"] == {"puzzles": 5, "sha256": digest}
    assert manifest["seed"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "'-1' is not an integer from 0 to 2147483647"),
        (["--seed", "x"], "'x' is not an integer"),
        (["--sede", "1"], "unrecognized arguments: --sede 1"),
        (["--held-out", "nowhere.parquet"], "nowhere.parquet: cannot read: "),
    ],
)
def test_bad_arguments_end_with_one_line_and_code_2(tmp_path, capsys, arguments, message):
    assert command("--out", tmp_path / "policy", *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "policy").exists()


def test_out_must_be_writable_and_ours(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command("--out", tmp_path / "file" / "policy") == 2
    assert "is a file; a folder is needed" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    assert command("--out", tmp_path / "full") == 2
    assert "holds files but no manifest.json" in capsys.readouterr().err
    assert os.listdir(tmp_path / "full") == ["thesis.txt"]


def test_held_out_must_be_countdown_data(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"question": ["?"]}), path)
    with pytest.raises(DataError, match=r"cannot read: .*reward_model"):
        read_puzzles(path)
    pq.write_table(pa.table({"reward_model": [{"ground_truth": "C1"}]}), path)
    with pytest.raises(DataError, match=r"row 1: reward_model\.ground_truth is not"):
        read_puzzles(path)
    path.write_bytes(b"PAR1 but not for long")
    with pytest.raises(DataError, match=r"x\.parquet: cannot read"):
        read_puzzles(path)


# --- tokenizer ---


def test_every_text_survives_encoding(tokenizer):
    for text in [
        "3+7=10*2=20\n<answer>(3+7)*2</answer>",
        " Grüße, 世界! \t\r\n\n x=100, 12345 (7",
        "".join(map(chr, range(1, 256))),
    ]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_saved_tokenizer_is_the_one_that_was_built(tokenizer):
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_answers_are_few_tokens_and_reach_the_reward(tokenizer):
    text = "12-2=10+3=13\n<answer>12-2+3</answer>"
    tokens = tokenizer.encode(text + "<|im_end|>")
    line = ["12", "-2", "=10", "+3", "=13", "Ċ"]
    answer = ["<answer>", "12", "-2", "+3", "</answer>", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(tokens) == line + answer
    decoded = tokenizer.decode(tokens, skip_special_tokens=True)
    assert decoded == text
    truth = {"target": 13, "numbers": [3, 12, 2]}
    assert compute_score("countdown", decoded, truth)["score"] == 1


def test_the_chat_template_wraps_a_puzzle_in_sixteen_tokens(tokenizer):
    messages = tiny_messages([3, 7, 2], 15)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\n3 7 2 = 15<|im_end|>\n<|im_start|>assistant\n"
    for target in (1, 9, 10, 45):
        encoded = tokenizer.apply_chat_template(
            tiny_messages([9, 1, 15], target), add_generation_prompt=True
        )
        assert len(encoded["input_ids"]) == PROMPT_TOKENS
    assert len(tokenizer.encode("\n")) == 1


# --- demonstrations ---


def test_demonstrations_are_true_and_have_the_stated_shape(tokenizer):
    held_out = {((2, 3, 7), target) for target in range(1, 46)}
    demonstrations = CountdownDemonstrations(1, held_out)
    attempts, right, worked_right = [], [], []
    for _ in range(2000):
        prompt, response = encode(tokenizer, demonstrations.draw(direct_share=0.25))
        assert len(prompt) == PROMPT_TOKENS
        assert len(response) <= MAX_RESPONSE_TOKENS
        assert response[-1] == tokenizer.eos_token_id
        puzzle = tokenizer.decode(prompt[3:-5])
        left, target = puzzle.split(" = ")
        numbers = [int(number) for number in left.split()]
        assert (tuple(sorted(numbers)), int(target)) not in held_out
        *lines, answer = tokenizer.decode(response[:-1]).split("\n")
        values = []
        for line in lines:
            first, second, value = line.split("=")
            partial = re.match("[0-9]+", second)[0]
            step = {
                "target": int(partial),
                "numbers": [int(n) for n in re.findall("[0-9]+", first)],
            }
            assert compute_score("c", f"<answer>{first}</answer>", step)["score"] == 1
            whole = {"target": int(value), "numbers": numbers}
            shown = f"<answer>{first}{second.removeprefix(partial)}</answer>"
            assert compute_score("c", shown, whole)["score"] == 1
            values.append(int(value))
        # Nobody goes on after a hit, or tries a value twice.
        assert int(target) not in values[:-1]
        assert len(set(values)) == len(values)
        result = compute_score("c", answer, {"target": int(target), "numbers": numbers})
        assert result["format"] == 1
        if lines:
            last = {"target": values[-1], "numbers": numbers}
            assert compute_score("c", answer, last)["score"] == 1
            worked_right.append(result["score"])
        right.append(result["score"])
        attempts.append(len(lines))
    assert set(attempts) == {0, 1, 2, 3}
    # Bounds: six standard deviations of a share of 2,000 around 0.25 and 0.95 or so.
    assert 0.19 < attempts.count(0) / 2000 < 0.31
    assert 0.91 < sum(worked_right) / len(worked_right) < 0.99


def test_batches_mark_the_response_only(tokenizer):
    demonstrations = CountdownDemonstrations(1)
    for inputs, labels in demonstrations.batches(tokenizer, 6, 4, 0.5):
        assert inputs.shape == labels.shape == (4, inputs.shape[1])
        for row, target in zip(inputs, labels, strict=True):
            kept = target != IGNORED
            assert not kept[: PROMPT_TOKENS - 1].any()
            assert target[kept][-1] == tokenizer.eos_token_id
            assert (target[kept] == tokenizer.eos_token_id).sum() == 1
            assert torch.equal(row[1:][kept[:-1]], target[:-1][kept[:-1]])
