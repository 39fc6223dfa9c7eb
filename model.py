"""HAT (Hybrid Attention Transformer) with a small residual refiner, for super-resolution by 2, 3 or 4.

    model = HATRefiner.from_preset("low", scale=2)
    sr = model(lr)                                          # (B, 3, H, W) in [0, 1] -> (B, 3, 2H, 2W)
    sr = model(lr, tiler=Tiler(tile_size=64, tile_pad=32))  # HAT tile by tile, the refiner over the joined picture

HAT: Chen et al., "Activating More Pixels in Image Super-Resolution Transformer", CVPR 2023, arXiv 2205.04437.
Parameter names are the official ones, so official files load and what is exported opens elsewhere.
Inside, everything is channels-last: (B, H, W, C). Needs torch, einops, safetensors; copy this file and it works alone.
"""
import json
import math
import os
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch.utils.checkpoint import checkpoint

# low and mid have few, wide heads: on small windows every head costs a pass over its own attention matrix
PRESETS = {
    "tiny":  dict(embed_dim=16, depths=(2, 2), heads=2, window=4, compress=4, squeeze=4, refiner_dim=8),  # for tests
    "low":   dict(embed_dim=60, depths=(4,) * 3, heads=2, window=8, compress=6, squeeze=6, refiner_dim=32),
    "mid":   dict(embed_dim=96, depths=(6,) * 4, heads=3, window=16, compress=6, squeeze=6, refiner_dim=48),
    "high":  dict(embed_dim=180, depths=(6,) * 6, heads=6, window=16, compress=3, squeeze=30, refiner_dim=64),
    "hat_s": dict(embed_dim=144, depths=(6,) * 6, heads=6, window=16, compress=24, squeeze=24, refiner_dim=64),
    "hat":   dict(embed_dim=180, depths=(6,) * 6, heads=6, window=16, compress=3, squeeze=30, refiner_dim=64),
    "hat_l": dict(embed_dim=180, depths=(6,) * 12, heads=6, window=16, compress=3, squeeze=30, refiner_dim=64),
}
RGB_MEAN = (0.4488, 0.4371, 0.4040)   # of DIV2K
CONV_SCALE = 0.01                     # weight of the convolutional branch; not stored in official files, so fixed
OVERLAP = 0.5                         # overlapping windows are this much wider than plain ones
FEATURES = 64                         # channels of the upsampler
BAND = 4096                           # pixels that a thread takes at a time on a CPU, without gradients

class WeightsError(ValueError):
    """A weights file that cannot be used; the message is one line and says why."""

# ----------------------------------------------------------------------------------------------------------------------
# attention

