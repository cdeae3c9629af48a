"""Addresses that are none, and those where nobody answers."""

import socket

import pytest

from hpo_verl.checks.address import address_is_elsewhere, check_address, split_address
from hpo_verl.errors import ConfigError, EnvironmentCheckError


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("head.cluster:6379", ("head.cluster", 6379)),
        ("http://127.0.0.1:8265", ("127.0.0.1", 8265)),
        ("https://head:8265/", ("head", 8265)),
        ("[::1]:6379", ("::1", 6379)),
    ],
)
def test_permitted_forms(address, expected):
    assert split_address(address) == expected


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("autoo", "--address=autoo: must be auto, HOST:PORT .*did you mean auto"),
        ("10.0.0.1", "--address=10.0.0.1: must be auto, HOST:PORT of the head"),
        ("10.0.0.1:seven", "--address=10.0.0.1:seven: "),
        ("10.0.0.1:99999", "--address=10.0.0.1:99999: Port out of range"),
        ("ray://10.0.0.1:10001", "ray:// is not permitted"),
        ("htp://10.0.0.1:8265", "htp:// is not permitted; did you mean http or https"),
        ("http://10.0.0.1:8265/jobs", "must be auto, HOST:PORT"),
        ("", "--address=: must be auto"),
    ],
)
def test_what_is_no_address(address, message):
    with pytest.raises(ConfigError, match=message):
        check_address(address)


def test_nobody_answers():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EnvironmentCheckError, match=f"nobody answers at 127.0.0.1 port {port}"):
        check_address(f"127.0.0.1:{port}")


def test_somebody_answers():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        check_address(f"http://127.0.0.1:{server.getsockname()[1]}")


def test_auto_needs_a_cluster_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(EnvironmentCheckError, match="no Ray cluster runs on this machine"):
        check_address("auto")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:6379")
    check_address("auto")


@pytest.mark.parametrize(
    ("address", "elsewhere"),
    [
        (None, False),
        ("auto", False),
        ("127.0.0.1:6379", False),
        ("http://localhost:8265", False),
        ("192.0.2.1:6379", True),
        ("nobody.invalid:6379", True),
    ],
)
def test_whose_machine_an_address_is(address, elsewhere):
    assert address_is_elsewhere(address) == elsewhere
