"""Run by an interpreter with llama-cpp-python: open GGUF files in llama.cpp, and say what each computes.

``python verify_in_llama.py job.json out.jsonl``. Job and output are those of ``verify_in_vllm.py``; a
``folder`` holds one GGUF file. Keys, values and attention are in float32, without flash attention.

It imports llama_cpp, numpy and the standard library only: nothing of pronghorn is installed where it runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STEP = 256  # llama.cpp rounds a context up to a multiple of it


def open_model(file: str, context: int) -> tuple[Any, Any]:
    """The model, and a context of so many tokens.

    Raises:
        ValueError: llama.cpp does not load it.
    """
    import llama_cpp

    model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise ValueError(f"llama.cpp does not load {Path(file).name}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = context
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    made = llama_cpp.llama_init_from_model(model, params)
    if not made:
        raise ValueError(f"llama.cpp makes no context for {Path(file).name}")
    return model, made


def logits(context: Any, row: list[int], vocabulary: int, start: int = 0) -> Any:
    """Logits behind every token of ``row``, [tokens, vocabulary]; before it, ``start`` tokens are known."""
    import llama_cpp
    import numpy as np

    if not start:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch = llama_cpp.llama_batch_init(len(row), 0, 1)
    batch.n_tokens = len(row)
    for place, token in enumerate(row):
        batch.token[place], batch.pos[place], batch.logits[place] = token, start + place, True
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    code = llama_cpp.llama_decode(context, batch)
    llama_cpp.llama_batch_free(batch)
    if code:
        raise ValueError(f"llama.cpp cannot compute {len(row)} tokens: code {code}")
    found = llama_cpp.llama_get_logits(context)
    return np.ctypeslib.as_array(found, shape=(len(row), vocabulary)).copy()


def continued(context: Any, vocab: Any, prompt: list[int], most: int) -> list[int]:
    """The greedy answer to a prompt, up to and including a token that ends it."""
    import llama_cpp

    size = llama_cpp.llama_vocab_n_tokens(vocab)
    said: list[int] = []
    found = logits(context, prompt, size)
    while len(said) < most:
        said.append(int(found[-1].argmax()))
        if llama_cpp.llama_vocab_is_eog(vocab, said[-1]):
            break
        found = logits(context, said[-1:], size, len(prompt) + len(said) - 1)
    return said


def ids(vocab: Any, text: str, *, special: bool) -> list[int]:
    """The tokens of a text, with what the tokenizer adds if ``special``; control tokens are recognised."""
    import llama_cpp

    raw = text.encode()
    room = (llama_cpp.llama_token * (len(raw) + 8))()
    count = llama_cpp.llama_tokenize(vocab, raw, len(raw), room, len(room), special, True)
    return list(room[:count])


def look(asked: dict[str, Any]) -> dict[str, Any]:
    """Open the file of one folder, and answer."""
    import llama_cpp

    try:
        (file,) = sorted(Path(asked["folder"]).glob("*.gguf"))
        longest = max(len(row) for row in (*asked["rows"], *asked["prompts"])) + asked["max_tokens"]
        model, context = open_model(str(file), -(-longest // _STEP) * _STEP)
        vocab = llama_cpp.llama_model_get_vocab(model)
        size = llama_cpp.llama_vocab_n_tokens(vocab)
        found = {
            "error": None,
            "version": llama_cpp.__version__,
            "logprobs": [_logprobs(logits(context, row, size), row) for row in asked["rows"]],
            "tokens": [continued(context, vocab, row, asked["max_tokens"]) for row in asked["prompts"]],
            "chat": _attempt(lambda: _chat(model, vocab, asked["chat"])),
        }
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    except (ValueError, OSError, RuntimeError) as error:
        found = {"error": _short(error)}
    return {"folder": asked["folder"], **found}


def _logprobs(found: Any, row: list[int]) -> list[float]:
    """Log-probabilities of tokens 1, 2, ... of a row."""
    import numpy as np

    scores = found[:-1].astype(np.float64)
    top = scores.max(-1, keepdims=True)
    total = top + np.log(np.exp(scores - top).sum(-1, keepdims=True))
    said: list[float] = (scores - total)[np.arange(len(row) - 1), row[1:]].tolist()
    return said


def _chat(model: Any, vocab: Any, messages: list[dict[str, str]]) -> list[int]:
    """As llama-cpp-python renders and tokenizes a chat."""
    import llama_cpp
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = llama_cpp.llama_model_chat_template(model, None)
    if not template:
        raise ValueError("the file has no chat template")
    end, start = (
        llama_cpp.llama_vocab_get_text(vocab, token).decode() if token >= 0 else ""
        for token in (llama_cpp.llama_vocab_eos(vocab), llama_cpp.llama_vocab_bos(vocab))
    )
    formatter = Jinja2ChatFormatter(template.decode(), eos_token=end, bos_token=start)
    return ids(vocab, formatter(messages=messages).prompt, special=False)


def _attempt(ask: Callable[[], list[int]]) -> list[int] | str:
    try:
        return ask()
    except Exception as error:
        return _short(error)


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def main(job: Path, out: Path) -> None:
    """Answer every folder in one process."""
    with out.open("a") as lines:
        for asked in json.loads(job.read_text()):
            # said first: where llama.cpp aborts the whole process, the folder is known
            lines.write(json.dumps({"folder": asked["folder"], "begun": True}) + "\n")
            lines.flush()
            lines.write(json.dumps(look(asked)) + "\n")
            lines.flush()


if __name__ == "__main__":
    sys.path[:] = sys.path[1:]  # this folder: its names are not meant for other libraries
    main(Path(sys.argv[1]), Path(sys.argv[2]))
