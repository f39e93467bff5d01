"""`python -m tools_server index`: documents -> an SQLite FTS5 index that the tool *search* reads."""

import argparse
import contextlib
import json
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".txt", ".md", ".rst")
"""Of the files of a folder that are documents."""
MAX_PASSAGE_CHARACTERS = 1200
_PARAGRAPH = re.compile(r"\n\s*\n")


class Document(NamedTuple):
    """`document_id`: the file's path in its folder, or a line's "id", or its number."""

    document_id: str
    title: str
    text: str


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools_server index",
        description="Build the index of a search tool from a folder of text files or from JSONL.",
    )
    parser.add_argument("documents", type=Path, help=f"a folder of {', '.join(SUFFIXES)}, or .jsonl (id, title, text)")
    parser.add_argument("--out", type=Path, required=True, help="index file to write; must not exist yet")
    arguments = parser.parse_args(argv)
    num_documents, num_passages = build_index(arguments.documents, arguments.out)
    print(f"{arguments.out}: {num_documents} documents, {num_passages} passages")
    return 0


def build_index(documents: Path, out: Path) -> tuple[int, int]:
    """Write the index; the numbers of documents and passages.

    A crash leaves no half-written index behind: `out` appears when it is complete. Raises ValueError where the
    documents cannot be read or `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists: remove it, or choose another --out")
    unfinished = out.with_name(f"{out.name}.{os.getpid()}.unfinished")
    try:
        with contextlib.closing(sqlite3.connect(unfinished)) as connection, connection:
            connection.execute(
                "CREATE VIRTUAL TABLE passages "
                "USING fts5(document_id UNINDEXED, title, text, tokenize='porter unicode61')"
            )
            num_documents = num_passages = 0
            for document in read_documents(documents):
                num_documents += 1
                for text in passages_of(document.text):
                    num_passages += 1
                    row = (document.document_id, document.title, text)
                    connection.execute("INSERT INTO passages VALUES (?, ?, ?)", row)
            if not num_passages:
                raise ValueError(f"{documents} holds no document with text")
            connection.execute("INSERT INTO passages(passages) VALUES ('optimize')")
        unfinished.rename(out)
    except sqlite3.OperationalError as error:
        raise ValueError(f"{out} cannot be written: {error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return num_documents, num_passages


def read_documents(source: Path) -> Iterator[Document]:
    """Raises ValueError with the file, and the line of a JSONL, that is at fault."""
    if source.is_dir():
        for path in sorted(path for path in source.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
            name = path.relative_to(source).as_posix()
            yield Document(name, path.stem, path.read_text(encoding="utf-8", errors="replace"))
    elif source.suffix == ".jsonl" and source.is_file():
        with source.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _document(line, f"{source}:{number}", str(number))
    else:
        raise ValueError(f"{source} is neither a folder nor a .jsonl file")


def _document(line: str, where: str, number: str) -> Document:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{where}: expected {{"text": "...", "title": "...", "id": "..."}} with at least text')
    return Document(str(record.get("id", number)), str(record.get("title", "")), record["text"])


def passages_of(text: str) -> Iterator[str]:
    """Paragraphs, joined while they fit a passage; a longer one is cut at a space where it has one."""
    passage = ""
    for paragraph in _PARAGRAPH.split(text):
        rest = paragraph.strip()
        if passage and len(passage) + len(rest) + 2 > MAX_PASSAGE_CHARACTERS:
            yield passage
            passage = ""
        while len(rest) > MAX_PASSAGE_CHARACTERS:
            cut = rest.rfind(" ", 0, MAX_PASSAGE_CHARACTERS)
            cut = cut if cut > 0 else MAX_PASSAGE_CHARACTERS
            yield rest[:cut]
            rest = rest[cut:].lstrip()
        if rest:
            passage = f"{passage}\n\n{rest}" if passage else rest
    if passage:
        yield passage
