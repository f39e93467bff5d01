"""YAML and dotted overrides -> a frozen config, and the resolved config -> YAML.

Owns every message about a wrong config: one `ValueError` line with the place (`file:line` or `command line`),
the full dotted key, what was got and what is allowed. Stands between the command line and the models of
`config.py`; needs no jax.
"""

import difflib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from jorch.config_help import fields

ConfigT = TypeVar("ConfigT", bound=BaseModel)
Loc = tuple[str | int, ...]
"""A path of keys, e.g. ("rl", "group_size"); an integer is an index into a list."""
Places = dict[Loc, str]
"""Where each key was written: "configs/rl.yaml:14" or "command line"."""

COMMAND_LINE = "command line"


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: `1e-6` is a number, `on` and `2026-01-01` are text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own hook)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would otherwise not read as text."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def load(path: str | Path, model: type[ConfigT], overrides: Sequence[str] = ()) -> ConfigT:
    """The config in the YAML file `path`, changed by `overrides` such as "rl.group_size=8"; later ones win.

    Raises ValueError, one line, for whatever is wrong with the file, a key, a value or an override.
    """
    places: Places = {(): str(path)}
    data = _read_file(path, places)
    for override in overrides:
        _apply(override, data, places)
    try:
        # Through JSON, because strict validation takes a list for a tuple only there.
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise ValueError(_first_error(error, model, places)) from None


def dump(config: BaseModel) -> str:
    """YAML text from which `load` makes the same config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=110)


def configs_dir() -> Path:
    """The folder of YAML files that ships with jorch; in a checkout, its top-level `configs`."""
    return (Path(__file__).parent / "configs").resolve()


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The plain content of a YAML file. Raises ValueError, one line, where it cannot be read."""
    return _read_file(path, {})


def _read_file(path: str | Path, places: Places) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    data = _Reader(text, lambda line: f"{path}:{line}", places).read(())
    if not isinstance(data, dict | None):
        raise ValueError(f"{path}:1: got {_got(data)}; a config is a mapping of keys to values")
    return data or {}


def _apply(override: str, data: dict[str, Any], places: Places) -> None:
    """Set one dotted key; a value that stands where a section must be gives way to one."""
    key, equals, text = override.partition("=")
    *sections, last = key.split(".")
    if not equals or not all((*sections, last)):
        raise ValueError(f"{COMMAND_LINE}: got '{override}'; an override is written key=value, e.g. seed=1")
    target = data
    for depth, name in enumerate(sections, start=1):
        if not isinstance(target.get(name), dict):
            target[name] = {}
            places[tuple(sections[:depth])] = COMMAND_LINE
        target = target[name]
    loc: Loc = (*sections, last)
    target[last] = _Reader(text, lambda _: COMMAND_LINE, places).read(loc)
    places[loc] = COMMAND_LINE


