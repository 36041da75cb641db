"""Sharpness-aware minimization (SAM) and adversarial training (AT), side by side in one file.

Two papers ask whether a network whose loss is flat around its weights also has it flat around its inputs:
  [1] Sharpness-Aware Minimization Alone can Improve Adversarial Robustness, ICML 2023 workshop, arXiv 2305.05392
  [2] On the Duality Between Sharpness-Aware Minimization and Adversarial Training, ICML 2024, arXiv 2402.15152

Standard training minimises the loss L(w; x, y) over the weights w. SAM and AT put a maximum inside:

    SAM   min_w  max_{|v|_2 <= rho}      L(w + v; x, y)           the worst weights near w, one v for all images
    AT    min_w  max_{|delta|_p <= eps}  L(w; x + delta, y)       the worst input near x, a delta for each image

They are dual: the same kind of maximum, once over weights and once over inputs. [1, 2] find that SAM, which never
sees an attacked image, still gains robustness, and unlike AT does so without losing clean accuracy.

    python sam_at.py                          train with SGD, SAM and AT, attack all three, print one table
    python sam_at.py --method sam             one of them
    python sam_at.py --preset demo            embedded data and a small network: a minute on a laptop
    python sam_at.py --preset paper           the papers' CIFAR-10 recipe; wants a GPU
    python sam_at.py --help                   everything else

Read from the top: 1 input space, 2 weight space, 3 the three training steps, 4 networks, 5 data, 6 the training
loop, 7 evaluation. What follows can wait: 8 why it works, in a model that can be solved, 9 the duality, measured on
trained networks, 10 variants of SAM and AT, more networks and attacks, 11 where the data comes from, 12 what a step
costs, 13 several devices, 14 runs that can be repeated, 15 the report, 16 the command line.

bare, on_its_own, share, total, rank and world (section 13) change nothing on a single device: read past them.

Units everywhere: pixels are in [0,1], eps and delta in the same unit (so 8/255, not 8), rho in the unit of the
weights. x: float images (N, C, H, W) or any (N, ...). y: integer labels (N,). logits: (N, classes).
"""
import argparse
import copy
import ctypes
import gc
import hashlib
import inspect
import json
import logging
import math
import os
import platform
import shutil
import sys
import sysconfig
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

# == 1. Input space: the threat model and the attacks ===========================================================
#    An attacker may add any delta with |delta|_p <= eps, as long as x + delta is still an image in [0,1].
#    PGD looks for the worst one: step along the loss gradient, project back onto the ball, repeat.


def l2_norm(t):
    """One l2 norm an image: (N, ...) -> (N, 1, ..., 1)."""
    return torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim)), keepdim=True)


def steepest(g, norm):
    """argmax of <g, s> over |s|_p <= 1, image by image: sign(g) for l-inf, g/|g|_2 for l2; 0 where g is 0."""
    g = torch.nan_to_num(g, 0.0, 0.0, 0.0)  # a model that answers NaN must not put NaN into the image
    if norm == "linf":
        return g.sign()
    tiny = torch.finfo(g.dtype).tiny  # 0/tiny = 0
    g = g / g.abs().amax(tuple(range(1, g.ndim)), keepdim=True).clamp_min(tiny)  # so that squares do not underflow
    return g / l2_norm(g).clamp_min(tiny)


def project(delta, eps, norm):
    """The nearest point of the ball |delta|_p <= eps, image by image."""
    if norm == "linf":
        return delta.clamp(-eps, eps)
    tiny = torch.finfo(delta.dtype).tiny
    return delta * (eps / l2_norm(delta).clamp_min(tiny)).clamp_max(1)


def random_delta(x, eps, norm, generator=None):
    """A random point of the ball: uniform for l-inf; for l2 a uniform direction times a uniform length."""
    if norm == "linf":
        return eps * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) - 1)
    direction = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    length = eps * torch.rand(len(x), *[1] * (x.ndim - 1), generator=generator, dtype=x.dtype, device=x.device)
    return length * steepest(direction, "l2")


def clip(x, delta):
    """Cut delta, pixel by pixel, so that x + delta lies in [0,1]. It stays in the ball, since x is an image."""
    return (x + delta).clamp(0, 1) - x


@contextmanager
def off(attribute, things):
    """Inside, the attribute is False wherever it was True; afterwards it is True again."""
    on = [thing for thing in things if getattr(thing, attribute, False)]
    for thing in on:
        setattr(thing, attribute, False)
    try:
        yield
    finally:
        for thing in on:
            setattr(thing, attribute, True)


def frozen_weights(model):
    """Inside, no weight gradient is computed, nor an activation kept for one: a third of an attack's cost saved."""
    return off("requires_grad", model.parameters())


def frozen_statistics(model):
    """Inside, BatchNorm's running mean and variance are not updated (unless --batchnorm always). They should describe
    the network that is kept, on the images that it is trained on, not a perturbed network or a half-made attack."""
    return off("track_running_stats", [] if getattr(bare(model), "always_track", False) else model.modules())


def cross_entropy(logits, y):
    """The loss that an attack raises: a sum, so that an image's gradient is its own, whatever the batch."""
    return F.cross_entropy(logits, y, reduction="sum")


def pgd_step(model, x, y, delta, eps, step_size, norm, loss=cross_entropy):
    """One step in the input:  delta <- clip(P_eps(delta + step_size * steepest(g))),  g = dL/ddelta.

    Returns the next delta, and the logits at the one that came in.
    """
    delta = delta.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x + delta)
        g, = torch.autograd.grad(loss(logits, y), delta)
    delta = project(delta.detach() + step_size * steepest(g, norm), eps, norm)
    return clip(x, delta), logits.detach()


def pgd(model, x, y, eps, *, steps=10, step_size=None, norm="linf", loss=cross_entropy, random_start=True,
        generator=None):
    """Projected gradient descent on -L: the worst delta with |delta|_p <= eps (Madry et al. 2018).

    x        (N, ...) pixels in [0,1]; y: (N,) labels. The model takes pixels: its normalisation is inside it.
    eps      radius in pixel units, for example 8/255; step_size defaults to eps/4, as in [1, 2].
    norm     "linf" or "l2".
    Returns x_adv, shape and dtype of x, in [0,1] and within eps of x. A gradient entry that is zero or not finite
    takes no part in its step. The model is only looked at: its weights, .grad, mode and (unless --batchnorm always)
    running statistics stay as they were, and no weight gradient is computed.
    Raises ValueError for an unknown norm or a negative eps or steps, TypeError for images that are not floats.
    """
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm is {norm!r}: expected 'linf' or 'l2'")
    if not eps >= 0 or steps < 0:
        raise ValueError(f"eps = {eps} and steps = {steps}: neither may be negative")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}: expected float pixels in [0,1]")
    step_size = eps / 4 if step_size is None else step_size
    delta = clip(x, random_delta(x, eps, norm, generator)) if random_start else torch.zeros_like(x)
    with frozen_weights(model), frozen_statistics(model):
        for _ in range(steps):
            delta, _ = pgd_step(model, x, y, delta, eps, step_size, norm, loss)
    return (x + delta).clamp(0, 1)


def fgsm(model, x, y, eps):
    """The fast gradient sign method, x + eps * sign(g): one l-inf step of full size (Goodfellow et al. 2015)."""
    return pgd(model, x, y, eps, steps=1, step_size=eps, random_start=False)


# == 2. Weight space: SAM's ascent ==============================================================================
#    The same maximum over the weights. SAM takes one step to the edge of the ball, to first order its worst point:
#        AT   delta <- delta + step * steepest(g),  g = dL/dx, image by image, repeated and projected
#        SAM  v     =  rho * g/|g|_2,               g = dL/dw, all weights and the whole batch together, once
#    On a linear score the two moves are one: (w + v).x = w.(x + delta) with delta = (v.x) w/|w|^2.


def ascent(weights, grads, rho):
    """v = rho * g/|g|_2, |g|_2 one norm over all weights (Foret et al. 2021, eq. 2); where g is zero, so is v."""
    return torch._foreach_mul(grads, rho / nn.utils.get_total_norm(grads).clamp_min(1e-12))


@contextmanager
def perturbed(weights, rho, ascend=ascent):
    """Inside, the weights are w + v, v = ascend(w, g, rho); afterwards w again, bit for bit.

    weights  a model or its parameters; g is the .grad they carry on entry. Weights without one stay as they are.
    rho      radius in the unit of the weights. Raises ValueError if it is negative or not finite.
    """
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho = {rho}: expected a finite number >= 0")
    weights = weights.parameters() if isinstance(weights, nn.Module) else weights
    weights = [w for w in weights if w.grad is not None]
    grads, here = [w.grad for w in weights], [w.data for w in weights]
    try:
        if weights:
            there = ascend(here, grads, rho)
            torch._foreach_add_(there, here)  # v becomes w + v
            for w, moved in zip(weights, there):
                w.data = moved  # w itself lies untouched in `here`: `there` is the one extra copy
        yield
    finally:
        for w, kept in zip(weights, here):
            w.data = kept


# == 3. The three training steps ================================================================================
#    Each is one update of the weights on one batch; they differ in where the gradient is taken.
#    Each returns the loss (scalar) and the logits of its first call of backward(), both detached.


def backward(model, x, y):
    """Put dL/dw on the weights, in place of whatever gradient lay there; return the loss and the logits."""
    model.zero_grad()
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    return loss.detach(), logits.detach()


def sgd_step(model, x, y, optimizer):
    """Standard training: the gradient at (w, x).  1 gradient a step."""
    loss, logits = backward(model, x, y)
    optimizer.step()
    return loss, logits


def sam_step(model, x, y, optimizer, rho, ascend=ascent):
    """SAM: the gradient at (w + v, x), applied at w (Foret et al. 2021, algorithm 1).  2 gradients a step."""
    with on_its_own(model):  # where there are several devices, each climbs on its share of the batch
        loss, logits = backward(model, x, y)
    with perturbed(model, rho, ascend), frozen_statistics(model):
        backward(model, x, y)
    optimizer.step()
    return loss, logits


def at_step(model, x, y, optimizer, eps, *, steps=5, step_size=None, norm="linf", step=sgd_step, generator=None):
    """AT: the gradient at (w, x + delta) (Madry et al. 2018, eq. 2.1).  steps + 1 gradients a step.

    The attack runs in the model's own mode, so in training it sees the batch's statistics, as in the authors' code.
    The loss and logits are those of the attacked images. With step = partial(sam_step, rho=rho) the two combine: the
    gradient at (w + v, x + delta), steps + 2 in all.
    """
    x_adv = pgd(bare(model), x, y, eps, steps=steps, step_size=step_size, norm=norm, generator=generator)
    return step(model, x_adv, y, optimizer)


# == 4. Networks ================================================================================================

class PreActBlock(nn.Module):
    """Pre-activation residual block: x + conv(relu(bn(conv(relu(bn(x)))))) (He et al. 2016, Identity Mappings).

    Where the shape changes, a 1x1 convolution of the activated input, without BatchNorm, stands in for x.
    """

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        same = stride == 1 and c_in == c_out
        self.stride, self.shortcut = stride, None if same else nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x):
        h = F.relu(self.bn1(x))
        if self.shortcut is not None:  # thinned out beforehand: the same, but strided 1x1 convolutions corrupt memory
            x = self.shortcut(F.avg_pool2d(h, 1, self.stride))  # on some CPUs (oneDNN issue 6035)
        return self.conv2(F.relu(self.bn2(self.conv1(h)))) + x


def preact_resnet(num_classes, width=64, stages=(1, 2, 4, 8), blocks=2):
    """For 32x32 images: a 3x3 stem, stages of blocks, their widths in units of the stem's, each stage after the first
    at half the size, mean pooling. With these defaults PreActResNet-18, the network of [1, 2]."""
    layers, c_in = [nn.Conv2d(3, width, 3, padding=1, bias=False)], width
    for i, stage in enumerate(stages):
        for j in range(blocks):
            layers.append(PreActBlock(c_in, stage * width, stride=2 if i > 0 and j == 0 else 1))
            c_in = stage * width
    return nn.Sequential(*layers, nn.BatchNorm2d(c_in), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(c_in, num_classes))


def small_cnn(num_classes, width=16):
    """Three convolutions and a linear layer, for the demo and for the tests."""
    layers, c_in = [], 3
    for c_out in width, 2 * width, 4 * width:
        layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        c_in = c_out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 4 * c_in, num_classes))


