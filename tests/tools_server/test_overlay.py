"""Overlays against deep copies of plain dicts: the same content, snapshots, forks, and a hash that tells them apart."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools_server.envs.overlay import Base, Overlay, RowList

KEYS = st.sampled_from(["a", "b", "c", "d"])
TABLES = {"users": {"a": {"n": [1]}, "b": {"n": [2]}}, "orders": {"a": {"n": [1]}, "c": {"n": []}}}
EDITS = st.one_of(
    st.tuples(st.just("append"), st.sampled_from(list(TABLES)), KEYS, st.integers(0, 2)),
    st.tuples(st.just("remove"), st.sampled_from(list(TABLES)), KEYS, st.just(0)),
    st.tuples(st.just("set"), st.sampled_from(list(TABLES)), KEYS, st.integers(0, 2)),
    st.tuples(st.just("delete"), st.sampled_from(list(TABLES)), KEYS, st.just(0)),
    st.tuples(st.just("read"), st.sampled_from(list(TABLES)), KEYS, st.just(0)),
    st.tuples(st.just("scan"), st.sampled_from(list(TABLES)), KEYS, st.integers(0, 2)),
    st.tuples(st.just("replace"), st.sampled_from(list(TABLES)), KEYS, st.integers(0, 2)),
    st.tuples(st.just("commit"), st.just("users"), st.just("a"), st.just(0)),
)


LIST_EDITS = (
    "append",
    "insert",
    "set",
    "slice",
    "delete",
    "pop",
    "remove",
    "edit",
    "extend",
    "reverse",
    "sort",
    "read",
)


def make_base(scans_only_read=False):
    return Base(copy.deepcopy(TABLES), lambda row: json.dumps(row, sort_keys=True), scans_only_read)


def apply(tables, edit, table, key, number):
    """An edit on dicts or on overlay tables alike; what the editor sees."""
    rows = tables[table]
    match edit:
        case "append" if key in rows:
            rows[key]["n"].append(number)
        case "remove" if key in rows and rows[key]["n"]:
            rows[key]["n"].pop()
        case "set":
            rows[key] = {"n": [number]}
        case "delete" if key in rows:
            del rows[key]
        case "read":
            return copy.deepcopy(rows.get(key))
        case "scan":
            for row in rows.values():
                row["n"].append(number)
        case "replace":
            kept = {key: {"n": [number]}} | {other: row for other, row in rows.items() if row["n"]}
            rows.clear()
            rows.update(kept)
    return len(rows), copy.deepcopy(sorted(rows.items())), sorted(rows), [row["n"] for row in rows.values()] != []


def content(overlay):
    return {name: {key: table.committed(key) for key in table} for name, table in overlay.tables.items()}


@settings(max_examples=200, deadline=None)
@given(st.lists(EDITS, max_size=25), st.data(), st.booleans())
def test_an_overlay_is_a_copy(edits, data, scans_only_read):
    if scans_only_read:
        edits = [edit for edit in edits if edit[0] not in ("scan", "replace")]
    base = make_base(scans_only_read)
    overlay, oracle = Overlay(base), copy.deepcopy(TABLES)
    snapshots = [(overlay.commit(), copy.deepcopy(oracle))]
    for edit in edits:
        assert apply(overlay.tables, *edit) == apply(oracle, *edit)
        if edit[0] == "commit":
            snapshots.append((overlay.commit(), copy.deepcopy(oracle)))
            assert content(overlay) == oracle
            assert overlay.hash() == overlay.full_hash()
    snapshots.append((overlay.commit(), copy.deepcopy(oracle)))
    hashes = []
    for position, expected in snapshots:
        branch = overlay.branch(position)
        assert content(branch) == expected
        assert branch.hash() == branch.full_hash()
        hashes.append((branch.hash(), expected))
    for found, tables in hashes:
        assert all((found == other) == (tables == others) for other, others in hashes)
    branch = overlay.branch(data.draw(st.sampled_from(snapshots))[0])
    for edit in reversed(edits):
        apply(branch.tables, *edit)
    branch.commit()
    assert branch.hash() == branch.full_hash()
    assert content(overlay) == oracle  # a branch's edits are its own
    assert base.tables == TABLES


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(LIST_EDITS), st.integers(-4, 4), st.integers(0, 9)), max_size=12), st.data())
def test_a_table_of_positions_is_a_list(edits, data):
    oracle = [{"n": number} for number in data.draw(st.lists(st.integers(0, 9), max_size=4))]
    overlay = Overlay(Base({"rows": RowList.keyed(copy.deepcopy(oracle))}, json.dumps))
    rows = RowList(overlay.tables["rows"])
    for name, index, number in edits:
        outcomes = []
        for found in (rows, oracle):
            try:
                outcomes.append(edit_list(found, name, index, number))
            except (IndexError, ValueError) as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1]
        assert rows == oracle == list(rows)
        overlay.commit()
        assert overlay.hash() == Overlay(Base({"rows": RowList.keyed(oracle)}, json.dumps)).hash()


def edit_list(rows, name, index, number):
    """An edit on lists, or on what stands for one; what the editor sees."""
    row = {"n": number}
    match name:
        case "append":
            rows.append(row)
        case "insert":
            rows.insert(index, row)
        case "set":
            rows[index] = row
        case "slice":
            rows[index:number] = [row, dict(row)]
        case "delete":
            del rows[index]
        case "pop":
            return rows.pop(index)
        case "remove":
            rows.remove(row)
        case "edit":
            rows[index]["n"] = number
        case "extend":
            rows += [row]
        case "reverse":
            rows.reverse()
        case "sort":
            rows.sort(key=lambda row: row["n"], reverse=index > 0)
    return len(rows), rows.count(row), row in rows, copy.deepcopy(rows[index:]), rows.copy() + rows


def test_only_changed_rows_are_kept():
    overlay = Overlay(make_base())
    users = overlay.tables["users"]
    users["a"]["n"].append(7)
    users["b"]
    assert overlay.commit() == 1
    assert users.changed == {"a": {"n": [1, 7]}}
    users["a"]["n"].pop()
    assert overlay.commit() == 2
    assert users.changed == {}
    assert overlay.hash() == Overlay(make_base()).hash()


def test_what_is_not_there():
    users = Overlay(make_base()).tables["users"]
    for key in ("c", "nobody"):
        with pytest.raises(KeyError):
            users[key]
        with pytest.raises(KeyError):
            del users[key]
        assert users.get(key) is None
        assert key not in users
    assert 3 not in users
