"""R-Drop against its formula over full logits, differentiated by autograd."""

import pytest
import torch
import torch.nn.functional as F

from fttrain.objectives import logps
from fttrain.objectives.r_drop import r_drop

WEIGHT = 0.7


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_r_drop_is_its_formula_and_so_is_its_gradient(smoothing: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logps, "CHUNK", 5)
    torch.manual_seed(4)
    one, two = (torch.randn(13, 8, requires_grad=True) for _ in range(2))
    head, targets = torch.nn.Linear(8, 50), torch.randint(0, 50, (13,))
    ours = r_drop((one, two), targets, head, weight=WEIGHT, smoothing=smoothing, chunks=4)

    first, second = F.log_softmax(head(one), -1), F.log_softmax(head(two), -1)
    nll = sum(F.nll_loss(logp, targets, reduction="none") for logp in (first, second))
    if smoothing:
        nll = (1 - smoothing) * nll - smoothing * (first.mean(-1) + second.mean(-1))
    divergence = sum(
        F.kl_div(q, p, log_target=True, reduction="none").sum(-1) for p, q in ((first, second), (second, first))
    )
    theirs = nll / 2 + WEIGHT / 2 * divergence
    torch.testing.assert_close(ours.losses_N, theirs)
    torch.testing.assert_close(ours.divergence_N, divergence.detach())
    wanted = (one, two, head.weight)
    for mine, other in zip(
        torch.autograd.grad(ours.losses_N.sum(), wanted), torch.autograd.grad(theirs.sum(), wanted), strict=True
    ):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_equal_passes_without_rows_cost_nothing():
    hidden = torch.randn(0, 8, requires_grad=True)
    empty = r_drop(
        (hidden, hidden), torch.zeros(0, dtype=torch.long), torch.nn.Linear(8, 50), weight=1.0, smoothing=0.0, chunks=2
    )
    empty.losses_N.sum().backward()
    assert empty.losses_N.numel() == 0
