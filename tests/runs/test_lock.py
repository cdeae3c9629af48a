"""A run folder in use is refused, and a file system without locks is told from it."""

import errno
import os

import pytest

from hpo_verl.errors import EnvironmentCheckError
from hpo_verl.runs.files import locked


def test_a_run_folder_in_use(tmp_path):
    with (
        locked(tmp_path / "run"),
        pytest.raises(EnvironmentCheckError, match="another run is using it"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_not_another_run(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("hpo_verl.runs.files.fcntl.flock", refuse)
    with pytest.raises(EnvironmentCheckError) as raised, locked(tmp_path / "run"):
        pass
    message = str(raised.value)
    assert "another run" not in message
    assert f"({errno.errorcode[number]}: {os.strerror(number)})" in message
    assert f"run folder {tmp_path / 'run'}: its file system keeps no locks" in message
    assert "hydra.run.dir=" in message
