"""Steps against torch's own optimiser and schedule, bit for bit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from nc_audit.errors import TrainingError
from nc_audit.train.steps import BETA, BETA_AT_PEAK, END, START, Steps, one_cycle


def torchs_own(parameters, total, lr, warm_up, decay, losses):
    """The parameters after the same steps by torch's objects."""
    matrices, others = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}],
        lr=lr,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=lr, total_steps=total + 1, pct_start=warm_up
    )
    for loss in losses:
        optimiser.zero_grad(set_to_none=True)
        loss(parameters).backward()
        optimiser.step()
        schedule.step()


@given(
    st.integers(1, 40),
    st.floats(0, 1),
    st.floats(1e-5, 1),
    st.floats(0, 0.5),
    st.integers(0, 2**31),
)
def test_steps_are_those_of_adamw_under_one_cycle(total, warm_up, lr, decay, seed):
    assume(abs(warm_up * (total + 1) - 1) > 1e-9)  # where torch divides by zero
    torch.manual_seed(seed)
    start = [torch.randn(3, 4), torch.randn(4), torch.randn(2, 3, 3), torch.randn(())]
    targets = torch.randn(total, 4)

    def loss_at(step):
        # The last matrix gets a gradient at some steps only.
        def loss(p):
            error = (p[0].sum(0) * p[1] - targets[step]).square().sum() * p[3]
            return error + (p[2].square().sum() if step % 3 == 0 else 0)

        return loss

    ours, theirs = ([nn.Parameter(one.clone()) for one in start] for _ in range(2))
    steps = Steps([ours[0], ours[2]], [ours[1], ours[3]], total, lr, warm_up, decay)
    for step in range(total):
        steps.take(loss_at(step)(ours))
    torchs_own(theirs, total, lr, warm_up, decay, [loss_at(step) for step in range(total)])
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_the_cycle_rises_to_its_peak_and_ends_low():
    cycle = [one_cycle(step, 100, 0.3, 2.0) for step in range(100)]
    rates, betas = zip(*cycle, strict=True)
    assert rates[0] == pytest.approx(2 * START)
    assert max(rates) == pytest.approx(2, abs=1e-3)
    assert rates[-1] == pytest.approx(2 * END)
    assert rates.index(max(rates)) == betas.index(min(betas)) == 29
    assert (betas[0], min(betas), betas[-1]) == pytest.approx((BETA, BETA_AT_PEAK, BETA), abs=1e-4)


def test_a_warm_up_of_one_step_is_no_division_by_zero():
    assert one_cycle(0, 10, 0.1, 1.0) == pytest.approx((1.0, BETA_AT_PEAK))


def test_a_loss_that_is_not_finite_is_refused_with_the_step():
    parameter = nn.Parameter(torch.ones(2, 2))
    steps = Steps([parameter], [], 5, 0.5, 0.5, 0.0)
    steps.take(parameter.sum())
    with pytest.raises(TrainingError) as caught:
        steps.take(parameter.sum() * float("nan"))
    assert caught.value.message == "loss is nan at step 1 (lr 0.26)"


def test_training_does_not_import_torchs_compiler():
    code = """
import sys, torch
from torch import nn
from nc_audit.train.steps import Steps
one = nn.Parameter(torch.ones(2, 2))
Steps([one], [], 1, 0.1, 0.3, 0.0).take(one.sum())
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
