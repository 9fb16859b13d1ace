"""A folder of captioned images as a dataset: read, and encoded as far as the cache has room."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths

from ...data.cache import Cache
from ...data.dataset import Dataset
from ...data.folder import ImageFolder, read_folder
from ...data.inputs import DatasetInputs
from ...errors import SoftREPAError
from .folder_encodings import FolderEncodings

CACHE_FOLDER = "softrepa_cache"
"""In extra_model_paths.yaml: where the cache shall lie instead of ComfyUI's user folder."""

GIGABYTE = 10**9


def dataset_of_folder(
    root: Path,
    name: str,
    clip: comfy.sd.CLIP,
    vae: comfy.sd.VAE,
    inputs: DatasetInputs,
    share: tuple[int, int] = (0, 1),
) -> Dataset:
    """Reads and encodes the folder; what the cache has no room for is encoded whenever it is drawn.

    share: (place, number) of the processes that do so at the same time, with one cache.
    """
    check_resolution(inputs.resolution, vae)
    settings = {"folder": name} | asdict(inputs)
    del settings["cache_gb"]  # it decides nothing
    if clip.tokenizer_options:
        settings["tokenizer_options"] = dict(clip.tokenizer_options)
    if clip.layer_idx is not None:
        settings["clip_layer"] = clip.layer_idx
    home = cache_folder()
    index = home / "files" / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.json"
    cache = Cache(home, int(inputs.cache_gb * GIGABYTE))

    def encoded() -> tuple[ImageFolder, Dataset]:
        tick = reading_progress()
        how = (inputs.resolution, inputs.bucketing, inputs.validation_percent)
        images = read_folder(root, name, *how, index, tick, inputs.caption_lines)
        encodings = FolderEncodings(images, clip, vae, cache)
        encodings.share = share
        dataset = Dataset(name, images.train, images.validation, encodings, images.notes)  # refuses before any encoding
        dataset.settings = settings
        images.notes.append(encodings.fill())
        return images, dataset

    images, dataset = encoded()
    if images.is_outdated:  # a large file is damaged behind its head: now that is known, it is left out with the reason
        images, dataset = encoded()
    return dataset


def cache_folder() -> Path:
    """`softrepa_cache` of extra_model_paths.yaml, else a folder of ComfyUI's user folder that is not served."""
    named = folder_paths.folder_names_and_paths.get(CACHE_FOLDER, ([],))[0]
    return Path(named[0]) if named else Path(folder_paths.get_user_directory()) / "__softrepa" / "cache"


def check_resolution(resolution: int, vae: comfy.sd.VAE) -> None:
    step = vae.spacial_compression_encode()
    if resolution % step:
        raise SoftREPAError(f"resolution is {resolution}, expected a multiple of {step}, as this VAE needs.")


def reading_progress() -> Callable[[int, int], None]:
    """A progress bar for reading files, which an interrupt stops."""
    bar = None

    def tick(done: int, total: int) -> None:
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        if total:
            bar = bar or comfy.utils.ProgressBar(total)
            bar.update_absolute(done)

    return tick
