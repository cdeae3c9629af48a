"""Addresses of a cluster's dashboard, and who answers there."""

import contextlib
import http.server
import socket
import threading

import pytest

from hpo_verl.errors import ConfigError, EnvironmentCheckError
from hpo_verl.launch import submit


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:8265", "http://127.0.0.1:8265"),
        ("https://head:443/", "https://head:443"),
        ("head:8265", "http://head:8265"),
        ("http://[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_addresses(text, url):
    assert submit.dashboard_address(text) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "auto",
        "head",
        "ray://head:10001",
        "http://head",
        "http://head:99999",
        "http://head:port",
        "http://user:word@head:8265",  # pragma: allowlist secret
        "http://head:8265/jobs",
        "file:///etc/passwd",
    ],
)
def test_what_is_no_address(text):
    with pytest.raises(
        ConfigError, match=r"--address=.* the URL of the cluster's dashboard"
    ) as said:
        submit.dashboard_address(text)
    assert "auto" not in str(said.value).removeprefix(f"--address={text}")


@contextlib.contextmanager
def server(status, body):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b"", "no Ray dashboard answers .HTTP Error 404"),
        (200, b"<html>", "no Ray dashboard answers"),
        (200, b"[]", "no Ray dashboard answers"),
        (200, b'{"ray_version": "new"}', "no Ray dashboard answers"),
        (200, b'{"ray_version": "2.53.0"}', "Ray 2.53.0; need >= 2.54"),
    ],
)
def test_something_else_answers(status, body, message):
    with server(status, body) as url, pytest.raises(EnvironmentCheckError, match=message):
        submit.connect(url)


def test_nothing_answers(monkeypatch):
    monkeypatch.setattr(submit, "CONNECT_SECONDS", 0.5)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            EnvironmentCheckError, match=f"{url}: no Ray dashboard answers .*refused"
        ):
            submit.connect(url)
        taken.listen()
        with pytest.raises(
            EnvironmentCheckError, match=f"{url}: no Ray dashboard answers .*timed out"
        ):
            submit.connect(url)
