"""Makes tests/golden_hat.safetensors: a small HAT with random weights, an input and the picture that spandrel's HAT makes
of it, so that test_model.py can compare where spandrel is not installed. Needs spandrel 0.4 or newer.

    python tests/make_golden.py
"""
import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

here = Path(__file__).parent
sys.path[:0] = [str(here.parent), str(here)]
from model import HAT, pad_to                             # noqa: E402
from test_model import official_hat, shake                # noqa: E402

SIZES = dict(embed_dim=12, depths=(2, 2), heads=3, window=4, compress=3, squeeze=2)

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="example: python tests/make_golden.py").parse_args()
    torch.manual_seed(7)
    ours = shake(HAT(scale=2, **SIZES))
    ours.load_state_dict({k: v.bfloat16().float() if v.is_floating_point() else v for k, v in ours.state_dict().items()})
    x = torch.rand(1, 3, 11, 6)
    with torch.no_grad():
        y = official_hat(ours, 2, SIZES)(pad_to(x, 4))[..., :22, :12]
    weights = {k: v.bfloat16() if v.is_floating_point() else v.short() for k, v in ours.state_dict().items()}
    save_file({**weights, "input": x, "output": y.contiguous()}, here / "golden_hat.safetensors")
