"""The engine beside a model, without vLLM: what is refused before it, and the process that is asked.

The process is real and runs the real program; the package it finds under the name of vLLM is a few lines that
answer with what they were asked. tests/external/test_fast_generate.py has the real one.
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from pronghorn import FastLanguageModel
from pronghorn.errors import (
    AdapterError,
    ConfigError,
    MissingDependencyError,
    NotSupportedError,
    PronghornError,
)
from pronghorn.serving import fast_inference, vllm
from pronghorn.serving.answers import sampling_fields
from pronghorn.serving.fast_inference import EngineOptions, FastInference
from pronghorn.serving.fast_inference import _digest as digest
from pronghorn.serving.vllm import Engine, ServePlan, plan_engine
from pronghorn.serving.vllm_process import VllmProcess
from tests import four_bit, tiny

ECHO = """
import os, subprocess, sys, time
import __main__
from types import SimpleNamespace as Thing

__version__ = "0.0"

class SamplingParams:
    def __init__(self, max_tokens=16, stop=None):
        self.__dict__.update(locals())

class LLM:
    def __init__(self, model, **arguments):
        print("noise on stdout", flush=True)
        assert os.environ["VLLM_NO_USAGE_STATS"] == os.environ["HF_HUB_OFFLINE"] == "1"
        self.model, self.arguments, self.loaded = model, arguments, []
        self.llm_engine = Thing(add_lora=self.loaded.append, has_unfinished_requests=lambda: False)
        if os.environ.get("ECHO") == "fails":
            raise RuntimeError("no memory for blocks")
        if os.environ.get("ECHO") == "sleeps":
            time.sleep(60)

    def get_default_sampling_params(self):
        return SamplingParams(max_tokens=1)

    def generate(self, prompts, sampling, lora_request, use_tqdm):
        ids = [one["prompt_token_ids"] for one in prompts]
        if [666] in ids:
            print("the last words", file=sys.stderr, flush=True)
            os._exit(3)
        if [667] in ids:
            print("left behind", subprocess.Popen(["sleep", "60"]).pid, file=sys.stderr, flush=True)
            os._exit(3)
        if [668] in ids:
            __main__.replies.write('{"outputs": [{"pro')
            __main__.replies.flush()
            os._exit(4)
        if [999] in ids:
            time.sleep(60)
        return [self.answer(*one) for one in zip(ids, sampling, lora_request)]

    def answer(self, ids, sampling, lora):
        said = lora.lora_name if lora else "base"
        number = lora.lora_int_id if lora else 0
        one = Thing(index=0, text=said, token_ids=[number] * sampling.max_tokens, cumulative_logprob=None,
                    logprobs=[{7: Thing(logprob=float("-inf"), rank=1, decoded_token="g")}],
                    finish_reason="length", stop_reason=None)
        return Thing(prompt_token_ids=ids, prompt_logprobs=[None, {}], outputs=[one])
"""
LORA_REQUEST = """
class LoRARequest:
    def __init__(self, lora_name, lora_int_id, lora_path):
        self.__dict__.update(locals())
"""
WAY_OUT = "fast_inference=True"


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter for which the package above is installed as vLLM."""
    package = tmp_path / "site" / "vllm"
    (package / "lora").mkdir(parents=True)
    (package / "__init__.py").write_text(ECHO)
    (package / "sampling_params.py").write_text("")
    (package / "lora" / "__init__.py").write_text("")
    (package / "lora" / "request.py").write_text(LORA_REQUEST)
    metadata = tmp_path / "site" / "vllm-0.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return Path(sys.executable)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base") / "llama")


def loaded(base: Path, echo: Path, **options: Any) -> Any:
    return FastLanguageModel.from_pretrained(base, fast_inference=True, vllm_python=echo, **options)[0]


def engine_of(model: Any) -> FastInference:
    found: FastInference = model.get_base_model()._pronghorn_fast_inference
    return found


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def ended_or_unreaped(pid: int) -> bool:
    """What nobody waits for may stay in the table of processes."""
    return ended(pid) or ") Z " in Path(f"/proc/{pid}/stat").read_text()


