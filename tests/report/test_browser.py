"""The pages in a real browser: Debian's chromium, or whichever is installed."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clm_dist.files.result import read_result
from clm_dist.files.run_dir import RunDir
from clm_dist.files.samples import write_samples
from clm_dist.report.compare_page import write_comparison
from clm_dist.report.page import write_page
from tests.support.histories import HOSTILE, write_history
from tests.support.plans import plan_of, plan_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
# The canvas has more than its background in every stripe of 40 columns of the plot.
_DRAWN = """
canvas => {
  const { width, height } = canvas, pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  const stripes = new Set();
  for (let i = 3; i < pixels.length; i += 4) if (pixels[i]) stripes.add(Math.floor(((i >> 2) % width) / 40));
  return stripes.size / Math.ceil(width / 40);
}
"""
LOSS = {"value": 3.5, "low": 3.25, "high": 3.75}
_PICTURES = "[...document.querySelectorAll('canvas')].map(canvas => canvas.toDataURL())"


def all_differ(one: list[str], other: list[str]) -> bool:
    """Whether all six plots of one look are other than those of another."""
    return len(one) == len(other) == 6 and all(a != b for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install '.[test]'")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed; apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # In a container of root's there is no sandbox to be had.
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """A page in a tab, and what the browser said of it."""

    def __init__(self, browser: Any, file: Path, settings: dict[str, Any]) -> None:
        self.context = browser.new_context(**settings)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.said.append(request.url) if request.url != file.as_uri() else None)
        self.page.goto(file.as_uri())

    def drawn(self) -> list[float]:
        """The share of each plot's width that is drawn on."""
        return [canvas.evaluate(_DRAWN) for canvas in self.page.query_selector_all("canvas")]

    def pictures(self) -> list[str]:
        return list(self.page.evaluate(f"[{_PICTURES}][0]"))

    def over(self) -> dict[str, float]:
        """The rectangle of the plot of the loss, in view."""
        plot = self.page.locator("#chart-loss .u-over")
        plot.scroll_into_view_if_needed()
        return dict(plot.bounding_box())


