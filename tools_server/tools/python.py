"""The tool *python*: runs a program that the model wrote and answers with what it printed."""

from typing import Any

from tools_server.config import PythonConfig, RemotePythonConfig
from tools_server.sandbox.bubblewrap import Limits, Run, SandboxFailure
from tools_server.sandbox.pool import SandboxPool
from tools_server.sandbox.remote import RemoteRunner, Runner
from tools_server.sandbox.worker import CLOCK
from tools_server.tool import CallContext, Price, ToolOutput, ToolSpec, Usage, object_schema

DESCRIPTION = (
    "Runs a Python program and returns what it prints. There is no network, and neither files nor variables last "
    "until the next call."
)
CPU_LIMIT_STATUS = 128 + 24
"""Killed by SIGXCPU."""
MAX_ERROR_CHARACTERS = 2000


class PythonTool:
    """One program a call, each in a sandbox that is used once."""

    def __init__(self, name: str, config: PythonConfig | RemotePythonConfig) -> None:
        program = {"type": "string", "description": "the program", "minLength": 1, "maxLength": 200_000}
        self.spec = ToolSpec(
            name,
            config.description or DESCRIPTION,
            object_schema({"code": program}, ["code"]),
            side_effect="pure",
            timeout_s=config.timeout_s,
            version=config.version,
            price=Price(call_usd=config.usd_per_call, second_usd=config.usd_per_second),
            latency_s=config.latency_s,
        )
        self.pool = runner_of(config)

    async def start(self) -> list["PythonTool"]:
        try:
            await self.pool.__aenter__()
        except ValueError as error:
            raise ValueError(f"tools.{self.spec.name}: {error}") from None
        return [self]

    async def close(self) -> None:
        await self.pool.__aexit__()

    async def fault(self) -> str | None:
        """Why no program can be run, or None: asked with the shortest program there is."""
        output = await self.call({"code": "0"}, CallContext("check", seed=0))
        return output.content if output.error else None

    async def call(self, arguments: dict[str, Any], context: CallContext) -> ToolOutput:
        """stdout, and what went wrong. A program that runs too long is the model's fault, a broken sandbox is not."""
        clock = "" if context.clock_s is None else f"{CLOCK.decode()}{context.clock_s!r}\n"
        try:
            run, wait_s = await self.pool.run(clock + arguments["code"], self.spec.timeout_s)
        except SandboxFailure as failure:
            return ToolOutput(str(failure), "infra_error")
        content, error = describe(run, self.spec.timeout_s)
        return ToolOutput(content, error, Usage(seconds=run.work_s), run.work_s, wait_s)


def runner_of(config: PythonConfig | RemotePythonConfig) -> Runner:
    """What runs the programs."""
    if isinstance(config, RemotePythonConfig):
        return RemoteRunner(config)
    return SandboxPool(
        config.sandboxes,
        Limits(config.memory_bytes, config.cpu_s, config.max_processes, config.file_bytes, config.output_bytes),
        config.python,
        config.read_only,
        unprotected=config.run_model_code_without_a_sandbox,
        cgroups=config.cgroups,
    )


def describe(run: Run, timeout_s: float) -> tuple[str, str | None]:
    """The observation and its error."""
    stdout = run.stdout.decode("utf-8", "replace").rstrip()
    if run.timed_out:
        return _joined(stdout, f"error: ended after {timeout_s:g} s"), "timeout"
    if run.cut:
        return _joined(stdout, "error: ended because it printed too much"), "tool_error"
    if run.out_of_memory and run.exit_status:
        return _joined(stdout, "error: ended because it used too much memory"), "tool_error"
    if run.exit_status == 0:
        return stdout or "(nothing was printed)", None
    if run.exit_status == CPU_LIMIT_STATUS:
        return _joined(stdout, "error: ended because it used too much CPU time"), "timeout"
    stderr = run.stderr.decode("utf-8", "replace").strip()[-MAX_ERROR_CHARACTERS:]
    return _joined(stdout, stderr or f"error: ended with status {run.exit_status}"), "tool_error"


def _joined(*parts: str) -> str:
    return "\n".join(part for part in parts if part)
