import json
from pathlib import Path

import pytest

from data_prep.verify import verify_dataset


def test_a_whole_dataset_has_no_problems(pristine: Path) -> None:
    assert verify_dataset(pristine) == []


@pytest.mark.parametrize("where", [0, 1000, -1])
def test_a_flipped_byte_anywhere_in_a_shard_is_found(dataset: Path, where: int) -> None:
    shard = dataset / "part-00001" / "c.0.0"
    content = bytearray(shard.read_bytes())
    content[where] ^= 1
    shard.write_bytes(content)
    (problem,) = verify_dataset(dataset)
    assert problem.startswith(f"{shard}: its sha256")


def test_every_problem_is_reported_not_only_the_first(dataset: Path) -> None:
    (dataset / "part-00000" / "c.0.0").unlink()
    (dataset / "part-00001" / "c.0.0").write_bytes(b"")
    (dataset / "part-00002" / "zarr.json").write_text("{}")
    (dataset / "part-99999").mkdir()
    problems = verify_dataset(dataset)
    found = ("missing", "0 bytes, but", "zarr cannot open", "not in the manifest")
    for part, complaint, problem in zip((0, 1, 2, 99999), found, problems, strict=True):
        assert f"part-{part:05d}" in problem
        assert complaint in problem


def test_array_metadata_that_contradicts_the_manifest_is_found(dataset: Path) -> None:
    path = dataset / "part-00000" / "zarr.json"
    record = json.loads(path.read_text())
    record["shape"][0] -= 1
    path.write_text(json.dumps(record))
    (problem,) = verify_dataset(dataset)
    assert problem == f"{path}: describes another array than the manifest"


def test_a_broken_manifest_is_the_only_problem(dataset: Path) -> None:
    (dataset / "manifest.json").write_text("{")
    (problem,) = verify_dataset(dataset)
    assert "broken JSON" in problem
