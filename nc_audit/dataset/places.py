"""What a user may give as DATASET: a path, a pattern of paths, or a dataset of the hub as `hf:OWNER/NAME`."""

from __future__ import annotations

import glob
import re
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from nc_audit.errors import DatasetError

_HUB = re.compile(r"hf:([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@([\w-][\w./-]*))?")
_BUCKET = re.compile(r"(s3|gs|gcs|az|abfs|https?|ftp|hdfs):/+", re.IGNORECASE)
_PATIENCE = 1.5
_WHERE = "name a folder or a file with captions and images"


@dataclass(frozen=True)
class Place:
    """Where a dataset lies: its path (or pattern), a name for its run, and what should be told about it."""

    path: Path
    name: str
    notes: tuple[str, ...] = ()


def find_dataset(spec: str) -> Place:
    """The place that a DATASET argument means. A dataset of the hub is fetched where the hub's cache lacks it.

    Args:
        spec: a path, a pattern such as `shards/*.tar`, or `hf:OWNER/NAME`, with `@REVISION` where it matters.

    Raises:
        DatasetError: nothing is there, or the hub cannot serve it.
    """
    if spec.startswith("hf:") and not Path(spec).exists():
        return _of_hub(spec)
    bucket = _BUCKET.match(spec)
    if bucket:
        raise DatasetError(
            f"{spec}: datasets behind {bucket[1].lower()}:// are not read yet",
            "copy it to a folder first, or name a dataset of the hub as hf:OWNER/NAME",
        )
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


def _of_hub(spec: str) -> Place:
    from huggingface_hub import constants

    found = _HUB.fullmatch(spec)
    if not found or ".." in spec:
        raise DatasetError(
            f"{spec} names no dataset of the hub", "write hf:OWNER/NAME or hf:OWNER/NAME@REVISION"
        )
    repository, revision = found[1], found[2] or "main"
    name = repository.rpartition("/")[2]
    cached = _cached(Path(constants.HF_HUB_CACHE), repository, revision, any_revision=found[2] is None)
    if cached is not None:
        return Place(cached, name, (f"{spec} is read from the hub's cache, commit {cached.name[:12]}",))
    refusal = _refusal(repository)
    if refusal is not None:
        raise DatasetError(
            f"{spec} is not in the hub's cache, and {refusal}",
            f"fetch it where there is a network: hf download --repo-type dataset {repository}",
        )
    fetched = _fetched(spec, repository, revision)
    return Place(fetched, name, (f"{spec} was fetched from the hub, commit {fetched.name[:12]}",))


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


def _refusal(repository: str) -> str | None:
    """Why the hub cannot serve a dataset right now, None where it can; answers within two seconds."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = []

    def ask() -> None:
        token = get_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url = f"{constants.ENDPOINT}/api/datasets/{repository}"
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, headers=headers, method="HEAD"), timeout=_PATIENCE
            ):
                answer.append(None)
        except urllib.error.HTTPError as problem:
            answer.append(f"the hub answers {problem.code} for it")
        except (OSError, ValueError):
            answer.append("the hub cannot be reached")

    # A thread, because looking up a host name knows no time limit.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    return answer[0] if answer else "the hub does not answer"


def _fetched(spec: str, repository: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, repo_type="dataset", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise DatasetError(
            f"{spec} cannot be fetched: {reason}", "check its name, its licence terms and the network"
        ) from problem
