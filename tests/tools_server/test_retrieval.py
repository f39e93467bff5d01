"""Engines beside the SQLite one: bm25s, vectors by a real HTTP endpoint, their fusion, OpenSearch's REST interface."""

import asyncio
import base64
import contextlib
import hashlib
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from tools_server.config import EmbeddingsConfig, OpenSearchConfig, SearchConfig
from tools_server.index import build_index
from tools_server.index import main as main_of_index
from tools_server.retrieval import bm25, opensearch
from tools_server.retrieval.bm25 import Bm25Retriever
from tools_server.retrieval.dense import DenseRetriever, read_embeddings
from tools_server.retrieval.opensearch import OpenSearchRetriever
from tools_server.retrieval.passages import Passage, RetrievalFailure, fuse
from tools_server.tool import CallContext
from tools_server.tools.search import SearchTool, retriever_of

DOCUMENTS = [
    {"id": "fox", "title": "Foxes", "text": "The quick brown fox jumps over the lazy dog."},
    {"id": "dog", "title": "Dogs", "text": "A dog sleeps. Dogs bark at foxes, and other dogs bark back."},
    {"id": "cat", "title": "Cats", "text": "Cats sleep all day."},
    {"id": "owl", "title": "Owls", "text": "An owl hunts mice at night and sleeps by day."},
]
WIDTH = 64


def embed(text):
    """Hashed trigrams: near for texts that share parts of words."""
    vector = np.zeros(WIDTH)
    for start in range(len(text) - 2):
        digest = hashlib.sha256(text[start : start + 3].lower().encode()).digest()
        vector[digest[0] % WIDTH] += 1 if digest[1] % 2 else -1
    return vector


@contextlib.asynccontextmanager
async def serving(*routes):
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def embeddings(seen=None, width=WIDTH):
    async def answer(request):
        payload = await request.json()
        if seen is not None:
            seen.append(payload)
        data = [{"index": i, "embedding": embed(text)[:width].tolist()} for i, text in enumerate(payload["input"])]
        return web.json_response({"data": data[::-1], "model": payload["model"]})  # the order is `index`'s

    async with serving(web.post("/v1/embeddings", answer)) as url:
        yield f"{url}/v1"


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    return path


def config_of(url, **options):
    return EmbeddingsConfig.model_validate({"url": url, "model": "trigrams", "retries": 0} | options)


async def build_dense(jsonl, out, **options):
    """An index with vectors, by an endpoint that ends with it."""
    async with embeddings() as url:
        await asyncio.to_thread(build_index, jsonl, out, embeddings=config_of(url, **options))


async def ask(retriever, query, num_results=10):
    await retriever.start()
    try:
        return (await retriever.retrieve(query, num_results)).passages
    finally:
        await retriever.close()


def ids(passages):
    return [passage.document_id for passage in passages]


def test_bm25s_scores_are_bm25(jsonl, tmp_path):
    """Lucene's BM25 (k1 = 1.5, b = 0.75) by hand, over stems of titles and texts without stop words."""
    pytest.importorskip("bm25s")
    build_index(jsonl, tmp_path / "index", with_bm25=True)
    stems = {
        "fox": ["fox", "quick", "brown", "fox", "jump", "over", "lazi", "dog"],
        "dog": ["dog", "dog", "sleep", "dog", "bark", "fox", "other", "dog", "bark", "back"],
        "cat": ["cat", "cat", "sleep", "all", "day"],
        "owl": ["owl", "owl", "hunt", "mice", "night", "sleep", "day"],
    }
    assert bm25.tokenize([f"{d['title']} {d['text']}" for d in DOCUMENTS]) == list(stems.values())
    query = ["sleep", "dog"]
    mean = sum(map(len, stems.values())) / 4
    expected = {}
    for name, words in stems.items():
        for word in query:
            holders = sum(word in other for other in stems.values())
            idf = math.log(1 + (4 - holders + 0.5) / (holders + 0.5))
            count = words.count(word)
            expected[name] = expected.get(name, 0) + idf * count / (count + 1.5 * (0.25 + 0.75 * len(words) / mean))
    found = asyncio.run(ask(Bm25Retriever(tmp_path / "index"), "Do the dogs sleep, elephant?"))
    assert {passage.document_id: passage.score for passage in found} == pytest.approx(expected, rel=1e-5)
    assert ids(found) == sorted(expected, key=lambda name: -expected[name])
    assert asyncio.run(ask(Bm25Retriever(tmp_path / "index"), "elephants of the")) == []
    assert ids(asyncio.run(ask(Bm25Retriever(tmp_path / "index"), "dog", 1))) == ["dog"]


