"""Losses for super-resolution, and what they need: discriminators, outside feature networks, an artifact detector.

    pix = Charbonnier()                                      # every term also works alone: loss(sr, hr) -> a scalar
    pix(sr, hr).backward()

    loss = SRLoss("pix=1,freq=0.3,edge,lock")                # or the weighted sum of several
    total, values = loss(sr, hr, lr)

    python losses.py picture.png                             # which artifacts are in a picture, and where

Pictures are (B, 3, H, W) float RGB in [0, 1] (sr may leave that range), of any size unless a term says otherwise. The
gradient of every term reaches sr; tests prove it. Sums are float32 under autocast too, float64 when given float64.
Needs torch and safetensors; torchvision only for the perceptual loss. Copy this file and it works alone.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch.nn.utils.parametrizations import spectral_norm

WEIGHTS = dict(pix=1.0, freq=0.3, edge=1.0, texture=0.2, lock=0.5, perc=0.5, art_cls=0.1, art_feat=1.0, adv=0.1,
               luma=2.0)
CLASSES = ("clean", "blocking", "ringing", "banding", "blur", "oversharp", "noise", "seam")
GANS = ("ragan", "vanilla", "lsgan", "hinge")
PERCEPTUAL = {  # layers are named by their place in an nn.Sequential; their values are weights
    "vgg": dict(    # Real-ESRGAN's: conv1_2, conv2_2, conv3_4, conv4_4, conv5_4, each before its ReLU
        layers={"2": 0.1, "7": 0.1, "16": 1.0, "25": 1.0, "34": 1.0},
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),              # of ImageNet
        absent="the perceptual loss needs VGG19: --vgg-weights FILE, torchvision's vgg19-dcbb9e9d.pth; or "
               "--vgg-weights torchvision, which has torchvision download it once (550 MB)"),
    "anime": dict(  # APISR's: conv1, then conv3 of the last block of layer1 to layer4, each before its batch norm
        layers={"0": 0.1, "4.2.conv3": 20.0, "5.3.conv3": 25.0, "6.5.conv3": 1.0, "7.2.conv3": 1.0},
        mean=(0.7137, 0.6628, 0.6519), std=(0.2970, 0.3017, 0.2979),        # of Danbooru2018, as in its training
        absent="the anime perceptual loss needs the Danbooru ResNet50: --anime-weights FILE, resnet50-13306192.pth "
               "from the releases of github.com/RF5/danbooru-pretrained"),
}


class LossError(ValueError):
    """Something asked for that cannot be; the message is one line and says what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# filters


def full(x):
    """float32 at least: sums of small differences drown in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fp32(f):
    """Runs a function of pictures outside autocast, its floating-point tensors in float32 at least."""
    @functools.wraps(f)
    def run(*args, **kw):
        args = [full(a) if torch.is_tensor(a) else a for a in args]
        kw = {k: full(a) if torch.is_tensor(a) else a for k, a in kw.items()}
        device = next(a.device.type for a in (*args, *kw.values()) if torch.is_tensor(a))
        with torch.autocast(device, enabled=False):
            return f(*args, **kw)
    return run


def filtered(x, *kernels):
    """(B, C, H, W): every channel under each (h, w) kernel of odd sides, one after another; the border is repeated."""
    for k in kernels:
        k = torch.as_tensor(k, dtype=x.dtype, device=x.device)
        (h, w), c = k.shape, x.shape[1]
        x = F.conv2d(F.pad(x, (w // 2, w // 2, h // 2, h // 2), "replicate"), k.expand(c, 1, h, w), groups=c)
    return x


def gaussian(x, sigma, radius=None):
    """(B, C, H, W) under a Gaussian, cut at radius (3 sigma)."""
    r = math.ceil(3 * sigma) if radius is None else radius
    g = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-r, r + 1)]
    g = [v / sum(g) for v in g]
    return filtered(x, [g], [[v] for v in g])


def luma(x):
    """(B, 3, H, W) -> (B, 1, H, W), Y' of BT.601 over its full range."""
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def binomial(n):
    return [math.comb(n - 1, i) / 2 ** (n - 1) for i in range(n)]


def sobel(x, kernel=3):
    """(B, C, H, W) -> its derivatives (gx, gy) per pixel. kernel: 1 plain differences, 3 Sobel, 5 and on wider."""
    b = [0.0, 0.0, *binomial(max(kernel, 3) - 2), 0.0, 0.0]
    d = [(b[i] - b[i + 2]) / 2 for i in range(len(b) - 2)]
    s = binomial(kernel)
    return filtered(x, [d], [[v] for v in s]), filtered(x, [[v] for v in d], [s])


def magnitude(gx, gy):
    return (gx * gx + gy * gy + 1e-6).sqrt()        # without the constant its own gradient is infinite where it is flat


def distance(a, b, mask=None):
    d = (a - b).abs()
    return (d if mask is None else d * mask).mean()


# ----------------------------------------------------------------------------------------------------------------------
# terms that compare pictures


class Charbonnier(nn.Module):
    """mean sqrt((sr - hr)^2 + eps^2) - eps: L1 with a rounded tip, zero where sr = hr.

    Charbonnier et al., ICIP 1994; as a super-resolution loss Lai et al., CVPR 2017. eps: where it turns from square to
    straight, in units of the picture; 1e-3 is a quarter of an 8-bit level. rmse: not of each value, but of each picture's
    root mean square error: in a picture the large errors count, as in PSNR, and the pictures alike, flat or not."""

    def __init__(self, eps=1e-3, rmse=False):
        super().__init__()
        self.eps, self.rmse = eps, rmse

    @fp32
    def forward(self, sr, hr):
        square = (sr - hr).square()
        if self.rmse:
            square = square.flatten(1).mean(1)
        return (torch.sqrt(square + self.eps ** 2) - self.eps).mean()