class Classifier(nn.Module):
    """logits = net((x - mean) / std).  The normalisation is inside, so that x, delta and eps are always in pixels.

    With bf16 = True, training, AT's attack included, multiplies in bfloat16 (the weights stay float32). Evaluation
    never does, so that rounding weakens none of its attacks (on CUDA, see parse_args for TF32).
    """

    def __init__(self, net, mean, std):
        super().__init__()
        self.net, self.bf16 = net, False
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, x):
        x = (x - self.mean) / self.std
        # A block for each pass: autocast keeps its bf16 copies of the weights until the block ends, so that one block
        # around both of SAM's passes would use the copies of w again at w + v.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16 and self.training):
            return self.net(x).to(x.dtype)


MODELS = {"prn18": preact_resnet, "small": small_cnn}
CIFAR10_MEAN_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)  # mean, std of the training pixels in [0,1]
CIFAR100_MEAN_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


def make_model(name, num_classes, mean_std=CIFAR10_MEAN_STD, *, width=None):
    """A classifier of (N, 3, 32, 32) pixels in [0,1]: "prn18" (11,172,170 parameters at 10 classes) or any of MODELS.

    mean_std  of the pixels, three channels each; width: channels of the first layer, if not the network's own.
    Raises ValueError for an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"model is {name!r}: expected one of {', '.join(MODELS)}")
    net = MODELS[name](num_classes) if width is None else MODELS[name](num_classes, width)
    return Classifier(net, *mean_std).to(memory_format=torch.channels_last)  # the layout convolutions are fastest in


# == 5. Data ====================================================================================================

class Data(NamedTuple):
    """A data set, whole and in memory. x: uint8 (N, 3, 32, 32); y: int64 (N,)."""
    x: torch.Tensor
    y: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    num_classes: int
    mean_std: tuple     # (mean, std) of the training pixels in [0,1], by channel
    augment: bool       # whether a shifted or mirrored image still shows the same thing
    source: str         # what this is, in words
    note: str = ""      # what it can show and what not, for the report


def to_pixels(x):
    """uint8 (N, C, H, W) -> float32 in [0,1]."""
    return x.float() / 255


def crop_and_flip(x, pad=4):
    """Reflect-pad each image by `pad`, crop it at random to its size, mirror half of them. (N, C, H, W) in and out.

    One gather for the batch: pixel (i, j) comes from (reflect(i + di), reflect(j + dj)), with j mirrored half the time.
    """
    n, _, h, w = x.shape
    di, dj = torch.randint(-pad, pad + 1, (2, n, 1, 1), device=x.device)
    mirror = torch.rand(n, 1, 1, device=x.device) < 0.5
    i = torch.arange(h, device=x.device).view(1, h, 1) + di
    j = torch.arange(w, device=x.device).view(1, 1, w)
    j = torch.where(mirror, w - 1 - j, j) + dj
    i = h - 1 - (h - 1 - i.abs()).abs()  # reflect: -1 -> 1, h -> h - 2
    j = w - 1 - (w - 1 - j.abs()).abs()
    return x[torch.arange(n, device=x.device).view(n, 1, 1), :, i, j].permute(0, 3, 1, 2)


# == 6. The training loop, the same for every method ============================================================

OPTIMIZERS = {"sgd": partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4),
              "adam": partial(torch.optim.Adam, weight_decay=5e-4),
              "adamw": partial(torch.optim.AdamW, weight_decay=0.05)}  # DeiT's, Touvron et al. 2021


def make_optimizer(model, lr, epochs, name="sgd"):
    """The papers' recipe: SGD, momentum 0.9, weight decay 5e-4; lr falls to a tenth after 75% of the epochs, and again
    after 90%.

    Returns the optimizer and its schedule; call schedule.step() after every epoch.
    """
    weights = list(model.parameters())
    fused = weights[0].device.type in ("cpu", "cuda")  # the whole update as one kernel, where there is one
    optimizer = OPTIMIZERS[name](weights, lr=lr, fused=fused)
    milestones = [math.ceil(0.75 * epochs), math.ceil(0.9 * epochs)]
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)


class Diverged(ValueError):
    """Training left the finite numbers."""


def train(model, data, step, optimizer, schedule, *, epochs, batch_size, on_batch=lambda epoch, done, total: None):
    """Train in place with step(model, x, y, optimizer) -> (loss, logits), one of section 3 with its radius filled in.
    A new schedule starts at epoch 1, one that was loaded goes on.

    A generator: yields one row an epoch, {"epoch", "lr", "loss", "accuracy", "seconds"}, where loss and accuracy (in
    percent) are those of the training images as the step saw them. Randomness comes from torch's global generator.
    Raises Diverged after an epoch that leaves loss or weights not finite.
    """
    for epoch in range(schedule.last_epoch + 1, epochs + 1):
        start = time.perf_counter()
        model.train()
        sums = torch.zeros(3, device=data.x.device)  # loss, correct, images
        batches = torch.randperm(len(data.x), device=data.x.device).split(batch_size)
        for done, batch in enumerate(batches, 1):
            x, y = data.x[batch], share(data.y[batch])  # the whole batch, unless there are several devices
            x = to_pixels(share(crop_and_flip(x) if data.augment else x))
            if len(y):
                loss, logits = step(model, x, y, optimizer)
                sums += torch.stack([loss * len(y), (logits.argmax(1) == y).sum(), torch.full_like(loss, len(y))])
            on_batch(epoch, done, len(batches))
        loss_sum, correct, images = total(sums)
        row = {"epoch": epoch, "lr": schedule.get_last_lr()[0], "loss": loss_sum / images,
               "accuracy": 100 * correct / images, "seconds": time.perf_counter() - start}
        if not math.isfinite(row["loss"]) or not nn.utils.get_total_norm(model.parameters()).isfinite():
            raise Diverged(f"training diverged in epoch {epoch}: loss {row['loss']:g}; try a smaller --lr")
        schedule.step()
        yield row


# == 7. Evaluation: accuracy on clean images and under attack ===================================================

ATTACKS = "linf 1/255", "linf 2/255", "l2 16/255", "l2 32/255"  # the papers' four, each PGD-10 with step eps/4


def withstands(model, x, y, eps, *, steps, norm, step_size=None, loss=cross_entropy, random_start=True,
               generator=None):
    """Indices of the images that no iterate of PGD ever fooled; arguments as for pgd, the model in eval mode.

    Robust accuracy asks only whether an image was ever fooled, so a fooled one is attacked no further.
    """
    step_size = eps / 4 if step_size is None else step_size
    standing = torch.arange(len(x), device=x.device)
    delta = clip(x, random_delta(x, eps, norm, generator)) if random_start else torch.zeros_like(x)
    with frozen_weights(model):
        for _ in range(steps + 1):  # one pass more than steps: it judges the last iterate
            if not len(standing):
                break
            delta, logits = pgd_step(model, x, y, delta, eps, step_size, norm, loss)
            still = logits.argmax(1) == y
            x, y, delta, standing = x[still], y[still], delta[still], standing[still]
    return standing


def evaluate(model, data, attacks=ATTACKS, *, steps=10, restarts=1, batch_size=500, seed=0):
    """Accuracy in percent over the whole of data = (images, labels): {"clean": .., "robust": {attack: .., ...}}.

    images   uint8, or float pixels in [0,1], (N, 3, 32, 32).   attacks: like "linf 8/255", "l2 0.5", "fgsm 8/255".
    An image counts as robust if it is classified right and stays so at every iterate (the authors judge the last) of
    PGD with `steps` steps of eps/4 from each of `restarts` random starts, seeded by `seed`; "fgsm" is one full step
    from the image; for outside attacks see section 10. Runs in eval mode; puts the model's mode back.
    Raises ValueError for an empty set, an attack it does not know, or logits that are not finite.
    """
    images, labels = data
    n = len(images)
    if not n:
        raise ValueError("no images to evaluate on")
    images, labels = share(images, exact=True), share(labels, exact=True)
    generator = torch.Generator(images.device).manual_seed(seed + rank())
    attacks = {name: parse_attack(name) for name in attacks}  # see section 16; then name -> what is left standing
    attacks = {name: partial(outside, seed=seed, **a) if "attack" in a else
               partial(withstands, generator=generator, **{"steps": steps} | a) for name, a in attacks.items()}
    mode, clean, robust = model.training, 0, dict.fromkeys(attacks, 0)
    model.eval()
    try:
        for x, y in zip(images.split(batch_size), labels.split(batch_size)) if len(images) else ():
            x = to_pixels(x) if x.dtype == torch.uint8 else x
            with torch.no_grad():
                logits = model(x)
            if not logits.isfinite().all():
                raise Diverged("the model's logits are not finite: training went wrong; try a smaller --lr")
            right = logits.argmax(1) == y
            clean += int(right.sum())
            for name, attack in attacks.items():
                x_left, y_left = x[right], y[right]  # what is wrong already needs no attack
                for _ in range(restarts if attack.func is withstands else 1):
                    left = attack(model, x_left, y_left)
                    x_left, y_left = x_left[left], y_left[left]
                robust[name] += len(x_left)
    finally:
        model.train(mode)
    clean, *counts = total(torch.tensor([clean, *robust.values()], device=images.device))
    return {"clean": 100 * clean / n, "robust": {name: 100 * count / n for name, count in zip(robust, counts)}}


# A first reading ends here.

# == 8. Why it works: the simplified model of [2] ===============================================================
#    y is +1 or -1. One robust feature, x_1 = y with probability p, else -y; n non-robust ones, Normal(eta y, 1), eta
#    small. The classifier sign(w x_1 + x_2 + .. + x_{n+1}) has one weight, its trust in the robust feature.
#        standard   max_w A(w)                         w_ST  = ln(p/(1-p)) / (2 eta)
#        AT         the same with eta - eps for eta    w_AT  = ln(p/(1-p)) / (2 (eta - eps))      first order in eps
#        SAM        max_w min(A(w - rho), A(w + rho))  w_SAM = w_ST (1 + rho^2/(3n)) + O(rho^4)   second order in rho
#    Derivation: A' = 0 where p phi((w + eta n)/sqrt n) = (1-p) phi((eta n - w)/sqrt n), and the logarithm of that is
#    linear in w. AT moves each non-robust feature by eps against y; x_1 is out of its reach. For SAM expand
#    A(w + rho) = A(w - rho) at w_ST: A'' delta + A''' rho^2/6 = 0, with A'''/A'' = -2 w_ST/n.


def simple_accuracy(w, p, eta, n):
    """A(w) = p Phi((w + eta n)/sqrt n) + (1-p) Phi((eta n - w)/sqrt n); w may be negative."""
    phi = [0.5 * math.erfc(-z / math.sqrt(2 * n)) for z in (w + eta * n, eta * n - w)]
    return p * phi[0] + (1 - p) * phi[1]


def w_standard(p, eta):
    """The maximiser of A; also AT's, at eta - eps."""
    return math.log(p / (1 - p)) / (2 * eta)


def w_sam(p, eta, n, rho):
    """The maximiser of min(A(w - rho), A(w + rho)), to second order in rho."""
    return w_standard(p, eta) * (1 + rho ** 2 / (3 * n))


def eps_like(rho, eta, n):
    """The eps at which w_AT is w_SAM, to leading order: eta/eps = 1 + 3n/rho^2."""
    return eta / (1 + 3 * n / rho ** 2)


def maximiser(f, low=0.0, high=30.0):
    """Where a function of one peak has it, by ternary search."""
    for _ in range(200):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (a, high) if f(a) < f(b) else (low, b)
    return (low + high) / 2


class OneWeight(nn.Module):
    """That classifier as a network of pixels x_i/40 + 1/2, all turned to y = +1 (label 0), for the steps of section 3.

    It reads the sign of x_1, which no eps changes. To have a gradient, its cross-entropy is 1 + the expected share of
    errors when Normal(0, n/2) blurs each score. The data has the other half of the variance: together, the model.
    """

    def __init__(self, n):
        super().__init__()
        self.n, self.w = n, nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = 40 * (x - 0.5)
        score = self.w * x[:, 0].sign() + x[:, 1:].sum(1)
        q = 1 + torch.special.ndtr(-score / math.sqrt(self.n / 2))
        return torch.stack([torch.zeros_like(q), q.expm1().log()], 1)  # cross-entropy log(1 + e^z) = q

    def worst(self, x, y):
        """SAM's inner maximum itself, not to first order: the ascent to the worse of w + rho and w - rho."""
        def loss(v):
            return F.cross_entropy(torch.func.functional_call(self, {"w": self.w.detach() + v}, x), y).item()
        return lambda weights, grads, rho: [torch.full_like(weights[0], max(rho, -rho, key=loss))]


