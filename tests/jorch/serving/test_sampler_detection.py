"""Running servers are asked whether they were started for adapters, which the first push then depends on."""

import json
import threading
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jorch.serving.samplers import _take_adapters

GONE = "http://127.0.0.1:1"


@contextmanager
def serving(*models):
    """The url of a server that tells these models."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/v1/models" else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": name} for name in models]}).encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def urls():
    """One server that takes adapters and has one, one that has none yet, one that takes none."""
    with ExitStack() as stack:
        yield [stack.enter_context(serving(*names)) for names in (("base", "policy"), ("base",), ("policy",))]


def test_adapters_go_to_servers_that_hold_their_base(urls, capsys):
    assert _take_adapters(urls[:2])
    assert capsys.readouterr().out == ""


def test_other_servers_get_merged_weights_and_the_run_says_so(urls, capsys):
    assert not _take_adapters(urls[2:])
    assert capsys.readouterr().out == (
        f"vLLM at {urls[2]} takes no adapters (jorch serve --lora-rank): merged weights are pushed\n"
    )


def test_a_mixture_is_refused(urls):
    with pytest.raises(ValueError, match=f"^vLLM at {urls[2]} takes no adapters, others do: start all with"):
        _take_adapters(urls)


def test_a_server_that_is_gone_decides_nothing(urls):
    """It is left out by the first push, as it is where whole models are pushed."""
    assert _take_adapters([urls[0], GONE])
    assert not _take_adapters([GONE, urls[2]])
