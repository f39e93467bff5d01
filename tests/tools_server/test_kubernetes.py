"""The manifest of several servers: valid, with a config that loads, and a balancer that finds sessions and their forks."""

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tools_server.__main__ import DRAIN_S
from tools_server.config import load_config

MANIFEST = Path(__file__).parents[2] / "configs/kubernetes/tools_server.yaml"
DOCUMENTS = list(yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8")))


def find(kind, name):
    [found] = [d for d in DOCUMENTS if d["kind"] == kind and d["metadata"]["name"] == name]
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: f"{d['kind']} {d['metadata']['name']}")
def test_every_document_is_valid(document):
    kubernetes_validate.validate(document, "1.31", strict=True)


def test_parts_fit_together(tmp_path):
    data = find("ConfigMap", "tools-server")["data"]
    (tmp_path / "server.yaml").write_text(data["server.yaml"])
    config = load_config(tmp_path / "server.yaml")
    servers = find("StatefulSet", "tools-server")
    pod = servers["spec"]["template"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > config.drain_s + 2 * DRAIN_S
    assert pod["spec"]["containers"][0]["ports"][0]["containerPort"] == config.port
    headless = find("Service", servers["spec"]["serviceName"])
    assert headless["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    expected = {f"tools-server-{i}.tools-servers:{config.port}" for i in range(servers["spec"]["replicas"])}
    assert set(re.findall(r"server (\S+);", data["nginx.conf"])) == expected
    balancer = find("Deployment", "tools-balancer")["spec"]["template"]
    front = find("Service", "tools-server")
    assert front["spec"]["selector"].items() <= balancer["metadata"]["labels"].items()


def test_a_session_and_its_forks_have_one_key():
    pattern = re.search(r"~(\^/v1/sessions\S+) \$1;", find("ConfigMap", "tools-server")["data"]["nginx.conf"])[1]
    paths = ["/v1/sessions/run%2F7", "/v1/sessions/run%2F7/call?x=1", "/v1/sessions/run%2F7~b/finish"]
    assert {re.match(pattern, path)[1] for path in paths} == {"run%2F7"}
    assert re.match(pattern, "/v1/sessions/run%2F8/call")[1] == "run%2F8"
    for path in ("/v1/sessions", "/v1/calls", "/healthz"):
        assert re.match(pattern, path) is None
