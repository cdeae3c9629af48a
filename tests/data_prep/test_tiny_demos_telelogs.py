from collections import Counter

import pytest

from data_prep.policies import tiny as tiny_policy
from data_prep.policies.demos import TeleLogsDemonstrations, encode
from data_prep.policies.tiny import Schedule
from data_prep.policies.tokenizer import build_tokenizer
from data_prep.telelogs.__main__ import synthetic_rows
from hpo_verl.rewards.telelogs import CAUSES, compute_score


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def demonstrations():
    return TeleLogsDemonstrations(3)


def parts(tokenizer, pair):
    """Letters of the prompt, the copied part and the answer of the response."""
    prompt, response = pair
    assert response[-1] == tokenizer.eos_token_id
    *copied, answer = tokenizer.decode(response[:-1]).split("\n")
    return tokenizer.decode(prompt[3:-5]), "".join(copied), answer


def test_the_author_who_knows_is_right_and_copies_what_he_read(tokenizer, demonstrations):
    known = {row.question: row.answer for row in synthetic_rows("train", 1600, 9, "tiny")}
    lengths = Counter()
    for _ in range(500):
        pair = encode(tokenizer, demonstrations.draw(direct_share=0.0))
        letters, copied, answer = parts(tokenizer, pair)
        assert len(pair[0]) == 17
        assert len(pair[1]) <= 24
        assert letters.startswith(copied)
        lengths[len(copied)] += 1
        if letters in known:
            assert compute_score("t", answer, known[letters])["score"] == 1
    assert set(lengths) == {0, 3, 6, 9}


def test_the_author_who_guesses_is_right_by_chance_only(tokenizer, demonstrations):
    answers = [parts(tokenizer, encode(tokenizer, demonstrations.draw(1.0))) for _ in range(2000)]
    counts = Counter(answer for _, _, answer in answers)
    assert set(counts) == {rf"\boxed{{{cause}}}" for cause in CAUSES}
    # Six standard deviations of a share of an eighth of 2,000.
    assert all(abs(count - 250) < 90 for count in counts.values())
    known = dict(demonstrations._drives)
    right = sum(answer == rf"\boxed{{{known[letters]}}}" for letters, _, answer in answers)
    assert abs(right - 250) < 90


def test_a_seed_names_the_demonstrations_and_no_drive_is_in_a_split(demonstrations):
    again = TeleLogsDemonstrations(3)
    assert again._drives == demonstrations._drives
    assert again._drives != TeleLogsDemonstrations(4)._drives
    # The same stream would give the same letters in the same order of causes.
    split = [row.question for row in synthetic_rows("train", 64, 3, "tiny")]
    assert split != [letters for letters, _ in demonstrations._drives[:64]]


def test_the_policy_says_its_task_and_takes_no_held_out_puzzles(tmp_path, monkeypatch, capsys):
    short = Schedule(skill_steps=2, habit_steps=1, batch_size=4)
    monkeypatch.setitem(tiny_policy.SCHEDULES, "telelogs", short)
    tiny_policy.main(["--out", str(tmp_path / "policy"), "--task", "telelogs"])
    assert tiny_policy.check(tmp_path / "policy")["task"] == "telelogs"
    assert "puzzles" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        tiny_policy.main(
            ["--out", str(tmp_path / "x"), "--task", "telelogs", "--held-out", "x.parquet"]
        )
    assert "--held-out needs --task countdown" in capsys.readouterr().err
