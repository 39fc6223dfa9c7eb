"""HAT (Hybrid Attention Transformer) with a small residual refiner, for super-resolution by 2, 3 or 4.

    model = load("weights/kabegami-low.safetensors")    # or HATRefiner.from_preset("low", scale=2)
    with torch.inference_mode():
        sr = model(lr).clamp(0, 1)      # (B, 3, H, W) in [0, 1] -> (B, 3, 2H, 2W), any H and W
        sr = model(lr, tiler)           # HAT in tiles (Tiler of tile.py), then the refiner, if it is trained

HAT: Chen et al., "Activating More Pixels in Image Super-Resolution Transformer", CVPR 2023, arXiv 2205.04437.
Parameters have the official names, so official HAT files load here and exported files load elsewhere.
The blocks use channels-last tensors, (B, H, W, C). Needs torch, einops and safetensors; copy this file and it
works alone.
"""
import json
import math
import os
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch.utils.checkpoint import checkpoint

# tiny is for tests. fast, low and mid have few heads: each head costs time
PRESETS = {
    "tiny": dict(embed_dim=16, depths=(2,) * 2, heads=2, window=4, compress=4, squeeze=4, refiner_dim=8),
    "fast": dict(embed_dim=48, depths=(4,), heads=1, window=8, compress=4, squeeze=4, refiner_dim=16),
    "low": dict(embed_dim=60, depths=(4,) * 3, heads=2, window=8, compress=6, squeeze=6, refiner_dim=32),
    "mid": dict(embed_dim=96, depths=(6,) * 4, heads=3, window=16, compress=6, squeeze=6, refiner_dim=48),
    "high": dict(embed_dim=180, depths=(6,) * 6, heads=6, window=16, compress=3, squeeze=30, refiner_dim=64),
}
PRESETS["hat_s"] = {**PRESETS["high"], "embed_dim": 144, "compress": 24, "squeeze": 24}
PRESETS["hat"] = PRESETS["high"]
PRESETS["hat_l"] = {**PRESETS["hat"], "depths": (6,) * 12}
RGB_MEAN = (0.4488, 0.4371, 0.4040)     # of DIV2K
CONV_SCALE = 0.01                       # weight of the convolution branch; official files do not store it
OVERLAP = 0.5                           # an OCAB key window is 1 + OVERLAP times as wide as its query window
FEATURES = 64                           # channels of the upsampler


class WeightsError(ValueError):
    """A weights file that cannot be used. The message is one line."""


# ------------------------------------------------------------------ attention