class Laplacian(nn.Module):
    """L1 between the fine detail of sr and hr: the mean over levels of |band(sr) - band(hr)|, where a band is a level
    minus itself under a 5x5 binomial, and the next level is that blurred one at half the size (Burt & Adelson 1983,
    their residuals without the way back up). highpass=True: the plain 3x3 high-pass (8 in the middle, -1 around).
    The colour of large areas is not in it."""

    def __init__(self, levels=3, highpass=False):
        super().__init__()
        self.levels, self.highpass = levels, highpass

    @fp32
    def forward(self, sr, hr):
        if self.highpass:
            kernel = [[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]]
            return distance(filtered(sr, kernel), filtered(hr, kernel))
        total, b = 0, binomial(5)
        for _ in range(self.levels):
            low_sr, low_hr = (filtered(x, [b], [[v] for v in b]) for x in (sr, hr))
            total = total + distance(sr - low_sr, hr - low_hr)
            sr, hr = low_sr[..., ::2, ::2], low_hr[..., ::2, ::2]
        return total / self.levels


def soft_canny(y, kernel=3, low=0.05, high=0.1, soft=0.02):
    """(B, 1, H, W) -> (B, 1, H, W) in [0, 1]: Canny's edges (1986), sigmoids for its decisions: blur, slope, thinned
    across the edge, kept above `high`, or above `low` beside such a one. The thresholds are slopes per pixel; these are
    OpenCV's usual 100 and 200. soft: the width of the sigmoids, in the same unit."""
    gx, gy = sobel(gaussian(y, 1.0, 2), kernel)
    m = magnitude(gx, gy)
    h, w = m.shape[-2:]
    p = F.pad(m, (1, 1, 1, 1), "replicate")
    beside = [torch.maximum(p[..., 1 + dy:1 + dy + h, 1 + dx:1 + dx + w], p[..., 1 - dy:1 - dy + h, 1 - dx:1 - dx + w])
              for dy, dx in ((0, 1), (1, 1), (1, 0), (1, -1))]
    axis = (torch.atan2(gy, gx) * (4 / math.pi)).detach().round().long() % 4
    thin = torch.sigmoid((m - torch.cat(beside, 1).gather(1, axis)) / soft)
    strong = torch.sigmoid((m - high) / soft)
    weak = torch.sigmoid((m - low) / soft) * F.max_pool2d(strong, 3, 1, 1)
    return thin * torch.maximum(strong, weak)


class Edge(nn.Module):
    """Where lines are, how steep, in what colour: L1 means of luma's Sobel magnitudes (times `sobel`), its soft Canny
    maps (`canny`), and the colour under hr's Sobel edges, widened by a pixel (`colour`).

    kernel: side of the derivative filter (odd). Measured in training: with kernel 1 pictures are sharp, but large ones
    get double lines and wrong colour in the middle of thick lines; kernel 3 at weight 1 each is better. Weights 4, 16
    and 4 with the adversarial term halved: fewer faults of the GAN, but thicker, doubled lines. Hence the defaults.
    forward's mask (B, 1, H, W) weighs places, see detail_mask. Raises LossError for an even kernel."""

    def __init__(self, kernel=3, sobel=1.0, canny=1.0, colour=1.0):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise LossError(f"edge: the kernel's side is an odd number, not {kernel}")
        self.kernel, self.sobel, self.canny, self.colour = kernel, sobel, canny, colour

    @fp32
    def forward(self, sr, hr, mask=None):
        a, b = luma(sr), luma(hr)
        slope = magnitude(*sobel(b, self.kernel))
        near = F.max_pool2d((slope / 0.1).clamp(max=1), 3, 1, 1)
        near = near if mask is None else near * mask
        return (self.sobel * distance(magnitude(*sobel(a, self.kernel)), slope, mask)
                + self.canny * distance(soft_canny(a, self.kernel), soft_canny(b, self.kernel), mask)
                + self.colour * distance(sr, hr, near))


class Texture(nn.Module):
    """How rough the surface is, not where each grain lies: invented high-frequency noise costs, and so does smoothing
    away what paper and hair have. L1 between the root mean squares, in 7x7 windows 4 apart, of R, G and B under Laws'
    eight 3x3 texture filters (1980)."""

    @fp32
    def forward(self, sr, hr):
        return distance(self.roughness(sr), self.roughness(hr))

    def roughness(self, x):     # (B, 3, H, W) -> (3 B, 8, H/4, W/4)
        taps = torch.tensor([[1, 2, 1], [-2, 0, 2], [-1, 2, -1]], dtype=x.dtype, device=x.device) / 4
        bank = torch.einsum("iy,jx->ijyx", taps, taps).reshape(9, 1, 3, 3)[1:]      # level, edge, spot; no plain blur
        y = F.conv2d(F.pad(x, (1, 1, 1, 1), "replicate").flatten(0, 1)[:, None], bank)
        return (F.avg_pool2d(y * y, 7, 4, 3, count_include_pad=False) + 1e-6).sqrt()


class FrequencyLock(nn.Module):
    """Colour, blush and glow stay those of the LR picture: sr, shrunk to its size by area, and lr are blurred by a
    Gaussian of `sigma` LR pixels and compared by L1. Finer things, compression among them, are left to the other terms.

    forward(sr (B, 3, sH, sW), lr (B, 3, H, W)), s whole. Raises LossError where the sizes do not fit."""

    def __init__(self, sigma=1.5):
        super().__init__()
        self.sigma = sigma

    @fp32
    def forward(self, sr, lr):
        s = sr.shape[-1] // lr.shape[-1]
        if s < 1 or sr.shape != (*lr.shape[:2], s * lr.shape[2], s * lr.shape[3]):
            raise LossError(f"lock: SR {tuple(sr.shape)} is no whole multiple of LR {tuple(lr.shape)}")
        return distance(gaussian(F.avg_pool2d(sr, s), self.sigma), gaussian(lr, self.sigma))


