"""Overrides as people type them, `key=value`: what a value means, and what is wrong with it, before Hydra reads it.

Hydra's grammar has its own idea of commas, brackets, `=`, `~` and `$`. Here the value of a key that holds text, say a
path, a name or a sentence, is that text, character by character. Two things are not:

- A value that is wholly in quotes means what Hydra says: its content, with its escapes and interpolations. That is how
  the DAG passes text, and how an interpolation is written on the command line: `workspace='${oc.env:HOME}/toxic'`.
- `null` is none where the key may hold none, and `[a,b]` a list where it may hold a list.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

WHOLLY_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
PROFILE = "profile"  # a group of files, though the schema has it: `load` says there which was chosen
REASON = "gate.override_reason"  # was taken as it is typed before all other text was


class Override(NamedTuple):
    """`how` is "", "+", "++" or "~"; `value` is None where there is no `=`."""

    how: str
    key: str
    value: str | None

    def __str__(self) -> str:
        return f"{self.how}{self.key}" + ("" if self.value is None else f"={self.value}")


def parsed(override: str) -> Override:
    key, equals, value = override.partition("=")
    name = key.lstrip("+~")
    return Override(key.removesuffix(name), name, value if equals else None)


def as_written(override: str, schema: type[BaseModel]) -> str:
    """The override in Hydra's grammar, such that text means just its characters.

    >>> as_written("data.folder=/tmp/archive (1)", Config)
    "data.folder='/tmp/archive (1)'"
    """
    how, key, value = parsed(override)
    kinds = kinds_at(schema, key)
    if value is None or key == PROFILE or not holds_text(kinds) or WHOLLY_QUOTED.fullmatch(value):
        return override
    if value == "null" and NoneType in kinds:
        return override
    if is_list(value) and any(get_origin(kind) is list for kind in kinds):
        return override
    return f"{how}{key}={quoted(value)}"


def as_kept(override: str, schema: type[BaseModel]) -> str:
    """An override that a run has kept, in Hydra's grammar. Runs of the time when that was said of text, too, have it
    unquoted: there `${…}` is an interpolation, and a backslash an escape, for good."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    how, key, value = parsed(override)
    if key == REASON or as_written(override, schema) == override:
        return as_written(override, schema)
    try:
        meant = OverridesParser.create().parse_override(override).value()
    except HydraException:
        return as_written(override, schema)
    if not isinstance(meant, str):
        return override
    return f'{how}{key}="{value}"' if "${" in meant else f"{how}{key}={quoted(meant)}"


def quoted(text: str) -> str:
    """The text as Hydra and OmegaConf read exactly it."""
    # Hydra reads a backslash as an escape only before a quote, OmegaConf only before an interpolation.
    return "'" + re.sub(r"(\\*)('|\$\{|\Z)", lambda m: m[1] * 2 + ("\\" if m[2] else "") + m[2], text) + "'"


def is_list(value: str) -> bool:
    return value.startswith("[") and value.endswith("]")


# What the schema says of a key ----------------------------------------------------------------------------------------


def kinds_at(schema: Any, key: str) -> list:
    """What a key may hold: its type, or those of its union; nothing for a key that is not there."""
    found = [schema]
    for part in key.split("."):
        found = [kind for holder in found for kind in alternatives(held(holder, part))]
    return found


def held(holder: Any, name: str) -> Any:
    """The type of what a section, a list or a mapping holds by this name, or None."""
    if isinstance(holder, type) and issubclass(holder, BaseModel):
        return {alias(field, of): field.annotation for of, field in holder.model_fields.items()}.get(name)
    arguments = get_args(holder)
    if get_origin(holder) is list and name.isdigit():
        return arguments[0]
    if get_origin(holder) is dict and (arguments[0] is str or name in get_args(arguments[0])):
        return arguments[1]
    return None


def alias(field, name: str) -> str:
    return field.alias or name


