"""PyTorch's attention and the masks that programs write."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hawq_tvm as ht
from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.torch import import_exported

from .programs import IN_SCALE, IN_ZERO, OUT_SCALE, Between, dequantize, export, quantize, torch
from .test_operators import check

F = torch.nn.functional
Q, K, FEW = (2, 4, 5, 8), (2, 4, 7, 8), (2, 2, 7, 8)
RNG = np.random.default_rng(2)
SEEN = torch.tensor(np.random.default_rng(1).random((5, 7)) < 0.7)
SEEN[:, 0] = True
# 15 bits of each of 7 probabilities times values of up to 6, in steps of 0.03.
LOSSY = 0.03


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.2},
        {"attn_mask": SEEN},
        {"attn_mask": torch.where(SEEN, 0.5, -torch.inf)},
        {"attn_mask": torch.where(SEEN, 0.5, -1.0)},
    ],
)
def test_attention(options: dict[str, Any]) -> None:
    def attended(q: Any, k: Any, v: Any) -> Any:
        mask = options.get("attn_mask")
        given = options if mask is None or mask.dtype == torch.bool else {"attn_mask": mask.to(q.dtype)}
        return F.scaled_dot_product_attention(q, k, v, **given)

    check(attended, Q, K, K, lossy=LOSSY)


def test_fewer_heads() -> None:
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), Q, FEW, FEW, lossy=LOSSY)
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), Q[1:], K[1:], K[1:], lossy=LOSSY)


MASKS = {
    "ones": lambda n: ~torch.ones(n, n, dtype=torch.bool).tril(),
    "places": lambda n: torch.arange(n)[:, None] < torch.arange(n),
    "numbers": lambda n: torch.full((n, n), 1.5).triu(diagonal=1) > 1,
    "logic": lambda n: torch.logical_not(torch.zeros(n, n, dtype=torch.int64).eq(0)) | torch.full((n, n), True).triu(1),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("value", [-3.0, -torch.inf])
def test_masks_that_programs_make(mask: str, value: float) -> None:
    made = MASKS[mask]
    check(lambda x: torch.softmax(x.masked_fill(made(6), value), -1), (2, 6, 6), out_scale=1 / 124, lossy=0.1)
    check(lambda x: torch.softmax(torch.where(made(6), value, x), -1), (2, 6, 6), out_scale=1 / 124, lossy=0.1)


def test_a_mask_of_numbers_that_is_added() -> None:
    check(lambda x: x + torch.zeros_like(x) + x.new_full((6,), 0.5) + torch.ones(6, dtype=x.dtype), (2, 6, 6))


class Words(torch.nn.Module):  # type: ignore[misc]
    """Attention of words that are there, and not of what comes later."""

    def forward(self, x: Any, mask: Any) -> Any:
        x = dequantize(quantize(x, IN_SCALE, IN_ZERO), IN_SCALE, IN_ZERO)
        seen = mask.to(torch.bool)[:, None, :] & torch.ones(6, 6, dtype=torch.bool).tril()
        return quantize(F.scaled_dot_product_attention(x, x, x, attn_mask=seen), OUT_SCALE, 131)


def test_words_that_are_there() -> None:
    x = torch.tensor(RNG.uniform(-2, 2, (2, 6, 8)).astype(np.float32))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    package = ht.compile(torch.export.export(Words().eval(), (x, mask)))
    feed = dict(zip([i.name for i in package.inputs], (x.numpy(), mask.numpy()), strict=True))
    (got,) = package.run(feed).values()
    wanted = Words()(x, mask).numpy()
    assert np.max(np.abs(got.astype(int) - wanted)) <= 1 and np.mean(got != wanted) < 0.02
    assert np.all(got[1, 0] == 131)  # it sees nothing
    assert package.verify(random=1, seed=0).ok and package.prove().ok


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda x: torch.where(x > 1, x, -x), "compares real numbers"),
        (lambda x: x.tril(), "has a matrix"),
        (lambda x: x + torch.zeros(5000, 5000)[0, :6], "very large constant"),
    ],
)
def test_refusals(function: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        import_exported(export(Between(function), (2, 6, 6)))
