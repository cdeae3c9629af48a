"""Which checkpoint is chosen: the newest whole one, never a partial, damaged or foreign one."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpo_verl.errors import DataError
from hpo_verl.runs import checkpoints
from hpo_verl.runs.checkpoints import SEAL, TRACKER

SHARDS = [f"{kind}_world_size_2_rank_{rank}.pt" for kind in ("model", "optim") for rank in (0, 1)]


def make(folder, step, sealed=True):
    """A checkpoint of two ranks as verl leaves it, with content that tells its step."""
    path = folder / f"global_step_{step}"
    (path / "actor" / "huggingface").mkdir(parents=True)
    for name in SHARDS:
        (path / "actor" / name).write_text(f"{name} of step {step}")
    (path / "actor" / "huggingface" / "config.json").write_text("{}")
    (path / "data.pt").write_text(f"order after step {step}")
    if sealed:
        checkpoints.seal(path)
    return path


def test_a_seal_names_every_file_with_size_and_digest(tmp_path):
    path = make(tmp_path, 3)
    (path / ".nfs0001").write_text("left by a file system")
    sealed = json.loads((path / SEAL).read_text())
    assert sealed["step"] == 3
    assert set(sealed["files"]) == {
        "data.pt",
        "actor/huggingface/config.json",
        *(f"actor/{name}" for name in SHARDS),
    }
    # echo -n 'order after step 3' | sha256sum
    assert sealed["files"]["data.pt"] == {
        "bytes": 18,
        "sha256": subprocess.run(
            ["sha256sum", path / "data.pt"], capture_output=True, text=True, check=True
        ).stdout.split()[0],
    }
    assert checkpoints.fault(path) is None


@pytest.mark.parametrize(
    ("absent", "named"),
    [
        ("data.pt", "data.pt"),
        ("actor/optim_world_size_2_rank_1.pt", "actor/optim_world_size_2_rank_1.pt"),
        ("actor/model_world_size_2_rank_0.pt", "actor/model_world_size_2_rank_0.pt"),
        ("actor", "file in actor"),
    ],
)
def test_what_a_run_could_not_go_on_from_is_not_sealed(tmp_path, absent, named):
    path = make(tmp_path, 3, sealed=False)
    shutil.rmtree(path / absent) if absent == "actor" else (path / absent).unlink()
    with pytest.raises(DataError, match=f"global_step_3 holds no {named}"):
        checkpoints.seal(path)
    assert not (path / SEAL).exists()


def test_the_newest_whole_one_is_chosen_by_number(tmp_path):
    for step in (2, 10, 9):
        make(tmp_path, step)
    (tmp_path / TRACKER).write_text("2")
    (tmp_path / "global_step_11.bak").mkdir()
    (tmp_path / "global_step_12").write_text("a file")
    (tmp_path / "global_step_013").mkdir()
    assert checkpoints.choose(tmp_path) == checkpoints.Chosen(tmp_path / "global_step_10", 10, ())


def flip(path):
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


def rewrite_seal(change):
    def damage(path):
        sealed = json.loads((path / SEAL).read_text())
        change(sealed)
        (path / SEAL).write_text(json.dumps(sealed))

    return damage


SHARD = "actor/model_world_size_2_rank_1.pt"
DAMAGE = {
    f"incomplete: it has no {SEAL}, so the run ended": lambda p: (p / SEAL).unlink(),
    f"damaged: {SEAL} cannot be read": lambda p: (p / SEAL).write_text('{"step": 4, "files'),
    f"damaged: {SEAL} cannot be read ": lambda p: (p / SEAL).write_text("[]"),
    f"damaged: {SEAL} cannot be read  ": rewrite_seal(lambda s: s.update(files={"data.pt": 3})),
    f"damaged: {SEAL} cannot be read   ": lambda p: (p / SEAL).write_bytes(b"\xff\x00"),
    f"damaged: {SEAL} is of step 5": rewrite_seal(lambda s: s.update(step=5)),
    f"damaged: {SHARD} is missing": lambda p: (p / SHARD).unlink(),
    f"damaged: actor/other.pt is not in {SEAL}": lambda p: (p / "actor/other.pt").write_text(""),
    f"damaged: {SHARD} has 10 bytes": lambda p: os.truncate(p / SHARD, 10),
    f"damaged: {SHARD} has another SHA-256": lambda p: flip(p / SHARD),
    "damaged: data.pt has another SHA-256": lambda p: flip(p / "data.pt"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_what_is_not_whole_is_named_and_an_older_one_chosen(tmp_path, message):
    older, newer = make(tmp_path, 2), make(tmp_path, 4)
    DAMAGE[message](newer)
    # verl's note points at it, is torn, or is missing: it does not matter.
    (tmp_path / TRACKER).write_text("4")
    chosen = checkpoints.choose(tmp_path)
    assert (chosen.path, chosen.step) == (older, 2)
    (left_out,) = chosen.left_out
    assert left_out.startswith(f"global_step_4 is {message.strip()}")
    (tmp_path / TRACKER).write_text("")
    assert checkpoints.choose(tmp_path) == chosen
    (tmp_path / TRACKER).unlink()
    assert checkpoints.choose(tmp_path) == chosen


def test_a_link_to_a_file_elsewhere_is_not_followed(tmp_path):
    path = make(tmp_path / "run", 4)
    shutil.copy(path / SHARD, tmp_path / "copy")
    (path / SHARD).unlink()
    (path / SHARD).symlink_to(tmp_path / "copy")
    assert checkpoints.fault(path) == f"damaged: {SHARD} is not a plain file"


def test_no_whole_checkpoint_is_an_error_that_names_all(tmp_path):
    (make(tmp_path, 2) / "data.pt").unlink()
    make(tmp_path, 4, sealed=False)
    with pytest.raises(DataError) as refused:
        checkpoints.choose(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path} holds no complete checkpoint: global_step_4 is incomplete: it has no {SEAL}, "
        "so the run ended while it was saved; global_step_2 is damaged: data.pt is missing"
    )


@pytest.mark.parametrize("exists", [True, False])
def test_an_empty_folder_is_an_error(tmp_path, exists):
    folder = tmp_path if exists else tmp_path / "none"
    with pytest.raises(DataError, match="holds no checkpoint to go on from"):
        checkpoints.choose(folder)
    assert not checkpoints.holds_checkpoints(folder)


@pytest.mark.parametrize("foreign", [".", SEAL, "data.pt", SHARD])
def test_a_file_of_another_user_is_refused_even_if_an_older_one_is_whole(
    tmp_path, monkeypatch, foreign
):
    make(tmp_path, 2)
    target = make(tmp_path, 4) / foreign
    plain = Path.lstat

    def other_owner(path):
        found = plain(path)
        if path != target:
            return found
        return os.stat_result((*found[:4], os.getuid() + 1, *found[5:10]))

    monkeypatch.setattr(Path, "lstat", other_owner)
    with pytest.raises(DataError, match=f"belongs to user {os.getuid() + 1}, not to you"):
        checkpoints.choose(tmp_path)


def test_a_folder_of_another_user_is_refused(tmp_path):
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    make(tmp_path / "run", 4)
    os.chown(tmp_path / "run", 12345, -1)
    with pytest.raises(DataError, match="belongs to user 12345, not to you"):
        checkpoints.choose(tmp_path / "run")


def test_the_newest_complete_ones_are_kept_and_incomplete_ones_do_not_count(tmp_path):
    for step in (1, 2, 3, 5):
        make(tmp_path, step)
    make(tmp_path, 4, sealed=False)
    checkpoints.keep_newest(tmp_path, 2)
    assert [step for step, _ in checkpoints.step_folders(tmp_path)] == [5, 4, 3]
    checkpoints.keep_newest(tmp_path, 2)
    assert [step for step, _ in checkpoints.step_folders(tmp_path)] == [5, 4, 3]


def test_a_kill_while_one_is_removed_leaves_it_incomplete_not_damaged(tmp_path, monkeypatch):
    path = make(tmp_path, 3)

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.remove(path)
    assert checkpoints.fault(path).startswith("incomplete")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_an_error_number_behind_other_errors_tells_a_full_disk(tmp_path, number):
    outer = RuntimeError("torch says nothing of it")
    outer.__cause__ = ValueError("nor does this")
    outer.__cause__.__context__ = OSError(number, "write failed")
    assert checkpoints.full_disk(outer, tmp_path)
    # Ray keeps what a worker raised in an attribute.
    of_ray = RuntimeError("ray")
    of_ray.cause = OSError(number, "write failed")
    assert checkpoints.full_disk(of_ray, tmp_path)


def test_another_error_on_a_disk_with_space_is_no_full_disk(tmp_path):
    for error in (OSError(errno.EACCES, "permission"), ValueError("shape")):
        assert not checkpoints.full_disk(error, tmp_path)
    assert list(tmp_path.iterdir()) == []


def in_small_tmpfs(tmp_path, size, program):
    """Run a program in a file system of so many bytes, which is its working folder."""
    place = tmp_path / "small"
    place.mkdir()
    mount = f'mount -t tmpfs -o size={size} none "$0" && cd "$0" && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, str(place), sys.executable, "-c", program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no private tmpfs: {done.stderr.strip()}")
    return done


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_is_named(tmp_path):
    program = """
