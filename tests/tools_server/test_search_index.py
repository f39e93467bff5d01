"""The search tool's index: built by its command, read by the tool."""

import asyncio
import json
import sqlite3
import subprocess
import sys

import pytest
from fake_endpoint import endpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from tools_server.config import SearchConfig, WebSearchConfig
from tools_server.index import MAX_PASSAGE_CHARACTERS, build_index, passages_of
from tools_server.retrieval.sqlite_index import SearchIndex
from tools_server.tool import CallContext
from tools_server.tools.search import SearchTool, WebSearchTool, retriever_of

DOCUMENTS = [
    {"id": "fox", "title": "Foxes", "text": "The quick brown fox jumps over the lazy dog."},
    {"id": "dog", "title": "Dogs", "text": "A dog sleeps. Dogs bark at foxes."},
    {"id": "cat", "title": "Cats", "text": "Cats sleep all day."},
]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    return path


@pytest.fixture
def index(jsonl, tmp_path):
    assert build_index(jsonl, tmp_path / "index.sqlite") == (3, 3)
    return SearchIndex(tmp_path / "index.sqlite")


def found(index, query, num_results=10):
    return [passage.document_id for passage in SearchIndex.search(index.connect(), query, num_results)]


def test_stems_ranking_and_limits(index):
    assert found(index, "cat") == ["cat"]
    assert found(index, "sleeping") == ["cat", "dog"]
    assert found(index, "lazy foxes dog", 1) == ["fox"]
    assert found(index, "elephant") == []
    assert found(index, "?!") == []


def test_stop_words_count_only_where_there_is_nothing_else(index):
    assert found(index, "Is the cat all there?") == ["cat"]
    assert found(index, "THE") == ["fox"]
    assert found(index, "at the") == ["fox", "dog"]


def test_scores_are_those_of_bm25_with_a_heavier_title(index):
    """Okapi BM25 as FTS5 defines it (k1 = 1.2, b = 0.75), by hand for the word that one document has."""
    import math

    [passage] = SearchIndex.search(index.connect(), "quick", 5)
    lengths = [1 + 9, 1 + 7, 1 + 4]  # words of title and text
    idf = math.log((3 - 1 + 0.5) / (1 + 0.5))
    norm = 1.2 * (1 - 0.75 + 0.75 * lengths[0] / (sum(lengths) / 3))
    assert passage.score == pytest.approx(idf * 1.0 * 2.2 / (1.0 + norm), rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_no_query_is_a_syntax_error(text):
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE VIRTUAL TABLE passages USING fts5(document_id UNINDEXED, title, text)")
    connection.execute("INSERT INTO passages VALUES ('a', 'b', 'c')")
    assert {passage.document_id for passage in SearchIndex.search(connection, text, 3)} <= {"a"}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(alphabet="ab \n", max_size=2000), max_size=5))
def test_passages_keep_every_word_and_fit(paragraphs):
    text = "\n\n".join(paragraphs)
    passages = list(passages_of(text))
    assert all(0 < len(passage) <= MAX_PASSAGE_CHARACTERS for passage in passages)
    assert "".join("".join(passages).split()) == "".join(text.split())


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tools_server", "index", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_and_its_mistakes(jsonl, tmp_path):
    out = tmp_path / "a new folder" / "new.sqlite"
    result = command(jsonl, "--out", out)
    assert (result.returncode, result.stdout) == (0, f"{out}: 3 documents, 3 passages\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"title": "b"}\n')
    mistakes = [
        (command(jsonl, "--out", out), f"{out} exists: remove it, or choose another --out"),
        (command(tmp_path / "none", "--out", tmp_path / "x"), f"{tmp_path}/none is neither a folder nor a .jsonl file"),
        (command(tmp_path / "bad.jsonl", "--out", tmp_path / "x"), f"{tmp_path}/bad.jsonl:2: expected"),
        (command(jsonl, "--out", out / "x"), f"{out}/x cannot be written: File exists"),
    ]
    for result, line in mistakes:
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(line)
        assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a new folder", "bad.jsonl", "documents.jsonl"]
    assert list(out.parent.iterdir()) == [out]


def test_a_file_that_is_no_index(tmp_path):
    (tmp_path / "x").write_text("text")
    with pytest.raises(ValueError, match="is no search index"):
        SearchIndex(tmp_path / "x")


def test_a_query_that_takes_too_long_is_interrupted(index, tmp_path, monkeypatch):
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n"
    monkeypatch.setattr(
        SearchIndex, "search", staticmethod(lambda connection, *_: connection.execute(endless).fetchall())
    )

    async def main():
        config = SearchConfig.model_validate({"kind": "search", "index": tmp_path / "index.sqlite", "timeout_s": 0.2})
        [tool] = await SearchTool("search", config, retriever_of(config)).start()
        output = await tool.call({"query": "x"}, CallContext("s", 0))
        await tool.close()
        return output

    output = asyncio.run(main())
    assert (output.error, output.content) == ("infra_error", "the index does not answer: interrupted")


def test_web_search():
    answer = {"results": [{"title": "T", "url": "http://h", "content": "words " * 400, "score": 0.5}, {"broken": 1}]}

    async def ask(payload, num_results):
        async with endpoint(payload) as (fake, url):
            config = WebSearchConfig.model_validate(
                {"kind": "web_search", "url": f"{url}/search", "num_results": num_results, "retries": 0}
            )
            [tool] = await WebSearchTool("web", config).start()
            output = await tool.call({"query": "q"}, CallContext("s", 0))
            await tool.close()
            return output, fake.requests

    output, requests = asyncio.run(ask(answer, 1))
    assert output.content == "[1] T\n" + ("words " * 400)[:1200]
    assert requests == [{"query": "q", "max_results": 1}]
    assert asyncio.run(ask(answer, 2))[0].error == "infra_error"
