"""A stand-in for the Hugging Face Hub on loopback: model and dataset repositories, uploads, and every way they fail."""

import hashlib
import json
import re
import threading
import time
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants as constants
import pytest

Files = dict[str, bytes]
Fault = Callable[["Handler"], bool]  # answers the request itself and returns True, or leaves it alone


@dataclass
class Repository:
    """Its commits by sha, its branches and tags by name."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, *refs: str) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(files.items()):
            digest.update(name.encode() + content)
        sha = digest.hexdigest()
        self.commits[sha] = files
        self.refs |= dict.fromkeys(refs or ("main",), sha)
        return sha


class Hub:
    """`with Hub() as hub`: `hub.url` for HF_ENDPOINT, `hub.seen` what was asked (method, path, Range)."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}  # "models/org/name" or "datasets/org/name"
        self.seen: list[tuple[str, str, str | None]] = []
        self.agents: set[str] = set()
        self.faults: list[Fault] = []
        self.licence = ""  # that the pages of all models name
        self.private: dict[str, bool] = {}  # of repositories that were made here
        self.large: dict[str, bytes] = {}  # uploaded apart from their commit, by sha256
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def ask_this(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Have the Hub's library ask here and keep what it gets in `cache`; its settings are patched where it reads
        them at each call."""
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # as `prepare` sets it before it is read
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files are taken the older way here
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the library's own retries

    def model(self, name: str, files: Files, *refs: str) -> str:
        return self.repositories.setdefault(f"models/{name}", Repository()).commit(files, *refs)

    def dataset(self, name: str, files: Files, *refs: str) -> str:
        return self.repositories.setdefault(f"datasets/{name}", Repository()).commit(files, *refs)

    def always(self, status: int, where: str = "", code: str = "", message: str = "", times: int = 10**9) -> None:
        """Answer requests whose path holds `where` with `status`, the first `times` of them."""
        left = [times]

        def fault(handler: "Handler") -> bool:
            if where not in handler.path or left[0] <= 0:
                return False
            left[0] -= 1
            named = {"X-Error-Code": code, "X-Error-Message": message, "Retry-After": "0"}
            handler.answer(status, b"", {k: v for k, v in named.items() if v})
            return True

        self.faults.append(fault)

    def cut(self, file: str, after: int, times: int = 10**9) -> None:
        """Close the connection `after` bytes into `file`, the first `times` times."""
        left = [times]

        def fault(handler: "Handler") -> bool:
            if handler.command != "GET" or not handler.path.endswith(file) or left[0] <= 0:
                return False
            left[0] -= 1
            handler.most = after
            return False

        self.faults.append(fault)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    most: int | None = None  # bytes of the body before the connection is cut

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self.hub.seen.append((self.command, self.path, None))
        body = self._body()
        self.hub.large[hashlib.sha256(body).hexdigest()] = body
        self.answer(200, b"", {})

    def do_POST(self) -> None:
        self.most = None
        body = self._body()
        self.hub.seen.append((self.command, self.path, None))
        if any(fault(self) for fault in self.hub.faults):
            return
        path = unquote(urlsplit(self.path).path)
        upload = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if f"models/{name}" in self.hub.repositories:
                return self.answer(409, b"", {"X-Error-Message": "You already created this model repo"})
            self.hub.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.model(name, {})
            self._json({"url": f"{self.hub.url}/{name}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif upload and upload[2] == "preupload":
            files = json.loads(body)["files"]
            self._json({"files": [self._mode(file["path"]) for file in files]})
        elif upload:
            self._commit(upload[1], [json.loads(line) for line in body.splitlines()])
        elif large := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            action = {"upload": {"href": f"{self.hub.url}/large/{large[1]}"}}
            self._json({"transfer": "basic", "objects": [{**each, "actions": action} for each in objects]})
        else:
            self._missing("RepoNotFound")

    @staticmethod
    def _mode(path: str) -> dict:
        large = path.endswith((".safetensors", ".gguf"))
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _commit(self, name: str, lines: list[dict]) -> None:
        repository = self.hub.repositories[f"models/{name}"]
        files = dict(repository.commits[repository.refs["main"]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        sha = self.hub.model(name, files)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            try:
                self.wfile.write(body[: self.most])
            except OSError:  # the client has gone
                pass
        if self.most is not None:
            self.close_connection = True

    def _json(self, content) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self.answer(404, b"", {"X-Error-Code": code})

    def _serve(self) -> None:
        self.most = None
        self.hub.seen.append((self.command, self.path, self.headers.get("Range")))
        self.hub.agents.add(self.headers.get("User-Agent", ""))
        if any(fault(self) for fault in self.hub.faults):
            return
        path = unquote(urlsplit(self.path).path)
        path += "/revision/main" if re.fullmatch(r"/api/models/[^/]+/[^/]+", path) else ""
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree)/(.+)", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            kind, name, what, revision = api.groups()
        elif file:
            kind, name, what, revision = "datasets" if file[1] else "models", file[2], file[4], file[3]
        else:
            return self._missing("RepoNotFound")
        repository = self.hub.repositories.get(f"{kind}/{name}")
        if repository is None:
            return self._missing("RepoNotFound")
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            return self._missing("RevisionNotFound")
        files = repository.commits[sha]
        if file:
            return self._file(files.get(what), sha)
        if what == "tree":
            return self._json(
                [
                    {"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                    for path, body in files.items()
                ]
            )
        self._json(
            {
                "id": name,
                "sha": sha,
                "siblings": [{"rfilename": path} for path in files],
                "private": self.hub.private.get(name, False),
                "cardData": {"license": self.hub.licence},
            }
        )

    def _file(self, body: bytes | None, sha: str) -> None:
        if body is None:
            return self._missing("EntryNotFound")
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        status = 200
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(body)), len(body) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            status, body = 206, body[first : last + 1]
        if self.command == "HEAD":
            headers["Content-Length"] = str(len(body))
        self.answer(status, body, headers)
