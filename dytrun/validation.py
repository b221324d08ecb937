"""Plain values → a typed configuration, or everything that is wrong with them at once, a line each."""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dytrun.errors import UserError
from dytrun.guard import hub_problem

Config = TypeVar("Config", bound=BaseModel)


def validate(schema: type[Config], values: Mapping[str, Any]) -> Config:
    """Turn plain values into a typed configuration.

    Raises:
        UserError: all that is wrong at once, each problem with its dotted path.
    """
    targets = [f"{path}: {key} is refused; nothing is built from a name in a configuration" for path, key in
               _instantiation_keys(values)]  # fmt: skip
    try:
        config = schema.model_validate(values)
    except ValidationError as error:
        known = list(_leaves(schema))
        problems = [line for item in _by_path(error) for line in _problem(item, known)]
        raise UserError(*targets, *problems) from None
    if targets:
        raise UserError(*targets)
    return config


def near(name: str, known: list[str]) -> str:
    """Return `; did you mean 'x'?` for a name that is nearly one of `known`, else nothing."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def _instantiation_keys(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the keys by which Hydra would be told to call something: `_target_` and its kin."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            here = f"{path}.{key}" if path else str(key)
            if re.fullmatch(r"_\w+_", str(key)):
                yield here, str(key)
            yield from _instantiation_keys(value, here)
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            yield from _instantiation_keys(value, f"{path}[{index}]")


def _leaves(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        options = getattr(field.annotation, "__args__", (field.annotation,))
        options = [getattr(option, "__origin__", option) if hasattr(option, "__metadata__") else option
                   for option in options]  # fmt: skip
        nested = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not nested:
            yield f"{prefix}{name}"
        for option in nested:
            yield from _leaves(option, f"{prefix}{name}.")


def _by_path(error: ValidationError) -> list[dict[str, Any]]:
    """Return pydantic's findings with dotted paths; those on the members of one union are one finding."""
    found: dict[str, dict[str, Any]] = {}
    for item in error.errors():
        # pydantic puts the chosen member of a union into the path; a user never typed it.
        loc = [str(part) for part in item["loc"]]
        if loc[:1] in (["norm"], ["bench"], ["model"], ["data"]) and len(loc) > 2:
            del loc[1]
        member = r"(literal|constrained|list|int|bool|float|tuple)\b"
        path = ".".join(part for i, part in enumerate(loc) if i == 0 or not re.match(member, part))
        if path in found and item["type"] != "value_error":
            found[path]["msg"] += f", or {item['msg'][0].lower()}{item['msg'][1:]}"
        else:
            found[path or str(len(found))] = {**item, "path": path}
    return list(found.values())


def _problem(error: dict[str, Any], known: list[str]) -> Iterator[str]:
    """One line for one finding: path, value, what is allowed or nearly meant."""
    path = error["path"]
    if re.fullmatch(r".*\b_\w+_", path):
        return  # named already, as an instantiation key
    if path == "model.name" and (said := hub_problem(error["input"])):
        yield said
        return
    if error["type"] == "string_pattern_mismatch" and path.startswith("norm."):
        where = path.removesuffix(".[key]").removesuffix(f".{error['input']}")
        yield (f"{where}: {error['input']!r} is no site pattern; say a role, a class name or a glob over the dotted "
               "name, and @A-B after it for blocks A to B")  # fmt: skip
        return
    if error["type"] == "string_pattern_mismatch" and path.startswith("hydra.launcher."):
        where = path.removesuffix(".[key]")
        yield f"{where}: {error['input']!r} holds characters that no field of a batch script takes"
        return
    if error["type"] == "string_pattern_mismatch" and path.startswith("bench.shapes."):
        yield (f"bench.shapes: {error['input']!r} is no shape; say BxNxC, or BxCxHxW:channels_first or :channels_last "
               "(in quotes, because of the colon)")  # fmt: skip
        return
    if error["type"] == "extra_forbidden":
        if path in known:
            yield f"{path}: another option of this group has this key, the chosen one has not"
            return
        groups = sorted({name.partition(".")[0] for name in known})
        section = [name for name in known if name.startswith(path.rpartition(".")[0])] if "." in path else groups
        yield f"{path}: no such key{near(path, section) or near(path, known)}"
    elif path.rpartition(".")[2].isdigit():
        parent, _, place = path.rpartition(".")
        yield f"{parent}: {error['input']!r} does not fit in place {place} ({error['msg'].lower()})"
    elif error["type"] == "missing":
        yield f"{path}: a value is needed; say {path}=…"
    elif error["type"] == "value_error":
        yield from str(error["ctx"]["error"]).splitlines()
    elif error["type"] == "path_too_long":
        yield f"{path}: {error['input'][:40]}… is {error['msg']}"
    elif error["type"] == "union_tag_invalid":
        yield f"{path}.name: {error['ctx']['tag']!r} is none of {error['ctx']['expected_tags']}"
    else:
        yield f"{path}: {error['input']!r} is not allowed ({error['msg'][0].lower()}{error['msg'][1:]})"
