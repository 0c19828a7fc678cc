"""Configurations resolve in a fixed precedence, round-trip, and refuse what they do not know."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from pipeline.config import RunConfig, config_from_record, load_config, shipped_configs, to_yaml
from pipeline.errors import ConfigError


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_configuration_resolves_and_round_trips(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    assert load_config(str(path)) == config
    assert config_from_record(dataclasses.asdict(config), "somewhere") == config


def test_precedence_is_default_then_preset_then_file_then_override(tmp_path: Path) -> None:
    tree = yaml.safe_load(to_yaml(load_config("smoke")))
    tree["model"] = {"preset": "tiny", "n_embd": 64}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = load_config(str(path), ["model.intermediate_size=40", "seed=5"])
    assert (config.model.n_embd, config.model.intermediate_size, config.model.n_heads, config.seed) == (64, 40, 4, 5)
    other = load_config(str(path), ["model=huginn-150m"])
    assert (other.model.n_embd, other.model.n_heads) == (64, 16)


def test_the_run_directory_follows_the_name_and_paths_mean_the_same_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("smoke", ["name=first"]).run_dir == str(tmp_path / "runs/first")
    config = load_config("smoke", ["run_dir=elsewhere", "data.train=tokens"])
    assert config.run_dir == str(tmp_path / "elsewhere")
    assert [dataset.path for dataset in config.data.train.values()] == [str(tmp_path / "tokens")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=3"], r"train\.stepz: unknown key \(did you mean 'train\.steps'\?\); valid: steps, "),
        (["trian.steps=3"], r"trian: unknown key \(did you mean 'train'\?\)"),
        (["train.steps=many"], r"train\.steps: Value 'many' of type 'str' could not be converted to Integer"),
        (["train.steps=2.5"], r"train\.steps: .*2\.5"),
        (["train.activation_checkpointing=perhaps"], r"train\.activation_checkpointing: .*perhaps.*selective"),
        (["optimizer.learning_rate=null"], r"optimizer\.learning_rate: "),
        (["depth=3"], r"depth: 3 is not a section"),
        (["model=tinny"], r"no model preset 'tinny' \(did you mean 'tiny'\?\)"),
        (["steps"], r"override 'steps' is not of the form key=value"),
        (["name=[1"], r"override 'name=\[1': the value is not valid YAML"),
        (["zero.stage=4"], r"zero\.stage: 4"),
        (["checkpoint.keep_last=1"], r"checkpoint\.keep_last: 1"),
        (["optimizer.learning_rate=.nan"], r"optimizer\.learning_rate: nan is not a finite number"),
        (["objective.z_loss=.inf"], r"objective\.z_loss: inf is not a finite number"),
        (["model.norm_eps=-1"], r"model\.norm_eps: -1"),
        (["seed=9223372036854775808"], r"seed: "),
        (["train.attention=flash", "train.precision=fp32"], r"train\.attention: flash needs"),
        (["schema_version=9"], r"schema_version: 9"),
        (["depth.scope=per_sequence", "train.micro_batch_size=1"], r"depth\.scope: per_sequence needs several"),
        (
            ["depth.recurrence_ramp={kind: linear, start: 3, steps: 5}"],
            r"depth\.mean_backprop_depth: 4 iter.* at most 3",
        ),
        (["depth.recurrence_ramp={knd: linear}"], r"depth\.recurrence_ramp\.knd: unknown key \(did you mean"),
        (["depth.backprop_ramp={kind: piecewise, start: 1, points: [{step: 9, value: 3}]}"], r"not at the final 4"),
        (["schedule={batch_start: 3, batch_increment: 4, batch_ramp_steps: 9}"], r"schedule\.batch_increment: from"),
        (["train.document_mask=true", "train.attention=flash", "train.precision=bf16"], r"train\.document_mask: flash"),
        (["objective.jacobian_penalty=1", "train.attention=flash", "train.precision=bf16"], r"jacobian_penalty: needs"),
        (["run_dir=${nowhere}"], r"run_dir: .*nowhere"),
    ],
)
def test_bad_overrides_are_refused_with_path_value_and_help(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("smoke", overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "the top level must map"),
        ("", "the top level must map"),
        ("seed: 1\nname: x\nseed: 2", "key 'seed' is given twice"),
        ("name: x", "model: a value is required"),
    ],
)
def test_bad_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))


def test_every_batch_of_a_ramp_must_fit_the_ranks() -> None:
    ramp = ["schedule={batch_start: 4, batch_increment: 4, batch_ramp_steps: 9}", "train.micro_batch_size=2"]
    config = load_config("smoke", ramp)
    config.train.check_world_size(2, config.schedule)
    with pytest.raises(ConfigError, match=r"schedule\.batch_start: 4 is not a multiple of 4 ranks .* value: 8"):
        config.train.check_world_size(4, config.schedule)


def test_an_unknown_name_lists_what_ships() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'smoke'\?\); shipped: .*huginn-3\.5b"):
        load_config("smok")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_every_key_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()

    def keys(schema: type, prefix: str = "") -> list[str]:
        found: list[str] = []
        for item in dataclasses.fields(schema):
            nested = _section(schema, item.name)
            found += keys(nested, f"{prefix}{item.name}.") if nested else [prefix + item.name]
        return found

    missing = [key for key in keys(RunConfig) if f"`{key}`" not in text]
    assert not missing


def _section(schema: type, name: str) -> type | None:
    import typing

    hint = typing.get_type_hints(schema)[name]
    return hint if dataclasses.is_dataclass(hint) and isinstance(hint, type) else None
