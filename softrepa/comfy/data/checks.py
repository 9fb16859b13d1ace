"""What of a dataset must agree with a model, before it is trained or measured on."""

from comfy.model_patcher import ModelPatcher

from ...data.batches import by_size
from ...data.dataset import Dataset
from ...data.latent_lists import PIXELS
from ...errors import SoftREPAError
from ..families import model_shape
from ..models import check_positions


def check_encodings(dataset: Dataset, model: ModelPatcher) -> None:
    """Refuses text, latents and picture sizes of another model; before any picture is encoded but the first."""
    family = model_shape(model).family
    for width, height in by_size(dataset.train + dataset.validation):
        check_positions(f"{dataset.label}: an image", model, width // PIXELS, height // PIXELS)
    expected = family.text_width
    found = dataset.empty["cross_attn"].shape[-1]
    if expected is not None and found != expected:
        raise SoftREPAError(
            f"{dataset.label} has text of width {found}, expected {expected} for {family.title}: "
            "encode it with this model's own CLIP."
        )
    expected = model.get_model_object("latent_format").latent_channels
    found = dataset.first_latent().shape[0]
    if found != expected:
        raise SoftREPAError(
            f"{dataset.label} has latents of {found} channels, expected {expected} for {family.title}: "
            "encode it with this model's own VAE."
        )
