"""Make tests/golden_hat.safetensors: a small HAT with random weights, an input, and the output of spandrel's HAT for it,
so that test_model.py can compare without spandrel. Needs spandrel 0.4 or newer.

    python tests/make_golden.py
"""
import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from model import HAT, pad_to
from test_model import official_hat, shake

SIZES = dict(embed_dim=12, depths=(2, 2), heads=3, window=4, compress=3, squeeze=2)

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(7)
    ours = shake(HAT(scale=2, **SIZES))
    state = {name: v.bfloat16().float() if v.is_floating_point() else v for name, v in ours.state_dict().items()}
    ours.load_state_dict(state)
    x = torch.rand(1, 3, 11, 6)
    with torch.no_grad():
        y = official_hat(ours, 2, SIZES)(pad_to(x, 4))[..., :22, :12]
    weights = {name: v.bfloat16() if v.is_floating_point() else v.short() for name, v in state.items()}
    save_file({**weights, "input": x, "output": y.contiguous()}, HERE / "golden_hat.safetensors")
