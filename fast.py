"""Optional speed-ups with equal outputs up to rounding. Without this file every command still works.

    fast.prepare(model)             # faster inference of a HATRefiner, if its outputs stay the same
    forward = fast.capture_training_graphs(model, [lr.shape])   # faster training on a GPU
    fast.keep_freed_memory()        # faster allocation on a CPU under Linux

Needs model.py and its packages. To change the network, edit model.py only: prepare() compares the two
forwards and installs this one only where the outputs are equal up to rounding.
"""
import copy
import ctypes
import platform
import sys
import types
import warnings

import torch
import torch.nn.functional as F
from einops import rearrange

from model import CONV_SCALE, FEATURES, HATRefiner, join_windows, split_windows

STRIP_PIXELS = 8192         # pixels per strip and thread; half or three times as many are slower
MERGE_PIXELS = 32 * 32      # smallest input for which the upsampler is merged; about as fast as not merged
CHECK_SIZE = 35, 37         # picture of check(): sides that are not multiples of the window, >= MERGE_PIXELS
TOLERANCE = 3e-5            # largest difference, relative to the largest output; rounding gives 3e-6


# ------------------------------------------------------------------ install and check

def prepare(model):
    """Install the fast inference forward and return True. It is used in eval mode without gradients. Return
    False and do not change the model if it is not a HATRefiner or, with a message, if the outputs differ."""
    if not isinstance(model, HATRefiner):
        return False
    problem = check(model)
    if problem:
        print(f"fast.py is off, the plain forward of model.py runs: {problem}", file=sys.stderr, flush=True)
        return False
    install(model.hat_model)
    return True


def install(hat):
    """Replace two methods of this HAT instance, not of its class. copy.deepcopy binds methods to the copy."""
    hat.enlarge = types.MethodType(enlarge, hat)
    for layer in hat.layers:
        layer.forward = types.MethodType(group, layer)


@torch.no_grad()
def check(model):
    """Compare the fast forward with the plain one on a copy of the model. Returns the problem, or None."""
    generator = torch.Generator().manual_seed(0)        # leaves the global random state alone
    model = copy.deepcopy(model).cpu().float().eval()
    for p in model.parameters():        # a branch whose weights are zero would hide a difference
        p.add_(0.02 * torch.randn(p.shape, generator=generator))
    x = torch.rand(1, 3, *CHECK_SIZE, generator=generator)
    expected = model(x)
    try:
        install(model.hat_model)
        difference = (model(x) - expected).abs().max() / expected.abs().max()
    except Exception as e:      # an edited model can lack anything that this file uses
        return f"{type(e).__name__}: {e}".splitlines()[0]
    return None if difference < TOLERANCE else f"the outputs differ by {difference:.1%}"


def is_training(module):
    return torch.is_grad_enabled() or module.training


# ------------------------------------------------------------------ blocks, strip by strip

def group(layer, x, index_sa, index_oca, mask, grad_checkpoint):
    """RHAG.forward. On a CPU without gradients, the blocks change their input in place."""
    if is_training(layer) or x.device.type != "cpu":
        return type(layer).forward(layer, x, index_sa, index_oca, mask, grad_checkpoint)
    y = x.clone()
    for block in layer.residual_group["blocks"]:
        hybrid_block(block, y, index_sa, mask)
    overlapping_block(layer.residual_group["overlap_attn"], y, index_oca)
    return x + layer.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def strip_rows(x, window=1):
    """Number of rows of a strip of x (B, H, W, C), a multiple of window."""
    pixels = STRIP_PIXELS * torch.get_num_threads()
    return window * max(1, round(pixels / (len(x) * x.shape[2] * window)))


def layer_norm(norm, x):
    y = torch.empty_like(x, dtype=norm(x[:, :0]).dtype)
    rows = strip_rows(x)
    for x_strip, y_strip in zip(x.split(rows, 1), y.split(rows, 1)):
        y_strip.copy_(norm(x_strip))
    return y


def cyclic_rows(x, top, bottom):
    """Rows top to bottom of x (B, H, W, C), continued at the first row. A view where possible."""
    h = x.shape[1]
    return x[:, top:bottom] if bottom <= h else torch.cat([x[:, top:], x[:, :bottom - h]], 1)


