"""``fast_generate`` on the real vLLM: its greedy answers are those of ``generate`` on the same weights."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pronghorn import FastLanguageModel
from pronghorn.errors import AdapterError, ConfigError
from scripts.first_run import ROOT, blocks
from tests import tiny
from tests.external import memorised, vllm_engine
from tests.external.memorised import BASE, MAX_TOKENS, PROMPTS, TRAINED
from tests.serving.test_fast_inference import ended, engine_of

pytestmark = pytest.mark.external

RETRAINED = 3
GREEDY = {"temperature": 0, "max_tokens": MAX_TOKENS}
IDS = [{"prompt_token_ids": prompt} for prompt in PROMPTS]


def tokens(answers: list[Any]) -> list[list[int]]:
    return [list(one.outputs[0].token_ids) for one in answers]


def learn(model: Any, seed: int) -> list[list[int]]:
    """Train until the greedy answers are those of ``seed``, far from any tie; what transformers generates."""
    model.for_training()
    memorised.memorise(model, seed, steps=60, rate=5e-3)
    model.for_inference()
    assert memorised.narrowest_margin(model, seed) > 2.0, "too close to a tie to prove anything"
    return memorised.greedy(model)


def test_a_notebook_trains_asks_trains_on_and_asks_again(tmp_path: Path) -> None:
    base, _ = memorised.write_pair(tmp_path, "llama")
    plain = memorised.load(base)
    assert memorised.narrowest_margin(plain, BASE) > 2.0, "too close to a tie to prove anything"
    model, tokenizer = FastLanguageModel.from_pretrained(
        base, dtype="float32", max_seq_length=64, fast_inference=True, vllm_python=vllm_engine.PYTHON,
        max_lora_rank=16,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
    trained = learn(model, TRAINED)
    model.save_lora(tmp_path / "lora", tokenizer)
    model.save_pretrained_merged(tmp_path / "first", tokenizer, save_method="lora")
    lora = model.load_lora(tmp_path / "lora")
    first = model.load_lora(tmp_path / "first")
    assert tokens(model.fast_generate(IDS, GREEDY, lora)) == trained
    expected = memorised.greedy(plain)
    assert tokens(model.fast_generate(IDS, GREEDY)) == expected != trained, "without a request it is the base"
    check_requests(model, tokenizer, trained)

    process = engine_of(model)._process
    assert process is not None
    retrained = learn(model, RETRAINED)
    model.save_lora(tmp_path / "lora", tokenizer, overwrite=True)
    with pytest.raises(AdapterError, match="has other content than when load_lora read it"):
        model.fast_generate(IDS, GREEDY, lora)
    again = model.load_lora(tmp_path / "lora")
    assert tokens(model.fast_generate(IDS, GREEDY, again)) == retrained != trained
    mixed = model.fast_generate(IDS, GREEDY, [first, again, None])
    assert tokens(mixed) == [trained[0], retrained[1], expected[2]], "two adapters and the base at once"

    pid = process._process.pid
    assert process.alive and not ended(pid), "one engine for all of it"
    del model, process, plain
    gc.collect()
    assert ended(pid)


def check_requests(model: Any, tokenizer: Any, trained: list[list[int]]) -> None:
    """Texts, ends, numbers of answers and log-probabilities; what vLLM refuses, and that it goes on."""
    lora = model.load_lora(engine_of(model).origin.path.parent / "lora")
    text = tokenizer.decode(PROMPTS[0])
    (one,) = model.fast_generate(text, {**GREEDY, "stop_token_ids": [trained[0][4]]}, lora)
    assert (one.prompt, list(one.prompt_token_ids)) == (text, list(PROMPTS[0]))
    answer = one.outputs[0]
    assert list(answer.token_ids) == trained[0][:5]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", trained[0][4])
    assert answer.text == tokenizer.decode(trained[0][:4], skip_special_tokens=True)
    short, whole = model.fast_generate(
        IDS[:2], [{**GREEDY, "max_tokens": 2}, {**GREEDY, "logprobs": 2}], lora
    )
    assert (tokens([short]), short.outputs[0].finish_reason) == ([trained[0][:2]], "length")
    assert whole.outputs[0].finish_reason == "stop"
    for token, seen in zip(trained[1], whole.outputs[0].logprobs, strict=True):
        assert seen[token].rank == 1 and seen[token].logprob == max(one.logprob for one in seen.values())
    sampled = {"temperature": 1.5, "n": 3, "seed": 1, "max_tokens": 4, "logit_bias": {7: -100.0}}
    runs = [model.fast_generate(IDS[0], sampled)[0].outputs for _ in range(2)]
    assert len(runs[0]) == 3 and runs[0] == runs[1]
    chosen = model.fast_generate(text, {"structured_outputs": {"choice": ["yes"]}, "max_tokens": 8})
    assert chosen[0].outputs[0].text == "yes"
    with pytest.raises(ConfigError, match="temprature"):
        model.fast_generate(IDS, {"temprature": 1})
    with pytest.raises(ConfigError, match="64"):
        model.fast_generate([*IDS, {"prompt_token_ids": [5] * 65}], GREEDY, lora)
    assert tokens(model.fast_generate(IDS, GREEDY, lora)) == trained, "nothing is left of the refused call"


def test_the_fields_of_vllms_own_sampling_params() -> None:
    program = """
import json, sys
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from pronghorn.serving.answers import sampling_fields
choice = StructuredOutputsParams(choice=["a"])
given = [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9, max_tokens=64, stop="x", seed=3),
         SamplingParams(temperature=0), SamplingParams(logit_bias={3: 1.0}, structured_outputs=choice)]
print("\\n" + json.dumps([sampling_fields(one) for one in given]))
"""
    done = subprocess.run(
        [vllm_engine.PYTHON, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    default, usual, greedy, objects = json.loads(done.stdout.splitlines()[-1])
    assert default == {}
    assert usual == {"temperature": 0.8, "top_p": 0.9, "max_tokens": 64, "stop": ["x"], "seed": 3}
    assert greedy == {"temperature": 0}
    assert objects["logit_bias"] == {"3": 1.0} and objects["structured_outputs"]["choice"] == ["a"]


def test_the_program_of_the_document_runs(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", **memorised.OVERRIDES["llama"])
    tiny.tokenizer().save_pretrained(tiny.write_adapter(tmp_path / "helper", base))
    environment = vllm_engine.PYTHON.parents[1]
    (tmp_path / environment.name).symlink_to(environment)
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (program,) = [block for block in blocks(text, "python") if "fast_generate" in block]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"starts: LLM(model={str(base)!r}" in done.stdout
