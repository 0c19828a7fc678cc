"""`rookery data` as a user types it."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from data_prep.config import BuildConfig
from data_prep.manifest import Manifest
from data_prep.tokenizer import Tokenizer, load_chat_template
from rookery.cli import app


def rookery_data(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, arguments)], catch_exceptions=True)


def build(out: Path, tokenizer: Path, *arguments: object) -> Result:
    return rookery_data("build", *arguments, "--tokenizer", tokenizer, "--sequence-length", 255, "--out", out)


def test_train_build_info_verify_and_show_work_together(corpus: Path, tmp_path: Path) -> None:
    bpe, out = tmp_path / "bpe", tmp_path / "data"
    trained = rookery_data("train-tokenizer", "--input", corpus, "--vocab-size", 400, "--out", bpe)
    assert trained.exit_code == 0, trained.output
    built = build(out, bpe, "--input", corpus)
    assert built.exit_code == 0, built.output
    manifest = Manifest.load(out)
    assert f"{manifest.tokens} tokens" in built.stdout

    answer = json.loads(rookery_data("info", out, "--json").stdout)
    assert answer["fingerprint"] == manifest.fingerprint
    counts = {name: answer[name] for name in ("tokens", "documents", "shards", "rows")}
    assert counts == {"tokens": manifest.tokens, "documents": 10, "shards": 1, "rows": manifest.rows}
    assert manifest.fingerprint in rookery_data("info", out).stdout

    assert rookery_data("verify", out).exit_code == 0
    assert "whole" in rookery_data("repair", out).stdout
    shown = rookery_data("show", out, 0, "--tokenizer", bpe)
    assert shown.stdout.startswith("<|begin_text|>" + (corpus / "ast.py").read_text()[:200])


@pytest.mark.parametrize("repeated", [True, False])
def test_inputs_may_be_repeated_or_follow_one_flag(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, repeated: bool
) -> None:
    first, second = corpus / "ast.py", corpus / "bdb.py"
    inputs = ["--input", first, "--input", second] if repeated else ["--input", first, second]
    result = build(tmp_path / "data", tokenizer_dir, *inputs)
    assert result.exit_code == 0, result.output
    assert Manifest.load(tmp_path / "data").documents == 2


def test_a_file_may_say_all_of_a_build_and_flags_have_the_last_word(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "build.yaml"
    file.write_text(
        f"input: [{corpus}]\ntokenizer: {tokenizer_dir}\nsequence_length: 63\nout: {tmp_path / 'other'}\n"
        "packing: concatenate\nfilters:\n  min_chars: 10\n"
    )
    result = rookery_data(
        "build",
        "--config",
        file,
        "--out",
        tmp_path / "out",
        "--packing",
        "best-fit",
        "--set",
        "filters.max_chars=20000",
    )
    assert result.exit_code == 0, result.output
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.sequence_length, manifest.packing) == (63, "best-fit")
    assert manifest.counters["too_long"] == 10 - manifest.documents > 0
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "pakcing=best-fit"], "pakcing: unknown; did you mean packing?"),
        (["--set", "filters.min_chars=many"], "filters.min_chars = 'many': should be int"),
        (["--set", "readers.text_documents=pages"], "text_documents: 'pages' is not one of file, lines"),
        (["--set", "packing"], "--set packing: write it as KEY=VALUE"),
        (["--packing", "worst-fit"], "packing: 'worst-fit' is not one of concatenate, best-fit"),
        (["--on-bad-document", "panic"], "on_bad_document: 'panic' is not one of fail, skip"),
        (["--task", "first"], "--task first: write it as I/N"),
        (["--config", "gone.yaml"], "gone.yaml: cannot be read"),
    ],
)
def test_a_wrong_setting_is_named(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = build(tmp_path / "out", tokenizer_dir, "--input", corpus, *arguments)
    assert message in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_a_missing_argument_of_a_build_is_named(tokenizer_dir: Path, tmp_path: Path) -> None:
    assert "--input: missing" in str(build(tmp_path / "out", tokenizer_dir).exception)


def test_count_says_how_many_tokens_each_source_is(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    counted = rookery_data(
        "count", "--input", corpus / "ast.py", corpus / "bdb.py", "--tokenizer", tokenizer_dir, "--json"
    )
    assert counted.exit_code == 0, counted.output
    answer = json.loads(counted.stdout)
    out = tmp_path / "out"
    build(out, tokenizer_dir, "--input", corpus / "ast.py", corpus / "bdb.py")
    manifest = Manifest.load(out)
    assert answer["tokens"] == manifest.tokens + manifest.dropped_tokens
    assert [source["name"] for source in answer["sources"]] == [str(corpus / "ast.py"), str(corpus / "bdb.py")]


def test_a_tokenizer_can_be_trained_on_a_weighted_sample(corpus: Path, tmp_path: Path) -> None:
    sources = tmp_path / "sources.yaml"
    sources.write_text(f"code: {{input: {corpus}/a*.py, weight: 3}}\nrest: {{input: [{corpus}/c*.py]}}\n")
    out = tmp_path / "bpe"
    result = rookery_data(
        "train-tokenizer", "--sources", sources, "--sample", 100_000, "--vocab-size", 400, "--out", out
    )
    assert result.exit_code == 0, result.output
    assert (out / "tokenizer.json").exists()
    both = rookery_data(
        "train-tokenizer", "--sources", sources, "--input", corpus, "--vocab-size", 400, "--out", out / "x"
    )
    assert "--input or --sources" in str(both.exception)


def test_verify_exits_12_and_names_what_is_broken_and_repair_mends_it(dataset: Path) -> None:
    (dataset / "part-00001" / "c.0.0").unlink()
    result = rookery_data("verify", dataset, "--json")
    assert result.exit_code == 12
    answer = json.loads(result.stdout)
    assert answer["ok"] is False
    assert "part-00001" in answer["problems"][0]
    assert "part-00001" in rookery_data("verify", dataset).stdout
    assert json.loads(rookery_data("repair", dataset, "--json").stdout) == {"repaired": ["part-00001"]}
    assert rookery_data("verify", dataset).exit_code == 0


def test_bad_documents_that_are_skipped_are_said(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    result = build(
        tmp_path / "out", tokenizer_dir, "--input", corpus, tmp_path / "bad.txt", "--on-bad-document", "skip"
    )
    assert result.exit_code == 0, result.output
    assert "1 bad documents were left out" in result.stderr
    assert "skipped 1" in rookery_data("info", tmp_path / "out").stdout


def test_show_refuses_a_row_or_a_tokenizer_that_does_not_belong(
    dataset: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    last = Manifest.load(dataset).rows - 1
    result = rookery_data("show", dataset, last + 1, "--tokenizer", tokenizer_dir)
    assert f"has rows 0 to {last}" in str(result.exception)
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes() + b"\n")
    result = rookery_data("show", dataset, 0, "--tokenizer", tmp_path)
    assert "was built with another tokenizer" in str(result.exception)


@pytest.mark.parametrize("template", ["{{ messages }}", None])
def test_an_adopted_tokenizer_keeps_its_chat_template(
    tokenizer_dir: Path, tmp_path: Path, template: str | None
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(tokenizer_dir / "tokenizer.json", source)
    if template is not None:
        (source / "chat_template.jinja").write_text(template)
    assert rookery_data("adopt-tokenizer", source, "--out", tmp_path / "bpe").exit_code == 0
    assert load_chat_template(tmp_path / "bpe") == template


def test_every_key_of_a_build_is_documented_with_its_default() -> None:
    rows = (Path(__file__).parents[2] / "docs" / "data.md").read_text().splitlines()
    for key, value in _leaves(dataclasses.asdict(BuildConfig())):
        default = value if isinstance(value, str) else json.dumps(value)
        assert any(row.startswith(f"| `{key}` | {default} |") for row in rows), key


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_a_tokenizer_of_others_is_adopted_with_the_control_tokens_named(tokenizer_dir: Path, tmp_path: Path) -> None:
    result = rookery_data("adopt-tokenizer", tokenizer_dir, "--begin", "<document>", "--out", tmp_path / "bpe")
    assert result.exit_code == 0, result.output
    adopted, source = Tokenizer.load(tmp_path / "bpe"), Tokenizer.load(tokenizer_dir)
    assert (adopted.begin_id, adopted.end_id) == (source.vocab_size, source.end_id)
    assert f"<document> = {source.vocab_size}" in result.stdout
    refused = rookery_data("adopt-tokenizer", tokenizer_dir, "--pad", "<|end_text|>", "--out", tmp_path / "other")
    assert "must be three different tokens" in str(refused.exception)
    assert not (tmp_path / "other").exists()
