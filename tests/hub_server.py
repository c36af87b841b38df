"""A model hub on this machine: as much of its protocol as uploads and downloads of models use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret"
OWNER = "lab"


@dataclass
class Repository:
    """One repository: every commit's files by path, and the commit of every branch."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)  # SHA-256 of files in large storage

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        sha = hashlib.sha1(json.dumps([len(self.commits), sorted(files)]).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


@dataclass
class Hub:
    """The server's state, which tests read and change.

    Attributes:
        url: its address.
        requests: method and path of every request.
        messages: messages of the commits.
        status: answer every request with this status instead; 0: do not.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    status: int = 0


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, body: Any = b"", **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
            for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def missing(self, code: str) -> None:
            self.answer(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)

        def handle_any(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size)
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                while count := int(self.rfile.readline(), 16):
                    body += self.rfile.read(count)
                    self.rfile.readline()
                self.rfile.readline()
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if hub.status:
                return self.answer(hub.status, {"error": "refused"})
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if path == "/api/repos/create":
                return self.create(json.loads(body), known)
            if found := re.fullmatch(r"/large/(\w+)", path):
                hub.stored[found[1]] = body
                return self.answer(200)
            if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
                return self.batch(json.loads(body))
            if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)/(.+))?", path):
                name, verb, rest = found[1], found[2] or "revision", found[3] or "main"
            elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/(resolve)/(.+)", path):
                name, verb, rest = found[1], found[2], found[3]
            else:
                return self.answer(404, {"error": f"no such address {path}"})
            repository = hub.repositories.get(name)
            if repository is None or (repository.private and not known):
                return self.missing("RepoNotFound")
            if verb in ("preupload", "commit", "branch") and not known:
                return self.answer(401, {"error": "log in"})
            return getattr(self, verb)(repository, name, rest, body)

        def create(self, asked: dict[str, Any], known: bool) -> None:
            name = f"{asked.get('organization') or OWNER}/{asked['name']}"
            if not known:
                return self.answer(401, {"error": "log in"})
            if not name.startswith(f"{OWNER}/"):
                return self.answer(403, {"error": f"you may not create {name}"})
            if name in hub.repositories:
                return self.answer(409, {"error": "it exists", "url": f"{hub.url}/{name}"})
            hub.repositories[name] = Repository(
                private=bool(asked.get("private")) or asked.get("visibility") == "private"
            )
            hub.repositories[name].commit({".gitattributes": b""})
            return self.answer(200, {"url": f"{hub.url}/{name}", "name": name, "id": name})

        def branch(self, repository: Repository, name: str, rest: str, body: bytes) -> None:
            if rest in repository.branches:
                return self.answer(409, {"error": "it exists"})
            repository.branches[rest] = repository.branches["main"]
            return self.answer(201, {})

        def preupload(self, repository: Repository, name: str, rest: str, body: bytes) -> None:
            files = [
                {"path": one["path"], "shouldIgnore": False}
                | {"uploadMode": "lfs" if one["path"].endswith((".safetensors", ".pt2", ".onnx")) else "regular"}
                for one in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})

        def batch(self, asked: dict[str, Any]) -> None:
            objects = [
                {"oid": one["oid"], "size": one["size"]}
                | (
                    {}
                    if one["oid"] in hub.stored
                    else {"actions": {"upload": {"href": f"{hub.url}/large/{one['oid']}"}}}
                )
                for one in asked["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})

        def commit(self, repository: Repository, name: str, rest: str, body: bytes) -> None:
            before = repository.files(rest)
            if before is None:
                return self.missing("RevisionNotFound")
            files = dict(before[1])
            for line in map(json.loads, body.splitlines()):
                key, value = line["key"], line["value"]
                if key == "header":
                    hub.messages.append(value["summary"])
                elif key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    repository.large.add(value["oid"])
                    files[value["path"]] = hub.stored[value["oid"]]
            sha = repository.commit(files, rest)
            return self.answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{name}/commit/{sha}"})

        def revision(self, repository: Repository, name: str, rest: str, body: bytes) -> None:
            found = repository.files(rest)
            if found is None:
                return self.missing("RevisionNotFound")
            siblings = [{"rfilename": path} for path in found[1]]
            return self.answer(200, {"id": name, "modelId": name, "sha": found[0], "siblings": siblings, "tags": []})

        def tree(self, repository: Repository, name: str, rest: str, body: bytes) -> None:
            found = repository.files(rest)
            if found is None:
                return self.missing("RevisionNotFound")
            entries = []
            for path, data in found[1].items():
                sha256 = hashlib.sha256(data).hexdigest()
                entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                if sha256 in repository.large:
                    entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
                entries.append(entry)
            return self.answer(200, entries)

        def resolve(self, repository: Repository, name: str, rest: str, body: bytes) -> None:
            revision, _, path = rest.partition("/")
            found = repository.files(revision)
            if found is None:
                return self.missing("RevisionNotFound")
            if path not in found[1]:
                return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=found[0])
            data = found[1][path]
            sha256, sha1 = hashlib.sha256(data).hexdigest(), hashlib.sha1(data).hexdigest()
            headers = {"ETag": f'"{sha256 if sha256 in repository.large else sha1}"', "X_Repo_Commit": found[0]}
            return self.answer(200, data, **headers)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a hub within the block; it starts empty. Its owner is `OWNER`, who has the token `TOKEN`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
