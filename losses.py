"""Losses for super-resolution. Every term is a module: loss(sr, hr) -> a scalar whose gradient reaches sr.

    pix = Charbonnier()
    pix(sr, hr).backward()

Pictures are (B, 3, H, W) float in [0, 1] (sr may leave that range). Needs torch; copy this file and it works alone.
"""
import torch
import torch.nn as nn


class Charbonnier(nn.Module):
    """mean sqrt((sr - hr)^2 + eps^2) - eps: L1 with a rounded tip, zero where sr = hr.

    Charbonnier et al., ICIP 1994; as a super-resolution loss Lai et al., CVPR 2017. eps: where it turns from square to
    straight, in units of the picture; 1e-3 is a quarter of an 8-bit level."""

    def __init__(self, eps=1e-3):
        super().__init__()
        self.eps = eps

    def forward(self, sr, hr):
        d = sr.float() - hr.float()
        return (torch.sqrt(d * d + self.eps ** 2) - self.eps).mean()
