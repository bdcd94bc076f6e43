"""The HTML report: what strangers wrote stays text, in the file and in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from importlib.resources import files

import numpy as np
import pytest
from make_run import Pair, make_run, picture

from nc_audit.dataset.images import ImageStore
from nc_audit.errors import DatasetError
from nc_audit.report import report_rows
from nc_audit.report.html import html_report, reason_kind, write_page
from nc_audit.report.thumbnails import half_blocks

HOSTILE = "</script><script>window.owned=1</script><img src=x onerror=window.owned=1> \" ' \u2028\x1b[2J\u202e שלום 🛰️"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for number in range(60):
        (folder / "images" / f"{number}.png").write_bytes(picture(number))
    pairs = [
        Pair(n, f"a house numbered {n}", probability=n / 100, split="train" if n % 2 else "test")
        for n in range(59)
    ]
    pairs.append(
        Pair(59, HOSTILE + "long" * 500, probability=0.99, tag="noisy", split="<b>", reasons=[HOSTILE],
             best_caption=HOSTILE, best_caption_margin=0.5, more={"loss": 2.0, "best_image": "images/1.png",
                                                                  "best_image_margin": 0.25})
    )  # fmt: skip
    found = [{"kind": "<i>kind", "count": 4100, "detail": HOSTILE}]
    return make_run(
        tmp_path / "run",
        pairs,
        summary={"findings": found, "thresholds": {"clean_at": 0.2, "noisy_at": 0.8}},
        dataset={"path": "<u>toy", "roots": {"dataset": str(folder)}},
    )


def page_of(run, **options):
    return html_report(run, report_rows(run), ImageStore(run.manifest["dataset"]["roots"]), **options)


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def test_nothing_of_a_stranger_is_markup(run):
    html = page_of(run).html
    assert html.count("<script") == html.count("</script>") == 2
    for forbidden in ("<img", "<i>", "<u>", "<b>", "\u2028", "\u202e", "\x1b", "http:", "https:"):
        assert forbidden not in html, forbidden


def test_the_gallery_holds_the_pairs_with_each_image_once(run):
    data = data_of(page_of(run).html)
    assert len(data["pairs"]) == len(data["pictures"]) == 60
    worst = data["pairs"][0]
    assert (worst["p"], worst["tag"], worst["imageMargin"]) == (0.99, "noisy", 0.25)
    assert worst["bestThumb"] == data["pairs"][[pair["row"] for pair in data["pairs"]].index(1)]["thumb"]
    assert all(one.startswith("data:image/webp;base64,") for one in data["pictures"])


def test_an_image_that_is_gone_leaves_its_pair(run, tmp_path):
    (tmp_path / "data" / "images" / "59.png").unlink()
    data = data_of(page_of(run).html)
    assert data["pairs"][0]["thumb"] is None
    assert len(data["pictures"]) == 59


def test_files_beside_the_page(run, tmp_path):
    page = page_of(run, as_files=True)
    assert write_page(page, run, tmp_path / "out") == tmp_path / "out" / "index.html"
    pictures = data_of(page.html)["pictures"]
    assert len(pictures) == 60
    written = {
        path.relative_to(tmp_path / "out").as_posix(): path.read_bytes()
        for path in (tmp_path / "out" / "thumbnails").iterdir()
    }
    assert written == {name: page.files[name] for name in pictures}
    assert "data:image" not in page.html


def test_files_beside_the_page_keep_their_names_from_page_to_page(run):
    whole = page_of(run, as_files=True).files
    some = html_report(
        run, report_rows(run, top=7), ImageStore(run.manifest["dataset"]["roots"]), as_files=True
    ).files
    assert some
    assert some.items() <= whole.items()


def test_a_folder_of_other_things_is_left_alone(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DatasetError) as caught:
        write_page(page_of(run, as_files=True), run, tmp_path)
    assert str(caught.value) == f"{tmp_path} holds other things than a report (name a new folder: --out DIR)"


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("1 other image fits the caption better", "other images fit the caption better"),
        ("2,271 other captions fit the image better", "other captions fit the image better"),
        ("better caption by 0.31: two planes", "better caption"),
        ("evidence conflicts: 55% likely noise", "evidence conflicts"),
    ],
)
def test_reasons_of_one_kind_are_one_filter(reason, kind):
    assert reason_kind(reason) == kind


def test_half_blocks_are_the_pixels():
    cells = half_blocks(picture(10), 8)
    assert np.shape(cells) == (4, 8, 2)
    assert cells[0][0] == ("#0af55a", "#0af55a")


@pytest.mark.slow
def test_in_a_browser(run, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    file = write_page(page_of(run), run, tmp_path / "report.html")
    complaints, requests = [], []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda problem: complaints.append(str(problem)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        assert page.evaluate("window.owned") is None
        # Cards off the screen are not laid out, so what they would show is asked for as content.
        assert "<script>window.owned=1</script>" in page.locator(".caption").first.text_content()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.locator("#count").inner_text() == "60 pairs, page 1 of 3"
        page.keyboard.press("j")
        page.keyboard.press("ArrowRight")
        assert page.locator("#count").inner_text() == "60 pairs, page 3 of 3"
        page.keyboard.press("k")
        assert page.locator("#count").inner_text() == "60 pairs, page 2 of 3"
        page.select_option("#f-tag", "noisy")
        assert page.locator("#count").inner_text() == "1 pair, page 1 of 1"
        page.select_option("#f-tag", "")
        page.select_option("#f-split", "train")
        page.fill("#f-text", "NUMBERED 7")
        assert page.locator(".card").count() == 1
        page.keyboard.press("j")
        assert page.input_value("#f-text") == "NUMBERED 7j"
        assert page.locator("#count").inner_text() == "0 pairs, page 1 of 1"
        browser.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("data:", "file:"))] == []


@pytest.mark.slow
@pytest.mark.parametrize("look", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_no_serious_fault_of_accessibility(run, tmp_path, look, width):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    axe = pytest.importorskip(
        "axe_core_python", reason="axe-core-python is not installed (the dev extra has it)"
    )
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    file = write_page(page_of(run), run, tmp_path / "report.html")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=look)
        page.goto(file.as_uri())
        page.evaluate(files(axe).joinpath("axe.min.js").read_text(encoding="utf-8"))
        found = page.evaluate("() => axe.run()")["violations"]
        browser.close()
    faults = [one for one in found if one["impact"] in ("serious", "critical")]
    assert [f"{one['id']}: {one['nodes'][0]['html']}" for one in faults] == []
