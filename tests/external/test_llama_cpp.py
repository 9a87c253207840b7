"""What was trained is what the real llama.cpp computes, tokenizes and stops at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import pronghorn
from pronghorn.export.onto import MergeFormat
from tests import tiny, tokenizer_forms
from tests.external import llama_engine, memorised
from tests.external.llama_engine import Answer
from tests.external.memorised import EOS_ID, MAX_TOKENS, PROMPTS, TRAINED, answers

pytestmark = pytest.mark.external

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
KINDS = ("f32", "f16", "bf16", "q8_0")
QUANTISED = ("q4_k_m", "q6_k", "q4_0")
ROWS = [prompt + answer for prompt, answer in zip(PROMPTS, answers(TRAINED), strict=True)]


@dataclass(frozen=True)
class Made:
    """A memorised pair and its files; ``read``: llama.cpp's answers by kind, "lora" for base and adapter."""

    base: Path
    adapter: Path
    merged: Path
    files: Path
    read: dict[str, Answer]


def make(family: str, home: Path, kinds: tuple[str, ...], **wide: Any) -> Made:
    """Train, export and ask llama.cpp."""
    memorised.OVERRIDES[family], kept = {**memorised.OVERRIDES[family], **wide}, memorised.OVERRIDES[family]
    try:
        base, adapter = memorised.write_pair(home, family)
    finally:
        memorised.OVERRIDES[family] = kept
    merged, files, plain, lora = (home / name for name in ("merged", "files", "plain", "lora"))
    pronghorn.export(adapter, merged, verify=False)
    wanted = MergeFormat(f"gguf-{','.join(kinds)}", llama_python=llama_engine.require())
    pronghorn.export(adapter, files, format=wanted)
    pronghorn.export(base, plain, format="gguf-f32")
    pronghorn.export(adapter, lora, format="gguf-lora")
    asked = {"rows": ROWS, "prompts": PROMPTS, "max_tokens": MAX_TOKENS}
    jobs = [{"model": str(files / f"model-{kind.upper()}.gguf"), **asked} for kind in kinds]
    jobs.append({"model": str(plain / "model-F32.gguf"), "lora": str(lora / "adapter.gguf"), **asked})
    read = dict(zip((*kinds, "lora"), llama_engine.run(jobs, home), strict=True))
    return Made(base, adapter, merged, files, read)


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    home = tmp_path_factory.mktemp("gguf")
    return {family: make(family, home / family, KINDS) for family in FAMILIES}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Rows of 256 and 512 numbers, which the blocks of llama.cpp's own kinds divide."""
    home = tmp_path_factory.mktemp("wide")
    return make("llama", home, QUANTISED, hidden_size=256, intermediate_size=512)


def decoded(made: Made, kind: str) -> Any:
    """The file in float32 as transformers' own reader decodes it, in a model of the merged config."""
    if kind == "lora":
        model = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, made.adapter).eval()
    config = AutoConfig.from_pretrained(made.merged)
    if config.model_type == "mistral":  # transformers reads that file as the Llama it is
        same = {
            key: value
            for key, value in config.to_dict().items()
            if key not in ("model_type", "architectures")
        }
        config = AutoConfig.for_model("llama", **same)
    file = f"model-{kind.upper()}.gguf"
    return AutoModelForCausalLM.from_pretrained(
        made.files, gguf_file=file, config=config, dtype=torch.float32
    ).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Logits of all rows, [tokens, vocabulary]."""
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in ROWS])


@contextmanager
def engine_rounding(model: Any, kind: str) -> Iterator[None]:
    """Inputs of matrices rounded as ggml's products round them, GELU read from its 16-bit table."""
    handles = [
        module.register_forward_pre_hook(lambda _, given: (rounded(given[0], kind),))
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    handles += [
        module.register_forward_hook(lambda _, given, out: out.half().float())
        for name, module in model.named_modules()
        if name.endswith("act_fn") and "gelu" in str(model.config.to_dict().get("hidden_activation"))
    ]
    yield
    for handle in handles:
        handle.remove()


def rounded(values: torch.Tensor, kind: str) -> torch.Tensor:
    """ggml multiplies f16 by f16, bf16 by bf16, blocks of 32 by Q8_0, and blocks of 256 by 8 bits per 256."""
    if kind in ("f32", "lora"):
        return values
    if kind in ("f16", "bf16"):
        return values.to({"f16": torch.float16, "bf16": torch.bfloat16}[kind]).float()
    if kind in ("q8_0", "q4_0"):
        coded = quants.quantize(values.numpy(), GGMLQuantizationType.Q8_0)
        return torch.from_numpy(quants.dequantize(coded, GGMLQuantizationType.Q8_0))
    blocks = values.reshape(*values.shape[:-1], -1, 256)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / step.clamp_min(1e-30)).round() * step).reshape(values.shape)


