"""A folder's images and captions through ComfyUI's VAE and CLIP, kept on disk as far as there is room.

Latents are stored as the VAE gives them (float32, the posterior's mean): the model's `process_latent_in` is the
trainer's. Text is stored in float16, and an encoding made on the spot is rounded the same way, so that a run does not
depend on what was cached; only the empty caption, which tokens may start from, is kept as it is.
"""

import hashlib
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ...data.batches import Example
from ...data.cache import Cache
from ...data.dataset import Cond, Dataset
from ...data.folder import ImageFolder, UnusableImageError, read_folder
from ...data.images import PREPARATION
from ...data.inputs import DatasetInputs
from ...data.latent_lists import cond_of
from ...errors import SoftREPAError, shown
from ..identity import clip_identity, vae_identity

CACHE_FOLDER = "softrepa_cache"
"""In extra_model_paths.yaml: where the cache shall lie instead of ComfyUI's user folder."""

GIGABYTE = 10**9


def dataset_of_folder(root: Path, name: str, clip: comfy.sd.CLIP, vae: comfy.sd.VAE, inputs: DatasetInputs) -> Dataset:
    """Reads and encodes the folder; what the cache has no room for is encoded whenever it is drawn."""
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


class FolderEncodings:
    """Encodings by content: the digest of an image's file and its size, or a caption, and who encodes it."""

    def __init__(self, images: ImageFolder, clip: comfy.sd.CLIP, vae: comfy.sd.VAE, cache: Cache):
        self.images, self.clip, self.vae, self.cache = images, clip, vae, cache
        self.clip_name, self.vae_name = clip_identity(clip), vae_identity(vae)
        self._empty: Cond | None = None

    @property
    def identity(self) -> str:
        return f"{self.clip_name} {self.vae_name}"

    @property
    def empty(self) -> Cond:
        if self._empty is None:
            self._empty = encode_caption(self.clip, "")
        return self._empty

    def latent(self, example: Example) -> Tensor:
        shape = self._latent_shape(example)
        stored = self._kept(
            self._image_key(example),
            lambda entry: {name: tensor.shape for name, tensor in entry.items()} == {"latent": shape},
            lambda: {"latent": self._encode_image(example)},
        )
        return stored["latent"]

    def cond(self, caption: str) -> Cond:
        stored = self._kept(self._text_key(caption), self._is_text, lambda: self._encode_text(caption))
        return {"cross_attn": stored["cross_attn"].float(), "pooled_output": stored.get("pooled_output")}

    def prepare(self, captions: list[str]) -> str:
        return self.fill(captions)

    def fill(self, further: Sequence[str] = ()) -> str:
        """Encodes what is not in the cache, as far as it has room; says in a line what lies where.

        `further` are captions beside those of the images. Of images that have no room nothing is read.
        """
        examples = self.images.train + self.images.validation
        captions = sorted({caption for one in examples for caption in one.captions}.union(further))
        known = [self._image_key(one) for one in examples if self.images.known_digest(one)]
        texts = {caption: self._text_key(caption) for caption in captions}
        self.cache.survey(keep={*known, *texts.values()})
        new_images = [one for one in examples if not self._has_latent(one)]
        new_texts = [caption for caption, key in texts.items() if not self.cache.has(key)]
        if new_images or new_texts:
            logging.info(
                "SoftREPA: up to %d images and %d captions to encode; the cache in %s takes %s, its limit is %s",
                *(len(new_images), len(new_texts), self.cache.folder),
                *(megabytes(self.cache.used), megabytes(self.cache.limit)),
            )
        bar = comfy.utils.ProgressBar(len(new_images) + len(new_texts))
        try:
            self._encode(bar, new_images, self._latent_size, self.latent, self._has_latent)
            self._encode(bar, new_texts, lambda _: self._text_size(), self.cond, lambda one: self.cache.has(texts[one]))
        finally:
            self.images.finish()
        absent = (
            sum(not self._has_latent(one) for one in new_images),
            sum(not self.cache.has(texts[one]) for one in new_texts),
        )
        if not any(absent):
            return "encoded and cached"
        return (
            f"encoded and cached, except {absent[0]} images and {absent[1]} captions for which cache_gb leaves no "
            "room: they are encoded again whenever they are drawn"
        )

    def _encode(self, bar, items: list, size: Callable, encode: Callable, has: Callable) -> None:
        """In order, until there is no room for one of at least `size` bytes, or one has turned out to be larger."""
        for item in items:
            if not self.cache.has_room(size(item)):
                return
            comfy.model_management.throw_exception_if_processing_interrupted()
            try:
                encode(item)
            except UnusableImageError:  # whoever reads the folder is told
                continue
            finally:
                bar.update(1)
            if not has(item):
                return

    def _has_latent(self, example: Example) -> bool:
        return bool(self.images.known_digest(example)) and self.cache.has(self._image_key(example))

    def _is_text(self, entry: dict[str, Tensor]) -> bool:
        """Of any length, and of the width that the encoder gives."""
        widths = {name: tensor.shape[-1] for name, tensor in self.empty.items() if isinstance(tensor, Tensor)}
        if {name: tensor.shape[-1] for name, tensor in entry.items() if tensor.ndim} != widths:
            return False
        return entry["cross_attn"].ndim == 3 and len(entry["cross_attn"]) == 1

    def _text_size(self) -> int:
        """Bytes of the shortest text."""
        return 2 * self.empty["cross_attn"].numel()

    def _latent_size(self, example: Example) -> int:
        return 4 * math.prod(self._latent_shape(example))

    def _latent_shape(self, example: Example) -> tuple[int, int, int]:
        width, height = (side // self.vae.spacial_compression_encode() for side in example.size)
        return self.vae.latent_channels, height, width

    def _kept(
        self, key: str, is_right: Callable[[dict[str, Tensor]], bool], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """From the cache, unless it is not there or not what it should be."""
        stored = self.cache.read(key)
        if stored is not None and is_right(stored):
            return stored
        self.cache.drop(key)
        made = make()
        try:
            self.cache.write(key, made)
        except OSError as error:
            self.cache.limit = 0  # what does not fit is encoded again whenever it is drawn
            logging.warning("SoftREPA: the cache in %s cannot be written (%s)", self.cache.folder, error)
        return made

    def _encode_image(self, example: Example) -> Tensor:
        pixels = self.images.pixels(example)
        with torch.inference_mode():
            latent = self.vae.encode(pixels.unsqueeze(0))
        if latent.ndim != 4:
            raise SoftREPAError(
                f"vae gives latents of shape {list(latent.shape)}, expected those of still images, "
                "[1, channels, height, width]."
            )
        if not latent.isfinite().all():
            raise SoftREPAError(
                f"vae gives NaN or infinite values for {shown(example.name)}, expected numbers; "
                "run ComfyUI with --fp32-vae."
            )
        return ordinary(latent[0])

    def _encode_text(self, caption: str) -> dict[str, Tensor]:
        cond = encode_caption(self.clip, caption)
        half = cond["cross_attn"].half()
        stored = {"cross_attn": half if half.isfinite().all() else cond["cross_attn"]}
        pooled = cond["pooled_output"]
        return stored if pooled is None else stored | {"pooled_output": pooled}

    def _image_key(self, example: Example) -> str:
        width, height = example.size
        digest = self.images.digest(example)
        return f"latent/{self.vae_name}/{digest[:2]}/{digest}-{width}x{height}-{PREPARATION}"

    def _text_key(self, caption: str) -> str:
        digest = hashlib.sha256(caption.encode()).hexdigest()
        return f"text/{self.clip_name}/{digest[:2]}/{digest}"


def encode_caption(clip: comfy.sd.CLIP, caption: str) -> Cond:
    """Brackets in a caption are brackets, no weights."""
    with torch.inference_mode():
        entries = clip.encode_from_tokens_scheduled(clip.tokenize(caption, disable_weights=True), show_pbar=False)
    if len(entries) != 1:
        raise SoftREPAError(f"clip gives {len(entries)} encodings by a schedule, expected one; leave hooks out.")
    cond = cond_of(entries[0], "clip")
    pooled = cond["pooled_output"]
    return {"cross_attn": ordinary(cond["cross_attn"]), "pooled_output": None if pooled is None else ordinary(pooled)}


def ordinary(tensor: Tensor) -> Tensor:
    """A float32 copy on the CPU that autograd may save."""
    with torch.inference_mode(False):
        return tensor.cpu().float().clone()


def reading_progress() -> Callable[[int, int], None]:
    """A progress bar for reading files, which an interrupt stops."""
    bar = None

    def tick(done: int, total: int) -> None:
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done)

    return tick


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
