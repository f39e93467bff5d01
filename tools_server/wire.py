"""The wire: what travels between the rollout driver and the tool server. Standard library only.

Every endpoint takes and returns a list, so that a driver with hundreds of concurrent trajectories pays for
one request per burst, not one per call:

    POST /v1/sessions  {"sessions": [OpenSession, ...]}   -> {"sessions": [SessionOpened, ...]}
    POST /v1/calls     {"calls": [Call, ...]}             -> {"results": [CallResult, ...]}
    POST /v1/forks     {"forks": [ForkSession, ...]}      -> {"sessions": [SessionOpened, ...]}
    POST /v1/finish    {"session_ids": [str, ...]}        -> {"records": [SessionRecord, ...]}
    POST /v1/rewards   {"groups": [RewardGroup, ...]}     -> {"rewards": [[Reward, ...], ...]}
    POST /v1/heartbeats {"session_ids": [str, ...]}       -> {"renewed": [bool, ...]}; false: not open here
    GET  /healthz                                  -> {"status": "ok", "version": ..., "sessions": n, "lease_s": s}
    GET  /v1/experts                                      -> {"experts": {name: profile}}
    GET  /readyz, /metrics                                -> for load balancers and Prometheus
    GET  /v1/tools                                        -> {"tools": [OpenAI function schema, ...]}
    GET  /v1/openapi.json                                 -> all of this as an OpenAPI document

One session alone, under /v1/sessions/ID (percent-encoded), which a balancer can route by; items without session_id:

    PUT  ...             OpenSession                      -> SessionOpened
    POST .../call        Call                             -> CallResult
    POST .../call_batch  {"calls": [Call, ...]}           -> {"results": [CallResult, ...]}
    POST .../heartbeat   {}                               -> Snapshot; the lease begins anew
    POST .../snapshot    {}                               -> Snapshot
    POST .../restore     {"num_calls": n}                 -> Snapshot
    POST .../fork        {"new_session_id": ..., "num_calls": n} -> SessionOpened
    POST .../finish      {}                               -> SessionRecord
    DELETE ...                                            -> {"deleted": bool}; its calls are ended

A request bears the server's token (`Authorization: Bearer ...`), which may do everything, or the token of one session,
which may call its tools, keep its lease and finish it; but not fork it, take calls back or delete it, for its bill and
its verdict are not its own to undo. 401: a wrong token; 403: a token that may not. 429: a cap is reached, nothing was
accepted, the header Retry-After says when to try again.

With `Accept: application/x-ndjson` the answers of slow tools to POST /v1/sessions, calls, forks and finish come line by
line instead, each as soon as it is there: {"0": CallResult, "3": CallResult}, by position in the request.

All POSTs are idempotent: opening a session again or repeating a call_id returns the first answer, and
finishing twice returns the stored record, so a client may retry after any network failure. Calls whose client has gone
are ended (`cancelled`) unless it asks for them again within the server's `abandon_s`.
"""

from dataclasses import dataclass, field
from typing import Any

API_VERSION = 1
STREAM = "application/x-ndjson"
MAX_ITEMS = 512
"""Items of one request."""

FAILURES = {
    "unknown_tool": "invalid_call",
    "invalid_arguments": "invalid_call",
    "repeated_call": "invalid_call",
    "session_over": "invalid_call",
    "tool_error": "tool_error",
    "timeout": "timeout_model",
    "budget_exceeded": "budget_exceeded",
    "cancelled": "cancelled",
    "unknown_session": "infra_error",
    "env_error": "infra_error",
    "infra_error": "infra_error",
}
"""The kind of each error of a call. The model sees them all; an `infra_error` says nothing about it and never becomes a
reward: `unknown_session` and `infra_error` are worth another attempt, `env_error`, a bug of the environment, is not."""


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Start one trajectory in an environment. `session_id` is chosen by the client and unique per trajectory.

    `preference` is the user's: a weight by feature, as `rewards.py` has them. It changes nothing in the session; its
    trace and its record carry it to where rewards are made.

    Example: OpenSession("s3/train-7/0", "experts", {"model_mapping": {...}, "simulation": {...}}, seed=17)
    """

    session_id: str
    environment: str
    setup: dict[str, Any]
    seed: int = 0
    preference: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ForkSession:
    """Open `new_session_id` as `session_id` was after its first `num_calls` calls (-1: all of them).

    A snapshot is thus a number of calls. Calls keep their ids and bill.
    """

    session_id: str
    new_session_id: str
    num_calls: int = -1


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """`error` is None when the session is open; otherwise it says in one line why it was refused.

    `tools` are the OpenAI function schemas of the environment and `messages` the chat with which it starts
    (system policy, first user message); both empty where the task already carries them. `token` is good for this
    session alone. A session that nobody uses for `lease_s` is forgotten.
    """

    session_id: str
    tools: list[dict[str, Any]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    token: str = ""
    lease_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session as it is after `num_calls` calls. `state` is a digest of its world, "" where it has none."""

    session_id: str
    num_calls: int
    state: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """One call, or one message to the user (name="" and arguments {"content": text}).

    `deadline_s`: seconds from its acceptance, queues included, after which the answer is of no use: the work is ended
    and the result is `cancelled`.
    """

    session_id: str
    call_id: str
    name: str
    arguments: dict[str, Any]
    deadline_s: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class CallResult:
    """An observation with its price. A tool that fails is an observation too: `error` holds its kind.

    `error` is None or a key of `FAILURES`. `ended`: the environment takes no more calls. `cost_usd` and
    `latency_s` are billed; `work_s` and `wait_s` are the measured seconds of the tool's own work, and of its queue,
    back-off and failed attempts (0 where nothing is measured).
    """

    session_id: str
    call_id: str
    tool: str
    content: str
    cost_usd: float
    latency_s: float
    error: str | None = None
    ended: bool = False
    work_s: float = 0.0
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """The verdict on a finished trajectory. Costs in USD, latency in seconds, summed over its calls.

    With `error` set nothing was judged: the outcome of 0 is no reward. `verdict` is the verifier's account (fields of
    `verifiers.Verdict`) where one judged; `preference` is the session's.
    """

    session_id: str
    outcome: float
    cost_usd: float
    latency_s: float
    tool_counts: dict[str, int]
    error: str | None = None
    verdict: dict[str, Any] | None = None
    preference: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RewardGroup:
    """Siblings, trajectories of one task, whose rewards are relative to each other.

    `records` are theirs, with what only the client knows added to cost and latency: the orchestrator's own tokens.
    `malformed` are the session ids of those that get `invalid_reward`, because the orchestrator's text was no call.
    """

    records: list[SessionRecord]
    malformed: list[str] = field(default_factory=list)
    invalid_reward: float = 0.0


@dataclass(frozen=True, slots=True)
class Reward:
    """A trajectory's worth beside its siblings: its `components`, in [0, 1], times the preference; 0 if unsolved.

    With `valid` False the infrastructure failed: it stands outside the group, and `value` is no reward. `version` is
    of the formula, `inputs_digest` (SHA-256) of the group.
    """

    session_id: str
    value: float
    valid: bool
    components: dict[str, float]
    reason: str
    version: str
    inputs_digest: str


def to_json(record: Any) -> dict[str, Any]:
    """A wire record as a JSON object that shares its values (no deep copy: this runs once per call)."""
    return {name: getattr(record, name) for name in record.__slots__}
