import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.split import is_held_out


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5])
def test_about_the_fraction_is_held_out(fraction: float) -> None:
    documents = 50_000
    held_out = sum(is_held_out(f"document {number}", fraction) for number in range(documents))
    sigma = (documents * fraction * (1 - fraction)) ** 0.5
    assert abs(held_out - documents * fraction) < 5 * sigma


@given(text=st.text(), smaller=st.floats(0, 1), larger=st.floats(0, 1))
def test_a_larger_fraction_holds_out_what_a_smaller_one_does(text: str, smaller: float, larger: float) -> None:
    smaller, larger = sorted((smaller, larger))
    assert not is_held_out(text, smaller) or is_held_out(text, larger)
    assert not is_held_out(text, 0)
    assert is_held_out(text, 1)


def test_the_split_is_pinned_since_held_out_text_must_stay_held_out() -> None:
    assert [number for number in range(100) if is_held_out(str(number), 0.05)] == [63, 90, 99]