@torch.no_grad()
@fp32
def detail_mask(hr, floor=0.25):
    """(B, 3, H, W) -> (B, 1, H, W) from `floor`, where hr is soft (bokeh, glow, gradients, flat colour), to 1 around
    sharp lines and texture. Weighs the edge and adversarial terms, which would put lines into what has none."""
    y = luma(hr)
    sharp = F.max_pool2d((y - gaussian(y, 1.0)).abs(), 13, 1, 6)
    return floor + (1 - floor) * gaussian(((sharp - 0.01) / 0.03).clamp(0, 1), 3.0)


# ----------------------------------------------------------------------------------------------------------------------
# weights files, and the perceptual loss


def read_tensors(path):
    """(dict of tensors, header) of a .safetensors file, or a .pth opened with weights_only=True. Raises LossError."""
    path, header = Path(path), {}
    if not path.is_file():
        raise LossError(f"no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                header = dict(json.loads((f.metadata() or {}).get("kabegami", "{}")))
                state = {k: f.get_tensor(k).clone() for k in f.keys()}     # or what overwrites the file changes the network
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:      # pickle's, safetensors' and zip's own errors: whatever a broken file sets off
        raise LossError(f"{path} cannot be read: cut short, or no plain weights file ({type(e).__name__})") from None
    for wrap in ("state_dict", "model", "params"):
        if isinstance(state, dict) and isinstance(state.get(wrap), dict):
            state = state[wrap]
    if not isinstance(state, dict) or not state or not all(torch.is_tensor(v) for v in state.values()):
        raise LossError(f"{path} holds no weights")
    state = {k.removeprefix("module."): v.float() if v.is_floating_point() else v for k, v in state.items()}
    return state, header


def fit(net, state, path, what):
    """Loads of state what net has, which must be all of it. net may be on the meta device. Raises LossError."""
    own = net.state_dict()
    for name in own:
        if name.endswith("num_batches_tracked"):    # unused in eval mode, absent from old files
            state.setdefault(name, torch.tensor(0))
    wrong = [f"no {k}" for k in own if k not in state]
    wrong += [f"{k} is {tuple(state[k].shape)}, not {tuple(v.shape)}" for k, v in own.items()
              if k in state and state[k].shape != v.shape]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise LossError(f"{path} does not hold {what}: {', '.join(wrong[:3])}{more}")
    net.load_state_dict({k: state[k] for k in own}, assign=True)
    return net.eval().requires_grad_(False)


def load_network(which, path):
    """"vgg": the convolutions of VGG19; "anime": ResNet50 without its head; an nn.Sequential either way. path: .pth or
    .safetensors with torchvision's names, for ResNet50 also RF5/danbooru-pretrained's numbers (body and head, or the
    body alone); "torchvision" has torchvision fetch VGG19. Raises LossError."""
    fetch = which == "vgg" and str(path) == "torchvision"
    if not fetch and not (path and Path(path).is_file()):
        raise LossError((f"no file {path}; " if path else "") + PERCEPTUAL[which]["absent"])
    try:
        from torchvision import models
    except ImportError:
        raise LossError("the perceptual loss needs torchvision: pip install torchvision") from None
    if fetch:
        try:
            state = models.VGG19_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as e:
            raise LossError(f"torchvision could not fetch VGG19 ({e}); get vgg19-dcbb9e9d.pth some other way and name "
                            "it with --vgg-weights FILE") from None
    else:
        state, _ = read_tensors(path)
    with torch.device("meta"):      # no memory, no time for weights that are replaced at once
        if which == "vgg":
            net = models.vgg19(weights=None).features[:35]
        else:
            net = nn.Sequential(*list(models.resnet50(weights=None).children())[:-2])
    if which == "vgg":
        state = {k.removeprefix("features."): v for k, v in state.items()}
    elif "0.0.weight" in state:
        state = {k[2:]: v for k, v in state.items() if k.startswith("0.")}
    else:
        for i, name in enumerate(("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")):
            state = {k.replace(name, str(i), 1) if k.split(".")[0] == name else k: v for k, v in state.items()}
    return fit(net, state, path, dict(vgg="VGG19", anime="ResNet50")[which])


class Perceptual(nn.Module):
    """Weighted L1 between features of sr and hr; networks, layers and weights in PERCEPTUAL. which: "vgg", "anime", or
    "twin", half of each (APISR, CVPR 2024). Pictures of 16 pixels a side or more. The networks are frozen and stay in
    eval mode. Raises LossError, for weights that are not there too: there are never random ones."""

    def __init__(self, which="vgg", vgg_weights=None, anime_weights=None):
        super().__init__()
        if which not in ("vgg", "anime", "twin"):
            raise LossError(f"perc: there are vgg, anime and twin, not '{which}'")
        files = dict(vgg=vgg_weights, anime=anime_weights)
        self.nets = nn.ModuleDict({n: load_network(n, files[n]) for n in files if which in (n, "twin")})
        for m in self.nets.modules():
            if isinstance(m, nn.ReLU):
                m.inplace = False           # in place it would overwrite the features taken before it

    def train(self, mode=True):
        return super().train(False)

    def features(self, name, x):
        """{layer: (B, C, h, w)} of one of the networks."""
        about, net, taken = PERCEPTUAL[name], self.nets[name], {}
        mean, std = (torch.tensor(about[k], dtype=x.dtype, device=x.device).view(1, 3, 1, 1) for k in ("mean", "std"))
        hooks = [net.get_submodule(layer).register_forward_hook(lambda m, i, y, layer=layer: taken.update({layer: y}))
                 for layer in about["layers"]]
        try:
            net((x - mean) / std)
        finally:
            for hook in hooks:
                hook.remove()
        return taken

    def forward(self, sr, hr):
        if min(sr.shape[-2:]) < 16:
            raise LossError(f"perc: pictures of 16 pixels a side or more are needed, not {sr.shape[-1]}x{sr.shape[-2]}")
        total = 0
        for name in self.nets:
            a = self.features(name, full(sr))
            with torch.no_grad():
                b = self.features(name, full(hr))
            total = total + sum(w * distance(full(a[k]), full(b[k])) for k, w in PERCEPTUAL[name]["layers"].items())
        return total / len(self.nets)


# ----------------------------------------------------------------------------------------------------------------------
# adversarial: discriminators and the two sides of the game


class UNetDiscriminator(nn.Module):
    """Real-ESRGAN's (Wang et al. 2021): (B, 3, H, W) -> logits (B, 1, H, W), an opinion for every pixel. 4,376,897
    parameters at 64 features. Any size from 8 pixels a side. Raises LossError below that.

    Spectral norm's power-iteration vectors are buffers and move only in train mode. Who averages a discriminator (EMA)
    averages its parameters() and copies its buffers(): unit vectors, averaged, are none any more."""

    def __init__(self, features=64):
        super().__init__()
        f = features
        self.conv0 = nn.Conv2d(3, f, 3, 1, 1)
        sizes = [(f, 2 * f), (2 * f, 4 * f), (4 * f, 8 * f)]
        self.down = nn.ModuleList(spectral_norm(nn.Conv2d(i, o, 4, 2, 1, bias=False)) for i, o in sizes)
        self.up = nn.ModuleList(spectral_norm(nn.Conv2d(o, i, 3, 1, 1, bias=False)) for i, o in sizes[::-1])
        self.last = nn.ModuleList(spectral_norm(nn.Conv2d(f, f, 3, 1, 1, bias=False)) for _ in range(2))
        self.conv9 = nn.Conv2d(f, 1, 3, 1, 1)

    def forward(self, x):
        if min(x.shape[-2:]) < 8:
            raise LossError(f"adv: the discriminator needs 8 pixels a side or more, not {x.shape[-1]}x{x.shape[-2]}")
        with torch.autocast(x.device.type, enabled=False):      # the power iteration too needs its float32
            down, up, last = ([c.weight for c in convs] for convs in (self.down, self.up, self.last))
        x = F.leaky_relu(self.conv0(x), 0.2)
        skips = []
        for weight in down:
            skips.append(x)
            x = F.leaky_relu(F.conv2d(x, weight, stride=2, padding=1), 0.2)
        for weight in up:
            skip = skips.pop()      # for sides that are no multiple of 8 the skip, not a factor 2, says how large
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = F.leaky_relu(F.conv2d(x, weight, padding=1), 0.2) + skip
        for weight in last:
            x = F.leaky_relu(F.conv2d(x, weight, padding=1), 0.2)
        return self.conv9(x)


class MultiScaleDiscriminator(nn.Module):
    """A UNetDiscriminator each for the picture at 1, 1/2 and 1/4 (by area): a list of logits (B, 1, H, W), (B, 1, H/2,
    W/2), (B, 1, H/4, W/4). From 32 pixels a side. Raises LossError below that."""

    def __init__(self, features=64):
        super().__init__()
        self.scales = nn.ModuleList(UNetDiscriminator(features) for _ in range(3))

    def forward(self, x):
        if min(x.shape[-2:]) < 32:
            raise LossError(f"adv: the multi-scale discriminator needs 32 pixels a side or more, "
                            f"not {x.shape[-1]}x{x.shape[-2]}")
        return [d(F.avg_pool2d(x, 2 ** i) if i else x) for i, d in enumerate(self.scales)]


def opinions(d, x):
    """The logits of either discriminator, a list of float32 tensors."""
    out = d(full(x))
    return [full(y) for y in (out if isinstance(out, list) else [out])]


@contextlib.contextmanager
def frozen(d):
    """No gradient for d's parameters, no step of spectral norm's power iteration: d comes out as it went in."""
    training, learning = d.training, [p for p in d.parameters() if p.requires_grad]
    try:
        yield d.eval().requires_grad_(False)
    finally:
        d.train(training)
        for p in learning:
            p.requires_grad_(True)


def generator_loss(d, sr, hr, kind="ragan", mask=None):
    """The adversarial term for G; its gradient reaches sr and leaves d alone (pass the module, not its DDP wrapper).
    C(f) and C(r) are d's logits of sr and hr, BCE is with logits; the mean over d's scales.
    ragan (Jolicoeur-Martineau 2018): 1/2 [BCE(C(r) - mean C(f), 0) + BCE(C(f) - mean C(r), 1)]; vanilla: BCE(C(f), 1);
    lsgan: (C(f) - 1)^2; hinge: -C(f). mask (B, 1, H, W) weighs places, see detail_mask. Raises LossError."""
    if kind not in GANS:
        raise LossError(f"adv: there are {', '.join(GANS)}, not '{kind}'")
    with frozen(d):
        fake = opinions(d, sr)
        with torch.no_grad():
            real = opinions(d, hr) if kind == "ragan" else fake
    total = 0
    for f, r in zip(fake, real):
        if kind == "ragan":         # BCE(x, 0) = softplus(x), BCE(x, 1) = softplus(-x)
            loss = (F.softplus(r - f.mean()) + F.softplus(r.mean() - f)) / 2
        else:
            loss = {"vanilla": F.softplus(-f), "lsgan": (f - 1) ** 2, "hinge": -f}[kind]
        if mask is not None:
            loss = loss * F.interpolate(full(mask), size=f.shape[-2:], mode="area")
        total = total + loss.mean()
    return total / len(fake)


def discriminator_loss(d, sr, hr, kind="ragan", r1=0.0):
    """(loss for D's step, dict of figures); sr is detached, so G's graph stays as it is. d in train mode.
    ragan: 1/2 BCE(C(r) - mean C(f), 1) + 1/2 BCE(C(f) - mean C(r), 0), the means detached; vanilla: 1/2 BCE(C(r), 1) +
    1/2 BCE(C(f), 0); lsgan: 1/2 (C(r) - 1)^2 + 1/2 C(f)^2; hinge: 1/2 relu(1 - C(r)) + 1/2 relu(1 + C(f)).
    r1: weight of the gradient penalty on real pictures (Mescheder et al. 2018), the mean over values of
    1/2 (d sum C(r) / d hr)^2, so that size does not matter. Figures (detached tensors): d_real and d_fake, the mean
    logits; d_acc, the share of logits on the right side; d_r1. Raises LossError."""
    if kind not in GANS:
        raise LossError(f"adv: there are {', '.join(GANS)}, not '{kind}'")
    sr, hr = full(sr.detach()), full(hr.detach())
    both = opinions(d, torch.cat([hr, sr]))
    total, figures = 0, []
    for r, f in (y.chunk(2) for y in both):
        x, y = (r - f.mean().detach(), f - r.mean().detach()) if kind == "ragan" else (r, f)
        if kind == "lsgan":
            real, fake, edge = (x - 1) ** 2, y ** 2, 0.5
        elif kind == "hinge":
            real, fake, edge = F.relu(1 - x), F.relu(1 + y), 0
        else:
            real, fake, edge = F.softplus(-x), F.softplus(y), 0
        total = total + (real.mean() + fake.mean()) / 2
        right = ((x > edge).float().mean() + (y < edge).float().mean()) / 2
        figures.append(torch.stack([r.mean(), f.mean(), right]).detach())
    total = total / len(both)
    report = dict(zip(("d_real", "d_fake", "d_acc"), torch.stack(figures).mean(0)))
    if r1:
        hr.requires_grad_(True)
        with torch.autocast(hr.device.type, enabled=False):
            slope, = torch.autograd.grad(sum(y.sum() for y in opinions(d, hr)), hr, create_graph=True)
        penalty = slope.square().mean() / 2
        total, report["d_r1"] = total + r1 * penalty, penalty.detach()
    return total, report


# ----------------------------------------------------------------------------------------------------------------------
# the artifact detector


class ArtifactDetector(nn.Module):
    """(B, 3, H, W), any size -> logits (B, 8), one for each of CLASSES. 689,352 parameters.

    It sees the steps of R, G and B to the right and down, in 8-bit levels through asinh, which makes a step of one
    level (banding) visible beside a line; no colour, which would say what is drawn rather than how. Two by two pixels
    lie in channels from the start: nothing is thrown away, and no layer pays for the full resolution. The last of
    `stages` looks 79 pixels wide. `lines` looks along the means of those steps, and of the first stage's features, over
    whole rows and whole columns, where seams and the grids of codecs stand out however faint they are; some 50 pixels wide.
    The head gets the mean, the deviation and the log-mean-exp (a fault may be rare) of every feature."""

    def __init__(self, width=32):
        super().__init__()
        w, v, u = 3 * width // 2, 2 * width, 4 * width

        def conv(i, o, stride=1, dilation=1):
            return nn.Sequential(nn.Conv2d(i, o, 3, stride, dilation, dilation, bias=False), nn.BatchNorm2d(o),
                                 nn.LeakyReLU(0.1))
        self.stages = nn.ModuleList([
            nn.Sequential(conv(24, w), conv(w, w)),
            nn.Sequential(conv(w, v, stride=2), conv(v, v)),
            nn.Sequential(conv(v, u, stride=2), conv(u, u), conv(u, u, dilation=2))])
        self.lines = nn.ModuleList([nn.Sequential(
            nn.Conv1d(12 + w, w, 9, 1, 4, bias=False), nn.BatchNorm1d(w), nn.LeakyReLU(0.1),
            nn.Conv1d(w, w, 9, 1, 8, 2, bias=False), nn.BatchNorm1d(w), nn.LeakyReLU(0.1)) for _ in range(2)])
        n = 3 * (w + v + u + w + w)
        self.head = nn.Sequential(nn.BatchNorm2d(n, affine=False), nn.Conv2d(n, u, 1), nn.LeakyReLU(0.1),
                                  nn.Conv2d(u, len(CLASSES), 1))

    def forward(self, x, everything=False):
        """everything=True: also the map (B, 8, H/8, W/8) of what the head says of the 65 pixels around each place, and
        a list of the features of the three stages, of H/2, H/4 and H/8."""
        x = full(x)
        p = F.pad(x, (0, 1 + x.shape[3] % 2, 0, 1 + x.shape[2] % 2), "replicate")       # an even side and one more
        x = p[..., :-1, :-1]
        right, down = (torch.asinh(255 * (z - x)) / 4 for z in (p[..., :-1, 1:], p[..., 1:, :-1]))
        y, features = F.pixel_unshuffle(torch.cat([right, down], 1), 2), []
        y = y.contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            y = stage(y)
            features.append(y)
        with torch.autocast(x.device.type, enabled=False):
            def profile(line, steps, k):
                z = torch.cat([steps.abs().mean(k), steps.mean(k)], 1)
                z = z.unflatten(2, (-1, 2)).transpose(2, 3).flatten(1, 2)       # two by two here as well
                return line(torch.cat([z, full(features[0]).mean(k)], 1)).unsqueeze(k)
            rows, columns = profile(self.lines[0], down, 3), profile(self.lines[1], right, 2)
            looked_at = *map(full, features), rows, columns

            def told(windows):
                found = [figures(moments(z, sharp, n), sharp) for z, sharp, n in zip(looked_at, (4, 4, 4, 16, 16), windows)]
                h, w = found[0].shape[2:]
                return self.head(torch.cat([f.expand(-1, -1, h, w) for f in found], 1))
            logits = told([None] * 5)[..., 0, 0]
            if not everything:
                return logits
            return logits, told([(4, 4), (2, 2), (1, 1), (4, 0), (0, 4)]), features


def moments(x, sharp, stride=None):
    """(B, C, H, W) -> (B, 3 C, h, w): means of x, its square and exp(sharp * x), of everything or, with strides (y, x),
    of windows that reach 4 strides to each side."""
    z = torch.cat([x, x * x, (sharp * x).clamp(max=60).exp()], 1)
    if stride is None:
        return z.mean((2, 3), keepdim=True)
    reach = [4 * n for n in stride]
    return F.avg_pool2d(z, [2 * n + 1 for n in reach], [max(n, 1) for n in stride], reach, count_include_pad=False)


def figures(m, sharp):
    """What moments found -> mean, deviation and log-mean-exp, as many channels."""
    mean, square, peak = m.chunk(3, 1)
    return torch.cat([mean, (square - mean * mean).clamp_min(1e-4).sqrt(), (peak + 1e-30).log() / sharp], 1)


def dirt(logits):
    """Logits (B, 8) -> (B): the log odds that a picture is not clean; art_cls is the mean softplus of it."""
    return logits[:, 1:].logsumexp(1) - logits[:, 0]


def artifact_losses(detector, sr, hr):
    """(art_cls, art_feat): cross-entropy of sr towards clean; L1 between features of sr and hr, mean over stages."""
    logits, _, a = detector(sr, everything=True)
    with torch.no_grad():
        _, _, b = detector(hr, everything=True)
    clean = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, clean), sum(distance(full(x), full(y)) for x, y in zip(a, b)) / len(a)


