"""Hub ids through the real huggingface_hub client, against a small server on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# one process per case: the client reads its endpoint, cache and offline switch when it is imported
SCRIPT = """
import json, sys
from pronghorn.errors import PronghornError
from pronghorn.sources.resolve import resolve
name, revision, how = sys.argv[1], sys.argv[2] or None, sys.argv[3]
try:
    found = resolve(name, revision=revision)
    if how == "load":
        from pronghorn.loading.load import load
        model, _ = load(found)
        model = __import__("pronghorn").attach_lora(model, say=None)
        model.save_pretrained(sys.argv[4])
    print(json.dumps({"path": str(found.path), "revision": found.revision, "name": found.name}))
except PronghornError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""


class Hub(ThreadingHTTPServer):
    """The three answers the client needs: repository, tree of files, file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        del format, args

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        if "/owner/model" not in path:
            self.send(401, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in path:
            self.file(path.rpartition("/resolve/")[2], body)
        elif "no-such-branch" in path:
            self.send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in path:
            self.send(200, json.dumps([self.entry(file) for file in self.files()]).encode(), body)
        else:
            siblings = [{"rfilename": name} for name in self.files()]
            info = {"id": "owner/model", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self.send(200, json.dumps(info).encode(), body)

    def files(self) -> list[str]:
        return sorted(
            str(p.relative_to(self.server.folder)) for p in self.server.folder.rglob("*") if p.is_file()
        )

    def entry(self, name: str) -> dict[str, object]:
        data = (self.server.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def file(self, rest: str, body: bool) -> None:
        data = (self.server.folder / rest.partition("/")[2]).read_bytes()
        tag = hashlib.sha1(data).hexdigest()
        self.send(200, data, body, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

    def send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tiny.write_base(tmp_path_factory.mktemp("hub") / "files")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "modeling_own.py").write_text("raise SystemExit('code of the model ran')")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def run(
    cache: Path, hub: Hub | None, name: str, revision: str = "", *more: str, **env: str
) -> dict[str, str]:
    endpoint = f"http://127.0.0.1:{hub.server_port}" if hub else "http://127.0.0.1:9"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, revision, *(more or ("resolve",))],
        env={**clean, **settings, **env},
        cwd=cache,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_snapshot_is_fixed_to_a_commit_and_reused_offline(hub: Hub, tmp_path: Path) -> None:
    online = run(tmp_path, hub, "owner/model", "", "load", str(tmp_path / "adapter"))
    assert (online["revision"], online["name"]) == (COMMIT, "owner/model")
    files = {path.name for path in Path(online["path"]).rglob("*")}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= files
    assert not files & {"pytorch_model.bin", "modeling_own.py", "onnx"}

    record = json.loads((tmp_path / "adapter" / "pronghorn.json").read_text())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (record["base_name"], record["base_revision"]) == ("owner/model", COMMIT)
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/model", COMMIT)

    asked = len(hub.asked)
    offline = run(tmp_path, hub, "owner/model", HF_HUB_OFFLINE="1")
    assert offline == online
    assert len(hub.asked) == asked


def test_offline_without_a_copy(tmp_path: Path, hub: Hub) -> None:
    answer = run(tmp_path, hub, "owner/model", HF_HUB_OFFLINE="1")
    assert answer["error"] == "SourceError"
    assert "the cache does not hold the model" in answer["text"]


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("owner/nothing", "", "the hub has no such model"),
        ("owner/model", "no-such-branch", "no revision 'no-such-branch'"),
    ],
)
def test_wrong_names(hub: Hub, tmp_path: Path, name: str, revision: str, said: str) -> None:
    answer = run(tmp_path, hub, name, revision)
    assert answer["error"] == "SourceError"
    assert said in answer["text"]


def test_hub_out_of_reach(tmp_path: Path) -> None:
    answer = run(tmp_path, None, "owner/model")
    assert answer["error"] == "SourceError"
    assert "owner/model" in answer["text"]
