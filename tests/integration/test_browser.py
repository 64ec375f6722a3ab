"""The report in a real browser: headless Chromium opens the file, runs its script and tells what it made of it."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.reports import fleet, make_run, migrated, write_many
from translora.report.html import write_report

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage --enable-logging=stderr --window-size=1280,1000"
)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    pytest.mark.timeout(300),
]
PROBE = """
const found = {orders: [], sorts: []};
const buttons = [...document.querySelectorAll("#fleet thead button")];
const look = () => {
  found.orders.push([...document.querySelectorAll("#fleet tbody th a")].map((link) => link.textContent));
  found.sorts.push(buttons.map((button) => button.parentElement.getAttribute("aria-sort")));
};
look();
for (const label of ["|D_syn|", "|D_syn|", "adapter", "migrated"]) {
  buttons.find((button) => button.textContent === label).click();
  look();
}
const box = (selector) => { const {width, height} = document.querySelector(selector).getBoundingClientRect(); return [width, height]; };
const fill = (selector) => getComputedStyle(document.querySelector(selector)).fill;
found.boxes = [".scatter svg", ".scores svg", ".loss svg", "rect.kept", "rect.refused"].map(box);
found.fills = [".point.migrated", ".point.failed_gate", ".bare", "rect.kept", "rect.refused"].map(fill);
found.overflow = document.documentElement.scrollWidth - innerWidth;
document.body.dataset.found = JSON.stringify(found);
"""  # noqa: E501


class Page(html.parser.HTMLParser):
    """Every tag of the browser's DOM with its attributes."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]


def opened(page: Path, fragment: str = "") -> tuple[Page, list[str]]:
    """The DOM after the page's script has run, and what the browser's console said."""
    assert CHROMIUM is not None
    profile = f"--user-data-dir={page.parent / 'profile'}"
    address = page.resolve().as_uri() + fragment
    done = subprocess.run(
        [CHROMIUM, *FLAGS.split(), profile, "--dump-dom", address], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return Page(done.stdout), re.findall(r"CONSOLE.*", done.stderr)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = make_run(tmp_path_factory.mktemp("browser") / "run", fleet())
    for seed, state in enumerate(fleet()[:-1]):
        write_many(run_dir, state.name, seed)
    return write_report(run_dir)


@pytest.fixture(scope="module")
def probed(report: Path) -> dict[str, Any]:
    """What a script at the end of a copy of the page clicked and saw."""
    copy = report.with_name("probed.html")
    copy.write_text(report.read_text().replace("</body>", f"<script>{PROBE}</script></body>"))
    page, console = opened(copy)
    assert console == []
    (body,) = (attrs for tag, attrs in page.tags if tag == "body")
    return dict(json.loads(body["data-found"] or ""))


def test_the_page_opens_without_a_word_on_the_console(report: Path) -> None:
    page, console = opened(report)
    assert console == []
    assert len(page.of_class("point")) == len(page.of_class("bare")) == 5
    assert {attrs["href"] for tag, attrs in page.tags if tag == "a"} == {f"#a{number}" for number in range(1, 7)}
    assert len(page.of_class("scores")) == len(page.of_class("loss")) == 5
    assert len([attrs for tag, attrs in page.tags if tag == "details" and "open" in attrs]) == 6


def test_what_the_page_may_not_do_would_be_seen(report: Path) -> None:
    bad = report.with_name("bad.html")
    foreign = '<script src="https://example.invalid/x.js"></script><script>undefinedFunction()</script></body>'
    bad.write_text(report.read_text().replace("</body>", foreign))
    _, console = opened(bad)
    assert any("Content Security Policy" in line for line in console), console
    assert any("undefinedFunction" in line for line in console), console


def test_a_click_on_a_columns_head_sorts_the_fleet(probed: dict[str, Any]) -> None:
    numbers = {state.name: state.num_samples for state in fleet()}
    moved = {state.name: state.accuracy.migrated if state.accuracy else -1 for state in fleet()}
    first, rising, falling, by_name, by_accuracy = probed["orders"]
    assert first == [state.name for state in fleet()]
    assert [numbers[name] for name in rising] == sorted(numbers.values())
    assert [numbers[name] for name in falling] == sorted(numbers.values(), reverse=True)
    assert by_name == sorted(numbers) != falling
    assert [moved[name] for name in by_accuracy] == sorted(moved.values())
    marks = [[mark for mark in sorts if mark] for sorts in probed["sorts"]]
    assert marks == [[], ["ascending"], ["descending"], ["ascending"], ["ascending"]]


def test_charts_have_a_size_and_colours_and_fit_the_window(probed: dict[str, Any]) -> None:
    assert all(width > 0 and height > 0 for width, height in probed["boxes"])
    (width, height), *others = probed["boxes"]
    assert 300 < width < 500 and 300 < height < 500
    assert all(other[0] > 300 for other in others[:2])
    migrated_fill, failed_fill, _, kept_fill, refused_fill = probed["fills"]
    assert len({migrated_fill, failed_fill, refused_fill}) == 3 and kept_fill == migrated_fill
    assert "rgb(0, 0, 0)" not in probed["fills"]
    assert probed["overflow"] <= 0


def test_a_link_opens_the_section_of_a_large_fleet(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run", [migrated(f"task-{number:02d}") for number in range(20)]))
    for fragment, expected in (("", []), ("#a7", ["a7"])):
        dom, console = opened(page, fragment)
        assert console == []
        assert [attrs["id"] for tag, attrs in dom.tags if tag == "details" and "open" in attrs] == expected
