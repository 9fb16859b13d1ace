"""A folder's images and captions through ComfyUI's VAE and CLIP, kept on disk as far as there is room.

Latents are stored as the VAE gives them (float32, the posterior's mean): the model's `process_latent_in` is the
trainer's. Text is stored in float16, and an encoding made on the spot is rounded the same way, so that a run does not
depend on what was cached; only the empty caption, which tokens may start from, is kept as it is.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ..batches import Example
from ..cache import HEADER, Cache
from ..dataset import Cond, Dataset
from ..errors import SoftREPAError
from ..folder import ImageFolder, read_folder
from ..images import PREPARATION
from ..latent_lists import cond_of
from .identity import encoder

CACHE_FOLDER = "softrepa_cache"
"""In extra_model_paths.yaml: where the cache shall lie instead of ComfyUI's user folder."""

GIGABYTE = 10**9


def dataset_of_folder(
    root: Path,
    name: str,
    clip: comfy.sd.CLIP,
    vae: comfy.sd.VAE,
    resolution: int,
    bucketing: bool,
    validation_percent: float,
    cache_gb: float,
) -> Dataset:
    """Reads and encodes the folder; what the cache has no room for is encoded whenever it is drawn."""
    check_resolution(resolution, vae)
    home = cache_folder()
    index = home / "files" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}.json"
    images = read_folder(root, name, resolution, bucketing, validation_percent, index, tick=reading_progress())
    encodings = FolderEncodings(images, clip, vae, Cache(home, int(cache_gb * GIGABYTE)))
    dataset = Dataset(name, images.train, images.validation, encodings, images.notes)  # refuses before any encoding
    dataset.settings = {"folder": name, "resolution": resolution, "bucketing": bucketing}
    dataset.settings["validation_percent"] = validation_percent
    if clip.tokenizer_options:
        dataset.settings["tokenizer_options"] = dict(clip.tokenizer_options)
    if clip.layer_idx is not None:
        dataset.settings["clip_layer"] = clip.layer_idx
    images.notes.append(encodings.fill())
    return dataset


def cache_folder() -> Path:
    """`softrepa_cache` of extra_model_paths.yaml, else a folder of ComfyUI's user folder that is not served."""
    named = folder_paths.folder_names_and_paths.get(CACHE_FOLDER, ([],))[0]
    return Path(named[0]) if named else Path(folder_paths.get_user_directory()) / "__softrepa" / "cache"


def check_resolution(resolution: int, vae: comfy.sd.VAE) -> None:
    step = vae.spacial_compression_encode()
    if resolution % step:
        raise SoftREPAError(f"resolution is {resolution}, expected a multiple of {step}, as this VAE needs.")


@dataclass(frozen=True)
class Work:
    """Something to encode: its bytes in the cache (for a caption those of a short one) and the call."""

    size: int
    encode: Callable[[], object]


class FolderEncodings:
    """Encodings by content: the digest of a file and its size, or a caption, and who encodes it."""

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
        return self._kept(self._image_key(example), lambda: {"latent": self._encode_image(example)})["latent"]

    def cond(self, caption: str) -> Cond:
        stored = self._kept(self._text_key(caption), lambda: self._encode_text(caption))
        return {"cross_attn": stored["cross_attn"].float(), "pooled_output": stored.get("pooled_output")}

    def prepare(self, captions: list[str]) -> str:
        return self.fill(captions)

    def fill(self, further: Sequence[str] = ()) -> str:
        """Encodes what is not in the cache, as far as it has room; says in a line what lies where.

        `further` are captions beside those of the images.
        """
        images, texts = self._work(further)
        work = images | texts
        missing = {key: item for key, item in work.items() if not self.cache.has(key)}
        needed = sum(item.size for item in missing.values())
        self.cache.make_room(needed, keep=set(work))
        if missing:
            logging.info(
                "SoftREPA: %d images and %d captions to encode, about %s; the cache in %s has room for %s",
                *(len(missing.keys() & images), len(missing.keys() & texts), megabytes(needed)),
                *(self.cache.folder, megabytes(self.cache.room)),
            )
        bar = comfy.utils.ProgressBar(len(missing))
        for item in missing.values():
            if item.size <= self.cache.room:
                comfy.model_management.throw_exception_if_processing_interrupted()
                item.encode()
            bar.update(1)
        absent = [sum(not self.cache.has(key) for key in part) for part in (images, texts)]
        if not any(absent):
            return "encoded and cached"
        return (
            f"encoded and cached, except {absent[0]} images and {absent[1]} captions for which cache_gb leaves no "
            "room: they are encoded again whenever they are drawn"
        )

    def _work(self, further: Sequence[str]) -> tuple[dict[str, "Work"], dict[str, "Work"]]:
        """All images and all captions, by key."""
        examples = self.images.train + self.images.validation
        captions = sorted({caption for one in examples for caption in one.captions}.union(further))
        pooled = self.empty["pooled_output"]
        text_size = 2 * self.empty["cross_attn"].numel() + (0 if pooled is None else 4 * pooled.numel()) + HEADER
        return (
            {self._image_key(one): Work(self._latent_size(one), partial(self.latent, one)) for one in examples},
            {self._text_key(caption): Work(text_size, partial(self.cond, caption)) for caption in captions},
        )

    def _latent_size(self, example: Example) -> int:
        width, height = (side // self.vae.spacial_compression_encode() for side in example.size)
        return 4 * self.vae.latent_channels * width * height + HEADER

    def _kept(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        stored = self.cache.read(key)
        if stored is None:
            stored = make()
            try:
                self.cache.write(key, stored)
            except OSError as error:
                self.cache.room = 0  # what does not fit is encoded again whenever it is drawn
                logging.warning("SoftREPA: the cache in %s cannot be written (%s)", self.cache.folder, error)
        return stored

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
                f"vae gives NaN or infinite values for {example.name}, expected numbers; run ComfyUI with --fp32-vae."
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
        return f"latent/{self.vae_name}/{example.image[:2]}/{example.image}-{width}x{height}-{PREPARATION}"

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


def clip_identity(clip: comfy.sd.CLIP) -> str:
    """Changes with the weights, their precision, clip skip, tokenizer options and LoRAs."""
    facts = [type(clip.cond_stage_model).__name__, clip.layer_idx, sorted(clip.tokenizer_options.items())]
    return encoder(clip.patcher, clip.cond_stage_model, facts)


def vae_identity(vae: comfy.sd.VAE) -> str:
    """Changes with the weights and the precision the VAE computes in."""
    facts = [type(vae.first_stage_model).__name__, str(vae.vae_dtype)]
    return encoder(vae.patcher, vae.first_stage_model, facts)


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
