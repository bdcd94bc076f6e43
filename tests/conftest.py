"""Fixtures for all tests: fixed seeds, a small set of pairs with planted noise, and its training."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from planted import QUICK, Planted, inputs_of, planted_set

from nc_audit.train.self_paced import Trained, train_robustly

# Derandomised: a failure is a failure for everybody, at every run.
settings.register_profile(
    "nc_audit",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("nc_audit")

# readline, which pytest imports, leaves a terminal's size to the processes that test, and output would be folded to it.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def planted() -> Planted:
    return planted_set()


@pytest.fixture(scope="session")
def trained(planted: Planted) -> Trained:
    return train_robustly(inputs_of(planted, QUICK, 300), QUICK)


@pytest.fixture(scope="session")
def planted_without_noise() -> Planted:
    return planted_set(rate=0.0)
