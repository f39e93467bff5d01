"""The keys of a config model as text: what `--help` prints below the options. Needs no jax."""

import json
import textwrap
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its full dotted name, sections included, in the order of the model."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        each = ".NAME" if get_origin(field.annotation) is dict else ""
        section = section_of(field)
        if section is not None:
            yield from fields(section, f"{prefix}{name}{each}.")
        for kind, variant in variants_of(field).items():
            yield from fields(variant, f"{prefix}{name}{each}[{kind}].")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model behind `Model`, `Model | None` or `dict[str, Model]`; None for a plain key."""
    options = get_args(field.annotation) or (field.annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def variants_of(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """The models of a `dict[str, A | B]` by the value of the key `kind` that chooses one; of a plain key none."""
    value = get_args(field.annotation)[-1:] if get_origin(field.annotation) is dict else ()
    options = [option for part in value if hasattr(part, "__metadata__") for option in get_args(part.__origin__)]
    return {get_args(option.model_fields["kind"].annotation)[0]: option for option in options}


def about(field: FieldInfo) -> str:
    """A field's description; of a section without one, the first paragraph of its model's docstring."""
    section = section_of(field)
    fallback = (section.__doc__ or "").split("\n\n")[0] if section else ""
    return " ".join((field.description or fallback).split())


def describe(model: type[BaseModel], width: int) -> str:
    """All keys with type, default and description, wrapped at `width` columns."""
    lines, last = [], ""
    for key, field in fields(model):
        section = key if section_of(field) or variants_of(field) else key.rpartition(".")[0]
        if section != last and lines:
            lines.append("")
        if section == key:
            lines.append(f"  {key}:")
        else:
            default = "(required)" if field.is_required() else f"= {_value_text(field.default)}"
            lines.append(f"  {key}  {_type_text(field)}  {default}")
        last = section
        indent = " " * 6
        lines += textwrap.wrap(about(field), width, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


def _value_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _type_text(field: FieldInfo) -> str:
    nested = [getattr(option, "__metadata__", ()) for option in get_args(field.annotation)]
    limits = [
        f"{sign} {getattr(item, name):g}"
        for item in [*field.metadata, *(item for items in nested for item in items)]
        for name, sign in _SIGNS.items()
        if getattr(item, name, None) is not None
    ]
    return " ".join([_annotation_text(field.annotation), ", ".join(limits)]).rstrip()


def _annotation_text(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _annotation_text(annotation.__origin__)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (types.UnionType, Union):
        return " or ".join(_annotation_text(arg) for arg in args)
    if origin is dict:
        return f"NAME: {_annotation_text(args[1])}"
    if origin is tuple:
        return f"list of {_annotation_text(args[0])}"
    return {types.NoneType: "null", None: "null", str: "text"}.get(annotation) or annotation.__name__
