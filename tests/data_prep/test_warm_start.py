"""A language model imitates worked Countdown puzzles, the same from the same seed."""

import json
import re
import shutil

import pytest
import torch
from countdown_values import value_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.command import run
from data_prep.countdown.puzzles import puzzles_digest, short_messages
from data_prep.manifest import check_files, read_manifest
from data_prep.policies import tiny, warm_start
from data_prep.policies.demos import LongCountdownDemonstrations, encode
from data_prep.policies.tiny import Schedule
from hpo_verl.checks.loaded import check_policy
from hpo_verl.errors import DataError
from hpo_verl.rewards.countdown import compute_score

SHORT = Schedule(skill_steps=2, habit_steps=1, batch_size=2)
HELD_OUT = {((2, 3, 7), 12), ((1, 1, 1), 3)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "base"
    tiny.make_policy(out, 5, (), SHORT)
    return out


@pytest.fixture
def copy(base, tmp_path):
    return shutil.copytree(base, tmp_path / "base")


@pytest.fixture(scope="module")
def policy(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "policy"
    warm_start.warm_start(base, out, 3, HELD_OUT, SHORT)
    return out


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def command(*arguments):
    try:
        return run(warm_start.main, [str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def refused(base, out, message):
    with pytest.raises(DataError, match=message) as refusal:
        warm_start.warm_start(base, out / "deep" / "policy", 0, (), SHORT)
    assert "\n" not in str(refusal.value)
    assert not (out / "deep").exists()


# --- demonstrations ---


def test_the_careless_author_multiplies_first_writes_more_and_is_seldom_right():
    demonstrations = LongCountdownDemonstrations(1, HELD_OUT)
    scores, lengths = {True: [], False: []}, {True: [], False: []}
    for careless in (True, False) * 1000:
        messages, response = demonstrations.draw(float(careless))
        numbers, target = messages[-1]["content"].split(" = ")
        numbers = [int(number) for number in numbers.split()]
        assert messages == short_messages(numbers, int(target))
        assert (tuple(sorted(numbers)), int(target)) not in HELD_OUT
        *lines, answer = response.split("\n")
        for line in lines:
            left, second, value = line.split("=")
            partial, rest = re.fullmatch(r"([0-9]+)([-+*][0-9]+)", second).groups()
            assert value_of(left) == int(partial)
            # The whole line is one expression, read with precedence as from left to right.
            assert value_of(left + rest) == int(value)
            assert ("*" in left) == careless
        score = compute_score("c", response, {"target": int(target), "numbers": numbers})
        assert score["format"] == 1
        assert answer == f"<answer>{left}{rest}</answer>"
        scores[careless].append(score["score"])
        lengths[careless].append(len(response))
    assert sum(scores[True]) < 50
    assert sum(scores[False]) > 900
    assert sum(lengths[True]) > 1.2 * sum(lengths[False])


def test_no_demonstration_poses_a_held_out_puzzle():
    """All but one target of each set are held out, so that only those are left."""
    every = LongCountdownDemonstrations(1)
    seen = {key(every.draw(0.5)) for _ in range(300)}
    others = LongCountdownDemonstrations(1, seen)
    assert seen.isdisjoint(key(others.draw(0.5)) for _ in range(300))


def key(shown):
    numbers, target = shown.messages[-1]["content"].split(" = ")
    return tuple(sorted(int(number) for number in numbers.split())), int(target)


# --- the folder ---


def test_the_same_seed_gives_the_same_bytes_whatever_the_threads(base, policy, tmp_path):
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        warm_start.warm_start(base, tmp_path / "again", 3, list(HELD_OUT), SHORT)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    for file in policy.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    warm_start.warm_start(base, tmp_path / "other", 4, HELD_OUT, SHORT)
    made, other = weights(policy), weights(tmp_path / "other")
    assert any(not torch.equal(made[name], other[name]) for name in made)


def test_the_folder_is_a_policy_with_a_manifest(base, policy):
    manifest = read_manifest(policy, warm_start.MANIFEST, ("seed", "schedule", "versions"))
    check_files(policy, warm_start.MANIFEST, manifest)
    check_policy(policy)
    assert manifest["held_out"] == {"puzzles": 2, "sha256": puzzles_digest(HELD_OUT)}
    made = json.loads((base / tiny.MANIFEST).read_text())["files"]
    assert manifest["base"] == {"model.safetensors": made["model.safetensors"]}
    assert {weight.dtype for weight in weights(policy).values()} == {torch.float32}


def test_it_learns_what_it_is_shown(base, tmp_path, monkeypatch):
    """Demonstrations of another seed become likelier; a model this small needs larger steps."""
    monkeypatch.setattr(warm_start, "_LEARNING_RATES", (3e-3, 3e-3))
    out = tmp_path / "policy"
    warm_start.warm_start(base, out, 3, (), Schedule(40, 1, 8, 0.0, 0.9))
    tokenizer = AutoTokenizer.from_pretrained(base)
    demonstrations = LongCountdownDemonstrations(99)
    shown = [encode(tokenizer, demonstrations.draw(0.0)) for _ in range(20)]
    before, after = (log_prob(folder, shown) for folder in (base, out))
    assert after > before + 1


def log_prob(folder, shown):
    """Mean log-probability of a response's tokens."""
    model, total, count = AutoModelForCausalLM.from_pretrained(folder), 0.0, 0
    for prompt, response in shown:
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        total += logits.log_softmax(-1)[range(len(response)), response].sum().item()
        count += len(response)
    return total / count


# --- bad input ---


def test_a_base_that_is_no_policy(copy, tmp_path):
    refused(tmp_path / "nowhere", tmp_path, "--base: .*/nowhere is not a folder")
    (copy / "model.safetensors").write_bytes(b"broken")
    refused(copy, tmp_path, r"--base: .*/base: cannot be loaded \(\w+: ")
    (copy / "modeling_own.py").write_text("")
    refused(copy, tmp_path, "--base: .* holds code, modeling_own.py")


def test_a_base_that_cannot_chat(copy, tmp_path):
    (copy / "chat_template.jinja").unlink()
    refused(copy, tmp_path, "its tokenizer has no chat template")
    end = "{{ messages[-1]['content'] }}<|im_end|>"
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    (copy / "chat_template.jinja").write_text(no_system + end)
    refused(copy, tmp_path, r"its chat template takes no system message \(no\)")


def test_a_base_whose_answers_never_end(copy, tmp_path):
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["eos_token"] = settings["pad_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(copy, tmp_path, r"ends with '<\|endoftext\|>', but .* ends an answer with '<\|im_end")


def test_a_folder_that_holds_something_else_is_left_alone(base, tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(DataError, match=r"holds files but no warm_start\.json"):
        warm_start.warm_start(base, tmp_path, 0, (), SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "'-1' is not an integer from 0 to 2147483647"),
        (["--held-out", "nowhere.parquet"], "nowhere.parquet: cannot read: "),
        ([], "--base: /nowhere is not a folder"),
    ],
)
def test_bad_arguments_end_with_one_line_and_code_2(tmp_path, capsys, arguments, message):
    assert command("--base", "/nowhere", "--out", tmp_path / "policy", *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "policy").exists()
