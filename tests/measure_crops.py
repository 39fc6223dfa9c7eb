"""One sheet of crops: bicubic, what other programs made, our models, the true picture. Not run by pytest.

    python tests/measure_crops.py --hr HR --lr LR --sr rival=FOLDER --weights weights/web-low.safetensors -o crops.png \
        "eyes=portrait:540,250" "stars=night:870,660"

Each crop is TITLE=PICTURE:X,Y, its centre in pixels of the true picture; PICTURE is its name without the suffix.
"""
import argparse
import sys
from pathlib import Path

import torch.nn.functional as F
from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import convert                                                          # noqa: E402
import degrade                                                          # noqa: E402
import metrics                                                          # noqa: E402
import pairs                                                            # noqa: E402
import tile                                                             # noqa: E402


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("crops", nargs="+", metavar="TITLE=PICTURE:X,Y")
    p.add_argument("--hr", required=True)
    p.add_argument("--lr", required=True)
    p.add_argument("--sr", nargs="*", default=[], metavar="NAME=FOLDER")
    p.add_argument("--weights", nargs="+", required=True)
    p.add_argument("--side", type=int, default=96, help="of a crop, in pixels (default: 96)")
    p.add_argument("--zoom", type=int, default=3)
    p.add_argument("-o", "--out", required=True)
    args = p.parse_args()
    rivals = dict(s.split("=", 1) for s in args.sr)
    networks = {Path(w).stem: convert.load(w) for w in args.weights}
    columns = ["bicubic", *rivals, *networks, "true"]
    wanted = [(title, name, [int(v) for v in at.split(",")]) for title, (name, at) in
              ((c.split("=", 1)[0], c.split("=", 1)[1].rsplit(":", 1)) for c in args.crops)]
    jobs, _ = pairs.paired({"HR": args.hr, "LR": args.lr, **rivals})
    jobs = [job for job in jobs if Path(job[0]).stem in {name for _, name, _ in wanted}]
    made = {}
    for name, lr, hr, found in pairs.pictures(jobs, 2):
        ours = {k: tile.upscale(n, lr, 2, tile.Tiler(128, 16, 1, n.hat_model.window)) for k, n in networks.items()}
        made[Path(name).stem] = {"bicubic": degrade.resize(lr, hr.shape[1:]), **found, **ours, "true": hr}
    n, label = args.side * args.zoom, 16
    sheet = Image.new("RGB", (len(columns) * (n + 4), len(wanted) * (n + label)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (title, name, (x, y)) in enumerate(wanted):
        hr = made[name]["true"]
        top = min(max(y - args.side // 2, 0), hr.shape[1] - args.side)
        left = min(max(x - args.side // 2, 0), hr.shape[2] - args.side)
        at = ..., slice(top, top + args.side), slice(left, left + args.side)
        for column, kind in enumerate(columns):
            crop = made[name][kind].clamp(0, 1)[at]
            said = f"{title}: {kind}" + ("" if kind == "true" else f" {metrics.psnr(crop, hr[at]):.2f} dB")
            big = F.interpolate(crop[None], scale_factor=args.zoom)[0].mul(255).round().byte().permute(1, 2, 0).numpy()
            draw.text((column * (n + 4), row * (n + label) + 2), said, fill="black")
            sheet.paste(Image.fromarray(big), (column * (n + 4), row * (n + label) + label))
    sheet.save(args.out)
    for name, kinds in made.items():
        print(name, " ".join(f"{k} {metrics.psnr(kinds[k].clamp(0, 1), kinds['true'], 4):.2f}" for k in columns[:-1]))


if __name__ == "__main__":
    main()
