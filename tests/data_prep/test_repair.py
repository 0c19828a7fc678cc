import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.build import build_dataset
from data_prep.config import BuildConfig
from data_prep.errors import DataError
from data_prep.filters import FilterConfig
from data_prep.repair import repair_dataset
from data_prep.verify import verify_dataset
from data_prep.world import World
from tests.ranks import rookery


def tree(directory: Path) -> dict[Path, bytes]:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def damage(dataset: Path) -> None:
    """Break parts 0, 1 and 2, each in another way."""
    shard = dataset / "part-00001" / "c.0.0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    shutil.rmtree(dataset / "part-00000")
    (dataset / "part-00002" / "zarr.json").write_text("{}")


def test_broken_parts_are_made_anew_and_nothing_else_is_touched(dataset: Path, pristine: Path) -> None:
    damage(dataset)
    whole = {path: path.stat().st_ino for path in dataset.glob("part-0000[3-9]/*")}
    assert repair_dataset(dataset, World()) == ["part-00000", "part-00001", "part-00002"]
    assert tree(dataset) == tree(pristine)
    assert verify_dataset(dataset) == []
    assert {path: path.stat().st_ino for path in whole} == whole
    assert [path.name for path in dataset.parent.iterdir()] == ["dataset"]


def test_a_whole_dataset_needs_no_repair(dataset: Path, pristine: Path) -> None:
    assert repair_dataset(dataset, World()) == []
    assert tree(dataset) == tree(pristine)


def test_ranks_repair_together(dataset: Path, pristine: Path, tmp_path: Path) -> None:
    damage(dataset)
    result = rookery("data", "repair", str(dataset), "--json", cwd=tmp_path, ranks=2)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["repaired"] == ["part-00000", "part-00001", "part-00002"]
    assert tree(dataset) == tree(pristine)


def test_duplicates_are_left_out_of_a_repaired_part_as_before(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    both, out = tmp_path / "both.list", tmp_path / "out"
    both.write_text(f"{corpus}\n{corpus}\n{corpus / 'ast.py'}\n")
    config = BuildConfig(unit_bytes=30_000, filters=FilterConfig(deduplicate="lines"))
    build_dataset([both], tokenizer_dir, 255, out, World(), config=config)
    before = tree(out)
    (out / "part-00000" / "c.0.0").unlink()
    assert repair_dataset(out, World()) == ["part-00000"]
    assert tree(out) == before


def test_inputs_that_have_changed_repair_nothing(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    inputs, out = tmp_path / "inputs", tmp_path / "out"
    shutil.copytree(corpus, inputs)
    config = BuildConfig(unit_bytes=30_000)
    build_dataset([inputs], tokenizer_dir, 255, out, World(), config=config)
    damage(out)
    before = tree(out)
    same_size = inputs / "ast.py"
    original = same_size.read_text()
    same_size.write_text(original.replace("the", "eht"))
    with pytest.raises(DataError, match=r"part-00000: the inputs no longer give this part"):
        repair_dataset(out, World())
    assert tree(out) == before
    same_size.write_text(original + "\n")
    with pytest.raises(DataError, match=r"ast\.py: has \d+ bytes and had \d+ when the dataset was built"):
        repair_dataset(out, World())
    same_size.write_text(original)  # its modification time is another one now, its content is not
    assert len(repair_dataset(out, World())) == 3
    assert verify_dataset(out) == []


@pytest.mark.parametrize("lost", ["plan.json", "tokenizer/tokenizer.json", "manifest.json"])
def test_what_a_repair_needs_is_named_if_it_is_missing(dataset: Path, lost: str) -> None:
    damage(dataset)
    (dataset / lost).unlink()
    with pytest.raises(DataError, match=lost.replace(".", r"\.")):
        repair_dataset(dataset, World())


def test_a_plan_of_another_dataset_is_refused(dataset: Path) -> None:
    damage(dataset)
    path = dataset / "plan.json"
    path.write_text(path.read_text().replace("255", "256", 1))
    with pytest.raises(DataError, match=r"plan\.json: not the plan of this dataset"):
        repair_dataset(dataset, World())
    assert any("plan.json: missing or changed" in problem for problem in verify_dataset(dataset))


def test_masks_are_verified_and_repaired(tokenizer_dir: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 100)
    out = tmp_path / "out"
    build_dataset([tmp_path / "a.jsonl"], tokenizer_dir, 31, out, World())
    before = tree(out)
    mask = out / "part-00000" / "trainable" / "c.0.0"
    mask.write_bytes((np.frombuffer(mask.read_bytes(), np.uint8) ^ 1).tobytes())
    (problem,) = verify_dataset(out)
    assert problem.startswith(f"{mask}: its sha256 is not the manifest's")
    assert repair_dataset(out, World()) == ["part-00000"]
    assert tree(out) == before
