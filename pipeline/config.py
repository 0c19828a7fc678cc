"""One resolved configuration for a run: shipped or own YAML, model presets, overrides, and errors that help.

Precedence: defaults in the dataclasses < model preset < what a site wants < the YAML file < `key=value` overrides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from monitoring.config import MonitorConfig
from pipeline.checkpoints.saver import CheckpointConfig
from pipeline.control import ControlConfig
from pipeline.depth import DepthConfig
from pipeline.engine import ZeroConfig, check_sharding
from pipeline.errors import ConfigError
from pipeline.launch import CommConfig
from pipeline.loader import ONLY_DATASET, DataConfig
from pipeline.model import ModelConfig
from pipeline.node_check import NodeCheckConfig
from pipeline.objective import ObjectiveConfig
from pipeline.optim import OptimizerConfig
from pipeline.pretrained import InitFromConfig
from pipeline.schedules import ScheduleConfig
from pipeline.schema import nearest, read_yaml, to_dataclass
from pipeline.train import TrainConfig
from pipeline.validation import ValidationConfig, validation_rows

CONFIGS = Path(__file__).parent / "configs"
SCHEMA_VERSION = 1


@dataclass(kw_only=True)
class RunConfig:
    """Everything that decides what a run computes."""

    name: str
    """Name of the run; `run_dir` follows it unless it is set."""
    run_dir: str = "runs/${name}"
    """Directory of everything that the run writes."""
    seed: int = 233
    """Seed of the sample order, the depths, the initial states and the initial weights."""
    schema_version: int = SCHEMA_VERSION
    """Version of this configuration's layout."""
    model: ModelConfig
    depth: DepthConfig = field(default_factory=DepthConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    init_from: InitFromConfig = field(default_factory=InitFromConfig)
    data: DataConfig
    train: TrainConfig
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    node_check: NodeCheckConfig = field(default_factory=NodeCheckConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        """Hold the rules that join two sections."""
        if self.schema_version != SCHEMA_VERSION:
            raise ConfigError(f"schema_version: {self.schema_version} is not {SCHEMA_VERSION}, the one read here")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: {self.seed} is not in [0, 2^63)")
        check_sharding(self.zero, self.comm, self.train.precision)
        self.train.compile.check(self.zero.stage)
        if self.objective.jacobian_penalty > 0.0 and self.train.attention != "sdpa":
            raise ConfigError(
                f"objective.jacobian_penalty: needs second derivatives, which train.attention = {self.train.attention}"
                " does not have; use train.attention=sdpa"
            )
        self.schedule.check_batch(self.train.global_batch_size)
        self.depth.check(self.train.steps, self.train.micro_batch_size)
        if self.validation.every is not None:
            validation_rows(self)  # refuses a budget that pays for none


def shipped_configs() -> list[str]:
    """Return the names of the run configurations that come with the package."""
    return sorted(path.stem for path in (CONFIGS / "runs").glob("*.yaml"))


def load_config(source: str, overrides: Sequence[str] = (), beneath: Mapping[str, Any] | None = None) -> RunConfig:
    """Resolve a configuration.

    Args:
        source: path of a YAML file, or the name of a shipped configuration.
        overrides: `dotted.key=value` each.
        beneath: dotted key -> value that hold where the file says nothing, as a site wants them.

    Raises:
        ConfigError: anything that is not a valid configuration; one message, with the dotted path.
    """
    raw = read_yaml(_locate(source, "runs", "configuration"))
    _expand_preset(raw)
    changes = OmegaConf.create({})
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r} is not of the form key=value")
        if key == "model":
            key = "model.preset"
        try:
            OmegaConf.update(changes, key, _scalar(override, value), force_add=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"override {override!r}: {error}") from None
    try:
        merged = cast(DictConfig, OmegaConf.merge(_nested(beneath or {}), OmegaConf.create(raw), changes))
    except TypeError as error:  # a key into a list
        raise ConfigError(f"overrides {' '.join(overrides)}: {error}; give a list as a whole") from None
    config = _to_run_config(merged)
    # What is written with a run must mean the same from anywhere.
    config.run_dir, config.data.validation, config.data.tokenizer = (
        str(Path(path).absolute()) for path in (config.run_dir, config.data.validation, config.data.tokenizer)
    )
    if config.init_from.path is not None:
        config.init_from.path = str(Path(config.init_from.path).absolute())
    if config.train.compile.cache_dir is not None:
        config.train.compile.cache_dir = str(Path(config.train.compile.cache_dir).absolute())
    for dataset in config.data.train.values():
        dataset.path = str(Path(dataset.path).absolute())
    return config


def config_from_record(record: dict[str, Any], origin: str) -> RunConfig:
    """Return the configuration that `dataclasses.asdict` turned into `record`, as a checkpoint holds it.

    Raises:
        ConfigError: it is not one; the message begins with `origin`.
    """
    try:
        return _to_run_config(OmegaConf.create(record))
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None


def to_yaml(config: RunConfig) -> str:
    """Return the configuration as a YAML text that `load_config` reads back to the same value."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _locate(source: str, kind: str, noun: str) -> Path:
    if source.endswith((".yaml", ".yml")):
        path = Path(source)
        if not path.is_file():
            raise ConfigError(f"no {noun} file {source!r}; give an existing path or a shipped name")
        return path
    path = CONFIGS / kind / f"{source}.yaml"
    if path.parent != CONFIGS / kind or not path.is_file():
        names = sorted(found.stem for found in (CONFIGS / kind).glob("*.yaml"))
        raise ConfigError(
            f"no {noun} {source!r}{nearest(source, names)}; shipped: {', '.join(names)} (or give the path of a .yaml)"
        )
    return path


def _nested(values: Mapping[str, Any]) -> DictConfig:
    """Return dotted keys as sections."""
    tree = OmegaConf.create({})
    for key, value in values.items():
        OmegaConf.update(tree, key, value, force_add=True)
    return tree


def _expand_preset(tree: dict[str, Any]) -> None:
    """Write `model: NAME` in its long form, `model: {preset: NAME}`."""
    if isinstance(tree.get("model"), str):
        tree["model"] = {"preset": tree["model"]}


def _expand_only_dataset(tree: DictConfig) -> None:
    """Write `data.train: PATH` in its long form, a mixture of one dataset."""
    data = tree.get("data")
    if isinstance(data, DictConfig) and isinstance(data.get("train"), str):
        data["train"] = {ONLY_DATASET: {"path": data["train"]}}


def _scalar(override: str, text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None


def _to_run_config(tree: DictConfig) -> RunConfig:
    model = tree.get("model")
    if isinstance(model, DictConfig) and "preset" in model:
        preset = str(model.pop("preset"))
        tree["model"] = OmegaConf.merge(read_yaml(_locate(preset, "models", "model preset")), model)
    _expand_only_dataset(tree)
    return to_dataclass(tree, RunConfig)
