"""The small world: a text-to-image model of 4M parameters that comes with the pack, to try everything on."""
