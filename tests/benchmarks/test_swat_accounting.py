"""What sparse training saves, against every row of the paper that its formulas give."""

import pytest

from benchmarks.swat_accounting import PAPER, Row, account

# By momentum, densities come out of a training.
_BY_FORMULA = [row for row in PAPER if row.distribution != "M"]


@pytest.mark.parametrize("row", _BY_FORMULA, ids=str)
def test_rows_of_the_paper_within_a_point(row: Row) -> None:
    counted = account(row)
    assert 100 * counted.training_flops == pytest.approx(row.training, abs=1)
    assert 100 * counted.inference_flops == pytest.approx(row.inference, abs=1)
    assert 100 * counted.activations == pytest.approx(row.memory, abs=1)
    assert 100 * counted.weights == pytest.approx(row.sparsity, abs=1)
    if row.distribution == "ERK":
        # Of U the paper gives the setting, without the first layer.
        assert 100 * counted.layer_inputs == pytest.approx(row.act, abs=1)
