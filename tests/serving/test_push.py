"""Pushing to the hub, through the real huggingface_hub client, to a stand-in on 127.0.0.1."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pronghorn.adapters.record import AdapterRecord, write_record
from pronghorn.export.verify_folder import Row
from pronghorn.serving.card import Result, is_empty, is_ours, model_card
from pronghorn.serving.hub import template_lines
from scripts.first_run import commands
from tests import tiny
from tests.serving.test_docs import TEXT, needs_hub
from tests.stand_in_hub import COMMIT, READ_ONLY, TOKEN, Hub, RefusedError, files_of

CARD = """---
license: other
license_name: tiny-community
license_link: https://example.org/license
tags: [x]
---
# The base
"""

# each case is (folder, keywords of Push, adapter); prints what became of each
FOLDERS = """
import json, sys
from pronghorn.errors import PronghornError
from pronghorn.serving.hub import Push
from pronghorn.serving.push import push_folder
told = []
for folder, push, adapter in json.loads(sys.argv[1]):
    try:
        told.append(str(push_folder(folder, Push(**push), adapter=adapter)))
    except PronghornError as error:
        told.append(str(error))
print(json.dumps(told))
"""
EXPORT = """
import sys
from pronghorn.export.run import export
from pronghorn.serving.hub import Push
from pronghorn.serving.push import push_export
report, pushed = push_export(
    Push("owner/merged"), lambda watch: export(sys.argv[1], sys.argv[2], verify=False, progress=watch)
)
print(pushed)
"""
LOAD = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.tensor([[5, 6, 7, 8]])
base, adapter, merged = sys.argv[1:]
with torch.no_grad():
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    first = plain(ids).logits
    trained = PeftModel.from_pretrained(plain, adapter)(ids).logits
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    served = model(ids).logits
AutoTokenizer.from_pretrained(merged)
print(json.dumps([float((trained - first).abs().max()), float((served - trained).abs().max())]))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: its adapter, manifest and metrics. The base came from the hub."""
    folder = tmp_path_factory.mktemp("push") / "run"
    base = tiny.write_base(folder.parent / "base", shard="40KB")
    (base / "README.md").write_text(CARD)
    tiny.write_adapter(folder / "adapter", base)
    write_record(folder / "adapter", AdapterRecord("org/base", COMMIT, str(base)))
    rows = {"train_rows": 90, "eval_rows": 10, "tokens": 700, "trained_tokens": 300, "format": "messages"}
    manifest = {"data": {**rows, "data_hash": "ab" * 32, "sources": [f"{folder}/secret.jsonl"]}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    metrics = ({"step": 0, "eval_loss": 3.25}, {"step": 1, "loss": 3.0}, {"step": 9, "eval_loss": 1.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return folder


def python(hub: Hub, cache: Path, code: str, *arguments: object, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=hub.environment(cache, **env),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


def push(hub: Hub, cache: Path, *cases: tuple[Path, dict[str, object], Path | None], **env: str) -> list[str]:
    plain = [[str(folder), asked, str(adapter) if adapter else None] for folder, asked, adapter in cases]
    told: list[str] = json.loads(python(hub, cache, FOLDERS, json.dumps(plain), **env).splitlines()[-1])
    return told


def test_an_adapter_arrives_whole_with_a_card(run: Path, hub: Hub, tmp_path: Path) -> None:
    adapter, ours = run / "adapter", {"repo": "owner/adapter"}
    before = files_of(adapter)
    (told,) = push(hub, tmp_path, (adapter, {**ours, "private": True}, None), HF_TOKEN=TOKEN)
    repo = hub.repos["owner/adapter"]
    assert "3 files" in told or "files" in told
    assert repo.private and len(repo.commits) == 2
    card = repo.files["README.md"].decode()
    assert {name: data for name, data in repo.files.items() if name != "README.md"} == {
        ".gitattributes": repo.commits[0][1][".gitattributes"],
        **{name: data for name, data in before.items() if name != "README.md"},
    }
    assert files_of(adapter) == before  # the folder itself is left alone
    for line in (
        'base_model: "org/base"',
        "base_model_relation: adapter",
        "library_name: peft",
        'license: "other"',
        'license_name: "tiny-community"',
        f"- revision: `{COMMIT}`",
        "- rows: 90 to train on, 10 to evaluate on",
        f"- hash of the rows: `{'ab' * 32}`",
        "- evaluation loss: 3.2500 before training",
        "- evaluation loss: 1.5000 at step 9",
    ):
        assert f"{line}\n" in card
    assert "- every lora_A has its lora_B" in card or "lora" in card
    assert str(run.parent) not in card and "secret" not in card

    # a card that was edited on the hub stays, an untouched one is made again
    edited = card.replace("## Data", "## My data")
    assert is_ours(card) and not is_ours(edited)
    repo.commits.append(("f" * 40, {**repo.files, "README.md": edited.encode(), "old.safetensors": b"x"}))
    (told,) = push(hub, tmp_path, (adapter, {**ours, "overwrite": True}, None), HF_TOKEN=TOKEN)
    assert "removed old.safetensors" in told and "the one in the repository was kept" in told
    assert repo.files["README.md"].decode() == edited and "old.safetensors" not in repo.files
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()
    ]


def test_cards_are_told_apart(run: Path) -> None:
    empty = (run / "adapter" / "README.md").read_text()
    assert is_empty(empty, template_lines())
    assert not is_empty(f"{empty}\nTrained on my notes.", template_lines())
    assert not is_ours(empty)


def test_a_whole_model_that_was_quantised_is_no_fine_tune(tmp_path: Path) -> None:
    checks = (Row("quality against the base in float32", True, "KL 0.1"),)
    card = model_card("you/small", Result(tmp_path, "w4a16", None, tmp_path / "base", checks))
    assert "A complete model of base." in card and "adapter" not in card
    assert "checked by computing with it beside the base, in a fresh process" in card


def test_what_the_hub_refuses_is_explained(run: Path, hub: Hub, tmp_path: Path) -> None:
    adapter = run / "adapter"
    hub.publish("owner/full", {"README.md": b"# mine", "model.safetensors": b"x"})
    hub.publish("owner/open", {})
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    state = tmp_path / "state"
    state.mkdir()
    for name, data in files_of(adapter).items():
        (state / name).write_bytes(data)
    (state / "optimizer.pt").write_bytes(b"x")

    def case(folder: Path = adapter, **asked: object) -> tuple[Path, dict[str, object], None]:
        return folder, {"repo": "owner/new", "token": TOKEN, **asked}, None

    cases = (
        (case(token=None), "there is no token for the hub", "hf auth login"),
        (case(token=READ_ONLY), "owner/new was not pushed: this token has no right", "write permission"),
        (case(token="hf_wrong"), "does not accept the token", "valid token"),
        (case(repo="other/new"), "other/new was not pushed: this token has no right", "your own"),
        (case(repo="owner/open", token=READ_ONLY), "owner/open was not pushed: this token", "your own"),
        (case(repo="owner/full"), "owner/full exists and holds 1 files (model.safetensors)", "--overwrite"),
        (case(repo="owner/open", private=True), "owner/open exists and is public, asked for was private", ""),
        (case(repo="a/b/c"), "'a/b/c' is no name on the hub", "OWNER/NAME"),
        (case(broken), "breaks a promise", ""),
        (case(state), "holds optimizer.pt, which runs code", "--format lora"),
    )
    told = push(hub, tmp_path, *(one for one, _, _ in cases))
    for text, (_, said, fix) in zip(told, cases, strict=True):
        assert said in text and fix in text.partition("fix: ")[2], text
    assert set(hub.repos) == {"owner/full", "owner/open"} and hub.puts == 0
    asked = len(hub.asked)
    (offline,) = push(hub, tmp_path, case(), HF_HUB_OFFLINE="1")
    assert "switched off (HF_HUB_OFFLINE)" in offline and len(hub.asked) == asked
    (away,) = push(hub, tmp_path, case(), HF_ENDPOINT="http://127.0.0.1:9")
    assert "owner/new was not pushed" in away and "check the network" in away


def test_a_push_that_is_killed_shows_nothing_and_goes_on(run: Path, hub: Hub, tmp_path: Path) -> None:
    shards = len(list((run.parent / "base").glob("*.safetensors")))
    assert shards > 3
    held, release = threading.Event(), threading.Event()

    def hold(number: int) -> None:
        if number == 2:
            held.set()
            release.wait(60)
            raise RefusedError(503, {"error": "cut off"})

    hub.on_put = hold
    command = [sys.executable, "-c", EXPORT, str(run / "adapter"), str(tmp_path / "merged")]
    first = subprocess.Popen(command, env=hub.environment(tmp_path, HF_TOKEN=TOKEN))
    assert held.wait(60)
    until = time.monotonic() + 30  # the second shard is on its way, and the others are written meanwhile
    while len(list(tmp_path.glob(".merged.staging-*/*.safetensors"))) < shards:
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    repo = hub.repos["owner/merged"]
    assert list(repo.files) == [".gitattributes"] and len(hub.stored) == 1
    assert not (tmp_path / "merged").exists()
    release.set()

    told = python(hub, tmp_path, EXPORT, run / "adapter", tmp_path / "merged", HF_TOKEN=TOKEN)
    assert "pushed to" in told
    sent = [line for line in hub.asked if line.startswith("PUT ")]
    assert len(sent) == len(set(sent)) + 1 == shards + 1  # only the one that was cut off went up twice
    written = files_of(tmp_path / "merged")
    assert {name: repo.files.get(name) for name in written if name != "README.md"} == {
        name: data for name, data in written.items() if name != "README.md"
    }
    commits = [line for line in hub.asked if "/commit/" in line]
    assert len(commits) == 1  # all shards became visible at once, after the last was stored
    assert hub.asked.index(commits[0]) > max(map(hub.asked.index, sent))
    card = repo.files["README.md"].decode()
    assert card != CARD and "base_model_relation: finetune" in card


def test_a_merge_whose_upload_fails_is_kept(run: Path, hub: Hub, tmp_path: Path) -> None:
    def refuse(number: int) -> None:
        hub.repos["owner/merged"].commits.append(("e" * 40, {"other.txt": b""}))

    hub.on_put = refuse
    failing = EXPORT.replace(
        "report, pushed = push_export(", "from pronghorn.errors import ExportError\ntry: push_export("
    ).replace(")\n)\nprint(pushed)", "))\nexcept ExportError as error: print(error)")
    told = python(hub, tmp_path, failing, run / "adapter", tmp_path / "merged", HF_TOKEN=TOKEN)
    assert "somebody else changed the repository meanwhile" in told
    assert f"The folder {tmp_path / 'merged'} is complete" in told
    assert f"pronghorn push {tmp_path / 'merged'} owner/merged --adapter {run / 'adapter'}" in told
    assert (tmp_path / "merged" / "config.json").is_file()


NOTEBOOK = """
import sys, torch
from pronghorn import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("org/base")
model = FastLanguageModel.get_peft_model(model, r=4)
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
model.push_to_hub("adapter", tokenizer, token=sys.argv[1], private=False)
model.push_to_hub_merged("owner/merged", tokenizer, token=sys.argv[1], commit_message="First")
"""


@pytest.mark.slow
def test_from_a_notebook_to_the_hub_and_back(run: Path, hub: Hub, tmp_path: Path) -> None:
    hub.publish("org/base", files_of(run.parent / "base"))
    told = python(hub, tmp_path, NOTEBOOK, TOKEN)
    assert told.count("pushed to") == 2
    moved, apart = json.loads(
        python(hub, tmp_path, LOAD, "org/base", "owner/adapter", "owner/merged").splitlines()[-1]
    )
    assert moved > 0.1 and apart < 0.05 * moved
    card = hub.repos["owner/merged"].files["README.md"].decode()
    assert "logits equal base + adapter" in card and 'license: "other"' in card
    assert f"- revision: `{COMMIT}`" in card
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()
    ]


@pytest.mark.slow
def test_the_documented_commands_run(run: Path, tmp_path: Path) -> None:
    hub = Hub(account="you")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = hub.environment(tmp_path / "cache", HF_TOKEN=TOKEN, PATH=path)
    (tmp_path / "helper").symlink_to(run / "adapter")
    typed = [line for line in commands(TEXT) if needs_hub(line)]
    for command in typed:
        subprocess.run(command, shell=True, cwd=tmp_path, env=env, check=True)
    hub.shutdown()
    assert len(typed) == 2
    assert {name: (repo.private, len(repo.commits)) for name, repo in hub.repos.items()} == {
        "you/helper": (True, 2),
        "you/helper-merged": (False, 2),
    }
