"""`rookery data` as a user types it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from data_prep.manifest import Manifest
from rookery.data import app


def rookery_data(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)


def test_train_build_info_verify_and_show_work_together(corpus: Path, tmp_path: Path) -> None:
    bpe, out = tmp_path / "bpe", tmp_path / "data"
    trained = rookery_data("train-tokenizer", "--input", corpus, "--vocab-size", 400, "--out", bpe)
    assert trained.exit_code == 0, trained.output
    built = rookery_data("build", "--input", corpus, "--tokenizer", bpe, "--sequence-length", 255, "--out", out)
    assert built.exit_code == 0, built.output
    manifest = Manifest.load(out)
    assert f"{manifest.tokens} tokens" in built.stdout

    answer = json.loads(rookery_data("info", out, "--json").stdout)
    assert answer["fingerprint"] == manifest.fingerprint
    counts = {name: answer[name] for name in ("tokens", "documents", "shards", "rows")}
    assert counts == {"tokens": manifest.tokens, "documents": 10, "shards": 1, "rows": manifest.rows}
    assert manifest.fingerprint in rookery_data("info", out).stdout

    assert rookery_data("verify", out).exit_code == 0
    shown = rookery_data("show", out, 0, "--tokenizer", bpe)
    assert shown.stdout.startswith("<|begin_text|>" + (corpus / "ast.py").read_text()[:200])


@pytest.mark.parametrize("repeated", [True, False])
def test_inputs_may_be_repeated_or_follow_one_flag(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, repeated: bool
) -> None:
    first, second = corpus / "ast.py", corpus / "bdb.py"
    inputs = ["--input", first, "--input", second] if repeated else ["--input", first, second]
    out = tmp_path / "data"
    result = rookery_data("build", *inputs, "--tokenizer", tokenizer_dir, "--sequence-length", 255, "--out", out)
    assert result.exit_code == 0, result.output
    assert Manifest.load(out).documents == 2


def test_verify_exits_12_and_names_what_is_broken(dataset: Path) -> None:
    (dataset / "part-00001" / "c.0.0").unlink()
    result = rookery_data("verify", dataset, "--json")
    assert result.exit_code == 12
    answer = json.loads(result.stdout)
    assert answer["ok"] is False
    assert "part-00001" in answer["problems"][0]
    assert "part-00001" in rookery_data("verify", dataset).stdout


def test_show_refuses_a_row_or_a_tokenizer_that_does_not_belong(
    dataset: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    last = Manifest.load(dataset).rows - 1
    result = rookery_data("show", dataset, last + 1, "--tokenizer", tokenizer_dir)
    assert f"has rows 0 to {last}" in str(result.exception)
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes() + b"\n")
    result = rookery_data("show", dataset, 0, "--tokenizer", tmp_path)
    assert "was built with another tokenizer" in str(result.exception)
