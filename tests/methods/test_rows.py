from __future__ import annotations

import pytest
import torch

from nc_audit.methods import rows
from nc_audit.methods.rows import paired_products, rows_at


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(0,), (5,), (2, 3)])
def test_rows_are_what_indexing_gives(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.arange(28).reshape(7, 4).to(dtype)
    at = torch.randint(7, shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rows_at(values, at), values[at])
    assert torch.equal(rows_at(values[:, 1], at), values[:, 1][at])


def test_products_of_pairs_are_the_same_however_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    one, other = torch.randn(5, 3, generator=generator), torch.randn(6, 3, generator=generator)
    x, y = torch.randint(5, (11,), generator=generator), torch.randint(6, (11,), generator=generator)
    expected = (one @ other.T)[x, y]
    for num in (2, 11, 100):
        monkeypatch.setattr(rows, "_PAIRS_AT_ONCE", num)
        torch.testing.assert_close(paired_products(one, other, x, y), expected)
