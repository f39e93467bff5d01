"""Dated prices, and what a call is charged by them."""

import json
import subprocess
import sys
from datetime import date

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tools_server.config import ServerConfig
from tools_server.metrics import Metrics
from tools_server.prices import ModelPrice, PriceTable, load_prices
from tools_server.spans import Spans
from tools_server.tool import Price, Usage
from tools_server.toolbox import Toolbox

LITELLM = {
    "sample_spec": {"mode": "chat"},
    "m": {
        "input_cost_per_token": 1.25e-06,
        "output_cost_per_token": 1e-05,
        "cache_read_input_token_cost": 1.25e-07,
        "litellm_provider": "p",
        "max_tokens": 1000,
    },
    "plain": {"input_cost_per_token": 8e-07, "output_cost_per_token": 8e-07},
    "by-image": {"output_cost_per_image": 0.04},
}


@pytest.fixture
def table(tmp_path):
    (tmp_path / "litellm.json").write_text(json.dumps(LITELLM))
    return tmp_path / "litellm.json"


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tools_server", "import-prices", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_imported_prices_are_read_back(table, tmp_path):
    result = command(table, "m", "plain", "--since", "2026-01-01")
    assert result.returncode == 0, result.stderr
    (tmp_path / "prices.yaml").write_text(result.stdout)
    prices = load_prices(tmp_path / "prices.yaml")
    found = prices.on("m", date(2026, 1, 1))
    assert (
        found.usd_per_million_input_tokens,
        found.usd_per_million_cached_tokens,
        found.usd_per_million_output_tokens,
    ) == (1.25, 0.125, 10.0)
    assert prices.on("plain", date(2027, 1, 1)).usd_per_million_cached_tokens is None


def test_mistakes_of_the_import(table, tmp_path):
    for arguments, line in (
        ((table, "no-such", "--since", "2026-01-01"), "the table has no model 'no-such'"),
        ((table, "by-image", "--since", "2026-01-01"), "model 'by-image' has no price by token"),
        ((tmp_path / "none", "m", "--since", "2026-01-01"), f"{tmp_path}/none cannot be read"),
    ):
        result = command(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(line)


def test_the_price_in_force():
    def price(day, usd):
        return {"model": "m", "since": day, "usd_per_million_input_tokens": usd, "usd_per_million_output_tokens": usd}

    table = PriceTable.model_validate({"prices": [price("2026-03-01", 3), price("2026-01-01", 1)]})
    found = [table.on("m", date(2026, month, day)) for month, day in ((1, 1), (2, 28), (3, 1), (12, 31))]
    assert [price.usd_per_million_input_tokens for price in found] == [1, 1, 3, 3]
    with pytest.raises(ValueError, match="no price of 'm' on 2025-12-31; the earliest is of 2026-01-01"):
        table.on("m", date(2025, 12, 31))
    with pytest.raises(ValueError, match="no price of 'n' on 2026-01-01$"):
        table.on("n", date(2026, 1, 1))


def test_a_tool_takes_its_price_from_the_table(tmp_path):
    entry = ModelPrice(
        model="m",
        since=date(2026, 1, 1),
        usd_per_million_input_tokens=2.0,
        usd_per_million_cached_tokens=0.5,
        usd_per_million_output_tokens=8.0,
    )
    (tmp_path / "prices.yaml").write_text(yaml.safe_dump({"prices": [entry.model_dump()]}))
    server = {
        "tools": {"e": {"kind": "chat", "url": "http://h/v1", "model": "m", "price": "m", "usd_per_call": 0.1}},
        "prices": str(tmp_path / "prices.yaml"),
        "price_date": "2026-06-01",
    }
    [tool] = Toolbox(ServerConfig.model_validate(server), Metrics(lambda: 0), Spans(None))._sources
    assert tool.spec.price == Price(0.1, 0.0, 2e-6, 8e-6, 5e-7)
    with pytest.raises(ValueError, match=r"tools\.e\.price: the price table has no price of 'm' on 2025-06-01"):
        Toolbox(ServerConfig.model_validate(server | {"price_date": "2025-06-01"}), Metrics(lambda: 0), Spans(None))
    with pytest.raises(ValueError, match="set prices and price_date together"):
        ServerConfig.model_validate(server | {"price_date": None})


def test_one_price_twice_is_refused(tmp_path):
    entry = {"model": "m", "since": "2026-01-01", "usd_per_million_input_tokens": 1, "usd_per_million_output_tokens": 1}
    (tmp_path / "prices.yaml").write_text(yaml.safe_dump({"prices": [entry, entry]}))
    with pytest.raises(ValueError, match="'m' has two prices since 2026-01-01"):
        load_prices(tmp_path / "prices.yaml")


amounts = st.floats(0, 1e3)
prices = st.builds(Price, amounts, amounts, amounts, amounts, amounts)
counts = st.integers(0, 10**6)


@st.composite
def usages(draw):
    cached = draw(counts)
    return Usage(cached + draw(counts), draw(counts), cached, draw(amounts))


@given(prices, usages(), usages())
def test_more_use_never_costs_less(price, usage, more):
    total = Usage(
        usage.input_tokens + more.input_tokens,
        usage.output_tokens + more.output_tokens,
        usage.cached_tokens + more.cached_tokens,
        usage.seconds + more.seconds,
    )
    assert 0 <= price.cost_usd(usage) <= price.cost_usd(total) * (1 + 1e-12)


@pytest.mark.parametrize("usage", [(-1, 0, 0, 0.0), (0, -1, 0, 0.0), (5, 0, 6, 0.0), (0, 0, 0, -1.0)])
def test_impossible_usage_is_refused(usage):
    with pytest.raises(ValueError, match="usage counts are at least 0"):
        Usage(*usage)
