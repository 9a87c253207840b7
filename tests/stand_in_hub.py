"""A hub on 127.0.0.1 that the real huggingface_hub client reads from and writes to.

It answers what the client asks: repositories, file trees, files; creating, how files are sent, storage by
hash (LFS), one commit. Content in the storage belongs to no repository until a commit names it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_aVerySecretTokenThatIsNeverWrittenDown"
READ_ONLY = "hf_aTokenThatMayOnlyRead"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".gguf")


@dataclass
class Repo:
    """The files of each commit, newest last."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((one for one in self.commits if one[0] == revision), None)


class Hub(ThreadingHTTPServer):
    """``asked`` lists all requests; ``stored`` is the storage by hash; ``on_put`` runs before each upload."""

    daemon_threads = True

    def __init__(self, account: str = "owner") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.account = account
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.on_put: Callable[[int], None] = lambda number: None
        self.puts = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, name: str, files: dict[str, bytes], private: bool = False) -> None:
        self.repos[name] = Repo(private, [(COMMIT, files)])

    def environment(self, cache: Path, **more: str) -> dict[str, str]:
        """For a process of its own: the client reads its settings when it is imported."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "NO_PROXY": "*"}
        # the storage of today's hub (Xet) is a service of its own; this is its older form, still served
        plain = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        return {**clean, **settings, **plain, **more}


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder, as a commit holds them."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@dataclass
class Answer:
    """What a request is answered."""

    status: int
    data: Any
    headers: dict[str, str] = field(default_factory=dict)


class RefusedError(Exception):
    """Ends a request with an answer."""

    def __init__(self, *answer: Any) -> None:
        super().__init__()
        self.answer = Answer(*answer)


class Handler(BaseHTTPRequestHandler):
    """One request: the first route that fits."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        del format, args

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.server.asked.append(f"{self.command} {path}" if self.command in ("POST", "PUT") else path)
        self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.content = b"".join(self.chunks())
        fits = ((re.fullmatch(pattern, path), route) for pattern, route in ROUTES)
        found, route = next((pair for pair in fits if pair[0]), (None, None))
        try:
            assert found and route, f"no route for {path}"
            told = route(self, *found.groups())
        except RefusedError as early:
            told = early.answer
        body = told.data if isinstance(told.data, bytes) else json.dumps(told.data).encode()
        self.send_response(told.status)
        for key, value in {"Content-Length": str(len(body)), **told.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def find(self, name: str, revision: str = "main") -> tuple[Repo, str, dict[str, bytes]]:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self.token not in (TOKEN, READ_ONLY)):
            raise RefusedError(401, {}, {"X-Error-Code": "RepoNotFound"})
        commit = repo.at(revision)
        if commit is None:
            raise RefusedError(404, {}, {"X-Error-Code": "RevisionNotFound"})
        return repo, *commit

    def require_right(self) -> None:
        if self.token == READ_ONLY:
            raise RefusedError(403, {"error": "you must use a write token"})
        if self.token != TOKEN:
            raise RefusedError(401, {"error": "Invalid username or password."})

    def info(self, name: str, revision: str = "main") -> Answer:
        repo, commit, files = self.find(name, revision)
        siblings = [describe("rfilename", path, data) for path, data in sorted(files.items())]
        told = {"id": name, "sha": commit, "siblings": siblings, "private": repo.private, "tags": []}
        return Answer(200, told)

    def tree(self, name: str, revision: str, below: str | None) -> Answer:
        files = self.find(name, revision)[2]
        listed = [describe("path", path, data) for path, data in sorted(files.items())]
        found = [one for one in listed if one["path"].startswith(below or "")]
        return Answer(200, found) if found else Answer(404, {}, {"X-Error-Code": "EntryNotFound"})

    def file(self, name: str, revision: str, path: str) -> Answer:
        _, commit, files = self.find(name, revision)
        if path not in files:
            return Answer(404, {}, {"X-Error-Code": "EntryNotFound"})
        tag = hashlib.sha1(files[path]).hexdigest()
        return Answer(200, files[path], {"ETag": f'"{tag}"', "X-Repo-Commit": commit})

    def create(self) -> Answer:
        asked = json.loads(self.content)
        name = f"{asked.get('organization') or self.server.account}/{asked['name']}"
        self.require_right()
        if not name.startswith(f"{self.server.account}/"):
            return Answer(403, {"error": f"You don't have the rights to create a model under {name}"})
        if name in self.server.repos:
            url = f"{self.server.url}/{name}"
            return Answer(409, {"error": "You already created this model repo", "url": url})
        private = asked.get("private", asked.get("visibility") == "private")
        self.server.publish(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=bool(private))
        return Answer(200, {"url": f"{self.server.url}/{name}"})

    def preupload(self, name: str, revision: str) -> Answer:
        self.require_right()
        self.find(name, revision)
        names = [one["path"] for one in json.loads(self.content)["files"]]
        modes = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
        files = [{"path": one, "uploadMode": mode, "shouldIgnore": False} for one, mode in modes.items()]
        return Answer(200, {"files": files})

    def batch(self, name: str) -> Answer:
        self.require_right()
        self.find(name)
        objects = json.loads(self.content)["objects"]
        for one in objects:
            if one["oid"] not in self.server.stored:
                one["actions"] = {"upload": {"href": f"{self.server.url}/storage/{one['oid']}"}}
        return Answer(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> Answer:
        self.server.puts += 1
        self.server.on_put(self.server.puts)
        if hashlib.sha256(self.content).hexdigest() != oid:
            return Answer(400, {"error": "another hash"})
        self.server.stored[oid] = self.content
        return Answer(200, b"")

    def validate(self) -> Answer:
        return Answer(200, {"errors": [], "warnings": []})

    def commit(self, name: str, revision: str) -> Answer:
        self.require_right()
        repo, parent, before = self.find(name, revision)
        files = dict(before)
        for line in map(json.loads, self.content.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", parent) != parent:
                return Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        made = hashlib.sha1(f"{name}{len(repo.commits)}".encode()).hexdigest()
        repo.commits.append((made, files))
        url = f"{self.server.url}/{name}/commit/{made}"
        return Answer(200, {"success": True, "commitOid": made, "commitUrl": url})


def describe(key: str, path: str, data: bytes) -> dict[str, Any]:
    """A file as listings tell of it."""
    told: dict[str, Any] = {
        key: path,
        "size": len(data),
        "type": "file",
        "oid": hashlib.sha1(data).hexdigest(),
    }
    if path.endswith(LARGE):
        told["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "oid": told["oid"],
                       "pointerSize": 130}  # fmt: skip
    return told


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: tuple[tuple[str, Callable[..., Answer]], ...] = (
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", Handler.validate),
    (rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (rf"/api/models/{NAME}/commit/(.+)", Handler.commit),
    (rf"/api/models/{NAME}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    (rf"/api/models/{NAME}/revision/(.+)", Handler.info),
    (rf"/api/models/{NAME}", Handler.info),
    (rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"/storage/(\w+)", Handler.put),
    (rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.file),
)
