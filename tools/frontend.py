"""What a person does in ComfyUI's frontend in headless Chromium, by its own menus and dialogs."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, TimeoutError, sync_playwright

PACK = "comfyui-softrepa"
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
OPENING = 120_000
"""Milliseconds: a fresh page compiles the whole frontend."""
HAS_ITS_PICTURES = """() => {
    const images = [...document.querySelectorAll('.node-help-content img')]
    return images.length && images.every(image => image.naturalWidth > 50)
}"""
SEARCH_DIALOG = "Most relevant"
"""What is always written in it."""
OWN_COMPLAINTS = (
    "/user.css",
    "/api/userdata",
    "ComfyApp graph accessed before initialization",
    "z_image_turbo",
    "/en.md",
)
"""What the frontend says on any fresh installation: no user's files, no models for its first graph, no translations."""


def find_chromium() -> str | None:
    """CHROMIUM, or the one on the path."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    path = find_chromium()
    if path is None:
        raise FileNotFoundError("Chromium was not found: install it, or set CHROMIUM to its path.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


class Frontend:
    """A page of ComfyUI; `errors` is what its console complained about."""

    def __init__(self, page: Page, port: int, screenshots: Path):
        self.page, self.port, self.screenshots = page, port, screenshots
        self.errors: list[str] = []
        page.set_default_timeout(20_000)
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _heard(self, message) -> None:
        text = f"{message.text} {message.location.get('url', '')}"
        if message.type == "error" and not any(part in text for part in OWN_COMPLAINTS):
            self.errors.append(text)

    def open(self) -> None:
        self.page.goto(f"http://127.0.0.1:{self.port}/", timeout=OPENING)
        self.page.wait_for_function(
            "Boolean(window.app?.isGraphReady && window.app.extensionManager?.workflow?.activeWorkflow)",
            timeout=OPENING,
        )
        self.page.wait_for_function("Boolean(window.LiteGraph?.registered_node_types?.KSampler)", timeout=OPENING)
        self.page.wait_for_load_state("networkidle", timeout=OPENING)  # a fresh installation loads a graph of its own
        self.page.wait_for_timeout(1000)
        self.page.keyboard.press("Escape")
        # texts are drawn however small the graph is shown
        self.page.evaluate("app.ui.settings.setSettingValueAsync('LiteGraph.Canvas.MinFontSizeForLOD', 0)")

    def command(self, name: str) -> None:
        self.page.evaluate("name => app.extensionManager.command.execute(name)", name)

    def screenshot(self, name: str, clip: Any = None) -> Path:
        path = self.screenshots / f"{name}.png"
        self.page.screenshot(path=path, clip=clip)
        return path

    def browse_templates(self) -> None:
        self.command("Comfy.BrowseTemplates")
        self.page.get_by_role("dialog").get_by_text(PACK, exact=True).first.click()
        self.page.get_by_text("Node graph").first.wait_for()
        self.page.wait_for_timeout(500)

    def open_template(self, title: str) -> None:
        """From the template browser, by clicks; shown whole."""
        self.browse_templates()
        card = self.page.get_by_role("dialog").get_by_text(title, exact=True).first
        card.scroll_into_view_if_needed()
        card.click()
        self.page.wait_for_function(
            "title => app.graph._nodes.length && app.extensionManager.workflow.activeWorkflow?.path?.includes(title)",
            arg=title,
        )
        self.settle()

    def load(self, graph: dict) -> None:
        """As a saved workflow that is dropped on the canvas."""
        self.page.evaluate("graph => app.loadGraphData(graph)", graph)
        self.settle()

    def settle(self) -> None:
        self.page.wait_for_timeout(700)
        self.drawn()
        self.command("Comfy.Canvas.FitView")
        self.page.wait_for_timeout(700)
        self.drawn()

    def drawn(self) -> None:
        """Places of nodes, widgets and links are those of the last frame, and frames are rare on a busy machine."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def start_over(self) -> None:
        """An empty graph at the first zoom, no dialog, no complaint of before. Settings stay."""
        self.page.keyboard.press("Escape")
        for dialog in (self.page.get_by_text(SEARCH_DIALOG), self.page.get_by_role("dialog")):
            dialog.first.wait_for(state="hidden")
        self.page.evaluate("app.canvas.setGraph(app.rootGraph)")  # from the inside of a blueprint
        self.page.evaluate("app.canvas.ds.reset()")
        self.clear()
        self.errors.clear()

    def clear(self) -> None:
        self.page.evaluate("app.graph.clear()")

    def search(self, words: str) -> None:
        """Double-click on the empty canvas and fill in the words; the list of results follows at once."""
        dialog = self.page.get_by_text(SEARCH_DIALOG)
        for _ in range(4):  # the first click may come while the page is still busy
            self.page.mouse.dblclick(800, 500)
            try:
                dialog.first.wait_for(timeout=10_000)  # once it is there, another click would add what lies below
                break
            except TimeoutError:
                continue
        self.page.locator("input[aria-controls=results-list]").fill(words)

    def add(self, class_type: str, x: int = 300, y: int = 200) -> None:
        self.page.evaluate(
            """([type, x, y]) => {
                const node = LiteGraph.createNode(type)
                node.pos = [x, y]
                app.graph.add(node)
            }""",
            [class_type, x, y],
        )
        self.page.wait_for_timeout(300)
        self.drawn()

    def put_down(self, x: int, y: int) -> None:
        """A node that follows the pointer. It is drawn there a little later; a click at once may hit its text boxes."""
        self.page.wait_for_function("app.canvas.state.ghostNodeId != null")
        self.page.mouse.move(x, y)
        self.page.wait_for_timeout(300)
        self.drawn()
        self.page.mouse.click(x, y)
        self.page.wait_for_function("app.canvas.state.ghostNodeId == null")

    def zoom(self, scale: float, offset: tuple[int, int]) -> None:
        self.page.evaluate(
            """([scale, offset]) => {
                app.canvas.ds.scale = scale
                app.canvas.ds.offset = offset
                app.canvas.setDirty(true, true)
            }""",
            [scale, offset],
        )
        self.page.wait_for_timeout(500)
        self.drawn()

    def scale(self) -> float:
        return self.page.evaluate("app.canvas.ds.scale")

    def nodes(self) -> list[dict]:
        """id, type, place, size and complaints of every node."""
        return self.page.evaluate(
            """app.graph._nodes.map(node => ({
                id: String(node.id), type: node.type, title: node.title, pos: [...node.pos], size: [...node.size],
                known: node.type in LiteGraph.registered_node_types || node.isVirtualNode === true,
                wrong: Boolean(node.has_errors) || node.inputs.some(input => input.hasErrors),
                widgets: (node.widgets ?? []).map(widget => widget.name),
                images: (node.imgs ?? []).filter(image => image.naturalWidth > 1).length,
            }))"""
        )

    def prompt(self) -> dict:
        """What Run would send."""
        return self.page.evaluate("app.graphToPrompt().then(found => found.output)")

    def set_widgets(self, values: dict[str, dict]) -> None:
        """{class type: {widget: value}} on every node of the class."""
        self.page.evaluate(
            """values => {
                for (const node of app.graph._nodes)
                    for (const [name, value] of Object.entries(values[node.type] ?? {}))
                        node.widgets.find(widget => widget.name === name).value = value
            }""",
            values,
        )

    def run(self, timeout: float = 300) -> dict:
        """Press Run and wait for the end. What was seen: progress by node, previews, the error if there was one."""
        self.start()
        self.page.wait_for_function("window.seen.done", timeout=timeout * 1000)
        self.page.wait_for_timeout(1500)
        return self.page.evaluate("window.seen")

    def start(self) -> None:
        """Press Run and look on."""
        self.page.evaluate(
            """() => {
                const seen = window.seen = {progress: {}, previews: {}, texts: {}, error: null, done: false}
                const on = (name, call) => app.api.addEventListener(name, event => call(event.detail))
                on('progress', detail => { seen.progress[detail.node] = [detail.value, detail.max] })
                on('b_preview_with_metadata', detail => {
                    seen.previews[detail.displayNodeId ?? detail.nodeId] = detail.blob.size
                })
                on('progress_text', detail => { seen.texts[detail.nodeId] = detail.text })
                on('execution_error', detail => { seen.error = detail; seen.done = true })
                on('execution_interrupted', () => { seen.interrupted = true; seen.done = true })
                on('execution_success', () => { seen.done = true })
            }"""
        )
        self.page.get_by_test_id("queue-button").first.click()

    def box(self, node_id: str, margin: int = 12) -> dict:
        """Where a node is on the page, for a screenshot."""
        x, y, width, height = self.page.evaluate(
            """id => {
                const node = app.graph.getNodeById(id), canvas = app.canvas
                const rect = canvas.canvas.getBoundingClientRect(), [x, y, w, h] = node.boundingRect
                const [left, top] = canvas.ds.convertOffsetToCanvas([x, y])
                return [left + rect.left, top + rect.top, w * canvas.ds.scale, h * canvas.ds.scale]
            }""",
            node_id,
        )
        return {"x": x - margin, "y": y - margin, "width": width + 2 * margin, "height": height + 2 * margin}

    def widget_point(self, node_id: str, name: str) -> tuple[float, float]:
        return self.page.evaluate(
            """([id, name]) => {
                const node = app.graph.getNodeById(id), canvas = app.canvas
                const rect = canvas.canvas.getBoundingClientRect()
                const widget = node.widgets.find(widget => widget.name === name)
                const [x, y] = canvas.ds.convertOffsetToCanvas([node.pos[0] + 60, node.pos[1] + widget.y + 10])
                return [x + rect.left, y + rect.top]
            }""",
            [node_id, name],
        )

    def help(self) -> str:
        """Select the first node by a click on its title and press its info button; the panel's text, with pictures."""
        box = self.box("1", margin=0)
        self.page.mouse.click(box["x"] + 120, box["y"] + 15)
        self.page.get_by_test_id("info-button").first.click()
        self.page.locator(".node-help-content h1").first.wait_for()  # until the page is there it holds a spinner
        self.page.wait_for_function(HAS_ITS_PICTURES)
        return self.page.locator(".node-help-content").first.inner_text()


def read_graph(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
