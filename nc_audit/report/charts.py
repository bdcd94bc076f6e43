"""Charts of a report as SVG text: histograms, curves over epochs, reliability, bars.

Colours come from the page's style by class, so that one drawing serves light and dark. Every chart has a title, named
axes and a text alternative; every tag also has its own dash, because colour alone is not seen by everybody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from nc_audit.report.text import plain

_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 14, 48


@dataclass(frozen=True)
class Axis:
    """One axis: what it shows with its unit, and its range, `low` < `high`; `is_whole` where only whole numbers mean
    something, such as counts."""

    label: str
    low: float
    high: float
    is_whole: bool = False

    def ticks(self, count: int) -> list[float]:
        """Round numbers within the axis."""
        found = ticks(self.low, self.high, count)
        return [one for one in found if one == int(one)] if self.is_whole else found


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within a range, at most about `count` + 1 of them, rising.

    Example:
        >>> ticks(0, 1)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    rough = (high - low) / count
    if not (math.isfinite(rough) and rough > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def padded(values: np.ndarray) -> tuple[float, float]:
    """A range that holds all finite values and is never empty."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


class _Frame:
    """The coordinates of a chart, and its parts so far."""

    def __init__(self, x: Axis, y: Axis) -> None:
        self.x, self.y = x, y
        self.parts: list[str] = []
        self._axes()

    def at_x(self, value: float) -> float:
        return _LEFT + (value - self.x.low) / (self.x.high - self.x.low) * (_WIDTH - _LEFT - _RIGHT)

    def at_y(self, value: float) -> float:
        share = (value - self.y.low) / (self.y.high - self.y.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def _axes(self) -> None:
        bottom = _HEIGHT - _BOTTOM
        for value in self.y.ticks(4):
            y = self.at_y(value)
            self.line(_LEFT, y, _WIDTH - _RIGHT, y, "grid")
            self.text(_LEFT - 8, y + 4, number(value), "tick end")
        for value in self.x.ticks(5):
            self.text(self.at_x(value), bottom + 18, number(value), "tick mid")
        self.line(_LEFT, bottom, _WIDTH - _RIGHT, bottom, "axis")
        self.text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 7, self.x.label, "label mid")
        middle = (_TOP + bottom) / 2
        self.parts.append(
            f'<text class="label mid" transform="translate(15 {middle:.1f}) rotate(-90)">'
            f"{_text(self.y.label)}</text>"
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.parts.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def text(self, x: float, y: float, text: str, kind: str) -> None:
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{_text(text)}</text>')

    def path(self, points: Sequence[tuple[float, float]], kind: str, *, closed: bool = False) -> None:
        if points:
            steps = "L".join(f"{self.at_x(x):.1f} {self.at_y(y):.1f}" for x, y in points)
            self.parts.append(f'<path class="{kind}" d="M{steps}{"Z" if closed else ""}"/>')

    def rect(self, x1: float, x2: float, low: float, high: float, kind: str) -> None:
        left, right, top = self.at_x(x1), self.at_x(x2), self.at_y(high)
        width, height = max(right - left - 0.6, 0.6), self.at_y(low) - top
        if height > 0:
            self.parts.append(
                f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
            )

    def marks(self, marks: Mapping[str, float]) -> None:
        """Vertical lines with their names, inside the range only."""
        for index, (name, value) in enumerate(marks.items()):
            if self.x.low <= value <= self.x.high:
                x = self.at_x(value)
                self.line(x, _TOP, x, _HEIGHT - _BOTTOM, "mark")
                on_left = x > (_LEFT + _WIDTH) * 0.6
                self.text(
                    x + (-5 if on_left else 5),
                    _TOP + 10 + 13 * (index % 2),
                    name,
                    "tick end" if on_left else "tick",
                )

    def svg(self, title: str, alternative: str) -> str:
        return (
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(f"{title}. {alternative}")}">'
            + "".join(self.parts)
            + "</svg>"
        )


def number(value: float) -> str:
    """A number for an axis: grouped thousands, no needless zeros."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def counted(count: int, noun: str = "pair") -> str:
    """A count with its noun.

    Example:
        >>> counted(1), counted(2000)
        ('1 pair', '2,000 pairs')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _text(text: str) -> str:
    return escape(plain(text), quote=True)


