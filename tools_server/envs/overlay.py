"""Many databases that share one: a frozen base of tables, and for each session only the rows that it changed.

A row is copied when it is handed out, for whoever has it may change it. `commit` keeps what did change and notes what
was there before, so that a position in that log is a snapshot. The hash of the whole is the sum of its rows' digests
modulo 2**256, so that a changed row costs two digests, whatever the size of the database. It tells databases apart that
nobody has crafted to collide.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any, NamedTuple, Self, TypeVar

Row = TypeVar("Row")
ABSENT: Any = object()
"""In a row's place: there is none."""
MODULUS = 1 << 256


class Base:
    """The frozen tables, with a digest of each row."""

    def __init__(
        self, tables: Mapping[str, Mapping[str, Any]], to_text: Callable[[Any], str], scans_only_read: bool = False
    ) -> None:
        """`to_text`: all that there is to a row; `scans_only_read`: as for `ScannedTable`."""
        self.tables = tables
        self.table_class: type[Table[Any]] = ScannedTable if scans_only_read else Table
        self._to_text = to_text
        self.digests = {
            table: {key: self.digest(table, key, row) for key, row in rows.items()} for table, rows in tables.items()
        }
        self.hash = sum(sum(digests.values()) for digests in self.digests.values()) % MODULUS

    def digest(self, table: str, key: str, row: Any) -> int:
        """Of one row in its place; 0 where there is none."""
        if row is ABSENT:
            return 0
        parts = (table, key, self._to_text(row))
        framed = b"".join(len(part.encode()).to_bytes(8, "big") + part.encode() for part in parts)
        return int.from_bytes(hashlib.blake2b(framed, digest_size=32).digest(), "big")


class Table(MutableMapping[str, Row]):
    """One table as its session sees it; behaves like the dict that it stands for.

    In one thing it does not: a row of the base that was deleted and is set again comes back in its old place.
    """

    __slots__ = ("base", "changed", "fetched")

    def __init__(self, rows: Mapping[str, Row]) -> None:
        self.base = rows
        self.changed: dict[str, Any] = {}
        """Committed rows that differ from the base's; not changed in place any more."""
        self.fetched: dict[str, Any] = {}
        """Copies given out, and rows set or deleted, since the last commit."""

    def peek(self, key: str) -> Any:
        """The row as it is now, to be read only; ABSENT where there is none."""
        return self.fetched[key] if key in self.fetched else self.committed(key)

    def committed(self, key: str) -> Any:
        return self.changed[key] if key in self.changed else self.base.get(key, ABSENT)

    def __getitem__(self, key: str) -> Row:
        row = self.peek(key)
        if row is ABSENT:
            raise KeyError(key)
        if key not in self.fetched:
            row = self.fetched[key] = copy.deepcopy(row)
        return row

    def __setitem__(self, key: str, row: Row) -> None:
        self.fetched[key] = row

    def __delitem__(self, key: str) -> None:
        if self.peek(key) is ABSENT:
            raise KeyError(key)
        self.fetched[key] = ABSENT

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.peek(key) is not ABSENT

    def __iter__(self) -> Iterator[str]:
        added = dict.fromkeys(key for rows in (self.changed, self.fetched) for key in rows if key not in self.base)
        return (key for keys in (self.base, added) for key in keys if self.peek(key) is not ABSENT)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def replace(self, rows: Mapping[str, Row]) -> None:
        """Hold these rows and no others."""
        for key in [key for key in self if key not in rows]:
            del self[key]
        self.update(rows)


class ScannedTable(Table[Row]):
    """A table whose rows are changed only after a fetch by their key: those that a scan meets are the shared ones."""

    __slots__ = ()

    def values(self) -> Any:
        """To be read only."""
        return [self.peek(key) for key in self]

    def items(self) -> Any:
        """To be read only."""
        return [(key, self.peek(key)) for key in self]


