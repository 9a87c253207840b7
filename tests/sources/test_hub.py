"""Hub ids through the real huggingface_hub client, against a small server on 127.0.0.1."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.stand_in_hub import COMMIT, Hub, files_of

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


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tiny.write_base(tmp_path_factory.mktemp("hub") / "files")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "modeling_own.py").write_text("raise SystemExit('code of the model ran')")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    server = Hub()
    server.publish("owner/model", files_of(folder))
    yield server
    server.shutdown()


def run(cache: Path, hub: Hub, name: str, revision: str = "", *more: str, **env: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, revision, *(more or ("resolve",))],
        env=hub.environment(cache, **env),
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


def test_hub_out_of_reach(hub: Hub, tmp_path: Path) -> None:
    answer = run(tmp_path, hub, "owner/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert answer["error"] == "SourceError"
    assert "owner/model" in answer["text"]
