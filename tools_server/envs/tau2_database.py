"""tau2's databases as tables of an overlay.

A domain has a database, and a second one where the user holds tools too; each is a pydantic model. A field that is a
dict of rows, or a list of them, is a table: a session's model holds a view of it. Any other field, such as the one
device of a user, is a table of one row: a session's model holds a copy, which is compared at every commit.
"""

import copy
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from tools_server.envs.overlay import Base, Overlay, RowList, Table

ONLY = ""
"""The key of a table's one row."""


class Field(NamedTuple):
    """Where a table lies."""

    model: str
    name: str
    kind: type
    """dict, list, or object for one row."""

    @property
    def table(self) -> str:
        return f"{self.model}.{self.name}"

    @classmethod
    def of(cls, model: str, name: str, value: Any) -> "Field":
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return cls(model, name, dict)
        return cls(model, name, list if isinstance(value, list) else object)

    def rows(self, value: Any) -> Mapping[str, Any]:
        """A value of the field as a table."""
        if self.kind is dict:
            return value
        return RowList.keyed(value) if self.kind is list else {ONLY: value}


class SharedDatabases:
    """A domain's databases, frozen."""

    def __init__(self, models: Mapping[str, Any], scans_only_read: bool = False) -> None:
        """`models`: "db" and perhaps "user_db"; `scans_only_read`: as for `overlay.ScannedTable`."""
        self.models = models
        values = {Field.of(model, name, value): value for model in models for name, value in models[model]}
        self.fields = tuple(values)
        self.base = Base({field.table: field.rows(value) for field, value in values.items()}, _to_json, scans_only_read)


class Databases:
    """A session's models, whose content is an overlay's."""

    def __init__(self, shared: SharedDatabases, overlay: Overlay | None = None) -> None:
        """As `overlay` has them; None: as they are shared."""
        self._shared = shared
        self.overlay = overlay or Overlay(shared.base)
        self._views = {field: self._view(field) for field in shared.fields if field.kind is not object}
        self._rows = [field for field in shared.fields if field.kind is object]
        self.models: dict[str, Any] = {name: self._model(name) for name in shared.models}

    def load(self, name: str, model: Any) -> None:
        """Make the database `name` equal to `model`, from the next commit on."""
        for field, value in model:
            setattr(self.models[name], field, value)

    def commit(self) -> int:
        """Keep what was changed since the last commit; the position in the overlay's log."""
        for field, view in self._views.items():
            value = getattr(self.models[field.model], field.name)
            if value is not view:  # a tool has put another one in its place
                view.replace(value)
                setattr(self.models[field.model], field.name, view)
        for field in self._rows:
            self.overlay.tables[field.table][ONLY] = getattr(self.models[field.model], field.name)
        position = self.overlay.commit()
        for field in self._rows:
            row = getattr(self.models[field.model], field.name)
            if row is self.overlay.tables[field.table].peek(ONLY):  # the log has it now
                setattr(self.models[field.model], field.name, copy.deepcopy(row))
        return position

    def _view(self, field: Field) -> Any:
        table: Table[Any] = self.overlay.tables[field.table]
        return table if field.kind is dict else RowList(table)

    def _model(self, name: str) -> Any:
        views = {field.name: view for field, view in self._views.items() if field.model == name}
        rows = {field.name: self.overlay.tables[field.table][ONLY] for field in self._rows if field.model == name}
        return type(self._shared.models[name]).model_construct(**views, **rows)


def _to_json(row: Any) -> str:
    """As tau2's own hash sees it."""
    return json.dumps(row, sort_keys=True, default=_plain)


def _plain(part: Any) -> Any:
    return part.model_dump(warnings=False) if isinstance(part, BaseModel) else str(part)
