"""The report's page in a headless Chromium: it fits, asks nothing of a network, stored text stays text, and it opens at once."""

import contextlib
import shutil
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.support import report_world
from tests.support.packages import packages

QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync", "--hide-scrollbars"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip(
            "no chromium and chromedriver here; on Debian: apt-get install --no-install-recommends chromium chromium-driver"
        )
    try:
        sys.path.append(str(packages(ROOT / "tests/support/browser/requirements.txt")))
    except OSError as error:
        pytest.skip(str(error))
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in [*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def page(compared) -> Path:
    return compared / "results/report/comparison.html"


def emulate(browser, width: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_and_asks_nothing_of_a_network(browser, page, width):
    emulate(browser, width)
    browser.get(page.as_uri())
    assert browser.execute_script("return window.innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert browser.execute_script("return document.querySelectorAll('svg').length") >= 5
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe, severe


def test_stored_text_stays_text(browser, page):
    browser.get(page.as_uri())
    browser.find_element("id", "search").send_keys("owned")
    shown = browser.find_element("id", "cards").text
    assert "<img src=x onerror=" in shown and "</script>" in shown  # the model's answer, to be read
    assert browser.title == "phaseline: comparison"
    assert browser.execute_script("return document.images.length + document.querySelectorAll('#cards b').length") == 0


def test_what_escapes_from_the_text_is_stopped_by_the_policy(browser, page, tmp_path):
    """The second wall: even a script that stood in the page would not run."""
    broken = tmp_path / "broken.html"
    broken.write_text(
        page.read_text().replace(
            "</body>", "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"></body>"
        )
    )
    browser.get(broken.as_uri())
    time.sleep(0.3)
    assert browser.title == "phaseline: comparison"


def test_the_viewer_shows_flipped_prompts_with_both_answers_and_can_be_searched(browser, page):
    browser.get(page.as_uri())
    count = browser.find_element("id", "count")
    everything = int(count.text.split(" ")[0])
    first = browser.find_element("css selector", "#cards .card")
    assert "dpo: " in first.text and "sft_v2_merged: " in first.text and everything > 20
    browser.find_element("id", "which").send_keys("lost")
    lost = int(count.text.split(" ")[0])
    assert 0 < lost < everything
    browser.find_element("id", "search").send_keys("topic 13.")
    assert int(count.text.split(" ")[0]) < 3


def test_dark_and_light_have_ink_that_can_be_read(browser, page):
    for scheme, dark in (("dark", True), ("light", False)):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        browser.get(page.as_uri())
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        ink = browser.execute_script("return getComputedStyle(document.querySelector('svg text')).fill")
        bright = [sum(map(int, colour[colour.index("(") + 1 : -1].split(",")[:3])) for colour in (paper, ink)]
        assert (bright[0] < 150 < 550 < bright[1]) == dark and (bright[1] < 150 < 550 < bright[0]) != dark


def computed(browser) -> dict[int, float]:
    """Seconds of computing of each of the browser's processes: the same on a busy machine, where those of a clock are not."""
    times = {}
    for process in psutil.Process(browser.service.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times[process.pid] = process.cpu_times().user + process.cpu_times().system
    return times


def test_fifty_experiments_and_five_seeds_stay_below_ten_megabytes_and_open_in_two_seconds(browser, tmp_path):
    plan = report_world.make(tmp_path, report_world.write_config(tmp_path, seeds=5, more=37), prompts=541)
    html = report_world.report(tmp_path, plan)
    page = tmp_path / "results/report/comparison.html"
    assert len(plan.runs()) >= 250 and len(html.encode()) < 10e6
    before = computed(browser)
    browser.get(page.as_uri())
    seconds = sum(after - before.get(pid, 0) for pid, after in computed(browser).items())
    print(f"{len(html.encode()) / 1e6:.1f} MB, {seconds:.2f} s")
    assert seconds < 2