class _Reader:
    """One YAML document as plain data; notes in `places` where each key was written."""

    def __init__(self, text: str, place_of_line: Callable[[int], str], places: Places) -> None:
        self.text, self.place_of_line, self.places = text, place_of_line, places
        self.seen: set[int] = set()

    def read(self, root: Loc) -> Any:
        """`root` is the key whose value the document is. Raises ValueError, one line."""
        about = f"bad YAML in '{_dotted(root)}'" if root else "bad YAML"
        try:
            loader = _Loader(self.text)
            node = loader.get_single_node()
            return None if node is None else self._plain(node, loader, root)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = "; ".join(part for part in (error.problem, error.context) if part)
            raise ValueError(f"{self._place(mark)}: {about}: {problem}") from None
        except yaml.reader.ReaderError as error:
            place = self.place_of_line(self.text.count("\n", 0, error.position) + 1)
            raise ValueError(f"{place}: {about}: a control character") from None

    def _place(self, mark: yaml.Mark | None) -> str:
        return self.place_of_line(mark.line + 1 if mark else 1)

    def _plain(self, node: yaml.Node, loader: _Loader, loc: Loc) -> Any:
        if id(node) in self.seen:
            raise ValueError(f"{self._place(node.start_mark)}: '{_dotted(loc)}' is an alias; write it out")
        self.seen.add(id(node))
        match node:
            case yaml.MappingNode():
                return self._mapping(node, loader, loc)
            case yaml.SequenceNode():
                return [self._plain(child, loader, (*loc, i)) for i, child in enumerate(node.value)]
        if node.tag.rpartition(":")[2] not in ("null", "bool", "int", "float", "str"):
            raise ValueError(f"{self._place(node.start_mark)}: '{_dotted(loc)}' has the tag {node.tag}; leave it out")
        return loader.construct_object(node)

    def _mapping(self, node: yaml.MappingNode, loader: _Loader, loc: Loc) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, child in node.value:
            place, key = self._place(key_node.start_mark), key_node.value
            child_loc = (*loc, key)
            if not isinstance(key, str):
                raise ValueError(f"{place}: a key in '{_dotted(loc)}' is not a plain word")
            if key in mapping:
                first = self.places[child_loc]
                raise ValueError(f"{place}: key '{_dotted(child_loc)}' is set twice; first at {first}")
            self.places[child_loc] = place
            mapping[key] = self._plain(child, loader, child_loc)
        return mapping


_ORDER = {"extra_forbidden": 0, "value_error": 2, "missing": 3}
"""What to report first: a misspelt key also makes one missing, so the missing one is no news."""


def _first_error(error: ValidationError, model: type[BaseModel], places: Places) -> str:
    found = sorted(error.errors(include_url=False), key=lambda item: _ORDER.get(item["type"], 1))
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    first, loc = found[0], found[0]["loc"]
    key, place, message = _dotted(loc), _written_at(loc, places), first["msg"]
    field = dict(fields(model)).get(key)
    about = field.description if field is not None and field.description else ""
    match first["type"]:
        case "extra_forbidden":
            text = f"unknown key '{key}'; {_suggestion(loc, model)}"
        case "missing":
            text = f"missing key '{key}'" + (f" ({about})" if about else "")
        case "none_required":  # may hold a secret: never print the value
            text = f"'{key}' must stay unset: {about}"
        case "value_error":
            message = message.removeprefix("Value error, ")
            place = _blamed_place(loc, message, places)
            text = f"section '{key}': {message}" if key else message
        case _:
            allowed = message.replace("Input should be", "must be").replace("an object", "a section of keys")
            text = f"'{key}' is {_got(first['input'])}; {allowed}"
    return f"{place}: {text}{more}"


def _written_at(loc: Loc, places: Places) -> str:
    """Where `loc`, or else the innermost section around it, was written."""
    return next(places[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in places)


def _blamed_place(loc: Loc, message: str, places: Places) -> str:
    """Where a key that a cross-field message names was written, the command line first."""
    words = [tuple(word.split(".")) for word in re.findall(r"[a-z_][a-z0-9_.]*[a-z0-9_]", message)]
    known = [places[key] for word in words for key in (word, (*loc, *word)) if key in places]
    return COMMAND_LINE if COMMAND_LINE in known else next(iter(known), _written_at(loc, places))


def _suggestion(loc: Loc, model: type[BaseModel]) -> str:
    known = [key for key, _ in fields(model)]
    elsewhere = [key for key in known if key.split(".")[-1] == loc[-1]]
    close = difflib.get_close_matches(_dotted(loc), known, n=1, cutoff=0.75) or elsewhere[:1]
    if close:
        return f"did you mean '{close[0]}'?"
    section = _dotted(loc[:-1])
    siblings = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section]
    return f"allowed {f'in {section!r}' if section else 'here'}: {', '.join(siblings)}"


def _got(value: Any) -> str:
    match value:
        case dict():
            return "a section of keys"
        case list():
            return "a list"
        case str():
            return f"the text {value[:60]!r}"
    return json.dumps(value)


def _dotted(loc: Loc) -> str:
    return ".".join(map(str, loc))
