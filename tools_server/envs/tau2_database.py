"""tau2's databases as tables of an overlay.

A domain has a database, and a second one where the user holds tools too; each is a pydantic model. A field that is a
dict of rows, or a list of them, is a table: a session's model holds a view of it. Any other field, such as the one
device of a user, is a table of one row: a session's model holds a copy, which is compared at every commit.
"""

import copy
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from tools_server.envs.overlay import Base, Overlay, RowList, Table

ONLY = ""
"""The key of a table's one row."""


def frozen(models: Mapping[str, Any], scans_only_read: bool = False) -> Base:
    """The tables of a domain's databases, "db" and "user_db"; `scans_only_read`: as for `overlay.ScannedTable`."""
    tables = {f"{name}.{field}": _rows(value) for name, model in models.items() for field, value in model}
    return Base(tables, _to_json, scans_only_read)


class Databases:
    """A session's models, whose content is an overlay's."""

    def __init__(self, pristine: Mapping[str, Any], overlay: Overlay) -> None:
        """`pristine`: the models of which the overlay's base was made."""
        self.overlay = overlay
        self._views: dict[tuple[str, str], Table[Any] | RowList[Any] | None] = {
            (name, field): self._view(f"{name}.{field}", value)
            for name, model in pristine.items()
            for field, value in model
        }
        """None: a field that is one row."""
        self.models = {name: self._model(name, type(model)) for name, model in pristine.items()}

    def load(self, name: str, model: Any) -> None:
        """Make the database `name` equal to `model`, from the next commit on."""
        for field, value in model:
            setattr(self.models[name], field, value)

    def commit(self) -> int:
        """Keep what was changed since the last commit; the position in the overlay's log."""
        for (name, field), view in self._views.items():
            model = self.models[name]
            value = getattr(model, field)
            if view is None:
                self.overlay.tables[f"{name}.{field}"][ONLY] = value
            elif value is not view:  # a tool has put another one in its place
                view.replace(value)
                setattr(model, field, view)
        position = self.overlay.commit()
        for (name, field), view in self._views.items():
            row = self.overlay.tables[f"{name}.{field}"].peek(ONLY) if view is None else None
            if row is not None and row is getattr(self.models[name], field):  # the log has it now
                setattr(self.models[name], field, copy.deepcopy(row))
        return position

    def _view(self, table: str, value: Any) -> Table[Any] | RowList[Any] | None:
        rows = self.overlay.tables[table]
        if _is_table(value):
            return rows
        return RowList(rows) if isinstance(value, list) else None

    def _model(self, name: str, model_class: Any) -> Any:
        views = {field: view for (database, field), view in self._views.items() if database == name}
        return model_class.model_construct(
            **{
                field: self.overlay.tables[f"{name}.{field}"][ONLY] if view is None else view
                for field, view in views.items()
            }
        )


def _rows(value: Any) -> Mapping[str, Any]:
    if _is_table(value):
        return value
    return RowList.keyed(value) if isinstance(value, list) else {ONLY: value}


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _to_json(row: Any) -> str:
    """As tau2's own hash sees it."""
    return json.dumps(row, sort_keys=True, default=_plain)


def _plain(part: Any) -> Any:
    return part.model_dump(warnings=False) if isinstance(part, BaseModel) else str(part)
