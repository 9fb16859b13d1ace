"""The encodings of a folder's images and captions, kept on disk as far as there is room."""

import hashlib
import logging
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...data.ahead import UP_FRONT, Needed
from ...data.batches import Example, by_size
from ...data.cache import Cache
from ...data.dataset import Cond
from ...data.folder import ImageFolder, UnusableImageError
from ...data.images import PREPARATION
from ..identity import clip_identity, vae_identity
from .encoding import (
    REST,
    encode_caption,
    encode_captions,
    encode_images,
    images_at_once,
    is_of_video,
    stored_text,
    text_of,
)

Entry = dict[str, Tensor]
Encode = Callable[[list[Example], list[str]], None]
"""Of images and captions."""

CAPTIONS = 32
"""Captions that are given to the text encoder together."""
MOST_HELD = 2**30
"""Bytes of a stretch that may lie in memory because the cache has no room for them: about, for a text tells its length
when it is encoded."""
LEAST_PATIENCE = 5.0
"""Seconds that another process gets for its share; more where the own one took long."""


class FolderEncodings:
    """Encodings by content: the digest of an image's file and its size, or a caption, and who encodes it.

    share: (rank, number) of processes that draw the same batches and use the same folder of the cache. Each encodes a
    part and takes the rest from there.
    """

    def __init__(self, images: ImageFolder, clip: comfy.sd.CLIP, vae: comfy.sd.VAE, cache: Cache):
        self.images, self.clip, self.vae, self.cache = images, clip, vae, cache
        self.clip_name, self.vae_name = clip_identity(clip), vae_identity(vae)
        self.share = (0, 1)
        self._texts, self._text_bytes = 0, 0

    @property
    def identity(self) -> str:
        return f"{self.clip_name} {self.vae_name}"

    @cached_property
    def empty(self) -> Cond:
        return encode_caption(self.clip, "")

    def latent(self, example: Example) -> Tensor:
        return Stretch(self).latent(example)

    def cond(self, caption: str) -> Cond:
        return Stretch(self).cond(caption)

    def prepare(self, captions: list[str]) -> str:
        return self.fill(captions) if captions else ""

    def fill(self, further: Sequence[str] = ()) -> str:
        """Encodes what is not in the cache, as far as it has room, unless that is much; says in a line what lies where.

        `further` are captions beside those of the images. Of images that have no room nothing is read.
        """
        examples = self.images.train + self.images.validation
        captions = sorted({caption for one in examples for caption in one.captions}.union(further))
        texts = {caption: self.text_key(caption) for caption in captions}
        known = {self.image_key(one) for one in examples if self.images.known_digest(one)}
        self.cache.survey(keep=known.union(texts.values()))
        new_images = [one for one in examples if not self.has_latent(one)]
        new_texts = [caption for caption, key in texts.items() if not self.cache.has(key)]
        if len(new_images) + len(new_texts) > UP_FRONT:
            return (
                f"{len(new_images)} of {len(examples)} images and {len(new_texts)} of {len(captions)} captions are not "
                "encoded yet: those that are drawn are encoded while training, a stretch of steps ahead"
            )
        if new_images or new_texts:
            logging.info(
                "SoftREPA: up to %d images and %d captions to encode; the cache in %s takes %s, its limit is %s",
                *(len(new_images), len(new_texts), self.cache.folder),
                *(megabytes(self.cache.used), megabytes(self.cache.limit)),
            )
        bar = comfy.utils.ProgressBar(len(new_images) + len(new_texts))

        def encode(images: list[Example], some: list[str]) -> None:
            for example, latent in self.encoded_images(self._with_room(images)):
                self.keep(self.image_key(example), latent)
                bar.update(1)  # an interrupt shows here
            room = max(0, self.cache.room() // self._shortest_text)
            for caption, text in self.encoded_captions(some[:room]):
                has_room = self.keep(texts[caption], text)
                bar.update(1)
                if not has_room:
                    break

        self._divided(encode, new_images, new_texts)
        absent = (
            sum(not self.has_latent(one) for one in new_images),
            sum(not self.cache.has(texts[one]) for one in new_texts),
        )
        if not any(absent):
            return "encoded and cached"
        return (
            f"encoded and cached, except {absent[0]} images and {absent[1]} captions for which cache_gb leaves no "
            "room: they are encoded again whenever they are drawn, a stretch of steps ahead"
        )

    def ahead(self, plan: Iterable[Needed]) -> "Stretch":
        """Encodes what the first batches of `plan` need and the cache does not have: in the cache, and in memory.

        As many batches as have room. The text encoder and the VAE are loaded once each.
        """
        images: dict[str, Example] = {}
        captions: dict[str, None] = {}
        room, count = max(0, self.cache.room()) + MOST_HELD, 0
        for needed in plan:
            new_images = {one.name: one for one in needed.images if one.name not in images and not self.has_latent(one)}
            new_captions = [
                one for one in dict.fromkeys(needed.captions) if one not in captions and not self.has_text(one)
            ]
            room -= sum(map(self._latent_size, new_images.values())) + len(new_captions) * self._text_size()
            if count and room < 0:
                break
            images |= new_images
            captions |= dict.fromkeys(new_captions)
            count += 1
        stretch = Stretch(self)
        if images or captions:
            logging.info(
                "SoftREPA: %d images and %d captions are encoded for %d batches", len(images), len(captions), count
            )
            self._divided(stretch.encode, list(images.values()), list(captions))
        return stretch

    def encoded_captions(self, captions: Sequence[str]) -> Iterator[tuple[str, Entry]]:
        for start in range(0, len(captions), CAPTIONS):
            comfy.model_management.throw_exception_if_processing_interrupted()
            some = captions[start : start + CAPTIONS]
            for caption, cond in zip(some, encode_captions(self.clip, some), strict=True):
                text = stored_text(cond)
                self._texts += 1
                self._text_bytes += sum(tensor.nbytes for tensor in text.values())
                yield caption, text

    def encoded_images(self, examples: list[Example]) -> Iterator[tuple[Example, Entry]]:
        """Without those that have turned out to be unusable: whoever draws or reads them again is told."""
        for size, group in by_size(examples).items():
            group.sort(key=lambda one: one.name)  # as they lie in shards
            count = images_at_once(self.vae, size)
            for start in range(0, len(group), count):
                comfy.model_management.throw_exception_if_processing_interrupted()
                usable, pixels = [], []
                for example in group[start : start + count]:
                    try:
                        pixels.append(self.images.pixels(example))
                        usable.append(example)
                    except UnusableImageError:
                        continue
                if usable:
                    latents = encode_images(self.vae, pixels, [one.name for one in usable])
                    yield from ((one, {"latent": latent}) for one, latent in zip(usable, latents, strict=True))

    def keep(self, key: str, entry: Entry) -> bool:
        """Whether the cache has it now."""
        try:
            return self.cache.write(key, entry)
        except OSError as error:
            self._without_cache(error)
            return False

    def finish(self) -> None:
        """What was learned of the images and what was encoded lies on disk."""
        self.images.finish()
        try:
            self.cache.flush()
        except OSError as error:
            self._without_cache(error)

    def stored_latent(self, example: Example) -> Entry | None:
        """What the cache has, if that is what it should be."""
        key = self.image_key(example)
        entry = self.cache.read(key)
        if entry is not None and {name: one.shape for name, one in entry.items()} == {"latent": self._shape(example)}:
            return entry
        self.cache.drop(key)
        return None

    def stored_text(self, caption: str) -> Entry | None:
        key = self.text_key(caption)
        entry = self.cache.read(key)
        if entry is not None and self._is_text(entry):
            return entry
        self.cache.drop(key)
        return None

    def has_latent(self, example: Example) -> bool:
        return bool(self.images.known_digest(example)) and self.cache.has(self.image_key(example))

    def has_text(self, caption: str) -> bool:
        return self.cache.has(self.text_key(caption))

    def image_key(self, example: Example) -> str:
        width, height = example.size
        return f"latent/{self.vae_name}/{self.images.digest(example)}-{width}x{height}-{PREPARATION}"

    def text_key(self, caption: str) -> str:
        return f"text/{self.clip_name}/{hashlib.sha256(caption.encode()).hexdigest()}"

    def _divided(self, encode: Encode, images: list[Example], captions: list[str]) -> None:
        """This process's share of them, and then what the others have not done in good time."""
        rank, number = self.share
        started = time.monotonic()
        # names decide, not places: the lists of two processes differ by what one of them has already
        theirs = [one for one in images if _owner(one.name, number) != rank]
        texts = [one for one in captions if _owner(one, number) != rank]
        try:
            encode(
                [one for one in images if _owner(one.name, number) == rank],
                [one for one in captions if _owner(one, number) == rank],
            )
            if number > 1:
                self.finish()  # the others wait for it
                patience = LEAST_PATIENCE + 2 * (time.monotonic() - started)
                encode(*self._waited_for(theirs, texts, patience))
        finally:
            self.finish()

    def _waited_for(self, images: list[Example], captions: list[str], seconds: float) -> tuple[list, list]:
        """What other processes encode, and is not in the cache when they had their time, or when it is full."""
        for one in images:
            with suppress(UnusableImageError):
                self.images.digest(one)  # by which its latent is found
        end = time.monotonic() + seconds
        while True:
            comfy.model_management.throw_exception_if_processing_interrupted()
            self.cache.refresh()
            images = [one for one in images if not self.has_latent(one)]
            captions = [one for one in captions if not self.has_text(one)]
            is_over = time.monotonic() > end or not self.cache.has_room(self._text_size())
            if is_over or not (images or captions):
                return images, captions
            time.sleep(0.1)

    def _with_room(self, examples: list[Example]) -> list[Example]:
        """The first of them, as many as the cache has room for."""
        sizes = accumulate(map(self._latent_size, examples))
        return [example for example, size in zip(examples, sizes, strict=True) if self.cache.has_room(size)]

    def _without_cache(self, error: OSError) -> None:
        self.cache.limit = 0  # what does not fit is encoded again whenever it is drawn
        logging.warning("SoftREPA: the cache in %s cannot be written (%s)", self.cache.folder, error)

    @cached_property
    def _widths(self) -> dict[str, torch.Size]:
        stored = stored_text(self.empty)
        return {name: tensor.shape[-1:] for name, tensor in stored.items() if not name.startswith(REST)}

    def _is_text(self, entry: Entry) -> bool:
        """Of any length, and of the width that the encoder gives. What it gives besides depends on the text."""
        if {name: one.shape[-1:] for name, one in entry.items() if not name.startswith(REST)} != self._widths:
            return False
        return entry["cross_attn"].ndim == 3 and len(entry["cross_attn"]) == 1

    @cached_property
    def _shortest_text(self) -> int:
        return 2 * self.empty["cross_attn"].numel()

    def _text_size(self) -> int:
        """Bytes that a text takes, as those took that were encoded: one that is very long tells nothing of others."""
        return max(self._text_bytes // max(1, self._texts), self._shortest_text)

    def _latent_size(self, example: Example) -> int:
        return 4 * math.prod(self._shape(example))

    def _shape(self, example: Example) -> tuple[int, ...]:
        width, height = (side // self.vae.spacial_compression_encode() for side in example.size)
        frames = (1,) if is_of_video(self.vae) else ()
        return self.vae.latent_channels, *frames, height, width


class Stretch:
    """Encodings of some batches: what the cache has no room for is held here."""

    def __init__(self, encodings: FolderEncodings):
        self.encodings = encodings
        self.latents: dict[str, Entry] = {}
        """By the name of the image."""
        self.texts: dict[str, Entry] = {}

    def has(self, needed: Needed) -> bool:
        return all(one.name in self.latents or self.encodings.has_latent(one) for one in needed.images) and all(
            one in self.texts or self.encodings.has_text(one) for one in needed.captions
        )

    def latent(self, example: Example) -> Tensor:
        """(C, h, w) float32. Raises UnusableImageError."""
        entry = self.latents.get(example.name) or self.encodings.stored_latent(example)
        if entry is None:
            pixels = self.encodings.images.pixels(example)
            (latent,) = encode_images(self.encodings.vae, [pixels], [example.name])
            entry = self._keep_latent(example, {"latent": latent})
        return entry["latent"].float()

    def cond(self, caption: str) -> Cond:
        entry = self.texts.get(caption) or self.encodings.stored_text(caption)
        if entry is None:
            ((_, text),) = self.encodings.encoded_captions([caption])
            entry = self._keep_text(caption, text)
        return text_of(entry)

    def encode(self, images: list[Example], captions: list[str]) -> None:
        """Into the cache or, where that has no room, into memory."""
        for caption, text in self.encodings.encoded_captions(captions):
            self._keep_text(caption, text)
        for example, latent in self.encodings.encoded_images(images):
            self._keep_latent(example, latent)

    def _keep_text(self, caption: str, entry: Entry) -> Entry:
        if not self.encodings.keep(self.encodings.text_key(caption), entry):
            self.texts[caption] = entry
        return entry

    def _keep_latent(self, example: Example, entry: Entry) -> Entry:
        if not self.encodings.keep(self.encodings.image_key(example), entry):
            self.latents[example.name] = entry
        return entry


def _owner(name: str, number: int) -> int:
    """Which of `number` processes encodes it."""
    return zlib.crc32(name.encode(errors="surrogatepass")) % number


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
