from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.goodput import useful_seconds
from monitoring.runlog import RunLog, branches

_ATTEMPTS = st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=4)


@given(_ATTEMPTS)
def test_it_counts_the_steps_that_the_run_stands_on(attempts: list[list[int]]) -> None:
    with TemporaryDirectory() as folder:
        for number, steps in enumerate(attempts):
            log = RunLog.open(Path(folder))
            for place, step in enumerate(steps):
                log.step({"step": step, "loss": 1.0, "seconds": 2.0 ** -(number * 12 + place)})
            log.close()
        expected = sum(record["seconds"] for record in branches(Path(folder)).current)
        assert useful_seconds(Path(folder)) == expected  # powers of two: each step shows in the sum


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    lines = ['{"step":1,"seconds":1.5}', '{"step":2,"sec', "", "[]", '{"step":2,"seconds":0.25}', '{"step":3,"seco']
    (tmp_path / "metrics/0001.jsonl").write_text("\n".join(lines))
    assert useful_seconds(tmp_path) == pytest.approx(1.75)
