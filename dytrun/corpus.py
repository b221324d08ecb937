"""Bytes of text to train on and to evaluate on: Python's own documentation, a file, or a tree of files.

Text is cut into pieces (a docstring, a line of a file or a part of a long one), which are put into a hundred contiguous
blocks of about as many bytes; every tenth block is for validation. Identical docstrings, and identical files, are taken
once, so that none is on both sides.
"""

import ast
import io
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dytrun.errors import UserError

SUFFIXES = (".txt", ".md", ".rst", ".py")
# Parts of the standard library that document nothing, and what others have installed there.
_LEFT_OUT = frozenset(
    ("test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data",
     "ensurepip", "__pycache__")
)  # fmt: skip
_BLOCKS, _VALIDATION_EVERY = 100, 10
_LONGEST = 1024  # bytes of a line that stay together: some texts, text8 say, are one line
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Corpus(NamedTuple):
    """Both sides of a text."""

    train: bytes
    val: bytes


def read_corpus(root: str | None) -> Corpus:
    """Read a text and split it; the same bytes from the same files, whatever machine they are on.

    Args:
        root: a UTF-8 file, a tree of which the files that end with one of SUFFIXES are read, or None for the
            docstrings of the standard library of the Python that runs (its sources are read, not imported).

    Raises:
        UserError: there is no such text, a file is not UTF-8, or there is too little.
    """
    pieces = list(_docstrings() if root is None else _lines(Path(root)))
    train, val = split(pieces)
    if not train or not val:
        raise UserError(f"data.root: {root} has {sum(map(len, pieces))} bytes in {len(pieces)} line(s), too little "
                        "to train on one part and evaluate on another; give more text")  # fmt: skip
    return Corpus(train, val)


def split(pieces: list[bytes]) -> Corpus:
    """Put every tenth of a hundred contiguous blocks aside; a piece belongs to the block in which it begins."""
    total, start = sum(map(len, pieces)), 0
    sides: tuple[list[bytes], list[bytes]] = [], []
    for piece in pieces:
        block = start * _BLOCKS // total
        sides[block % _VALIDATION_EVERY == _VALIDATION_EVERY - 1].append(piece)
        start += len(piece)
    return Corpus(*map(b"".join, sides))


def _docstrings() -> Iterator[bytes]:
    """Yield every docstring of the standard library once, in the order of its files' paths, outer ones first."""
    known: set[str] = set()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _files(root, (".py",), _LEFT_OUT):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that are none
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # a template, no module
        for text in filter(None, map(_docstring, ast.walk(tree))):
            if text not in known:
                known.add(text)
                yield f"{text}\n\n".encode(errors="replace")


def _docstring(node: ast.AST) -> str | None:
    return ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None


def _lines(root: Path) -> Iterator[bytes]:
    """Yield the pieces of the files of a tree, or of one file, in the order of their paths; a file's twins are left."""
    if not root.exists():
        raise UserError(f"data.root: no {root}; give a file of text, a folder of such files, or null")
    known: set[bytes] = set()
    for path in [root] if root.is_file() else _files(root, SUFFIXES):
        try:
            content = path.read_bytes()
            content.decode()
        except OSError as error:
            raise UserError(f"data.root: {path} cannot be read ({error.strerror or error}); mend it") from None
        except UnicodeDecodeError as error:
            raise UserError(f"data.root: {path} is no UTF-8 text (byte {error.start}); leave it out, or convert it"
                            ) from None  # fmt: skip
        if content not in known:
            known.add(content)
            yield from _cut(content)
    if not known:
        raise UserError(f"data.root: {root} holds no file that ends with {', '.join(SUFFIXES)}; give another folder")


def _cut(content: bytes) -> Iterator[bytes]:
    """Yield the lines of a file, a long one in parts; the last one is ended, so that no file runs into the next."""
    for line in io.BytesIO(content):  # at line feeds alone
        ended = line if line.endswith(b"\n") else line + b"\n"
        yield from (ended[start : start + _LONGEST] for start in range(0, len(ended), _LONGEST))


def _files(root: Path, suffixes: tuple[str, ...], left_out: frozenset[str] = frozenset()) -> list[Path]:
    """List the files of a tree with these endings, sorted by their paths in it; links to folders are not followed."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out]
        found += [Path(folder, name) for name in names if name.endswith(suffixes)]
    return sorted(found, key=lambda path: path.relative_to(root).parts)