def no_harder(value, x, sr, most):
    """A value computed from x, a detached copy of sr (B, ...), as one whose gradient reaches sr: picture by picture it
    keeps its direction, and is shortened where it is longer than most (B,)."""
    g, = torch.autograd.grad(value, x, retain_graph=True)
    length = g.flatten(1).norm(dim=1).clamp_min(torch.finfo(g.dtype).tiny)
    g = g * (most / length).clamp(max=1).view(-1, 1, 1, 1)
    return value.detach() + (g * (full(sr) - full(sr.detach()))).sum()


def save_detector(detector, path, header=None):
    """One .safetensors, whole or not at all, classes and `header` as JSON in its metadata. Raises OSError."""
    state = {k: v.detach().cpu().contiguous() for k, v in detector.state_dict().items()}
    about = json.dumps({"kind": "detector", "classes": CLASSES, **(header or {})})
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        tmp.write_bytes(to_safetensors(state, {"kabegami": about}))
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def load_detector(path=None, device="cpu"):
    """The detector of a file (weights/detector.safetensors beside this one), frozen, in eval mode. Raises LossError."""
    path = Path(path or Path(__file__).parent / "weights" / "detector.safetensors")
    if not path.is_file():
        raise LossError(f"no detector {path}: name one with --detector FILE, or train one: "
                        "python train.py --detector --data DIR")
    state, header = read_tensors(path)
    last = state.get("stages.2.2.0.weight", torch.zeros(0))
    if last.ndim != 4 or header.get("classes") != list(CLASSES):
        raise LossError(f"{path} holds no artifact detector that tells {', '.join(CLASSES)}")
    with torch.device("meta"):
        net = ArtifactDetector(len(last) // 4)
    net = fit(net, state, path, "an artifact detector").to(device)
    net.header = header
    return net


# ----------------------------------------------------------------------------------------------------------------------
# the sum


def parse_weights(text):
    """'pix=1,freq=0.3,edge' -> dict(pix=1.0, freq=0.3, edge=1.0). A name alone gets its weight of WEIGHTS, a weight of
    0 leaves its term out. Raises LossError."""
    found = {}
    for part in filter(None, (s.strip() for s in text.split(","))):
        name, given, value = (s.strip() for s in part.partition("="))
        if name not in WEIGHTS:
            raise LossError(f"no loss '{name}'; there are {', '.join(WEIGHTS)}")
        if name in found:
            raise LossError(f"loss '{name}' is given twice in '{text}'")
        try:
            found[name] = float(value) if given else WEIGHTS[name]
        except ValueError:
            found[name] = -1.0
        if not 0 <= found[name] < math.inf:
            raise LossError(f"'{part}': a weight is a number of 0 or more, as in {name}={WEIGHTS[name]}")
    found = {name: weight for name, weight in found.items() if weight}
    if not found:
        raise LossError(f"'{text}' leaves no loss; there are {', '.join(WEIGHTS)}")
    return found


class SRLoss(nn.Module):
    """The weighted sum of named terms: SRLoss("pix=1,freq=0.3,edge")(sr, hr, lr) -> (total, {name: value}), the values
    without their weights, detached.

    pix is Charbonnier with eps and rmse, luma the same on luma alone: where a line is weighs more than its colour. highpass is
    Laplacian's, edge_kernel Edge's; perceptual, vgg_weights and anime_weights are Perceptual's; detector is a file for
    load_detector, gan one of GANS. mask=True lowers edge and adversarial weight where hr is soft. Nothing in it learns.
    Raises LossError, also where a term is not finite.

    A detector that is sure of itself has gradients thousands of times those of pix. So those of art_cls and art_feat are
    cut, picture by picture and before their weights, to the length of pix's: they tip the balance, and leave alone a
    picture that equals hr."""

    def __init__(self, weights="pix", eps=1e-3, highpass=False, edge_kernel=3, perceptual="vgg", vgg_weights=None,
                 anime_weights=None, detector=None, gan="ragan", mask=False, rmse=False):
        super().__init__()
        self.weights, self.gan, self.mask = parse_weights(weights), gan, mask
        if gan not in GANS:
            raise LossError(f"adv: there are {', '.join(GANS)}, not '{gan}'")
        self.pix, self.freq, self.edge = Charbonnier(eps, rmse), Laplacian(highpass=highpass), Edge(edge_kernel)
        self.texture, self.lock = Texture(), FrequencyLock()
        if "perc" in self.weights:
            self.perc = Perceptual(perceptual, vgg_weights, anime_weights)
        if "art_cls" in self.weights or "art_feat" in self.weights:
            self.detector = load_detector(detector)

    def train(self, mode=True):
        return super().train(False)

    def terms(self, sr, hr, lr=None, d=None, real=None):
        """{name: value with its graph}; arguments as forward's."""
        if sr.shape != hr.shape or sr.ndim != 4 or sr.shape[1] != 3:
            raise LossError(f"SR and HR need one shape, (B, 3, H, W), not {tuple(sr.shape)} and {tuple(hr.shape)}")
        if "lock" in self.weights and lr is None or "adv" in self.weights and d is None:
            raise LossError("lock needs the LR picture, adv a discriminator: loss(sr, hr, lr, d)")
        real = hr if real is None else real
        mask = detail_mask(real) if self.mask else None
        run = dict(pix=lambda: self.pix(sr, hr), freq=lambda: self.freq(sr, hr), edge=lambda: self.edge(sr, hr, mask),
                   texture=lambda: self.texture(sr, hr), lock=lambda: self.lock(sr, lr), perc=lambda: self.perc(sr, hr),
                   adv=lambda: generator_loss(d, sr, real, self.gan, mask),
                   luma=lambda: self.pix(luma(full(sr)), luma(full(hr))))
        found = {name: run[name]() for name in self.weights if name in run}
        if hasattr(self, "detector"):
            x = full(sr.detach()).requires_grad_(True)
            with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):     # in fp16 its gradients come to nothing
                both = dict(zip(("art_cls", "art_feat"), artifact_losses(self.detector, x, hr)))
                most = torch.autograd.grad(self.pix(x, hr), x)[0].flatten(1).norm(dim=1)
            found.update({name: no_harder(value, x, sr, most) for name, value in both.items() if name in self.weights})
        return found

    def forward(self, sr, hr, lr=None, d=None, real=None):
        """lr: for `lock`. d: the discriminator, for `adv`; not a part of this module, train.py owns it and its step is
        discriminator_loss. real: what d takes for real where hr is a sharpened target (hr itself otherwise)."""
        values = self.terms(sr, hr, lr, d, real)
        total = sum(self.weights[name] * value for name, value in values.items())
        if not torch.isfinite(total):
            bad = [name for name, value in values.items() if not torch.isfinite(value)]
            whose = "though the prediction is" if sr.isfinite().all() else "the prediction itself is not"
            raise LossError(f"not finite: {', '.join(bad) or 'the sum'}; {whose}")
        return total, {name: value.detach() for name, value in values.items()}

    def gradient_norms(self, sr, hr, lr=None, d=None, real=None):
        """{name: norm of weight times gradient at sr}, floats: how hard each term pulls. Arguments as forward's; the
        graph behind sr is left alone."""
        sr = sr.detach().requires_grad_(True)
        with torch.enable_grad():
            values = self.terms(sr, hr, lr, d, real)
            return {name: self.weights[name] * torch.autograd.grad(value, sr, retain_graph=True)[0].norm().item()
                    for name, value in values.items()}