class RowList(MutableSequence[Row]):
    """A table whose keys are positions, "0" to "n-1"; behaves like the list that it stands for."""

    __slots__ = ("_table",)

    def __init__(self, table: Table[Row]) -> None:
        self._table = table

    @staticmethod
    def keyed(rows: Iterable[Row]) -> dict[str, Row]:
        """A list as such a table."""
        return {str(position): row for position, row in enumerate(rows)}

    def replace(self, rows: Iterable[Row]) -> None:
        """Hold these rows and no others."""
        self._table.replace(self.keyed(rows))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        key = str(index if index >= 0 else len(self) + index)
        if key not in self._table:
            raise IndexError("list index out of range")
        return self._table[key]

    def __setitem__(self, index: Any, value: Any) -> None:
        rows = list(self)
        rows[index] = value
        self.replace(rows)

    def __delitem__(self, index: Any) -> None:
        rows = list(self)
        del rows[index]
        self.replace(rows)

    def insert(self, index: int, value: Row) -> None:
        rows = list(self)
        rows.insert(index, value)
        self.replace(rows)

    def sort(self, *, key: Callable[[Row], Any] | None = None, reverse: bool = False) -> None:
        rows: list[Any] = list(self)
        rows.sort(key=key, reverse=reverse)
        self.replace(rows)

    def copy(self) -> list[Row]:
        return list(self)

    def __add__(self, others: Iterable[Row]) -> list[Row]:
        return [*self, *others]

    def __radd__(self, others: Iterable[Row]) -> list[Row]:
        return [*others, *self]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list | RowList) and list(self) == list(other)


class Change(NamedTuple):
    """What one commit replaced."""

    table: str
    key: str
    row: Any
    """As it was before."""
    digest: int


class Overlay:
    """One session's database."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self.tables: dict[str, Table[Any]] = {name: base.table_class(rows) for name, rows in base.tables.items()}
        self._digests: dict[tuple[str, str], int] = {}
        """Of changed rows."""
        self._log: list[Change] = []
        self._hash = base.hash

    def commit(self) -> int:
        """Make what was changed since the last commit part of the database; the position in the log, a snapshot."""
        for name, table in self.tables.items():
            for key, row in table.fetched.items():
                before, after = self._digest(name, key), self._base.digest(name, key, row)
                if before != after:
                    self._log.append(Change(name, key, table.committed(key), before))
                    self._set(name, key, row, before, after)
            table.fetched.clear()
        return len(self._log)

    def hash(self) -> int:
        """Of all rows of all tables, as committed."""
        return self._hash

    def full_hash(self) -> int:
        """The same, computed from the rows alone."""
        rows = ((name, key, table.committed(key)) for name, table in self.tables.items() for key in table)
        return sum(self._base.digest(*row) for row in rows) % MODULUS

    def branch(self, position: int) -> Self:
        """A database of its own, as this one was at `position`. Rows are shared, for none is changed in place."""
        branched = type(self)(self._base)
        for name, table in self.tables.items():
            branched.tables[name].changed = dict(table.changed)
        branched._digests, branched._log, branched._hash = dict(self._digests), list(self._log), self._hash
        branched._undo(position)
        return branched

    def _undo(self, position: int) -> None:
        while len(self._log) > position:
            change = self._log.pop()
            self._set(change.table, change.key, change.row, self._digest(change.table, change.key), change.digest)

    def _digest(self, table: str, key: str) -> int:
        """Of the committed row."""
        changed = self._digests.get((table, key))
        return self._base.digests[table].get(key, 0) if changed is None else changed

    def _set(self, table: str, key: str, row: Any, before: int, after: int) -> None:
        rows = self.tables[table]
        if after == self._base.digests[table].get(key, 0):
            rows.changed.pop(key, None)
            self._digests.pop((table, key), None)
        else:
            rows.changed[key] = row
            self._digests[table, key] = after
        self._hash = (self._hash + after - before) % MODULUS
