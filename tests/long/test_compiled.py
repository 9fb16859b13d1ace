"""Networks that are compiled, which takes many seconds each."""

import pytest
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.families import FAMILIES
from softrepa_tests.composing import same_when_compiled
from softrepa_tests.token_sets import tokens_for


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"strength": 0.5, "start_percent": 0.3, "apply_to": "positive"}])
def test_torch_compile(models, family, options):
    same_when_compiled(apply_tokens(models[family], tokens_for(family), **options), family, steps=6, tolerance=1e-5)
