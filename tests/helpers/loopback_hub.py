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
        fetched: names that were asked for, in order.
    """

    def __init__(self, repo, commit, files):
        self.repo, self.commit, self.files = repo, commit, files
        self.served, self.refusal, self.fetched = {}, None, []

    def entry(self, name):
        """What the hub says of a file."""
        content = self.files[name]
        header = b"blob %d\0" % len(content)
        entry = {
            "rfilename": name,
            "size": len(content),
            "blobId": hashlib.sha1(header + content, usedforsecurity=False).hexdigest(),
        }
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
        return entry

    def answer(self, path):
        """Status, headers and body of a request."""
        if self.refusal:
            return *self.refusal, b""
        if path == f"/api/models/{self.repo}/revision/{self.commit}":
            entries = [self.entry(name) for name in self.files]
            facts = {"id": self.repo, "sha": self.commit, "siblings": entries}
            return 200, {"Content-Type": "application/json"}, json.dumps(facts).encode()
        name = path.removeprefix(f"/{self.repo}/resolve/{self.commit}/")
        if name not in self.files:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        self.fetched.append(name)
        entry = self.entry(name)
        tag = entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": self.commit}
        return 200, headers, self.served.get(name, self.files[name])

    @contextmanager
    def running(self):
        """Serve on loopback; gives the URL."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                status, headers, body = hub.answer(unquote(urlsplit(self.path).path))
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