import sys
from pathlib import Path
from hpo_verl.errors import EnvironmentCheckError
from hpo_verl.runs import checkpoints
from hpo_verl.verl_plugin.trainer.life_cycle import whole_or_not_at_all
import torch
folder = Path.cwd()
def save(step):
    path = folder / f"global_step_{step}"
    with whole_or_not_at_all(path):
        (path / "actor").mkdir(parents=True)
        torch.save(torch.zeros(300_000), path / "actor" / "model_world_size_1_rank_0.pt")
        torch.save([step], path / "data.pt")
        checkpoints.seal(path)
for step in (1, 2):
    save(step)
try:
    save(3)
except EnvironmentCheckError as error:
    print(error)
chosen = checkpoints.choose(folder)
print(chosen.step, len(chosen.left_out), *sorted(p.name for p in folder.iterdir()))
"""
    done = in_small_tmpfs(tmp_path, 3_000_000, program)
    assert done.returncode == 0, done.stderr
    error, state = done.stdout.splitlines()
    assert error.startswith(f"{tmp_path}/small: the disk is full, so global_step_3 was not saved")
    assert state == "2 0 global_step_1 global_step_2"


def test_a_limit_on_the_size_of_files_is_told_as_a_full_disk(tmp_path):
    path = make(tmp_path, 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
        with pytest.raises(OSError, match="File too large") as refused:
            (tmp_path / "shard").write_bytes(bytes(1 << 20))
        # torch's writer would hide the number; the probe finds it.
        assert checkpoints.full_disk(RuntimeError("file write failed"), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints.full_disk(refused.value, tmp_path)
    assert checkpoints.fault(path) is None
