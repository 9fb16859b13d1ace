"""The data model: which rows a block sees, and what is refused."""

import pytest
import torch
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.tokens import SoftTokens, bucket


def test_buckets():
    timesteps = torch.tensor([0.0, 9.99, 10, 499.9, 500, 989, 990, 999, 999.9, 1000])
    assert bucket(timesteps).tolist() == [0, 0, 1, 49, 50, 98, 99, 99, 99, 99]
    assert bucket(torch.arange(1000)).tolist() == [t // 10 for t in range(1000)]


def test_the_last_number_below_a_timestep_is_of_the_bucket_before():
    for edge in range(10, 1000, 10):
        below = torch.nextafter(torch.tensor(float(edge)), torch.tensor(0.0))
        assert bucket(torch.stack([below, torch.tensor(float(edge))])).tolist() == [edge // 10 - 1, edge // 10]


def test_a_table_of_any_number_of_rows():
    """floor(sigma n) of n, at t = 1000 sigma."""
    sigma = torch.tensor([0.0, 0.0157, 0.25, 0.999, 1.0])
    assert bucket(1000 * sigma, 64).tolist() == [0, 1, 16, 63, 63]


def test_unet_rows_are_tokens_plus_their_bucket():
    tokens, table = torch.randn(4, 768), torch.randn(100, 768)
    rows = SoftTokens.of(tokens, "sd15", ("down",), time_table=table).at(torch.tensor([3, 999]))
    assert rows.shape == (2, 1, 4, 768)
    assert torch.equal(rows[0, 0], tokens + table[0])
    assert torch.equal(rows[1, 0], tokens + table[99])


def test_mmdit_rows_take_their_layers_chunk():
    tokens, table = torch.randn(5, 4, 64), torch.randn(100, 5 * 64)
    rows = SoftTokens.of(tokens, "sd3", 5, time_table=table).at(torch.tensor([250.0]))
    assert rows.shape == (1, 5, 4, 64)
    for layer in range(5):
        assert torch.equal(rows[0, layer], tokens[layer] + table[25, layer * 64 : (layer + 1) * 64])


def test_text_width_rows_are_embedded_before_the_table():
    tokens, table, weight = torch.randn(3, 2, 4096), torch.randn(100, 3 * 64), torch.randn(64, 4096)
    soft = SoftTokens.of(tokens, "sd3", 3, time_table=table)
    rows = soft.at(torch.tensor([10]), embed=lambda x: x @ weight.T)
    assert soft.hidden_width == 64
    expected = tokens @ weight.T + table[1].view(3, 1, 64)
    assert torch.allclose(rows[0], expected, atol=1e-4)


def test_banks():
    tokens, negative = torch.randn(4, 2048), torch.randn(4, 2048)
    soft = SoftTokens.of(tokens, "sdxl", ("down", "mid"), negative_tokens=negative)
    assert torch.equal(soft.at(torch.tensor([5]))[0, 0], tokens)
    assert torch.equal(soft.at(torch.tensor([5]), negative=True)[0, 0], negative)


def test_half_precision_files_become_float32():
    assert SoftTokens.of(torch.randn(4, 768).half(), "sd15", ("down",)).tokens.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftTokens.of(torch.randn(4, 1024), "sd15", ("down",)), r"shape \[4, 1024\], expected \[m, 768\]"),
        (lambda: SoftTokens.of(torch.randn(4, 768), "sd3", 5), r"expected \[layers, m, width\] for SD3"),
        (lambda: SoftTokens.of(torch.full((4, 768), torch.nan), "sd15", ("down",)), "3072 NaN or infinite values"),
        (lambda: SoftTokens.of(torch.ones(4, 768).int(), "sd15", ("down",)), "tokens is int32"),
        (lambda: SoftTokens.of(torch.empty(0, 768), "sd15", ("down",)), r"empty, of shape \[0, 768\]"),
        (lambda: SoftTokens.of(torch.randn(4, 768), "pixart", ("down",)), 'family is "pixart", expected one of sd15'),
        (lambda: SoftTokens.of(torch.randn(5, 4, 64), "sd3", 6), "blocks is 6, expected at most the file's 5"),
        (
            lambda: SoftTokens.of(torch.randn(4, 768), "sd15", ("down",), time_table=torch.randn(50, 768)),
            r"time_table has shape \[50, 768\], expected \[100, 768\]",
        ),
        (
            lambda: SoftTokens.of(torch.randn(5, 4, 64), "sd3", 5, time_table=torch.randn(100, 64)),
            r"time_table has shape \[100, 64\], expected \[100, 320\]",
        ),
        (
            lambda: SoftTokens.of(torch.randn(4, 768), "sd15", ("down",), negative_tokens=torch.randn(2, 768)),
            r"negative_tokens have shape \[2, 768\]",
        ),
        (
            lambda: SoftTokens.of(torch.randn(2, 3, 8), "anima", 2, time_table=torch.randn(64, 16)),
            r"time_table has shape \[64, 16\], expected \[100, 16\]",
        ),
        (
            lambda: SoftTokens.of(torch.randn(2, 3, 8), "anima", 2, splice="middle"),
            'splice_position is "middle", expected one of end_of_sequence, front_of_padding',
        ),
        (
            lambda: SoftTokens.of(torch.randn(2, 3, 8), "flux", 2, splice="end_of_sequence"),
            "splice_position is end_of_sequence for Flux 1, expected it for Anima only",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(SoftREPAError, match=message):
        make()
