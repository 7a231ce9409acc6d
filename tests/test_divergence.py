"""The divergence of two models' predictions, and its gradient."""

import pytest
import torch
from torch.nn import functional

from fptq.quantize.divergence import divergence

WANTED = 3 * torch.randn(2, 5, 1000, generator=torch.Generator().manual_seed(0))
LOGITS = WANTED + torch.randn(2, 5, 1000, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_and_its_gradient_are_the_textbooks(dtype: torch.dtype) -> None:
    wanted, weights = WANTED.to(dtype), torch.rand(2, 5, generator=torch.Generator().manual_seed(2))
    logits = LOGITS.to(dtype, copy=True).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    textbook = functional.kl_div(
        exact.log_softmax(-1), wanted.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    (textbook * weights).sum().backward()
    found = divergence(logits, wanted)
    (found * weights).sum().backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), textbook, rtol=1e-5, atol=0)
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(
        logits.grad.double(), exact.grad, rtol=2**-8 if dtype == torch.bfloat16 else 1e-4, atol=1e-8
    )


def test_models_that_agree_have_none() -> None:
    logits = WANTED.clone().requires_grad_()
    found = divergence(logits, WANTED)
    found.sum().backward()
    assert logits.grad is not None
    assert not found.any()
    assert not logits.grad.any()
    assert not divergence(logits, WANTED + 5).detach().abs().gt(1e-5).any()  # a shift is no other distribution
