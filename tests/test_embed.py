from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from nc_audit import embed
from nc_audit.embed import (
    EmbeddingStore,
    Work,
    batch_that_fits,
    embed_captions,
    embed_images,
    fit_captions,
    fit_images,
)
from nc_audit.encoders.patches import Patches
from nc_audit.encoders.tfidf import Tfidf
from nc_audit.errors import EncoderError


class Means:
    """An image encoder whose vectors are known: mean colour, and what was in the batch beside it as a trace."""

    spec, digest, dim, input_size = "means", "d" * 32, 3, (8, 8)

    def __init__(self) -> None:
        self.batches: list[int] = []

    def preprocess(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1)

    def encode(self, batch: Tensor) -> Tensor:
        self.batches.append(len(batch))
        return batch.float().mean((2, 3)) + len(batch) / 1024


class Lengths:
    """A text encoder whose vectors are known."""

    spec, digest, dim = "lengths", "e" * 32, 2

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, captions: list[str]) -> Tensor:
        self.seen += captions
        return torch.tensor([[len(caption), caption.count("a")] for caption in captions], dtype=torch.float32)

    def truncated(self, captions: list[str]) -> list[bool]:
        return [False] * len(captions)


def _png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), (colour % 256, colour // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def _dataset(count: int, broken: tuple[int, ...] = ()) -> tuple[list[str], list[bytes]]:
    data = [b"not an image" if i in broken else _png(i) for i in range(count)]
    return [hashlib.sha256(b"%d" % i).hexdigest()[:32] for i in range(count)], data


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.arrow"))}


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(embed, "IMAGES_PER_SHARD", 8)
    monkeypatch.setattr(embed, "CAPTIONS_PER_SHARD", 5)


def test_every_image_is_embedded_once_and_read_back_as_stored(tmp_path):
    ids, data = _dataset(21)
    store, encoder, seen = EmbeddingStore(tmp_path), Means(), []
    vectors, failures = embed_images(
        encoder, ids, data.__getitem__, store, batch_size=4, progress=lambda *now: seen.append(now)
    )
    expected = np.array([[i % 256, i // 256, 7] for i in range(21)], np.float32)
    beside = np.array([4] * 20 + [1], np.float32)[:, None] / 1024
    assert vectors.dtype == np.float16
    np.testing.assert_array_equal(vectors, (expected + beside).astype(np.float16).astype(np.float32))
    assert failures == {}
    assert seen[0] == (0, 21)
    assert seen[-1] == (21, 21)
    assert sorted(encoder.batches) == [1] + [4] * 5
    assert sorted(store.files("image", encoder.digest).values()) == [5, 8, 8]
    again, _ = embed_images(encoder, ids, data.__getitem__, store, batch_size=4)
    np.testing.assert_array_equal(again, vectors)
    assert len(encoder.batches) == 6


@pytest.mark.parametrize("killed_at", range(0, 21, 3))
def test_killed_and_resumed_it_leaves_the_same_bytes(tmp_path, killed_at):
    ids, data = _dataset(21, broken=(2, 9))
    embed_images(Means(), ids, data.__getitem__, EmbeddingStore(tmp_path / "whole"), batch_size=4)

    class Killed(BaseException):
        pass

    class Mortal(Means):
        def encode(self, batch: Tensor) -> Tensor:
            if sum(self.batches) >= killed_at:
                raise Killed
            return super().encode(batch)

    store = EmbeddingStore(tmp_path / "resumed")
    with pytest.raises(Killed):
        embed_images(Mortal(), ids, data.__getitem__, store, batch_size=4)
    embed_images(Means(), ids, data.__getitem__, store, batch_size=4)
    assert _bytes(tmp_path / "whole") == _bytes(tmp_path / "resumed")
    assert not list((tmp_path / "resumed").glob(".*"))


def test_only_new_images_are_embedded(tmp_path):
    ids, data = _dataset(40)
    store, encoder = EmbeddingStore(tmp_path), Means()
    embed_images(encoder, ids[:38], data.__getitem__, store, batch_size=4)
    encoder.batches.clear()
    order = [39, *range(38), 38]
    vectors, _ = embed_images(
        encoder, [ids[i] for i in order], lambda position: data[order[position]], store, batch_size=4
    )
    assert encoder.batches == [2]
    np.testing.assert_allclose(vectors[:, 0], order, atol=0.02)


def test_another_encoder_shares_nothing(tmp_path):
    ids, data = _dataset(3)
    store, other = EmbeddingStore(tmp_path), Means()
    embed_images(Means(), ids, data.__getitem__, store)
    other.digest = "f" * 32
    embed_images(other, ids, data.__getitem__, store)
    assert other.batches == [3]


def test_what_cannot_be_decoded_is_remembered(tmp_path):
    ids, data = _dataset(10, broken=(0, 5))
    store, encoder = EmbeddingStore(tmp_path), Means()
    vectors, failures = embed_images(encoder, ids, data.__getitem__, store, batch_size=4)
    assert set(failures) == {ids[0], ids[5]}
    assert all(failures.values())
    assert np.isnan(vectors[[0, 5]]).all()
    assert np.isfinite(np.delete(vectors, [0, 5], 0)).all()

    def unread(position: int) -> bytes:
        raise AssertionError(f"image {position} is read again")

    again, still = embed_images(encoder, ids, unread, store, batch_size=4)
    assert still == failures
    np.testing.assert_array_equal(again, vectors)


def test_nothing_but_broken_images(tmp_path):
    ids, data = _dataset(3, broken=(0, 1, 2))
    vectors, failures = embed_images(Means(), ids, data.__getitem__, EmbeddingStore(tmp_path))
    assert np.isnan(vectors).all()
    assert len(failures) == 3


def test_what_cannot_be_read_is_tried_again(tmp_path):
    ids, data = _dataset(6)

    def read(position: int) -> bytes:
        if position == 3:
            raise PermissionError(13, "Permission denied")
        return data[position]

    store = EmbeddingStore(tmp_path)
    vectors, failures = embed_images(Means(), ids, read, store)
    assert failures == {ids[3]: "cannot be read: Permission denied"}
    assert np.isnan(vectors[3]).all()
    vectors, failures = embed_images(Means(), ids, data.__getitem__, store)
    assert failures == {}
    assert np.isfinite(vectors).all()


def test_nothing_to_embed(tmp_path):
    vectors, failures = embed_images(Means(), [], lambda _: b"", EmbeddingStore(tmp_path))
    assert vectors.shape == (0, 3)
    assert failures == {}
    assert embed_captions(Lengths(), [], [], EmbeddingStore(tmp_path)).shape == (0, 2)


def test_reading_stays_a_bounded_way_ahead(tmp_path):
    ids, data = _dataset(64)
    read: list[int] = []
    ahead: list[int] = []

    class Watching(Means):
        def encode(self, batch: Tensor) -> Tensor:
            ahead.append(len(read) - sum(self.batches) - len(batch))
            return super().encode(batch)

    def reading(position: int) -> bytes:
        read.append(position)
        return data[position]

    embed_images(Watching(), ids, reading, EmbeddingStore(tmp_path), batch_size=4, num_workers=2)
    assert sorted(read) == list(range(64))
    assert max(ahead) <= (embed.AHEAD + embed.LANES + 1) * 4  # decoded images, and the batches that wait


def test_a_batch_that_does_not_fit_into_memory_is_halved(tmp_path, caplog):
    ids, data = _dataset(8)

    class Cramped(Means):
        def encode(self, batch: Tensor) -> Tensor:
            if len(batch) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().encode(batch)

    encoder = Cramped()
    vectors, _ = embed_images(encoder, ids, data.__getitem__, EmbeddingStore(tmp_path), batch_size=8)
    assert encoder.batches == [2, 2, 2, 2]
    np.testing.assert_allclose(vectors[:, 0], range(8), atol=0.01)
    assert caplog.messages[0] == "out of memory at 8 at once, going on with 4"


def test_other_errors_of_an_encoder_are_not_taken_for_memory(tmp_path):
    class Wrong(Means):
        def encode(self, batch: Tensor) -> Tensor:
            raise RuntimeError("shapes do not match")

    ids, data = _dataset(4)
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        embed_images(Wrong(), ids, data.__getitem__, EmbeddingStore(tmp_path))


def test_vectors_that_float16_cannot_hold_are_refused(tmp_path):
    class Huge(Means):
        def encode(self, batch: Tensor) -> Tensor:
            return super().encode(batch) * torch.tensor([1.0, 1.0, 1e5])

    ids, data = _dataset(4)
    with pytest.raises(EncoderError) as caught:
        embed_images(Huge(), ids, data.__getitem__, EmbeddingStore(tmp_path))
    assert str(caught.value) == (
        "4 of 4 image embeddings are not finite or exceed 65,504 "
        "(the weights do not fit the model, or --precision fp32 is needed)"
    )
    assert not list(tmp_path.iterdir())


def test_a_damaged_shard_is_named(tmp_path):
    ids, data = _dataset(4)
    store = EmbeddingStore(tmp_path)
    embed_images(Means(), ids, data.__getitem__, store)
    (path,) = tmp_path.glob("*.arrow")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(EncoderError) as caught:
        store.files("image", "d" * 32)
    assert str(caught.value) == f"{path.name} is damaged (delete {path}; its rows are embedded again)"


def test_a_shard_is_plain_arrow(tmp_path):
    ids, data = _dataset(2, broken=(1,))
    embed_images(Means(), ids, data.__getitem__, EmbeddingStore(tmp_path))
    (path,) = tmp_path.glob("*.arrow")
    table = pa.ipc.open_file(path).read_all()
    table.validate(full=True)
    assert table.schema.names == ["id", "embedding", "error"]
    assert table.schema.field("embedding").type == pa.list_(
        pa.field("element", pa.float16(), nullable=False), 3
    )
    assert table["id"].to_pylist() == ids
    assert table["embedding"].is_valid().to_pylist() == [True, False]
    assert path.name.startswith("image-dddddddddddddddd-")


def test_captions_are_embedded_once(tmp_path):
    captions = [f"{'a' * i} caption" for i in range(12)]
    ids = [f"{i:032d}" for i in range(12)]
    store, encoder = EmbeddingStore(tmp_path), Lengths()
    vectors = embed_captions(encoder, ids[:11], captions[:11], store)
    np.testing.assert_array_equal(vectors, [[i + 8, i + 1] for i in range(11)])
    assert sorted(store.files("caption", encoder.digest).values()) == [1, 5, 5]
    encoder.seen.clear()
    vectors = embed_captions(encoder, ids, captions, store)
    assert encoder.seen == [captions[11]]
    np.testing.assert_array_equal(vectors, [[i + 8, i + 1] for i in range(12)])


@given(st.lists(st.integers(0, 30), unique=True), st.lists(st.integers(0, 30), unique=True))
def test_the_store_gives_each_id_its_own_vector_in_any_order(tmp_path_factory, written, wanted):
    store = EmbeddingStore(tmp_path_factory.mktemp("store"))
    for part in (written[:7], written[7:]):
        if part:
            rows = torch.tensor([[float(i), -float(i)] for i in part])
            store.write(
                "image",
                "a" * 32,
                [f"id{i}" for i in part],
                rows,
                ["broken" if i % 5 == 4 else None for i in part],
            )
    vectors, known, failures = store.read("image", "a" * 32, [f"id{i}" for i in wanted], 2)
    assert known.tolist() == [i in written for i in wanted]
    good = [i in written and i % 5 != 4 for i in wanted]
    np.testing.assert_array_equal(np.isfinite(vectors).all(1), np.array(good, bool))
    for vector, i, is_good in zip(vectors, wanted, good, strict=True):
        assert not is_good or vector.tolist() == [i, -i]
    assert failures == {f"id{i}": "broken" for i in wanted if i in written and i % 5 == 4}


def _pictures(count: int) -> list[bytes]:
    random = np.random.default_rng(0)
    found = []
    for i in range(count):
        buffer = io.BytesIO()
        pixels = random.integers(0, 256, (12, 12, 3), np.uint8) // (1 + i % 3)
        Image.fromarray(pixels).resize((140, 150)).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def test_an_encoder_that_learns_is_fitted_once_and_kept(tmp_path):
    data = _pictures(6)
    data[2] = b"broken"
    ids = [f"{i:032d}" for i in range(6)]
    store, read = EmbeddingStore(tmp_path), []

    def reading(position: int) -> bytes:
        read.append(position)
        return data[position]

    one = fit_images(Patches(0), ids, reading, store)
    assert sorted(read) == list(range(6))
    two = fit_images(Patches(0), ids, reading, store)
    assert len(read) == 6
    assert one.digest == two.digest
    vectors, failures = embed_images(one, ids, reading, store)
    assert read[6:] == [2]  # what it learnt from is embedded
    again, _ = embed_images(two, ids, reading, EmbeddingStore(tmp_path / "other"))
    assert set(failures) == {ids[2]}
    np.testing.assert_allclose(vectors, again, atol=2e-3)
    assert fit_images(one, ids, reading, store) is one
    assert fit_images(Patches(0), ids[:5], reading, store).digest != one.digest


def test_a_fit_killed_after_its_vectors_makes_the_same_files(tmp_path):
    data, ids, store = _pictures(6), [f"{i:032d}" for i in range(6)], EmbeddingStore(tmp_path)
    work, told = Work(), []
    fit_images(Patches(0), ids, data.__getitem__, store, work=work, progress=lambda *one: told.append(one))
    assert work.images == 6
    assert [one for one in told if one[1] == 6] == [("read images", 6, 6), ("learn images", 6, 6)]
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    next(path for path in files if path.suffix == ".safetensors").unlink()
    fit_images(Patches(0), ids, data.__getitem__, store)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_learning_from_nothing_is_refused(tmp_path):
    with pytest.raises(EncoderError) as caught:
        fit_images(Patches(0), ["a", "b"], lambda _: b"broken", EmbeddingStore(tmp_path))
    assert str(caught.value) == (
        "none of 2 images can be decoded, so patches has nothing to learn from (check the images)"
    )


def test_captions_are_learnt_from_their_set(tmp_path):
    captions, store = ["a green field", "a blue lake", "two planes"], EmbeddingStore(tmp_path)
    fitted = fit_captions(Tfidf(0), ["1", "2", "3"], captions, store)
    assert fitted.digest == fit_captions(Tfidf(0), ["1", "2", "3"], captions, store).digest
    assert fitted.digest != fit_captions(Tfidf(0), ["1", "2", "4"], captions, store).digest
    assert fit_captions(fitted, ["1"], ["a"], store) is fitted


def test_what_the_store_holds_is_not_learnt_again(tmp_path, monkeypatch):
    ids, captions = ["1", "2", "3"], ["a red roof", "a green field", "a blue lake"]
    store = EmbeddingStore(tmp_path)
    first = fit_captions(Tfidf(0), ids, captions, store)
    made = embed_captions(first, ids, captions, store)
    monkeypatch.setattr(Tfidf, "_learn", lambda *_: pytest.fail("learnt again"))
    again = fit_captions(Tfidf(0), ids, captions, store)
    assert np.array_equal(embed_captions(again, ids, captions, store), made)


def test_memory_that_once_ran_out_is_not_tried_again(tmp_path):
    class Small(Means):
        def encode(self, batch: Tensor) -> Tensor:
            self.batches.append(len(batch))
            if len(batch) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return batch.float().mean((2, 3))

    ids, data = _dataset(24)
    encoder = Small()
    vectors, _ = embed_images(encoder, ids, data.__getitem__, EmbeddingStore(tmp_path), batch_size=8)
    assert encoder.batches == [8, 4, 2, 2, 2, 2] + [2, 2, 2, 2] * 2
    assert vectors[:, 0].tolist() == list(range(24))


# A process with little memory left, in which the allocator of the processor itself refuses.
TIGHT = """
import logging, resource, sys
from pathlib import Path
import numpy as np, torch
from nc_audit.embed import EmbeddingStore, embed_images
sys.path.insert(0, {tests!r})
from test_embed import Means, _dataset

class Hungry(Means):
    def encode(self, batch):
        room = torch.ones(len(batch), 4_000_000)
        self.batches.append(len(batch))
        return batch.float().mean((2, 3)) + room[:, :3] - 1

torch.set_num_threads(1)
logging.basicConfig(format="%(message)s")
ids, data = _dataset(64)
encoder = Hungry()
encoder.encode(torch.zeros(1, 3, 8, 8))
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 350_000_000,) * 2)
store = EmbeddingStore(Path({folder!r}))
vectors, _ = embed_images(encoder, ids, data.__getitem__, store, batch_size=32, num_workers=1)
assert vectors[:, 0].tolist() == list(range(64))
print(encoder.batches[1:])
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="limits the memory of a process as Linux does"
)
def test_when_the_processor_itself_runs_out_of_memory_smaller_batches_go_on(tmp_path):
    code = TIGHT.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sizes = [int(size) for size in done.stdout.strip()[1:-1].split(",")]
    assert sum(sizes) == 64
    assert max(sizes) < 32
    assert done.stderr.splitlines()[0] == "out of memory at 32 at once, going on with 16"


def test_what_was_done_and_what_was_there_is_counted(tmp_path):
    ids, data = _dataset(10, broken=(9,))
    store, work = EmbeddingStore(tmp_path), Work()
    embed_images(Means(), ids[:7], data.__getitem__, store, work=work)
    assert (work.images, work.captions) == (7, 0)
    assert work.decode > 0
    assert work.encode > 0
    work = Work()
    embed_images(Means(), ids, data.__getitem__, store, work=work)
    assert work.images == 3
    embed_images(Means(), ids, data.__getitem__, store, work=work)
    assert work.images == 3
    embed_captions(Lengths(), ids, ["a"] * 10, store, work=work)
    assert work.captions == 10


@pytest.fixture
def _threads():
    num = torch.get_num_threads()
    yield
    torch.set_num_threads(num)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("num", "images"), [(1, 16), (2, 16), (3, 16), (4, 32), (16, 64), (64, 64)])
def test_the_processor_takes_16_images_for_each_thread_of_a_lane(num, images):
    torch.set_num_threads(num)
    assert batch_that_fits(Means()) == images


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("num", "each"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_lanes_share_out_the_threads_and_keep_the_order(tmp_path, num, each):
    torch.set_num_threads(num)
    seen: set[tuple[str, int]] = set()

    class Images(Means):
        def encode(self, batch: Tensor) -> Tensor:
            seen.add(("image", torch.get_num_threads()))
            return super().encode(batch)

    class Captions(Lengths):
        def encode(self, captions: list[str]) -> Tensor:
            seen.add(("caption", torch.get_num_threads()))
            return super().encode(captions)

    ids, data = _dataset(16)
    store, captions = EmbeddingStore(tmp_path), ["a" * length for length in range(1, 11)]
    images, _ = embed_images(Images(), ids, data.__getitem__, store, batch_size=4)
    assert images[:, 0].round().tolist() == list(range(16))
    vectors = embed_captions(Captions(), captions, captions, store)
    assert vectors[:, 0].tolist() == list(range(1, 11))
    assert seen == {("image", each), ("caption", each)}
    assert torch.get_num_threads() == num
