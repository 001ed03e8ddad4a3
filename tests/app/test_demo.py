"""The demo as a visitor meets it: a real server, driven in a real headless Chromium."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from loco_diffusion import LoCOConfig
from loco_diffusion.conditions import condition_names
from loco_diffusion.console import run_app
from loco_diffusion.control import EncoderConfig
from loco_diffusion.data.render import render
from loco_diffusion.data.scenes import TEST_SEEDS, sample_scene
from loco_diffusion.generation import PACKAGED_SIZE, open_session
from loco_diffusion.images import to_pil

if TYPE_CHECKING:
    from playwright.sync_api import Page

FILE = Path(__file__).parents[2] / "app" / "demo.py"
sys.path.insert(0, str(FILE.parent))
import demo  # noqa: E402

START = 240  # seconds; a loaded machine imports and loads slowly
CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def chromium() -> str:
    """Path of the browser; without one the tests are skipped, in CI they fail."""
    path = shutil.which("chromium")
    if path is None:
        reason = "no chromium is installed (on Debian: apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="module")
def adapters(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter for each condition, with random weights that change the picture."""
    controller = open_session().controller
    folders = {}
    for name in condition_names():
        config = LoCOConfig(r=1, num_rotations=1)
        controller.add_adapter(name, config, encoder=EncoderConfig(hidden_size=8))
        generator = torch.Generator().manual_seed(0)
        for group in controller.trainable_parameters(name).values():
            for parameter in group:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        folders[name] = controller.save_adapter(tmp_path_factory.mktemp("adapters") / name, name)
    return folders


@pytest.fixture(scope="module")
def address(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a running demo with the packaged base."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [part for name, folder in adapters.items() for part in ("--adapter", f"{name}={folder}")]
    folder = tmp_path_factory.mktemp("demo")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(FILE.parents[1]),
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
    }
    log = folder / "log"
    with log.open("wb") as output:
        command = [sys.executable, str(FILE), "--port", str(port), *options]
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + START
        while b"is ready at" not in log.read_bytes():
            assert server.poll() is None and time.monotonic() < end, log.read_text(errors="replace")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def page(chromium: str, address: str) -> Iterator[Page]:
    """The open page; after the test, nothing must have gone wrong in it or been asked for elsewhere."""
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda r: None if r.url.startswith((address, "data:", "blob:")) else complaints.append(r.url),
        )
        page.goto(address)
        page.get_by_role("button", name="Generate").wait_for()
        yield page
        browser.close()
    assert complaints == []


def widths(page: Page, gallery: str, count: int) -> list[int]:
    """The widths of a component's pictures in file pixels, once there are `count` and all are loaded."""
    page.wait_for_function(
        "([gallery, count]) => { const all = [...document.querySelectorAll(gallery + ' img')];"
        " return all.length === count && all.every(image => image.complete && image.naturalWidth) }",
        arg=[gallery, count],
    )
    return page.eval_on_selector_all(f"{gallery} img", "all => all.map(image => image.naturalWidth)")


@pytest.mark.slow
def test_a_visitor_redraws_a_picture(page: Page, tmp_path: Path) -> None:
    generate = page.get_by_role("button", name="Generate")
    generate.click()
    page.get_by_text("There is no picture yet; upload one or click an example.").wait_for()

    photo = tmp_path / "photo.png"
    to_pil(render([sample_scene(TEST_SEEDS[100])], (96, 160)).image[0]).save(photo)
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(photo.read_bytes()[:200])
    upload = page.locator("#picture input[type=file]")
    upload.set_input_files(damaged)
    page.get_by_text("damaged.png is damaged").wait_for()
    page.locator("#picture").get_by_role("button", name="Remove Image").click()

    upload.set_input_files(photo)
    page.get_by_label("Edges", exact=True).check()
    assert widths(page, "#maps", 1) == [PACKAGED_SIZE]

    page.get_by_label("What you want to see").fill("a large glossy red sphere")
    page.get_by_text("Settings").click()
    page.get_by_label("number input for Steps").fill("2")
    generate.click()
    assert widths(page, "#compare", 2) == [PACKAGED_SIZE] * 2
    without, controlled = page.eval_on_selector_all("#compare img", "all => all.map(image => image.src)")
    assert page.request.get(without).body() != page.request.get(controlled).body()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "canny"], "--adapter 'canny' has another form"),
        (["--adapter", "sketch=somewhere"], "There is no condition 'sketch'"),
        (["--model", "somewhere"], "The packaged adapters do not fit somewhere"),
    ],
)
def test_bad_options_end_with_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(demo.app, "demo.py", arguments) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == 1
