"""Files that are there whole or not at all."""

import errno
import hashlib
import os

import pytest

from hpo_verl.runs import files


def test_the_digest_is_that_of_the_content(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert files.file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that are read for a digest, in order; every file counts as large."""
    found, read = [], files.file_sha256

    def count(path):
        found.append(path.name)
        return read(path)

    monkeypatch.setattr(files, "READ_ONCE_BYTES", 0)
    monkeypatch.setattr(files, "_known", {})
    monkeypatch.setattr(files, "file_sha256", count)
    return found


def test_a_large_file_is_read_once(tmp_path, reads, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    digests = {files.sha256_once(path), files.sha256_once(path)}
    assert (digests, reads) == ({hashlib.sha256(b"one").hexdigest()}, ["weights"])
    monkeypatch.setattr(files, "READ_ONCE_BYTES", 4)
    monkeypatch.setattr(files, "_known", {})
    files.sha256_once(path)
    files.sha256_once(path)
    assert reads == ["weights"] * 3


def test_a_change_that_hides_its_time_is_read(tmp_path, reads):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    before = path.stat()
    files.sha256_once(path)
    # Until the file system's clock has moved on; a large file's read takes longer.
    while (tmp_path / "clock").write_text("") or (
        (tmp_path / "clock").stat().st_ctime_ns == before.st_ctime_ns
    ):
        pass
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        3,
        before.st_mtime_ns,
        before.st_ino,
    )
    assert files.sha256_once(path) == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("content", ["text ä\n", b"\x00bytes"])
def test_a_write_replaces_what_was_there(tmp_path, content):
    path = tmp_path / "file"
    path.write_text("old and longer than the new one")
    files.write_atomically(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, name):
    path = tmp_path / "manifest.json"
    files.write_atomically(path, "old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, name, full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
