"""What is measured: models by name, batches by name, and the arithmetic a step of theirs needs."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model: its transformers type and the configuration that differs from that type's defaults."""

    type: str
    config: MappingProxyType[str, Any]

    def get(self, name: str) -> int:
        """A number of the configuration."""
        return int(self.config[name])

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return int(self.config.get("head_dim", self.get("hidden_size") // self.get("num_attention_heads")))

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of every linear of one layer."""
        hidden, inner = self.get("hidden_size"), self.get("intermediate_size")
        q, kv = (
            self.get("num_attention_heads") * self.head_dim,
            self.get("num_key_value_heads") * self.head_dim,
        )
        return [
            (hidden, q),
            (hidden, kv),
            (hidden, kv),
            (q, hidden),
            (hidden, inner),
            (hidden, inner),
            (inner, hidden),
        ]

    def flops_per_token(self, document: int, rank: int = 16) -> float:
        """Useful floating-point operations of a step: frozen weights, nothing computed twice.

        Forward and input gradient of linears and head (4 for each weight), 6 for each adapter weight, causal
        attention over ``document`` tokens: 2 products forward and 5 backward, half of the square.
        """
        layers = self.get("num_hidden_layers")
        weights = layers * sum(i * o for i, o in self.linears) + self.get("hidden_size") * self.get(
            "vocab_size"
        )
        adapters = layers * sum(rank * (i + o) for i, o in self.linears)
        attention = 7 * document * self.get("num_attention_heads") * self.head_dim * layers
        return 4.0 * weights + 6.0 * adapters + attention


def _shape(kind: str, sizes: tuple[int, int, int, int, int, int], **more: Any) -> Shape:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "vocab_size")  # fmt: skip
    return Shape(kind, MappingProxyType({**dict(zip(names, sizes, strict=True)), **more}))


# the sizes of the published config.json of each model
SHAPES = MappingProxyType(
    {
        "llama-3.1-8b": _shape("llama", (4096, 14336, 32, 32, 8, 128256), rms_norm_eps=1e-5),
        "qwen3-8b": _shape("qwen3", (4096, 12288, 36, 32, 8, 151936), head_dim=128),
        "gemma-3-12b": _shape(
            "gemma3_text", (3840, 15360, 48, 16, 8, 262208), head_dim=256, sliding_window=1024
        ),
        "qwen3-0.6b": _shape(
            "qwen3", (1024, 3072, 28, 16, 8, 151936), head_dim=128, tie_word_embeddings=True
        ),
        "tiny": _shape("llama", (64, 96, 2, 4, 2, 512)),
    }
)


@dataclass(frozen=True)
class Batch:
    """Documents of one length: side by side as rows, or behind one another in one row."""

    documents: int
    length: int
    packed: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.documents * self.length


# batches of one group are the same documents: their losses are the same
BATCHES = MappingProxyType(
    {
        "2k": Batch(4, 2048),
        "2k-packed": Batch(4, 2048, packed=True),
        "8k": Batch(1, 8192),
        "16k": Batch(1, 16384),
        "64k": Batch(1, 65536),
        "tiny": Batch(4, 16),
        "tiny-packed": Batch(4, 16, packed=True),
    }
)


def group(batch: str) -> str:
    """The name of the same documents as rows."""
    return batch.removesuffix("-packed")
