"""The tool kind *constant*: one text for every call, at the price and in the time that its config declares."""

from typing import Any

from tools_server.config import ConstantConfig
from tools_server.tool import CallContext, Price, ToolOutput, ToolSpec


class ConstantTool:
    """Answers at once."""

    def __init__(self, name: str, config: ConstantConfig) -> None:
        self.spec = ToolSpec(
            name,
            config.description or f"Says: {config.answer[:100]}",
            config.parameters,
            side_effect="pure",
            timeout_s=config.timeout_s,
            version=config.version,
            price=Price(call_usd=config.usd_per_call),
            latency_s=config.latency_s,
        )
        self._output = ToolOutput(config.answer)

    async def start(self) -> list["ConstantTool"]:
        return [self]

    async def close(self) -> None:
        pass

    async def call(self, arguments: dict[str, Any], context: CallContext) -> ToolOutput:
        return self._output
