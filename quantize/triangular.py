"""Triangular matrices by halves: matrix products do most of the work, in half the time of LAPACK's factorization.

Compare Elmroth et al. 2004, Recursive Blocked Algorithms and Hybrid Data Structures for Dense Matrix Library Software,
https://doi.org/10.1137/S0036144503428693.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qembed.quantize.products import linear, matmul

if TYPE_CHECKING:
    import torch

DIRECT_SIZE = 256
"""Matrices up to this size are factored and inverted directly."""


def cholesky(matrix: torch.Tensor) -> bool:
    """Replace the symmetric `matrix` [K, K] by its lower triangular Cholesky factor.

    Returns:
        False if the matrix is not positive definite in its precision; its values are then undefined.
    """
    import torch

    size = len(matrix)
    if size <= DIRECT_SIZE:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        matrix.copy_(factor)
        return not failed
    half = size // 2
    upper_left, lower_left, lower_right = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    if not cholesky(upper_left):
        return False
    lower_left.copy_(torch.linalg.solve_triangular(upper_left, lower_left.T, upper=False).T)
    lower_right -= linear(lower_left, lower_left)
    matrix[:half, half:] = 0
    return cholesky(lower_right)


def invert(lower: torch.Tensor) -> torch.Tensor:
    """The inverse of the lower triangular matrix `lower` [K, K]: a third of the work of solving for the unit matrix."""
    import torch

    size = len(lower)
    if size <= DIRECT_SIZE:
        unit = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, unit, upper=False)
    half = size // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = invert(lower[:half, :half])
    inverse[half:, half:] = invert(lower[half:, half:])
    inverse[half:, :half] = matmul(inverse[half:, half:], matmul(lower[half:, :half], inverse[:half, :half]).neg_())
    return inverse
