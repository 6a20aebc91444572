"""Products by oneDNN and by MKL equal those of PyTorch, for every memory layout."""

from __future__ import annotations

import pytest
import torch

from qembed.quantize import products


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "_has_onednn", lambda: request.param)


def random_tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.usefixtures("library")
def test_products_are_right_for_slices_and_transposed_matrices() -> None:
    left, right = random_tensor(70, 50), random_tensor(50, 90)
    with torch.no_grad():
        for a, b in ((left, right), (left[3:, 7:], right[7:, 5:60]), (right.T, left.T), (left[::2, ::3], right[::3])):
            torch.testing.assert_close(products.matmul(a, b), a @ b, rtol=1e-4, atol=1e-4)
        x, bias = random_tensor(2, 3, 50), random_tensor(70)[:70]
        torch.testing.assert_close(
            products.linear(x, left, bias), torch.nn.functional.linear(x, left, bias), rtol=1e-4, atol=1e-4
        )
        assert products.matmul(left.double(), right.double()).dtype == torch.float64


@pytest.mark.usefixtures("library")
def test_use_in_keeps_results_and_gradients() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 5, bias=False))
    x = random_tensor(7, 20)
    expected = module(x)
    products.use_in(module)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    module(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
