"""Everything that imports ComfyUI."""
