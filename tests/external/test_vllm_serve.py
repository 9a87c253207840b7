"""``pronghorn serve`` on the real vLLM: a portable adapter answers over HTTP as base + adapter does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

import pronghorn
from tests.external import memorised, vllm_engine
from tests.external.memorised import MAX_TOKENS, PROMPTS, TRAINED

pytestmark = pytest.mark.external


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def complete(port: int, model: str, prompt: list[int]) -> list[str]:
    """The tokens of a greedy answer, each as vLLM writes an id."""
    asked = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0,
             "logprobs": 0, "return_tokens_as_token_ids": True}  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: list[str] = json.load(answer)["choices"][0]["logprobs"]["tokens"]
    return found


def test_a_portable_adapter_is_served_with_one_command(tmp_path: Path) -> None:
    base, adapter = memorised.write_pair(tmp_path, "llama", use_rslora=True, alpha_pattern={"q_proj": 3})
    pronghorn.export(adapter, tmp_path / "helper", format="adapter")
    trained = memorised.load(base, adapter)
    assert memorised.narrowest_margin(trained, TRAINED) > 2.0, "too close to a tie to prove anything"
    port = free_port()
    command = [sys.executable, "-m", "pronghorn.cli.main", "serve", tmp_path / "helper", "--port", str(port),
               "--vllm-python", vllm_engine.PYTHON, "--ready-seconds", "400"]  # fmt: skip
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
        # a shell that runs the tests in the background has them ignore Ctrl+C, and children inherit it
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    try:
        ready = next((line for line in process.stdout if line.startswith("ready")), None)
        assert ready, (tmp_path / "log").read_text()[-4000:]
        answers = [complete(port, "helper", prompt) for prompt in PROMPTS]
        plain = [complete(port, str(base), prompt) for prompt in PROMPTS]
        both = [(port, model, prompt) for prompt in PROMPTS for model in ("helper", str(base))]
        with ThreadPoolExecutor(len(both)) as pool:
            at_once = list(pool.map(lambda one: complete(*one), both))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    expected = [[f"token_id:{token}" for token in answer] for answer in memorised.greedy(trained)]
    assert answers == expected
    assert plain != expected
    pairs = [one for pair in zip(expected, plain, strict=True) for one in pair]
    assert at_once == pairs, "requests of the base and of the adapter in one batch keep apart"
