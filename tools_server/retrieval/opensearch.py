"""An OpenSearch index as the engine, over its REST interface (`_bulk`, `_search`), for corpora beyond one file.

Fields: document_id (keyword), title and text (analysed as English). Elasticsearch understands the same requests.
"""

import json
from collections.abc import Iterable
from typing import Any

import aiohttp

from tools_server.config import OpenSearchConfig
from tools_server.endpoint import Endpoint, EndpointFailure, EndpointLimits, RequestRefused
from tools_server.retrieval.passages import Found, Passage, RetrievalFailure

MAPPINGS = {
    "properties": {
        "document_id": {"type": "keyword"},
        "title": {"type": "text", "analyzer": "english"},
        "text": {"type": "text", "analyzer": "english"},
    }
}
BULK = 500
"""Passages of one request."""


def search_request(query: str, num_results: int) -> dict[str, Any]:
    """The body of `_search`. Titles weigh twice, as in the SQLite index; ties go by the order in the index."""
    return {
        "size": num_results,
        "_source": ["document_id", "title", "text"],
        "query": {"multi_match": {"query": query, "fields": ["title^2", "text"], "type": "most_fields"}},
        "sort": ["_score", "_doc"],
        "track_scores": True,
    }


def read_hits(payload: dict[str, Any]) -> list[Passage]:
    """Raises ValueError where the answer is none of `_search`, or not all shards answered."""
    try:
        if payload["timed_out"] or payload["_shards"]["failed"]:
            raise ValueError(f"an incomplete answer (shards: {json.dumps(payload['_shards'])[:200]})")
        hits = [(hit["_source"], float(hit["_score"])) for hit in payload["hits"]["hits"]]
        return [Passage(source["document_id"], source["title"], source["text"], score) for source, score in hits]
    except (KeyError, TypeError) as error:
        raise ValueError(f"an answer in another form ({type(error).__name__}: {error})") from None


class OpenSearchRetriever:
    """One index of one cluster."""

    def __init__(self, config: OpenSearchConfig) -> None:
        limits = EndpointLimits(timeout_s=config.timeout_s, retries=config.retries)
        self._config = config
        self._endpoint = Endpoint(config.url, limits, config.key_variable, scheme=config.key_scheme)

    async def start(self) -> None:
        await self._endpoint.start()

    async def close(self) -> None:
        await self._endpoint.close()

    async def retrieve(self, query: str, num_results: int) -> Found:
        try:
            exchange = await self._endpoint.post(f"/{self._config.index}/_search", search_request(query, num_results))
            return Found(read_hits(exchange.payload), exchange.work_s, exchange.wait_s)
        except (EndpointFailure, RequestRefused, ValueError) as error:
            raise RetrievalFailure(f"{self._config.url}: {error}") from None


async def fill(url: str, index: str, headers: dict[str, str], rows: Iterable[tuple[str, str, str]]) -> int:
    """Create `index` with `rows` (document_id, title, text); their number. Raises ValueError where that fails."""
    count = 0
    async with aiohttp.ClientSession(headers=headers) as http:

        async def send(method: str, path: str, body: str, kind: str) -> dict[str, Any]:
            try:
                target, typed = f"{url.rstrip('/')}/{path}", {"Content-Type": kind}
                async with http.request(method, target, data=body.encode(), headers=typed) as reply:
                    answer = await reply.json(content_type=None)
                    if reply.status >= 300:
                        raise ValueError(f"{url}: HTTP {reply.status}: {json.dumps(answer)[:300]}")
                    return answer
            except (aiohttp.ClientError, json.JSONDecodeError) as error:
                raise ValueError(f"{url}: {' '.join(str(error).split())[:300]}") from None

        await send("PUT", index, json.dumps({"mappings": MAPPINGS}), "application/json")
        lines: list[str] = []
        for document_id, title, text in rows:
            source = {"document_id": document_id, "title": title, "text": text}
            lines += [json.dumps({"index": {"_index": index, "_id": str(count)}}), json.dumps(source)]
            count += 1
            if len(lines) == 2 * BULK:
                _check_bulk(url, await send("POST", "_bulk", "\n".join(lines) + "\n", "application/x-ndjson"))
                lines.clear()
        if lines:
            _check_bulk(url, await send("POST", "_bulk", "\n".join(lines) + "\n", "application/x-ndjson"))
        await send("POST", f"{index}/_refresh", "", "application/json")
    return count


def _check_bulk(url: str, answer: dict[str, Any]) -> None:
    """`_bulk` answers 200 even where single passages were refused."""
    if answer.get("errors"):
        refused = next(item["index"] for item in answer["items"] if item["index"].get("error"))
        raise ValueError(f"{url}: passage {refused.get('_id')} was refused: {json.dumps(refused['error'])[:300]}")