def test_dense_retrieval_is_exact(jsonl, tmp_path):
    async def main():
        await build_dense(jsonl, tmp_path / "index", passage_prefix="passage: ")
        seen = []
        async with embeddings(seen) as url:
            found = await ask(
                DenseRetriever(tmp_path / "index", config_of(url, query_prefix="query: ")), "sleepy owls", 3
            )
        assert seen == [{"model": "trigrams", "input": ["query: sleepy owls"]}]
        return found

    found = asyncio.run(main())
    query = embed("query: sleepy owls")
    cosines = {}
    for document in DOCUMENTS:
        vector = embed(f"passage: {document['title']}\n{document['text']}")
        cosines[document["id"]] = vector @ query / np.linalg.norm(vector) / np.linalg.norm(query)
    best = sorted(cosines, key=lambda name: -cosines[name])[:3]
    assert ids(found) == best
    assert [passage.score for passage in found] == pytest.approx([cosines[name] for name in best], abs=1e-6)


@pytest.mark.parametrize("lexical", ["fts5", "bm25s"])
def test_both_rankings_are_fused(lexical, jsonl, tmp_path):
    if lexical == "bm25s":
        pytest.importorskip("bm25s")

    async def main():
        async with embeddings() as url:
            index, model = tmp_path / "index", config_of(url)
            await asyncio.to_thread(build_index, jsonl, index, with_bm25=lexical == "bm25s", embeddings=model)
            base = {"kind": "search", "index": index, "lexical": lexical}
            words = await ask(retriever_of(SearchConfig.model_validate(base)), "dogs at night")
            meaning = await ask(DenseRetriever(index, model), "dogs at night")
            config = SearchConfig.model_validate(base | {"embeddings": model.model_dump(), "num_results": 3})
            [tool] = await SearchTool("search", config, retriever_of(config)).start()
            output = await tool.call({"query": "dogs at night"}, CallContext("s", 0))
            await tool.close()
            return words, meaning, output

    words, meaning, output = asyncio.run(main())
    assert ids(words) != ids(meaning)
    fused = fuse([words, meaning], 3)
    assert output.content == "\n\n".join(f"[{i}] {p.title}\n{p.text}" for i, p in enumerate(fused, 1))
    assert output.error is None
    assert output.work_s > 0


def test_reciprocal_rank_fusion_by_hand():
    a, b, c = (Passage(name, name, name, 0.0) for name in "abc")
    fused = fuse([[a, b], [b, c]], 3)
    assert [(p.document_id, p.score) for p in fused] == [("b", 1 / 62 + 1 / 61), ("a", 1 / 61), ("c", 1 / 62)]


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True), min_size=1, max_size=4), st.integers(1, 8))
def test_fusion_ranks_by_summed_reciprocals(rankings, num_results):
    fused = fuse([[Passage(name, "", "", 9.0) for name in ranking] for ranking in rankings], num_results)
    sums = {}
    for ranking in rankings:
        for rank, name in enumerate(ranking, 1):
            sums[name] = sums.get(name, 0) + 1 / (60 + rank)
    assert [p.score for p in fused] == sorted(sums.values(), reverse=True)[:num_results]
    assert all(p.score == sums[p.document_id] for p in fused)


