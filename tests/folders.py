"""Folders of pictures and captions, written for a test."""

import json

from PIL import Image


def picture(path, size=(40, 30), colour=(200, 30, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def write(path, content):
    """Text, bytes as they are, or a list of rows as lines of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "\n".join(map(json.dumps, content))
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def captions(listing) -> dict:
    """Of the images that are used."""
    return {name: listing.captions[name] for name in listing.sources}


def reasons(listing) -> dict:
    """The first names by reason."""
    return listing.left_out.examples
