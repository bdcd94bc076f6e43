"""The review page in a real browser: decide by key, undo, reload, kill and restart; words of strangers stay words."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import pytest
from make_run import Pair, picture
from review_runs import LOOKS, ids_of, lines_of, pairs_of, review_of, run_of, served

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (the dev extra has it)"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")

HOSTILE = [
    "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">",
    '" onmouseover="document.title=\'taken\'" x="',
    "javascript:document.title='taken' {{constructor.constructor('1')()}} ${1} %3Cscript%3E",
    "a\u202egnp.exe\u2066 \x00\x1b[31m\x07\n\tend",
    "שלום עולם، مرحبا بالعالم",
    "🛰️👩‍🚀 " * 30,
    "x" * 9_000,
]


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator[playwright.Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(10_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "console", lambda one: problems.append(one.text) if "Content Security Policy" in one.text else None
    )
    yield page
    context.close()
    assert not problems


def expect(page, selector: str, text: str | re.Pattern[str]) -> None:
    playwright.expect(page.locator(selector)).to_have_text(text, timeout=10_000)


def test_pairs_are_decided_by_key_and_a_reload_shows_it(tmp_path, page):
    run = run_of(tmp_path / "run")
    with served(review_of(run)) as server:
        page.goto(server.url)
        expect(page, "#caption", "caption number 0")
        expect(page, "#tag", "noisy")
        expect(page, "#likely", "95 % likely noise")
        expect(page, "#better-caption .words", "a better caption 0")
        expect(page, "#better-caption h2", "A caption that fits this image better (+0.25 cosine)")
        page.keyboard.press("k")
        expect(page, "#caption", "caption number 3")
        expect(page, "#said", "Kept: row 0.")
        page.keyboard.press("d")
        expect(page, "#caption", "caption number 1")
        page.keyboard.press("r")
        expect(page, "#caption", "caption number 4")
        page.keyboard.press("f")
        page.locator("#words").fill("the right words")
        page.keyboard.press("Control+Enter")
        expect(page, "#caption", "caption number 2")
        expect(page, "#count", "4 of 6 decided")
        assert [(one["decision"], one.get("caption")) for one in lines_of(run)] == [
            ("keep", None),
            ("drop", None),
            ("rematch", "a better caption 1"),
            ("fix", "the right words"),
        ]
        page.reload()
        expect(page, "#count", "4 of 6 decided")
        expect(page, "#caption", "caption number 2")
        page.keyboard.press("ArrowLeft")
        expect(page, "#caption", "caption number 4")
        expect(page, "#mine", "you: fix")
        expect(page, "#others", "ann: fix “the right words”")
        page.keyboard.press("u")
        expect(page, "#said", "Undone: row 4.")
        expect(page, "#count", "3 of 6 decided")
        expect(page, "#mine", "")
        assert lines_of(run)[-1]["decision"] == "undo"


@pytest.mark.slow
def test_words_of_strangers_stay_words(tmp_path, page):
    pairs = [
        Pair(
            at, text, image=f"images/{text[:40]}", tag="noisy", probability=0.9, best_caption=text, more=LOOKS
        )
        for at, text in enumerate(HOSTILE)
    ]
    for pair in pairs:
        pair.reasons = [pair.caption]
    with served(review_of(run_of(tmp_path / "run", pairs))) as server:
        page.goto(server.url)
        for at, text in enumerate(HOSTILE):
            expect(page, "#facts", re.compile(rf"^{at + 1} of 7 "))
            shown = page.locator("#caption").evaluate("node => node.textContent")
            assert shown.startswith(text[0])
            assert not re.search("[\x00-\x1f\u202a-\u202e\u2066-\u2069]", shown)
            assert page.locator("#caption *, #reasons li *, .words *, #facts *").count() == 0
            wide = page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth")
            assert wide <= 0
            page.locator("#fix").click()
            page.locator("#words").press("Control+Enter")
            if at + 1 < len(HOSTILE):
                expect(page, "#facts", re.compile(rf"^{at + 2} of 7 "))
        expect(page, "#done-title", "All 7 pairs are decided")
        assert page.title() == "Review run · nc-audit"
        assert page.locator("script").count() == 1


@pytest.mark.slow
def test_a_sample_hides_the_tags_and_ends_with_figures(tmp_path, page):
    run = run_of(tmp_path / "run", 33)
    with served(review_of(run, sample=30)) as server:
        page.goto(server.url)
        expect(page, "#tag", "tag hidden until you decide")
        assert page.locator("#rematch").is_disabled()
        assert page.locator("#better-caption").is_hidden()
        for number in range(30):
            expect(page, "#count", f"{number} of 30 decided")
            is_noisy = int(re.search(r"\d+", page.locator("#caption").inner_text())[0]) % 3 == 0
            page.keyboard.press("d" if is_noisy else "k")
        expect(page, "#done-title", "All 30 pairs are decided")
        playwright.expect(page.locator("#figures")).to_contain_text("precision of noisy: 100.0 %")
        assert page.locator("#said").inner_text().find("The tag: ") > 0
        page.locator("#finish").click()
        expect(page, "#done-title", "Saved")
        assert server.is_finished.wait(5)


@pytest.mark.slow
def test_two_reviewers_disagree_and_it_shows(tmp_path, page):
    run = run_of(tmp_path / "run")
    with served(review_of(run)) as server:
        page.goto(server.url)
        expect(page, "#caption", "caption number 0")
        page.keyboard.press("k")
        expect(page, "#count", "1 of 6 decided")
        page.locator("#who").click()
        page.locator("#reviewer").fill("bob")
        page.locator("#naming .main").click()
        expect(page, "#who", "bob")
        expect(page, "#caption", "caption number 0")
        page.keyboard.press("d")
        expect(page, "#count", "1 of 6 decided")
        page.locator("#view").select_option("conflicts")
        expect(page, "#conflict", "Reviewers disagree. bob: drop; ann: keep. The last word, bob’s, counts.")
        expect(page, "#view option[value=conflicts]", "conflicts (1)")
        page.reload()
        expect(page, "#who", "bob")


@pytest.mark.slow
def test_two_reviewers_at_once_lose_nothing_of_each_other(tmp_path, browser):
    run = run_of(tmp_path / "run")
    with served(review_of(run)) as server:
        contexts = [browser.new_context(), browser.new_context()]
        ann, bob = (context.new_page() for context in contexts)
        for page in (ann, bob):
            page.goto(server.url)
            expect(page, "#caption", "caption number 0")
        bob.locator("#who").click()
        bob.locator("#reviewer").fill("bob")
        bob.locator("#naming .main").click()
        expect(bob, "#who", "bob")
        for number in range(1, 7):
            for page, key in ((ann, "k"), (bob, "d" if number % 2 else "k")):
                page.keyboard.press(key)
                expect(page, "#count", f"{number} of 6 decided")
        for page in (ann, bob):
            expect(page, "#done-title", "All 6 pairs are decided")
            page.locator("#view").select_option("conflicts")
            expect(page, "#view option[value=conflicts]", "conflicts (3)")
            expect(page, "#conflict", re.compile("^Reviewers disagree. "))
        for context in contexts:
            context.close()
    lines = lines_of(run)
    assert [one["decision"] for one in lines if one["reviewer"] == "ann"] == ["keep"] * 6
    assert [one["decision"] for one in lines if one["reviewer"] == "bob"] == ["drop", "keep"] * 3


@contextmanager
def command(run: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    arguments = [
        sys.executable,
        "-m",
        "nc_audit",
        "review",
        "--run",
        str(run),
        "--reviewer",
        "ann",
        "--no-browser",
    ]
    with subprocess.Popen([*arguments, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, re.search(r"http://\S+", process.stdout.readline())[0]
        finally:
            if process.poll() is None:
                process.terminate()
            process.stdout.read()


@pytest.mark.slow
def test_a_killed_server_loses_nothing_and_the_next_one_goes_on(tmp_path, page):
    run = run_of(tmp_path / "run")
    (tmp_path / "images").mkdir()
    for number in range(6):
        (tmp_path / "images" / f"{number}.png").write_bytes(picture(number))
    with command(run.path) as (process, address):
        page.goto(address)
        expect(page, "#caption", "caption number 0")
        for at, key in enumerate("kd"):
            page.keyboard.press(key)
            expect(page, "#count", f"{at + 1} of 6 decided")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        page.keyboard.press("k")
        expect(page, "#problem", re.compile("^The server does not answer, so nothing more is saved"))
        expect(page, "#count", "2 of 6 decided")
    assert [one["decision"] for one in lines_of(run)] == ["keep", "drop"]
    with command(run.path) as (process, other):
        assert other != address
        page.goto(other)
        expect(page, "#count", "2 of 6 decided")
        expect(page, "#caption", "caption number 1")
        assert page.locator("#image").evaluate("node => node.decode().then(() => node.naturalWidth)") == 8
        page.keyboard.press("u")
        expect(page, "#count", "1 of 6 decided")
        page.locator("#finish").click()
        assert process.wait(20) == 0
    tags = dict(
        zip(*(run.table("tags")[name].to_pylist() for name in ("pair_id", "decided_by")), strict=True)
    )
    assert [tags[one] for one in ids_of()] == ["ann", "model", "model", "model", "model", "model"]


@pytest.mark.slow
@pytest.mark.parametrize("look", ["light", "dark"])
@pytest.mark.parametrize("is_phone", [False, True])
def test_no_serious_fault_of_accessibility(tmp_path, browser, look, is_phone):
    axe = pytest.importorskip(
        "axe_core_python", reason="axe-core-python is not installed (the dev extra has it)"
    )
    script = files(axe).joinpath("axe.min.js").read_text(encoding="utf-8")
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    context = browser.new_context(color_scheme=look, **(phone if is_phone else {}))
    with served(review_of(run_of(tmp_path / "run"))) as server:
        page = context.new_page()
        page.goto(server.url)

        def faults() -> list[str]:
            page.evaluate(script)
            found = page.evaluate("() => axe.run()")["violations"]
            return [
                f"{one['id']}: {one['nodes'][0]['html']}"
                for one in found
                if one["impact"] in ("serious", "critical")
            ]

        expect(page, "#caption", "caption number 0")
        assert not faults()
        page.locator("#fix").click()
        assert not faults()
        page.keyboard.press("Escape")
        page.keyboard.press("?")
        playwright.expect(page.locator("#helping")).to_be_visible()
        assert not faults()
        page.keyboard.press("Escape")
        page.locator("#who").click()
        assert not faults()
        page.keyboard.press("Escape")
        page.locator("#keep").click()
        expect(page, "#count", "1 of 6 decided")
        page.locator("#view").select_option("decided")
        expect(page, "#mine", "you: keep")
        assert not faults()
    context.close()


@pytest.mark.slow
def test_a_hundred_thousand_pairs_are_painted_within_a_second(tmp_path, page):
    pairs = pairs_of(100_000)
    for at, pair in enumerate(pairs):
        pair.number = at % 50
    with served(review_of(run_of(tmp_path / "run", pairs))) as server:
        start = time.perf_counter()
        page.goto(server.url)
        expect(page, "#facts", re.compile(r"^1 of 100,000 "))
        waited = time.perf_counter() - start
        painted = page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0].startTime")
        assert painted < 1000
        assert waited < 3, "the first pair, on a machine that does other things too"
        page.keyboard.press("k")
        expect(page, "#count", "1 of 100,000 decided")
