"""Noise that depends on its key alone, and building blocks against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.attention import backend_problem, causal_attention
from kernels.noise import truncated_normal
from kernels.rms_norm import RMSNorm
from kernels.rotary import apply_rotary, rotary_table


def test_noise_has_the_moments_of_a_normal_cut_at_three_sigma() -> None:
    noise = truncated_normal(torch.arange(8), 512, 256, std=2.0)
    assert noise.abs().max() <= 6.0
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(noise.std()) == pytest.approx(2.0 * 0.98658, rel=0.005)
    share_within_one_sigma = float((noise.abs() < 2.0).float().mean())
    assert share_within_one_sigma == pytest.approx(0.68269 / 0.99730, abs=0.003)


def test_noise_is_a_function_of_key_position_and_channel() -> None:
    keys = torch.tensor([5, 2**62 + 1, 5 + 2**32])
    whole = truncated_normal(keys, 40, 24, 1.0)
    for index in range(3):
        assert torch.equal(truncated_normal(keys[index : index + 1], 40, 24, 1.0)[0], whole[index])
    assert torch.equal(truncated_normal(keys, 10, 8, 1.0), whole[:, :10, :8])
    assert len(torch.unique(whole.view(3, -1), dim=0)) == 3


def test_neighbouring_rows_channels_and_keys_are_uncorrelated() -> None:
    noise = truncated_normal(torch.arange(64), 64, 64, 1.0)
    for left, right in (
        (noise[1:], noise[:-1]),
        (noise[:, 1:], noise[:, :-1]),
        (noise[:, :, 1:], noise[:, :, :-1]),
        (noise, noise.transpose(1, 2)),
    ):
        correlation = float((left * right).mean() / noise.var())
        # 4 standard errors; the diagonal of the transpose adds 1/64.
        assert abs(correlation - (1 / 64 if left is noise else 0.0)) < 4 / math.sqrt(noise.numel())


def test_noise_is_pinned() -> None:
    """A resumed run must see the numbers that it would have seen, whatever was upgraded in between."""
    values = truncated_normal(torch.tensor([233]), 1, 3, 1.0).flatten().tolist()
    assert values == pytest.approx(PINNED, abs=1e-6)


PINNED = [-0.0391416922211647, -0.00895655993372202, -0.05231881141662598]


def test_attention_is_causal_softmax() -> None:
    query, key, value = (torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 2.0
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
    torch.testing.assert_close(causal_attention(query, key, value), expected)


def test_a_mask_takes_the_place_of_causality() -> None:
    query, key, value = (torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    causal = torch.ones(5, 5).tril().bool()
    torch.testing.assert_close(
        causal_attention(query, key, value, mask=causal.expand(2, 1, 5, 5)), causal_attention(query, key, value)
    )
    alone = torch.eye(5).bool().expand(2, 1, 5, 5)
    torch.testing.assert_close(causal_attention(query, key, value, mask=alone), value)


def test_unusable_backends_say_why() -> None:
    assert backend_problem("sdpa") is None
    assert "choose one of" in str(backend_problem("magic"))


def test_rotary_keeps_norms_and_depends_on_distance_alone() -> None:
    table = rotary_table(64, 8, 50_000.0)
    x, y = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(first: int, second: int) -> float:
        return float(
            (apply_rotary(x, table[:, first : first + 1]) * apply_rotary(y, table[:, second : second + 1])).sum()
        )

    assert score(3, 10) == pytest.approx(score(40, 47), abs=1e-4)
    assert float(apply_rotary(x, table[:, 5:6]).norm()) == pytest.approx(float(x.norm()), rel=1e-5)


def test_rms_norm_casts_before_the_weight() -> None:
    norm = RMSNorm(64, 1e-6)
    assert norm.weight is not None
    norm.weight.data = torch.rand(64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) * 100
    torch.testing.assert_close(norm(x), x / x.pow(2).mean(-1, keepdim=True).sqrt() * norm.weight)
    bare = RMSNorm(64, 1e-6, learned=False)
    assert not list(bare.parameters())
    torch.testing.assert_close(bare(x) * norm.weight, norm(x))
    low = norm.bfloat16()(x.bfloat16())
    wide = x.bfloat16().float()
    expected = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16() * norm.weight
    assert torch.equal(low, expected)
