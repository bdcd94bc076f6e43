"""What a user may give as DATASET: a path, a pattern of paths, a dataset of the hub as `hf:OWNER/NAME`, or a bucket.

A dataset of the hub is fetched whole before it is read, not streamed: a resumed run, its thumbnails and its exports
read the images again, by content, and need the files to be the same ones. No script of a dataset is ever run.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nc_audit.dataset.remote import is_remote, mirror
from nc_audit.errors import DatasetError
from nc_audit.hub import refusal

_HUB = re.compile(r"hf:([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@([\w-][\w./-]*))?")
_BUCKET = re.compile(r"(s3a?|gs|gcs|hf|az|abfss?|https?|ftp|hdfs):/+", re.IGNORECASE)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
_WHERE = "name a folder or a file with captions and images"


@dataclass(frozen=True)
class Place:
    """Where a dataset lies: its path (or pattern), a name for its run, and what should be told about it."""

    path: Path
    name: str
    notes: tuple[str, ...] = ()


def find_dataset(
    spec: str, *, allow_network: bool = False, progress: Callable[[int, int | None], None] | None = None
) -> Place:
    """The place that a DATASET argument means; what lies elsewhere is fetched, where the user allows it.

    Args:
        spec: a path, a pattern such as `shards/*.tar`, `hf:OWNER/NAME`, with `@REVISION` where it matters, or a path
            or pattern of `s3://`, `gs://` or `hf://`.
        allow_network: whether a bucket may be read, and the hub asked for what its cache lacks.
        progress: told the objects of a bucket that are here, and their number.

    Raises:
        DatasetError: nothing is there, the network may not be used, or the hub or bucket cannot serve it.
    """
    if is_remote(spec):
        if not allow_network:
            raise DatasetError(f"{spec} lies behind the network", "--allow-network fetches it")
        path, name, notes = mirror(spec, progress)
        return Place(path, name or "dataset", notes)
    bucket = _BUCKET.match(spec)
    if bucket:
        raise DatasetError(
            f"{spec}: datasets behind {bucket[1].lower()}:// are not read",
            "s3://, gs:// and hf:// are, and datasets of the hub as hf:OWNER/NAME; else copy it to a folder first",
        )
    if spec.startswith("hf:") and not Path(spec).exists():
        return _of_hub(spec, allow_network=allow_network)
    path = Path(spec)
    check_exists(path)
    if is_pattern(path):
        name = (root_of(path).resolve().name or "dataset") if root_of(path) != Path() else Path.cwd().name
    else:
        name = path.resolve().stem if path.is_file() else path.resolve().name
    return Place(path, name or "dataset")


def check_exists(path: Path) -> None:
    """Raises DatasetError where neither the path nor a file that fits it as a pattern is there."""
    if is_pattern(path):
        if not files_of(path):
            raise DatasetError(f"no file fits the pattern {path}", _WHERE)
    elif not path.exists():
        raise DatasetError(f"{path} does not exist", _WHERE)


def is_pattern(path: Path) -> bool:
    """Whether a path that does not exist holds `*`, `?` or `[`."""
    return glob.has_magic(str(path)) and not path.exists()


def root_of(path: Path) -> Path:
    """The folder of a path: itself, its parent where it is a file, and of a pattern its part without wildcards."""
    if is_pattern(path):
        parts = path.parts[:-1]
        kept = next((at for at, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        return Path(*parts[:kept])
    return path if path.is_dir() else path.parent


def files_of(pattern: Path) -> list[Path]:
    """The files that fit a pattern, by name; `**` goes through folders, hidden ones left out."""
    return [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True)) if Path(name).is_file()]  # noqa: PTH207


def blobs_of(path: Path) -> Path | None:
    """Where the files behind a snapshot in the hub's cache lie, to which its links lead; None for other folders."""
    real = path.resolve()
    for folder in (real, *real.parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("datasets--"):
            blobs = folder.parent.parent / "blobs"
            return blobs if blobs.is_dir() else None
    return None


def _of_hub(spec: str, *, allow_network: bool) -> Place:
    from huggingface_hub import constants

    found = _HUB.fullmatch(spec)
    if not found or ".." in spec:
        raise DatasetError(
            f"{spec} names no dataset of the hub", "write hf:OWNER/NAME or hf:OWNER/NAME@REVISION"
        )
    repository, revision = found[1], found[2] or "main"
    name = repository.rpartition("/")[2]
    cached = _cached(Path(constants.HF_HUB_CACHE), repository, revision, any_revision=found[2] is None)
    gap = None if cached is None else _gap(cached)
    by_hand = f"fetch it where there is a network: hf download --repo-type dataset {repository}"
    why_not = None
    if cached is None or gap or allow_network:
        # Offline is told first: there --allow-network would be no help.
        may_ask = allow_network or constants.HF_HUB_OFFLINE
        why_not = refusal("datasets", repository) if may_ask else "--allow-network is not given"
    if cached is not None and gap is None and (why_not or not allow_network):
        return Place(cached, name, (f"{spec} is read from the hub's cache, commit {cached.name[:12]}",))
    if why_not is not None:
        state = (
            "is not in the hub's cache" if cached is None else f"is in the hub's cache only in part ({gap})"
        )
        raise DatasetError(
            f"{spec} {state}, and {why_not}",
            (f"--allow-network fetches it; or {by_hand}" if why_not.startswith("--") else by_hand)
            + (f"; or name {cached} itself to read what is there" if cached is not None else ""),
        )
    # A cached commit is completed, not left for a newer one.
    commit = revision if cached is None else cached.name
    size = _check_room(spec, repository, commit, Path(constants.HF_HUB_CACHE))
    fetched = _fetched(spec, repository, commit)
    if (gap := _gap(fetched)) is not None:
        raise DatasetError(f"{spec} was fetched only in part: {gap}", "look at its files on the hub")
    how = "was fetched from the hub" if cached is None else "is read from the hub's cache, complete"
    return Place(fetched, name, (f"{spec} {how}, commit {fetched.name[:12]}: {size:,} bytes came",))


def _gap(snapshot: Path) -> str | None:
    """What a snapshot in the hub's cache lacks, as the cache shows it; None where nothing does.

    That is what the kept list of its commit names and is not there (but for texts about the dataset), links to
    nothing, and numbered shards left out.
    """
    missing = [name for name in _tree_of(snapshot) if not (snapshot / name).exists()]
    shards: dict[tuple[str, int, str], set[int]] = {}
    for folder, folders, files in os.walk(snapshot):
        folders.sort()
        for file in sorted(files):
            path = Path(folder, file)
            relative = path.relative_to(snapshot).as_posix()
            numbered = _SHARD.fullmatch(relative)
            if not path.exists():
                missing.append(relative)
            elif numbered:
                key = (numbered[1], int(numbered[3]), numbered[4])
                shards.setdefault(key, set()).add(int(numbered[2]))
    if missing:
        missing = list(dict.fromkeys(missing))
        files_missing = f"{len(missing):,} file{'s' if len(missing) > 1 else ''}"
        return f"{files_missing} not there, such as {missing[0]}"
    for (stem, number, _), there in sorted(shards.items()):
        if len(there) < number:
            return f"{len(there):,} of {number:,} shards {stem}-*"
    return None


def _tree_of(snapshot: Path) -> list[str]:
    """The files of a commit that hold data, by the list the hub's client keeps of it; none where it keeps none."""
    listing = snapshot.parent.parent / "trees" / f"{snapshot.name}.json"
    try:
        files = json.loads(listing.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    names = [name for name in files if "\0" not in name] if isinstance(files, dict) else []
    return [
        name for name in names if not name.startswith(".") and not name.lower().endswith((".md", "license"))
    ]


def _cached(cache: Path, repository: str, revision: str, *, any_revision: bool) -> Path | None:
    """The snapshot of a revision in the hub's cache; without a revision asked for, else the newest there is."""
    folder = cache / ("datasets--" + repository.replace("/", "--"))
    snapshots = folder / "snapshots"
    reference = folder / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    wanted = snapshots / commit
    if (
        commit
        and "/" not in commit
        and commit not in {".", ".."}
        and wanted.is_dir()
        and any(wanted.iterdir())
    ):
        return wanted
    if any_revision and snapshots.is_dir():
        there = [one for one in snapshots.iterdir() if one.is_dir() and any(one.iterdir())]
        return max(there, key=lambda one: (one.stat().st_mtime_ns, one.name), default=None)
    return None


def _check_room(spec: str, repository: str, revision: str, cache: Path) -> int:
    """The bytes that the cache lacks of a revision, by the hub's listing.

    Raises:
        DatasetError: the disk has fewer free, or the hub does not list the files.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoFile

    blobs = cache / ("datasets--" + repository.replace("/", "--")) / "blobs"
    sizes: dict[str, int] = {}
    try:
        tree = HfApi().list_repo_tree(repository, recursive=True, revision=revision, repo_type="dataset")
        for one in tree:
            if isinstance(one, RepoFile):
                name = one.lfs.sha256 if one.lfs else one.blob_id
                if "/" in name or not (blobs / name).exists():
                    sizes[name] = one.size
    except (HfHubHTTPError, OSError, ValueError) as problem:
        raise _not_fetched(spec, problem) from problem
    folder = cache
    while not folder.exists():
        folder = folder.parent
    needed, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise DatasetError(
            f"{spec} needs {needed:,} bytes, and {folder} has {free:,} free",
            "set HF_HUB_CACHE to a folder on a larger disk",
        )
    return needed


def _not_fetched(spec: str, problem: Exception) -> DatasetError:
    reason = " ".join(str(problem).split())[:200]
    return DatasetError(
        f"{spec} cannot be fetched: {reason}", "check its name, its licence terms and the network"
    )


def _fetched(spec: str, repository: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, repo_type="dataset", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as problem:
        raise _not_fetched(spec, problem) from problem
