"""Tests of ``rounding.py``: rounding passes, and whatever is lost, doubled or small and missing does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_ddg.plugin.rounding import difference, largest, rounding_of

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ONES = torch.ones(4)


def said(got: Tensor | None, wanted: Tensor | None, scale: float = 1.0, reordered: bool = False) -> str | None:
    kind = (wanted if wanted is not None else got if got is not None else ONES).dtype
    return difference(got, wanted, rounding_of(kind, reordered=reordered), scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reordered", [False, True])
def test_the_last_bits_pass_and_half_a_gradient_does_not(dtype: torch.dtype, reordered: bool) -> None:
    wanted = torch.linspace(-1, 1, 9).to(dtype)
    eps = torch.finfo(dtype).eps
    assert said(wanted * (1 + 2 * eps), wanted, reordered=reordered) is None
    for factor in (0.5, 1.5, 2.0, -1.0):
        text = said(wanted * factor, wanted, reordered=reordered)
        assert text is not None
        assert "off by up to" in text
        assert "the largest is 1" in text


@pytest.mark.parametrize(("dtype", "wrong"), [(torch.float64, 1e-8), (torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_one_wrong_entry_is_enough(dtype: torch.dtype, wrong: float) -> None:
    wanted = torch.ones(1000, dtype=dtype)
    got = wanted.clone()
    got[7] += wrong
    assert said(got, wanted) is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [None, 0.0])
def test_a_small_gradient_that_is_lost_or_came_from_nowhere_is_seen(dtype: torch.dtype, zero: float | None) -> None:
    small = torch.full((4,), 1e-7, dtype=dtype)
    none = None if zero is None else torch.zeros(4, dtype=dtype)
    assert "0 instead of up to" in (said(none, small) or "")
    assert "instead of 0" in (said(small, none) or "")


def test_none_is_as_good_as_zero() -> None:
    zero = torch.zeros(3)
    for got in (None, zero):
        for wanted in (None, zero):
            assert said(got, wanted) is None


def test_rounding_errors_of_a_sum_that_is_zero_pass() -> None:
    assert said(torch.full((3,), 3e-8), torch.full((3,), -2e-8)) is None
    assert said(torch.full((3,), 3e-8), torch.full((3,), -2e-8), scale=1e-6) is not None
    # Other kernels may come to exactly 0.
    assert said(None, torch.full((3,), 2e-8)) is not None
    assert said(None, torch.full((3,), 2e-8), reordered=True) is None
    assert said(None, torch.full((3,), 2e-5), reordered=True) is not None


def test_what_is_not_finite_must_be_so_in_both() -> None:
    nan = torch.tensor([1.0, float("nan"), float("inf")])
    assert said(nan.clone(), nan) is None
    assert said(torch.ones(3), nan) == "its gradient is not finite in other places"
    assert said(nan, torch.ones(3)) == "its gradient is not finite in other places"
    assert said(torch.full((3,), float("nan")), torch.full((3,), float("nan"))) is None
    assert largest(torch.full((3,), float("nan"))) == float("inf")
    assert largest(torch.zeros(0)) == 0


def test_sparse_and_complex_gradients_and_other_shapes() -> None:
    dense = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert said(dense.to_sparse(), dense) is None
    assert said((2 * dense).to_sparse(), dense.to_sparse()) is not None
    turned = torch.tensor([1j, 1.0])
    assert said(turned * 1j, turned) is not None
    assert said(turned.clone(), turned) is None
    assert "shape (2,) instead of (3,)" in (said(torch.ones(2), torch.ones(3)) or "")
