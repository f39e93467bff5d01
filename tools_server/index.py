"""`python -m tools_server index`: documents -> an SQLite FTS5 index that the tool *search* reads, or one of OpenSearch.

With `--bm25s` a second lexical index lies beside it, with `--embeddings-url` it holds a vector of each passage.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tools_server.config import EmbeddingsConfig, OpenSearchConfig
from tools_server.endpoint import authorization
from tools_server.errors import one_line
from tools_server.retrieval import bm25, dense, opensearch

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
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="index file to write; must not exist yet")
    target.add_argument("--opensearch", metavar="URL/INDEX", help="index to create in a running OpenSearch")
    parser.add_argument("--bm25s", action="store_true", help="write OUT.bm25s too, for lexical: bm25s (extra `search`)")
    parser.add_argument("--embeddings-url", metavar="URL", help="store vectors by this endpoint, e.g. http://HOST/v1")
    parser.add_argument("--embeddings-model", metavar="NAME", help="the endpoint's model")
    parser.add_argument("--passage-prefix", default="", help="what the model wants before a passage (default: nothing)")
    parser.add_argument("--key-variable", help="environment variable with the key, or USER:PASSWORD for OpenSearch")
    arguments = parser.parse_args(argv)
    if arguments.opensearch:
        url, _, index = arguments.opensearch.rpartition("/")
        count = fill_opensearch(arguments.documents, url, index, arguments.key_variable)
        print(f"{arguments.opensearch}: {count} passages")
        return 0
    options = {"with_bm25": arguments.bm25s, "embeddings": _embeddings(arguments)}
    num_documents, num_passages = build_index(arguments.documents, arguments.out, **options)
    print(f"{arguments.out}: {num_documents} documents, {num_passages} passages")
    return 0


def _embeddings(arguments: argparse.Namespace) -> EmbeddingsConfig | None:
    if arguments.embeddings_url is None and arguments.embeddings_model is None:
        return None
    if arguments.embeddings_url is None or arguments.embeddings_model is None:
        raise ValueError("pass --embeddings-url and --embeddings-model together")
    return EmbeddingsConfig.model_validate(
        {
            "url": arguments.embeddings_url,
            "model": arguments.embeddings_model,
            "key_variable": arguments.key_variable,
            "passage_prefix": arguments.passage_prefix,
        }
    )


def fill_opensearch(documents: Path, url: str, index: str, key_variable: str | None) -> int:
    """Create the index with all passages; their number. Raises ValueError where that cannot be."""
    try:
        OpenSearchConfig.model_validate({"kind": "opensearch", "url": url, "index": index})
    except ValueError as error:
        raise ValueError(f"--opensearch: expected URL/INDEX with a lower-case INDEX ({one_line(error)})") from None
    rows = (
        (document.document_id, document.title, text)
        for document in read_documents(documents)
        for text in passages_of(document.text)
    )
    return asyncio.run(opensearch.fill(url, index, authorization(url, key_variable, "Basic"), rows))


def build_index(
    documents: Path, out: Path, *, with_bm25: bool = False, embeddings: EmbeddingsConfig | None = None
) -> tuple[int, int]:
    """Write the index; the numbers of documents and passages.

    A crash leaves no half-written index behind: `out` appears when it is complete. Raises ValueError where the
    documents cannot be read, `out` exists, or what the options need is missing.
    """
    for path in (out, *([bm25.folder_of(out)] if with_bm25 else [])):
        if path.exists():
            raise ValueError(f"{path} exists: remove it, or choose another --out")
    unfinished = out.with_name(f"{out.name}.{os.getpid()}.unfinished")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror}") from None
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
            if embeddings is not None:
                asyncio.run(dense.build(connection, embeddings))
            if with_bm25:
                bm25.build(connection, bm25.folder_of(unfinished))
        if with_bm25:
            bm25.folder_of(unfinished).rename(bm25.folder_of(out))
        unfinished.rename(out)
    except sqlite3.OperationalError as error:
        raise ValueError(f"{out} cannot be written: {error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
        shutil.rmtree(bm25.folder_of(unfinished), ignore_errors=True)
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
