"""Evaluation and export of a trained run, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_prep.tokenizer import Tokenizer
from pipeline.checkpoints.reader import resolve_checkpoint
from pipeline.evaluate import evaluate_checkpoint, load_model
from pipeline.export import load_export
from tests.ranks import rookery


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    for name in ("tokenizer", "data", "test.yaml"):
        (root / name).symlink_to(corpus / name)
    done = rookery("train", "test.yaml", "train.steps=8", cwd=root)
    assert done.returncode == 0, done.stderr
    return root


def test_eval_measures_every_depth_and_keeps_the_result(trained: Path) -> None:
    done = rookery("eval", "run", "--depths", "4,1,8", "--json", cwd=trained)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result["loss"]) == ["1", "4", "8"]
    assert len(result["state_rms"]) == len(result["relative_residual"]) == 8
    assert result["step"] == 8
    assert json.loads((trained / "run/eval/step-00000008.json").read_text()) == result


def test_a_later_eval_adds_its_depths(trained: Path) -> None:
    for depths in ([1, 4, 8], [2]):
        evaluate_checkpoint(trained / "run", depths)
    kept = json.loads((trained / "run/eval/step-00000008.json").read_text())
    assert list(kept["loss"]) == ["1", "2", "4", "8"]
    assert len(kept["state_rms"]) == 8


@pytest.mark.parametrize("arguments", [["eval", "run"], ["export", "run", "out"], ["report", "run", "--out", "x.html"]])
def test_single_process_commands_refuse_several_ranks_with_one_message(trained: Path, arguments: list[str]) -> None:
    done = rookery(*arguments, cwd=trained, ranks=2)
    assert done.returncode == 12
    assert done.stderr.count("runs on one rank") == 1


def test_eval_agrees_with_a_plain_forward_pass(trained: Path) -> None:
    from data_prep.manifest import Manifest
    from data_prep.shards import RowReader
    from pipeline.model import stream_key

    done = rookery("eval", "run", "--depths", "2,3", "--max-rows", "5", "--json", cwd=trained)
    reader = resolve_checkpoint(trained / "run")
    model, config = load_model(reader, torch.device("cpu"))
    rows = RowReader(trained / "data/validation", Manifest.load(trained / "data/validation"))
    tokens = torch.stack([torch.from_numpy(rows.row(row).astype("int64")) for row in range(5)])
    keys = torch.tensor([stream_key(config.seed, "evaluation", row) for row in range(5)])
    with torch.no_grad():
        for depth in (2, 3):
            loss = model(tokens[:, :-1], model.initial_state(keys, 32), (0, depth), tokens[:, 1:])
            assert json.loads(done.stdout)["loss"][str(depth)] == pytest.approx(float(loss), rel=1e-5)


def test_export_is_a_copy_that_reads_back_with_its_tokenizer(trained: Path) -> None:
    done = rookery("export", "run", "export", "--json", cwd=trained)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["max_abs_logit_diff"] <= 1e-5
    names = {path.name for path in (trained / "export").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((trained / "export/config.json").read_text())
    assert config["model_type"] == "huginn_raven"
    assert "tie_word_embeddings" not in config
    weights = load_file(trained / "export/model.safetensors")
    assert weights["freqs_cis"].shape == (1, 32, 1, 4, 2)
    reader = resolve_checkpoint(trained / "run")
    for name, tensor in load_export(trained / "export").state_dict().items():
        assert torch.equal(tensor, reader.weight(name)), name
    assert Tokenizer.load(trained / "export").sha256 == reader.manifest.tokenizer_sha256


def test_a_new_run_begins_from_an_export(trained: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    assert rookery("export", "run", str(export), cwd=trained).returncode == 0
    still = ("train.steps=1", "optimizer.learning_rate=1e-12")
    done = rookery("train", "test.yaml", f"run_dir={tmp_path}/tuned", f"init_from.path={export}", *still, cwd=trained)
    assert done.returncode == 0, done.stderr
    tuned = resolve_checkpoint(tmp_path / "tuned")
    for name, tensor in load_export(export).state_dict().items():
        torch.testing.assert_close(tuned.weight(name), tensor, rtol=0.0, atol=1e-9)
    definition = export / "tokenizer.json"
    definition.write_text(definition.read_text().replace('"<|interrupt|>"', '"<|other|>"'))
    done = rookery("train", "test.yaml", f"run_dir={tmp_path}/bad", f"init_from.path={export}", cwd=trained)
    assert done.returncode == 12
    assert "init_from.path: the token '<|other|>' has id" in done.stderr
    bad = ("init_from.kind=llama", f"run_dir={tmp_path}/bad")
    done = rookery("train", "test.yaml", f"init_from.path={export}", *bad, cwd=trained)
    assert done.returncode == 12
    assert "model.scale_embedding" in done.stderr
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "nowhere"], "nowhere"),
        (["eval", "run", "--depths", "1,zero"], "--depths '1,zero'"),
        (["eval", "run", "--data", "nowhere"], "nowhere"),
        (["export", "run", "tokenizer"], "tokenizer"),
        (["export"], "Missing argument"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_arguments_are_one_message_and_exit_12(trained: Path, arguments: list[str], message: str) -> None:
    done = rookery(*arguments, cwd=trained)
    assert done.returncode == 12
    assert message in done.stderr
    assert "Traceback" not in done.stderr
