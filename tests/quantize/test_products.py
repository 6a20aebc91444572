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


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("tokens", [1, 70, 300])
def test_sums_over_tokens_are_added(tokens: int) -> None:
    left, right = random_tensor(tokens, 50).T, random_tensor(tokens, 1, 30)[:, 0].T
    total = torch.ones(50, 30)
    with torch.no_grad():
        products.add_sum(total[5:, 3:], left[5:], right[3:].contiguous())
    expected = torch.ones(50, 30)
    expected[5:, 3:] += left[5:] @ right[3:].T
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


def test_products_in_bfloat16_round_factors_only_inside_the_block() -> None:
    cpu, mkldnn = torch.device("cpu"), torch.backends.mkldnn
    x, weight = random_tensor(300, 512), random_tensor(64, 512)
    exact = products.linear(x.double(), weight.double())
    with torch.no_grad():
        for inside in (False, True, False):
            context = products.in_bfloat16(cpu if inside else torch.device("cuda"))  # on a GPU it changes nothing
            with context:
                error = (products.linear(x, weight) - exact).norm() / exact.norm()
            rounds = inside and products._multiplies_bfloat16()
            assert (1e-4 < error < 5e-3) if rounds else error < 1e-6
    with pytest.raises(KeyError), products.in_bfloat16(cpu):
        raise KeyError
    assert mkldnn.matmul.fp32_precision == "none"  # type: ignore[attr-defined]
