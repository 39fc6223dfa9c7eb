"""Draw a sheet of crops: bicubic, results of other programs, our models, the true picture. Not run by pytest.

    python tests/measure_crops.py --data HR --lr-dir LR --sr rival=FOLDER --weights weights/web-low.safetensors -o crops.png \
        "eyes=portrait:540,250" "stars=night:870,660"

Each crop is TITLE=PICTURE:X,Y: the name without suffix and the center in pixels of the true picture.
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
    p.add_argument("--data", required=True, help="folder of HR pictures")
    p.add_argument("--lr-dir", required=True, help="folder of LR pictures")
    p.add_argument("--sr", nargs="*", default=[], metavar="NAME=FOLDER")
    p.add_argument("--weights", nargs="+", required=True)
    p.add_argument("--side", type=int, default=96, help="side of a crop in pixels (default: 96)")
    p.add_argument("--zoom", type=int, default=3)
    p.add_argument("-o", "--out", required=True)
    args = p.parse_args()
    programs = dict(text.split("=", 1) for text in args.sr)
    models = {Path(path).stem: convert.load_any(path) for path in args.weights}
    columns = ["bicubic", *programs, *models, "true"]
    crops = []
    for text in args.crops:
        title, place = text.split("=", 1)
        name, center = place.rsplit(":", 1)
        crops.append((title, name, [int(number) for number in center.split(",")]))
    jobs, _ = pairs.match_pairs({"HR": args.data, "LR": args.lr_dir, **programs})
    jobs = [job for job in jobs if Path(job[0]).stem in {name for _, name, _ in crops}]
    pictures = {}
    for name, lr, hr, results in pairs.read_pairs(jobs, 2):
        ours = {label: tile.upscale(model, lr, 2, tile.Tiler(128, 16)) for label, model in models.items()}
        pictures[Path(name).stem] = {"bicubic": degrade.resize(lr, hr.shape[1:]), **results, **ours, "true": hr}
    n, label = args.side * args.zoom, 16
    sheet = Image.new("RGB", (len(columns) * (n + 4), len(crops) * (n + label)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (title, name, (x, y)) in enumerate(crops):
        hr = pictures[name]["true"]
        top = min(max(y - args.side // 2, 0), hr.shape[1] - args.side)
        left = min(max(x - args.side // 2, 0), hr.shape[2] - args.side)
        at = ..., slice(top, top + args.side), slice(left, left + args.side)
        for column, method in enumerate(columns):
            crop = pictures[name][method].clamp(0, 1)[at]
            caption = f"{title}: {method}" + ("" if method == "true" else f" {metrics.psnr(crop, hr[at]):.2f} dB")
            big = F.interpolate(crop[None], scale_factor=args.zoom)[0].mul(255).round().byte().permute(1, 2, 0).numpy()
            draw.text((column * (n + 4), row * (n + label) + 2), caption, fill="black")
            sheet.paste(Image.fromarray(big), (column * (n + 4), row * (n + label) + label))
    sheet.save(args.out)
    for name, by_method in pictures.items():
        print(name, " ".join(f"{k} {metrics.psnr(by_method[k].clamp(0, 1), by_method['true'], 4):.2f}" for k in columns[:-1]))


if __name__ == "__main__":
    main()
