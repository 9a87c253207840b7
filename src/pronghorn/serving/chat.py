"""Chat with a folder through plain transformers: load, render its chat template, stream the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from pronghorn.errors import AdapterError, DataError, MissingDependencyError, SourceError

_RECORD = "pronghorn.json"


class Chat:
    """A conversation with a model folder, or with an adapter folder on its base."""

    def __init__(
        self,
        folder: Path,
        *,
        adapter: Path | None = None,
        system: str | None = None,
        max_new_tokens: int = 256,
    ) -> None:
        """Load the folder in its stored dtype, on a GPU when there is one.

        Args:
            folder: A merged or base model, or an adapter (then its base is found from its record).
            adapter: An adapter to apply to the model in ``folder``.
            system: The system message that opens the conversation.
            max_new_tokens: An answer ends after so many tokens, if no end token came before.

        Raises:
            SourceError: not a folder of a model or an adapter.
            AdapterError: the adapter's base cannot be found.
            DataError: the tokenizer has no chat template.
        """
        folder = Path(folder)
        if adapter is None and (folder / "adapter_config.json").is_file():
            folder, adapter = _base_of(folder), folder
        if not (folder / "config.json").is_file():
            raise SourceError(
                f"{folder} holds no config.json", fix="give a model folder or an adapter folder"
            )
        self.max_new_tokens = max_new_tokens
        self.messages = [{"role": "system", "content": system}] if system else []
        self.tokenizer = _tokenizer(folder, adapter)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
        if adapter is not None:
            self.model = _with_adapter(self.model, adapter, len(self.tokenizer))
        self.model.eval()
        if torch.cuda.is_available():
            self.model.to("cuda")

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer to ``question`` piece by piece; both become part of the conversation."""
        self.messages.append({"role": "user", "content": question})
        inputs = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []
        worker = Thread(target=self._generate, args=(inputs, streamer, failure), daemon=True)
        worker.start()
        answer = ""
        for piece in streamer:
            answer += piece
            yield piece
        worker.join()
        if failure:
            raise failure[0]
        self.messages.append({"role": "assistant", "content": answer})

    def _generate(self, inputs: Any, streamer: Any, failure: list[BaseException]) -> None:
        """Generate in the streamer's thread; an error ends the stream and is handed to the reader."""
        try:
            ends = self._end_ids()
            self.model.generate(
                **inputs, streamer=streamer, max_new_tokens=self.max_new_tokens, eos_token_id=ends,
                pad_token_id=ends[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
            )  # fmt: skip
        except Exception as error:
            failure.append(error)
            streamer.end()

    def _end_ids(self) -> list[int]:
        """The end ids of generation_config.json, and the tokenizer's own."""
        stated = self.model.generation_config.eos_token_id
        ids = stated if isinstance(stated, list) else [stated]
        return sorted({i for i in (*ids, self.tokenizer.eos_token_id) if i is not None})


def _base_of(adapter: Path) -> Path:
    """The local base folder that an adapter names: pronghorn's record first, then adapter_config.json."""
    named = []
    for file, keys in (
        (_RECORD, ("base_path", "base_name")),
        ("adapter_config.json", ("base_model_name_or_path",)),
    ):
        if (adapter / file).is_file():
            record = json.loads((adapter / file).read_bytes())
            named += [record[key] for key in keys if isinstance(record.get(key), str)]
    for name in named:
        if (Path(name) / "config.json").is_file():
            return Path(name)
    raise AdapterError(
        f"the base of {adapter} is not on this machine; it names {', '.join(named) or 'none'}",
        fix="pronghorn chat BASE --adapter ADAPTER",
    )


def _tokenizer(folder: Path, adapter: Path | None) -> Any:
    """The adapter's tokenizer where it has one (it may bring tokens or a template), else the model's."""
    home = adapter if adapter is not None and (adapter / "tokenizer_config.json").is_file() else folder
    tokenizer = AutoTokenizer.from_pretrained(home, local_files_only=True)
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer in {home} has no chat template",
            fix="put the model's chat_template.jinja into that folder",
        )
    return tokenizer


def _with_adapter(model: Any, adapter: Path, tokens: int) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingDependencyError(
            "an adapter needs peft, which is not installed", fix="pip install peft"
        ) from error
    if tokens > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter)
