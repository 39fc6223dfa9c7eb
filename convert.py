"""Load, export and blend weights files.

    python convert.py info runs/mine/best.safetensors               # sizes and training data of a file
    python convert.py export runs/mine/best.safetensors hat.pth     # plain HAT in the official format
    python convert.py export runs/mine/best.safetensors hat.onnx    # plain HAT; pip install onnx onnxscript
    python convert.py blend clean.safetensors web.safetensors --alpha 0.3 -o mixed.safetensors

load_any() also loads other architectures, with the optional package spandrel. Needs model.py and its
packages.
"""
import argparse
import io
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from model import WeightsError, fit_weights, load, save, write_atomic


# ------------------------------------------------------------------ other architectures

class SpandrelModel:
    """Wrap a model loaded by spandrel in the interface of tile.py: `scale`, and a call (B, 3, H, W)
    -> (B, 3, H * scale, W * scale) in [0, 1]."""

    def __init__(self, descriptor):
        self.descriptor, self.scale = descriptor, descriptor.scale

    def __call__(self, x):
        with torch.autocast(x.device.type, enabled=False):      # some architectures need fp32
            return torch.cat([self.descriptor(picture) for picture in x.split(1)])      # batches of one only


def load_any(path, device="cpu"):
    """Load a super-resolution model in eval mode: a HATRefiner for our files and official HAT files, or a
    SpandrelModel for other architectures (ESRGAN, SwinIR, DAT and more) if spandrel is installed. The file is
    a .safetensors, or a pickle that contains only tensors. Raises WeightsError."""
    try:
        return load(path, device)
    except WeightsError as e:
        load_error = e
    try:
        import spandrel
        if Path(path).suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        descriptor = spandrel.ModelLoader().load_from_state_dict(spandrel.canonicalize_state_dict(state))
    except ImportError:
        raise WeightsError(f"{load_error}; for other architectures: pip install spandrel") from None
    except Exception as e:      # spandrel infers sizes from names and shapes, which can fail in any way
        raise WeightsError(f"{load_error}; spandrel cannot load it either ({type(e).__name__})") from None
    channels = descriptor.input_channels, descriptor.output_channels
    if descriptor.scale < 2 or channels != (3, 3):
        raise WeightsError(f"{path}: this {descriptor.architecture.name} has scale {descriptor.scale} and "
                           f"{channels} channels; choose a model with scale 2 or more and (3, 3) channels")
    return SpandrelModel(descriptor.eval().to(torch.device(device)))


# ------------------------------------------------------------------ export and blend

def export_hat(model, path):
    """Write the plain HAT of a HATRefiner under its official names, as .safetensors or as .pth
    (`params_ema`). Raises OSError."""
    state = {name: v.detach().cpu().contiguous() for name, v in model.hat_model.state_dict().items()}
    if Path(path).suffix == ".safetensors":
        write_atomic(path, to_safetensors(state))
        return
    buffer = io.BytesIO()
    torch.save({"params_ema": state}, buffer)
    write_atomic(path, buffer.getvalue())


def export_onnx(model, path):
    """Write the plain HAT of a HATRefiner as ONNX, fp32: input lr, output sr, free height and width. Raises
    WeightsError if the packages onnx and onnxscript are missing, and OSError."""
    try:
        import onnxscript       # noqa: F401
    except ImportError:
        raise WeightsError("ONNX needs: pip install onnx onnxscript") from None
    window, side = model.hat_model.window, torch.export.Dim
    sizes = {2: side("height", min=window), 3: side("width", min=window)}
    lr = torch.rand(1, 3, 6 * window + 5, 8 * window + 6)       # not multiples of the window
    program = torch.onnx.export(model.hat_model, (lr,), dynamo=True, opset_version=18, verbose=False,
                                dynamic_shapes={"x": sizes}, input_names=["lr"], output_names=["sr"])
    write_atomic(path, program.model_proto.SerializeToString())


def blend(files, amounts):
    """A HATRefiner in eval mode whose weights are the sum of amount * weights over the files; the amounts
    should add up to 1. Its header records the files. Raises WeightsError, also if the files hold different
    networks, or if only some of them have a trained refiner."""
    models = [load(file) for file in files]
    if len({model.use_refiner for model in models}) > 1:
        raise WeightsError(f"only some of these files have a trained refiner: {', '.join(map(str, files))}")
    mixed, blended = load(files[0]), {}
    for file, model, amount in zip(files, models, amounts):
        fit_weights(mixed, model.state_dict(), file)
        for name, v in mixed.state_dict().items():
            blended[name] = blended.get(name, 0) + amount * v if v.is_floating_point() else v
    mixed.load_state_dict(blended)
    headers = [model.header for model in models]
    parts = zip(files, amounts, headers)
    mixed.header = {"blend": [dict(file=Path(file).name, amount=a, header=h) for file, a, h in parts]}
    for key in "recipe", "data", "licence":
        if key in headers[0] and all(header.get(key) == headers[0][key] for header in headers):
            mixed.header[key] = headers[0][key]
    return mixed


# ------------------------------------------------------------------ the command

def parse():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="print the header and the size of a weights file")
    info.add_argument("weights", metavar="FILE", help="our .safetensors, or an official .pth")
    export = commands.add_parser("export", help="write plain HAT, without the refiner, for other programs")
    export.add_argument("weights", metavar="FILE", help="our .safetensors, or an official .pth")
    export.add_argument("out", metavar="OUT", type=Path, help="a .pth, .safetensors or .onnx file")
    mix = commands.add_parser("blend", help="mix the weights of two files: (1 - alpha) * A + alpha * B")
    mix.add_argument("weights", nargs=2, metavar="FILE", help="A and B, two files of the same network")
    mix.add_argument("--alpha", type=float, default=0.5, help="amount of B, usually 0 to 1 (default: 0.5)")
    mix.add_argument("-o", "--out", type=Path, required=True, help="a .safetensors file")
    for command in export, mix:
        command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return parser.parse_args()


def run(args):
    if args.command == "info":
        model = load(args.weights)
        total, hat = (sum(p.numel() for p in module.parameters()) for module in (model, model.hat_model))
        print(json.dumps(model.header, indent=1, ensure_ascii=False))
        trained = "trained" if model.use_refiner else "untrained"
        print(f"{hat:,} parameters in HAT, {total - hat:,} in the {trained} refiner")
        return
    suffixes = (".pth", ".safetensors", ".onnx") if args.command == "export" else (".safetensors",)
    if args.out.suffix not in suffixes:
        raise WeightsError(f"{args.out} must end in {' or '.join(suffixes)}")
    if args.out.exists() and not args.overwrite:
        raise WeightsError(f"{args.out} exists; --overwrite replaces it")
    note = ""
    if args.command == "blend":
        model = blend(args.weights, (1 - args.alpha, args.alpha))
        save(model, args.out, model.header)
    else:
        model = load(args.weights)
        note = " without the trained refiner" if model.use_refiner else ""
        (export_onnx if args.out.suffix == ".onnx" else export_hat)(model, args.out)
    print(f"wrote {args.out}{note}")


def main():
    sys.stdout.reconfigure(errors="backslashreplace")       # a console may be unable to print a name
    try:
        run(parse())
    except WeightsError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