# ----------------------------------------------------------------------------------------------------------------------
# line-enhanced targets


def usm(x):
    """Unsharp masking as Real-ESRGAN does it: Gaussian of 51 taps and sigma 8, half of the residual added where it is
    over 10/255, that mask blurred likewise."""
    rest = x - gaussian(x, 8.0, 25)
    soft = gaussian((rest.abs() * 255 > 10).to(x.dtype), 8.0, 25)
    return soft * (x + 0.5 * rest).clamp(0, 1) + (1 - soft) * x


def drop_small(mask, least=32):
    """(B, 1, H, W) of 0 and 1 -> the same without 8-connected components of fewer than `least` pixels.

    Every pixel takes the largest number within least - 1 steps inside its component. A small component is then one
    number through and through; a number that borders on another is a part of something larger. Exact for any shape."""
    b, _, h, w = mask.shape
    number = torch.arange(1, h * w + 1, device=mask.device, dtype=torch.float32 if h * w < 2 ** 24 else torch.float64)
    label = number.view(1, 1, h, w) * mask
    for _ in range(least - 1):
        label = F.max_pool2d(label, 3, 1, 1) * mask
    lowest = -F.max_pool2d(torch.where(mask > 0, -label, -torch.inf), 3, 1, 1)
    parted = (F.max_pool2d(label, 3, 1, 1) != label) | (lowest != label)
    index = label.long().flatten(1)
    count = torch.zeros(b, h * w + 1, device=mask.device).scatter_add_(1, index, torch.ones_like(index).float())
    larger = torch.zeros_like(count).scatter_add_(1, index, parted.flatten(1).float())
    keep = (count >= least) | (larger > 0)
    return mask * keep.gather(1, index).view_as(mask)