@pytest.fixture(scope="module")
def hostile_run(finished_run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run whose every text tries to become a part of its page."""
    run = RunDir(Path(shutil.copytree(finished_run.root, tmp_path_factory.mktemp("hostile") / "run")))
    write_history(run.metrics, 3000)
    write_samples(run, {"prompt": HOSTILE, "seed": 1, "before": "x" * 500, "after": HOSTILE * 20})
    size = plan_of(run)["sizes"][0] | {"workers": 4}
    plan_run(run, device="h200", version=HOSTILE * 20, speed=HOSTILE * 20, sizes=[size], loss=LOSS)
    result: Any = read_result(run.root)
    figures = result["evals"][-1]
    result |= {"name": HOSTILE, "status": "failed", "error": HOSTILE * 30, "evals": [figures] * 500}
    write_page(run, result)
    return run


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("settings", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_plot_is_there_nothing_overflows_and_no_console_complains(
    browser: Any, hostile_run: RunDir, settings: dict[str, Any], scheme: str
) -> None:
    opened = Opened(browser, hostile_run.report, settings | {"color_scheme": scheme})
    page = opened.page
    assert opened.said == []
    assert page.title().startswith("</script><img src=x onerror=alert(1)>")
    # Loss, learning rate, gradient norm, throughput, MFU, memory.
    assert len(opened.drawn()) == 6
    assert min(opened.drawn()) > 0.8
    width = page.evaluate("innerWidth")
    assert width == settings["viewport"]["width"]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    # Tables may scroll in themselves; all else ends where the page ends.
    wide = "e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll')"
    assert page.evaluate(f"[...document.querySelectorAll('body *')].filter({wide}).map(e => e.outerHTML)") == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    opened.context.close()


def test_the_loss_to_expect_is_drawn_across_the_plot_of_the_loss(browser: Any, run: RunDir) -> None:
    """On each scale the only plot that it changes."""
    write_history(run.metrics, 3000)
    result = read_result(run.root)
    plan_run(run)
    write_page(run, result)
    without = Opened(browser, run.report, DESKTOP)
    plan_run(run, loss=LOSS)
    write_page(run, result)
    opened = Opened(browser, run.report, DESKTOP)
    for scale in ("#reset", "#log-values"):
        pictures = []
        for one in (without, opened):
            one.page.locator(scale).click()
            pictures.append(one.pictures())
        assert [a != b for a, b in zip(*pictures, strict=True)] == [True] + [False] * 5
    assert opened.said == without.said == []
    for one in (without, opened):
        one.context.close()


def test_hovering_says_what_happened_there(browser: Any, hostile_run: RunDir) -> None:
    opened = Opened(browser, hostile_run.report, DESKTOP)
    page = opened.page
    over = opened.over()
    page.mouse.move(over["x"] + over["width"] / 2, over["y"] + 50)
    tip = page.locator("#chart-loss .tip")
    assert (
        "workers started again, 4 of them; worker 1 failed after step 1499: killed </script><img" in tip.text_content()
    )
    assert not page.locator("#chart-lr .tip").is_visible()
    legend = page.locator("#chart-loss .u-legend").text_content()
    step = legend.split("step")[1].split("training")[0]
    assert abs(int(step.replace(",", "").strip(": ")) - 1500) < 20
    opened.context.close()


def test_dragging_zooms_into_all_plots_and_logarithms_are_on_demand(browser: Any, hostile_run: RunDir) -> None:
    opened = Opened(browser, hostile_run.report, DESKTOP)
    page = opened.page

    whole = opened.pictures()
    over = opened.over()
    page.mouse.move(over["x"] + 100, over["y"] + 50)
    page.mouse.down()
    page.mouse.move(over["x"] + 300, over["y"] + 52, steps=4)
    page.mouse.up()
    page.mouse.move(5, 5)
    assert all_differ(opened.pictures(), whole)
    page.locator("#reset").click()
    assert opened.pictures() == whole
    for box in ("#log-steps", "#log-values"):
        page.locator(box).check()
        assert all_differ(opened.pictures(), whole)
        page.locator(box).uncheck()
        assert opened.pictures() == whole
    assert opened.said == []
    opened.context.close()


def test_paper_is_white_and_has_the_plots(browser: Any, hostile_run: RunDir, tmp_path: Path) -> None:
    opened = Opened(browser, hostile_run.report, DESKTOP | {"color_scheme": "dark"})
    page = opened.page
    on_screen = opened.pictures()
    look = f"window.look = [getComputedStyle(document.body).backgroundColor, {_PICTURES}]"
    page.evaluate(f"addEventListener('beforeprint', () => {{ {look} }})")
    page.pdf(path=tmp_path / "page.pdf", format="A4", print_background=True)
    background, pictures = page.evaluate("window.look")
    assert background == "rgb(255, 255, 255)"
    assert all_differ(pictures, on_screen)
    assert opened.pictures() == on_screen
    assert opened.said == []
    opened.context.close()


def test_what_a_text_smuggles_in_does_not_run(browser: Any, hostile_run: RunDir, tmp_path: Path) -> None:
    """Were a text not escaped: its script has not the hash that the page's policy asks for."""
    smuggled = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    (tmp_path / "page.html").write_text(hostile_run.report.read_text().replace("<footer>", f"{smuggled}<footer>"))
    opened = Opened(browser, tmp_path / "page.html", DESKTOP)
    opened.page.wait_for_function("document.querySelector('img').complete")
    refused = [said for said in opened.said if "Content Security Policy" in said]
    # The script, what the image would run, and the image.
    assert len(refused) == 3
    assert {*opened.said} - {*refused} <= {(tmp_path / "x").as_uri()}
    opened.context.close()


def test_a_page_of_200_000_steps_is_small_and_whole(browser: Any, finished_run: RunDir, run: RunDir) -> None:
    write_history(run.metrics, 200_000, num_evals=2000)
    result: Any = read_result(run.root)
    write_page(run, result)
    assert run.report.stat().st_size < 1_000_000
    opened = Opened(browser, run.report, DESKTOP)
    assert opened.said == []
    assert min(opened.drawn()) > 0.8
    payload = json.loads(opened.page.evaluate("document.getElementById('data').textContent"))
    assert max(payload["charts"][0]["series"][0]["y"]) == 99.0
    opened.context.close()


@pytest.mark.parametrize("settings", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_of_several_runs_is_whole_too(
    browser: Any, hostile_run: RunDir, settings: dict[str, Any], tmp_path: Path
) -> None:
    labels = [HOSTILE, *(f"a-run-with-a-long-name-{number}" for number in range(9))]
    result = read_result(hostile_run.root)
    write_comparison(tmp_path / "page.html", [hostile_run] * 10, labels, [result] * 10, [HOSTILE])
    opened = Opened(browser, tmp_path / "page.html", settings)
    assert opened.said == []
    # Eval and training loss, learning rate, gradient norm, throughput, MFU, memory.
    assert len(opened.drawn()) == 7
    assert min(opened.drawn()) > 0.8
    assert opened.page.evaluate("document.documentElement.scrollWidth") == settings["viewport"]["width"]
    assert "</script><img" in opened.page.locator("#chart-eval .u-legend").text_content()
    opened.context.close()
