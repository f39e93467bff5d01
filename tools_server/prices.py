"""Dated prices of models: which price was in force on a day, and an importer of litellm's public table.

    prices:
      - model: some-model
        since: 2026-01-01
        usd_per_million_input_tokens: 2.5
        usd_per_million_cached_tokens: 0.25
        usd_per_million_output_tokens: 10.0

A new price is a new entry with a later date, so that what was charged before can be charged again.
"""

import argparse
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from tools_server.config import ChatConfig, Section, ServerConfig
from tools_server.tool import Price


class ModelPrice(Section):
    """One model's price from one day on."""

    model: str
    since: date
    usd_per_million_input_tokens: float = Field(ge=0)
    usd_per_million_cached_tokens: float | None = Field(None, ge=0, description="None = as other input")
    usd_per_million_output_tokens: float = Field(ge=0)


class PriceTable(Section):
    """All prices, in any order."""

    prices: tuple[ModelPrice, ...]

    def on(self, model: str, day: date) -> ModelPrice:
        """The price of `model` in force on `day`. Raises ValueError where there is none."""
        known = [price for price in self.prices if price.model == model]
        in_force = [price for price in known if price.since <= day]
        if not in_force:
            since = f"; the earliest is of {min(price.since for price in known)}" if known else ""
            raise ValueError(f"the price table has no price of {model!r} on {day}{since}")
        return max(in_force, key=lambda price: price.since)


def load_prices(path: Path) -> PriceTable:
    """Raises ValueError, one line."""
    try:
        table = PriceTable.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    seen: set[tuple[str, date]] = set()
    for price in table.prices:
        if (price.model, price.since) in seen:
            raise ValueError(f"{path}: {price.model!r} has two prices since {price.since}; remove one")
        seen.add((price.model, price.since))
    return table


def price_of(name: str, tool: ChatConfig, server: ServerConfig, table: PriceTable | None) -> Price:
    """What the chat tool `name` charges. Raises ValueError where it names a price that is not to be had."""
    declared: Any = tool
    if tool.price is not None:
        if table is None or server.price_date is None:
            raise ValueError(f"tools.{name}.price: there is no price table; set prices and price_date")
        try:
            declared = table.on(tool.price, server.price_date)
        except ValueError as error:
            raise ValueError(f"tools.{name}.price: {error}") from None
    million_input_usd = declared.usd_per_million_input_tokens
    million_cached_usd = declared.usd_per_million_cached_tokens
    return Price(
        call_usd=tool.usd_per_call,
        input_usd=million_input_usd / 1e6,
        output_usd=declared.usd_per_million_output_tokens / 1e6,
        cached_usd=(million_input_usd if million_cached_usd is None else million_cached_usd) / 1e6,
    )


def import_litellm(table: dict[str, Any], models: Sequence[str], since: date) -> PriceTable:
    """Entries of litellm's `model_prices_and_context_window.json`, whose prices are USD a token.

    Raises ValueError where a model is missing or has no token prices.
    """
    prices = []
    for model in models:
        entry = table.get(model)
        if not isinstance(entry, dict):
            raise ValueError(f"the table has no model {model!r}")
        try:
            cached_usd = entry.get("cache_read_input_token_cost")
            prices.append(
                ModelPrice(
                    model=model,
                    since=since,
                    usd_per_million_input_tokens=_per_million(entry["input_cost_per_token"]),
                    usd_per_million_cached_tokens=None if cached_usd is None else _per_million(cached_usd),
                    usd_per_million_output_tokens=_per_million(entry["output_cost_per_token"]),
                )
            )
        except KeyError as error:
            raise ValueError(f"model {model!r} has no price by token ({error} is missing)") from None
    return PriceTable(prices=tuple(prices))


def main(argv: list[str]) -> int:
    """`python -m tools_server import-prices`."""
    parser = argparse.ArgumentParser(
        prog="python -m tools_server import-prices",
        description="Print a price table (YAML, USD per million tokens) from litellm's public JSON.",
    )
    parser.add_argument("table", type=Path, help="litellm's model_prices_and_context_window.json")
    parser.add_argument("models", nargs="+", help="names of models as the table has them")
    parser.add_argument("--since", type=date.fromisoformat, required=True, help="day from which the prices hold")
    arguments = parser.parse_args(argv)
    try:
        table = json.loads(arguments.table.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{arguments.table} cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{arguments.table} is no table of models")
    prices = import_litellm(table, arguments.models, arguments.since)
    values = [price.model_dump(exclude_none=True) for price in prices.prices]
    print(yaml.safe_dump({"prices": values}, sort_keys=False), end="")
    return 0


def _per_million(usd: float) -> float:
    """Without the noise of the multiplication: 1.25e-06 is 1.25, not 1.2500000000000002."""
    return float(f"{usd * 1e6:.12g}")