@torch.no_grad()
@fp32
def enhance_lines(hr):
    """(B, 3, H, W) in [0, 1] -> the same with its drawn lines sharpened, a target for training (APISR, CVPR 2024): usm
    three times on lines, once elsewhere. Lines: XDoG (Winnemoeller 2011) of the thrice sharpened luma (sigma 0.6,
    k 2.5, gamma 0.98, eps -15/255; phi so large that it is a threshold), without specks, widened where 3 of 8
    neighbours are lines. XDoG is relative to the strongest response, so give it whole pictures rather than patches."""
    once = usm(hr)
    thrice = usm(usm(once))
    y = luma(thrice)
    dog = gaussian(y, 0.6, 2) - 0.98 * gaussian(y, 1.5, 5)
    lines = (dog / dog.amax((1, 2, 3), keepdim=True).clamp_min(1 / 255) < -15 / 255).to(y.dtype)
    lines = drop_small(lines)
    beside = F.avg_pool2d(lines, 3, 1, 1) * 9 - lines
    lines = torch.maximum(lines, (beside > 2.5).to(y.dtype))
    return lines * thrice + (1 - lines) * once


# ----------------------------------------------------------------------------------------------------------------------
# the command


@torch.inference_mode()
def inspect(detector, rgb, patch=128, progress=None):
    """(3, H, W) -> probabilities (N, 8) of its N patches, their corners [(y, x)], heat (H, W): 1 - P(clean)."""
    h, w = rgb.shape[1:]
    ys, xs = (sorted({*range(0, max(n - patch, 0), patch), max(n - patch, 0)}) for n in (h, w))
    corners, found, heat = [(y, x) for y in ys for x in xs], [], torch.zeros(h, w)
    device = next(detector.parameters()).device
    for i in range(0, len(corners), 16):
        x = torch.stack([rgb[:, y:y + patch, x:x + patch] for y, x in corners[i:i + 16]]).to(device)
        logits, places, _ = detector(x, everything=True)
        found.append(logits.softmax(1).cpu())
        dirt = 1 - places.softmax(1)[:, :1]
        dirt = F.interpolate(dirt, size=x.shape[-2:], mode="bilinear", align_corners=False)[:, 0].cpu()
        for (y, x), d in zip(corners[i:i + 16], dirt):
            heat[y:y + patch, x:x + patch] = d
        if progress:
            progress(min(i + 16, len(corners)), len(corners))
    return torch.cat(found), corners, heat


