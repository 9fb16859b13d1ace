"""The encodings of a folder's images and captions, kept on disk as far as there is room."""

import hashlib
import logging
import math
from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.sd
import comfy.utils
from torch import Tensor

from ...data.batches import Example
from ...data.cache import Cache
from ...data.dataset import Cond
from ...data.folder import ImageFolder, UnusableImageError
from ...data.images import PREPARATION
from ..identity import clip_identity, vae_identity
from .encoding import encode_caption, encode_image, stored_text, text_of


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
            lambda: {"latent": encode_image(self.vae, self.images.pixels(example), example.name)},
        )
        return stored["latent"]

    def cond(self, caption: str) -> Cond:
        stored = self._kept(
            self._text_key(caption), self._is_text, lambda: stored_text(encode_caption(self.clip, caption))
        )
        return text_of(stored)

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
        expected = stored_text(self.empty)
        if entry.keys() != expected.keys():
            return False
        widths = {name: expected[name].shape[-1:] for name in ("cross_attn", "pooled_output") if name in expected}
        if {name: entry[name].shape[-1:] for name in widths} != widths:
            return False
        return entry["cross_attn"].ndim == 3 and len(entry["cross_attn"]) == 1

    def _text_size(self) -> int:
        """Bytes of the shortest text."""
        return 2 * self.empty["cross_attn"].numel()

    def _latent_size(self, example: Example) -> int:
        return 4 * math.prod(self._latent_shape(example))

    def _latent_shape(self, example: Example) -> tuple[int, ...]:
        width, height = (side // self.vae.spacial_compression_encode() for side in example.size)
        frames = (1,) if getattr(self.vae, "latent_dim", 2) == 3 else ()
        return self.vae.latent_channels, *frames, height, width

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

    def _image_key(self, example: Example) -> str:
        width, height = example.size
        digest = self.images.digest(example)
        return f"latent/{self.vae_name}/{digest[:2]}/{digest}-{width}x{height}-{PREPARATION}"

    def _text_key(self, caption: str) -> str:
        digest = hashlib.sha256(caption.encode()).hexdigest()
        return f"text/{self.clip_name}/{digest[:2]}/{digest}"


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
