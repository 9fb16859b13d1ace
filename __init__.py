"""SoftREPA for ComfyUI: learned soft text tokens that make text-to-image models follow their prompts better."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./nodes/web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
