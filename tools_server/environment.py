"""What an environment is to the server: one object per session, driven by calls, judged at the end."""

from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

from tools_server.config import ServerConfig


class Observation(NamedTuple):
    """An environment's answer to one call; field meanings as in `wire.CallResult`."""

    tool: str
    content: str
    cost_usd: float = 0.0
    latency_s: float = 0.0
    error: str | None = None
    ended: bool = False
    work_s: float = 0.0
    wait_s: float = 0.0


class InfrastructureFailure(RuntimeError):
    """What an environment needs does not answer, such as the model that plays its user: no verdict on the agent."""


class Environment(Protocol):
    """One session's world. Methods are synchronous; the server runs those of a `blocking` class off its loop.

    A user's bad set-up raises ValueError in the constructor; InfrastructureFailure is an `infra_error`, any other
    exception an `env_error`.
    """

    blocking: bool
    """True where a call may take longer than a millisecond."""
    tools: list[dict[str, Any]]
    """OpenAI function schemas; empty where the task carries them, and `call` then checks its arguments
    itself.
    """
    messages: list[dict[str, Any]]
    """The chat with which the session starts; empty where the task carries it."""

    def __init__(self, setup: dict[str, Any], seed: int, config: ServerConfig) -> None:
        """Start from `OpenSession.setup` and `.seed`."""
        ...

    def call(self, name: str, arguments: dict[str, Any]) -> Observation:
        """Apply one call whose arguments fit the tool's schema in `tools`. name="": a message to the user."""
        ...

    def outcome(self) -> float:
        """The verdict in [0, 1] on everything so far."""
        ...


@runtime_checkable
class Branching(Environment, Protocol):
    """An environment that remembers where it stood. Others are forked and taken back by playing their calls again."""

    def mark(self) -> Any:
        """Where it stands now: cheap, and good for as long as the environment goes on from here."""
        ...

    def branch(self, mark: Any) -> Self:
        """An environment of its own, which stands where this one stood at `mark`."""
        ...

    def state(self) -> str:
        """A digest of the world: equal for equal worlds of one set-up."""
        ...