def alternatives(kind: Any) -> list:
    if kind is None:
        return []
    if get_origin(kind) is Annotated:
        return alternatives(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [one for part in get_args(kind) for one in alternatives(part)]
    return [kind]


def holds_text(kinds: list) -> bool:
    """Whether a key holds text, or a list of texts; a word that must be one of a few is text, too."""
    some = [kind for kind in kinds if kind is not NoneType]
    return any(is_text(kind) for kind in some) or bool(some) and all(is_choice(kind) for kind in some)


def is_text(kind: Any) -> bool:
    if get_origin(kind) is list:
        return any(is_text(one) for one in alternatives(get_args(kind)[0]))
    return kind in (str, Path)


def is_choice(kind: Any) -> bool:
    return get_origin(kind) is Literal and all(isinstance(word, str) for word in get_args(kind))


def keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """All keys that the schema names, sections too: training, training.lora, training.lora.r …"""
    for name, field in schema.model_fields.items():
        key = f"{prefix}{alias(field, name)}"
        yield key
        for kind in alternatives(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys(kind, f"{key}.")
            elif get_origin(kind) is list and isinstance(get_args(kind)[0], type):
                if issubclass(get_args(kind)[0], BaseModel):
                    yield from keys(get_args(kind)[0], f"{key}.0.")


# What is wrong with one -----------------------------------------------------------------------------------------------


def problem(override: str, schema: type[BaseModel], groups: dict[str, list[str]]) -> str | None:
    """What is wrong with an override in Hydra's grammar that can be said of it alone, or None.

    Args:
        groups: the groups of files, and the names in each.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    how, key, value = parsed(override)
    if not is_unicode(override):
        return f"{override!r} is not UTF-8"
    if not key or value is None and how != "~":
        return f"{override} is not key=value; a sentence or a path with spaces stands in the shell's quotes"
    if value is not None and key in groups:
        chosen = value.strip("'\"")
        if chosen not in groups[key]:
            there = f"only {', '.join(groups[key])}" if groups[key] else "nor any other"
            return f"{key}={chosen}: {key}/{chosen}.yaml is not there, {there}{perhaps(chosen, groups[key])}"
    elif re.fullmatch(r"[\w.-]*", key) and not key.startswith("hydra.") and key not in groups:
        if not kinds_at(schema, key):
            return f"{key} is no key{perhaps_key(key, [*groups, *keys(schema)])}"
    elif key.strip() != key:
        return f"{key!r} is no key{perhaps_key(key.strip(), [*groups, *keys(schema)])}"
    try:
        found = OverridesParser.create().parse_override(override)
    except HydraException as error:
        return f"{override}: {' '.join(str(error).split()) or 'it cannot be read'}"
    if found.is_sweep_override():
        return f"{override} is several values: a list stands in brackets, key=[a,b]"
    return None


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def perhaps_key(key: str, known: Iterable[str]) -> str:
    """The keys that were perhaps meant: of the same last name in another section, or written almost alike."""
    known = list(dict.fromkeys(known))
    place = re.search(r"\.\d+(?=\.)", key)  # in a list: the schema knows the keys of its first
    key = re.sub(r"\.\d+(?=\.)", ".0", key)
    last = {other: other.rpartition(".")[2] for other in known}
    name = key.rpartition(".")[2]
    alike = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    same_name = [other for other in known if last[other] == name]
    near_name = [other for other in known if difflib.get_close_matches(name, [last[other]], cutoff=0.75)]
    parts = [other for other in known if name and set(name.split("_")) < set(last[other].split("_"))]
    by_name = (alike, same_name) if "." in key else (same_name, alike)
    meant = next((found for found in (*by_name, near_name, parts) if found), [])[:2]
    return or_else([other.replace(".0.", f"{place[0]}.") if place else other for other in meant])


def perhaps(word: str, known: Iterable[str]) -> str:
    """ "; train?" where one of the known words is written almost like this one."""
    return or_else(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5))


def or_else(words: list[str]) -> str:
    return f"; {' or '.join(words)}?" if words else ""