def rms(values: torch.Tensor) -> float:
    """Root of the mean square."""
    return float(values.square().mean().sqrt())


def check_logits(made: Made, kind: str) -> None:
    """llama.cpp is as far from the decoded file in float32 as its own rounding takes it, not twice."""
    model = decoded(made, kind)
    truth, found = logits(model), torch.cat(made.read[kind].logits)
    with engine_rounding(model, kind):
        rounding = rms(logits(model) - truth)
    allowed = 2 * rounding + 1e-5 * rms(truth)  # float32 sums in another order give 1e-6
    apart = rms(found - truth)
    trained = rms(truth - logits(memorised.load(made.base)))
    print(kind, f"apart {apart:.2e}, allowed {allowed:.2e}, the adapter moves {trained:.2e}")
    assert apart <= allowed
    assert trained > 5 * allowed, "the check would pass without the adapter"


def check_answers(made: Made, kind: str) -> None:
    """Greedy tokens, the end included, are those of the decoded file and of the trained model."""
    trained = memorised.load(made.base, made.adapter)
    expected = memorised.greedy(decoded(made, kind))
    assert made.read[kind].said["continued"] == expected
    assert expected == memorised.greedy(trained) == answers(TRAINED)
    assert all(answer[-1] == EOS_ID for answer in expected)
    assert made.read[kind].said["ends"] == [EOS_ID]


@pytest.mark.parametrize("kind", [*KINDS, "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_answers(every: dict[str, Made], family: str, kind: str) -> None:
    check_logits(every[family], kind)
    check_answers(every[family], kind)


@pytest.mark.parametrize("kind", QUANTISED)
def test_kinds_of_the_engine_itself(wide: Made, kind: str) -> None:
    check_logits(wide, kind)
    check_answers(wide, kind)
    size = (wide.files / f"model-{kind.upper()}.gguf").stat().st_size
    assert size < 0.5 * sum(path.stat().st_size for path in wide.merged.glob("*.safetensors"))


def row_of(name: str) -> list[int]:
    """100 tokens; 400 where the text itself has to be long."""
    return (torch.arange(400 if name == "longrope, long" else 100) % 500 + 4).tolist()


def ask_row(folder: Path, out: Path, row: list[int], context: int) -> dict[str, Any]:
    pronghorn.export(folder, out, format="gguf-f32")
    return {"model": str(out / "model-F32.gguf"), "rows": [row], "context": context}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 10000.0}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 256, "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(6)], "long_factor": [2.0 + i for i in range(6)],
        "partial_rotary_factor": 0.75}  # fmt: skip
TWICE = {"original_max_position_embeddings": 256, "max_position_embeddings": 512}
EVERY_SIXTH = ["sliding_attention"] * 5 + ["full_attention"]
GEMMA3 = {"head_dim": 16, "query_pre_attn_scalar": 16}
LINEAR = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
          "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0}}  # fmt: skip
