"""What a build makes of its inputs, and the YAML file that may say so."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from data_prep.chat import TRAIN_ON, TrainOn
from data_prep.errors import DataError
from data_prep.filters import FilterConfig
from data_prep.packing import METHODS, Method
from data_prep.readers import ReaderOptions

C = TypeVar("C")


@dataclass(frozen=True)
class BuildConfig:
    """Everything that decides what a dataset holds, apart from its inputs, its tokenizer and the length of rows.

    Attributes:
        readers: how files are read.
        filters: what is done to documents, and which are left out.
        validation_fraction: share of the documents that is held out for validation, chosen by their text; 0 for none.
        split: whether to build what is held out, or the rest.
        packing: how documents are laid into rows, see `data_prep.packing`.
        train_on: of chats, whether all tokens are trained on or those of the assistant alone.
        drop_cut_tails: the reference's rule for `concatenate`: what the end of a row cuts off a document is dropped.
        unit_bytes: text in a unit of work, bytes; None chooses it from the size of the corpus. Another value gives
            another dataset, since each unit drops its own tail.
        engine: the encoder, "auto" for the fastest one that agrees with `tokenizers`; never part of the result.
    """

    readers: ReaderOptions = field(default_factory=ReaderOptions)
    filters: FilterConfig = field(default_factory=FilterConfig)
    validation_fraction: float = 0.0
    split: Literal["train", "validation"] = "train"
    packing: Method = "concatenate"
    train_on: TrainOn = "assistant"
    drop_cut_tails: bool = False
    unit_bytes: int | None = None
    engine: str = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise DataError(f"validation_fraction: {self.validation_fraction} should be at least 0 and below 1")
        if self.split not in ("train", "validation"):
            raise DataError(f"split: {self.split!r} is not one of train, validation")
        if self.split == "validation" and not self.validation_fraction:
            raise DataError("split: validation, but validation_fraction: 0 holds nothing out; set validation_fraction")
        if self.train_on not in TRAIN_ON:
            raise DataError(f"train_on: {self.train_on!r} is not one of {', '.join(TRAIN_ON)}")
        if self.packing not in METHODS:
            raise DataError(f"packing: {self.packing!r} is not one of {', '.join(METHODS)}")
        if self.drop_cut_tails and self.packing != "concatenate":
            raise DataError(f"drop_cut_tails: {self.packing} cuts no tails; set packing: concatenate or leave it out")
        if self.unit_bytes is not None and self.unit_bytes < 1:
            raise DataError(f"unit_bytes: {self.unit_bytes} is no size")

    def settings(self) -> dict[str, Any]:
        """Return what the result depends on, as JSON stores it.

        The engine is left out, as all give the same ids, and so is `on_bad_document`: finished units with nothing to
        skip are the same either way, so that a build that met a bad document can go on without it.
        """
        record = asdict(self)
        del record["engine"], record["unit_bytes"], record["readers"]["on_bad_document"]
        record["filters"]["user"] = list(self.filters.user)  # as it comes back from JSON
        return record

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> BuildConfig:
        """Return the configuration whose settings are among `settings`; documents that are bad are left out."""
        names = {each.name for each in fields(cls)}
        given = {name: value for name, value in settings.items() if name in names}
        config = from_mapping(cls, given, "settings")
        return replace(config, readers=replace(config.readers, on_bad_document="skip"))


@dataclass(frozen=True)
class Build:
    """A whole build: what `build_dataset` takes."""

    inputs: tuple[Path, ...]
    tokenizer: Path
    sequence_length: int
    out: Path
    config: BuildConfig

    def as_yaml(self) -> str:
        """Return the file of `--config` that says the same, from any working directory."""
        import yaml

        record: dict[str, Any] = {
            "input": [str(path.absolute()) for path in self.inputs],
            "tokenizer": str(self.tokenizer.absolute()),
            "sequence_length": self.sequence_length,
            "out": str(self.out.absolute()),
            **asdict(self.config),
        }
        record["filters"]["user"] = list(self.config.filters.user)
        return yaml.safe_dump(record, sort_keys=False)


def read_build_file(path: Path | None) -> dict[str, Any]:
    """Return the content of a YAML file that describes a build, nothing for None.

    Raises:
        DataError: it cannot be read, or is no mapping.
    """
    return {} if path is None else _read_yaml(path)


def parse_build(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> Build:
    """Return the build that `values` describe: `input`, `tokenizer`, `sequence_length`, `out`, and `BuildConfig`'s.

    Args:
        values: as in the YAML file.
        overrides: values by dotted key, which take precedence.

    Raises:
        DataError: an unknown or missing key, or a value of the wrong type.
    """
    merged: dict[str, Any] = json.loads(json.dumps(values, default=str))  # a copy
    for dotted, value in overrides.items():
        *sections, name = dotted.split(".")
        inner = merged
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise DataError(f"{dotted}: {section} is no section")
        inner[name] = value
    given = {name: merged.pop(name, None) for name in ("input", "tokenizer", "sequence_length", "out")}
    for name, value in given.items():
        if value is None or value == []:
            raise DataError(f"--{name.replace('_', '-')}: missing; give it, or {name} in the file of --config")
    inputs = [given["input"]] if isinstance(given["input"], str) else given["input"]
    return Build(
        inputs=tuple(map(Path, _checked(list[str], inputs, "input"))),
        tokenizer=Path(_checked(str, given["tokenizer"], "tokenizer")),
        sequence_length=_checked(int, given["sequence_length"], "sequence_length"),
        out=Path(_checked(str, given["out"], "out")),
        config=from_mapping(BuildConfig, merged, ""),
    )


def read_sources(path: Path) -> list[tuple[str, list[Path], float]]:
    """Return the (name, inputs, weight) of the sources in a YAML file; inputs are relative to the file.

    Raises:
        DataError: it cannot be read or is something else.
    """
    sources = []
    for name, entry in _read_yaml(path).items():
        where = f"{path}: {name}"
        if not isinstance(entry, dict) or not set(entry) <= {"input", "weight"} or "input" not in entry:
            raise DataError(f"{where}: should be {{input: [PATH...], weight: NUMBER}}")
        inputs = [entry["input"]] if isinstance(entry["input"], str) else entry["input"]
        paths = [path.parent / given for given in _checked(list[str], inputs, f"{where}.input")]
        sources.append((str(name), paths, _checked(float, entry.get("weight", 1.0), f"{where}.weight")))
    return sources


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: is no YAML file ({error}); mend it") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: should hold keys and values, not {type(content).__name__}")
    return content


def from_mapping(kind: type[C], values: Mapping[str, Any], where: str) -> C:
    """Return the dataclass `kind` with the fields that `values` names, nested ones included.

    Raises:
        DataError: an unknown or missing field, or a value of the wrong type, by its dotted name in `where`.
    """
    hints = get_type_hints(kind)
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            meant = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
            raise DataError(f"{_dotted(where, name)}: unknown{meant}")
        given[name] = _checked(hints[name], value, _dotted(where, name))
    return kind(**given)


def _dotted(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)


def _checked(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        assert isinstance(kind, type)
        if not isinstance(value, Mapping):
            raise DataError(f"{where} = {value!r}: should be a section of keys and values")
        return from_mapping(kind, value, where)
    if get_origin(kind) in (list, tuple):
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise DataError(f"{where} = {value!r}: should be a list of texts")
        return get_origin(kind)(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    choices = get_args(kind)
    allowed = tuple(get_origin(choice) or choice for choice in choices if isinstance(choice, type)) or (
        (str,) if choices else (kind,)
    )
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise DataError(f"{where} = {value!r}: should be {' or '.join(each.__name__ for each in allowed)}")
    return value
