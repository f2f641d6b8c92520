"""Rotary angles for every published scaling: default, linear, dynamic NTK, Llama 3, YaRN.

Definitions follow the checkpoints' own: Llama 3.1's frequency bands, YaRN (Peng et al. 2023) equations 21-25.
"""

import math

import torch

from gossamer.config import RopeConfig


def inverse_frequencies(config: RopeConfig, head_dim: int, max_position: int) -> torch.Tensor:
    """fp32 [rotary_dim / 2] angles per position step.

    `max_position` is the longest position served; it matters to `dynamic` only, which stretches theta beyond the
    trained context. It is fixed at start, so that cached keys never change their rotation.
    """
    dim = config.rotary_dim or head_dim
    theta = config.theta
    original = config.original_max_position
    if config.kind == "dynamic" and original is not None and max_position > original:
        stretch = config.factor * max_position / original - (config.factor - 1.0)
        theta = theta * stretch ** (dim / (dim - 2))
    inv_freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if config.kind == "linear":
        return inv_freq / config.factor
    if config.kind == "llama3":
        return _llama3(inv_freq, config)
    if config.kind == "yarn":
        return _yarn(inv_freq, config, dim)
    return inv_freq


def _llama3(inv_freq: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    original = float(config.original_max_position or 8192)
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / config.factor + smooth * inv_freq


def _yarn(inv_freq: torch.Tensor, config: RopeConfig, dim: int) -> torch.Tensor:
    original = float(config.original_max_position or 4096)

    def correction_dim(num_rotations: float) -> float:
        return dim * math.log(original / (num_rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = correction_dim(config.beta_fast), correction_dim(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = max(high - low, 0.001)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0.0, 1.0)
    return inv_freq / config.factor * ramp + inv_freq * (1 - ramp)


def attention_scaling(config: RopeConfig) -> float:
    """YaRN's factor on cos and sin (1.0 for every other kind)."""
    if config.kind != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return _mscale(config, config.mscale) / _mscale(config, config.mscale_all_dim)
    return _mscale(config, 1.0)


def softmax_scaling(config: RopeConfig) -> float:
    """DeepSeek's factor on attention scores under YaRN: mscale squared, of `mscale_all_dim`; else 1.0."""
    return _mscale(config, config.mscale_all_dim) ** 2 if config.mscale_all_dim else 1.0


def _mscale(config: RopeConfig, weight: float) -> float:
    return 1.0 if config.factor <= 1 else 0.1 * weight * math.log(config.factor) + 1.0


class RotaryTable:
    """cos and sin for positions 0 .. max_position - 1, in `apply_rope`'s layout; grown on demand in powers of two."""

    def __init__(
        self, config: RopeConfig, head_dim: int, max_position: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._inv_freq = inverse_frequencies(config, head_dim, max_position).to(device)
        self._scaling = attention_scaling(config)
        self._dtype = dtype
        self._max_position = max_position
        self._cos = self._sin = torch.empty(0, 1, head_dim, dtype=dtype, device=device)
        self._grow(min(max_position, 2048))

    def _grow(self, length: int) -> None:
        positions = torch.arange(length, dtype=torch.float32, device=self._inv_freq.device)
        angles = torch.outer(positions, self._inv_freq)
        cos, sin = angles.cos() * self._scaling, angles.sin() * self._scaling
        self._cos = torch.cat((cos, cos), -1).to(self._dtype).unsqueeze(1)
        self._sin = torch.cat((-sin, sin), -1).to(self._dtype).unsqueeze(1)

    def lookup(self, positions: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [num_tokens, 1, head_dim] of int64 `positions`, all below `longest`."""
        if longest > self._cos.shape[0]:
            self._grow(min(self._max_position, 1 << (longest - 1).bit_length()))
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def table(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [at least `length`, head_dim] by position; grown at once, so that a graph's addresses stay."""
        if length > self._cos.shape[0]:
            self._grow(length)
        return self._cos.squeeze(1), self._sin.squeeze(1)
