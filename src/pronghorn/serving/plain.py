"""Serve a folder with plain transformers, one request at a time: for trying out, where vLLM cannot run."""

from __future__ import annotations

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from pronghorn.errors import DataError
from pronghorn.serving.chat import Chat

_LARGEST_REQUEST_BYTES = 2**20


def make_server(chat: Chat, name: str, *, host: str = "127.0.0.1", port: int = 8000) -> HTTPServer:
    """A server of ``/v1/models`` and ``/v1/chat/completions`` for one model; port 0 takes a free one.

    Answers follow the folder's generation_config.json; ``messages`` and ``max_tokens`` are read, ``stream``
    and other models are refused.
    """
    return HTTPServer((host, port), _handler(chat, name))


def _handler(chat: Chat, name: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers requests for one model."""

        def do_GET(self) -> None:
            """List the model."""
            known = self.path == "/v1/models"
            self._send(200 if known else 404, {"object": "list", "data": [{"id": name, "object": "model"}]})

        def do_POST(self) -> None:
            """Answer a conversation."""
            length = int(self.headers.get("Content-Length") or 0)
            if self.path != "/v1/chat/completions" or not 0 < length <= _LARGEST_REQUEST_BYTES:
                self._send(404, _error("POST /v1/chat/completions with a body of at most 1 MiB"))
                return
            self._reply(lambda: _complete(chat, name, json.loads(self.rfile.read(length))))

        def _reply(self, work: Callable[[], dict[str, Any]]) -> None:
            try:
                answer = work()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                self._send(400, _error(str(error)))
                return
            self._send(200, answer)

        def _send(self, status: int, document: dict[str, Any]) -> None:
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    return Handler


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}


def _complete(chat: Chat, name: str, request: dict[str, Any]) -> dict[str, Any]:
    if request.get("model", name) != name or request.get("stream"):
        raise DataError(f"the only model is {name!r}, and answers are not streamed")
    messages = [{"role": str(one["role"]), "content": str(one["content"])} for one in request["messages"]]
    if not messages or messages[-1]["role"] != "user":
        raise DataError("messages must end with one of the user")
    chat.messages, question = messages[:-1], messages[-1]["content"]
    chat.max_new_tokens = int(request.get("max_tokens") or chat.max_new_tokens)
    text = "".join(chat.ask(question))
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"object": "chat.completion", "model": name, "choices": [choice]}