# name -> (family, settings, tokens of context): longer than any window, over all ways to stretch positions
POSITIONS: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama3": ("llama", {"rope_parameters": LLAMA3}, 256),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}}, 256),
    "yarn": ("qwen2", {"rope_parameters": YARN}, 256),
    # llama.cpp rounds the context up to a multiple of 256, and takes the short factors up to the original one
    "longrope, short": ("phi3", {"rope_parameters": LONG, **TWICE}, 256),
    "longrope, long": ("phi3", {"rope_parameters": LONG, **TWICE}, 512),
    "window": ("gemma2", {"sliding_window": 32}, 256),
    "six layers": ("gemma3", {"num_hidden_layers": 6, "layer_types": EVERY_SIXTH, "sliding_window": 16}, 256),
    "listed layers": ("gemma3", {"sliding_window": 16, "rope_parameters": LINEAR}, 256),
    "wide heads": ("llama", {"head_dim": 32, "attention_bias": True, "mlp_bias": True}, 256),
    "tied": ("llama", {"tie_word_embeddings": True}, 256),
    "rows of 48": ("qwen3", {"hidden_size": 48, "intermediate_size": 80}, 256),
}


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Answer]]:
    home = tmp_path_factory.mktemp("positions")
    bases, jobs = {}, []
    for number, (name, (family, settings, context)) in enumerate(POSITIONS.items()):
        bases[name] = tiny.write_base(home / f"base{number}", family, dtype=torch.float32, **settings)
        jobs.append(ask_row(bases[name], home / f"out{number}", row_of(name), context))
    return {name: (bases[name], one) for name, one in zip(bases, llama_engine.run(jobs, home), strict=True)}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_windows_and_shapes(placed: dict[str, tuple[Path, Answer]], name: str) -> None:
    base, answer = placed[name]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        truth = model(input_ids=torch.tensor([row_of(name)])).logits[0]
    # Gemma's GELU comes from a table of 16-bit numbers: 2e-4 was measured where nothing else is rounded
    allowed = 1e-3 if name in ("window", "six layers", "listed layers") else 1e-5
    assert rms(answer.logits[0] - truth) <= allowed * rms(truth)


# the tokenizer's form -> a family that comes with it
FORMS = {"llama3": "llama", "qwen2": "qwen2", "tekken": "mistral", "gpt4o": "phi3", "smollm": "llama",
         "gemma": "gemma2", "llama2": "mistral", "phi3": "phi3", "metaspace": "mistral"}  # fmt: skip
CHATS = [
    [("user", "Hello world, it's 2026!")],
    [
        ("user", "One\n\nTwo   three <tool_call> Größe"),
        ("assistant", "12345 don't I'LL"),
        ("user", "测试 🦌 x"),
    ],
    [
        ("user", " leading\tand trailing \n"),
        ("assistant", "def f(x):\n    return 1000000"),
        ("user", "</s> <s>"),
    ],
]
PLAIN = ["plain text   with blanks\n\n\nand 12 lines", " starts blank", "", "café naïve ﬁ"]


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any, list[str], Answer]]:
    home = tmp_path_factory.mktemp("tokens")
    made, jobs = {}, []
    for form, family in FORMS.items():
        base = tiny.write_base(home / form / "base", family, max_position_embeddings=128)
        tokenizer_forms.write_form(base, form)
        report = pronghorn.export(base, home / form / "out", format="gguf-f32")
        fast = AutoTokenizer.from_pretrained(base)
        texts = [rendered(fast, chat) for chat in CHATS] + PLAIN
        jobs.append({"model": str(home / form / "out" / "model-F32.gguf"), "rows": [], "texts": texts})
        made[form] = (fast, report, texts)
    return {
        form: (*made[form], answer) for form, answer in zip(made, llama_engine.run(jobs, home), strict=True)
    }


def rendered(fast: Any, chat: list[tuple[str, str]]) -> str:
    messages = [{"role": role, "content": said} for role, said in chat]
    text: str = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


@pytest.mark.parametrize("form", FORMS)
def test_token_ids_are_the_tokenizers(
    tokenized: dict[str, tuple[Any, Any, list[str], Answer]], form: str
) -> None:
    fast, report, texts, answer = tokenized[form]
    chats = len(CHATS)
    plain, full = (
        [fast(text, add_special_tokens=special)["input_ids"] for text in texts] for special in (False, True)
    )
    assert answer.said["plain"][:chats] == plain[:chats]
    if form == "metaspace":  # told in the report: the blank before a plain text is the price of right chats
        assert any("a plain text lacks the first blank" in one for one in report.warnings)
    else:
        assert answer.said["plain"] == plain
        assert answer.said["full"] == full
    assert answer.said["template"] == fast.chat_template
    assert answer.said["eos"] == fast.eos_token_id


@pytest.mark.parametrize("form", FORMS)
def test_answers_end_where_they_end_in_transformers(
    tokenized: dict[str, tuple[Any, Any, list[str], Answer]], form: str
) -> None:
    fast, report, _, answer = tokenized[form]
    generation = json.loads((report.base / "generation_config.json").read_text())["eos_token_id"]
    told = " ".join(report.warnings)
    assert set(generation) <= set(answer.said["ends"])
    more = set(answer.said["ends"]) - set(generation)
    assert all(fast.convert_ids_to_tokens(one) in told for one in more), "an end that is not told"
