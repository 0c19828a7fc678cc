"""YAML files that hold a dataclass: read strictly, merged by OmegaConf, refused with the nearest valid key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import yaml

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_Schema = TypeVar("_Schema")


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is given twice; YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        ConfigError: it is not YAML, gives a key twice, or holds something else; the message begins with the path.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)  # noqa: S506 (derives from SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"{path}: the top level must map keys to values")
    return tree


def to_dataclass(tree: DictConfig | dict[str, Any], schema: type[_Schema]) -> _Schema:
    """Return the values of a tree as a `schema`, its interpolations resolved.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, nan or inf; with the dotted path.
    """
    from omegaconf import DictConfig, OmegaConf  # a tenth of a second that reading alone does not need
    from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

    config = tree if isinstance(tree, DictConfig) else OmegaConf.create(tree)
    _check_keys(OmegaConf.to_container(config), schema, "")
    try:
        result = cast(_Schema, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), config)))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: a value is required") from None
    except ConfigKeyError as error:
        raise ConfigError(f"{error.full_key}: unknown key") from None
    except OmegaConfBaseException as error:
        reason = (str(error.msg or error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{error.full_key or 'configuration'}: {reason}") from None
    except ConfigError:
        raise
    except ValueError as error:  # of a section that lives in another room
        raise ConfigError(str(error)) from None
    _check_finite(dataclasses.asdict(cast(Any, result)), "")
    return result


def nearest(word: str, choices: Iterable[str], prefix: str = "") -> str:
    """Return ` (did you mean 'X'?)` for the choice that is most like `word`, an empty text if none is."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {prefix + close[0]!r}?)" if close else ""


def _check_finite(value: object, path: str) -> None:
    """Refuse nan and inf, which pass every comparison that a section's own checks make."""
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_finite(entry, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            _check_finite(entry, f"{path}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: {value} is not a finite number")


def _check_keys(tree: object, schema: type, prefix: str) -> None:
    """Refuse unknown keys with the nearest valid one, which the library's own message does not give."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix.rstrip('.')}: {tree!r} is not a section of keys and values")
    hints = typing.get_type_hints(schema)
    for key, value in tree.items():
        if key not in hints:
            raise ConfigError(
                f"{prefix}{key}: unknown key{nearest(str(key), hints, prefix)}; valid: {', '.join(hints)}"
            )
        _check_nested(value, hints[key], f"{prefix}{key}")
    for item in dataclasses.fields(schema):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in tree:
            raise ConfigError(f"{prefix}{item.name}: a value is required")


def _check_nested(value: object, hint: Any, path: str) -> None:
    if isinstance(hint, types.UnionType):  # X | None
        if value is not None:
            _check_nested(value, typing.get_args(hint)[0], path)
    elif dataclasses.is_dataclass(hint):
        _check_keys(value, cast(type, hint), f"{path}.")
    elif dataclasses.is_dataclass(inner := (typing.get_args(hint) or (None,))[-1]):  # dict[str, X] or list[X]
        container = typing.get_origin(hint)
        if not isinstance(value, container):
            raise ConfigError(f"{path}: {value!r} is not a {'section of names' if container is dict else 'list'}")
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in entries:
            _check_keys(entry, cast(type, inner), f"{path}.{key}." if container is dict else f"{path}[{key}].")
