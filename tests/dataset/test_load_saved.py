"""Datasets that the `datasets` library itself saved to disk, and damaged copies of them."""

from __future__ import annotations

import contextlib
import io
import json

import pyarrow as pa
import pytest
from dataset_checks import check_images, column, load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nc_audit.dataset import ImageStore, content_id
from nc_audit.errors import AuditError, DatasetError


def picture(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def library(tmp_path_factory, monkeypatch):
    """The `datasets` library, quiet and offline."""
    found = pytest.importorskip("datasets")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(found.config, "HF_HUB_OFFLINE", True)
    found.disable_progress_bars()
    return found


def dataset(library, colours, **columns):
    features = {"image": library.Image()}
    for name, values in columns.items():
        features[name] = [library.Value("string")] if isinstance(values[0], list) else library.Value("string")
    images = [{"bytes": picture(colour), "path": f"{colour}.png"} for colour in colours]
    return library.Dataset.from_dict({"image": images, **columns}, library.Features(features))


def test_a_saved_dataset_gives_its_pairs_and_its_images(tmp_path, library):
    captions = [f"caption {i}" for i in range(70)]
    dataset(library, range(70), text=captions, uid=[str(i) for i in range(70)]).save_to_disk(
        tmp_path / "saved", num_shards=3
    )
    (tmp_path / "saved" / "cache-0a.arrow").write_bytes(b"left over by map")
    loaded = load(tmp_path / "saved")
    assert loaded.layout == (
        "a dataset of datasets.save_to_disk, data-00000-of-00003.arrow, data-00001-of-00003.arrow, "
        "data-00002-of-00003.arrow"
    )
    assert column(loaded, "caption") == captions
    assert column(loaded, "image")[:2] == ["0.png", "1.png"]
    assert column(loaded, "uid")[69] == "69"
    check_images(loaded)
    assert column(loaded, "image_id")[3] == content_id(picture(3))


def test_a_saved_dict_of_splits_gives_each_split_with_lists_of_captions(tmp_path, library):
    splits = {
        "validation": dataset(library, [1], captions=[["a", "b"]]),
        "held out": dataset(library, [2], captions=[["c"]]),
    }
    library.DatasetDict(splits).save_to_disk(tmp_path)
    loaded = load(tmp_path)
    assert column(loaded, "caption") == ["a", "b", "c"]
    assert column(loaded, "split") == ["validation", "validation", "held out"]
    assert column(load(tmp_path, split="held out"), "caption") == ["c"]


def test_paths_in_a_saved_dataset_are_looked_for_below_its_folder(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    images = [{"bytes": None, "path": name} for name in ("a.png", "b.png", "/etc/passwd")] + [None]
    table = pa.table({"image": images, "text": ["here", "gone", "outside", "nothing"]})
    table = table.set_column(
        0,
        "image",
        table["image"].cast(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    )
    (tmp_path / "saved").mkdir()
    with pa.ipc.new_stream(tmp_path / "saved" / "x.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "x.arrow"}]}')
    loaded = load(tmp_path / "saved", image_root=tmp_path)
    assert column(loaded, "status") == ["ok", "missing_image", "outside_root", "missing_image"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_data_files": [{"filename": "../x.arrow"}]}, "{}/state.json does not list its files by name"),
        ({"_data_files": [{"filename": "x.arrow"}]}, "{}/state.json lists x.arrow, which is not there"),
        ({"_data_files": 3}, "{}/state.json does not list its files by name"),
    ],
)
def test_lists_that_lead_elsewhere_are_refused(tmp_path, state, message):
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DatasetError) as error:
        load(tmp_path)
    assert error.value.message == message.format(tmp_path)


def test_a_split_that_is_listed_and_not_there_is_an_error(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DatasetError) as error:
        load(tmp_path)
    assert error.value.message == f"{tmp_path}/dataset_dict.json lists the split train, which is not there"


def arrow(path, opener):
    images = pa.array(
        [{"bytes": picture(i), "path": None} for i in range(40)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": images, "caption": [f"c{i}" for i in range(40)]})
    with opener(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=16)
    return path


@pytest.mark.parametrize("opener", [pa.ipc.new_stream, pa.ipc.new_file])
def test_an_arrow_file_alone_is_read(tmp_path, opener):
    path = arrow(tmp_path / "a.arrow", opener)
    for place in (path, tmp_path):
        loaded = load(place)
        assert loaded.counts == {"ok": 40}
        assert ImageStore(loaded.roots).read(column(loaded, "image_uri")[37]) == picture(37)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    places=st.lists(st.tuples(st.integers(0, 20000), st.integers(0, 255)), max_size=8),
    end=st.integers(0, 40000),
)
@pytest.mark.parametrize("opener", [pa.ipc.new_stream, pa.ipc.new_file])
def test_damaged_arrow_files_never_crash(tmp_path, opener, places, end):
    path = arrow(tmp_path / "a.arrow", opener)
    data = bytearray(path.read_bytes())
    for at, value in places:
        data[at % len(data)] = value
    path.write_bytes(data[: max(end, 1)])
    with contextlib.suppress(AuditError):
        assert len(load(path).pairs) > 0


# --- what other libraries write


def assert_images_stand(loaded, num_distinct: int) -> None:
    store = ImageStore(loaded.roots)
    ids = column(loaded, "image_id")
    assert len(set(ids)) == num_distinct
    for uri, image_id in zip(column(loaded, "image_uri"), ids, strict=True):
        assert content_id(store.read(uri)) == image_id


def test_shards_of_webdatasets_own_writer(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "train-%04d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write(
                {"__key__": f"{i:06d}", "png": picture(i), "txt": f"größe {i}", "json": {"uid": f"u{i}"}}
            )
    loaded = load(tmp_path)
    assert column(loaded, "caption") == [f"größe {i}" for i in range(10)]
    assert column(loaded, "uid") == [f"u{i}" for i in range(10)]
    assert set(column(loaded, "status")) == {"ok"}
    assert_images_stand(loaded, 10)


def test_an_image_folder_of_datasets_and_what_it_pushes_to_the_hub(tmp_path, library):
    folder = tmp_path / "folder"
    for split, colours in (("train", range(5)), ("test", range(5, 8))):
        (folder / split).mkdir(parents=True)
        lines = [f'{{"file_name": "{colour}.png", "text": "caption {colour}"}}\n' for colour in colours]
        (folder / split / "metadata.jsonl").write_text("".join(lines))
        for colour in colours:
            (folder / split / f"{colour}.png").write_bytes(picture(colour))
    splits = library.load_dataset("imagefolder", data_dir=str(folder))
    pushed = tmp_path / "pushed" / "data"
    pushed.mkdir(parents=True)
    for name, part in splits.items():
        # Pushing embeds the files' bytes and writes one Parquet file a shard.
        embedded = part.with_format("arrow").map(library.table.embed_table_storage, batched=True)
        embedded.with_format(None).to_parquet(pushed / f"{name}-00000-of-00001.parquet")
    for where in (folder, pushed.parent):
        loaded = load(where)
        found = sorted(zip(column(loaded, "split"), column(loaded, "caption"), strict=True))
        assert found == sorted(
            [("train", f"caption {i}") for i in range(5)] + [("test", f"caption {i}") for i in range(5, 8)]
        )
        assert set(column(loaded, "status")) == {"ok"}
        assert_images_stand(loaded, 8)


@pytest.mark.parametrize("form", ["csv", "json"])
def test_tables_of_datasets_with_paths_of_images(tmp_path, library, form):
    for colour in range(4):
        (tmp_path / f"{colour}.png").write_bytes(picture(colour))
    rows = {"image": [f"{i}.png" for i in range(4)], "text": ["a, b", 'say "hi"', "two\nlines", "=1+1"]}
    getattr(library.Dataset.from_dict(rows), f"to_{form}")(tmp_path / f"table.{form}l".replace("csvl", "csv"))
    loaded = load(tmp_path)
    assert column(loaded, "caption") == rows["text"]
    assert_images_stand(loaded, 4)
