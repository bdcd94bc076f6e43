"""The stages of `score` in order: what each needs, what it makes, and when it is already done.

load -> embed -> train -> score -> tag. Stages meet in the run directory only: each reads what the one before wrote,
so that a resumed run goes the very way of an undisturbed one. A stage is done when the manifest lists it under the
key of its inputs; the key chains the keys before it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nc_audit import __version__
from nc_audit.dataset import (
    Folded,
    ImageStore,
    LoadOptions,
    check_exists,
    fold,
    load_pairs,
    mark_corrupt,
    read_trusted,
    root_of,
)
from nc_audit.decisions import Decision, read_decisions
from nc_audit.errors import AuditError, DatasetError, RecipeError, RunError
from nc_audit.process import give_back_memory
from nc_audit.recipe import Recipe
from nc_audit.run import LOCK, MANIFEST, Run, digest_of, file_digest, write_parquet
from nc_audit.schema import FINDING_KINDS, METHOD_COLUMNS, SCORES, TRAJECTORY
from nc_audit.tag import (
    MODEL,
    NEEDED_PAIRS,
    NEEDED_SCORES,
    Thresholds,
    tag_scores,
    threshold_for_precision,
    thresholds_in_use,
)
from nc_audit.team import ALONE, Team

if TYPE_CHECKING:
    from torch import Tensor

    from nc_audit.embed import Embeddings
    from nc_audit.encoders import EncoderPlan
    from nc_audit.methods.matching import Pairs
    from nc_audit.rivals import Reach
    from nc_audit.train import Trajectory
    from nc_audit.unlikely_words import UnlikelyWords

_BEFORE_THE_MANIFEST = {LOCK, f".{MANIFEST}.partial", "pairs.parquet", ".pairs.parquet.partial", "downloads"}
CUT = "cut_captions.parquet"
"""Captions of which the encoder read only the beginning."""
STAGES = ("load", "embed", "train", "score", "tag")
_SPENT = ("learn", "decode", "encode")


class Watcher(Protocol):
    """Who is told what happens while a run is made."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def warn(self, text: str) -> None:
        """Something the user must know."""

    def progress(self, what: str, done: int, total: int | None) -> None:
        """How far a stage is."""


