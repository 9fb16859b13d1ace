"""What a person does in ComfyUI's frontend, by its own menus and dialogs."""

from pathlib import Path

from playwright.sync_api import Page


class Frontend:
    """A page of ComfyUI; `errors` is what its console complained about."""

    def __init__(self, page: Page, server, screenshots: Path):
        self.page, self.server, self.screenshots = page, server, screenshots
        self.errors: list[str] = []
        page.set_default_timeout(30_000)
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _heard(self, message) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} {message.location.get('url', '')}")

    def open(self) -> None:
        self.page.goto(f"http://127.0.0.1:{self.server.port}/")
        self.page.wait_for_function("window.app?.graph && window.app.extensionManager?.workflow?.activeWorkflow")
        self.page.wait_for_timeout(1500)
        self.page.keyboard.press("Escape")

    def command(self, name: str) -> None:
        self.page.evaluate("name => app.extensionManager.command.execute(name)", name)

    def screenshot(self, name: str) -> Path:
        path = self.screenshots / f"{name}.png"
        self.page.screenshot(path=path)
        return path

    def open_template(self, title: str) -> None:
        """From the template browser, by clicks."""
        self.command("Comfy.BrowseTemplates")
        self.page.get_by_text("comfyui-softrepa").first.click()
        self.page.get_by_text(title, exact=True).first.click()
        self.page.wait_for_function(
            "title => app.extensionManager.workflow.activeWorkflow?.path?.includes(title)", arg=title
        )
        self.page.wait_for_timeout(1000)