def test_the_usual_notebook(
    base: Path, echo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = loaded(base, echo, max_seq_length=128, max_lora_rank=12)
    model = FastLanguageModel.get_peft_model(model, r=4, accelerate=False)
    engine = engine_of(model)
    assert engine._process is None, "training has the memory to itself until the first question"
    mine = tiny.write_adapter(tmp_path / "mine", base)
    capsys.readouterr()
    lora = model.load_lora(mine)
    text, ids = "What is it?", {"prompt_token_ids": [5, 6, 7]}
    answers = model.fast_generate([text, ids], sampling_params={"max_tokens": 2}, lora_request=[lora, None])
    assert [one.prompt for one in answers] == [text, None]
    assert list(answers[0].prompt_token_ids) == engine.origin.tokenizer(text)["input_ids"]
    first, second = (one.outputs[0] for one in answers)
    assert (first.text, first.token_ids, second.text, second.token_ids) == (lora.name, (1, 1), "base", (0, 0))
    assert first.finish_reason == "length" and answers[0].prompt_logprobs == (None, {})
    assert first.logprobs is not None and first.logprobs[0][7].logprob == float("-inf")
    said = capsys.readouterr().out
    for part in (f"LLM(model={str(base)!r}", "max_model_len=128", "enable_lora=True", "max_lora_rank=16"):
        assert part in said
    assert model.fast_generate("x")[0].outputs[0].token_ids == (0,), "the engine's own default"
    assert capsys.readouterr().out == "", "started once"

    tiny.write_adapter(mine, base, seed=1)
    with pytest.raises(AdapterError, match="has other content than when load_lora read it"):
        model.fast_generate("x", lora_request=lora)
    again = model.load_lora(mine)
    assert again.name != lora.name
    assert model.fast_generate("x", lora_request=again)[0].outputs[0].token_ids == (2,), "another number"

    process = engine._process
    assert process is not None and process.alive
    pid = process._process.pid
    twin = copy.deepcopy(model)
    assert engine_of(twin)._process is None and pickle.loads(pickle.dumps(engine.options)) == engine.options
    assert twin.fast_generate("x")[0].outputs[0].text == "base"
    twin.stop_engine()
    del engine, process, model
    gc.collect()
    assert ended(pid)


def test_a_rendered_chat_gets_no_second_begin_token(base: Path, echo: Path) -> None:
    model = loaded(base, echo)
    begins = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model._pronghorn_origin.tokenizer.backend_tokenizer.post_processor = begins
    plain, rendered = model.fast_generate(["one", "<s>one"])
    assert plain.prompt_token_ids == rendered.prompt_token_ids
    assert plain.prompt_token_ids[:1] == (1,) and plain.prompt_token_ids.count(1) == 1
    model.stop_engine()


def test_what_was_asked_wrong_is_said_and_the_engine_goes_on(base: Path, echo: Path) -> None:
    model = loaded(base, echo)
    with pytest.raises(ConfigError, match="unexpected keyword argument 'temprature'"):
        model.fast_generate("x", {"temprature": 0.5})
    process = model._pronghorn_fast_inference._process
    for asked, said in (
        ({"prompts": [[{"role": "user", "content": "x"}]]}, "apply_chat_template"),
        ({"prompts": "x", "sampling_params": 0.5}, "sampling_params is a float"),
        ({"prompts": "x", "sampling_params": {"stop": {1}}}, "not JSON serializable"),
        ({"prompts": ["x", "y"], "sampling_params": [{}]}, "1 entries for 2 prompts"),
        ({"prompts": "x", "lora_request": "mine"}, "lora_request is a str"),
        ({"prompts": "x", "priority": 1}, "no keyword 'priority'"),
        ({"prompts": {"prompt": "x", "cache_salt": "1"}}, "has 'cache_salt', which does not reach"),
        ({"prompts": {"prompt_token_ids": [5], "multi_modal_data": {}}}, "has 'multi_modal_data'"),
        ({"prompts": {"role": "user", "content": "x"}}, "apply_chat_template"),
        ({"prompts": {"prompt_token_ids": None}}, "prompt_token_ids is 'None'"),
        ({"prompts": {"prompt_token_ids": [1.5]}}, r"prompt_token_ids is '\[1.5\]'"),
    ):
        with pytest.raises(ConfigError, match=said):
            model.fast_generate(**asked)
    with pytest.raises(NotSupportedError, match="use_tqdm=True: the engine has a process of its own"):
        model.fast_generate("x", use_tqdm=True)
    told = model.fast_generate({"prompt": "x", "prompt_token_ids": [5]})[0]
    assert (told.prompt, told.prompt_token_ids) == ("x", (5,))
    assert model.fast_generate("x")[0].outputs[0].text == "base"
    assert model._pronghorn_fast_inference._process is process
    model.stop_engine()


def test_an_engine_that_dies_says_its_last_lines_and_starts_again(base: Path, echo: Path) -> None:
    model = loaded(base, echo)
    with pytest.raises(PronghornError, match=r"ended with code 3(.|\n)*the last words") as caught:
        model.fast_generate({"prompt_token_ids": [666]})
    assert "noise on stdout" in str(caught.value) and caught.value.fix
    assert model.fast_generate("x")[0].outputs[0].text == "base"
    model.stop_engine()


def test_what_a_dead_engine_started_ends_with_it(base: Path, echo: Path) -> None:
    one = VllmProcess(Engine(echo, "0.0"), ServePlan(base, "base"))
    with pytest.raises(PronghornError, match="left behind") as caught:
        one.generate({"prompts": [[667]], "sampling": [None], "loras": [None]})
    found = re.search(r"left behind (\d+)", str(caught.value))
    assert found is not None
    deadline = time.monotonic() + 20
    while not ended_or_unreaped(int(found[1])):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_fork_leaves_the_engine_alone(base: Path, echo: Path) -> None:
    one = VllmProcess(Engine(echo, "0.0"), ServePlan(base, "base"))
    child = multiprocessing.get_context("fork").Process(target=one.stop)
    child.start()
    child.join()
    assert child.exitcode == 0 and one.alive
    assert one.generate({"prompts": [[5]], "sampling": [None], "loras": [None]})
    one.stop()


def test_a_line_that_is_no_answer_is_quoted(base: Path, echo: Path, tmp_path: Path) -> None:
    one = VllmProcess(Engine(echo, "0.0"), ServePlan(base, "base"))
    with pytest.raises(PronghornError, match=r"it ended with code 4 after b'\{\"outputs\": \[\{\"pro'"):
        one.generate({"prompts": [[668]], "sampling": [None], "loras": [None]})
    assert not one.stop.alive
    for said in ("hello from site", "7"):
        (tmp_path / "site" / "sitecustomize.py").write_text(f"print({said!r}, flush=True)\n")
        with pytest.raises(PronghornError, match=rf"it wrote b'{said}\\n' where an answer was due"):
            VllmProcess(Engine(echo, "0.0"), ServePlan(base, "base"))


def test_an_interpreter_that_is_gone(base: Path, tmp_path: Path) -> None:
    with pytest.raises(PronghornError, match=r"which had vLLM 0\.0, does not start: No such file") as caught:
        VllmProcess(Engine(tmp_path / "python", "0.0"), ServePlan(base, "base"))
    assert "vllm_python=PATH" in caught.value.fix


def test_ctrl_c_ends_the_engine_and_the_next_question_is_answered(base: Path, echo: Path) -> None:
    model = loaded(base, echo)
    model.fast_generate("x")
    process = model._pronghorn_fast_inference._process._process
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            model.fast_generate({"prompt_token_ids": [999]})
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.poll() is not None
    assert model.fast_generate("x")[0].outputs[0].text == "base"
    model.stop_engine()


@pytest.mark.parametrize(
    ("mood", "said"), [("fails", "no memory for blocks"), ("sleeps", "was not ready after 1 s")]
)
def test_an_engine_that_never_gets_ready(
    base: Path, echo: Path, monkeypatch: pytest.MonkeyPatch, mood: str, said: str
) -> None:
    monkeypatch.setenv("ECHO", mood)
    with pytest.raises(PronghornError, match=said):
        VllmProcess(Engine(echo, "0.0"), ServePlan(base, "base"), ready_seconds=1)


def test_the_engine_ends_with_its_input_as_after_a_killed_notebook(base: Path, echo: Path) -> None:
    one = VllmProcess(Engine(echo, "0.0"), ServePlan(base, "base"))
    assert one.alive and one._process.stdin is not None
    one._process.stdin.close()
    assert one._process.wait(20) == 0
    assert not one.alive
    one.stop()


def test_adapters_are_checked_before_the_engine_sees_them(base: Path, echo: Path, tmp_path: Path) -> None:
    model = loaded(base, echo, max_lora_rank=8)
    wide = tiny.write_adapter(tmp_path / "wide", base, r=12)
    with pytest.raises(AdapterError, match="has rank 12, the engine takes at most 8") as caught:
        model.load_lora(wide)
    assert "max_lora_rank=12" in caught.value.fix
    full = tiny.write_adapter(tmp_path / "full", base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(NotSupportedError, match="modules_to_save: vLLM refuses modules trained in full"):
        model.load_lora(full)
    other = tiny.write_base(tmp_path / "other", "llama", num_hidden_layers=1)
    with pytest.raises(AdapterError, match="which the class of"):
        loaded(other, echo).load_lora(tiny.write_adapter(tmp_path / "deep", base))
    with pytest.raises(AdapterError, match="is not an adapter"):
        model.load_lora(base)
    with pytest.raises(NotSupportedError, match="load_tensors=True: vLLM reads the adapter from its folder"):
        model.load_lora(wide, load_tensors=True)
    lora = model.load_lora(tiny.write_adapter(tmp_path / "fits", base, r=8))
    gone = model.load_lora(shutil.copytree(lora.path, tmp_path / "gone"))
    shutil.rmtree(gone.path)
    with pytest.raises(AdapterError, match="is gone, or cannot be read") as caught:
        model.fast_generate("x", lora_request=gone)
    assert "load_lora again" in caught.value.fix
    twin = tiny.write_base(tmp_path / "twin", seed=1)
    with pytest.raises(AdapterError, match="was checked for the base"):
        loaded(twin, echo).fast_generate("x", lora_request=lora)
    with pytest.raises(ConfigError, match="r is 16, and the engine of fast_inference takes at most 8"):
        FastLanguageModel.get_peft_model(model, r=16)
    assert model.fast_generate([]) == []
    assert model._pronghorn_fast_inference._process is None, "nothing of this started it"


def test_a_request_is_read_once_and_its_notes_are_told_once(
    base: Path,
    echo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("bitsandbytes")
    model = FastLanguageModel.get_peft_model(loaded(base, echo, load_in_4bit=True), accelerate=False)
    model.save_pretrained(tmp_path / "mine")
    capsys.readouterr()
    lora = model.load_lora(tmp_path / "mine")
    note = "the adapter was trained on the decoded NF4 values of"
    assert capsys.readouterr().out.count(f"{tmp_path / 'mine'}: {note}") == 1
    read: list[Path] = []
    monkeypatch.setattr(fast_inference, "_digest", lambda folder: read.append(folder) or digest(folder))
    answers = model.fast_generate(["x", "y", "z"], lora_request=[lora, None, lora])
    assert [one.outputs[0].text for one in answers] == [lora.name, "base", lora.name]
    assert read == [lora.path]
    assert note not in capsys.readouterr().out
    model.stop_engine()


def test_what_the_engine_cannot_serve_is_refused_before_it_is_loaded(
    base: Path, echo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = tiny.write_adapter(tmp_path / "wide", base, r=16)
    with pytest.raises(ConfigError, match="r is 16, and the engine of fast_inference takes at most 8"):
        loaded(wide, echo, max_lora_rank=8)
    coded = tiny.write_base(tmp_path / "coded", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(NotSupportedError, match=r"comes with Python code \(auto_map\), which vLLM"):
        loaded(coded, echo, trust_remote_code=True)
    with pytest.raises(NotSupportedError, match="does not load: vLLM reads no bitsandbytes"):
        loaded(four_bit.write_base(tmp_path / "stored"), echo)
    with pytest.raises(ConfigError, match="keys and values of 0 tokens, and contexts of 256") as caught:
        loaded(base, echo, gpu_memory_utilization=0.001)
    assert "larger gpu_memory_utilization" in caught.value.fix
    assert capsys.readouterr().out == "", "no model was loaded"
    model = loaded(wide, echo, max_lora_rank=16, trust_remote_code=True)
    assert engine_of(model).plan().arguments["max_lora_rank"] == 16


def test_keywords(base: Path, echo: Path) -> None:
    for keyword in ("vllm_python", "max_lora_rank", "gpu_memory_utilization", "float8_kv_cache"):
        with pytest.raises(NotSupportedError, match=rf"{keyword}=1 belongs to {WAY_OUT}"):
            FastLanguageModel.from_pretrained(base, **{keyword: 1})
    with pytest.raises(MissingDependencyError, match="vLLM is not installed beside pronghorn") as caught:
        FastLanguageModel.from_pretrained(base, fast_inference=True)
    assert "vllm_python=PATH" in caught.value.fix
    with pytest.raises(ConfigError, match="max_lora_rank is 1024"):
        loaded(base, echo, max_lora_rank=1024)
    for share in (60, "0.5", True):
        with pytest.raises(ConfigError, match=f"gpu_memory_utilization is {share!r}"):
            loaded(base, echo, gpu_memory_utilization=share)
    arguments = loaded(
        base, echo, gpu_memory_utilization=0.29, float8_kv_cache=True, dtype="float16", max_seq_length=32
    )._pronghorn_fast_inference.plan()
    for name, value in {
        "gpu_memory_utilization": 0.29, "kv_cache_dtype": "fp8", "dtype": "float16", "max_model_len": 32,
        "max_lora_rank": 64,
    }.items():  # fmt: skip
        assert arguments.arguments[name] == value
    assert "VLLM_CPU_KVCACHE_SPACE" not in arguments.environment, "it would take the place of the share"


def test_a_model_without_an_engine_says_how_to_get_one(base: Path) -> None:
    model = FastLanguageModel.from_pretrained(base)[0]
    for name in ("fast_generate", "load_lora"):
        with pytest.raises(NotSupportedError, match=f"{name} needs vLLM beside the model") as caught:
            getattr(model, name)("somewhere")
        assert WAY_OUT in caught.value.fix


def test_a_base_in_4_bit(base: Path, echo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    model = loaded(base, echo, load_in_4bit=True)
    assert (
        f"fast_generate: vLLM serves {base} as it is stored; here it is held in nf4"
        in capsys.readouterr().out
    )
    assert model._pronghorn_fast_inference.plan().arguments["dtype"] == "bfloat16"


def test_sampling_params_of_vllm_and_dicts() -> None:
    class Params:
        __struct_fields__ = ("temperature", "stop", "output_kind", "_all_stop_token_ids", "skip_clone")

        def __init__(self, temperature: float = 1.0, stop: Any = None) -> None:
            self.temperature, self.stop, self.output_kind = temperature, stop or [], object()
            self._all_stop_token_ids, self.skip_clone = {1}, True

    assert sampling_fields(Params(0.5)) == {"temperature": 0.5}
    assert sampling_fields(Params(stop=["x"])) == {"stop": ["x"]}
    assert sampling_fields({"temperature": 0.5}) == {"temperature": 0.5}
    assert sampling_fields(None) is None
    with pytest.raises(NotSupportedError, match="prompt_logprob_token_ids: its answer is not carried over"):
        sampling_fields({"prompt_logprob_token_ids": [[1]]})


def test_contexts_that_memory_is_short_of_are_told(
    echo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.write_base(tmp_path / "long", max_position_embeddings=4096)
    monkeypatch.setattr(vllm, "_cache_bytes", lambda text: 2**20)  # of a large model
    monkeypatch.setattr(vllm, "available_bytes", lambda: 0)  # leaves vLLM 1 GiB
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    short = (
        f"{base}: beside 0.0 GiB of weights there is memory for keys and values of 1024 tokens, and contexts"
    )
    model = loaded(base, echo, max_seq_length=2048)
    capsys.readouterr()
    model.fast_generate("x")
    model.stop_engine()
    said = capsys.readouterr().out
    assert f"{short} of 2048 are asked for: free memory" in said and "max_model_len=1024" in said
    (note,) = vllm.plan_serving(base).notes
    assert note.startswith(f"{short} of 4096 are asked for: ") and "--max-model-len" in note
    assert plan_engine(base, max_lora_rank=8, longest=1024).notes == ()
    monkeypatch.setattr(vllm, "_cache_bytes", lambda text: 2**22)
    with pytest.raises(ConfigError, match="keys and values of 256 tokens, and contexts of 2048") as caught:
        model.fast_generate("x")
    assert "smaller max_seq_length" in caught.value.fix


def test_the_plan_of_a_base_whose_adapters_come_later(base: Path) -> None:
    plan = plan_engine(base, max_lora_rank=24, longest=100)
    assert (plan.arguments["max_lora_rank"], plan.arguments["max_model_len"]) == (32, 100)
    assert plan.adapter is None and plan.arguments["enable_lora"] is True
    assert plan_engine(base, max_lora_rank=1).arguments["max_model_len"] == 256
    with pytest.raises(ConfigError, match="max_lora_rank is 0"):
        EngineOptions(vllm=Engine(Path("python"), "0"), max_lora_rank=0)
