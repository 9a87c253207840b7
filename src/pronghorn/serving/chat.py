"""Chat with a model or an adapter: load it, render its chat template, stream the answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

from transformers import TextIteratorStreamer

from pronghorn.errors import DataError
from pronghorn.loading.load import load
from pronghorn.loading.options import LoadOptions
from pronghorn.loading.strict import no_bars


class Chat:
    """A conversation with a model, or with an adapter on its base."""

    def __init__(
        self,
        name_or_path: str | Path,
        *,
        base: str | Path | None = None,
        system: str | None = None,
        max_new_tokens: int = 256,
    ) -> None:
        """Load the model in its stored dtype, on an accelerator when there is one.

        Args:
            name_or_path: A merged or base model, or an adapter; a folder or a hub id.
            base: For an adapter: where its base is, if not where it was at training.
            system: The system message that opens the conversation.
            max_new_tokens: An answer ends after so many tokens, if no end token came before.

        Raises:
            SourceError, AdapterError, NotSupportedError: as for ``pronghorn.load``.
            DataError: the tokenizer has no chat template.
        """
        with no_bars():
            self.model, self.tokenizer = load(name_or_path, LoadOptions(base=base), say=None)
        if not self.tokenizer.chat_template:
            raise DataError(
                f"the tokenizer of {name_or_path} has no chat template",
                fix="put the model's chat_template.jinja into its folder",
            )
        self.max_new_tokens = max_new_tokens
        self.messages = [{"role": "system", "content": system}] if system else []

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
