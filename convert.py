"""convert.py: weights files in and out.

    python convert.py runs/mine/best.safetensors              # what is in a weights file
    python convert.py runs/mine/best.safetensors hat.pth      # the plain HAT in it, in the official format

Also, as functions: which file to use when none is named, and for which picture; models of other kinds (with the package
spandrel); two models blended into one. Needs model.py and its packages.
"""
import argparse
import io
import json
import math
import sys
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from model import PRESETS, HATRefiner, WeightsError, fit, load, read_weights, sizes, write_atomic


def find_weights():
    """The weights to use when none are named: shipped ones beside this file (`web-low` first), otherwise the newest
    run's best. Raises WeightsError."""
    shipped = sorted((p for p in Path(__file__).parent.glob("weights/*-*.safetensors") if p.stem.split("-")[-1] in PRESETS),
                     key=lambda p: (p.stem != "web-low", p.name))
    runs = sorted(Path("runs").glob("*/best.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True)
    if not shipped + runs:
        raise WeightsError("no weights in weights/ and no run in runs/; name some with --weights, or train some: "
                           "python train.py --stage 1 --patch 64")
    return (shipped + runs)[0]


def find_sharp(path):
    """Beside web-* weights the clean-* ones, which enlarge undamaged pictures better, or None."""
    path = Path(path)
    sharp = path.with_name(path.name.replace("web-", "clean-", 1))
    return sharp if sharp != path and sharp.exists() else None


def jpeg_grid(x):
    """Whether windows (n, 3, h, w), [0, 1], out of one picture and whole multiples of 8 apart, were JPEG once and have not
    been resized since.

    JPEG rounds the DCT of 8x8 blocks to multiples of a step, which empties the range just above zero (Fan and de Queiroz
    2003). Of the coefficients above 1.2 levels, those below 2.6 are counted for each of the 64 places where the blocks may
    lie; the least share over the median one was 0.81 and more on 54 reduced drawings of the training set, and at most 0.53,
    at higher or at middle frequencies, after JPEG of 85 to 97. On 54 others JPEG of 75 to 98 was found in all, blurred
    before or not, cut or not; none without it was taken for JPEG, nor after WebP, but two drawings as they came."""
    k = torch.arange(8, device=x.device)
    dct = torch.cos((2 * k + 1) * k[:, None] * (math.pi / 16)) / 2
    dct[0] /= math.sqrt(2)
    waves = (dct[:, None, :, None] * dct[None, :, None, :]).flatten(0, 1)[:, None]     # 64 of 8x8
    order = (k[:, None] + k).flatten()
    y = 255 * (0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:])
    clipped = F.max_pool2d(((x < 1 / 255) | (x > 254 / 255)).float().amax(1, keepdim=True), 8, 1) > 0
    for band in (order > 4) & (order < 8), order > 7:
        found = F.conv2d(y, waves[band]).abs().masked_fill(clipped, 0)
        some, low = (torch.stack([m[:, :, i::8, j::8].float().sum() for i in range(8) for j in range(8)])
                     for m in (found > 1.2, (found > 1.2) & (found < 2.6)))
        share = low / some.clamp_min(1)
        if some.median() >= 50 and share.min() < 0.67 * share.median():
            return True
    return False


@torch.inference_mode()
def undamaged(repairing, plain, rgb, least=(56.0, 62.0), most=1.5):
    """Whether a model that also repairs, as web-low does, finds nothing to repair in rgb (3, H, W), [0, 1], on the CPU;
    plain is one that does not, as clean-low.

    What the first makes of four windows, out of the busiest quarter, is reduced again (bicubic, antialiased) and
    held against them. r is the mean square of what differs, d that of their detail, each pixel less the mean of 3x3;
    told apart by the median of d / r^2 in dB, against least: without and with the traces of JPEG. What passes is
    enlarged by plain too: the first model's detail may have most dB more, in the median, or it takes away a blur. On
    32 drawings of the training set these were 61.5 to 80.9 when they were reduced by bicubic, 63.0 to 77.9 by Lanczos, but for
    a soft painting (50.0, 55.8); the second was up to 1.3 dB but for two (3.6 and 1.6), so 61 of the 64 pass. As JPEG of
    quality 85 to 95 all had its traces and at most 57.0. Of 64 blurred ones (sigma 0.3 to 0.9) nine pass, none with sigma
    above 0.43, of 32 WebP of 80 to 95 three. On crops of 17 of them plain brings undamaged ones 1.7 dB. least stands some 6
    below what undamaged ones give, as both models have learned from those. What has less than 32 pixels a side counts as
    damaged."""
    side, device = min(96, *rgb.shape[1:]) // 16 * 16, next(repairing.parameters()).device
    if side < 32:
        return False

    def detail(x):
        return (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)).square().mean(1, keepdim=True)
    cells = [(d, y, side * i) for y in range(0, rgb.shape[1] - side + 1, side)
             for i, d in enumerate(F.avg_pool2d(detail(rgb[None, :, y:y + side]), side).flatten().tolist())]
    cells.sort(reverse=True)
    some = sorted({k * len(cells) // 12 for k in range(4)})
    x = torch.stack([rgb[:, y:y + side, i:i + side] for _, y, i in (cells[k] for k in some)])

    def enlarged(network):      # brought to the CPU: older versions have no antialiased bicubic for Apple's GPUs
        return network(x.to(device)).float().clamp(0, 1).cpu()
    fixed = enlarged(repairing)
    again = F.interpolate(fixed, size=side, mode="bicubic", antialias=True)
    r = (again - x)[..., 4:-4, 4:-4].square().mean((1, 2, 3)).clamp_min(1e-7)
    if 10 * median(torch.log10(detail(x).mean((1, 2, 3)) / r ** 2).tolist()) <= least[jpeg_grid(x)]:
        return False
    finer = detail(fixed).mean((1, 2, 3)) / detail(enlarged(plain)).mean((1, 2, 3)).clamp_min(1e-9)
    return 10 * median(torch.log10(finer).tolist()) < most


class Foreign:
    """A network that spandrel loaded, as tile.py wants one: .scale, (b, 3, h, w) -> (b, 3, h * scale,
    w * scale) within [0, 1]. Spandrel pads to the sizes that the network can take."""

    def __init__(self, found):
        self.found, self.scale = found, found.scale

    def __call__(self, x):
        x = x.flatten(0, 1)[:, None] if self.found.input_channels == 1 else x   # a grey one sees R, G, B one by one
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind)
        takes = {torch.float16: self.found.supports_half, torch.bfloat16: self.found.supports_bfloat16}
        with torch.autocast(kind, dtype, enabled=torch.is_autocast_enabled(kind) and takes.get(dtype, False)):
            y = torch.cat([self.found(one) for one in x.split(1)])              # it promises to take one at a time only
        return y.view(-1, 3, *y.shape[-2:])


def load_any(path, device="cpu"):
    """A weights file -> a network in eval mode: our HATRefiner (official HAT files too), or a Foreign of any other
    super-resolution architecture that the package spandrel knows, if it is installed (ESRGAN, Real-ESRGAN, SwinIR, DAT,
    GRL, Real-CUGAN and more). Files are .safetensors, or pickles that hold nothing but plain weights. Raises
    ValueError, one line."""
    try:
        return load(path, device)
    except WeightsError as e:
        ours = e
    try:
        path = Path(path)
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception:               # not to be read at all, and our own line says why
        raise ours from None
    try:
        import spandrel
    except ImportError:
        raise ValueError(f"{ours}; if it is a model of another kind: pip install spandrel") from None
    try:
        found = spandrel.ModelLoader().load_from_state_dict(spandrel.canonicalize_state_dict(state))
    except spandrel.UnsupportedModelError:
        raise ValueError(f"{ours}; and spandrel {spandrel.__version__} does not know it either") from None
    except Exception as e:          # it guesses sizes by names and shapes, and whatever may come of that
        said = (str(e).splitlines() or [""])[0]
        raise ValueError(f"{path}: spandrel cannot load it ({type(e).__name__}: {said})") from None
    kind, channels = found.architecture.name, (found.input_channels, found.output_channels)
    if found.scale < 2:
        raise ValueError(f"{path}: this {kind} model does not enlarge (1x); give one that does")
    if channels not in ((3, 3), (1, 1)):
        raise ValueError(f"{path}: this {kind} model makes {channels[1]} channels of {channels[0]}; it must be 3 of 3, "
                         "or 1 of 1")
    return Foreign(found.eval().to(torch.device(device)))


def blend(files, alphas):
    """[file a, file b] -> {alpha: HATRefiner in eval mode} with the weights (1 - alpha) * a + alpha * b; 0 and 1 are a
    and b to the bit. Their headers hold what they were made of. Raises ValueError that names the first difference if
    they are not the same network."""
    (a, about_a), (b, about_b) = map(read_weights, files)
    load(files[0])                      # says so if it is none of ours
    for key in [*a, *sorted(b.keys() - a)]:
        if key not in a or key not in b:
            what = f"is in {files[0] if key in a else files[1]} only"
        elif a[key].shape != b[key].shape:
            what = f"is {tuple(a[key].shape)} and {tuple(b[key].shape)}"
        elif not a[key].is_floating_point() and not a[key].equal(b[key]):
            what = "holds other numbers"
        else:
            continue
        raise ValueError(f"{files[0]} and {files[1]} are not the same network: {key} {what}")
    made = {}
    for alpha in alphas:
        state = {k: x if alpha == 0 or not x.is_floating_point() else b[k] if alpha == 1 else x.lerp(b[k], alpha)
                 for k, x in a.items()}
        made[alpha] = network = HATRefiner(**sizes(state)).eval()
        fit(network, state, files[0])
        network.refine = bool(network.out_conv.weight.any() or network.out_conv.bias.any())
        network.header = {k: about_a[k] for k in ("recipe", "data", "licence")
                          if k in about_a and about_b.get(k) == about_a[k]}
        network.header["blend"] = [dict(file=Path(f).name, share=share, header=about) for f, share, about in
                                   zip(files, (1 - alpha, alpha), (about_a, about_b))]
    return made


def export_hat(model, path):
    """Writes the plain HAT (without the refiner) under its official names, .safetensors or .pth (`params_ema`), for
    spandrel, chaiNNer, ComfyUI and HAT's own code."""
    state, buffer = {k: v.detach().cpu().contiguous() for k, v in model.hat_model.state_dict().items()}, io.BytesIO()
    if Path(path).suffix == ".safetensors":
        buffer.write(to_safetensors(state))
    else:
        torch.save({"params_ema": state}, buffer)
    write_atomic(path, buffer.getvalue())


def main():
    if hasattr(sys.stdout, "reconfigure"):      # a log in cp1252, a name in Japanese
        sys.stdout.reconfigure(errors="backslashreplace")
    p = argparse.ArgumentParser(description="Says what is in a weights file; with OUT, exports its plain HAT.",
                                epilog="example: python convert.py runs/mine/best.safetensors hat.pth")
    p.add_argument("weights", metavar="FILE", help="one of our .safetensors, or an official .pth")
    p.add_argument("out", nargs="?", type=Path, help=".pth or .safetensors to write the plain HAT to")
    p.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    args = p.parse_args()
    try:
        model = load(args.weights)
        if args.out and args.out.suffix not in (".pth", ".safetensors"):
            raise WeightsError(f"{args.out}: give a name that ends in .pth or .safetensors")
        if args.out and args.out.resolve() == Path(args.weights).resolve():
            raise WeightsError(f"{args.out} is the file itself, which would lose its refiner; choose another name")
        if args.out and args.out.exists() and not args.overwrite:
            raise WeightsError(f"{args.out} is there already; --overwrite replaces it")
        every, hat = (sum(x.numel() for x in part.parameters()) for part in (model, model.hat_model))
        print(json.dumps(model.header, indent=1, ensure_ascii=False))
        print(f"{every:,} parameters, {hat:,} of them HAT's; refiner {'trained' if model.refine else 'untrained: left out'}")
        if args.out:
            export_hat(model, args.out)
            print(f"{args.out}: without the refiner" + ", so the picture differs from ours" * model.refine)
    except (WeightsError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
