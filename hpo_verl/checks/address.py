"""Addresses of Ray clusters, and whether anything answers there."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from hpo_verl.config.recipes import nearest
from hpo_verl.errors import ConfigError, EnvironmentCheckError

AUTO = "auto"
FORMS = "auto, HOST:PORT of the head (6379) or http://HOST:PORT of its dashboard (8265)"
SCHEMES = ("http", "https")
CONNECT_SECONDS = 5.0


def check_address(address: str) -> None:
    """Refuse an address that is none, or where nobody listens; starts nothing.

    Args:
        address: one of `FORMS`.

    Raises:
        ConfigError: not of a permitted form.
        EnvironmentCheckError: nobody listens there.
    """
    if address == AUTO:
        _check_running_here()
        return
    host, port = split_address(address)
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        raise EnvironmentCheckError(
            f"--address={address}: nobody answers at {host} port {port} ({error}); need {FORMS}"
        ) from error


def split_address(address: str) -> tuple[str, int]:
    """Host and port of an address.

    Raises:
        ConfigError: not of a permitted form.
    """
    scheme, separator, _ = address.partition("://")
    if separator and scheme not in SCHEMES:
        raise ConfigError(
            f"--address={address}: {scheme}:// is not permitted; {nearest(scheme, SCHEMES)} "
            f"Need {FORMS}"
        )
    try:
        parts = urlsplit(address if separator else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"--address={address}: {error}; need {FORMS}") from error
    if not host or not port or parts.path not in ("", "/"):
        hint = "" if separator or ":" in address else f"; {nearest(address, [AUTO])}"
        raise ConfigError(f"--address={address}: must be {FORMS}{hint}")
    return host, port


def address_is_elsewhere(address: str | None) -> bool:
    """Whether an address is that of another machine than this one."""
    if address is None or address == AUTO:
        return False
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    try:
        host = socket.gethostbyname(split_address(address)[0])
    except (ConfigError, OSError):
        return True
    return host not in own


def _check_running_here() -> None:
    """Ray leaves the address of a cluster's node in a file of its temporary folder."""
    folder = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray"
    if not os.environ.get("RAY_ADDRESS") and not (folder / "ray_current_cluster").is_file():
        raise EnvironmentCheckError(
            f"--address={AUTO}: no Ray cluster runs on this machine; need HOST:PORT of the head, "
            "or start one with `ray start --head`"
        )
