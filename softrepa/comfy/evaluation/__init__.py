"""What `softrepa evaluate` draws and edits, by ComfyUI's samplers."""