class Silence:
    """A watcher that keeps quiet; for library use."""

    def note(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Nothing."""


def score_dataset(
    dataset: Path,
    out: Path,
    recipe: Recipe,
    *,
    recipe_names: tuple[str, ...] = (),
    device: str = "auto",
    precision: str = "auto",
    force: bool = False,
    watch: Watcher | None = None,
    given: str | None = None,
    team: Team = ALONE,
) -> dict[str, Any]:
    """Audit a dataset into a run directory, resuming what is there.

    Args:
        dataset: folder or file.
        out: run directory; made when it is not there.
        recipe: every setting.
        recipe_names: how the recipe was named, for the manifest.
        device: auto, cpu or cuda.
        precision: auto, fp32 or bf16.
        force: forget what was done and start over; human decisions stay.
        watch: told notes and progress.
        given: what the user named, where `dataset` is a copy of it here; for the manifest.
        team: processes of which this is the first; the others are in `help_embed`.

    Returns:
        The summary that also stands in the manifest, and as `did` the stages that were not done before.

    Raises:
        AuditError: of the kind that went wrong.
    """
    from nc_audit.rivals import check_search

    check_exists(dataset)
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file", "give a folder with --out")
    if out.is_dir() and not _is_ours(out):
        raise RunError(f"{out} is not empty and not a run", "give another --out; nothing is overwritten")
    watch = watch or Silence()
    audit = _Audit(Run(out), dataset, recipe, recipe_names, device, precision, watch, given, team)
    audit.run.check_free()  # before the encoders are looked for
    audit.hashing  # noqa: B018  meanwhile, libraries are imported
    # What cannot be had should be told before anything is written.
    plan = audit.encoder_plan
    if not (out / MANIFEST).exists():
        from nc_audit.encoders import find_weights

        find_weights(plan)
    check_search(recipe.score)
    with audit.run.locked():
        if (out / MANIFEST).exists():
            audit.run = Run.open(out)
        run = audit.run
        if force:
            run.manifest["stages"] = {}
        facts = audit.run_all()
    if not audit.has_called:
        team.agreed(None)
    return facts


def help_embed(team: Team, recipe: Recipe, device: str = "auto", precision: str = "auto") -> None:
    """Embed this process's share of what the first of the team embeds, which says for which run; nothing otherwise.

    Args:
        team: processes of which this is not the first.
        recipe: the same that the first one has.
        device: auto, cpu or cuda.
        precision: auto, fp32 or bf16.
    """
    run = team.agreed(None)
    if run is not None:
        path = Path(run)
        audit = _Audit(Run.open(path), path, recipe, (), device, precision, Silence(), None, team)
        audit.embedded()  # what it is for is what it leaves in the store


def _is_ours(out: Path) -> bool:
    """Whether a folder is a run, also one that was stopped before its manifest stood, or is empty."""
    found = {path.name for path in out.iterdir()}
    return MANIFEST in found or not found or (LOCK in found and found <= _BEFORE_THE_MANIFEST)


class _Audit:
    """One audit in progress: the run, and the values that later stages share."""

    def __init__(
        self,
        run: Run,
        dataset: Path,
        recipe: Recipe,
        recipe_names: tuple[str, ...],
        device: str,
        precision: str,
        watch: Watcher,
        given: str | None,
        team: Team,
    ) -> None:
        self.run, self.dataset, self.recipe, self.watch, self.given = run, dataset, recipe, watch, given
        self.recipe_names, self.device, self.precision = recipe_names, device, precision
        self.team, self.has_called = team, False

    def run_all(self) -> dict[str, Any]:
        key = ""
        did = []
        for stage in STAGES:
            key = digest_of([key, self._inputs(stage)])
            if self.run.is_done(stage, key) or (stage == "tag" and self._is_retagged()):
                continue
            did.append(stage)
            for later in STAGES[STAGES.index(stage) :]:
                self.run.manifest["stages"].pop(later, None)
            with self._timed() as clock:
                files, facts = getattr(self, f"_{stage}")()
            self.run.commit(stage, key, files, clock[0], **facts)
        if not did and "summary" in self.run.manifest:
            self.watch.note(f"nothing to do: {self.run.path} is complete for this dataset and recipe")
            return self.run.manifest["summary"] | {"did": did}
        self.run.manifest["tool"] = __version__
        self.run.manifest["recipe"] = {
            "name": "+".join(self.recipe_names) or "self_paced",
            "digest": self.recipe.digest(),
            "settings": self.recipe.model_dump(mode="json"),
        }
        self.run.manifest["summary"] = summarise(self.run)
        self.run.save()
        return self.run.manifest["summary"] | {"did": did}

    def _is_retagged(self) -> bool:
        """Whether a person tagged these very scores anew; their thresholds are not overwritten unasked."""
        stages = self.run.manifest["stages"]
        entry = stages.get("tag", {})
        if entry.get("retagged_from") != stages["score"]["key"] or not self.run.is_done("tag", entry["key"]):
            return False
        self.watch.note("tags are as nc-audit tag set them; --force brings the recipe's thresholds back")
        if entry["key"] != _retag_key(self.run, *thresholds_in_use(entry)):
            self.watch.note("people decided about pairs since: the tags follow")
            _commit_tags(self.run)
            self.run.manifest["summary"] = summarise(self.run)
            self.run.save()
        return True

    @contextmanager
    def _timed(self) -> Iterator[list[float]]:
        clock = [0.0]
        start = time.perf_counter()
        yield clock
        clock[0] = time.perf_counter() - start

    def _inputs(self, stage: str) -> Any:
        """What the stage depends on beyond the stages before it."""
        recipe = self.recipe
        if stage == "load":
            section = recipe.dataset.model_dump(mode="json", exclude={"trusted"})
            places = [self.dataset, *([Path(recipe.dataset.image_root)] if recipe.dataset.image_root else [])]
            return [__version__, section, [fingerprint(place, self.run.path) for place in places]]
        if stage == "embed":
            plan = self.encoder_plan
            files = [
                path for path in (plan.image_weights, plan.text_weights, _checkpoint(plan.image)) if path
            ]
            tuned = recipe.train.settings_in_use() if recipe.train.towers == "full" else None
            digests = [
                self.hashing[path].result() if path in self.hashing else file_digest(path) for path in files
            ]
            return [plan.facts(), digests, tuned]
        if stage == "train":
            known = [recipe.train.settings_in_use(), recipe.score.candidates]
            file = recipe.dataset.trusted
            if recipe.train.needs_trusted or (recipe.train.uses_trusted and file):
                known.append(file_digest(Path(file)) if file and Path(file).is_file() else file)
            if recipe.train.needs_trusted:
                known.append(self.run.decided("keep"))
            return known
        if stage == "score":
            found = self._found_by_people()
            return [
                recipe.score.model_dump(mode="json"),
                "findings 2",
                *(["faiss"] if self.reach.has_index else []),
                *([sorted(found.items())] if found else []),
            ]
        return _tag_inputs(self.run, recipe.tag.model_dump(mode="json"))

    # --- shared values

    @cached_property
    def folded(self) -> Folded:
        return fold(self.run.table("pairs"))

    @cached_property
    def images(self) -> ImageStore:
        return open_images(self.run)

    @cached_property
    def hashing(self) -> dict[Path, Future[str]]:
        """SHA-256 of each weights file that the recipe names, in the making."""
        sides = (self.recipe.image, self.recipe.text)
        named = {_checkpoint(side.encoder) for side in sides}
        named |= {Path(side.weights) for side in sides if side.weights}
        with_one_thread = ThreadPoolExecutor(1)
        futures = {path: with_one_thread.submit(file_digest, path) for path in named if path}
        with_one_thread.shutdown(wait=False)
        return futures

    @cached_property
    def encoder_plan(self) -> EncoderPlan:
        plan = plan_of(self.recipe, self.device, self.precision)
        for note in plan.notes:
            self.watch.warn(note)
        return plan

    @cached_property
    def embeddings(self) -> Embeddings:
        """The embeddings of all that is audited: read again where the stage is done, else made."""
        return self._recalled() or self.embedded()

    def _recalled(self) -> Embeddings | None:
        """The embeddings of a run whose stage is done, by no encoder; None where it is not, or one is needed."""
        from nc_audit.embed import EmbeddingStore, Maker, recalled

        done = self.run.manifest["stages"].get("embed", {})
        if "maker" not in done or self.recipe.train.needs_tokens:
            return None
        cut = self.run.path / CUT
        cut_ids = set(pq.read_table(cut)["caption_id"].to_pylist()) if CUT in done["files"] else set()
        store = EmbeddingStore(self.run.path / "embeddings")
        found = recalled(
            Maker(**done["maker"]), self.folded.image_ids, self.folded.caption_ids, cut_ids, store
        )
        give_back_memory()
        return found

    def embedded(self) -> Embeddings:
        """What is audited, embedded where the store does not hold it yet."""
        from nc_audit import embed
        from nc_audit.encoders import load_encoders

        # Images that turn out to be corrupt stay in the set that encoders learn from, so that the set, and with it
        # every embedding, is the same before and after they are found.
        pairs = self.run.table("pairs")
        is_any_corrupt = pc.any(pc.equal(pairs["status"], "corrupt_image")).as_py()
        wide = fold(with_corrupt(pairs)) if is_any_corrupt else self.folded
        del pairs
        give_back_memory()
        if not wide.pair_ids:
            raise DatasetError(
                "not one row has both an image and a caption", "nc-audit runs shows the statuses"
            )
        store = embed.EmbeddingStore(self.run.path / "embeddings")
        store.folder.mkdir(parents=True, exist_ok=True)
        plan = self.tuned_plan(wide)
        if self.team.is_first:
            self.team.agreed(str(self.run.path))  # the others have waited for it
            self.has_called = True
        return embed.embed_all(
            load_encoders(plan),
            wide.image_ids,
            lambda position: self.images.read(wide.image_uris[position]),
            wide.caption_ids,
            wide.captions,
            store,
            batch_size=self.recipe.image.batch,
            progress=self.watch.progress,
            team=self.team,
        )

    def tuned_plan(self, wide: Folded) -> EncoderPlan:
        """The encoders as they are, or with towers fine-tuned on the pairs (`train.towers = "full"`), resumably."""
        plan, settings = self.encoder_plan, self.recipe.train
        if settings.towers == "frozen":
            return plan
        if not (plan.aligned and plan.image.startswith("open_clip:")):
            raise RecipeError(
                f'train.towers = "full" tunes an open_clip model, not {plan.image} + {plan.text}',
                "give --encoder open_clip:MODEL@FILE",
            )
        from nc_audit.embed import Decoding
        from nc_audit.encoders.open_clip_specs import towers_of
        from nc_audit.methods.matching import Pairs
        from nc_audit.train.rrsitr import tower_objective
        from nc_audit.train.towers import RESULT, fine_tune

        if plan.device == "cpu":
            self.watch.warn("whole towers are tuned on the processor: hours where a GPU takes minutes")
        towers = towers_of(plan.image).OpenClipModel(plan.image, plan.image_weights, plan)
        images = towers.image_encoder()
        folder = self.run.path / "model"
        fine_tune(
            towers,
            Decoding(lambda at: self.images.read(wide.image_uris[at]), images.preprocess, images.input_size),
            wide.captions,
            Pairs.of_arrays(wide.pair_image, wide.pair_caption, len(wide.image_ids), len(wide.caption_ids)),
            tower_objective(settings),
            settings,
            folder,
            self.watch.progress,
        )
        return replace(plan, image_weights=folder / RESULT, text_weights=folder / RESULT)

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Image and caption embeddings of the distinct ok pairs, in the order of `folded`."""
        inputs = self.embeddings.of(self.folded.image_ids, self.folded.caption_ids)
        give_back_memory()
        return inputs

    @cached_property
    def pairs(self) -> Pairs:
        from nc_audit.methods.matching import Pairs

        f = self.folded
        return Pairs.of_arrays(f.pair_image, f.pair_caption, len(f.image_ids), len(f.caption_ids))

    @property
    def reach(self) -> Reach:
        """How far ranks and best matches search; the training must be done."""
        from nc_audit.rivals import reach

        trained, device = self.run.stage("train"), self.recipe.train.place(self.encoder_plan.device)
        return reach(trained["images"], trained["captions"], self.recipe.score, device)

    @property
    def tokens(self) -> dict[str, Tensor]:
        """Local embeddings of both sides, for a method that uses them and encoders that have them."""
        if not self.recipe.train.needs_tokens:
            return {}
        from nc_audit import tokens
        from nc_audit.embed import IMAGES_AT_ONCE, EmbeddingStore

        assert self.embeddings.encoders is not None
        (image_encoder, text_encoder), folded = self.embeddings.encoders, self.folded
        for encoder in (image_encoder, text_encoder):
            if not tokens.has_tokens(encoder):
                self.watch.warn(
                    f"{encoder.spec} has no local embeddings: rrsitr goes by its global part alone"
                )
                return {}
        store = EmbeddingStore(self.run.path / "embeddings")
        return {
            "image_tokens": tokens.image_tokens(
                image_encoder,
                folded.image_ids,
                lambda position: self.images.read(folded.image_uris[position]),
                store,
                batch_size=self.recipe.image.batch or IMAGES_AT_ONCE,
                progress=lambda done, total: self.watch.progress("embed patches", done, total),
            ),
            "caption_tokens": tokens.caption_tokens(
                text_encoder,
                folded.caption_ids,
                folded.captions,
                store,
                progress=lambda done, total: self.watch.progress("embed words", done, total),
            ),
        }

    @cached_property
    def trusted(self) -> Tensor | None:
        """Which distinct pairs are known to be right, by --trusted or by people's decisions; None where none are."""
        import torch

        if not self.recipe.train.uses_trusted:
            if self.recipe.dataset.trusted is not None:
                self.watch.warn(f"--trusted is not used by the method {self.recipe.train.method}")
            return None
        vouched = set(self.run.decided("keep")) if self.recipe.train.needs_trusted else set()
        file = self.recipe.dataset.trusted
        if file is not None:
            trusted = read_trusted(Path(file), self.run.table("pairs"))
            if trusted.num_unknown:
                self.watch.warn(
                    f"{trusted.num_unknown:,} entries of {Path(file).name} are no pair of the dataset"
                )
            vouched |= set(trusted.pair_ids)
        if not vouched:
            return None
        return torch.tensor([one in vouched for one in self.folded.pair_ids])

    def _found_by_people(self) -> dict[str, bool]:
        """By pair, whether people found it to be noise: kept pairs are right, others are not."""
        standing, _ = read_decisions(self.run.path)
        return {pair_id: one.decision != "keep" for pair_id, one in standing.items()}

    # --- stages

    def _load(self) -> tuple[dict[str, int], dict[str, Any]]:
        loaded = load_pairs(
            self.dataset,
            load_options(self.recipe, self.run.path / "downloads"),
            lambda done, total: self.watch.progress("load", done, total),
        )
        self.watch.note(loaded.layout)
        for note in loaded.notes:
            self.watch.note(note)
        self.run.write_table("pairs", loaded.pairs)
        self.run.manifest["dataset"] = {
            "path": str(self.dataset),
            **({"given": self.given} if self.given is not None else {}),
            "roots": loaded.roots,
            "layout": loaded.layout,
            "notes": loaded.notes,
        }
        return {"pairs.parquet": len(loaded.pairs)}, {"status": loaded.counts}

    def _embed(self) -> tuple[dict[str, int], dict[str, Any]]:
        embeddings = self.embeddings
        pairs = self.run.table("pairs")
        if embeddings.failures:
            count = f"{len(embeddings.failures):,} image" + ("s" if len(embeddings.failures) > 1 else "")
            self.watch.warn(f"{count} cannot be decoded: the rows are corrupt_image")
            pairs = mark_corrupt(pairs, embeddings.failures)
            self.run.write_table("pairs", pairs)
            self.__dict__.pop("folded", None)  # without them
        files = {"pairs.parquet": len(pairs)}
        num_cut = sum(embeddings.is_cut)
        if num_cut:
            cut_ids = [
                one for one, is_cut in zip(embeddings.caption_ids, embeddings.is_cut, strict=True) if is_cut
            ]
            write_parquet(pa.table({"caption_id": pa.array(cut_ids, pa.string())}), self.run.path / CUT)
            files[CUT] = num_cut
            self.watch.warn(
                f"{num_cut:,} captions are longer than the encoder reads and judged on their beginning"
            )
        return files, {
            "maker": asdict(embeddings.maker),
            "encoders": {"image": self.encoder_plan.image, "text": self.encoder_plan.text},
            "plan": self.encoder_plan.facts(),
            "undecodable_images": len(embeddings.failures),
            "cut_captions": num_cut,
            "embedded": {"images": embeddings.work.images, "captions": embeddings.work.captions},
            "held": {
                "images": len(embeddings.image_ids) - embeddings.work.images,
                "captions": len(embeddings.caption_ids) - embeddings.work.captions,
            },
            "embed_seconds": {name: round(getattr(embeddings.work, name), 3) for name in _SPENT},
        }

    def _train(self) -> tuple[dict[str, int], dict[str, Any]]:
        from nc_audit.train import Inputs, train

        settings = self.recipe.train
        inputs = Inputs.prepare(
            *self.inputs,
            self.pairs,
            settings,
            self.recipe.score.candidates,
            logit_scale=self.embeddings.maker.logit_scale,
            precision=self.encoder_plan.precision,
            device=settings.place(self.encoder_plan.device),
            trusted_N=self.trusted,
            **self.tokens,
        )
        folder, num = self.run.path / "model", len(self.pairs)

        def progress(what: str, done: int, total: int) -> None:
            # An epoch ends with a look at every pair.
            pairs = num if what.startswith("train") else 1
            self.watch.progress(what, done * pairs, total * pairs)

        trained = train(inputs, settings, progress)
        pair_id = pa.array(self.folded.pair_ids)
        write_parquet(_trajectory(trained.trajectory, pair_id), folder / "trajectory.parquet")
        files: dict[str, int] = {}
        for left in folder.glob("draw_*"):
            shutil.rmtree(left)
        for name, draw in zip(_draw_names(len(trained.draws)), trained.draws, strict=True):
            (self.run.path / name).mkdir(exist_ok=True)
            draw.model.save(self.run.path / name / "heads.safetensors")
            for table, columns in (
                (
                    "evidence",
                    {"pair_id": pair_id} | {key: value.numpy() for key, value in draw.given.items()},
                ),
                ("swaps", {key: value.numpy() for key, value in draw.swaps.items()}),
            ):
                write_parquet(pa.table(columns), self.run.path / name / f"{table}.parquet")
            files |= {
                f"{name}/heads.safetensors": 0,
                f"{name}/evidence.parquet": num,
                f"{name}/swaps.parquet": len(draw.swaps.get("caption", ())),
            }
        candidates = inputs.candidates
        write_parquet(
            pa.table(
                {
                    "side": ["caption"] * len(candidates.caption_M) + ["image"] * len(candidates.image_M),
                    "id": [self.folded.caption_ids[i] for i in candidates.caption_M.tolist()]
                    + [self.folded.image_ids[i] for i in candidates.image_M.tolist()],
                }
            ),
            folder / "candidates.parquet",
        )
        return (
            files
            | {
                "model/trajectory.parquet": num * len(trained.trajectory.losses),
                "model/candidates.parquet": len(candidates.caption_M) + len(candidates.image_M),
            },
            {
                "method": settings.method,
                "draws": len(trained.draws),
                "pairs": num,
                "images": self.pairs.num_images,
                "captions": self.pairs.num_captions,
                "whole_images": False,
            }
            | trained.facts,
        )

    def _score(self) -> tuple[dict[str, int], dict[str, Any]]:
        import torch

        from nc_audit.calibrate import corrected_by_people
        from nc_audit.model import Model
        from nc_audit.rivals import look_around
        from nc_audit.score import Draw, judge
        from nc_audit.unlikely_words import WordMaps

        facts, pairs = self.run.stage("train"), self.pairs
        settings, seed = self.recipe.score, self.recipe.train.seed
        device = self.recipe.train.place(self.encoder_plan.device)
        self.watch.progress("score", 0, 2)
        with torch.inference_mode():
            draws = []
            for name in _draw_names(facts["draws"]):
                folder = self.run.path / name
                model = Model.load(folder / "heads.safetensors").to(device)
                evidence, swaps = (_tensors(folder / f"{table}.parquet") for table in ("evidence", "swaps"))
                draws.append(Draw(evidence, swaps, *model.embed(*self.inputs)))
            vectors, folded = (draws[0].image_ID, draws[0].caption_CD), self.folded
            image_ID, is_cut = self.inputs[0], self.embeddings.cut(folded.caption_ids)
            # What captions were embedded to is needed no more, and takes much of the memory.
            del self.inputs, self.embeddings
            words = WordMaps(
                image_ID.numpy(),
                folded.pair_image,
                folded.pair_caption,
                folded.captions,
                draws[0].right.numpy(),
            )
            rate, judged = judge(
                draws, pairs, settings, seed, whole_images=facts["whole_images"], words=words
            )
            unlikely = words.given
            del words  # with what it needs to be asked
            found = self._found_by_people()
            if found and rate.is_calibrated:
                place = {pair_id: at for at, pair_id in enumerate(self.folded.pair_ids)}
                known = [
                    (place[pair_id], noise) for pair_id, noise in sorted(found.items()) if pair_id in place
                ]
                before = judged["noise_probability"]
                judged["noise_probability"] = corrected_by_people(
                    before,
                    torch.tensor([at for at, _ in known], dtype=torch.long),
                    torch.tensor([noise for _, noise in known], dtype=torch.bool),
                )
                rate = rate.moved(float((judged["noise_probability"] - before).double().mean()))
            if self.trusted is not None and rate.is_calibrated:
                judged["noise_probability"] = judged["noise_probability"].masked_fill(self.trusted, 0.0)
            self.watch.progress("score", 1, 2)
            columns = dict(draws[0].given) | judged | look_around(*vectors, pairs, self.reach, seed)
        images = _first_names(self.run.table("pairs"), self.folded)
        named = {"best_caption": self.folded.captions, "best_image": images}
        distinct = {
            name: _named(values, named[name]) if name in named else pa.array(values.numpy())
            for name, values in columns.items()
        }
        table = _per_row(self.run.table("pairs"), self.folded, distinct)
        about = {
            "method": facts["method"],
            "num_candidates": str(facts["num_candidates"]),
            "logit_scale": str(facts["logit_scale"]),
            "encoder": f"{self.encoder_plan.image} + {self.encoder_plan.text}",
            "heads": self.run.manifest["files"]["model/heads.safetensors"]["sha256"],
            "searched": str(self.reach.compared),
            "best_matches": "index of all" if self.reach.has_index else "searched",
        }
        self.run.write_table("scores", table.replace_schema_metadata(about))
        image, caption = (one.cpu() for one in vectors)
        del draws, columns, distinct
        give_back_memory()
        findings, capped = self._findings(table, image_ID, image, caption, is_cut, unlikely)
        told = self.reach.told(pairs.num_images, pairs.num_captions)
        if told is not None:
            self.watch.warn(told)
            capped.append(told)
        self.run.write_table("findings", findings)
        self.watch.progress("score", 2, 2)
        return {"scores.parquet": len(table), "findings.parquet": len(findings)}, {
            "capped": capped,
            "noise_rate": {
                "estimate": rate.estimate,
                "low": rate.low,
                "high": rate.high,
                "level": rate.level,
                "expected_auroc": None if rate.expected_auroc != rate.expected_auroc else rate.expected_auroc,
                "evidence": rate.evidence,
            },
        }

    def _findings(
        self,
        scores: pa.Table,
        image_ID: Tensor,
        image: Tensor,
        caption: Tensor,
        is_cut: list[bool],
        unlikely: UnlikelyWords,
    ) -> tuple[pa.Table, list[str]]:
        """The `findings` table, and which searches were capped, from embeddings and the vectors of the heads."""
        from nc_audit.dataset import decode_image
        from nc_audit.findings import HASH_SIZE, Vectors, dhash, find_all

        folded, pairs = self.folded, self.run.table("pairs")

        def read_hash(index: int) -> int | None:
            try:
                return dhash(decode_image(self.images.read(folded.image_uris[index]), HASH_SIZE))
            except (AuditError, OSError):
                return None

        at, is_ok = np.maximum(folded.row_pair, 0), folded.row_pair >= 0
        probability = np.asarray(scores["noise_probability"].to_numpy(zero_copy_only=False), dtype=np.float64)
        is_named = unlikely.is_named.tolist()
        found = find_all(
            pairs,
            Vectors(
                np.where(is_ok, folded.pair_image[at], -1),
                np.where(is_ok, folded.pair_caption[at], -1),
                image_ID.numpy(),
                image.numpy(),
                caption.numpy(),
                probability,
            ),
            np.asarray(scores["image_rank"].fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64),
            read_hash,
            is_cut,
            {
                row: unlikely.told(pair, folded.captions[folded.pair_caption[pair]])
                for row, pair in enumerate(folded.row_pair.tolist())
                if pair >= 0 and is_named[pair] and probability[row] < 0.5
            },
        )
        for line in found.capped:
            self.watch.warn(line)
        return found.table(pairs), found.capped

    def _tag(self) -> tuple[dict[str, int], dict[str, Any]]:
        section = self.recipe.tag
        for note in read_decisions(self.run.path)[1]:
            self.watch.warn(note)
        return _write_tags(self.run, Thresholds(section.clean_at, section.noisy_at), None)


def retag(
    run: Run,
    *,
    target_precision: float | None = None,
    budget: float | None = None,
    clean_at: float | None = None,
    noisy_at: float | None = None,
) -> dict[str, Any]:
    """Tag a scored run anew, without rescoring.

    Args:
        run: a scored run.
        target_precision: choose noisy_at so that pairs tagged noisy are expected to be noise at this share, 0..1.
        budget: tag the worst share of the rows noisy, 0..1, whatever their probability.
        clean_at: clean up to this noise probability, 0..1; as in the run's recipe when not given.
        noisy_at: noisy from this noise probability, 0..1; likewise.

    Returns:
        The new summary.

    Raises:
        RunError: the run is not scored, or another process holds it. RecipeError: the thresholds are not in order.
    """
    run.stage("score")
    with run.locked():
        run.manifest = Run.open(run.path).manifest  # as whoever held it before left it
        run.stage("score")
        section = (run.manifest.get("recipe") or {}).get("settings", {}).get("tag", {})
        low = section.get("clean_at", 0.2) if clean_at is None else clean_at
        high = section.get("noisy_at", 0.8) if noisy_at is None else noisy_at
        if target_precision is not None:
            scores = run.table("scores", ["noise_probability"])["noise_probability"].drop_null()
            high = threshold_for_precision(scores.to_numpy().astype(np.float64), target_precision)
            low = min(low, high)
        thresholds = Thresholds(low, high)
        key = _retag_key(run, thresholds, budget)
        files, facts = _write_tags(run, thresholds, budget)
        run.commit("tag", key, files, 0.0, retagged_from=run.stage("score")["key"], **facts)
        run.manifest["summary"] = summarise(run)
        run.save()
    return run.manifest["summary"]


def apply_decisions(run: Run) -> dict[str, Any]:
    """Let the tags of a run follow what people decided, under the thresholds in use.

    Returns:
        The new summary; the one that is there where nothing changed.

    Raises:
        RunError: the run is not tagged, another process holds it, or a line of decisions.jsonl is no decision.
    """
    run.stage("tag")
    with run.locked():
        run.manifest = Run.open(run.path).manifest
        if _commit_tags(run) or "summary" not in run.manifest:
            run.manifest["summary"] = summarise(run)
            run.save()
    return run.manifest["summary"]


def _commit_tags(run: Run) -> bool:
    """Tag again as the stage was tagged last; whether anything about the decisions had changed since."""
    entry = run.stage("tag")
    thresholds, budget = thresholds_in_use(entry)
    source = run.stage("score")["key"]
    kept = {"retagged_from": source} if "retagged_from" in entry else {}
    if kept:
        key = _retag_key(run, thresholds, budget)
    else:
        section = (run.manifest.get("recipe") or {}).get("settings", {}).get("tag", {})
        key = digest_of([source, _tag_inputs(run, section)])
    if run.is_done("tag", key):
        return False
    files, facts = _write_tags(run, thresholds, budget)
    run.commit("tag", key, files, 0.0, **kept, **facts)
    return True


def _tag_inputs(run: Run, section: Any) -> Any:
    """What the tags depend on beyond the scores: the recipe's section, and what people decided where they did."""
    decisions = _decisions_digest(_decisions(run))
    return [section, decisions] if decisions else section


def _retag_key(run: Run, thresholds: Thresholds, budget: float | None) -> str:
    chosen = ["retag", run.stage("score")["key"], thresholds.clean_at, thresholds.noisy_at, budget]
    decisions = _decisions_digest(_decisions(run))
    return digest_of([*chosen, decisions] if decisions else chosen)


def _decisions(run: Run) -> dict[str, Decision]:
    return read_decisions(run.path)[0]


def _decisions_digest(decisions: dict[str, Decision]) -> str | None:
    """Hash of what tags see of the decisions; None where there are none."""
    seen = sorted((one.pair_id, one.decision, one.reviewer) for one in decisions.values())
    return digest_of(seen) if seen else None


def _write_tags(
    run: Run, thresholds: Thresholds, budget: float | None
) -> tuple[dict[str, int], dict[str, Any]]:
    blind = run.stage("score")["noise_rate"]["evidence"] == "none"
    has_findings = "findings.parquet" in run.stage("score")["files"]
    tags = tag_scores(
        run.table("scores", NEEDED_SCORES),
        run.table("pairs", NEEDED_PAIRS),
        thresholds,
        blind=blind,
        budget=budget,
        decisions=_decisions(run),
        findings=run.table("findings", ["row", "kind", "detail", "partner_row", "probability"])
        if has_findings
        else None,
    )
    run.write_table("tags", tags)
    stated = {
        "clean_at": thresholds.clean_at,
        "noisy_at": thresholds.noisy_at if np.isfinite(thresholds.noisy_at) else None,
        "budget": budget,
    }
    return {"tags.parquet": len(tags)}, {"thresholds": stated}


def summarise(run: Run) -> dict[str, Any]:
    """Counts, noise rate and timings of a finished run. Rows reconcile: statuses add up to them, tags to the ok ones.

    Raises:
        RunError: they do not, or a stage is missing.
    """
    status = _counts(run.table("pairs", ["status"])["status"])
    tagged = run.table("tags", ["tag", "decided_by"])
    tags = _counts(tagged["tag"])
    rows = sum(status.values())
    if sum(tags.values()) != status.get("ok", 0):
        raise RunError(
            f"{sum(tags.values()):,} rows are tagged but {status.get('ok', 0):,} are ok",
            "score the dataset again with --force",
        )
    train, embed = run.stage("train"), run.stage("embed")
    return {
        "rows": rows,
        "pairs": train["pairs"],
        "images": train["images"],
        "captions": train["captions"],
        "status": status,
        "tags": {tag: tags.get(tag, 0) for tag in ("clean", "ambiguous", "noisy")},
        "decided_rows": pc.sum(pc.not_equal(tagged["decided_by"], MODEL)).as_py() or 0,
        "noise_rate": run.stage("score")["noise_rate"],
        "whole_images": train["whole_images"],
        "by_image_share": train.get("by_image_share", float(train["whole_images"])),
        "draws": train.get("draws", 1),
        "thresholds": run.stage("tag")["thresholds"],
        "encoders": embed["encoders"],
        "findings": _count_findings(run),
        "seconds": {stage: run.stage(stage)["seconds"] for stage in STAGES},
        **{name: embed[name] for name in ("embedded", "held", "embed_seconds") if name in embed},
    }


def _count_findings(run: Run) -> list[dict[str, Any]]:
    """Kind, number of rows and meaning of what was found, strongest first; kinds without any are left out."""
    if "findings.parquet" not in run.stage("score")["files"]:
        return []
    table = run.table("findings", ["row", "kind"])
    rows = table.group_by("kind").aggregate([("row", "count_distinct")])
    counts = dict(zip(rows["kind"].to_pylist(), rows["row_count_distinct"].to_pylist(), strict=True))
    counts.setdefault("cut_caption", run.stage("embed")["cut_captions"])  # runs of before list no rows of it
    return [
        {"kind": kind, "count": counts[kind], "detail": meaning}
        for kind, (_, meaning) in FINDING_KINDS.items()
        if counts.get(kind)
    ]


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    found = pc.value_counts(column.drop_null()).to_pylist()
    return {one["values"]: one["counts"] for one in sorted(found, key=lambda one: -one["counts"])}


def _trajectory(trajectory: Trajectory, pair_id: pa.Array) -> pa.Table:
    """The `trajectory` table, epoch after epoch."""
    epochs, num = len(trajectory.losses), len(pair_id)

    def column(parts: list[Tensor], type_: pa.DataType) -> pa.Array:
        return pa.array(np.concatenate([part.numpy() for part in parts]) if parts else [], type_)

    division = pa.DictionaryArray.from_arrays(
        column(trajectory.divisions, pa.int8()), pa.array(["clean", "ambiguous", "noisy"])
    )
    return pa.table(
        [
            pa.concat_arrays([pair_id] * epochs) if epochs else pa.array([], pa.string()),
            pa.array(np.repeat(np.array(trajectory.epochs, dtype=np.int32), num)),
            column(trajectory.losses, pa.float32()),
            column(trajectory.weights, pa.float32()),
            division.cast(pa.string()),
        ],
        schema=TRAJECTORY,
    )


def _draw_names(num: int) -> list[str]:
    """Folders below the run that hold what draws of known swaps were trained to; the first is the run's own model."""
    return ["model", *(f"model/draw_{at}" for at in range(2, num + 1))]


def _tensors(path: Path) -> dict[str, Any]:
    """The numeric columns of a table as tensors."""
    import torch

    table = pq.read_table(path)
    return {
        name: torch.from_numpy(table[name].to_numpy().copy())
        for name in table.column_names
        if not pa.types.is_string(table[name].type)
    }


def _first_names(pairs: pa.Table, folded: Folded) -> list[str]:
    """A name for each distinct image that does not depend on the order of rows: the smallest it goes by."""
    table = pairs.select(["image_id", "image"]).filter(pc.equal(pairs["status"], "ok"))
    names = table.group_by("image_id").aggregate([("image", "min")])
    by_id = dict(zip(names["image_id"].to_pylist(), names["image_min"].to_pylist(), strict=True))
    return [by_id[image_id] for image_id in folded.image_ids]


def _named(index: Any, names: list[str]) -> pa.Array:
    """Indices as the names they stand for, null for -1."""
    at = index.numpy()
    return pa.array(names, pa.string()).take(pa.array(np.where(at < 0, 0, at), mask=at < 0))


def _per_row(pairs: pa.Table, folded: Folded, distinct: dict[str, pa.Array]) -> pa.Table:
    """The `scores` table: values of distinct pairs written back to every copy, null where a row is not ok."""
    at = pa.array(folded.row_pair, mask=folded.row_pair < 0)
    columns = {"pair_id": pairs["pair_id"], "row": pairs["row"]}
    columns |= {name: values.take(at) for name, values in distinct.items()}
    more = [field for name, field in METHOD_COLUMNS.items() if name in columns]
    schema = pa.schema([*SCORES, *more])
    return pa.table(
        [columns.get(field.name, pa.nulls(len(pairs), field.type)) for field in schema], schema=schema
    )


def with_corrupt(pairs: pa.Table) -> pa.Table:
    """The pairs with the rows of corrupt images counted as ok, where they have an image and a caption at all."""
    whole = pc.and_(
        pc.and_(pc.is_valid(pairs["image_id"]), pc.is_valid(pairs["caption_id"])),
        pc.is_valid(pairs["image_uri"]),
    )
    corrupt = pc.and_(pc.equal(pairs["status"], "corrupt_image"), whole)
    return pairs.set_column(
        pairs.schema.get_field_index("status"),
        pairs.schema.field("status"),
        pc.if_else(corrupt, "ok", pairs["status"]),
    )


def plan_of(recipe: Recipe, device: str = "auto", precision: str = "auto") -> EncoderPlan:
    """The encoders that a recipe names, decided without loading weights.

    Raises:
        EncoderError: a spec, file, device or precision cannot be had.
    """
    from nc_audit.encoders import ImageOptions, plan_encoders

    image, text = recipe.image, recipe.text
    same = image.encoder == text.encoder
    return plan_encoders(
        image.encoder if same else "auto",
        image_encoder=None if same or image.encoder == "auto" else image.encoder,
        text_encoder=None if same or text.encoder == "auto" else text.encoder,
        image_weights=Path(image.weights) if image.weights else None,
        text_weights=Path(text.weights) if text.weights else None,
        image_options=ImageOptions(image.options, _triple(image.mean), _triple(image.std), image.size),
        device=device,
        precision=precision,
        seed=recipe.train.seed,
    )


def load_options(recipe: Recipe, downloads: Path | None = None) -> LoadOptions:
    """How a recipe's dataset is read; `downloads` is the folder for fetched images, where the recipe allows any."""
    section = recipe.dataset
    return LoadOptions(
        image_root=Path(section.image_root) if section.image_root else None,
        image_column=section.image_column,
        caption_column=section.caption_column,
        subset=section.subset,
        split=section.split,
        limit=section.limit,
        downloads=downloads if section.allow_network else None,
    )


def _triple(value: tuple[float, float, float] | float | None) -> tuple[float, ...] | None:
    return (value,) * 3 if isinstance(value, float) else value


def _checkpoint(spec: str) -> Path | None:
    """The local file an `open_clip:MODEL@FILE` spec names."""
    _, at, file = spec.partition("@")
    return Path(file) if at and Path(file).is_file() else None


def open_images(run: Run) -> ImageStore:
    """The images of a run's dataset, by `image_uri`."""
    return ImageStore(run.manifest.get("dataset", {}).get("roots", {}))


def fingerprint(path: Path, run: Path) -> str:
    """What stands below a path: names, sizes and times of all files, without reading them.

    Hidden entries and run directories (so also this one) do not count. For a file, its whole folder counts, since
    its images are looked for there.
    """
    entries: list[tuple[str, int, int]] = []
    top = root_of(path)
    avoided = {run.resolve()}
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        try:
            found = list(os.scandir(folder))
        except OSError:
            continue
        if folder.resolve() in avoided or (folder != top and any(e.name == "run.json" for e in found)):
            continue
        for entry in found:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
            elif entry.is_file():
                state = entry.stat()
                entries.append((os.path.relpath(entry.path, top), state.st_size, state.st_mtime_ns))
    return digest_of(["" if path.is_dir() else path.name if path.is_file() else str(path), sorted(entries)])
