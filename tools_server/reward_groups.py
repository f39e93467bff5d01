"""`POST /v1/rewards`: the records of siblings in, a reward for each out. So any replica answers."""

import hashlib
import json
import math
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tools_server.errors import BadRequest, Conflict
from tools_server.rewards import group_features, group_rewards
from tools_server.wire import FAILURES, Reward, RewardGroup, SessionRecord

VERSION = "group-1"
MOST_WEIGHT = 1e6
"""Of a feature in a preference; the paper's are in [0, 1]."""
_GROUP = TypeAdapter(RewardGroup)


def to_group(item: Any, where: str) -> RewardGroup:
    """`item` as a group that can be scored. Raises BadRequest, and Conflict where its parts do not go together."""
    fields = RewardGroup.__slots__
    if not isinstance(item, dict) or not item.keys() <= set(fields):
        raise BadRequest(f"{where}: expected an object with the fields {', '.join(fields)}")
    try:
        group = _GROUP.validate_python(item)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRequest(f"{where}.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if not group.records:
        raise BadRequest(f"{where}.records: expected one or more")
    if not math.isfinite(group.invalid_reward):
        raise BadRequest(f"{where}.invalid_reward: expected a finite number")
    for i, record in enumerate(group.records):
        if mistake := preference_mistake(record.preference) or _impossible(record):
            raise BadRequest(f"{where}.records[{i}].{mistake}")
    if mistake := _contradiction(group):
        raise Conflict(f"{where}.{mistake}")
    return group


def _contradiction(group: RewardGroup) -> str | None:
    names = [record.session_id for record in group.records]
    if len(set(names)) != len(names):
        return "records: expected each of another session"
    if strangers := sorted(set(group.malformed) - set(names)):
        return f"malformed: {strangers[0]!r} is none of the records' sessions"
    for i, record in enumerate(group.records):
        if record.preference != group.records[0].preference:
            return f"records[{i}].preference: siblings have one preference, this is not that of records[0]"
    return None


def _impossible(record: SessionRecord) -> str | None:
    if not 0.0 <= record.outcome <= 1.0:
        return "outcome: expected a number from 0 to 1"
    for name, value in (("cost_usd", record.cost_usd), ("latency_s", record.latency_s)):
        if not 0.0 <= value < math.inf:
            return f"{name}: expected a finite number of at least 0"
    if any(count < 0 for count in record.tool_counts.values()):
        return "tool_counts: expected numbers of calls"
    return None


def preference_mistake(preference: dict[str, Any]) -> str | None:
    """What is wrong with an OpenSession's preference, or None."""
    for name, weight in preference.items():
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not abs(weight) <= MOST_WEIGHT:
            return f"preference.{name[:40]}: expected a number from -{MOST_WEIGHT:g} to {MOST_WEIGHT:g}"
    return None


def scored(group: RewardGroup) -> list[Reward]:
    """The rewards of a group's records, in their order. What the infrastructure lost counts in no statistic."""
    digest = hashlib.sha256(json.dumps(_GROUP.dump_python(group), sort_keys=True).encode()).hexdigest()
    present = [record for record in group.records if FAILURES.get(record.error or "") != "infra_error"]
    outcomes, costs_usd, latencies_s, tool_counts = (
        [getattr(record, name) for record in present] for name in ("outcome", "cost_usd", "latency_s", "tool_counts")
    )
    preference = group.records[0].preference
    features = group_features(outcomes, costs_usd, latencies_s, tool_counts, preference)
    well_formed = [record.session_id not in group.malformed for record in present]
    values = group_rewards(outcomes, costs_usd, latencies_s, tool_counts, well_formed, preference, group.invalid_reward)
    found = {record.session_id: of for record, of in zip(present, zip(values, features, strict=True), strict=True)}

    def reward(record: SessionRecord) -> Reward:
        name = record.session_id
        value, components = found.get(name, (0.0, {}))
        return Reward(name, value, name in found, components, _reason(record, group), VERSION, digest)

    return [reward(record) for record in group.records]


def _reason(record: SessionRecord, group: RewardGroup) -> str:
    if FAILURES.get(record.error or "") == "infra_error":
        return f"left out: {record.error}"
    if record.session_id in group.malformed:
        return "malformed"
    return "solved" if record.outcome >= 1 else "not solved"
