"""The report as a reader sees it: in Chromium, wide and narrow, light and dark, by keyboard, and printed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fptq.presets import get_recipe
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.report.page import write_page
from fptq.report.subject import Subject
from test_report import BENCHMARK, EVALUATION, large_subject
from tiny import save_tiny

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)")

FAULTS = """() => {
  const faults = [], overlap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > -3
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  if (document.documentElement.scrollWidth > innerWidth) faults.push("the page is wider than the window");
  for (const place of document.querySelectorAll(".chart")) {
    const svg = place.querySelector("svg");
    if (!svg) { faults.push(place.id + ": not drawn"); continue; }
    const frame = svg.getBoundingClientRect(), around = place.getBoundingClientRect();
    if (frame.right > around.right + 1) faults.push(place.id + ": wider than its place");
    const visible = t => t.textContent.trim() && getComputedStyle(t).opacity > 0;
    const texts = [...svg.querySelectorAll("text")].filter(visible);
    const boxes = texts.map(t => [t.textContent, t.getBoundingClientRect()]);
    const out = box => Math.max(frame.left - box.left, box.right - frame.right,
      frame.top - box.top, box.bottom - frame.bottom);
    for (const [text, box] of boxes)
      if (out(box) > 1)
        faults.push(`${place.id}: "${text}" is cut off`);
    boxes.forEach(([text, box], i) => boxes.slice(i + 1).forEach(([other, second]) => {
      if (overlap(box, second)) faults.push(`${place.id}: "${text}" and "${other}" overlap`);
    }));
  }
  return faults;
}"""

CONTRAST = """() => {
  const channels = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const linear = c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = text => channels(text).map(c => linear(c / 255))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = light(getComputedStyle(document.querySelector("figure")).backgroundColor);
  return [...document.querySelectorAll(".chart text, figcaption, .muted, td, th, h2, a")].map(element => {
    const style = getComputedStyle(element), ink = light(element.tagName === "text" ? style.fill : style.color);
    return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
  }).reduce((a, b) => Math.min(a, b));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    model = save_tiny(folder / "model")
    recipe = get_recipe("fptq", group_size=32, v0=2.0)
    spec = CalibrationSpec("random", 4, 32)
    first = quantize(str(model), folder / "tiny-W4A8", recipe, spec, Options(progress=False))
    (first / "evaluation.json").write_text(json.dumps(EVALUATION))
    (first / "benchmark.json").write_text(json.dumps(BENCHMARK))
    second = quantize(
        str(model), folder / "tiny-rtn", get_recipe("rtn-w4a8", group_size=32), spec, Options(progress=False)
    )
    write_page(folder / "one.html", [Subject.open(first)])
    write_page(folder / "two.html", [Subject.open(first), Subject.open(second)])
    write_page(folder / "large.html", [large_subject(first)])
    return {path.stem: path for path in folder.glob("*.html")}


def opened(browser: Any, page: Path, width: int = 1400, scheme: str = "light") -> tuple[Any, list[str]]:
    """Return the page once its charts are drawn, and what it complains about."""
    complaints: list[str] = []
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda e: complaints.append(str(e)))
    tab.on("request", lambda r: None if r.url.startswith("file:") else complaints.append(r.url))
    tab.goto(page.as_uri())
    drawn = "[...document.querySelectorAll('.chart')].every(place => place.querySelector('svg'))"
    tab.wait_for_function(drawn, timeout=60_000)
    return tab, complaints


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("name", ["one", "two", "large"])
def test_nothing_is_cut_off_or_overlaps(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    tab, complaints = opened(browser, pages[name], width, scheme)
    assert tab.evaluate(FAULTS) == []
    assert complaints == []
    assert tab.evaluate(CONTRAST) > 4.5  # WCAG 2, AA
    tab.close()


def test_the_checks_find_planted_faults(browser: Any, pages: dict[str, Path]) -> None:
    tab, _ = opened(browser, pages["one"])
    tab.add_style_tag(content=".chart svg { margin-left: 200px; max-width: none !important } :root { --muted: #ccc }")
    tab.evaluate(
        "document.querySelectorAll('#c0-chart-decisions text')[1].setAttribute('transform', 'translate(-500,0)')"
    )
    faults = tab.evaluate(FAULTS)
    assert any("wider than its place" in fault for fault in faults)
    assert any("is cut off" in fault for fault in faults)
    assert tab.evaluate(CONTRAST) < 4.5
    tab.close()


def test_any_input_can_be_chosen_with_the_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    tab, complaints = opened(browser, pages["one"])
    path = "() => document.querySelector('#c0-chart-channel-maxima .mark-line path').getAttribute('d')"
    before, about = tab.evaluate(path), tab.inner_text("#c0-about")
    tab.focus("#c0-input")
    tab.keyboard.press("End")
    tab.wait_for_function(f"before => ({path})() !== before", arg=before)
    assert tab.inner_text("#c0-about") != about
    assert tab.eval_on_selector("#c0-input", "select => select.selectedOptions[0].textContent") == "block 1: down_proj"
    assert complaints == []
    tab.close()


def test_a_table_sorts_by_its_columns(browser: Any, pages: dict[str, Path]) -> None:
    tab, _ = opened(browser, pages["one"])
    tab.click("#c0-noise summary")
    header = tab.get_by_role("button", name="SQNR, dB")
    cells = (
        "() => [...document.querySelectorAll('#c0-noise tbody tr')].map(row => parseFloat(row.cells[5].textContent))"
    )
    for repeated in (1, -1):
        header.focus()
        tab.keyboard.press("Enter")
        values = tab.evaluate(cells)
        assert values == sorted(values, reverse=repeated < 0)
    tab.close()


def test_it_prints_in_light_colours_with_everything_open(browser: Any, pages: dict[str, Path]) -> None:
    tab, _ = opened(browser, pages["one"], scheme="dark")
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.pdf().startswith(b"%PDF")
    assert tab.evaluate("[...document.querySelectorAll('details')].every(d => d.open)")
    tab.close()