def hybrid_block(block, x, index, mask):
    """HAB.forward, in place. A strip is some rows of windows; shifted windows begin at row `shift`."""
    attn, shift, window, (h, w) = block.attn, block.shift, block.attn.window, x.shape[1:3]
    y = layer_norm(block.norm1, x)
    conv = block.conv_block.cab[:3](y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    conv_scale = (block.conv_block.cab[3](conv) * CONV_SCALE).to(x.dtype)
    bias = position_bias = attn.position_bias(index, y.dtype)
    rows = strip_rows(x, window)
    for top in range(shift, h + shift, rows):
        bottom = min(top + rows, h + shift)
        strip = cyclic_rows(y, top, bottom)
        if shift:
            strip = strip.roll(-shift, 2)
            if top == shift or bottom > h:      # all strips but the last one have the same mask
                first, last = ((row - shift) // window * (w // window) for row in (top, bottom))
                bias = position_bias + mask[first:last, None].to(y.dtype)
        q, k, v = attn.heads_of(split_windows(strip, window)).unbind(2)
        a = join_windows(attn.attend(q, k, v, bias), window, *strip.shape[1:3])
        a = a.roll(shift, 2) if shift else a
        c = cyclic_rows(conv, top, bottom)
        z = cyclic_rows(x, top, bottom).add_(a.to(x.dtype)).addcmul_(c.to(x.dtype), conv_scale)
        z += block.mlp(block.norm2(z)).to(z.dtype)
        if bottom > h:      # z is a copy
            x[:, top:], x[:, :bottom - h] = z[:, :h - top], z[:, h - top:]


def overlapping_block(block, x, index):
    """OCAB.forward, in place. A strip is some rows of windows; its keys reach `edge` rows above and below."""
    window, edge, h = block.window, block.edge, x.shape[1]
    y = layer_norm(block.norm1, x)
    bias, rows, side = block.position_bias(index, y.dtype), strip_rows(x, window), window + 2 * edge
    for top in range(0, h, rows):
        bottom = min(top + rows, h)
        first, last = max(top - edge, 0), min(bottom + edge, h)
        q, kv = block.heads_of(y[:, first:last]).tensor_split((1,), 3)
        q = split_windows(q[:, top - first:bottom - first].flatten(3), window).unflatten(2, (block.heads, -1))
        kv = F.pad(kv, (0, 0) * 3 + (edge, edge, first - top + edge, bottom + edge - last))
        kv = kv.unfold(1, side, window).unfold(2, side, window)
        k, v = rearrange(kv, "b y x two h d i j -> (b y x) (i j) two h d").unbind(2)
        z = x[:, top:bottom]
        z += join_windows(block.attend(q, k, v, bias), window, *z.shape[1:3])
        z += block.mlp(block.norm2(z))


# ------------------------------------------------------------------ merged upsampler

def enlarge(hat, x):
    """HAT.enlarge. Merge the linear upsampler into one 5x5 convolution by measuring its impulse responses; it
    has about a tenth of the operations. Recompute the border with the original layers, because each layer
    pads with zeros."""
    plain = types.MethodType(type(hat).enlarge, hat)
    if is_training(hat) or x[:, 0].numel() < MERGE_PIXELS:
        return plain(x)
    r, n, dtype = hat.scale, FEATURES, hat.conv_last.weight.dtype
    impulses = torch.zeros(n + 1, n, 5, 5, device=x.device, dtype=dtype)
    impulses[range(n), range(n), 2, 2] = 1      # the last input is zero: its response is the bias
    with torch.autocast(x.device.type, enabled=False):
        responses = F.pixel_unshuffle(plain(impulses), r)
        bias = responses[-1]
        kernel = (responses[:-1] - bias).transpose(0, 1).flip(2, 3).contiguous()
        y = F.conv2d(x.to(dtype), kernel, bias[:, 2, 2].contiguous(), padding=2)
        y = F.pixel_shuffle(y, r)
    for dim in (2, 3):
        size = x.shape[dim]
        side = min(3, size)
        for start, line in (0, 0), (size - side, size - 1):
            border = plain(x.narrow(dim, start, side)).narrow(dim, (line - start) * r, r)
            y.narrow(dim, line * r, r).copy_(border)
    return y


# ------------------------------------------------------------------ training and memory

def capture_training_graphs(model, shapes):
    """Record the forward and the backward of model(lr) as CUDA graphs, which avoids the launch cost of
    thousands of small kernels. Returns a callable(lr) for batches of these `shapes` only, or None, with a
    printed line, if the GPU cannot record the model. Call this function under the autocast of the training,
    with cache_enabled=False. Each backward overwrites the gradients: run only one per optimizer step."""
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")      # recording uses its own stream
    device, graphs = next(model.parameters()).device, {}
    try:
        for shape in shapes:        # a graph replaces the forward of its module, so each shape gets its own
            module, lr = torch.nn.Sequential(model), torch.zeros(shape, device=device)
            graphs[tuple(shape)] = torch.cuda.make_graphed_callables(module, (lr,), allow_unused_input=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as e:
        print(f"no CUDA graphs, recording failed: {e}".splitlines()[0], file=sys.stderr, flush=True)
        return None
    return lambda lr: graphs[tuple(lr.shape)](lr)


def keep_freed_memory():
    """Make glibc keep freed memory for the next tile or training step. Returning memory to Linux and
    requesting it again takes up to half of the time on a CPU. No effect without glibc."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)              # M_MMAP_MAX: never use mmap for large blocks
        mallopt(-1, 2 ** 31 - 1)    # M_TRIM_THRESHOLD