def histogram(
    title: str,
    label: str,
    values: Mapping[str, np.ndarray],
    *,
    limits: tuple[float, float] | None = None,
    marks: Mapping[str, float] | None = None,
    stacked: bool = False,
    bins: int = 40,
) -> str:
    """The distribution of a quantity, by tag.

    Args:
        title: what the chart is of.
        label: name of the horizontal axis with its unit.
        values: numbers by tag; not finite ones are left out.
        limits: range of the horizontal axis; that of the values when not given.
        marks: vertical lines by name, such as thresholds.
        stacked: one tag on the other; otherwise each from the bottom. Both count pairs.
        bins: how many intervals of equal width, 1..
    """
    finite = {tag: one[np.isfinite(one)] for tag, one in values.items()}
    finite = {tag: one for tag, one in finite.items() if len(one)}
    everything = np.concatenate(list(finite.values())) if finite else np.empty(0)
    low, high = limits or padded(everything)
    edges = np.linspace(low, high, bins + 1)
    counts = {tag: np.histogram(one, edges)[0].astype(float) for tag, one in finite.items()}
    if stacked:
        top = float(np.sum(list(counts.values()), axis=0).max()) if counts else 1.0
    else:
        top = max((float(one.max()) for one in counts.values()), default=1.0)
    frame = _Frame(Axis(label, low, high), Axis("pairs", 0, max(top, 1) * 1.05, is_whole=True))
    below = np.zeros(bins)
    for tag, one in counts.items():
        if stacked:
            for index in np.flatnonzero(one).tolist():
                base = float(below[index])
                frame.rect(edges[index], edges[index + 1], base, base + float(one[index]), f"fill {tag}")
            below += one
        else:
            outline = [(edges[0], 0.0)]
            for index, height in enumerate(one.tolist()):
                outline += [(edges[index], height), (edges[index + 1], height)]
            outline.append((edges[-1], 0.0))
            frame.path(outline, f"area {tag}", closed=True)
            frame.path(outline[1:-1], f"line {tag}")
    frame.marks(marks or {})
    told = ", ".join(f"{tag} {counted(len(one))}, median {np.median(one):.3g}" for tag, one in finite.items())
    return frame.svg(title, f"{label}: {told or 'no values'}")


def curves(title: str, label: str, quartiles: Mapping[str, np.ndarray]) -> str:
    """A quantity over the epochs, by tag: the median as a line, the middle half as a band.

    Args:
        title: what the chart is of.
        label: name of the vertical axis with its unit.
        quartiles: by tag lower quartile, median and upper quartile, shape [epochs, 3].
    """
    shown = {tag: one for tag, one in quartiles.items() if len(one) and np.isfinite(one).any()}
    epochs = max((len(one) for one in shown.values()), default=1)
    _, high = padded(np.concatenate([one.ravel() for one in shown.values()]) if shown else np.empty(0))
    frame = _Frame(Axis("epoch", 1, max(epochs, 2), is_whole=True), Axis(label, 0, max(high * 1.05, 1e-6)))
    for tag, one in shown.items():
        steps = range(1, len(one) + 1)
        band = [(float(at), float(one[at - 1, 0])) for at in steps]
        band += [(float(at), float(one[at - 1, 2])) for at in reversed(steps)]
        frame.path(band, f"area {tag}", closed=True)
        frame.path([(float(at), float(one[at - 1, 1])) for at in steps], f"line {tag}")
    told = ", ".join(f"{tag} from {one[0, 1]:.3g} to {one[-1, 1]:.3g}" for tag, one in shown.items())
    return frame.svg(title, f"median {label} from the first to the last epoch: {told or 'no values'}")


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share that was seen in `count` >= 1 cases.

    Example:
        >>> [round(end, 3) for end in wilson(0.5, 10)]
        [0.237, 0.763]
    """
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def reliability(title: str, probability: np.ndarray, is_noise: np.ndarray, bins: int = 10) -> str:
    """Observed share of noise against the probability that was stated; on the diagonal the two agree.

    Each point has its 95 % Wilson interval and the number of its pairs.

    Args:
        title: what the chart is of.
        probability: noise probability of each judged pair, shape [N], 0..1.
        is_noise: what it truly is, shape [N], bool.
        bins: how many intervals of equal width, 1..
    """
    frame = _Frame(Axis("stated noise probability", 0, 1), Axis("observed share of noise", 0, 1))
    frame.path([(0, 0), (1, 1)], "mark")
    place = np.minimum((probability * bins).astype(int), bins - 1)
    points: list[tuple[float, float, int]] = []
    told = []
    for index in range(bins):
        inside = place == index
        if inside.any():
            stated, observed = float(probability[inside].mean()), float(is_noise[inside].mean())
            points.append((stated, observed, int(inside.sum())))
            told.append(f"{stated:.2f} stated, {observed:.2f} observed ({counted(int(inside.sum()))})")
    frame.path([(stated, observed) for stated, observed, _ in points], "line noisy")
    for stated, observed, count in points:
        x = frame.at_x(stated)
        low, high = wilson(observed, count)
        frame.line(x, frame.at_y(low), x, frame.at_y(high), "axis")
        frame.parts.append(f'<circle class="fill noisy" cx="{x:.1f}" cy="{frame.at_y(observed):.1f}" r="4"/>')
        # Beside the point, on the side away from the diagonal and inside the frame.
        on_left = observed > stated or x > _WIDTH - _RIGHT - 40
        frame.text(
            x + (-7 if on_left else 7), frame.at_y(observed) + 4, f"{count:,}", f"tick{' end' * on_left}"
        )
    return frame.svg(title, "; ".join(told) or "no judged pairs")