def main():
    if hasattr(sys.stdout, "reconfigure"):      # a log in cp1252, a name in Japanese
        sys.stdout.reconfigure(errors="backslashreplace")
    p = argparse.ArgumentParser(description="Which artifacts are in a picture; writes a heat map of where.",
                                epilog="example: python losses.py picture.png --out where.png")
    p.add_argument("picture", metavar="PICTURE", help="the picture to look at; it is not changed")
    p.add_argument("--detector", metavar="FILE", help="its weights (default: weights/detector.safetensors)")
    p.add_argument("-o", "--out", type=Path, help="the heat map (default: PICTURE-artifacts.png, in this folder)")
    p.add_argument("--overwrite", action="store_true", help="replace the heat map if it is there")
    p.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")
    args = p.parse_args()
    try:
        detector = load_detector(args.detector)
        import images
        import tile
        out = args.out or Path(Path(args.picture).stem + "-artifacts.png")
        if out.exists() and not args.overwrite:
            raise LossError(f"{images.printable(out)} is there already; --overwrite replaces it")
        if out.exists() and out.samefile(args.picture):
            raise LossError(f"{images.printable(out)} is the picture itself; choose another --out")
        if not out.parent.is_dir():
            raise LossError(f"{images.printable(out)}: no folder {images.printable(out.parent)}")
        if out.suffix.lower() not in images.WRITE_FORMATS:
            raise LossError(f"{images.printable(out)}: cannot save so; use one of {' '.join(images.WRITE_FORMATS)}")
        rgb = images.composite(images.read_picture(args.picture), 1.0)
        name, (h, w) = images.printable(args.picture), rgb.shape[1:]
        found, corners, heat = inspect(detector.to(args.device), rgb, progress=tile.Progress(name, h * w))
        images.ProgressLine.clear()
        print(f"{name}: {w}x{h}, {len(corners)} patch{'es' if len(corners) > 1 else ''}")
        for i, kind in enumerate(CLASSES):
            share, (worst, at) = (found.argmax(1) == i).float().mean().item(), found[:, i].max(0)
            y, x = corners[at]
            print(f"{kind:<10}{share:6.0%} of the patches; at most {worst:.2f}, at x {x}, y {y}")
        grey = luma(rgb[None])[0] * 0.8
        red = torch.tensor([1.0, 0.1, 0.1]).view(3, 1, 1)
        images.save_picture(out, images.Picture(rgb=grey + heat * 0.8 * (red - grey)))
        print(f"where: {images.printable(out)}")
    except ModuleNotFoundError as e:
        print(f"error: {e}; the command needs tile.py beside losses.py", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, AssertionError) as e:        # the last two: a device that is not there
        print(f"error: {str(e).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