def position_index(window, key_window):
    """Index into the relative position table for each pair of query and key: int64 (window^2, key_window^2).
    Negative indices, which OCAB has, count from the end of the table, as in the official code."""
    def grid(n):
        return torch.stack(torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")).flatten(1)

    query, key = grid(window)[:, :, None], grid(key_window)[:, None, :]
    if key_window == window:
        offset = query - key + window - 1
    else:
        offset = key - query + window - key_window + 1
    return offset[0] * (window + key_window - 1) + offset[1]


def shift_mask(h, w, window, device):
    """Attention bias for windows shifted by window / 2: -100 between two pixels that share a window only
    because of the cyclic shift, else 0. Shape: (windows of the picture, window^2, window^2)."""
    def region(n):
        i = torch.arange(n, device=device)
        return (i >= n - window).int() + (i >= n - window // 2).int()

    regions = region(h)[:, None] * 3 + region(w)[None, :]
    regions = rearrange(regions, "(y i) (x j) -> (y x) (i j)", i=window, j=window)
    return (regions[..., :, None] != regions[..., None, :]) * -100.0


def split_windows(x, window):
    """(B, H, W, C) -> (B * windows, window^2, C)."""
    return rearrange(x, "b (y i) (x j) c -> (b y x) (i j) c", i=window, j=window)


def join_windows(x, window, h, w):
    """(B * windows, window^2, C) -> (B, h, w, C)."""
    return rearrange(x, "(b y x) (i j) c -> b (y i) (x j) c", y=h // window, x=w // window, i=window)


def widen(x, dim, window, edge):
    """Extend each window along `dim` by `edge` pixels of both neighbors. Pixels outside the picture are
    zeros; they take part in the softmax, as in the official code."""
    # slices and torch.cat have a much faster backward than Tensor.unfold
    x = x.unflatten(dim, (-1, window))
    before, after = x.narrow(dim + 1, window - edge, edge), x.narrow(dim + 1, 0, edge)
    zeros, n = torch.zeros_like(after.narrow(dim, 0, 1)), x.shape[dim] - 1
    before = torch.cat([zeros, before.narrow(dim, 0, n)], dim)
    after = torch.cat([after.narrow(dim, 1, n), zeros], dim)
    return torch.cat([before, x, after], dim + 1).flatten(dim, dim + 1)


def pad_heads(parameter, heads, dim=0):
    """Zero-pad each head along `dim` to a multiple of 8 channels: the same result, faster products."""
    p = parameter.unflatten(dim, (heads, -1))
    p = F.pad(p, (0, 0) * (p.dim() - dim - 2) + (0, -p.shape[dim + 1] % 8))
    return p.flatten(dim, dim + 1)


def attention(q, k, v, bias, scale):
    """softmax(scale * q k^T + bias) v for q (N, n, heads, d), k and v (N, m, heads, d) and bias
    (windows, heads, n, m), where windows is 1 or a divisor of N. Returns (N, n, heads * d)."""
    bias = bias.expand(q.shape[0] // bias.shape[0], *bias.shape).flatten(0, 1)     # len() has no ONNX form
    if q.is_cuda:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2).flatten(2)
    heads = []      # head by head: the fastest gradient of the bias on a CPU
    for q_head, k_head, v_head, b in zip(q.unbind(2), k.unbind(2), v.unbind(2), bias.unbind(1)):
        heads.append(torch.baddbmm(b, q_head, k_head.mT, alpha=scale).softmax(-1) @ v_head)
    return torch.cat(heads, -1)


class WindowAttention(nn.Module):
    """Multi-head attention with a relative position bias. Queries come from windows of `window` pixels, keys
    and values from windows of `key_window` pixels. Both windows have the same center; key_window >=
    window."""
    def __init__(self, dim, window, key_window, heads):
        super().__init__()
        self.window, self.heads, self.scale = window, heads, (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((window + key_window - 1) ** 2, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads_of(self, x):
        """Queries, keys and values of x (..., C): (..., 3, heads, d)."""
        weight = pad_heads(self.qkv.weight, 3 * self.heads)
        bias = pad_heads(self.qkv.bias, 3 * self.heads)
        return F.linear(x, weight, bias).unflatten(-1, (3, self.heads, -1))

    def position_bias(self, index, dtype):
        """Attention bias (1, heads, n, m). index: see position_index()."""
        return self.relative_position_bias_table.t().contiguous()[:, index].to(dtype)[None]

    def attend(self, q, k, v, bias):
        """attention() and the output projection: (N, n, C)."""
        weight = pad_heads(self.proj.weight, self.heads, dim=1)
        return F.linear(attention(q, k, v, bias, self.scale), weight, self.proj.bias)

    def forward(self, x, index, mask=None):
        """x (B, H, W, C) with whole windows -> the same shape. mask (windows, n, n) is added to the bias."""
        q, k, v = self.heads_of(split_windows(x, self.window)).unbind(2)
        bias = self.position_bias(index, q.dtype)
        if mask is not None:
            bias = bias + mask[:, None].to(bias.dtype)
        return join_windows(self.attend(q, k, v, bias), self.window, *x.shape[1:3])


# ------------------------------------------------------------------ blocks

class LayerNorm(nn.LayerNorm):
    """LayerNorm that returns the autocast dtype, so that the layers after it need no casts of their own."""
    def forward(self, x):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return super().forward(x).to(dtype)


class MLP(nn.Sequential):
    def __init__(self, dim):
        layers = dict(fc1=nn.Linear(dim, 2 * dim), gelu=nn.GELU(), fc2=nn.Linear(2 * dim, dim))
        super().__init__(OrderedDict(layers))


class ChannelAttention(nn.Module):
    """Squeeze and excitation (Hu et al., CVPR 2018): x (B, H, W, C) -> a factor per channel, (B, 1, 1, C)."""
    def __init__(self, dim, squeeze):
        super().__init__()
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, dim // squeeze, 1), nn.ReLU(),
                                       nn.Conv2d(dim // squeeze, dim, 1), nn.Sigmoid())

    def forward(self, x):
        # attention[0] would sum in bf16 under autocast
        mean = x.mean(2, dtype=torch.promote_types(x.dtype, torch.float32)).mean(1)
        return self.attention[1:](mean[:, :, None, None]).flatten(1)[:, None, None]


class CAB(nn.Module):
    """Convolution branch: two convolutions and channel attention, (B, H, W, C) -> (B, H, W, C)."""
    def __init__(self, dim, compress, squeeze):
        super().__init__()
        self.cab = nn.Sequential(nn.Conv2d(dim, dim // compress, 3, 1, 1), nn.GELU(),
                                 nn.Conv2d(dim // compress, dim, 3, 1, 1), ChannelAttention(dim, squeeze))

    def forward(self, x):
        x = self.cab[:3](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x * (self.cab[3](x) * CONV_SCALE)


class HAB(nn.Module):
    """Hybrid attention block: window attention and a convolution branch in parallel, then an MLP."""
    def __init__(self, dim, window, heads, compress, squeeze, shift):
        super().__init__()
        self.shift = shift
        self.norm1 = LayerNorm(dim)
        self.attn = WindowAttention(dim, window, window, heads)
        self.conv_block = CAB(dim, compress, squeeze)
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, x, index, mask):
        y = self.norm1(x)
        conv = self.conv_block(y)
        if self.shift:
            y = y.roll((-self.shift, -self.shift), (1, 2))
            y = self.attn(y, index, mask).roll((self.shift, self.shift), (1, 2))
        else:
            y = self.attn(y, index)
        x = x + (y + conv)
        return x + self.mlp(self.norm2(x))


class OCAB(WindowAttention):
    """Overlapping cross-attention block: each window attends to a wider window around it, then an MLP."""
    def __init__(self, dim, window, heads):
        super().__init__(dim, window, window + int(window * OVERLAP), heads)
        self.edge = int(window * OVERLAP) // 2
        self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, x, index):
        q, kv = self.heads_of(self.norm1(x)).tensor_split((1,), 3)
        kv = widen(widen(kv, 1, self.window, self.edge), 2, self.window, self.edge)
        q = rearrange(q, "b (y i) (x j) 1 h d -> (b y x) (i j) h d", i=self.window, j=self.window)
        n = self.window + 2 * self.edge
        k, v = rearrange(kv, "b (y i) (x j) two h d -> two (b y x) (i j) h d", i=n, j=n)
        y = self.attend(q, k, v, self.position_bias(index, q.dtype))
        x = x + join_windows(y, self.window, *x.shape[1:3])
        return x + self.mlp(self.norm2(x))


class RHAG(nn.Module):
    """Residual hybrid attention group: HABs, every second one shifted, then one OCAB and a convolution."""
    def __init__(self, dim, window, heads, compress, squeeze, depth):
        super().__init__()
        shifts = [window // 2 if i % 2 else 0 for i in range(depth)]
        blocks = nn.ModuleList(HAB(dim, window, heads, compress, squeeze, shift) for shift in shifts)
        self.residual_group = nn.ModuleDict(dict(blocks=blocks, overlap_attn=OCAB(dim, window, heads)))
        self.conv = nn.Conv2d(dim, dim, 3, 1, 1)

    def forward(self, x, index_sa, index_oca, mask, grad_checkpoint):
        def run(block, *inputs):
            return checkpoint(block, *inputs, use_reentrant=False) if grad_checkpoint else block(*inputs)

        y = x
        for block in self.residual_group["blocks"]:
            y = run(block, y, index_sa, mask)
        y = run(self.residual_group["overlap_attn"], y, index_oca)
        return x + self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


# ------------------------------------------------------------------ the network

def pad_to(x, multiple):
    """Extend (B, C, H, W) on the right and at the bottom to multiples of `multiple` by mirroring. Unlike
    F.pad, mirror a small picture as often as necessary."""
    for dim in (2, 3):
        n = x.shape[dim]
        i = torch.arange((n + multiple - 1) // multiple * multiple, device=x.device)
        if n < multiple:        # mirror more than once; ONNX export assumes n >= multiple
            i = i % max(2 * n - 2, 1)
        x = x.index_select(dim, n - 1 - (n - 1 - i).abs())
    return x


class HAT(nn.Module):
    """HAT. forward: (B, 3, H, W) in [0, 1] -> (B, 3, scale * H, scale * W), not clamped. Any H, W >= 1.

    embed_dim: channels, a multiple of heads. depths: number of HABs of each group. window: side of a
    window in pixels, a multiple of 4. compress, squeeze: the channels inside CAB are divided by them.
    grad_checkpoint (attribute): recompute each block in the backward, to save memory."""
    def __init__(self, scale=2, embed_dim=60, depths=(4, 4, 4), heads=2, window=8, compress=6, squeeze=6):
        super().__init__()
        if scale not in (2, 3, 4):
            raise ValueError(f"scale must be 2, 3 or 4, not {scale}")
        self.scale, self.window, self.grad_checkpoint = scale, window, False
        key_window = window + int(window * OVERLAP)
        self.register_buffer("mean", torch.tensor(RGB_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("relative_position_index_SA", position_index(window, window))
        self.register_buffer("relative_position_index_OCA", position_index(window, key_window))
        self.conv_first = nn.Conv2d(3, embed_dim, 3, 1, 1)
        self.patch_embed = nn.Sequential(OrderedDict(norm=LayerNorm(embed_dim)))
        self.layers = nn.ModuleList(RHAG(embed_dim, window, heads, compress, squeeze, n) for n in depths)
        self.norm = LayerNorm(embed_dim)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, 1, 1)
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(embed_dim, FEATURES, 3, 1, 1), nn.LeakyReLU(0.01))
        self.upsample = nn.Sequential()
        for r in {2: (2,), 3: (3,), 4: (2, 2)}[scale]:
            self.upsample.extend([nn.Conv2d(FEATURES, r * r * FEATURES, 3, 1, 1), nn.PixelShuffle(r)])
        self.conv_last = nn.Conv2d(FEATURES, 3, 3, 1, 1)
        for name, p in self.named_parameters():
            if "relative_position_bias_table" in name or (p.dim() == 2 and name.endswith("weight")):
                nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith(("qkv.bias", "proj.bias", "fc1.bias", "fc2.bias")):
                nn.init.zeros_(p)
        self.warm_start()

    @torch.no_grad()
    def warm_start(self):
        """Initialize the network as an interpolation. Channels 0-2 carry R, G and B from conv_first to
        conv_last. Channels 3-5 carry the negative colors through the LeakyReLU f of slope a, because
        f(x) - f(-x) = (1 + a) x. The first convolution of the upsampler interpolates."""
        before, relu = self.conv_before_upsample
        for conv, rows in (self.conv_first, 3), (self.conv_after_body, 3), (before, 6), (self.conv_last, 3):
            conv.weight[:rows] = 0
            conv.bias[:rows] = 0
        for c in range(3):
            self.conv_first.weight[c, c, 1, 1] = 1
            self.conv_last.weight[c, c, 1, 1] = 1
            before.weight[c, c, 1, 1] = 1
            before.weight[c + 3, c, 1, 1] = -1
        for i, (conv, shuffle) in enumerate(zip(self.upsample[::2], self.upsample[1::2])):
            r = shuffle.upscale_factor
            gain = 1 / (1 + relu.negative_slope) if i == 0 else 1
            t = (torch.arange(r) - (r - 1) / 2) / r     # center of each new pixel, relative to its old pixel
            taps = torch.stack([t * (t - 1) / 2, 1 - t * t, t * (t + 1) / 2], 1)   # quadratic, 3 pixels
            kernel = torch.einsum("iy,jx->ijyx", taps, taps).reshape(r * r, 3, 3) * gain
            conv.weight[:3 * r * r] = 0
            conv.bias[:3 * r * r] = 0
            for c in range(3):
                conv.weight[c * r * r:(c + 1) * r * r, c] = kernel
                if i == 0:
                    conv.weight[c * r * r:(c + 1) * r * r, c + 3] = -kernel

    def compile_blocks(self):
        """torch.compile each attention block, for each size of its input. Equal blocks share the code."""
        for layer in self.layers:
            for block in (*layer.residual_group["blocks"], layer.residual_group["overlap_attn"]):
                block.compile(dynamic=False)     # Inductor cannot order the strides of a dynamic shape

    def forward(self, x):
        h, w = x.shape[-2:]
        x = self.features(pad_to(x, self.window) - self.mean)
        x = self.enlarge(self.conv_before_upsample(x)) + self.mean
        return x[..., :h * self.scale, :w * self.scale]

    def features(self, x):
        """(B, 3, H, W), H and W multiples of the window -> (B, embed_dim, H, W)."""
        indices = self.relative_position_index_SA, self.relative_position_index_OCA
        mask = shift_mask(*x.shape[-2:], self.window, x.device)
        x = self.conv_first(x.contiguous(memory_format=torch.channels_last))
        x = x.to(self.mean.dtype)       # the residual stream stays fp32 under autocast
        y = self.patch_embed(x.permute(0, 2, 3, 1)).to(x.dtype)
        for layer in self.layers:
            y = layer(y, *indices, mask, self.grad_checkpoint and torch.is_grad_enabled())
        return x + self.conv_after_body(self.norm(y).permute(0, 3, 1, 2))

    def enlarge(self, x):
        """(B, FEATURES, H, W) -> (B, 3, scale * H, scale * W), fp32: bf16 has too few bits for a picture."""
        x = self.upsample(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.conv_last(x.to(self.conv_last.weight.dtype))


class HATRefiner(nn.Module):
    """HAT (`hat_model`), then a small residual network (`residual_block`, `out_conv`) on the whole picture,
    which learns to remove the seams between HAT's tiles. Its last layer starts at zero, so an untrained
    refiner changes nothing.

    forward(lr, tiler=None): (B, 3, H, W) in [0, 1] -> (B, 3, scale * H, scale * W), not clamped.
    tiler(hat_model, lr, scale) runs HAT tile by tile. `use_refiner = False` skips the refiner."""
    refiner_reach = 4       # receptive field of the refiner: SR pixels on each side

    def __init__(self, scale=2, refiner_dim=32, **hat):
        super().__init__()
        self.scale, self.header, self.use_refiner = scale, {}, True
        self.sizes = {"scale": scale, "refiner_dim": refiner_dim, **hat}     # arguments, for save()
        self.hat_model = HAT(scale=scale, **hat)
        d = refiner_dim
        self.residual_block = nn.Sequential(nn.Conv2d(3, d, 3, 1, 1), nn.LeakyReLU(0.1),
                                            nn.Conv2d(d, d, 3, 1, 1), nn.LeakyReLU(0.1),
                                            nn.Conv2d(d, d, 3, 1, 1), nn.LeakyReLU(0.1))
        self.out_conv = nn.Conv2d(d, 3, 3, 1, 1)
        nn.init.zeros_(self.out_conv.weight)
        nn.init.zeros_(self.out_conv.bias)

    @classmethod
    def from_preset(cls, name, scale=2, **changes):
        """Create a model with the sizes PRESETS[name]. `changes` replace sizes."""
        return cls(scale=scale, **{**PRESETS[name], **changes})

    def forward(self, lr, tiler=None):
        sr = self.hat_model(lr) if tiler is None else tiler(self.hat_model, lr, self.scale)
        return self.refine(sr) if self.use_refiner else sr

    def refine(self, sr):
        """Apply the refiner to sr (B, 3, H, W)."""
        return sr + self.out_conv(self.residual_block(sr)).float()


# ------------------------------------------------------------------ weights files

def infer_sizes(state):
    """Infer the arguments of HATRefiner from the shapes of a state dict, for files without our header. A
    plain HAT gets the refiner_dim of its preset, else the default. Raises WeightsError."""
    block = "hat_model.layers.0.residual_group.blocks.0."
    try:
        dim = len(state["hat_model.conv_first.weight"])
        upsample = state["hat_model.upsample.0.weight"]
        table = state[block + "attn.relative_position_bias_table"]
        compressed = state[block + "conv_block.cab.0.weight"]
        squeezed = state[block + "conv_block.cab.3.attention.1.weight"]
    except KeyError as e:
        raise WeightsError(f"not a HAT: the layer {e} is missing") from None
    groups = [name.split(".")[2] for name in state if name.endswith("conv_block.cab.0.weight")]
    scale = 4 if "hat_model.upsample.2.weight" in state else math.isqrt(len(upsample) // FEATURES)
    sizes = dict(embed_dim=dim, depths=tuple(groups.count(str(i)) for i in range(len(set(groups)))),
                 heads=table.shape[1], window=(math.isqrt(len(table)) + 1) // 2,
                 compress=dim // len(compressed), squeeze=dim // len(squeezed), scale=scale)
    if "residual_block.0.weight" in state:
        sizes["refiner_dim"] = len(state["residual_block.0.weight"])
    return {**sizes, **PRESETS.get(preset_name(sizes), {})}


def preset_name(sizes):
    """The name of the first preset with these sizes, or None. A missing refiner_dim fits every preset."""
    sizes = {**sizes, "depths": tuple(sizes["depths"])}
    for name, preset in PRESETS.items():
        if all(sizes.get(key, value) == value for key, value in preset.items()):
            return name
    return None


def refiner_is_trained(state):
    """False if the last layer of the refiner is all zero or missing."""
    return any(state[name].any().item() for name in ("out_conv.weight", "out_conv.bias") if name in state)


def read_weights(path):
    """Read our .safetensors, or an official .pth or .safetensors of plain HAT: (state dict with the names of
    HATRefiner, header dict). Raises WeightsError."""
    header = {}
    try:
        if Path(path).suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                header = json.loads((f.metadata() or {}).get("kabegami", "{}"))
                state = {name: f.get_tensor(name) for name in f.keys()}
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            wrappers = [key for key in ("params_ema", "params", "state_dict") if key in state]
            state = state[wrappers[0]] if wrappers else state
        state = {name.replace("module.", "").replace("_orig_mod.", ""): v for name, v in state.items()}
        state = {name: v.float() if v.is_floating_point() else v for name, v in state.items()}
    except Exception as e:      # a broken file can raise nearly anything
        reason = (str(e).splitlines() or [""])[0]
        raise WeightsError(f"{path} cannot be read as weights ({type(e).__name__}: {reason})") from None
    prefix = "hat_model." if "conv_first.weight" in state else ""
    return {prefix + name: v for name, v in state.items()}, header


def fit_weights(model, state, path, strict=True):
    """Load a state dict into a HATRefiner. A plain HAT leaves the refiner unchanged. Returns the names that
    did not fit: missing from the file, unknown to the model, or of another shape. strict: raise WeightsError
    instead and load nothing; path is for its message."""
    own = model.state_dict()
    if not any(name.startswith(("residual_block.", "out_conv.")) for name in state):
        own = {name: v for name, v in own.items() if name.startswith("hat_model.")}
    fitting = {name: v for name, v in state.items() if name in own and v.shape == own[name].shape}
    misfits = sorted((own.keys() | state.keys()) - fitting.keys())
    if strict and misfits:
        names = ", ".join(misfits[:3])
        raise WeightsError(f"{path} does not fit this model in {len(misfits)} tensors: {names}")
    model.load_state_dict(fitting, strict=False)
    return misfits


def load(path, device="cpu"):
    """Load a file -> HATRefiner in eval mode with the sizes and weights of the file. use_refiner is False if
    the file holds no trained refiner. Raises WeightsError."""
    state, header = read_weights(path)
    try:
        sizes = header.get("sizes") or infer_sizes(state)
        model = HATRefiner(**sizes)
    except ValueError as e:
        raise WeightsError(f"{path}: {e}") from None
    fit_weights(model, state, path)
    model.header = {"preset": preset_name(sizes), "scale": model.scale, **header}
    model.use_refiner = refiner_is_trained(state)
    return model.eval().to(device)


def write_atomic(path, data):
    """Write bytes to a file, completely or not at all. Create its folder. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())         # a power cut must not leave an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(model, path, header=None, dtype=None):
    """Write a HATRefiner to a .safetensors file: its weights, cast to `dtype` if given, and a JSON header
    with sizes, scale and the entries of `header` (metadata key `kabegami`). With an untrained refiner the
    file holds plain HAT under the official names, which other programs can open. Raises OSError."""
    sizes = model.sizes
    header = {"preset": preset_name(sizes), "scale": model.scale, "sizes": sizes, **(header or {})}
    trained = refiner_is_trained(model.state_dict())
    state = (model if trained else model.hat_model).state_dict()
    for name, v in state.items():
        state[name] = v.detach().cpu().contiguous().to(dtype if dtype and v.is_floating_point() else v.dtype)
    write_atomic(path, to_safetensors(state, {"kabegami": json.dumps(header)}))
