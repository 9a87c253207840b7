"""The text the demo's base is made from: what the standard library says outside its functions' docstrings.

Comments, module and class docstrings, the language reference inside pydoc, code, and chats made from them. A
piece with the sentence of a demo row in it is left out, so that the base has read none of the answers.
"""

from __future__ import annotations

import ast
import io
import re
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import TypeGuard

from make_rows import STDLIB, all_rows, collapse, functions, library_files, parse, words

TABLES = frozenset({"encodings", "pydoc_data"})
PIECE = 1500  # characters of code read in one piece
LONGEST_ANSWER = 400  # characters
Chat = tuple[str, str]
"""(question, answer)."""


class RowSentences:
    """Finds the sentences of demo rows in a text, whatever its case, punctuation and line breaks."""

    def __init__(self, sentences: Iterable[str]) -> None:
        self._by_start: dict[tuple[str, ...], list[list[str]]] = {}
        for sentence in sentences:
            found = words(sentence)
            self._by_start.setdefault(tuple(found[:4]), []).append(found)

    def first_in(self, text: str) -> str | None:
        """The first row sentence that occurs in the text, as words."""
        stream = words(text)
        for at in range(len(stream) - 3):
            for sentence in self._by_start.get(tuple(stream[at : at + 4]), ()):
                if stream[at : at + len(sentence)] == sentence:
                    return " ".join(sentence)
        return None


def row_sentences() -> RowSentences:
    """The sentences of all rows, train and held-out."""
    return RowSentences(row.sentence for row in all_rows())


def is_docstring(node: ast.AST) -> TypeGuard[ast.Expr]:
    """Whether a node is a statement that is nothing but a string."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def code_without_docstrings(source: bytes, tree: ast.Module) -> str:
    """The source without the lines of docstrings and comments; a comment that follows code stays."""
    lines = source.decode("utf-8", "replace").splitlines()
    for node in ast.walk(tree):
        if is_docstring(node):
            start, end = node.lineno - 1, node.end_lineno or node.lineno
            lines[start:end] = [""] * (end - start)
    kept = [line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return "\n".join(kept)


def comments(source: bytes) -> Iterator[str]:
    """Yield each block of whole-line comments as one paragraph."""
    block: list[str] = []
    last = 0
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type != tokenize.COMMENT or token.line.strip() != token.string:
            continue
        if token.start[0] != last + 1 and block:
            yield collapse(" ".join(block))
            block = []
        block.append(token.string.lstrip("#! "))
        last = token.start[0]
    yield collapse(" ".join(block))


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is mostly words: at least eight of them, and few signs."""
    letters = sum(char.isalpha() or char == " " for char in paragraph)
    return paragraph.isascii() and len(paragraph.split()) >= 8 and letters > 0.85 * len(paragraph)


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (name, docstring) of the module (name "") and of each class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", ""), text


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, each on one line."""
    return [collapse(part) for part in re.split(r"\n\s*\n", textwrap.dedent(text)) if part.strip()]


@dataclass(frozen=True)
class Module:
    """One source file of the standard library."""

    name: str
    source: bytes
    tree: ast.Module


def modules() -> list[Module]:
    """The standard library's modules, without the tables of character encodings and the topics themselves."""
    files = [(name, path) for name, path in library_files() if name.split(".")[0] not in TABLES]
    return [Module(name, path.read_bytes(), parse(path)) for name, path in files]


def prose(library: list[Module]) -> Iterator[str]:
    """Yield paragraphs of English about Python."""
    for text in topics.values():
        yield from paragraphs(text)
    for name in ("LICENSE.txt", "LICENSE"):
        if (STDLIB / name).is_file():
            yield from paragraphs((STDLIB / name).read_text(encoding="utf-8"))
    for module in library:
        yield from filter(is_prose, comments(module.source))
        for _, text in docstrings(module.tree):
            yield from filter(is_prose, paragraphs(text))


def chats(library: list[Module]) -> Iterator[Chat]:
    """Yield questions about topics, modules and classes, answered by the first paragraph of their text."""
    for name, text in topics.items():
        if answer := next(filter(is_prose, paragraphs(text)), None):
            yield f"Tell me about {name}.", answer
    for module in library:
        for name, text in docstrings(module.tree):
            subject = f"the class {module.name}.{name}" if name else f"the module {module.name}"
            yield f"What is {subject}?", paragraphs(text)[0]


def pieces(text: str, size: int) -> Iterator[str]:
    """Cut a text at line ends into pieces of about ``size`` characters."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= size:
            yield piece
            piece = ""
    yield piece


def code_chats(library: list[Module]) -> Iterator[Chat]:
    """Yield questions for the code of a function, answered by its statements."""
    for module in library:
        for name, node in functions(module.tree.body, module.name):
            statements = [ast.unparse(part) for part in node.body if not is_docstring(part)]
            if statements:
                yield f"Write {name}({ast.unparse(node.args)}).", "\n".join(statements)


@dataclass(frozen=True)
class Texts:
    """All that the base reads, each piece once and none with a row's sentence in it."""

    prose: list[str]
    code: list[str]
    chats: list[Chat]
    code_chats: list[Chat]


def training_text() -> Texts:
    """Gather the texts from the running Python's standard library."""
    known = row_sentences()
    library = modules()
    sources = (code_without_docstrings(module.source, module.tree) for module in library)

    def unknown(texts: Iterable[str]) -> list[str]:
        return [text for text in dict.fromkeys(texts) if not known.first_in(text)]

    def short(chats: Iterable[Chat]) -> list[Chat]:
        brief = dict.fromkeys(chat for chat in chats if len(chat[1]) < LONGEST_ANSWER)
        return [chat for chat in brief if not known.first_in(" ".join(chat))]

    return Texts(
        prose=unknown(prose(library)),
        code=unknown(piece for text in sources for piece in pieces(text, PIECE)),
        chats=short(chats(library)),
        code_chats=short(code_chats(library)),
    )
