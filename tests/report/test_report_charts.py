"""Charts: what they draw, what they say in words, and that names in them stay text."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.report.charts import curves, histogram, padded, reliability, ticks

HOSTILE = "\"><script>alert(1)</script>&amp;\x1b'"


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_rising_and_inside(low, width):
    found = ticks(low, low + width)
    assert 1 <= len(found) <= 7
    assert found == sorted(found)
    slack = 1e-6 * max(1, abs(low), width)
    assert low - slack <= found[0]
    assert found[-1] <= low + width + slack


@pytest.mark.parametrize(
    ("values", "expected"), [([], (0, 1)), ([np.nan], (0, 1)), ([2, 2], (1.5, 2.5)), ([1, np.inf, 3], (1, 3))]
)
def test_a_range_is_never_empty(values, expected):
    assert padded(np.array(values, float)) == expected


def test_a_stacked_histogram_draws_every_pair_and_its_thresholds():
    values = {"clean": np.array([0.05, 0.05, np.nan]), "noisy": np.array([0.05, 0.95])}
    drawing = histogram(
        "P", "p", values, limits=(0, 1), marks={"noisy at": 0.8, "off": 7.0}, stacked=True, bins=10
    )
    root = ElementTree.fromstring(drawing)
    heights = [float(one.get("height")) for one in root.iter("rect")]
    assert heights == pytest.approx([2 * heights[1], heights[1], heights[1]], abs=0.2)
    assert "noisy at" in drawing
    assert "off" not in drawing
    assert root.get("aria-label") == "P. p: clean 2 pairs, median 0.05, noisy 2 pairs, median 0.5"


def test_names_in_a_chart_stay_text():
    for drawing in (
        histogram(HOSTILE, HOSTILE, {"clean": np.array([1.0])}, marks={HOSTILE: 1.0}),
        curves(HOSTILE, HOSTILE, {"clean": np.ones((2, 3))}),
        reliability(HOSTILE, np.array([0.5]), np.array([True])),
    ):
        root = ElementTree.fromstring(drawing)
        assert "script" not in {element.tag for element in root.iter()}
        assert r"\x1b" in drawing


def test_charts_without_values_say_so():
    assert "no values" in histogram("a", "b", {"clean": np.array([np.nan])})
    assert "no values" in curves("a", "b", {})
    assert "no judged pairs" in reliability("a", np.empty(0), np.empty(0, bool))


def test_epochs_and_counts_are_whole_numbers():
    drawing = curves("c", "loss", {"clean": np.ones((3, 3))}) + histogram(
        "h", "x", {"clean": np.array([5.0])}
    )
    root = ElementTree.fromstring(f"<all>{drawing}</all>")
    epochs, counts = (
        [one.text for one in chart.iter("text") if one.get("class") == kind]
        for chart, kind in zip(root, ("tick mid", "tick end"), strict=True)
    )
    assert epochs == ["1", "2", "3"]
    assert counts == ["0", "1"]


def test_a_rare_tag_is_drawn_as_low_as_it_is_rare():
    drawing = histogram("h", "x", {"clean": np.full(100, 0.1), "noisy": np.array([0.9])}, limits=(0, 1))
    assert "share" not in drawing
    assert "clean 100 pairs, median 0.1, noisy 1 pair, median 0.9" in drawing


def test_reliability_tells_stated_and_observed():
    drawing = reliability("r", np.array([0.9, 0.92, 0.1]), np.array([True, False, False]))
    assert "0.10 stated, 0.00 observed (1 pair); 0.91 stated, 0.50 observed (2 pairs)" in drawing
