"""A hub on loopback that answers as huggingface.co does, for one model."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class LoopbackHub:
    """What the hub holds.

    Attributes:
        repo: `organisation/model`.
        commit: the only one.
        files: name -> content; those that end in .safetensors are the large ones.
        served: name -> content that is sent instead of the commit's.
        refusal: status and headers with which every request is refused.
        fetched: names whose content was sent, in order.
    """

    def __init__(self, repo, commit, files):
        self.repo, self.commit, self.files = repo, commit, files
        self.served, self.refusal, self.fetched = {}, None, []

    def digest(self, name):
        """SHA-256 of a large file, git's SHA-1 of a small one."""
        content = self.files[name]
        if name.endswith(".safetensors"):
            return hashlib.sha256(content).hexdigest()
        header = b"blob %d\0" % len(content)
        return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()

    def entry(self, name):
        """What the hub says of a file."""
        size = len(self.files[name])
        entry = {"type": "file", "path": name, "size": size, "oid": self.digest(name)}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": self.digest(name), "size": size, "pointerSize": 130}
        return entry

    def answer(self, path, method):
        """Status, headers and body of a request."""
        if self.refusal:
            return *self.refusal, b""
        if path == f"/api/models/{self.repo}/tree/{self.commit}":
            entries = [self.entry(name) for name in self.files]
            return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
        name = path.removeprefix(f"/{self.repo}/resolve/{self.commit}/")
        if name not in self.files:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if method == "GET":
            self.fetched.append(name)
        headers = {"ETag": f'"{self.digest(name)}"', "X-Repo-Commit": self.commit}
        return 200, headers, self.served.get(name, self.files[name])

    @contextmanager
    def running(self):
        """Serve on loopback; gives the URL."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                status, headers, body = hub.answer(unquote(urlsplit(self.path).path), self.command)
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *arguments):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
