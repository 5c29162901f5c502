"""A hub on this machine: what huggingface_hub asks of the real one, answered from a folder, over HTTP."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class Hub(BaseHTTPRequestHandler):
    """Serves one repository, org/tiny, from a folder, and takes commits to it."""

    protocol_version = "HTTP/1.1"
    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, folder: Path, asked: list[str], *args):
        self.folder, self.asked = folder, asked
        super().__init__(*args)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path}")
        files = sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())
        file = self.path.partition(f"/resolve/{self.commit}/")[2]
        if self.path.startswith("/api/models/org/tiny"):
            tree = [{"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": "0"} for name in files]
            info = {"id": "org/tiny", "sha": self.commit, "siblings": [{"rfilename": name} for name in files]}
            self._answer(200, json.dumps(tree if "/tree/" in self.path else info).encode())
        elif file in files:
            self._answer(200, (self.folder / file).read_bytes())
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def do_POST(self):
        self.asked.append(f"{self.command} {self.path}")
        content = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}/org/tiny"
        if self.path == "/api/repos/create":
            answer = {"url": address, "name": "org/tiny", "id": "org/tiny"}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif self.path.startswith("/api/models/org/tiny/preupload/"):
            named = [file["path"] for file in json.loads(content)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in named]}
        elif self.path.startswith("/api/models/org/tiny/commit/"):
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    target = self.folder / line["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(line["value"]["content"]))
            answer = {"commitUrl": f"{address}/commit/{self.commit}", "commitOid": self.commit, "pullRequestUrl": None}
        else:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        return self._answer(200, json.dumps(answer).encode())

    def _answer(self, code: int, content: bytes, headers: dict[str, str] | None = None):
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextmanager
def running_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve `folder` as org/tiny to huggingface_hub in this process; gives the list of what was asked."""
    from huggingface_hub import constants

    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder, asked))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield asked
    server.shutdown()
    server.server_close()