def test_a_dead_endpoint_is_an_infrastructure_failure(jsonl, tmp_path):
    async def main():
        await build_dense(jsonl, tmp_path / "index")
        config = SearchConfig.model_validate(
            {
                "kind": "search",
                "index": tmp_path / "index",
                "embeddings": config_of("http://127.0.0.1:9/v1").model_dump(),
            }
        )
        [tool] = await SearchTool("search", config, retriever_of(config)).start()
        output = await tool.call({"query": "dogs"}, CallContext("s", 0))
        fault = await tool.fault()
        await tool.close()
        return output, fault

    output, fault = asyncio.run(main())
    assert output.error == "infra_error"
    assert fault == output.content
    assert output.content.startswith("embeddings: http://127.0.0.1:9/v1: http://127.0.0.1:9/v1 does not answer: ")


def test_an_index_without_what_the_config_asks_for(jsonl, tmp_path):
    def refusal(**options):
        config = SearchConfig.model_validate({"kind": "search", "index": tmp_path / "index"} | options)
        with pytest.raises(ValueError) as caught:
            asyncio.run(SearchTool("find", config, retriever_of(config)).start())
        return str(caught.value)

    build_index(jsonl, tmp_path / "index")
    model = {"url": "http://127.0.0.1:9/v1", "model": "other"}
    assert refusal(embeddings=model) == (
        f"tools.find: {tmp_path}/index holds no vectors; `python -m tools_server index --embeddings-url` adds them"
    )
    assert refusal(lexical="bm25s") == (
        f"tools.find: no bm25s index at {tmp_path}/index.bm25s; `python -m tools_server index --bm25s` writes one"
    )
    (tmp_path / "index").unlink()
    asyncio.run(build_dense(jsonl, tmp_path / "index"))
    assert refusal(embeddings=model) == (
        f"tools.find: {tmp_path}/index holds vectors of 'trigrams', not of 'other': build again"
    )


def test_a_model_of_another_width(jsonl, tmp_path):
    async def main():
        await build_dense(jsonl, tmp_path / "index")
        async with embeddings(width=40) as url:
            await ask(DenseRetriever(tmp_path / "index", config_of(url)), "dogs")

    with pytest.raises(RetrievalFailure, match="embeddings: 40 numbers, the index has 64: build it again"):
        asyncio.run(main())


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"data": [{"index": 0, "embedding": [1.0, 2.0]}]},
        {"data": [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0, 2.0]}]},
        {"data": [{"index": 0, "embedding": [0.0]}, {"index": 1, "embedding": [1.0]}]},
        {"data": [{"index": 0, "embedding": [float("nan")]}, {"index": 1, "embedding": [1.0]}]},
        {"data": [{"index": 0, "embedding": "x"}, {"index": 1, "embedding": "y"}]},
    ],
)
def test_answers_that_are_no_embeddings(payload):
    with pytest.raises(ValueError, match="embeddings"):
        read_embeddings(payload, 2)