def position_index(window, wide):
    """Index into the relative position table for queries in a window and keys in a window `wide` >= window pixels wide
    around it. (window^2, wide^2) int64. Negative where HAT's own is: it counts from the end of the table."""
    q, k = (torch.stack(torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")).flatten(1) for n in (window, wide))
    rel = q[:, :, None] - k[:, None, :] + window - 1
    if wide > window:
        rel = 2 * window - wide - rel
    return rel[0] * (window + wide - 1) + rel[1]

def shift_mask(h, w, window, device):
    """Added to the attention of windows shifted by window/2: -100 between pixels that only the cyclic shift made
    neighbours. (h/window * w/window, window^2, window^2)."""
    def region(n):
        i = torch.arange(n, device=device)
        return (i >= n - window).int() + (i >= n - window // 2).int()
    r = region(h)[:, None] * 3 + region(w)[None, :]
    r = rearrange(r, "(y i) (x j) -> (y x) (i j)", i=window, j=window)
    return (r[..., :, None] != r[..., None, :]) * -100.0

def banded(x):
    """Whether blocks take the picture x (B, H, W, C) a band of windows at a time, doing all that they do to it: on a CPU what
    fits the cache is done sooner, and gradients are not in the way."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()

def band_of(x, window=1):
    """How many rows of the picture x (B, H, W, C) are a band, a multiple of window."""
    return window * max(1, round(BAND * torch.get_num_threads() / (len(x) * x.shape[2] * window)))

def wide_heads(p, heads, dim=0):
    """A parameter whose dimension dim runs over heads, each filled up with zeros to a multiple of 8 channels: with 30 the
    product with v takes 1.7 times as long as with 32 (AVX2, fp32)."""
    p = p.unflatten(dim, (heads, -1))
    return F.pad(p, (0, 0) * (p.dim() - dim - 2) + (0, -p.shape[dim + 1] % 8)).flatten(dim, dim + 1)

def cast(*parameters):
    """Parameters in the type that autocast computes in: once for all the parts of a picture."""
    device = parameters[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameters[0].dtype
    return [p.to(dtype) for p in parameters]

def attend(q, k, v, bias, scale):
    """softmax(scale q k^T + bias) v, with q (N, n, heads, d), k and v (N, m, heads, d), bias (heads, n, m), or one for each
    window of a picture, (windows, heads, n, m); N is a multiple of windows. Returns (N, n, heads * d)."""
    def for_all(b):     # (heads, n, m) or (windows, heads, n, m), or those of one head
        n = len(q) // len(b)
        return b.expand(len(q), *b.shape) if bias.dim() == 3 else b if n == 1 else b.repeat(n, *[1] * (b.dim() - 1))
    if q.is_cuda or banded(q):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale, attn_mask=for_all(bias))
        return out.transpose(1, 2).flatten(2)
    # elsewhere plain products, head by head; on a CPU they hand the bias its gradient soonest
    return torch.cat([torch.baddbmm(for_all(b), q, k.mT, alpha=scale).softmax(-1) @ v
                      for q, k, v, b in zip(q.unbind(2), k.unbind(2), v.unbind(2), bias.unbind(-3))], -1)

class LayerNorm(nn.LayerNorm):
    """Normalises the fp32 residual stream and hands on the type that autocast computes in, cast once."""
    def forward(self, x):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if not banded(x):
            return super().forward(x).to(dtype)
        y, rows = torch.empty_like(x, dtype=dtype), band_of(x)
        for part, done in zip(x.split(rows, 1), y.split(rows, 1)):
            done.copy_(super().forward(part))
        return y

class MLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def prepared(self):
        """A function that works on any part of the picture."""
        into, out = cast(self.fc1.weight, self.fc1.bias), cast(self.fc2.weight, self.fc2.bias)
        return lambda x: F.linear(F.gelu(F.linear(x, *into)), *out)

class WindowAttention(nn.Module):
    """Queries of a window look at keys and values of a window `wide` >= window pixels wide around it."""
    def __init__(self, dim, window, wide, heads):
        super().__init__()
        self.window, self.heads = window, heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((window + wide - 1) ** 2, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def prepared(self, index):
        """Two functions that work on any part of the picture, qkv(x), (..., C) -> (..., 3 * heads * d), and attention(q, k,
        v, bias) as attend() has it, but projected, (N, n, C); and the bias (heads, n, m). d is the width of a head, or a
        little more."""
        h, scale = self.heads, (self.qkv.in_features // self.heads) ** -0.5
        into = cast(wide_heads(self.qkv.weight, 3 * h), wide_heads(self.qkv.bias, 3 * h))
        out = cast(wide_heads(self.proj.weight, h, 1), self.proj.bias)
        return (lambda x: F.linear(x, *into), lambda *qkvb: F.linear(attend(*qkvb, scale), *out),
                *cast(self.relative_position_bias_table.t().contiguous()[:, index]))

    def inside(self, index):
        """A function of whole windows x (B, h, w, C) and their bias, which is their attention; and the bias (heads, n, n)."""
        qkv, attention, bias = self.prepared(index)

        def attended(x, bias):
            (b, h, _, _), t = x.shape, self.window
            x = rearrange(x, "b (y i) (x j) c -> (b y x) (i j) c", i=t, j=t)
            x = attention(*qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2), bias)
            return rearrange(x, "(b y x) (i j) c -> b (y i) (x j) c", b=b, y=h // t, i=t)
        return attended, bias

class ChannelAttention(nn.Module):
    """Squeeze and excitation (Hu et al., CVPR 2018) over the mean of the whole input x (B, H, W, C): what each channel is to be
    multiplied by, (B, 1, 1, C). Where the input is only a tile, `global_pool`, a callable (B, H, W, C) -> (B, C), puts the
    mean of the whole picture in its place."""
    global_pool = None

    def __init__(self, dim, squeeze):
        super().__init__()
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, dim // squeeze, 1), nn.ReLU(),
                                       nn.Conv2d(dim // squeeze, dim, 1), nn.Sigmoid())

    def forward(self, x):
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean = self.global_pool(x) if self.global_pool else x.mean(1, dtype=dtype).mean(1)
        return (self.attention[1:](mean[:, :, None, None]) * CONV_SCALE).flatten(1)[:, None, None]

class CAB(nn.Module):
    """The convolutional branch: its output (B, H, W, C) and what that is to be multiplied by, CONV_SCALE in it."""
    def __init__(self, dim, compress, squeeze):
        super().__init__()
        self.cab = nn.Sequential(nn.Conv2d(dim, dim // compress, 3, 1, 1), nn.GELU(),
                                 nn.Conv2d(dim // compress, dim, 3, 1, 1), ChannelAttention(dim, squeeze))

    def forward(self, x):
        x = self.cab[:3](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x, self.cab[3](x)

def drop_path(x, p, training):
    """Stochastic depth (Huang et al., ECCV 2016): forget a whole branch for some pictures of the batch."""
    if p == 0 or not training:
        return x
    keep = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= p
    return x * (keep / (1 - p)).to(x.dtype)

class HAB(nn.Module):
    """Hybrid attention block: window attention beside a convolutional branch, then an MLP."""
    def __init__(self, dim, window, heads, compress, squeeze, shift, p):
        super().__init__()
        self.shift, self.p = shift, p
        self.norm1 = LayerNorm(dim)
        self.attn = WindowAttention(dim, window, window, heads)
        self.conv_block = CAB(dim, compress, squeeze)
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, x, index, mask):
        """On a CPU without gradients x itself becomes the result."""
        y, s, t = self.norm1(x), self.shift, self.attn.window
        (conv, share), mlp, (inside, bias) = self.conv_block(y), self.mlp.prepared(), self.attn.inside(index)

        def masked(windows):
            return bias + mask[windows, None].to(bias.dtype) if s else bias

        def attended(y, bias, *dims):       # shifted along dims
            return inside(y.roll([-s] * len(dims), dims), bias).roll([s] * len(dims), dims) if s else inside(y, bias)
        if not banded(x):
            a = attended(y, masked(slice(None)), 1, 2)
            x = x + (drop_path(a, self.p, self.training) + conv * share)
            return x + drop_path(mlp(self.norm2(x)), self.p, self.training)
        (h, w), step = x.shape[1:3], band_of(x, t)
        usual = masked(slice(step // t * (w // t)))     # but in the last band all windows have the same neighbours
        for top in range(s, h + s, step):
            end = min(top + step, h + s)

            def band(z):        # after the last rows come the first
                return z[:, top:end] if end <= h else torch.cat([z[:, top:], z[:, :end - h]], 1)
            here = usual if end <= h else masked(slice((top - s) // t * (w // t), None))
            a, c = (z.to(x.dtype) for z in (attended(band(y), here, 2), band(conv)))    # sums of mixed types take twice as long
            z = band(x).add_(a).addcmul_(c, share.to(x.dtype))
            z += mlp(self.norm2(z)).to(z.dtype)
            if end > h:
                x[:, top:], x[:, :end - h] = z[:, :h - top], z[:, h - top:]
        return x

def widen(x, dim, window, edge):
    """Gives every window along dim `edge` pixels of each neighbour: n windows of `window` become n of window + 2 edge.
    Beyond the border there are zeros, which take part in the softmax as in the paper's code. Slices and one cat: in
    backward many times faster than Tensor.unfold."""
    x = x.unflatten(dim, (-1, window))
    n = x.shape[dim]
    none = torch.zeros_like(x.narrow(dim, 0, 1).narrow(dim + 1, 0, edge))
    before = torch.cat([none, x.narrow(dim, 0, n - 1).narrow(dim + 1, window - edge, edge)], dim)
    after = torch.cat([x.narrow(dim, 1, n - 1).narrow(dim + 1, 0, edge), none], dim)
    return torch.cat([before, x, after], dim + 1).flatten(dim, dim + 1)

class OCAB(WindowAttention):
    """Overlapping cross-attention block: queries look into a window wider than their own."""
    def __init__(self, dim, window, heads):
        super().__init__(dim, window, window + int(window * OVERLAP), heads)
        self.edge = int(window * OVERLAP) // 2
        self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, x, index):
        qkv, attention, bias = self.prepared(index)
        y, mlp, (b, h, w, _), t, edge = self.norm1(x), self.mlp.prepared(), x.shape, self.window, self.edge

        def heads(y):
            return qkv(y).unflatten(-1, (3, self.heads, -1)).tensor_split((1,), 3)

        def looked(q, kv):      # kv has rows of the windows above and below already
            q = rearrange(q, "b (y i) (x j) 1 h d -> (b y x) (i j) h d", i=t, j=t)
            kv = widen(kv, 2, t, edge)
            k, v = rearrange(kv, "b (y i) (x j) two h d -> two (b y x) (i j) h d", i=t + 2 * edge, j=t + 2 * edge)
            return rearrange(attention(q, k, v, bias), "(b y x) (i j) c -> b (y i) (x j) c", b=b, x=w // t, i=t)
        if not banded(x):
            q, kv = heads(y)
            x = x + looked(q, widen(kv, 1, t, edge))
            return x + mlp(self.norm2(x))
        for top in range(0, h, t):
            first, last = max(top - edge, 0), min(top + t + edge, h)
            q, kv = heads(y[:, first:last])
            kv = F.pad(kv, (0, 0) * 4 + (first - top + edge, top + t + edge - last))
            z = x[:, top:top + t].add_(looked(q[:, top - first:top - first + t], kv).to(x.dtype))
            z += mlp(self.norm2(z)).to(z.dtype)
        return x

# ----------------------------------------------------------------------------------------------------------------------
# the network

class RHAG(nn.Module):
    """Residual hybrid attention group: HABs, every second one shifted, then one OCAB and a convolution."""
    def __init__(self, dim, depth, window, heads, compress, squeeze, ps):
        super().__init__()
        self.residual_group = nn.ModuleDict(dict(
            blocks=nn.ModuleList(HAB(dim, window, heads, compress, squeeze, window // 2 * (i % 2), ps[i]) for i in range(depth)),
            overlap_attn=OCAB(dim, window, heads)))
        self.conv = nn.Conv2d(dim, dim, 3, 1, 1)

    def forward(self, x, index_sa, index_oca, mask, run):
        y = x.clone() if banded(x) else x       # there blocks work on it in place
        for block in self.residual_group["blocks"]:
            y = run(block, y, index_sa, mask)
        y = run(self.residual_group["overlap_attn"], y, index_oca)
        return x + self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

def pad_to(x, multiple):
    """Mirrors (B, C, H, W) at its right and bottom to multiples of `multiple`, again and again where it is too small
    for one mirroring."""
    for dim in (2, 3):
        n = x.shape[dim]
        want = math.ceil(n / multiple) * multiple
        if want > n:
            i = torch.arange(want, device=x.device) % max(2 * n - 2, 1)
            x = x.index_select(dim, torch.minimum(i, 2 * n - 2 - i))
    return x

class HAT(nn.Module):
    """forward: (B, 3, H, W) in [0, 1] -> (B, 3, scale*H, scale*W), about [0, 1] (not clamped). Any H, W >= 1.

    init: "warm" starts as an interpolation, "plain" as HAT usually does. drop_path: stochastic depth of the last
    block, growing from 0 (0.1 in the official configurations)."""
    def __init__(self, scale=2, embed_dim=60, depths=(4, 4, 4), heads=2, window=8, compress=6, squeeze=6,
                 drop_path=0.0, init="warm"):
        super().__init__()
        if scale not in (2, 3, 4):
            raise ValueError(f"scale must be 2, 3 or 4, not {scale}")
        if window % 4:
            raise ValueError(f"window must be a multiple of 4, not {window}: it grows by a quarter on each side")
        self.scale, self.window, self.checkpoint = scale, window, False
        self.register_buffer("mean", torch.tensor(RGB_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("relative_position_index_SA", position_index(window, window))
        self.register_buffer("relative_position_index_OCA", position_index(window, window + int(window * OVERLAP)))
        ps = iter([drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths))])
        self.conv_first = nn.Conv2d(3, embed_dim, 3, 1, 1)
        self.patch_embed = nn.Sequential(OrderedDict(norm=LayerNorm(embed_dim)))
        self.layers = nn.ModuleList(
            RHAG(embed_dim, depth, window, heads, compress, squeeze, [next(ps) for _ in range(depth)]) for depth in depths)
        self.norm = LayerNorm(embed_dim)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, 1, 1)
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(embed_dim, FEATURES, 3, 1, 1), nn.LeakyReLU(0.01))
        factors = {2: (2,), 3: (3,), 4: (2, 2)}[scale]
        self.upsample = nn.Sequential(*[m for r in factors for m in (nn.Conv2d(FEATURES, r * r * FEATURES, 3, 1, 1),
                                                                     nn.PixelShuffle(r))])
        self.conv_last = nn.Conv2d(FEATURES, 3, 3, 1, 1)
        for name, p in self.named_parameters():
            if "relative_position_bias_table" in name or (p.dim() == 2 and name.endswith("weight")):
                nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith(("qkv.bias", "proj.bias", "fc1.bias", "fc2.bias")):
                nn.init.zeros_(p)
        if init == "warm":
            self.warm_start()

    def compile_blocks(self):
        """torch.compile for each attention block; blocks of one kind share what is compiled."""
        for layer in self.layers:
            for block in (*layer.residual_group["blocks"], layer.residual_group["overlap_attn"]):
                block.compile()

    @torch.no_grad()
    def warm_start(self):
        """Makes the untrained network an interpolation: R, G, B travel in channels 0-2 from conv_first to conv_last.
        Before the LeakyReLU (slope a) each travels twice, with opposite signs: f(x) - f(-x) = (1 + a) x exactly. The
        convolution before the pixel shuffle holds a three-tap interpolation; what would disturb it starts at zero."""
        before, relu = self.conv_before_upsample
        for conv, rows in (self.conv_first, 3), (self.conv_after_body, 3), (before, 6), (self.conv_last, 3):
            conv.weight[:rows], conv.bias[:rows] = 0, 0
        for c in range(3):
            self.conv_first.weight[c, c, 1, 1] = self.conv_last.weight[c, c, 1, 1] = 1
            before.weight[c, c, 1, 1] = 1
            before.weight[c + 3, c, 1, 1] = -1
        gain = 1 / (1 + relu.negative_slope)
        for conv, shuffle in zip(self.upsample[::2], self.upsample[1::2]):
            r = shuffle.upscale_factor
            t = (torch.arange(r) - (r - 1) / 2) / r                                  # where a new pixel lies in its old one
            taps = torch.stack([t * (t - 1) / 2, 1 - t * t, t * (t + 1) / 2], 1)     # the parabola through three pixels
            kernel = torch.einsum("iy,jx->ijyx", taps, taps).reshape(r * r, 3, 3) * gain
            conv.weight[:3 * r * r], conv.bias[:3 * r * r] = 0, 0
            for c in range(3):
                conv.weight[c * r * r:(c + 1) * r * r, c] = kernel
                conv.weight[c * r * r:(c + 1) * r * r, c + 3] = -kernel * (gain != 1)     # only the first has two signs
            gain = 1

    def forward(self, x):
        h, w = x.shape[-2:]
        x = pad_to(x, self.window) - self.mean
        mask = shift_mask(*x.shape[-2:], self.window, x.device)
        index = self.relative_position_index_SA, self.relative_position_index_OCA
        again = self.checkpoint and torch.is_grad_enabled()
        run = partial(checkpoint, use_reentrant=False) if again else lambda block, *a: block(*a)
        x = self.conv_first(x.contiguous(memory_format=torch.channels_last))
        x = x.to(self.mean.dtype)       # under autocast too the residual stream stays fp32
        y = self.patch_embed(x.permute(0, 2, 3, 1)).to(x.dtype)
        for layer in self.layers:
            y = layer(y, *index, mask, run)
        x = x + self.conv_after_body(self.norm(y).permute(0, 3, 1, 2))
        x = self.conv_before_upsample(x)
        small = x[:, 0].numel() < 64 * 64
        x = (self.enlarged if small or torch.is_grad_enabled() else self.enlarged_at_once)(x) + self.mean
        return x[..., :h * self.scale, :w * self.scale]

    def enlarged(self, x):
        """The last layers, from features (B, FEATURES, H, W) to the picture less its mean."""
        x = self.upsample(x)
        with torch.autocast(x.device.type, enabled=False):      # bf16 has only 8 bits: the picture itself stays fp32
            return self.conv_last(x.to(self.conv_last.weight.dtype))

    def enlarged_at_once(self, x):
        """enlarged() by a single convolution, which is all that its layers are together, and an eighth of the work: no
        activation lies between them. Its weights are their answers to single pixels, two pixels wide each way. Along the
        border, where the layers meet zeros one by one, they are asked themselves."""
        r, n, dtype = self.scale, FEATURES, self.conv_last.weight.dtype
        single = torch.zeros(n + 1, n, 5, 5, device=x.device, dtype=dtype)
        single[range(n), range(n), 2, 2] = 1        # and one picture without any, for the bias
        with torch.autocast(x.device.type, enabled=False):
            *kernel, bias = F.pixel_unshuffle(self.enlarged(single), r)
            kernel = torch.stack(kernel, 1) - bias[:, None]
            y = F.pixel_shuffle(F.conv2d(x.to(dtype), kernel.flip(2, 3), bias[:, 2, 2].contiguous(), padding=2), r)
        for dim in (2, 3):
            side = min(3, x.shape[dim])
            for start, at in (0, 0), (x.shape[dim] - side, x.shape[dim] - 1):
                strip = self.enlarged(x.narrow(dim, start, side)).narrow(dim, (at - start) * r, r)
                y.narrow(dim, at * r, r).copy_(strip)
        return y

class HATRefiner(nn.Module):
    """HAT (`hat_model`), then a small residual network over the whole SR picture (`residual_block`, `out_conv`) that
    learns to erase what HAT on tiles leaves at their borders. `out_conv` starts at zero: untrained, it changes nothing.

    forward(lr, tiler=None): (B, 3, H, W) in [0, 1] -> (B, 3, scale*H, scale*W), not clamped. tiler(hat_model, lr, scale)
    runs HAT tile by tile. `refine = False` leaves the refiner out (load() does so where it is untrained)."""
    reach = 4   # pixels of sr that the refiner looks at around each

    def __init__(self, scale=2, refiner_dim=32, **hat):
        super().__init__()
        self.scale, self.header, self.refine = scale, {}, True
        self.hat_model = HAT(scale=scale, **hat)
        d = refiner_dim
        self.residual_block = nn.Sequential(nn.Conv2d(3, d, 3, 1, 1), nn.LeakyReLU(0.1), nn.Conv2d(d, d, 3, 1, 1),
                                            nn.LeakyReLU(0.1), nn.Conv2d(d, d, 3, 1, 1), nn.LeakyReLU(0.1))
        self.out_conv = nn.Conv2d(d, 3, 3, 1, 1)
        nn.init.zeros_(self.out_conv.weight)
        nn.init.zeros_(self.out_conv.bias)

    @classmethod
    def from_preset(cls, name, scale=2, **changes):
        """A preset of PRESETS by name; changes go to HAT (init, drop_path, or any size)."""
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        model = cls(scale=scale, **{**PRESETS[name], **changes})
        model.header = dict(preset=name)
        return model

    def forward(self, lr, tiler=None):
        return self.refined(self.hat_model(lr) if tiler is None else tiler(self.hat_model, lr, self.scale))

    def refined(self, sr):
        """HAT's sr (B, 3, H, W) with the refiner's correction."""
        return sr + self.out_conv(self.residual_block(sr)).float() if self.refine else sr

# ----------------------------------------------------------------------------------------------------------------------
# weights files

def sizes(state):
    """The arguments of HATRefiner that a state dict was made with, read from its shapes."""
    hat, block = "hat_model.", "hat_model.layers.0.residual_group.blocks.0."
    try:
        dim = len(state[hat + "conv_first.weight"])
        table = state[block + "attn.relative_position_bias_table"]
        blocks = {tuple(map(int, k.split(".")[2:6:3])) for k in state if ".residual_group.blocks." in k}
        found = dict(
            embed_dim=dim, depths=tuple(sum(g == i for g, _ in blocks) for i in range(1 + max(g for g, _ in blocks))),
            heads=table.shape[1], window=(math.isqrt(len(table)) + 1) // 2,
            compress=dim // len(state[block + "conv_block.cab.0.weight"]),
            squeeze=dim // len(state[block + "conv_block.cab.3.attention.1.weight"]),
            scale=4 if hat + "upsample.2.weight" in state else math.isqrt(len(state[hat + "upsample.0.weight"]) // FEATURES))
        if "residual_block.0.weight" in state:
            found["refiner_dim"] = len(state["residual_block.0.weight"])
        elif preset_of(found):      # a plain HAT gets the refiner of its preset
            found["refiner_dim"] = PRESETS[preset_of(found)]["refiner_dim"]
    except (KeyError, IndexError, ValueError, TypeError):
        raise WeightsError("this is no HAT: its layers have other names") from None
    return found

def preset_of(found):
    """The name of the preset with these sizes, or None."""
    return next((name for name, preset in PRESETS.items() if all(found.get(k, v) == v for k, v in preset.items())), None)

def read_weights(path, header_only=False):
    """(state dict with names of HATRefiner, header dict) from one of our .safetensors files or an official .pth or
    .safetensors of plain HAT; header_only leaves the state dict empty. Raises WeightsError."""
    path, header = Path(path), {}
    if not path.is_file():
        raise WeightsError(f"no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                header = dict(json.loads((f.metadata() or {}).get("kabegami", "{}")) or {})
                state = {k: f.get_tensor(k) for k in ([] if header_only else f.keys())}
        else:
            state = {} if header_only else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:   # whatever a file that is no checkpoint sets off
        raise WeightsError(f"{path} cannot be read: cut short, or not just plain weights ({type(e).__name__})") from None
    if header_only:
        return {}, header
    wraps = [state[k] for k in ("params_ema", "params", "state_dict") if isinstance(state, dict) and k in state]
    state = next((w for w in wraps if isinstance(w, dict)), state)
    if not isinstance(state, dict) or {(type(k), isinstance(v, torch.Tensor)) for k, v in state.items()} != {(str, True)}:
        raise WeightsError(f"{path} holds no weights")
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    hat = "hat_model." if "conv_first.weight" in state else ""
    return {hat + k: v.float() if v.is_floating_point() else v for k, v in state.items()}, header

def fit(model, state, path):
    """Puts a state dict into a HATRefiner of the same sizes; a plain HAT leaves the refiner as it is. Raises WeightsError
    (path is for its message) naming every key that is missing, unexpected or of another shape."""
    own = model.state_dict()
    if not any(k.startswith(("residual_block.", "out_conv.")) for k in state):
        own = {k: v for k, v in own.items() if k.startswith("hat_model.")}
    wrong = {"missing": own.keys() - state.keys(), "unexpected": state.keys() - own.keys(), "of another shape": {
        f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}" for k, v in own.items() if k in state and state[k].shape != v.shape}}
    if any(wrong.values()):
        try:
            theirs = sizes(state)
            what = f"it is {preset_of(theirs) or theirs} {theirs['scale']}x"
        except WeightsError as e:
            what = str(e)
        said = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, keys in wrong.items() if keys)
        raise WeightsError(f"{path} does not fit this model ({what}); {said}")
    model.load_state_dict(state, strict=False)      # of a plain HAT the refiner is missing

def load(path, device="cpu"):
    """A HATRefiner in eval mode with the sizes and weights of the file. Raises WeightsError."""
    state, header = read_weights(path)
    try:
        found = sizes(state)
        model = HATRefiner(**found)
    except (ValueError, ZeroDivisionError, RuntimeError) as e:
        raise WeightsError(f"{path}: {e}") from None
    fit(model, state, path)
    model.header = {"preset": preset_of(found), "scale": model.scale, **header}
    model.refine = bool(model.out_conv.weight.any() or model.out_conv.bias.any())
    return model.eval().to(device)

def write_atomic(path, data):
    """Bytes into a file that is there whole or not at all; its folder is made if need be."""
    tmp = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    tmp.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(tmp, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())     # or a power cut may leave the new name with nothing behind it
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)

def save(model, path, header=None, dtype=None):
    """Writes a HATRefiner as one .safetensors file: its weights (as `dtype` if given) and a JSON header under the
    metadata key `kabegami`, holding sizes and scale beside whatever `header` adds. Raises OSError."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    found = sizes(state)
    state = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in state.items()}
    about = {"preset": preset_of(found), "scale": model.scale, "sizes": found, **(header or {})}
    write_atomic(path, to_safetensors(state, {"kabegami": json.dumps(about)}))
