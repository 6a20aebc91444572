"""Cholesky factors and inverses by halves equal those of LAPACK."""

from __future__ import annotations

import pytest
import torch

from qembed.quantize import triangular

SIZES = [1, triangular.DIRECT_SIZE, triangular.DIRECT_SIZE + 1, 700]


def positive_definite(size: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(size), dtype=dtype)
    return x.T @ x / size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_factor_equals_lapack(size: int, dtype: torch.dtype) -> None:
    matrix = positive_definite(size, dtype)
    factor = matrix.clone()
    assert triangular.cholesky(factor)
    torch.testing.assert_close(factor, torch.linalg.cholesky(matrix), rtol=1e-4, atol=1e-4)
    assert torch.equal(factor, factor.tril())


@pytest.mark.parametrize("position", [0, 400, 699])
def test_indefinite_matrix_has_no_factor(position: int) -> None:
    matrix = positive_definite(700, torch.float64)
    matrix[position, position] = -1
    assert not triangular.cholesky(matrix)


@pytest.mark.parametrize("size", SIZES)
def test_inverse_times_the_matrix_is_the_unit_matrix(size: int) -> None:
    lower = torch.linalg.cholesky(positive_definite(size, torch.float64))
    inverse = triangular.invert(lower)
    torch.testing.assert_close(inverse @ lower, torch.eye(size, dtype=torch.float64))
    assert torch.equal(inverse, inverse.tril())