def trained_w(step, p, eta, n, *, batch_size=None, updates=60, images=5000):
    """The weight that training on samples of the simplified model ends with, the mean over its second half."""
    torch.manual_seed(0)
    x, place = math.sqrt(0.5) * torch.randn(images, n + 1), (torch.arange(images) + 0.5) / images
    sums = math.sqrt(n / 2) * torch.special.ndtri(place)  # stratified: a score sees the sum of the features alone
    x[:, 1:] += eta + (sums - x[:, 1:].sum(1))[:, None] / n
    x[:, 0] = torch.where((images * place * (1 - p)).frac() < 1 - p, -1.0, 1.0)
    x, y = x / 40 + 0.5, torch.zeros(images, dtype=torch.int64)
    w = w_standard(p, eta)  # the learning rate is 1 over the curvature there: as Newton's method, or 1/20 for batches
    rate = math.sqrt(2 * math.pi * n) * math.exp((w + eta * n) ** 2 / (2 * n)) / (2 * p * eta)
    model, ws = OneWeight(n), []
    for k in range(updates):
        optimizer = torch.optim.SGD(model.parameters(), lr=rate / 20 if batch_size else rate / (1 + k / 3))
        pick = torch.randint(images, (batch_size,)) if batch_size else slice(None)
        step(model, x[pick], y[pick], optimizer)
        ws.append(model.w.item())
    return fmean(ws[updates // 2:])


def run_theory(s, p=0.9, eta=0.5, n=10, radii=(0.5, 1.0, 2.0)):
    """The weight on the robust feature by the formulas above, by a search for A's maximum, and trained by the steps of
    section 3: table, picture, rows {"training", "radius", "closed_form", "numerical", "trained"}.

    AT's radii are those that agree with SAM's. "sam (worst)" takes SAM's inner maximum as it is. sam_step goes along
    the gradient instead: between w_ST and w_SAM that is the wrong side, and it ends at w_ST. On small batches the side
    is a coin's, and it ends where L'(w + rho) + L'(w - rho) = 0, at w_ST (1 + rho^2/n): three times the shift.
    """
    A, st, rho, rows = partial(simple_accuracy, p=p, eta=eta, n=n), w_standard(p, eta), radii[-1], []

    def add(training, radius, closed_form, gain, step, **how):
        rows.append({"training": training, "radius": radius, "closed_form": closed_form,
                     "numerical": maximiser(gain), "trained": trained_w(step, p, eta, n, **how)})

    def worst_step(model, x, y, optimizer, rho):
        return sam_step(model, x, y, optimizer, rho, ascend=model.worst(x, y))

    add("sgd", 0.0, st, A, sgd_step, updates=30)
    for eps in (eps_like(r, eta, n) for r in radii):
        step = partial(at_step, eps=eps / 40, steps=2, step_size=eps / 40)  # from any start it reaches the corner
        add("at", eps, w_standard(p, eta - eps), partial(A, eta=eta - eps), step, updates=30)
    for r in radii:
        add("sam (worst)", r, w_sam(p, eta, n, r), lambda w: min(A(w - r), A(w + r)), partial(worst_step, rho=r))
    add("sam", rho, st, A, partial(sam_step, rho=rho))
    add("sam, batches of 8", rho, st * (1 + rho ** 2 / n), lambda w: A(w - rho) + A(w + rho),
        partial(sam_step, rho=rho), batch_size=8, updates=2000)
    cells = [[name, *(f"{value:.3f}" for value in values)] for name, *values in map(dict.values, rows)]
    print(f"weight on the robust feature, p = {p}, eta = {eta}, n = {n}")
    print(align([["training", "radius", "closed form", "numerical", "trained"], *cells]))
    write_whole(THEORY, json.dumps(rows, indent=1) + "\n")
    save_picture("theory.png", draw_theory, rows, p, eta, n)
    return rows


def draw_theory(pyplot, rows, p, eta, n):
    """The weight on the robust feature against eps and against rho."""
    _, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    A, eps, rho = partial(simple_accuracy, p=p, eta=eta, n=n), torch.linspace(0, 0.15, 61), torch.linspace(0, 3, 61)
    w_worst = [maximiser(lambda w: min(A(w - r), A(w + r))) for r in rho.tolist()]
    axes[0].plot(eps, w_standard(p, eta - eps), color=COLOURS["at"], label="optimum")
    axes[0].plot(eps, w_standard(p, eta) * (1 + eps / eta), "--", color="grey", label="leading order")
    axes[1].plot(rho, w_worst, color=COLOURS["sam"], label="optimum")
    axes[1].plot(rho, w_sam(p, eta, n, rho), "--", color="grey", label="leading order")
    for axis, kind, name in zip(axes, ("at", "sam (worst)"), ("AT's eps (first order)", "SAM's rho (second order)")):
        trained = [(r["radius"], r["trained"]) for r in rows if r["training"] in (kind, "sgd")]
        axis.plot(*zip(*trained), "o", mfc="none", color=COLOURS[kind.split()[0]], label="trained")
        axis.set(xlabel=name, ylabel="weight on the feature")
        axis.legend()


# == 9. The duality, measured on trained networks ===============================================================
#    SAM makes the loss flat around the weights, AT around the inputs. Does the one bring the other?


def rise_in_weights(model, x, y, rho, draws=5):
    """How far the loss rises at radius rho: (at SAM's ascent, at the worst of some random directions)."""
    loss, _ = backward(model, x, y)
    rises = []
    for _ in range(1 + draws):
        with perturbed(model, rho), torch.no_grad():
            rises.append(float(F.cross_entropy(model(x), y) - loss))
        for w in model.parameters():
            w.grad = torch.randn_like(w)  # for the next ascent
    model.zero_grad()
    return rises[0], max(rises[1:])


def rise_in_inputs(model, x, y, eps, norm, draws=5):
    """How far the mean loss rises at radius eps: (under PGD-10, under the worst of some random directions)."""
    random = [(x + eps * steepest(torch.randn_like(x), norm)).clamp(0, 1) for _ in range(draws)]
    with torch.no_grad():
        loss, attacked, *moved = [float(F.cross_entropy(model(x_adv), y))
                                  for x_adv in (x, pgd(model, x, y, eps, norm=norm), *random)]
    return attacked - loss, max(moved) - loss


def feature_shifts(model, x, y, rho, eps, norm):
    """Layer by layer, |h(w + v; x) - h(w; x)| / |h(w; x)| with v SAM's ascent, and the same for h(w; x + delta) under
    PGD; means over images: rows {"layer", "weights", "inputs"}."""
    def shift(h, moved):
        return float((l2_norm(moved - h) / l2_norm(h).clamp_min(1e-12)).mean())

    x_adv, outputs = pgd(model, x, y, eps, norm=norm), {layer: [] for layer in model.net.children()}
    backward(model, x, y)
    with ExitStack() as hooks, torch.no_grad():
        for layer in outputs:
            hooks.enter_context(layer.register_forward_hook(lambda layer, _, h: outputs[layer].append(h)))
        model(x)
        model(x_adv)
        with perturbed(model, rho):
            model(x)
    model.zero_grad()
    return [{"layer": f"{i} {type(layer).__name__}", "weights": shift(h, h_weights), "inputs": shift(h, h_inputs)}
            for i, (layer, (h, h_inputs, h_weights)) in enumerate(outputs.items())]


def run_sharpness(s, rhos=(0.05, 0.1, 0.2, 0.4), radii=(0.5 / 255, 1 / 255, 2 / 255, 4 / 255), most=1000):
    """Loss rise in weight space and in input space for saved models, on test images: table, picture, rows."""
    data, rows = load_data(s.dataset, s.data_dir), []
    x, y = to_pixels(data.x_test[:most]).to(s.device), data.y_test[:most].to(s.device)
    for path, (state, model) in [(path, load_model(path, data, s.device)) for path in s.sharpness]:
        torch.manual_seed(s.seed)
        rows.append({"model": label_of(state["settings"]), "checkpoint": path,
                     "loss": F.cross_entropy(model(x), y).item(),
                     "weights": [rise_in_weights(model, x, y, rho) for rho in rhos],
                     "inputs": [rise_in_inputs(model, x, y, eps, s.norm) for eps in radii],
                     "features": feature_shifts(model, x, y, rhos[1], radii[2], s.norm)})
    head = ["model", "loss", *(f"rho {rho:g}" for rho in rhos), *(f"{s.norm} {255 * eps:g}/255" for eps in radii)]
    cells = [[r["model"], f"{r['loss']:.2f}", *(f"{worst:.2f} ({random:.2f})"
                                                for worst, random in r["weights"] + r["inputs"])] for r in rows]
    print(f"loss on {len(x)} test images of {data.source}, and its rise (in brackets, in the worst of 5 random "
          "directions)")
    print(align([head, *cells]))
    save_picture("sharpness.png", draw_sharpness, rows, rhos, radii, s.norm)
    return rows


def draw_sharpness(pyplot, rows, rhos, radii, norm):
    """Loss rise against rho and against eps, and how far features move; paler lines are a method's later models."""
    _, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for method, of_method in grouped(rows, lambda r: r["model"].split()[0]).items():
        for i, r in enumerate(of_method):
            look = {"color": COLOURS[method], "alpha": 1 - 0.7 * i / len(of_method), "mfc": "none"}
            for axis, space, where, style in ((axes[0], "weights", rhos, "^-"),
                                              (axes[1], "inputs", [255 * eps for eps in radii], "s--")):
                axis.plot(where, [worst for worst, _ in r[space]], style, label=r["model"], **look)
                axis.plot(where, [random for _, random in r[space]], ":", **look)
                axes[2].plot([f["layer"] for f in r["features"]], [f[space] for f in r["features"]], style, **look)
    axes[0].set(xlabel="rho", ylabel="rise of the loss", title="weights: SAM's ascent; random (dotted)")
    axes[1].set(xlabel=f"{norm} eps x 255", ylabel="rise of the loss", title="inputs: PGD-10; random (dotted)")
    axes[2].set(title=f"features: rho {rhos[1]:g} (solid), {norm} {255 * radii[2]:g}/255 (dashed)",
                ylabel="relative distance", yscale="log")
    axes[2].tick_params("x", rotation=90)
    axes[0].legend(fontsize=8)


# == 10. Variants: more ascents, networks and attacks ============================================================

def adaptive_ascent(weights, grads, rho, eta=0.01):
    """ASAM: v = rho * T^2 g/|T g|_2 with T = |w| + eta, elementwise, and T = 1 on biases and normalisation layers.

    Where weights are rescaled without a change of the function, so is v (at eta = 0): sharpness no longer depends on
    the scale (Kwon et al. 2021, section 3). For the same effect rho is about ten times SAM's.
    """
    T = [w.abs() + eta if w.ndim > 1 else torch.ones_like(w) for w in weights]
    return torch._foreach_mul(T, ascent(weights, torch._foreach_mul(T, grads), rho))


def layerwise_ascent(weights, grads, gamma):
    """AWP: v = gamma * |w| * g/|g|, layer by layer; biases and normalisation layers stay (Wu et al. 2020, section 4.2).
    AWP is sam_step on attacked images with this ascent."""
    return [g * (gamma * w.norm() / g.norm().clamp_min(1e-12)) if w.ndim > 1 else torch.zeros_like(g)
            for w, g in zip(weights, grads)]


def esam_step(model, x, y, optimizer, rho, *, beta=0.5, gamma=0.5):
    """ESAM, a cheaper SAM (Du et al. 2022, algorithm 1). At beta = gamma = 1 it is SAM.

    A weight tensor ascends with probability beta (one at least does), by rho/beta in all, as in its authors' code; the
    others need no first gradient. The second is of the share gamma of the images whose loss the ascent raised most.
    """
    weights, losses = list(model.parameters()), partial(F.cross_entropy, reduction="none")
    draws = torch.rand(len(weights)).tolist()
    resting = [w for w, draw in zip(weights, draws) if draw >= beta and draw > min(draws)]
    with off("requires_grad", resting), on_its_own(model):
        loss, logits = backward(model, x, y)
    with perturbed(weights, rho / beta), frozen_statistics(model):
        with torch.no_grad():
            rise = losses(model(x), y) - losses(logits, y)
        picked = rise.topk(math.ceil(gamma * len(x))).indices.sort().values
        backward(model, x[picked], y[picked])
    optimizer.step()
    return loss, logits


def wide_resnet28_10(num_classes, width=16):
    """WRN-28-10 (Zagoruyko and Komodakis 2016), ten times as wide; 36,479,194 parameters at 10 classes."""
    return preact_resnet(num_classes, width, (10, 20, 40), blocks=4)


def deit_tiny(num_classes, width=192):
    """DeiT-Ti on patches of 2x2 (Touvron et al. 2021): torchvision's VisionTransformer, 12 layers, 3 heads."""
    from torchvision.models import VisionTransformer
    return VisionTransformer(image_size=32, patch_size=2, num_layers=12, num_heads=3, hidden_dim=width,
                             mlp_dim=4 * width, num_classes=num_classes)


MODELS |= {"wrn28_10": wide_resnet28_10, "deit_ti": deit_tiny}


def margin(logits, y):
    """The attack loss max_{j != y} z_j - z_y, positive where fooled, summed over images (Carlini and Wagner 2017): its
    gradient does not vanish where the network is sure. PGD steps forget a scale, so DLR's would change nothing much."""
    others = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return (others - logits.gather(1, y[:, None])[:, 0]).sum()


def outside_class(name):
    """The class of that name in torchattacks. Raises BadInput if there is none, or no torchattacks."""
    with refused(f"{name} needs torchattacks: pip install torchattacks"):
        import torchattacks
    attack = getattr(torchattacks, name, None)
    if not isinstance(attack, type):
        raise BadInput(f"torchattacks has no attack {name!r}")
    return attack


def outside(model, x, y, *, attack, norm=None, eps=None, seed=0):
    """Indices of the images that `attack`, a class of torchattacks by name, leaves classified right; cf. withstands.

    It gets the norm, eps, seed and number of classes if it takes them. What leaves [0,1], or the ball where there is a
    norm, is put back. Raises BadInput if the attack fails.
    """
    if not len(x):
        return torch.arange(0)
    attack = outside_class(attack)
    takes = inspect.signature(attack).parameters
    plain = copy.deepcopy(model).requires_grad_(False).to(memory_format=torch.contiguous_format)  # some call view()
    given = {"norm": norm and norm.capitalize(), "eps": eps, "seed": seed, "n_classes": plain(x[:1]).shape[1]}
    given = {key: value for key, value in given.items() if key in takes and value is not None}
    with refused(f"torchattacks' {attack.__name__} failed"), torch.random.fork_rng():
        torch.manual_seed(seed)
        adversary = attack(plain, **given)
        for part in adversary._autoattack.attacks if attack.__name__ == "AutoAttack" else ():
            part.steps = 100  # as AutoAttack's authors have it (Croce and Hein 2020); torchattacks takes 10
        x_adv = adversary(x.contiguous(), y).clamp(0, 1)
    if "norm" in takes and eps:
        x_adv = x + project(x_adv - x, eps, norm or "linf")
    with torch.no_grad():
        return (model(x_adv).argmax(1) == y).nonzero()[:, 0]


def corrupted(model, directory):
    """Accuracy on CIFAR-10-C (Hendrycks and Dietterich 2019): {corruption: [percent at severity 1, .., 5]}. Its folder
    has labels.npy (5 n,) and NAME.npy (5 n, 32, 32, 3) uint8, severity by severity. Raises BadInput if it does not."""
    import numpy  # comes with torchvision
    directory, device, accuracy = Path(directory), next(model.parameters()).device, {}
    with refused(f"--corruptions {directory}"):
        labels = torch.from_numpy(numpy.load(directory / "labels.npy").astype("int64")).to(device)
        for path in sorted(set(directory.glob("*.npy")) - {directory / "labels.npy"}):
            images = torch.from_numpy(numpy.load(path)).permute(0, 3, 1, 2).to(device)
            fits = labels.ndim == 1 and len(labels) % 5 == 0 and images.shape == (len(labels), 3, 32, 32)
            if not fits or images.dtype != torch.uint8:
                raise ValueError(f"{path.name}: {[*images.shape]}, {images.dtype}; labels.npy: {[*labels.shape]}")
            by_severity = zip(images.chunk(5), labels.chunk(5))
            accuracy[path.stem] = [evaluate(model, part, attacks=())["clean"] for part in by_severity]
        if not accuracy:
            raise ValueError("no NAME.npy in it")
    return accuracy

# == 11. Where the data comes from ===============================================================================

class BadInput(ValueError, argparse.ArgumentTypeError):
    """Something the user gave cannot be used. The message is the one line that they see (argparse names the flag)."""


def demo_data(n_train=4000, n_test=1000, *, classes=10, p=0.9, seed=0):
    """The simplified model of [2], drawn as images: made of both kinds of features, it illustrates and proves nothing.

    Image of class y:  1/2 + coarse pattern of y (with probability 1-p of another class) + texture of y + noise.
    Robust: the coarse pattern, 4x4 colours of root-mean-square 0.075, too large for an attack of a few /255, but
    wrong in a share 1-p of the images. Not robust: the texture, each pixel off by 2/255 to 4/255, always right.
    """
    rng = torch.Generator().manual_seed(seed)
    coarse_of = F.interpolate(torch.randn(classes, 3, 4, 4, generator=rng), size=32, mode="bilinear")
    coarse_of *= 0.075 / coarse_of.pow(2).mean((1, 2, 3), keepdim=True).sqrt()
    texture_of = torch.empty(classes, 3, 32, 32).uniform_(2 / 255, 4 / 255, generator=rng)
    texture_of *= torch.randn(texture_of.shape, generator=rng).sign()
    n = n_train + n_test
    y = torch.randint(classes, (n,), generator=rng)
    other = (y + torch.randint(1, classes, (n,), generator=rng)) % classes
    shown = torch.where(torch.rand(n, generator=rng) < p, y, other)
    x = 0.5 + coarse_of[shown] + texture_of[y] + 0.08 * torch.randn(n, 3, 32, 32, generator=rng)
    x = (x * 255).round().clamp(0, 255).byte()
    return Data(x[:n_train], y[:n_train], x[n_train:], y[n_train:], classes, mean_std_of(x[:n_train]), False,
                f"embedded demo data ({n_train} training and {n_test} test images of {classes} classes, seed {seed})")


def mean_std_of(x):
    """Mean and standard deviation by channel of uint8 images (N, 3, H, W), in pixel units: (mean, std)."""
    std, mean = torch.std_mean(to_pixels(x), dim=(0, 2, 3))
    return mean.tolist(), std.clamp_min(1e-3).tolist()  # a channel without contrast must not divide by zero


def load_cifar(name, directory):
    """"cifar10" or "cifar100" through torchvision, downloaded into `directory` if it is not there."""
    from torchvision import datasets
    dataset, mean_std = {"cifar10": (datasets.CIFAR10, CIFAR10_MEAN_STD),
                         "cifar100": (datasets.CIFAR100, CIFAR100_MEAN_STD)}[name]
    existed, advice = os.path.exists(directory), "point --data-dir at a copy, or try --preset demo"
    try:
        with refused(f"{name} is not in {directory!r} and cannot be downloaded: {advice}"):
            train, test = (dataset(directory, train=t, download=True) for t in (True, False))
    finally:
        if not existed:
            with suppress(OSError):  # it is there, and holds something
                os.rmdir(directory)
    x, x_test = (torch.from_numpy(d.data).permute(0, 3, 1, 2).contiguous() for d in (train, test))
    return Data(x, torch.tensor(train.targets), x_test, torch.tensor(test.targets), len(train.classes), mean_std, True,
                f"{name} ({len(x)} training and {len(x_test)} test images)")


def load_folder(directory):
    """DIR/train/CLASS/*.png and DIR/test (or val) likewise, at 32x32; or Tiny-ImageNet, with a list of val's classes.
    DIR/SOURCE.txt may say in its first line what the images are, in the others what they can show."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.v2.functional import pil_to_tensor, resize
    directory = Path(directory)
    train, annotations = ImageFolder(directory / "train"), directory / "val" / "val_annotations.txt"
    if len(train.classes) < 2:
        raise BadInput(f"{train.root} has one class, {train.classes[0]!r}: two are the least to tell apart")
    if annotations.exists():
        with refused(f"{annotations}: not a list of images and classes of train"):
            names, classes, *_ = zip(*(line.split("\t") for line in annotations.read_text().splitlines()))
            test = [(annotations.parent / "images" / n, train.class_to_idx[c]) for n, c in zip(names, classes)]
    else:
        folder = ImageFolder(directory / ("test" if (directory / "test").is_dir() else "val"))
        test = folder.samples
        if odd := set(train.classes) ^ set(folder.classes):
            raise BadInput(f"{train.root} and {folder.root}: {min(odd)!r} is in one of them only")

    def read(path):
        with refused(f"{path}: not a readable image"):
            return pil_to_tensor(resize(train.loader(path), [32, 32]))

    with ThreadPoolExecutor() as pool:
        x, x_test = (torch.stack(list(pool.map(read, [path for path, _ in part]))) for part in (train.samples, test))
    y, y_test = (torch.tensor([target for _, target in part]) for part in (train.samples, test))
    about = directory / "SOURCE.txt"
    lines = about.read_text(errors="replace").replace("$", "").splitlines() if about.exists() else []
    name, *note = lines or [directory.resolve().name]
    return Data(x, y, x_test, y_test, len(train.classes), mean_std_of(x), True, f"{name} ({len(y)} training and "
                f"{len(y_test)} test images of {len(train.classes)} classes)", " ".join(note))


@contextmanager
def refused(what):
    """Inside, whatever goes wrong is BadInput: what, and in brackets the first line of the error."""
    try:
        yield
    except Exception as error:  # for one bad file numpy, PIL and torchvision raise half a dozen classes
        raise BadInput(f"{what} ({(str(error).splitlines() or [type(error).__name__])[0]})") from None


def load_data(name, directory):
    """One of DATASETS. Raises BadInput or OSError if it cannot be had."""
    if name == "demo":
        return demo_data()
    return load_cifar(name, directory) if name.startswith("cifar") else load_folder(directory)


# == 12. What a step costs =======================================================================================
#    In passes, with a forward pass F and a backward pass of twice that (F for the inputs, F for the weights):
#        SGD   3 F                SAM   6 F, twice SGD                AT   K (F + F) + 3 F, 1 + 2K/3 times SGD


def time_of(call, device):
    """Median wall time of call() in seconds, synchronised: of calls for 1 s, or if unsteady 20 s, four at least."""
    logging.getLogger("torch.utils.cpp_extension").setLevel("ERROR")  # Timer's import warns of nvcc without a GPU
    from torch.utils.benchmark import Timer
    timer = Timer("call(); wait()", globals={"call": call, "wait": torch.get_device_module(device).synchronize},
                  num_threads=torch.get_num_threads())
    return timer.adaptive_autorange(threshold=0.2, min_run_time=1, max_run_time=20).median


def peak_mb(call, device):
    """Peak memory during call() in MiB: CUDA's tensors, or else the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    import resource
    with suppress(AttributeError, OSError):  # Linux: give back what is free, start counting anew
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def run_benchmark(s):
    """Time a step of each method (SGD always, for the ratio) on random pixels; print the table and return its rows."""
    if world() > 1:
        raise BadInput("--benchmark times one device: run it without torchrun")
    from torch.utils.flop_counter import FlopCounterMode
    n, dtype = 8192 if s.device.type == "cuda" else 2048, torch.bfloat16 if s.precision == "bf16" else torch.float32
    product = partial(torch.matmul, *torch.randn(2, n, n, device=s.device, dtype=dtype))
    rate, rows = 2 * n ** 3 / time_of(product, s.device), []
    del product  # it must not count in a step's peak memory
    x, y = torch.rand(s.batch_size, 3, 32, 32, device=s.device), torch.randint(10, (s.batch_size,), device=s.device)
    x = x.contiguous(memory_format=torch.channels_last)
    print(f"{s.model}, batch {s.batch_size}, {device_name(s.device)}, {s.precision}, torch {torch.__version__}; "
          f"a matrix product runs at {rate / 1e12:.2f} TFLOP/s")
    for method in dict.fromkeys(["sgd", *s.method]):
        model, fast = build(method, s, 10, CIFAR10_MEAN_STD)
        optimizer, _ = make_optimizer(model, s.lr, s.epochs, s.optimizer)
        step = METHODS[method].step(s)
        with FlopCounterMode(display=False) as counter:
            step(model, x, y, optimizer)
        fast_step = partial(step, fast, x, y, optimizer)
        seconds = time_of(fast_step, s.device)
        rows.append({"method": method, "step_s": seconds, "images_per_s": s.batch_size / seconds,
                     "ratio_to_sgd": seconds / rows[0]["step_s"] if rows else 1.0,
                     "peak_mb": peak_mb(fast_step, s.device),
                     "share_of_matmul_rate": counter.get_total_flops() / seconds / rate})
    print(align([["method", "passes", "step", "images/s", "x SGD", "peak MB", "of matmul rate"]] + [
        [r["method"], f"{METHODS[r['method']].passes(s):g} F", f"{1000 * r['step_s']:.1f} ms",
         f"{r['images_per_s']:.0f}", f"{r['ratio_to_sgd']:.2f}", f"{r['peak_mb']:.0f}",
         f"{100 * r['share_of_matmul_rate']:.0f}%"] for r in rows]))
    return rows


def device_name(device):
    """What the device is called, such as the GPU's name or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name") or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


# == 13. More than one device: torchrun =========================================================================
#    torchrun starts N processes, each with a device and a copy of the network. All draw the same batches and crops,
#    each takes its share, and DistributedDataParallel averages the gradients: recipe and checkpoints are those of one.
#    SAM's first gradient stays on its device: each share of the batch has its own v, the m-sharpness of Foret et al.
#    (2021, section 4), which generalised better there the smaller the share. With --sync-ascent the batch has one v.


def start_processes(s):
    """Join the other processes, if torchrun started this one. All but the first print nothing but errors."""
    if distributed.is_available() and distributed.is_torchelastic_launched():
        store, rank_, world_ = next(distributed.rendezvous("env://"))
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]  # the addresses of an attempt that died are still there
        distributed.init_process_group("nccl" if s.device.type == "cuda" else "gloo", rank=rank_, world_size=world_,
                                       store=distributed.PrefixStore(attempt, store),
                                       device_id=s.device if s.device.type == "cuda" else None)
        if rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives


def stop_processes():
    """Leave the others, together. Networks that still hold the group go first, or its threads abort the exit."""
    if joined():
        gc.collect()
        distributed.barrier()
        distributed.destroy_process_group()


def joined():
    return distributed.is_available() and distributed.is_initialized()


def world():
    return distributed.get_world_size() if joined() else 1


def rank():
    return distributed.get_rank() if world() > 1 else 0


def share(t, exact=False):
    """This process's rows of a batch: as many as the others', so that gradients can be averaged. What is left over (of
    an epoch's last batch) sits out, unless the shares are to be exact."""
    return t[rank():len(t) if exact else len(t) // world() * world():world()]


def total(t):
    """The sum over all processes of a tensor (k,), as a list of k numbers."""
    if world() > 1:
        distributed.all_reduce(t)
    return t.tolist()


def spread(model, s):
    """The network for training: as it is, or with its gradients averaged over the processes."""
    if joined():
        model = DistributedDataParallel(model)
        model.broadcast_buffers = False  # BatchNorm's statistics are a device's own, until wait_for_first
        model.sync_ascent = s.sync_ascent
    return model


def bare(model):
    """The network inside DistributedDataParallel, for passes that are not to be averaged."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def on_its_own(model):
    """Inside, gradients stay on their device, unless --sync-ascent asks for those of the whole batch."""
    return nullcontext() if getattr(model, "sync_ascent", True) else model.no_sync()


def wait_for_first(model=None):
    """Wait for the first process, and take over its running statistics."""
    if world() > 1:
        distributed.barrier()
        for buffer in model.buffers() if model else ():
            distributed.broadcast(buffer, 0)


# == 14. Runs ===================================================================================================
#    A folder each, with a record and a checkpoint. A run killed at any moment goes on as if it had not been (on a CPU,
#    bit for bit).


def compiles(method, s):
    """Whether to compile. ESAM switches gradients of weights off at random: each choice would be compiled anew."""
    return s.compile and method != "esam"


def build(method, s, num_classes, mean_std):
    """The network that the settings name, on its device: (model, the same compiled if they say so)."""
    torch.manual_seed(s.seed)  # every method starts from the same weights and meets the same batches
    model = make_model(s.model, num_classes, mean_std, width=s.width).to(s.device)
    model.bf16, model.always_track = s.precision == "bf16", s.batchnorm == "always"
    if s.batchnorm == "synced":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model, spread(torch.compile(model, dynamic=False) if compiles(method, s) else model, s)


def sha256(tensors):
    """Hexadecimal checksum of tensors, bit for bit."""
    return hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in tensors)).hexdigest()


def settings_of(method, s, data):
    """All that decides a run's weights. Two runs are the same run if these are the same."""
    keys = [*METHODS[method].keys, "dataset", "model", "width", "epochs", "batch_size", "lr", "precision", "compile",
            "seed"]
    keys += ["optimizer"] * (s.optimizer != "sgd") + ["sync_ascent"] * s.sync_ascent
    keys += ["batchnorm"] * (s.batchnorm == "synced" or s.batchnorm == "always" and method != "sgd")
    return {"method": method, **{key: getattr(s, key) for key in keys}, "compile": compiles(method, s),
            "device": s.device.type, "classes": data.num_classes, "data_sha256": sha256(data[:4])}


def label_of(settings):
    """"sgd", "sam rho 0.2" or "at linf 8/255"."""
    parts = [settings["method"]]
    parts += [f"{key.split('_')[-1]} {settings[key]:g}" for key in ("rho", "esam_beta", "esam_gamma", "awp_gamma")
              if key in settings]
    if "eps" in settings:
        parts.append(f"{settings['norm']} {show_radius(settings['eps'])}")
    if settings.get("attack_steps", 5) != 5:
        parts.append(f"in {settings['attack_steps']} steps")
    parts += ["synced ascent"] * ("sync_ascent" in settings)
    return " ".join(parts) + (f", BatchNorm {settings['batchnorm']}" if "batchnorm" in settings else "")


def name_of(settings):
    """The run's folder: readable, and different for different settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    label = label_of(settings).replace(",", "").replace(" ", "-").replace("/", "_")
    return f"{settings['dataset']}-{settings['model']}-{label}-seed{settings['seed']}-{digest}"


def write_whole(path, content):
    """Write a text or a checkpoint whole or not at all, in a folder that need not be there. One process does."""
    if not rank():
        part = Path(f"{path}.{os.getpid()}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        save = part.write_text if isinstance(content, str) else partial(torch.save, f=part)
        save(content)
        os.replace(part, path)


def load_checkpoint(path, settings=None):
    """A checkpoint that run_method wrote (for these settings). Raises BadInput for anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        ours = set(state) == {"settings", "mean_std", "log", "model", "optimizer", "schedule", "rng"}
    except FileNotFoundError:
        raise BadInput(f"{path}: no such checkpoint") from None
    except Exception:  # cut short, or no archive: torch has a class for each, and advice that must not be followed
        ours = False
    if not ours or settings not in (None, state["settings"]):
        what = "the checkpoint of other settings" if ours else "cut short, or not a checkpoint of this program"
        raise BadInput(f"{path}: {what}; move it away, or start over with --fresh")
    return state


def load_record(path):
    """A run's record as a dict. Raises BadInput if it cannot be read."""
    with refused(f"{path}: not a record of this program; move it away, or start over with --fresh"):
        record = json.loads(Path(path).read_text())
        return {"finished": record["finished"], "settings": record["settings"], **record}


def save_record(folder, record):
    """The record and, for a spreadsheet, its epochs. Both can be made again from the checkpoint."""
    lines = [record["log"][0], *(row.values() for row in record["log"])]  # a row's keys are the header
    write_whole(folder / "epochs.csv", "".join(",".join(map(str, line)) + "\n" for line in lines))
    write_whole(folder / "record.json", json.dumps(record, indent=1) + "\n")


def random_states(device, states=()):
    """Torch's random states, read or set: [CPU's, and the device's]."""
    devices = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    for d, state in zip(devices, states):
        d.set_rng_state(state)
    return [d.get_rng_state() for d in devices]


def run_method(method, s, data):
    """Train one network with one method, or go on with it, and attack it. Prints its progress, returns its record."""
    settings = settings_of(method, s, data)
    folder, label = Path(s.runs) / name_of(settings), label_of(settings)
    record_file, checkpoint = folder / "record.json", folder / "checkpoint.pt"
    if s.fresh and not rank():
        for path in record_file, checkpoint, folder / "epochs.csv":
            path.unlink(missing_ok=True)
    wait_for_first()
    attack, more = s.evaluation, []
    if record_file.exists():
        record = load_record(record_file)
        if record["finished"] and record["evaluation"] == attack:
            print(f"{label}  finished before; reported from {record_file} (--fresh trains again)", flush=True)
            return record
        more = evaluations(record)  # what was measured stays in the record
    state = load_checkpoint(checkpoint, settings) if checkpoint.exists() else None

    model, fast = build(method, s, data.num_classes, data.mean_std)
    optimizer, schedule = make_optimizer(model, s.lr, s.epochs, s.optimizer)
    log = state["log"] if state else []
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        random_states(s.device, state["rng"])
        print(f"{label}  goes on after epoch {len(log)}/{s.epochs}, from {checkpoint}", flush=True)
    machine = device_name(s.device) + (f" x {world()}" if world() > 1 else "")
    record = {"name": folder.name, "settings": settings, "command": command_of(settings, attack), "data": data.source,
              "data_note": data.note, "test_images": len(data.x_test), "machine": machine, "torch": torch.__version__,
              "log": log, "more": [e for e in more if e["evaluation"] != attack], "finished": False}
    terminal = sys.stdout.isatty()

    def on_batch(epoch, done, total):
        if terminal:
            print(f"{label}  epoch {epoch}/{s.epochs}  batch {done}/{total}", end="\r", flush=True)

    for row in train(fast, data, METHODS[method].step(s), optimizer, schedule, epochs=s.epochs, batch_size=s.batch_size,
                     on_batch=on_batch):
        log.append(row)
        wait_for_first(model)
        write_whole(checkpoint, {  # first: what follows can be made again from it
            "settings": settings, "mean_std": data.mean_std, "log": log, "model": model.state_dict(),
            "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "rng": random_states(s.device)})
        save_record(folder, record)
        left = sum(r["seconds"] for r in log) / len(log) * (s.epochs - len(log))
        print(f"{label}  epoch {row['epoch']}/{s.epochs}  loss {row['loss']:.4f}  accuracy {row['accuracy']:5.1f}%  "
              f"{len(data.x) / row['seconds']:.0f} images/s  {timedelta(seconds=round(left))} left", flush=True)

    record |= assess(model, data, s)  # the plain model, not the compiled one: the batches shrink
    record |= {"seconds": sum(r["seconds"] for r in log), "date": time.strftime("%Y-%m-%d"),
               "weights_sha256": sha256(model.state_dict().values()), "finished": True}
    save_record(folder, record)
    return record


def record_of(path, model, data):
    """The finished record beside a checkpoint, if it is there, of these weights and this data, and can be written."""
    kept = Path(path).parent / "record.json"
    if not kept.exists() or not os.access(kept.parent, os.W_OK) or not (record := load_record(kept))["finished"]:
        return None
    same_data = record["settings"]["data_sha256"] == sha256(data[:4])
    return record if same_data and record["weights_sha256"] == sha256(model.state_dict().values()) else None


def load_model(path, data, device):
    """A checkpoint and its model, ready to be attacked. Raises BadInput if it does not fit the data, unless None."""
    state = load_checkpoint(path)
    settings = state["settings"]
    if data and data.num_classes != settings["classes"]:
        raise BadInput(f"{path} tells {settings['classes']} classes apart, the data has {data.num_classes}")
    model = make_model(settings["model"], settings["classes"], state["mean_std"], width=settings["width"])
    model.load_state_dict(state["model"])
    return state, model.to(device).eval()


def evaluations(record):
    """All that was measured of a run: first at its end, if it came to it, then with --eval."""
    more = record.get("more", [])
    keys = "evaluation", "clean", "robust", "warnings"
    return [{key: record[key] for key in keys}, *more] if record["finished"] else more


def spaced(tensors, most):
    """At most that many rows of each, evenly spaced; all of them for None."""
    n = len(tensors[0])
    pick = torch.arange(min(n, most or n), device=tensors[0].device) * n // min(n, most or n)
    return [t[pick] for t in tensors]


def assess(model, data, s):
    """What a record says of a trained model: {"evaluation", "clean", "robust", "warnings"}."""
    test = spaced([data.x_test.to(s.device), data.y_test.to(s.device)], s.images)
    result = evaluate(model, test, s.attacks, steps=s.eval_steps, restarts=s.restarts, seed=s.seed)
    return {"evaluation": s.evaluation, **result,
            "warnings": doubts(model, test, s.attacks, s.eval_steps, s.restarts, s.seed)}


def doubts(model, data, attacks, steps, restarts, seed, most=200):
    """Reasons to doubt an evaluation, as sentences; the checks that Carlini et al. (2019) ask for.

    On up to 200 of the images: 50 steps and a restart more must not fool over a point more, l-inf 1/2 (any image can
    become grey) must reach chance, and one step must not fool over a point more than many.
    """
    data, many = spaced(data, most), max(steps, 50)
    chance, found = 100 * float(data[1].bincount().max()) / len(data[1]), []
    run = partial(evaluate, model, data, seed=seed)
    names = [name for name in attacks if name.split()[0] in ("linf", "l2")]
    largest = {parse_attack(name)["norm"]: name for name in sorted(names, key=lambda name: parse_attack(name)["eps"])}
    for norm, name in largest.items():
        weak = run([name], steps=steps, restarts=restarts)["robust"][name]
        strong = run([name], steps=many, restarts=restarts + 1)["robust"][name]
        if weak - strong > 1:
            found.append(f"{name}: {many} steps from {restarts + 1} starts lower {weak:.1f} to {strong:.1f}")
        fast = f"fgsm {name.split()[1]}"
        if norm == "linf" and weak - (one := run([fast])["robust"][fast]) > 1:
            found.append(f"{name}: one step lowers it to {one:.1f}, {steps} to {weak:.1f}; its gradients may be masked")
    if (huge := run(["linf 0.5"], steps=max(steps, 10))["robust"]["linf 0.5"]) > chance:
        found.append(f"linf 0.5 leaves {huge:.1f}, above chance ({chance:.1f}); its gradients may be masked")
    return found


# == 15. The report: RESULTS.md and pictures, from records alone ================================================

RECORDS, THEORY = Path("results/records.jsonl"), Path("results/theory.json")  # kept with the report; a line a run
COLOURS = {"sgd": "#000000", "sam": "#0072B2", "asam": "#56B4E9", "esam": "#009E73", "at": "#D55E00",
           "sam+at": "#CC79A7", "awp": "#E69F00"}  # Okabe and Ito (2008): apart for every kind of eye
RULES = """\
- **C1**, SAM alone is more robust than SGD and as accurate: some rho gains over two standard errors under every attack
  and loses at most 0.5 clean.
- **C2**, AT is the most robust and costs accuracy: the most robust AT gains over two standard errors on every SGD and
  SAM row under every attack and loses over 0.5 clean against SGD.
- **C3**, SAM is the gentler of two duals: mean robust accuracy rises from SGD over the best SAM to the best AT, clean
  accuracy falls from that SAM to that AT.
- **C4**, the simplified model is solved: search and training end within 3% of the closed forms.
- **C5**, it holds for variants, networks and data: here, C1's rule for every ASAM and ESAM row; see the other tables.
- **C6**, SAM is the cheap one: every SAM row trains faster than every AT row."""
RECIPE = ["sgd", *(f"sam rho 0.{r}" for r in (1, 2, 3, 4)), *(f"at linf {eps}/255" for eps in (1, 2, 4, 8)),
          *(f"at l2 {eps}/255" for eps in (16, 32, 64, 128))]  # the papers' rows: what run_all.sh trains


def command_of(settings, evaluation):
    """The command that makes a run, whatever the presets say. A folder's place is not part of the run: it stays DIR."""
    keys = ("dataset", "model", "width", "method", "rho", "esam_beta", "esam_gamma", "awp_gamma", "eps", "norm",
            "attack_steps", "epochs", "batch_size", "optimizer", "lr", "batchnorm", "precision", "seed", "device")
    flags = {key: settings[key] for key in keys if settings.get(key) is not None} | evaluation
    if "eps" in flags and parse_radius(show_radius(flags["eps"])) == flags["eps"]:
        flags["eps"] = show_radius(flags["eps"])  # readable, where it is exact
    sync = " --sync-ascent" if settings.get("sync_ascent") else ""
    flags["attacks"] = " ".join(f"'{name}'" for name in evaluation["attacks"])
    if settings["dataset"] in ("folder", "tiny-imagenet"):
        flags["data_dir"] = "DIR"
    flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in flags.items())
    return f"python sam_at.py {flags} --{'' if settings['compile'] else 'no-'}compile{sync}"


def gather_records(runs):
    """The kept records and those of the finished runs in the folder `runs`, which win; in a fixed order."""
    def place(r):
        settings = r["settings"]
        return (*map(str, setting_of(r)), list(METHODS).index(settings["method"]), settings.get("norm", ""),
                settings.get("eps", 0), settings.get("rho", 0), settings["seed"], r["name"])

    found = [load_record(path) for path in Path(runs).glob("*/record.json")]
    with refused(f"{RECORDS} or {runs}: not records of this program; restore or move them away"):
        kept = [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []
        records = sorted({r["name"]: r for r in kept + found if r["finished"]}.values(), key=place)
    if not records:
        raise BadInput(f"no finished runs: neither in {runs} nor in {RECORDS}")
    return records


def setting_of(record):
    """What runs must share to stand in one table: data, network, recipe and evaluation."""
    settings = record["settings"]
    keys = "dataset", "data_sha256", "model", "width", "epochs", "batch_size", "lr", "precision"
    return *(settings[key] for key in keys), settings.get("optimizer", "sgd"), json.dumps(record["evaluation"])


def grouped(records, key=lambda r: label_of(r["settings"])):
    """{key(record): [records]}, in the order of first appearance."""
    groups = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def mean_and_error(runs, attack):
    """Accuracy in percent, "clean" or under an attack: mean over seeds, standard deviation, error of the mean, which is
    the larger of the seeds', deviation / sqrt(seeds), and the test set's, sqrt(a (100 - a) / images)."""
    values = [r["clean"] if attack == "clean" else r["robust"][attack] for r in runs]
    a, deviation = fmean(values), stdev(values) if len(values) > 1 else 0.0
    return a, deviation, max(deviation / math.sqrt(len(values)), math.sqrt(a * (100 - a) / images_of(runs[0])))


def images_of(record):
    """How many images the accuracies of a record are of."""
    return min(record["evaluation"].get("images", record["test_images"]), record["test_images"])


def verdicts(rows):
    """[(claim, sentence)] for one table, by RULES; rows: {label: runs}."""
    attacks = list(next(iter(rows.values()))[0]["robust"])
    plain = [label for label in rows if "BatchNorm" not in label]  # --batchnorm's rows are there to compare
    sgd, sam, at = ([label for label in plain if label.split()[0] == method] for method in ("sgd", "sam", "at"))
    variants = [label for label in plain if label.split()[0] in ("asam", "esam")]
    robust = {label: fmean(mean_and_error(runs, a)[0] for a in attacks) for label, runs in rows.items()}
    seconds = {label: fmean(r["seconds"] for r in runs) for label, runs in rows.items()}

    def gain(a, b, attack="clean"):
        (x, _, ex), (y, _, ey) = mean_and_error(rows[a], attack), mean_and_error(rows[b], attack)
        return x - y, x - y > 2 * math.hypot(ex, ey)

    def wins(a, b):
        return sum(gain(a, b, attack)[1] for attack in attacks)

    def verdict(holds, *facts):
        return ("holds" if holds else "does not hold here") + f" ({'; '.join(facts)})"

    n, found = len(attacks), dict.fromkeys(("C1", "C2", "C3", "C5", "C6"), "not run")
    for claim, every, those in ("C1", any, sam), ("C5", all, variants):
        if sgd and those:
            found[claim] = verdict(every(wins(a, "sgd") == n and gain(a, "sgd")[0] >= -0.5 for a in those), *(
                f"{a}: ahead under {wins(a, 'sgd')} of {n} attacks, mean robust {robust[a] - robust['sgd']:+.1f}, "
                f"clean {gain(a, 'sgd')[0]:+.1f}" for a in those))
    if sgd and sam and at:
        best, gentle = max(at, key=robust.get), max(sam, key=robust.get)
        ahead, cost = sum(all(gain(best, b, a)[1] for b in sgd + sam) for a in attacks), gain(best, "sgd")[0]
        found["C2"] = verdict(ahead == n and cost < -0.5,
                              f"{best}: ahead of every SGD and SAM row under {ahead} of {n} attacks, clean {cost:+.1f}")
        found["C3"] = verdict(
            robust["sgd"] < robust[gentle] < robust[best] and gain(gentle, best)[0] > 0,
            "mean robust " + ", ".join(f"{a} {robust[a]:.1f}" for a in ("sgd", gentle, best)),
            f"clean of {gentle} against {best} {gain(gentle, best)[0]:+.1f}")
        found["C6"] = verdict(
            max(seconds[a] for a in sam) < min(seconds[a] for a in at),
            "training time over SGD's: " + ", ".join(f"{a} {seconds[a] / seconds['sgd']:.1f}" for a in sam + at))
    return list(found.items())


def markdown(header, rows):
    """A table of cells, the first column to the left, the others to the right."""
    return ["| " + " | ".join(row) + " |" for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]


def accuracies(rows, *more):
    """The lines of a table of accuracies; rows: {label: runs}; more: (name of a column, its cell for some runs)."""
    columns = "clean", *next(iter(rows.values()))[0]["robust"]
    cells = []
    for label, runs in rows.items():
        figures = [mean_and_error(runs, column)[:2] for column in columns]
        cells.append([label, str(len(runs)), *(f"{a:.1f}" + f" ± {b:.1f}" * (len(runs) > 1) for a, b in figures),
                      *(cell(runs) for _, cell in more)])
    return markdown(["method", "seeds", *columns, *(name for name, _ in more)], cells)


def section(runs):
    """The lines of RESULTS.md on runs that share a setting: table, verdicts, other attacks, doubts, commands."""
    first, rows = runs[0], grouped(runs)
    settings = first["settings"]

    def all_of(key):
        return ", ".join(sorted({str(r.get(key) or r["settings"].get(key)) for r in runs}))

    width = f" of width {settings['width']}" if settings["width"] else ""
    out = ["", f"## {first['data']}; {settings['model']}{width}, {settings['epochs']} epochs", "",
           f"Machine: {all_of('machine')}. Torch {all_of('torch')}, training in {all_of('precision')}, batch "
           f"{settings['batch_size']}, learning rate {settings['lr']:g}. Run on {all_of('date')}. Attacks: "
           f"{show_evaluation(first)}.", ""]
    out += accuracies(rows, ("train s", lambda runs: f"{fmean(r['seconds'] for r in runs):.1f}"))
    out += ["", "Not run: " + (", ".join(label for label in RECIPE if label not in rows) or "nothing") + ".", ""]
    out += [*(f"- **{claim}** {text}." for claim, text in verdicts(rows)), ""]
    more = [r | e for r in runs for e in evaluations(r)[1:]]
    for other in grouped(more, lambda r: json.dumps(r["evaluation"])).values():
        out += [f"The same models under {show_evaluation(other[0])}:", "", *accuracies(grouped(other)), ""]
    for label, of_label in grouped(runs + more).items():
        doubts = [f"seed {r['settings']['seed']}, {doubt}" for r in of_label for doubt in r["warnings"]]
        out += [f"- Doubts about {label}: {'; '.join(doubts)}."] * bool(doubts)
    commands = [command_of(r["settings"], r["evaluation"]) for r, *_ in rows.values()]
    return [*out, "", "Commands, for the first seed of each row:", "", "```", *commands, "```"]


def report(records, theory=()):
    """RESULTS.md as text, from records and from the rows of run_theory."""
    out = ["# Results", "", "Written by `python sam_at.py --report` from the records of finished runs; do not edit.",
           "Accuracies are in percent: the mean over seeds, ± their standard deviation where there are several.", ""]
    notes = {r["data"]: r["data_note"] for r in records if r.get("data_note")}
    out += [f"**{name}**: {note}\n" for name, note in notes.items()]
    out += ["Rules of the verdicts; the error of a mean is the larger of the seeds' and the test set's:", "", RULES]
    for runs in grouped(records, setting_of).values():
        out += section(runs)
    for dataset in "cifar10", "cifar100":
        if not any(r["settings"]["dataset"] == dataset for r in records):
            out += ["", f"## {dataset}; prn18, 100 epochs", "", f"Not run: {', '.join(RECIPE)}. `./run_all.sh` trains "
                    "and attacks them on a GPU; `./run_all.sh --dry-run` says how long that takes there."]
    out += ["", "## The simplified model: weight on the robust feature", ""]
    if not theory:
        return "\n".join([*out, "- **C4** not run: `python sam_at.py --theory`."]) + "\n"
    apart = 100 * max(abs(r[key] / r["closed_form"] - 1) for r in theory for key in ("numerical", "trained"))
    out += markdown(["training", "radius", "closed form", "numerical", "trained"],
                    [[name, *(f"{value:.3f}" for value in values)] for name, *values in map(dict.values, theory)])
    out += ["", f"- **C4** {'holds' if apart < 3 else 'does not hold here'} (at most {apart:.1f}% apart)."]
    return "\n".join(out) + "\n"


def show_evaluation(record):
    """"PGD-10 from 1 start(s), 1000 images", or the names of outside attacks."""
    asked = record["evaluation"]
    ours = any(name.split()[0] in ("linf", "l2") for name in asked["attacks"])
    how = f"PGD-{asked['eval_steps']} from {asked['restarts']} start(s)" if ours else ", ".join(asked["attacks"])
    return f"{how}, {images_of(record)} images"


def run_report(s):
    """Write RESULTS.md, and keep the records that it came from."""
    records = gather_records(s.runs)
    with refused(f"{THEORY} or {RECORDS}: not written by this program; restore or move them away"):
        text = report(records, json.loads(THEORY.read_text()) if THEORY.exists() else ())
    write_whole(RECORDS, "".join(json.dumps(r) + "\n" for r in records))
    write_whole("RESULTS.md", text)
    print(f"RESULTS.md and {RECORDS}: {len(records)} runs")
    return records


def save_picture(name, draw, *arguments, title=""):
    """Save what draw(pyplot, ..) draws, if anything, as results/NAME; without matplotlib, print a line that says so."""
    if not find_spec("matplotlib"):
        print("no picture without matplotlib: pip install matplotlib")
        return
    from matplotlib import pyplot
    pyplot.switch_backend("Agg")
    pyplot.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False, "savefig.dpi": 110,
                            "savefig.bbox": "tight"})
    draw(pyplot, *arguments)
    if pyplot.get_fignums():
        RECORDS.parent.mkdir(exist_ok=True)
        pyplot.suptitle(title)
        pyplot.savefig(RECORDS.parent / name)
        pyplot.close()
        print(RECORDS.parent / name)


def run_pictures(s):
    """Draw results/*.png from the records, and from the checkpoints that are there. Needs matplotlib."""
    for setting, runs in grouped(gather_records(s.runs), setting_of).items():
        settings = runs[0]["settings"]
        title = f"{runs[0]['data'].split(' (')[0]}, {settings['model']}, {settings['epochs']} epochs"
        name = "-".join(str(settings[key]) for key in ("dataset", "model", "width", "epochs") if settings[key])
        name += "-" + hashlib.sha256(repr(setting).encode()).hexdigest()[:4]  # or it would be another recipe's picture
        for draw in draw_tradeoff, draw_curves, draw_attacked:
            save_picture(f"{draw.__name__.removeprefix('draw_')}-{name}.png", draw, s, runs, title=title)
    return []


def draw_tradeoff(pyplot, s, runs):
    """Clean against robust accuracy, a panel for each attack, a point for each run: the first seed's with its radius
    beside it, the others paler. Rows of --batchnorm are left out."""
    rows, attacks = grouped(r for r in runs if "batchnorm" not in r["settings"]), list(runs[0]["robust"])
    markers = dict(zip(METHODS, [("o", 30), ("^", 60), (">", 60), ("v", 60), ("s", 110), ("D", 90), ("p", 120)]))
    high = -(-len(attacks) // 2)
    _, axes = pyplot.subplots(high, 2, figsize=(10, 3.5 * high), sharey=True, squeeze=False, layout="constrained")
    for axis, attack in zip(axes.flat, attacks):
        axis.set(xlabel=f"accuracy under {attack}, %", ylabel="clean accuracy, %")
        labels = {}  # points that all but coincide share a label
        for label, of_label in rows.items():
            method, _, radius = label.partition(" ")
            points, (marker, size) = [(r["robust"][attack], r["clean"]) for r in of_label], markers[method]
            for some, alpha in (points[1:], 0.35), (points[:1], 1.0):
                axis.scatter([x for x, _ in some], [y for _, y in some], marker=marker, s=size, alpha=alpha,
                             facecolors="none", edgecolors=COLOURS[method], linewidths=1.5)
            place = next((at for at in labels if math.dist(at, points[0]) < 1), points[0])  # a point of accuracy
            labels.setdefault(place, []).append(radius.replace("rho ", ""))
        for at, radii in labels.items():
            right = at[0] > fmean(axis.get_xlim())
            axis.annotate(textwrap.fill(", ".join(filter(None, dict.fromkeys(radii))), 40), at, fontsize=7,
                          textcoords="offset points", xytext=(-7 if right else 7, 7), ha="right" if right else "left")
    for method in dict.fromkeys(label.split()[0] for label in rows):
        marker, _ = markers[method]
        axes[0][0].plot([], [], marker, mfc="none", color=COLOURS[method], label=method.upper())
    axes[0][0].legend(fontsize=9)


def draw_curves(pyplot, s, runs):
    """Training loss and accuracy by epoch, the first seed of each row; paler lines are larger radii."""
    _, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for method, of_method in grouped(runs, lambda r: r["settings"]["method"]).items():
        rows = grouped(of_method)
        for i, (label, (first, *_)) in enumerate(rows.items()):
            for axis, quantity, unit in (axes[0], "loss", "nats"), (axes[1], "accuracy", "%"):
                axis.plot([row["epoch"] for row in first["log"]], [row[quantity] for row in first["log"]], label=label,
                          color=COLOURS[method], alpha=1 - 0.7 * i / len(rows))
                axis.set(xlabel="epoch", ylabel=f"training {quantity}, {unit}")
    axes[1].legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_attacked(pyplot, s, runs, eps=8 / 255, shown=4):
    """Images, and for a model each of SGD, SAM and AT that left a checkpoint: attacked, and delta enlarged."""
    settings, found = runs[0]["settings"], {}
    for r in runs:
        path, method = Path(s.runs) / r["name"] / "checkpoint.pt", r["settings"]["method"]
        if path.exists() and method in ("sgd", "sam", "at"):
            found.setdefault(method, path)
    if not found or (settings["dataset"] in ("folder", "tiny-imagenet")) != s.data_dir_given:
        return  # a folder only where it is named
    data = load_data(settings["dataset"], s.data_dir)
    x, y = spaced([data.x_test, data.y_test], shown)
    x = to_pixels(x)
    columns = [("image", x)]
    for path in found.values():
        state, model = load_model(path, data, "cpu")
        x_adv = pgd(model, x, y, eps, random_start=False)
        columns += [(f"{label_of(state['settings'])},\nunder linf {show_radius(eps)}", x_adv),
                    (f"its delta,\nx {0.5 / eps:.0f}", (0.5 + (x_adv - x) / (2 * eps)).clamp(0, 1))]
    _, axes = pyplot.subplots(shown, len(columns), figsize=(1.6 * len(columns), 1.6 * shown + 0.8))
    for j, (name, images) in enumerate(columns):
        axes[0][j].set_title(name, fontsize=9)
        for axis, image in zip(axes[:, j], images):
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set_axis_off()


# == 16. The command line =======================================================================================

DATASETS = "demo", "cifar10", "cifar100", "tiny-imagenet", "folder"
OUTSIDE = {"autoattack": "AutoAttack", "cw": "CW", "apgdt": "APGDT", "fab": "FAB", "square": "Square", "pixle": "Pixle"}
PRESETS = {  # every setting that differs between the two
    "demo": {"dataset": "demo", "model": "small", "epochs": 15, "eps": {"linf": 4 / 255, "l2": 128 / 255}},
    "paper": {"dataset": "cifar10", "model": "prn18", "epochs": 100, "eps": {"linf": 8 / 255, "l2": 128 / 255}},
}


class Method(NamedTuple):
    step: object    # settings -> step(model, x, y, optimizer), the radius filled in
    keys: tuple     # the settings that belong to it
    passes: object  # settings -> what a step costs, in forward passes


AT_KEYS = "norm", "eps", "attack_steps"
METHODS = {
    "sgd": Method(lambda s: sgd_step, (), lambda s: 3),
    "sam": Method(lambda s: partial(sam_step, rho=s.rho), ("rho",), lambda s: 6),
    "asam": Method(lambda s: partial(sam_step, rho=s.rho, ascend=adaptive_ascent), ("rho",), lambda s: 6),
    "esam": Method(lambda s: partial(esam_step, rho=s.rho, beta=s.esam_beta, gamma=s.esam_gamma),
                   ("rho", "esam_beta", "esam_gamma"), lambda s: 3 + s.esam_beta + 3 * s.esam_gamma),
    "at": Method(lambda s: attacked(s, sgd_step), AT_KEYS, lambda s: 2 * s.attack_steps + 3),
    "sam+at": Method(lambda s: attacked(s, partial(sam_step, rho=s.rho)), ("rho", *AT_KEYS),
                     lambda s: 2 * s.attack_steps + 6),
    "awp": Method(lambda s: attacked(s, partial(sam_step, rho=s.awp_gamma, ascend=layerwise_ascent)),
                  ("awp_gamma", *AT_KEYS), lambda s: 2 * s.attack_steps + 6),
}


def attacked(s, step):
    """A step on images attacked as the settings say; with several processes, from starts that are not all the same."""
    def on_attacked(model, x, y, optimizer):
        generator = None  # torch's own
        if world() > 1:
            seed = int(torch.randint(2 ** 60, ())) + rank()  # the first term is the same in all processes
            generator = torch.Generator(x.device).manual_seed(seed)
        return at_step(model, x, y, optimizer, s.eps, norm=s.norm, steps=s.attack_steps, step=step, generator=generator)
    return on_attacked


def parse_attack(name):
    """"linf 8/255", "l2 0.5 margin", "fgsm" (8/255, one full step) -> arguments of withstands; "autoattack l2 0.5",
    "square 8/255", "torchattacks:BIM" or so, norm and radius optional -> arguments of outside. Raises ValueError."""
    kind, *rest = name.split() or [""]
    if kind in OUTSIDE or kind.startswith("torchattacks:"):
        attack = OUTSIDE.get(kind, kind.partition(":")[2])
        takes = inspect.signature(outside_class(attack)).parameters
        norm = rest.pop(0) if rest and rest[0] in ("linf", "l2") else None
        eps = parse_radius(rest.pop(0)) if rest else None
        if rest or (norm and "norm" not in takes) or (eps and "eps" not in takes):
            raise BadInput(f"attack {name!r}: torchattacks' {attack} does not take all of that")
        return {"attack": attack, "norm": norm, "eps": eps}
    if kind == "fgsm" and len(rest) < 2:
        eps = parse_radius(rest[0] if rest else "8/255")
        return {"norm": "linf", "eps": eps, "steps": 1, "step_size": eps, "random_start": False}
    if kind not in ("linf", "l2") or not rest or rest[1:] not in ([], ["margin"]):
        raise BadInput(f"unknown attack {name!r}: expected 'linf 8/255', 'l2 32/255', either with 'margin' behind it, "
                       f"'fgsm 8/255', torchattacks:NAME or one of {', '.join(OUTSIDE)}")
    return {"norm": kind, "eps": parse_radius(rest[0]), "loss": margin if rest[1:] else cross_entropy}


def parse_radius(text):
    """A radius in pixel units, "8/255" or "0.03", as a float. Raises ValueError unless it lies in (0, 1)."""
    numerator, slash, denominator = text.partition("/")
    try:
        eps = float(numerator) / (float(denominator) if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise BadInput(f"radius {text!r} is not a number: write it as 8/255 or 0.03") from None
    if not 0 < eps < 1:
        hint = f": pixels are in [0,1], so did you mean {text}/255?" if eps >= 1 and not slash else ""
        raise BadInput(f"radius {text} is outside (0, 1){hint}")
    return eps


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def number(kind, low, most=None):
    """An argparse type: an int or float from `low` to `most`, or to what torch can take."""
    most = most or (2 ** 63 - 1 if kind is int else 1e30)

    def parse(text):
        if not low <= kind(text) <= most:  # nan is not
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {most:g}")
        return kind(text)

    parse.__name__ = kind.__name__  # for argparse's "invalid float value: 'big'"
    return parse


def show_radius(eps):
    """0.0314 -> "8/255"; a radius that is no multiple of 1/255 as a decimal."""
    return f"{eps * 255:.0f}/255" if abs(eps * 255 - round(eps * 255)) < 1e-6 else f"{eps:g}"


def parse_args(argv):
    """The settings of a run: flags over preset. Raises BadInput."""
    parser = Parser(prog="sam_at.py", allow_abbrev=False,
                    description="Train with SGD, SAM and AT, and attack what came of it.")
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    flag = parser.add_argument_group("what to run").add_argument
    flag("--preset", choices=list(PRESETS), default="paper" if gpus else "demo",
         help="demo: embedded data, small network, CPU; paper: CIFAR-10, PreActResNet-18, GPU; any other flag "
              "overrides its preset's value (default: paper where CUDA is there, otherwise demo)")
    flag("--method", nargs="+", choices=list(METHODS), default=["sgd", "sam", "at"], metavar="METHOD",
         help=f"one or several of {', '.join(METHODS)} (default: sgd sam at)")
    flag("--seed", type=number(int, 0), help="of weights, batches and attacks (default: 0, with --eval the run's)")
    flag("--device", choices=["cpu", *(["cuda"] if gpus else []), *gpus, *["mps"] * torch.backends.mps.is_available()],
         default="cuda" if gpus else "cpu", help="(default: cuda where it is there, otherwise cpu)")
    flag("--runs", metavar="DIR", default="runs", help="where the runs' folders go (default: runs)")
    flag("--fresh", action="store_true", help="start over, rather than go on or report a finished run")
    flag("--json", metavar="FILE", help="write the final table there, as a list of rows")
    flag = parser.add_argument_group("instead of training").add_mutually_exclusive_group().add_argument
    mode = partial(flag, dest="mode", action="store_const")
    flag("--eval", metavar="CHECKPOINT", help="attack the model in runs/NAME/checkpoint.pt")
    mode("--benchmark", const=run_benchmark, help="time a step of each method: what SAM and AT cost on this device")
    mode("--theory", const=run_theory, help="the simplified model, solved, searched and trained; its picture")
    flag("--sharpness", nargs="+", metavar="CHECKPOINT", help="how far the loss of saved models rises around their "
         "weights and around their inputs (--norm), and how far their features move; its picture")
    mode("--report", const=run_report, help="write RESULTS.md from the records in runs/ and results/records.jsonl")
    mode("--pictures", const=run_pictures, help="draw results/*.png from the same records (needs matplotlib)")
    flag = parser.add_argument_group("radii (pixels are in [0,1])").add_argument
    flag("--rho", type=number(float, 0), default=0.2, help="SAM's, over weights; asam wants 10 times it (default: 0.2)")
    flag("--eps", type=parse_radius, help="AT's, over pixels, as 8/255 or 0.03 "
         "(default: preset demo: 4/255, paper: 8/255; 128/255 with --norm l2)")
    flag("--norm", choices=["linf", "l2"], default="linf", help="AT's norm (default: linf)")
    flag("--attack-steps", type=number(int, 1), default=5, help="AT's attack steps, each of eps/4 (default: 5)")
    share = number(float, 1e-6, most=1)
    flag("--esam-beta", type=share, default=0.5, help="share of the weights that ascend in esam (default: 0.5)")
    flag("--esam-gamma", type=share, default=0.5, help="share of the images in its second pass (default: 0.5)")
    flag("--awp-gamma", type=number(float, 0), default=0.005, help="awp's radius over a layer's norm (default: 0.005)")
    flag = parser.add_argument_group("evaluation").add_argument
    flag("--attacks", nargs="+", default=list(ATTACKS), metavar="ATTACK",
         help=f"'linf EPS', 'l2 EPS', either with 'margin' behind it for that loss, 'fgsm EPS'; with torchattacks "
              f"{', '.join(OUTSIDE)}, torchattacks:NAME, as in 'autoattack l2 0.5' (default: {', '.join(ATTACKS)})")
    flag("--eval-steps", type=number(int, 1), default=10, help="PGD steps, each of eps/4 (default: 10)")
    flag("--restarts", type=number(int, 1), default=1, help="random starts; an image must withstand all (default: 1)")
    flag("--images", type=number(int, 1), help="test images to attack, evenly spaced (default: all)")
    flag("--corruptions", metavar="DIR", help="with --eval: accuracy on the *.npy of CIFAR-10-C in DIR instead")
    flag = parser.add_argument_group("data and network").add_argument
    flag("--dataset", choices=DATASETS, help="(default: preset demo: demo, paper: cifar10)")
    flag("--data-dir", metavar="DIR", help="where CIFAR is or goes (default: data); for folder, the one with "
         "train/CLASS/ and test/CLASS/; for tiny-imagenet, the one that its archive makes")
    flag("--model", choices=list(MODELS), help="(default: preset demo: small, paper: prn18)")
    flag("--width", type=number(int, 1), help="channels of the first layer (default: small and wrn28_10: 16, "
         "prn18: 64, deit_ti: 192, always a multiple of 3)")
    flag = parser.add_argument_group("training").add_argument
    flag("--epochs", type=number(int, 1), help="(default: preset demo: 15, paper: 100)")
    flag("--batch-size", type=number(int, 1), default=128, help="(default: 128)")
    flag("--precision", choices=["auto", "fp32", "bf16"], default="auto",
         help="of training; evaluation is always fp32 (default: auto, bf16 where the device multiplies in it)")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the network for training (default: on "
         "for CUDA and 20 epochs or more)")
    flag("--optimizer", choices=list(OPTIMIZERS), help="(default: sgd; deit_ti: adamw)")
    flag("--lr", type=number(float, 1e-12), help="learning rate; a tenth of it from 75%% of the epochs, a hundredth "
         "from 90%% (default: 0.1; adam and adamw: 0.001)")
    flag("--batchnorm", choices=["once", "always", "synced"], default="once", help="its running statistics move once "
         "a step; or in SAM's second pass and in attack steps too, as in the authors' code; or once, over all CUDA "
         "devices of torchrun together (default: once)")
    flag("--sync-ascent", action="store_true", help="under torchrun: one ascent of SAM for the whole batch")

    s = parser.parse_args(argv)
    s.mode = s.mode or (run_eval if s.eval is not None else run_sharpness if s.sharpness else run_training)
    if s.mode in (run_eval, run_sharpness):
        saved = load_checkpoint(s.eval or s.sharpness[0])["settings"]
        s.dataset, s.seed = s.dataset or saved["dataset"], saved["seed"] if s.seed is None else s.seed
    for key, value in PRESETS[s.preset].items():
        if getattr(s, key) is None:
            setattr(s, key, value[s.norm] if isinstance(value, dict) else value)
    for name in s.attacks:
        parse_attack(name)  # raises, if it makes no sense
    s.method, s.seed = list(dict.fromkeys(s.method)), s.seed or 0
    s.optimizer = s.optimizer or ("adamw" if s.model == "deit_ti" else "sgd")
    s.lr = s.lr or (0.1 if s.optimizer == "sgd" else 1e-3)
    s.evaluation = {"attacks": s.attacks, "eval_steps": s.eval_steps, "restarts": s.restarts}
    s.evaluation |= {"images": s.images} if s.images else {}  # two evaluations are the same if these are the same
    s.data_dir_given = s.data_dir is not None
    s.data_dir = s.data_dir or "data"
    s.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if s.device == "cuda" else s.device)
    keep_freed_memory()
    if on_cuda := s.device.type == "cuda":
        torch.cuda.set_device(s.device)  # so that whatever asks for "the" GPU means this one
        torch.backends.cudnn.allow_tf32 = False  # torch's default, TF32, rounds the inputs of convolutions to 10 bits
    if s.compile is None:  # compiling takes a minute or two; on the CPU it gained nothing (1.08 s a step either way)
        s.compile = on_cuda and s.epochs >= 20 and s.mode is not run_benchmark and can_compile()
    if s.precision == "auto":
        s.precision = "bf16" if has_bf16(s.device) else "fp32"
    runs = next(p for p in (Path(s.runs), *Path(s.runs).absolute().parents) if p.exists())
    for wrong, message in (
            (s.model == "deit_ti" and (s.width or 0) % 3, f"--width {s.width}: deit_ti needs a multiple of 3"),
            (s.dataset in ("folder", "tiny-imagenet") and not s.data_dir_given, f"{s.dataset} needs --data-dir DIR"),
            (s.batchnorm == "synced" and not on_cuda, "--batchnorm synced needs CUDA devices"),
            (s.sync_ascent and "esam" in s.method, "--sync-ascent: each device ascends on random weights in esam"),
            (s.corruptions and not s.eval, "--corruptions needs --eval CHECKPOINT"),
            (s.mode is run_pictures and not find_spec("matplotlib"),
             "pictures need matplotlib: pip install matplotlib"),
            (s.json and not json_can_go(Path(s.json)), f"--json {s.json}: no place to write, or not written by --json"),
            (s.mode is run_training and not (runs.is_dir() and os.access(runs, os.W_OK)),
             f"--runs {s.runs}: cannot write there")):
        if wrong:
            raise BadInput(message)
    return s


def has_bf16(device):
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(cpu.get(name) for name in ("avx512_bf16", "amx_bf16"))


def can_compile():
    """Whether there is what Triton builds its launcher with: a C compiler and Python's header."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return header.exists() and any(os.environ.get("CC") or shutil.which(name) for name in ("gcc", "clang"))


def keep_freed_memory():
    """On Linux, let freed memory stay with the process. By default large pieces go back to the kernel, and each step
    pays for clean pages anew: 3% of its time for PRN-18 on two cores, 10% at width 8."""
    with suppress(AttributeError, OSError, TypeError):  # another system's C library has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0), mallopt(-1, 2 ** 31 - 1)  # M_MMAP_MAX: no mappings for single pieces; M_TRIM_THRESHOLD


def json_can_go(path):
    """Asked before hours of training: whether --json can write there, over nothing but what it wrote."""
    if path.is_symlink() or path.exists() and not path.is_file():
        return False
    try:
        old = json.loads(path.read_text() or "[]") if path.exists() else []
    except (OSError, ValueError):
        return False
    return isinstance(old, list) and path.parent.is_dir() and os.access(path.parent, os.W_OK)


def show_results(records, s):
    """Print what runs end with: accuracies, training time and its ratio to SGD's, warnings. Returns the rows."""
    rows = [{"method": r["settings"]["method"], "clean": r["clean"], "robust": r["robust"], "seconds": r["seconds"]}
            for r in records]
    base = next((r["seconds"] for r in rows if r["method"] == "sgd"), None)
    cells = [[r["method"], *(f"{a:.1f}" for a in (r["clean"], *r["robust"].values())), f"{r['seconds']:.1f} s",
              f"{r['seconds'] / base:.1f}" if base else "-"] for r in rows]
    starts = f" from each of {s.restarts} starts" if s.restarts > 1 else ""
    under = f"PGD-{s.eval_steps}{starts}" if any(name.startswith(("linf", "l2")) for name in s.attacks) else "attack"
    print(f"\naccuracy in percent, clean and under {under}")
    print(align([["method", "clean", *rows[0]["robust"], "train time", "x SGD"], *cells]))
    for r in records:
        for doubt in r["warnings"]:
            print(f"warning: {label_of(r['settings'])}: {doubt}")
    return rows


def align(cells):
    """Rows of cells as text, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells)


def run_training(s):
    """Train and attack every method asked for; print the table and return its rows."""
    other = "paper" if s.preset == "demo" else "demo"
    print(f"preset {s.preset}; for the other: --preset {other} (default: paper with CUDA, otherwise demo)", flush=True)
    if rank():
        wait_for_first()  # it may have to download
    data = load_data(s.dataset, s.data_dir)
    if not rank():
        wait_for_first()
    if s.batch_size % world():
        raise BadInput(f"--batch-size {s.batch_size} cannot be shared by {world()} processes")
    if s.batch_size > len(data.x):
        raise BadInput(f"--batch-size {s.batch_size} is larger than the {len(data.x)} training images")
    print(f"data: {data.source}; network: {s.model}; device: {s.device}, {s.precision}", flush=True)
    data = data._replace(**{key: getattr(data, key).to(s.device) for key in ("x", "y", "x_test", "y_test")})
    return show_results([run_method(method, s, data) for method in s.method], s)


def run_eval(s):
    """Attack a saved model, or show it corrupted images; print a table and return its rows."""
    if s.corruptions:
        state, model = load_model(s.eval, None, s.device)
        found = corrupted(model, s.corruptions)
        cells = [[name, *(f"{a:.1f}" for a in (*five, fmean(five)))] for name, five in found.items()]
        print(f"{s.eval}: {label_of(state['settings'])}, accuracy in percent by severity")
        print(align([["corruption", *"12345", "mean"], *cells]))
        return [{"corruption": name, "severity": five, "mean": fmean(five)} for name, five in found.items()]
    data = load_data(s.dataset, s.data_dir)
    state, model = load_model(s.eval, data, s.device)
    print(f"{s.eval}: {label_of(state['settings'])} after {len(state['log'])} epochs; data: {data.source}", flush=True)
    record, seconds = record_of(s.eval, model, data), sum(row["seconds"] for row in state["log"])
    found = assess(model, data, s)
    if s.seed != state["settings"]["seed"]:
        found["evaluation"] = s.evaluation | {"seed": s.seed}
    rows = show_results([{"settings": state["settings"], "seconds": seconds} | found], s)
    if record and found["evaluation"] != record["evaluation"]:
        others = [e for e in evaluations(record)[1:] if e["evaluation"] != found["evaluation"]]
        save_record(Path(s.eval).parent, record | {"more": [*others, found]})
        print(f"kept in {Path(s.eval).parent / 'record.json'}")
    return rows


def main(argv=None):
    """The command line. Returns the exit code: 0, 2 after one line about bad input, 130 after Ctrl-C."""
    try:
        s = parse_args(argv)
        start_processes(s)
        rows = s.mode(s) if s.mode in (run_training, run_eval) or not rank() else []
        if s.json:
            write_whole(s.json, json.dumps(rows, indent=1) + "\n")
        stop_processes()
        return 0
    except (BadInput, Diverged, OSError) as error:  # OSError: a full disk, a folder that is not there
        code, message = 2, error
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        code, message = 2, "out of memory; try a smaller --batch-size or --width"
    except KeyboardInterrupt:
        code, message = 130, "interrupted; the same command (without --fresh) goes on after the last whole epoch"
    except SystemExit as stop:  # argparse, after --help
        return stop.code or 0
    if os.environ.get("RANK", "0") == "0":  # under torchrun, one line for all processes
        print(f"sam_at.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
