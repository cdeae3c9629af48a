"""What the processes of a run print gets into its log without secrets."""

import os
import threading

import pytest
from omegaconf import OmegaConf

from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.config.redaction import secret_mask
from hpo_verl.launch import train
from hpo_verl.runs.process import BLOCK_BYTES, LINE_BYTES, ChildProcess, copy_masked

# Assembled here, so that no scanner takes this file for a leak.
TOKEN = "hf_" + "a1B2" * 8


def copying(path, mask):
    """A descriptor to write to, and the thread that copies to the log."""
    reading, writing = os.pipe()
    arguments = (open(reading, "rb", buffering=0), path.open("wb"), mask)  # noqa: SIM115
    thread = threading.Thread(target=copy_masked, args=arguments)
    thread.start()
    return writing, thread


def logged(path, mask, *parts):
    writer, thread = copying(path, mask)
    for part in parts:
        os.write(writer, part)
    os.close(writer)
    thread.join(20)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # pragma: allowlist nextline secret
        ("{'wandb_api_key': 'correct-horse'}", "{'wandb_api_key': '***'}"),
        ("HF_TOKEN=the-token-of-mine", "HF_TOKEN=***"),
        (f"got {TOKEN}.", "got ***."),
        # pragma: allowlist nextline secret
        ("https://me:let-me-in@host/x", "https://***@host/x"),
        ("correct-horse-battery and correct-horse", "*** and ***"),
        ("agg=token-mean seed=12345678", "agg=token-mean seed=12345678"),
        ("short", "short"),
    ],
)
def test_secrets_are_masked_and_nothing_else(text, expected):
    settings = {
        # pragma: allowlist nextline secret
        "trainer": {"wandb_api_key": "correct-horse", "loss_agg_mode": "token-mean"},
        # pragma: allowlist nextline secret
        "clients": [{"password": "correct-horse-battery"}, {"password": "short"}, {"token": None}],
        "max_token": 12345678,
    }
    assert secret_mask({"HF_TOKEN": "the-token-of-mine"}, settings)(text) == expected


def test_without_a_secret_a_text_stays_as_it_is():
    assert secret_mask({})("nothing here, not even ***") == "nothing here, not even ***"


def test_a_secret_that_comes_in_pieces_is_masked(tmp_path):
    text = f"before {TOKEN} after\nno end".encode()
    parts = [text[at : at + 1] for at in range(len(text))]
    assert logged(tmp_path / "log", secret_mask({}), *parts) == b"before *** after\nno end"


def test_every_other_byte_is_kept(tmp_path):
    content = bytes(range(256)) + "é\n".encode() + b"\xff\n"
    assert logged(tmp_path / "log", secret_mask({}), content) == content


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path):
    writer, copier = copying(tmp_path / "log", str)
    feeder = threading.Thread(
        target=lambda: [os.write(writer, b"x" * BLOCK_BYTES) for _ in range(20)]
    )
    feeder.start()
    feeder.join(20)
    assert not feeder.is_alive()
    # Written before the line, or the process, has ended.
    assert (tmp_path / "log").stat().st_size > LINE_BYTES
    os.close(writer)
    copier.join(20)
    assert (tmp_path / "log").stat().st_size == 20 * BLOCK_BYTES


PROGRAM = """
import os, subprocess, sys
print('token', os.environ['MY_TOKEN'], flush=True)
subprocess.run([sys.executable, '-c', 'import os, sys; sys.stderr.write(os.environ["MY_TOKEN"])'])
with open(os.environ['HPO_VERL_FAILURE'], 'w') as file:
    file.write('refused with ' + os.environ['MY_TOKEN'])
raise ValueError('no access with ' + os.environ['MY_TOKEN'])
"""


def test_the_log_of_a_run_and_its_reported_failure_are_masked(tmp_path, monkeypatch):
    """Output and errors of the main program and of a process that it starts."""
    monkeypatch.setenv("MY_TOKEN", "correct-horse")
    log = tmp_path / "train.log"
    with ChildProcess(["-c", PROGRAM], lambda _: {}, secret_mask(os.environ)) as process:
        process.go(log)
        assert process.wait(lambda: None) == 1
        assert process.failure() == "refused with ***"
    text = log.read_text()
    assert "correct-horse" not in text
    assert text.startswith("token ***\n***Traceback")
    assert text.rstrip().endswith("ValueError: no access with ***")


def test_train_masks_what_environment_and_settings_say(tmp_path, monkeypatch):
    # pragma: allowlist nextline secret
    settings = {"trainer": {"default_local_dir": None, "my_api_key": "correct-horse"}}

    class Seen(Exception):
        pass

    def stand_in(arguments, variables, mask):
        raise Seen(mask("correct-horse, the-token-of-mine"))

    planned = PlannedRun(
        "countdown-tiny", (), tmp_path / "run", composed=OmegaConf.create(settings)
    )
    monkeypatch.setattr(train, "PlannedRun", lambda *_: planned)
    monkeypatch.setattr(train, "check_quickly", lambda _: [])
    monkeypatch.setattr(train, "ChildProcess", stand_in)
    monkeypatch.setenv("HF_TOKEN", "the-token-of-mine")
    with pytest.raises(Seen, match=r"^\*\*\*, \*\*\*$"):
        train.train("countdown-tiny", [f"hydra.run.dir={tmp_path}/run"], print, lambda *_: None)
