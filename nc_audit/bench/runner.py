"""The bench: a dataset, kinds and rates of known noise, seeds and recipes; every cell measured once, then tabled.

A bench folder holds the embeddings, the injected datasets with their truth (`known_noise`), and `results.jsonl`, one
line per cell and recipe. What stands there is not measured again, so a killed bench goes on where it stopped.

Shapes: P = distinct pairs.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from nc_audit import __version__
from nc_audit.bench.corpus import Corpus, Corrupted, Split
from nc_audit.bench.downstream import downstream
from nc_audit.bench.inject import KINDS, MAX_RATE, RULES
from nc_audit.bench.measure import Verdict, detection, run_recipe
from nc_audit.bench.retrieval import recall_at_k
from nc_audit.dataset import ImageStore, check_exists, load_pairs
from nc_audit.embed import EmbeddingStore
from nc_audit.encoders import EncoderPlan, load_encoders
from nc_audit.errors import RecipeError, nearest
from nc_audit.pipeline import load_options, plan_of
from nc_audit.recipe import Recipe, build_recipe
from nc_audit.run import Run, digest_of, write_parquet, writing

RESULTS = "results.jsonl"
CUT = " #cut"
"""Ends a line that a kill left unfinished, once a later bench has found it."""


class Watcher(Protocol):
    """Who is told what happens."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def progress(self, what: str, done: int, total: int | None) -> None:
        """How far it is."""


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Attributes:
        kinds: of noise (`inject.KINDS`).
        rates: 0..0.95; rate 0 is measured once, whatever the kinds.
        recipes: names or files; `NAME+section.key=value` changes settings.
        seeds: each draws its own noise and its own training.
        test_split: rows of this split stay clean and untrained, and retrieval is measured on them.
        with_downstream: also train plain models on what the recipe would export.
        trusted_share: share of the clean pairs given to recipes that need trusted ones.
    """

    kinds: tuple[str, ...] = ("caption",)
    rates: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8)
    recipes: tuple[str, ...] = ("self_paced", "similarity")
    seeds: tuple[int, ...] = (0,)
    test_split: str | None = None
    with_downstream: bool = False
    trusted_share: float = 0.2

    def cells(self) -> Iterator[tuple[str, float, int]]:
        """Kind, rate and seed of every cell, seed by seed, so that a first table stands early."""
        for seed in self.seeds:
            for rate in self.rates:
                for kind in self.kinds if rate > 0 else ("none",):
                    yield kind, rate, seed


@dataclass(frozen=True)
class Layers:
    """What every recipe of a bench starts from: recipes, options of the command by section, overrides."""

    base: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()

    def recipe(self, spec: str, seed: int = 0) -> Recipe:
        """The recipe of a bench column: a column's own recipe, then the shared layers, its own changes, its seed.

        Args:
            spec: `NAME` or `NAME+section.key=value+...`.
            seed: of training.

        Raises:
            RecipeError: unknown, or with every problem it has.
        """
        name, *changes = spec.split("+")
        return build_recipe(
            [name, *self.base], [*self.overrides, *changes, f"train.seed={seed}"], dict(self.settings)
        )


def bench_dataset(
    dataset: Path,
    out: Path,
    grid: Grid,
    *,
    base: tuple[str, ...] = (),
    settings: Mapping[str, Any] | None = None,
    overrides: tuple[str, ...] = (),
    device: str = "auto",
    precision: str = "auto",
    watch: Watcher,
) -> list[dict[str, Any]]:
    """Load a dataset, take it as clean, and bench it; see `bench` and `Grid`.

    Args:
        dataset: folder or file.
        out: the bench folder; embeddings and results in it are used again.
        grid: what to measure.
        base: recipes that every column starts from.
        settings: options of the command by recipe section.
        overrides: `section.key=value` strings.
        device: auto, cpu or cuda.
        precision: auto, fp32 or bf16.
        watch: told what happens.

    Raises:
        AuditError: of the kind that went wrong.
    """
    check_exists(dataset)
    if not grid.recipes or not grid.rates or not grid.kinds:
        raise RecipeError("nothing to measure", "name at least one of --recipes, --rates and --kinds")
    if grid.with_downstream and grid.test_split is None:
        raise RecipeError("--downstream needs clean pairs to compare on", "name them with --test-split")
    for rate in grid.rates:
        if not 0 <= rate <= MAX_RATE:
            raise RecipeError(
                f"a noise rate must lie between 0 and {MAX_RATE}, got {rate}", "0.2, 0.4 are usual"
            )
    for kind in grid.kinds:
        if kind not in KINDS:
            raise RecipeError(f"unknown kind of noise {kind!r}", nearest(kind, KINDS))
    layers = Layers(base, settings or {}, overrides)
    if any(layers.recipe(spec).train.towers == "full" for spec in grid.recipes):
        raise RecipeError('the bench trains on frozen embeddings, not train.towers = "full"', "leave it out")
    recipes = [
        layers.recipe(spec) for spec in grid.recipes
    ]  # a wrong one is told before anything is embedded
    plan = plan_of(recipes[0], device, precision)
    for note in plan.notes:
        watch.note(note)
    loaded = load_pairs(
        dataset,
        load_options(recipes[0], out / "downloads"),
        lambda done, total: watch.progress("load", done, total),
    )
    watch.note(loaded.layout)
    return bench(loaded.pairs, ImageStore(loaded.roots), plan, grid, out, layers, watch)


def bench(
    pairs: pa.Table,
    images: ImageStore,
    plan: EncoderPlan,
    grid: Grid,
    out: Path,
    layers: Layers,
    watch: Watcher,
) -> list[dict[str, Any]]:
    """Measure every cell of a grid that the folder does not hold yet.

    Args:
        pairs: the dataset's `pairs` table.
        images: reads its images.
        plan: the encoders.
        grid: what to measure.
        out: the bench folder.
        layers: what every recipe starts from.
        watch: told what happens.

    Returns:
        The results of the grid, in its order.
    """
    store = EmbeddingStore(out / "embeddings")
    batch_size = layers.recipe(grid.recipes[0]).image.batch
    with Run(out).locked():  # several benches may measure in one folder, but not embed into it
        with writing(store.folder):
            store.folder.mkdir(exist_ok=True)
        encoders = load_encoders(plan)
        corpus = Corpus(
            pairs,
            encoders,
            images.read,
            store,
            test_split=grid.test_split,
            batch_size=batch_size,
            progress=watch.progress,
        )
    known = {one["key"]: one for one in read_results(out)}
    data = digest_of([sorted(corpus.image_ids), corpus.captions, grid.test_split])
    jobs = [(cell, spec) for cell in grid.cells() for spec in grid.recipes]
    results: list[dict[str, Any]] = []
    made: tuple[tuple[str, float, int], Corrupted] | None = None
    for done, (cell, spec) in enumerate(jobs):
        watch.progress("bench", done, len(jobs))
        kind, rate, seed = cell
        recipe = layers.recipe(spec, seed)
        rule = [RULES[kind]] if kind in RULES else []
        key = digest_of([__version__, data, plan.facts(), *cell, *rule, *_what_counts(recipe, grid)])
        if key not in known:
            if made is None or made[0] != cell:
                injected = corpus.inject(kind if kind != "none" else "caption", rate, seed)
                write_parquet(corpus.table(injected), out / "injected" / f"{kind}-{rate:g}-{seed}.parquet")
                made = (cell, corpus.corrupted(injected))
            corrupted = made[1]
            verdict = run_recipe(
                corrupted,
                recipe,
                logit_scale=encoders.logit_scale,
                precision=plan.precision,
                device=plan.device,
                trusted_share=grid.trusted_share,
                tokens=corpus.tokens,
            )
            result: dict[str, Any] = {
                "key": key,
                "recipe": spec,
                "kind": kind,
                "rate": rate,
                "seed": seed,
                **detection(verdict, corrupted, recipe),
            }
            if grid.test_split is not None:
                result["retrieval"] = _retrieval(verdict, corpus.test_set(corrupted.text_encoder))
                if grid.with_downstream:
                    result["downstream"] = downstream(
                        verdict, corrupted, corpus.test_set(corrupted.text_encoder), recipe
                    )
            known[key] = _plain(result)
            _append(out, known[key])
        results.append(known[key])
    watch.progress("bench", len(jobs), len(jobs))
    return results


def _what_counts(recipe: Recipe, grid: Grid) -> list[Any]:
    """What a result depends on beside the data and the cell."""
    score = recipe.score.model_dump(mode="json")
    if (
        recipe.train.method != "self_paced"
    ):  # others bring scores of their own; neighbours are for reasons only
        score = {"candidates": recipe.score.candidates}
    return [
        recipe.train.settings_in_use(),
        score,
        recipe.tag.model_dump(mode="json"),
        grid.with_downstream,
        grid.trusted_share if recipe.train.needs_trusted else None,
    ]


def _retrieval(verdict: Verdict, test: Split) -> dict[str, float]:
    """R@K of the recipe's model on the clean test split."""
    with torch.inference_mode():
        image, caption = verdict.model.embed(test.image_ID, test.caption_CD)
    return recall_at_k(image, caption, test.pairs.image_N, test.pairs.caption_N).columns()


def read_results(out: Path) -> list[dict[str, Any]]:
    """All results a bench folder holds; what a kill cut off, and was marked as such since, does not count.

    Raises:
        RecipeError: a line is no result.
    """
    path = out / RESULTS
    if not path.is_file():
        return []
    results = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            results.append(json.loads(line))
        except ValueError as problem:
            if number < len(lines) and not line.endswith(CUT):
                raise RecipeError(f"{path}: line {number} is no result", "move the file away") from problem
    return results


def _append(out: Path, result: dict[str, Any]) -> None:
    """One line more, whole or not at all; several benches may share a folder."""
    with writing(out / RESULTS), (out / RESULTS).open("ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        line = (json.dumps(result) + "\n").encode()
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            line = f"{CUT}\n".encode() + line
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(file.fileno(), rest) :]
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def _plain(value: Any) -> Any:
    """JSON-able, with null for what is no number."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (float, np.floating)):
        return None if np.isnan(value) else round(float(value), 6)
    return value.item() if isinstance(value, np.generic) else value
