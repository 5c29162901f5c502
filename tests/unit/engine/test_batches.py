"""Batches by length: every row once, no batch over its budget, the largest first."""

from hypothesis import given
from hypothesis import strategies as st

from luthier.engine.batches import batches_by_length


def test_worked_example():
    assert batches_by_length([3, 10, 4, 10, 1], max_tokens=20) == [[1, 3], [2, 0, 4]]
    assert batches_by_length([3, 10, 4, 10, 1], max_rows=2) == [[1, 3], [2, 0], [4]]
    assert batches_by_length([50, 2], max_tokens=20) == [[0], [1]]
    assert batches_by_length([], max_tokens=20) == []


@given(
    lengths=st.lists(st.integers(1, 40), max_size=30),
    max_tokens=st.none() | st.integers(1, 100),
    max_rows=st.none() | st.integers(1, 7),
)
def test_every_row_once_and_no_batch_over_its_budget(lengths, max_tokens, max_rows):
    batches = batches_by_length(lengths, max_tokens=max_tokens, max_rows=max_rows)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[row] for row in batch)
        assert max_rows is None or len(batch) <= max_rows
        assert max_tokens is None or len(batch) == 1 or len(batch) * longest <= max_tokens
    in_order = [lengths[row] for batch in batches for row in batch]
    assert in_order == sorted(lengths, reverse=True)
