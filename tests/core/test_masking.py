import pytest
import torch

from hpo_verl.core.masking import as_bool_mask, nonempty_rows, require_finite
from hpo_verl.errors import DataError


def test_a_bool_mask_is_returned_as_it_is():
    mask = torch.tensor([[True, False]])
    assert as_bool_mask(mask) is mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_number_masks_become_bool(dtype):
    mask = as_bool_mask(torch.tensor([[1, 0, 1]], dtype=dtype))
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, False, True]]


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, float("nan")])
def test_a_mask_of_other_values_is_refused(value):
    with pytest.raises(DataError, match=r"^response_mask must hold 0 and 1 only$"):
        as_bool_mask(torch.tensor([[1.0, value]]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_nonempty_rows_sees_the_first_a_later_and_no_token(dtype):
    mask = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]]).to(dtype)
    rows = nonempty_rows(mask)
    assert rows.dtype == torch.bool
    assert rows.tolist() == [True, True, False, True]


def test_nonempty_rows_of_responses_of_one_token():
    assert nonempty_rows(torch.tensor([[1], [0]])).tolist() == [True, False]


@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (0, 0)])
def test_nonempty_rows_of_empty_masks(shape):
    rows = nonempty_rows(torch.ones(shape))
    assert rows.dtype == torch.bool
    assert rows.tolist() == [False] * shape[0]


def test_require_finite_passes_finite_and_masked_values():
    values = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0]])
    require_finite("x", values, torch.tensor([[True, False], [False, True]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_require_finite_names_tensor_count_and_first_position(bad):
    values = torch.ones(2, 3)
    values[0, 0] = values[1, 0] = values[1, 2] = bad
    mask = torch.ones(2, 3).bool()
    mask[0, 0] = False
    with pytest.raises(
        DataError,
        match=rf"^log_prob: 2 of 5 live values are not finite, the first at \(1, 0\) \({bad}\)$",
    ):
        require_finite("log_prob", values, mask)
