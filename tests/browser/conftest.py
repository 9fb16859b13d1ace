"""ComfyUI's real frontend in headless Chromium, on a server with small stand-ins under the names that people have."""

import os
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from softrepa_tests import published

from tools import frontend as pages
from tools.server import ComfyServer
from tools.standins import stand_in
from tools.workflows.models import MODELS

STAND_INS = ("sd15", "sd3")
CAPTIONS = ("a red square", "a blue circle", "two cats", "a house by the sea", "an empty street", "green hills")

if pages.find_chromium() is None:
    pytest.exit("tests/browser needs Chromium: install it, or set CHROMIUM to its path.", returncode=2)


def fill(work: Path) -> None:
    """Models, tokens and pictures under the names that the templates carry. Files of others are only listed."""
    tokens = work / "models" / "softrepa"
    tokens.mkdir(parents=True)
    for model in MODELS:
        standing_in = stand_in(model.family) if model.family in STAND_INS else None
        for file in model.files:
            path = work / "models" / file.directory / file.name
            path.parent.mkdir(exist_ok=True)
            if standing_in:
                path.symlink_to(standing_in.checkpoint)
            else:
                save_file({"nothing": torch.zeros(1)}, path)
        if standing_in:
            shutil.copy(standing_in.tokens, tokens / model.tokens)
        else:
            save_file({"nothing": torch.zeros(1)}, tokens / model.tokens)
    published.write(tokens / "sd3", "sd3")
    folder = work / "input" / "my_pictures"
    folder.mkdir(parents=True)
    for index, caption in enumerate(CAPTIONS):
        Image.new("RGB", (64 + 8 * index, 64), (40 * index, 90, 200 - 30 * index)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption, encoding="utf-8")
    shutil.copy(Path(os.environ["COMFYUI_PATH"]) / "input" / "example.png", work / "input")
    settings = work / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"Comfy.TutorialCompleted": true}', encoding="utf-8")  # or the templates open by themselves


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    work = tmp_path_factory.mktemp("browser")
    fill(work)
    with ComfyServer(work, arguments=("--preview-method", "latent2rgb")) as running:
        yield running


@pytest.fixture(scope="module")  # while Playwright runs, its thread can start no event loop
def browser():
    with pages.chromium() as running:
        yield running


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory) -> Path:
    """SOFTREPA_SCREENSHOTS, or a temporary folder."""
    folder = Path(os.environ.get("SOFTREPA_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def page_of(browser, screenshots):
    """`with page_of(server) as frontend`: a fresh page, in the browser's language `locale`."""

    @contextmanager
    def opened(server, locale="en-US"):
        with browser.new_context(viewport={"width": 1680, "height": 1050}, locale=locale) as context:
            page = pages.Frontend(context.new_page(), server.port, screenshots)
            page.open()
            yield page

    return opened


class KeptPage:
    """The page of a module's tests: opening one takes the most time of all. Dropped, the next test gets a fresh one."""

    def __init__(self, opened):
        self.opened, self.page, self.stack = opened, None, ExitStack()

    def get(self) -> pages.Frontend:
        if self.page is None:
            self.page = self.stack.enter_context(self.opened())
        return self.page

    def drop(self) -> None:
        self.page = None
        self.stack.close()


@pytest.fixture(scope="module")
def kept_page(server, page_of):
    kept = KeptPage(lambda: page_of(server))
    yield kept
    kept.drop()


@pytest.fixture
def frontend(kept_page, request):
    """The frontend with an empty graph. Errors in its console fail the test. After a failure it is a fresh page."""
    failed = request.session.testsfailed
    try:
        page = kept_page.get()
        page.start_over()
    except BaseException:
        kept_page.drop()
        raise
    yield page
    errors = list(page.errors)
    if errors or request.session.testsfailed > failed:
        kept_page.drop()
    assert errors == [], "\n".join(errors)


@pytest.fixture(scope="session")
def info(server) -> dict:
    return server.object_info()


@pytest.fixture(autouse=True)
def inference():
    """Nothing runs in this process."""
