"""The page of an inspection in a real browser, without a network, small and large."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optcpu
from optcpu.models import gpt2_small

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
DRIVER = shutil.which("chromedriver") or ""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]

LARGEST_OPEN_MS = 2000  # hundreds of times what was seen would be too slow to use


class Net(nn.Module):
    """Its source lines try to leave the page's markup."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(self.norm(x)))  # </script><script>document.title = "taken"</script>
        return self.down(h) * 2.0  # <img src=x onerror="document.title = 'taken'"> ${title}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("small") / "graphs.html"
    optcpu.inspect(Net(), torch.randn(4, 8), precision="bf16").save(page)
    return page


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("large") / "graphs.html"
    model = gpt2_small(vocab_size=64, width=32, heads=2, context_length=16)
    inspection = optcpu.inspect(model, torch.randint(64, (2, 8)), precision="bf16")
    assert len(inspection.stage("joint").nodes) > 2000
    inspection.save(page)
    return page


class Page:
    """A page that is open in a browser."""

    def __init__(self, driver: Any, path: Path, size: tuple[int, int]) -> None:
        self.driver = driver
        driver.set_window_size(*size)
        driver.get("about:blank")
        driver.get(path.as_uri())

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)  # type: ignore[no-any-return]

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.all(selector)]

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def open(self, view: str) -> None:
        self.run(
            "location.hash = arguments[0]; window.dispatchEvent(new Event('hashchange'))", view
        )

    def search(self, text: str) -> str:
        (query,) = self.all("#query")
        query.send_keys(webdriver.Keys.CONTROL + "a", webdriver.Keys.DELETE)
        query.send_keys(text)
        return self.texts("#hits")[0]

    def views(self) -> list[str]:
        return [a.get_attribute("href").split("#")[1] for a in self.all("#stages a")]

    def problems(self) -> list[Any]:
        return self.driver.get_log("browser")  # type: ignore[no-any-return]

    def slowest_ms(self, what: str) -> float:
        entries = self.run(
            "return performance.getEntriesByName(arguments[0]).map(e => e.duration)", what
        )
        return max(entries)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
        *("--disable-dev-shm-usage", "--disable-background-networking", "--disable-quic"),
        *("--disable-component-update", f"--user-data-dir={tmp_path_factory.mktemp('profile')}"),
        "--host-resolver-rules=MAP * ~NOTFOUND",  # there is no network for the page
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.chrome.service.Service(DRIVER, env={**os.environ, "NO_PROXY": "*"})
    with webdriver.Chrome(options=options, service=service) as browser:
        yield browser


@pytest.fixture(params=[(1400, 900), (500, 800)], ids=["wide", "narrow"])
def page(request: pytest.FixtureRequest, driver: Any, small: Path) -> Page:
    return Page(driver, small, request.param)


def test_it_is_one_file_that_refers_to_nothing(small: Path) -> None:
    text = small.read_text()
    markup = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL)
    assert not re.search(r"https?://|\bsrc=|<link|@import|url\(|fetch\(", markup)
    assert [f.name for f in small.parent.iterdir()] == [small.name]


def test_every_view_opens_without_an_error(page: Page) -> None:
    views = page.views()
    assert {"summary", "r0/captured", "r0/joint/insert-casts", "r0/backward", "r0/final"} <= {
        *views
    }
    for view in views:
        page.open(view)
        assert page.texts("main h1, main h2")[0], view
        assert page.run("return document.documentElement.scrollWidth <= innerWidth"), view
    assert page.problems() == []


def test_text_of_the_users_source_stays_text(page: Page) -> None:
    page.open("r0/joint")
    page.all("#open-all")[0].click()
    text = page.texts("#content")[0]
    assert '</script><script>document.title = "taken"</script>' in text
    assert "onerror=" in text
    assert page.driver.title.startswith("Net")
    assert page.problems() == []


def test_before_and_after_stand_side_by_side(page: Page) -> None:
    page.open("r0/forward/fuse-linear")
    assert page.all(".line.gone, .line.changed, .line.come")
    gone = page.run("return [...document.querySelectorAll('.cell.gone')].map(e => e.textContent)")
    come = page.run("return [...document.querySelectorAll('.cell.come')].map(e => e.textContent)")
    assert any("aten.relu" in text for text in gone)
    assert any("optcpu.linear" in text for text in come)


def test_forward_and_backward_stand_side_by_side(page: Page) -> None:
    page.open("r0/final")
    assert len(page.all(".pane")) == 2
    forward, backward = page.texts(".titles h3")
    assert "orward" in forward
    assert "ackward" in backward


def test_search(page: Page) -> None:
    page.open("r0/joint/insert-casts")
    assert re.fullmatch(r"\d+ of [1-9]\d*", page.search("addmm bf16"))
    page.all("#next-hit")[0].click()
    assert page.texts("#hits")[0].startswith("1 of")
    (line,) = page.all(".line.current")
    assert "addmm" in line.text
    assert page.search("there-is-no-such-node") == "no hits"
    assert page.search("") == ""


def test_a_node_tells_where_it_comes_from(page: Page) -> None:
    page.open("r0/forward")
    page.search("optcpu.linear relu")
    page.all("#next-hit")[0].click()
    page.run("document.querySelector('.line.current .cell[data-side=right]').click()")
    (details,) = page.texts("#details")
    assert "test_page.py" in details
    assert "torch.relu(self.up(self.norm(x)))" in details


def test_two_thousand_nodes(driver: Any, large: Path) -> None:
    page = Page(driver, large, (1400, 900))
    for view in page.views():
        page.open(view)
    assert page.search("aten.embedding") != "no hits"  # whatever becomes of attention
    page.open("r0/joint")
    assert len(page.all(".block-button")) > 12
    page.all("#open-all")[0].click()
    assert len(page.all(".line")) > 2000
    page.all("#close-all")[0].click()
    unfolded = page.run(
        "return document.querySelectorAll('.part.block .lines:not([hidden])').length"
    )
    assert unfolded == 0
    assert page.slowest_ms("open") < LARGEST_OPEN_MS
    assert page.slowest_ms("search") < LARGEST_OPEN_MS
    assert page.problems() == []


def test_a_picture_of_the_page_has_something_on_it(page: Page, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    shot = tmp_path / "page.png"
    page.driver.save_screenshot(str(shot))
    assert len(image.open(shot).convert("RGB").getcolors(1 << 24)) > 30
