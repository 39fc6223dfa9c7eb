"""Optimizers for train.py: Muon, parameter groups, the learning-rate schedule.

    optimizers = build_optimizers(model, "muon", conv_lr_scale=0.3)     # {"adam": ..., "muon": ...}
    set_learning_rate(optimizers, learning_rate(step, fraction, peak=2e-3, warmup=20))

Needs torch; copy this file and it works alone.
"""
import math

import torch

FINAL_LR = 0.01             # the last learning rate, relative to the peak
MIN_MATRIX_SIDE = 16        # Muon trains weight matrices whose sides are at least this long


class Muon(torch.optim.Optimizer):
    """Momentum whose update matrices are made nearly orthogonal (Jordan et al. 2024).

    params: tensors (n, m, ...) or groups of them, flattened to n rows. Five Newton-Schulz iterations move
    all singular values of an update near 1. The update is scaled to an RMS of 0.2 * lr per weight, about the
    RMS of an update of Adam (Liu et al. 2025). torch.optim.Muon works in bf16 and on one matrix at a time.
    This one works in fp32 and stacks matrices of equal shape, which is faster on CPUs without bf16.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((p.shape, p.device), []).append(p)
            for params in by_shape.values():
                self.step_equal_shapes(params, group["lr"], group["momentum"])

    def step_equal_shapes(self, params, lr, momentum):
        grads = [p.grad for p in params]
        for p in params:
            if not self.state[p]:
                self.state[p]["average"] = torch.zeros_like(p)
        averages = [self.state[p]["average"] for p in params]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        nesterov = torch.stack(torch._foreach_lerp(grads, averages, momentum)).flatten(2)
        updates = orthogonalize(nesterov)
        scale = 0.2 * max(updates.shape[1:]) ** 0.5
        torch._foreach_add_(params, [u.view_as(p) for p, u in zip(params, updates)], alpha=-scale * lr)


def orthogonalize(x, iterations=5):
    """Move the singular values of each matrix (N, n, m) near 1 by Newton-Schulz (Jordan et al. 2024)."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        a = x @ x.mT
        a = torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, a, x, beta=3.4445)
    return (x.mT if tall else x).contiguous()


def build_optimizers(model, name="muon", conv_lr_scale=1.0):
    """Return {"adam": optimizer} or {"adam": ..., "muon": ...} for the parameters of `model` that learn.

    name: "adam", or "muon": Muon for matrices with both sides >= MIN_MATRIX_SIDE, Adam for everything else.
    conv_lr_scale: factor on the learning rate of the weights of 3x3 convolutions. Adam moves every weight by
    up to about the learning rate, so an output that sums over n inputs moves by up to n times as much: a 3x3
    convolution of HAT sums over 540 inputs, a linear layer over 60.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    convs = {id(m.weight) for m in model.modules()
             if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)}
    matrices = [p for p in learning if name == "muon" and p.ndim == 2 and min(p.shape) >= MIN_MATRIX_SIDE]
    by_adam = [p for p in learning if id(p) not in {id(m) for m in matrices}]
    groups = [dict(params=[p for p in by_adam if id(p) not in convs], lr_scale=1.0),
              dict(params=[p for p in by_adam if id(p) in convs], lr_scale=conv_lr_scale)]
    optimizers = {"adam": torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)}
    if matrices:
        optimizers["muon"] = Muon([dict(params=matrices, lr_scale=1.0)])
    return optimizers


def learning_rate(step, fraction, peak, warmup):
    """Return the learning rate: linear warm-up over `warmup` steps, then a cosine decay to FINAL_LR * peak.

    fraction: the finished part of the run, 0 to 1, by steps or by the clock. The cosine starts at fraction 0,
    so the rate after the warm-up is slightly below `peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
    return peak * (FINAL_LR + (1 - FINAL_LR) * cosine)


def set_learning_rate(optimizers, lr):
    """Set the learning rate of every group of {name: optimizer} to lr times the group's lr_scale."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