def test_a_failed_build_leaves_nothing_behind(jsonl, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "tools_server", "index", jsonl, "--out", tmp_path / "index", "--embeddings-url", "x"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (2, "pass --embeddings-url and --embeddings-model together\n")
    with pytest.raises(ValueError, match=r"embeddings: http://127\.0\.0\.1:9/v1: .* does not answer"):
        build_index(jsonl, tmp_path / "index", embeddings=config_of("http://127.0.0.1:9/v1"))
    assert [path.name for path in tmp_path.iterdir()] == ["documents.jsonl"]


class Cluster:
    """What OpenSearch 2 and 3 document of the requests that are made here; scores count common words."""

    def __init__(self):
        self.indices, self.fault = {}, None

    def routes(self):
        return [
            web.put("/{index}", self.create),
            web.post("/_bulk", self.bulk),
            web.post("/{index}/_refresh", self.refresh),
            web.post("/{index}/_search", self.search),
        ]

    def failure(self, status, kind, reason):
        cause = {"type": kind, "reason": reason}
        return web.json_response({"error": {"root_cause": [cause], **cause}, "status": status}, status=status)

    async def create(self, request):
        assert request.headers["Authorization"] == f"Basic {base64.b64encode(b'admin:secret').decode()}"
        name = request.match_info["index"]
        if name in self.indices:
            return self.failure(400, "resource_already_exists_exception", f"index [{name}/x] already exists")
        self.indices[name] = {"mappings": (await request.json())["mappings"], "new": {}, "visible": {}}
        return web.json_response({"acknowledged": True, "shards_acknowledged": True, "index": name})

    async def bulk(self, request):
        assert request.content_type == "application/x-ndjson"
        body = await request.text()
        assert body.endswith("\n")
        lines, items = [json.loads(line) for line in body.splitlines()], []
        for action, source in zip(lines[::2], lines[1::2], strict=True):
            target = action["index"]
            item = {"_index": target["_index"], "_id": target["_id"], "status": 201, "result": "created"}
            if "refuse me" in source["text"]:
                item |= {"status": 400, "error": {"type": "mapper_parsing_exception", "reason": "failed to parse"}}
            else:
                self.indices[target["_index"]]["new"][target["_id"]] = source
            items.append({"index": item})
        errors = any("error" in item["index"] for item in items)
        return web.json_response({"took": 1, "errors": errors, "items": items})

    async def refresh(self, request):
        index = self.indices[request.match_info["index"]]
        index["visible"] = dict(index["new"])
        return web.json_response({"_shards": {"total": 2, "successful": 1, "failed": 0}})

    async def search(self, request):
        name, body = request.match_info["index"], await request.json()
        if name not in self.indices:
            return self.failure(404, "index_not_found_exception", f"no such index [{name}]")
        assert body["query"]["multi_match"]["fields"] == ["title^2", "text"]
        words = set(re.findall(r"\w+", body["query"]["multi_match"]["query"].lower()))
        hits = []
        for document, source in self.indices[name]["visible"].items():
            score = 2.0 * len(words & set(re.findall(r"\w+", source["title"].lower())))
            score += len(words & set(re.findall(r"\w+", source["text"].lower())))
            if score:
                hits.append({"_index": name, "_id": document, "_score": score, "_source": source, "sort": [score, 0]})
        hits.sort(key=lambda hit: -hit["_score"])
        shards = {"total": 1, "successful": 1, "skipped": 0, "failed": 0} | (self.fault or {})
        total = {"value": len(hits), "relation": "eq"}
        found = {"total": total, "max_score": None, "hits": hits[: body["size"]]}
        return web.json_response({"took": 2, "timed_out": False, "_shards": shards, "hits": found})


def test_opensearch_is_filled_and_asked(jsonl, tmp_path, monkeypatch):
    monkeypatch.setenv("CLUSTER_LOGIN", "admin:secret")
    monkeypatch.setattr(opensearch, "BULK", 3)  # so that four passages take two requests

    def index(url, documents=jsonl, name="animals"):
        return main_of_index([str(documents), "--opensearch", f"{url}/{name}", "--key-variable", "CLUSTER_LOGIN"])

    async def main():
        cluster = Cluster()
        async with serving(*cluster.routes()) as url:
            assert await asyncio.to_thread(index, url) == 0
            config = OpenSearchConfig.model_validate(
                {"kind": "opensearch", "url": url, "index": "animals", "key_variable": "CLUSTER_LOGIN", "retries": 0}
            )
            found = await ask(OpenSearchRetriever(config), "dogs at night", 2)
            assert [(p.document_id, p.title, p.score) for p in found] == [("dog", "Dogs", 4.0), ("owl", "Owls", 2.0)]
            assert found[1].text == DOCUMENTS[3]["text"]
            with pytest.raises(ValueError, match="resource_already_exists_exception"):
                await asyncio.to_thread(index, url)
            (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": "refuse me"}\n')
            with pytest.raises(ValueError, match="passage 1 was refused: .*mapper_parsing_exception"):
                await asyncio.to_thread(index, url, tmp_path / "bad.jsonl", "other")
            with pytest.raises(ValueError, match="expected URL/INDEX with a lower-case INDEX"):
                await asyncio.to_thread(index, url, jsonl, "Animals")
            cluster.fault = {"successful": 0, "failed": 1}
            with pytest.raises(RetrievalFailure, match="an incomplete answer"):
                await ask(OpenSearchRetriever(config), "dogs")
            missing = config.model_copy(update={"index": "none"})
            with pytest.raises(RetrievalFailure, match="HTTP 404: .*index_not_found_exception"):
                await ask(OpenSearchRetriever(missing), "dogs")

    asyncio.run(main())
