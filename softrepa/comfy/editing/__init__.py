"""FlowEdit under ComfyUI."""
