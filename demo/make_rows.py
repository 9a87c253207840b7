"""Real rows for the demo: a question with a function's signature, answered by its docstring's first sentence.

They are read from the source files of the running Python's standard library, so they cost no download and are
the same on every run of one Python version. Train and held-out rows come from different modules and share
no sentence.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STDLIB = Path(sysconfig.get_paths()["stdlib"])
INSTALLED = frozenset({"site-packages", "dist-packages", "ensurepip", "lib-dynload", "__pycache__"})
# Tests, programs, and packages that the newest versions no longer have or some systems leave out.
SKIPPED = INSTALLED | {"test", "tests", "idlelib", "turtledemo", "lib2to3", "distutils", "msilib"}
TRAIN_ROWS, HELD_OUT_ROWS = 3000, 200  # at most so many; 3000 train in about a minute on a CPU
MAX_SIGNATURE = 120  # characters
SENTENCE_LENGTH = range(16, 161)  # characters


Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Row:
    """One documented function: where it stands, how it is called, what it does."""

    module: str
    signature: str
    sentence: str

    @property
    def question(self) -> str:
        """The user turn."""
        return f"What does {self.signature} do?"

    def messages(self) -> dict[str, list[dict[str, str]]]:
        """The row as ``pronghorn train`` reads it."""
        turns = (("user", self.question), ("assistant", self.sentence))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}


def library_files() -> Iterator[tuple[str, Path]]:
    """Yield (module name, file) of the standard library's own source files, in a fixed order."""
    for path in sorted(STDLIB.rglob("*.py")):
        parts = path.relative_to(STDLIB).with_suffix("").parts
        if not SKIPPED.intersection(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            yield ".".join(parts).removesuffix(".__init__"), path


def parse(path: Path) -> ast.Module:
    """The syntax tree of a source file; what its string escapes warn about is not ours to fix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(path.read_bytes())


def collapse(text: str) -> str:
    """The text with every run of white space as one blank."""
    return " ".join(text.split())


def words(text: str) -> list[str]:
    """The lower-case words and numbers of a text; sentences with the same words count as the same."""
    return re.findall(r"[a-z0-9]+", text.lower())


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring, or None when it is not one plain English sentence."""
    paragraph = collapse(docstring.strip().split("\n\n")[0])
    sentence = re.split(r"(?<=[a-z0-9)'\"`]\.)\s+(?=[A-Z])", paragraph)[0]
    plain = sentence.isascii() and sentence.endswith(".") and sentence[:1].isupper() and ">>>" not in sentence
    return sentence if plain and len(sentence) in SENTENCE_LENGTH and len(words(sentence)) > 3 else None


def functions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Function]]:
    """Yield (dotted name, definition) of the functions and methods in a module's body."""
    for node in body:
        if isinstance(node, Function):
            yield f"{prefix}.{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node.body, f"{prefix}.{node.name}")


def module_rows(module: str, tree: ast.Module) -> Iterator[Row]:
    """Yield the rows of one module, in the order of its source."""
    for name, node in functions(tree.body, module):
        sentence = first_sentence(ast.get_docstring(node) or "")
        signature = f"{name}({ast.unparse(node.args)})"
        if sentence and len(signature) <= MAX_SIGNATURE and signature.isascii():
            yield Row(module, signature, sentence)


def all_rows() -> list[Row]:
    """Every row of the standard library, each sentence and each signature once."""
    seen: set[str] = set()
    rows = []
    for module, path in library_files():
        for row in module_rows(module, parse(path)):
            keys = {" ".join(words(row.sentence)), row.signature}
            if not keys & seen:
                seen |= keys
                rows.append(row)
    return rows


def split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Divide rows into (train, held-out): whole modules are held out, in the order of a checksum."""
    sizes = Counter(row.module for row in rows)
    held: set[str] = set()
    for module in sorted(sizes, key=lambda name: zlib.crc32(name.encode())):
        # A module with more than a tenth of the held-out rows would make them one author's style.
        if sum(sizes[name] for name in held) < HELD_OUT_ROWS and sizes[module] <= HELD_OUT_ROWS // 10:
            held.add(module)
    shuffled = sorted(rows, key=lambda row: zlib.crc32(row.signature.encode()))
    train = [row for row in shuffled if row.module not in held]
    held_out = [row for row in shuffled if row.module in held]
    return train[:TRAIN_ROWS], held_out[:HELD_OUT_ROWS]


def write_jsonl(path: Path, rows: list[Row]) -> None:
    """Write the rows as chat messages, one JSON object a line."""
    lines = [json.dumps(row.messages()) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Write train.jsonl and heldout.jsonl into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = split(all_rows())
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "heldout.jsonl", held_out)
    print(f"{len(train)} train rows and {len(held_out)} held-out rows in {folder}")


if __name__ == "__main__":
    main()
