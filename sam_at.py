"""Sharpness-aware minimization (SAM) and adversarial training (AT), side by side in one file.

Two papers ask whether a network that is flat around its weights is also flat around its inputs:
  [1] Sharpness-Aware Minimization Alone can Improve Adversarial Robustness, ICML 2023 workshop, arXiv 2305.05392
  [2] On the Duality Between Sharpness-Aware Minimization and Adversarial Training, ICML 2024, arXiv 2402.15152

Standard training minimises the loss L(w; x, y) over the weights w. The other two put a maximum inside:

    SAM   min_w  max_{|v|_2 <= rho}      L(w + v; x, y)           the worst weights near w
    AT    min_w  max_{|delta|_p <= eps}  L(w; x + delta, y)       the worst input near x

They are dual: the same maximum, once over weights and once over inputs. [1, 2] find that SAM, which never
sees an attacked image, still gains robustness, and unlike AT does so without losing clean accuracy.

    python sam_at.py                          train with SGD, SAM and AT, attack all three, print one table
    python sam_at.py --method sam             one of them
    python sam_at.py --preset demo            embedded data and a small network: a minute on a laptop
    python sam_at.py --preset paper           the papers' CIFAR-10 recipe; wants a GPU
    python sam_at.py --help                   everything else

Read from the top: 1 input space, 2 weight space, 3 the three training steps, 4 networks, 5 data, 6 the training
loop, 7 evaluation. What follows can wait: 8 where the data comes from, 9 what a step costs, 10 the command line.

Units everywhere: pixels are in [0,1], eps and delta in the same unit (so 8/255, not 8), rho in the unit of the
weights. x: float images (N, C, H, W) or any (N, ...). y: integer labels (N,). logits: (N, classes).
"""
import argparse
import json
import math
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------------------------
# 1. Input space: the threat model and the attacks
#
#    An attacker may add any delta with |delta|_p <= eps, as long as x + delta is still an image in [0,1].
#    PGD looks for the worst one: step along the loss gradient, project back onto the ball, repeat.
# ---------------------------------------------------------------------------------------------------------------


def l2_norm(t):
    """One l2 norm an image: (N, ...) -> (N, 1, ...)."""
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
    """Shorten delta until x + delta is an image, with pixels in [0,1]. It stays in the ball, since x is an image."""
    return (x + delta).clamp(0, 1) - x


def pgd_step(model, x, y, delta, eps, step_size, norm):
    """One step of steepest ascent in the input:  delta <- P_eps(delta + step_size * g/|g|),  g = dL/ddelta.

    Returns the next delta, and the logits at the one that came in.
    """
    delta = delta.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x + delta)
        loss = F.cross_entropy(logits, y, reduction="sum")  # a sum: each image's gradient is its own
    g, = torch.autograd.grad(loss, delta)
    delta = project(delta.detach() + step_size * steepest(g, norm), eps, norm)
    return clip(x, delta), logits.detach()


def pgd(model, x, y, eps, *, steps=10, step_size=None, norm="linf", random_start=True, generator=None):
    """Projected gradient descent: maximise the cross-entropy over |delta|_p <= eps (Madry et al. 2018).

    x        (N, ...) pixels in [0,1]; y: (N,) labels. The model takes pixels: its normalisation is inside it.
    eps      radius in pixel units, for example 8/255; step_size defaults to eps/4, as in [1, 2].
    norm     "linf" or "l2".
    Returns x_adv, shape and dtype of x, in [0,1] and within eps of x. An image whose gradient is zero or not
    finite stays where it started. The model is only looked at: weights, .grad, running statistics and mode stay
    as they were, and no weight gradient is computed (that would be a third of the cost, for nothing).
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
            delta, _ = pgd_step(model, x, y, delta, eps, step_size, norm)
    return (x + delta).clamp(0, 1)


def fgsm(model, x, y, eps):
    """The fast gradient sign method, x + eps * sign(g): one l-inf step of full size (Goodfellow et al. 2015)."""
    return pgd(model, x, y, eps, steps=1, step_size=eps, random_start=False)


@contextmanager
def frozen_weights(model):
    """Inside, no gradient is computed for the weights."""
    weights = [w for w in model.parameters() if w.requires_grad]
    for w in weights:
        w.requires_grad_(False)
    try:
        yield
    finally:
        for w in weights:
            w.requires_grad_(True)


@contextmanager
def frozen_statistics(model):
    """Inside, BatchNorm's running mean and variance stand still: they are to describe the network that is kept,
    on the images that it is trained on, not a perturbed network or a half-made attack."""
    norms = [m for m in model.modules() if getattr(m, "track_running_stats", False)]
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in norms:
            m.track_running_stats = True


# ---------------------------------------------------------------------------------------------------------------
# 2. Weight space: SAM's ascent
#
#    The same maximum over the weights. SAM takes one step to the edge of the ball, to first order its worst point:
#        AT   delta = eps * g/|g|, image by image,                  g = dL/dx, repeated and projected
#        SAM  v     = rho * g/|g|, over all weights together,       g = dL/dw, once
# ---------------------------------------------------------------------------------------------------------------


@contextmanager
def perturbed(weights, rho):
    """Inside, the weights are w + v, v = rho * g/|g|_2 (Foret et al. 2021, eq. 2); afterwards w again, bit for bit.

    weights  a model or its parameters; g is the .grad they carry on entry, |g|_2 one norm over all of them.
             Weights without a gradient stay as they are; where g is zero, so is v.
    rho      radius in the unit of the weights. Raises ValueError if it is negative or not finite.
    """
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho = {rho}: expected a finite number >= 0")
    weights = weights.parameters() if isinstance(weights, nn.Module) else weights
    weights = [w for w in weights if w.grad is not None]
    grads = [w.grad for w in weights]
    saved = [w.detach().clone() for w in weights]
    try:
        if weights:
            with torch.no_grad():
                g_norm = nn.utils.get_total_norm(grads).clamp_min(1e-12)
                torch._foreach_addcdiv_(weights, grads, [g_norm] * len(grads), value=rho)  # w += rho * g / |g|
        yield
    finally:
        if weights:
            with torch.no_grad():
                torch._foreach_copy_(weights, saved)


# ---------------------------------------------------------------------------------------------------------------
# 3. The three training steps
#
#    Each is one update of the weights on one batch; they differ in where the gradient is taken.
#    Each returns the loss (scalar) and the logits of its first pass over the batch, both detached.
# ---------------------------------------------------------------------------------------------------------------


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


def sam_step(model, x, y, optimizer, rho):
    """SAM: the gradient at (w + v, x), applied at w (Foret et al. 2021, algorithm 1).  2 gradients a step."""
    loss, logits = backward(model, x, y)
    with perturbed(model, rho), frozen_statistics(model):
        backward(model, x, y)
    optimizer.step()
    return loss, logits


def at_step(model, x, y, optimizer, eps, *, steps=5, step_size=None, norm="linf"):
    """AT: the gradient at (w, x + delta) (Madry et al. 2018, eq. 2.1).  steps + 1 gradients a step.

    The attack runs in the model's own mode, so in training it sees the batch's statistics, as in the authors' code.
    The loss and logits are those of the attacked images.
    """
    x_adv = pgd(model, x, y, eps, steps=steps, step_size=step_size, norm=norm)
    loss, logits = backward(model, x_adv, y)
    optimizer.step()
    return loss, logits


# ---------------------------------------------------------------------------------------------------------------
# 4. Networks
# ---------------------------------------------------------------------------------------------------------------


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
        self.shortcut = None if same else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x):
        h = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(h)
        h = self.conv1(h)
        return self.conv2(F.relu(self.bn2(h))) + shortcut


def preact_resnet18(num_classes, width=64):
    """PreActResNet-18 for 32x32 images: a 3x3 stem, four stages of two blocks, BatchNorm and ReLU, mean pooling."""
    layers, c_in = [nn.Conv2d(3, width, 3, padding=1, bias=False)], width
    for c_out, stride in (width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2):
        layers += [PreActBlock(c_in, c_out, stride), PreActBlock(c_out, c_out, 1)]
        c_in = c_out
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

    With bf16 = True, training multiplies in bfloat16 (the weights stay float32); evaluation never does, so that no
    attack is weakened by rounding.
    """

    def __init__(self, net, mean, std):
        super().__init__()
        self.net, self.bf16 = net, False
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, x):
        x = (x - self.mean) / self.std
        # Autocast ends with the pass: it caches casts of the weights, and a cache kept over SAM's ascent would hide it.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16 and self.training):
            return self.net(x).to(x.dtype)


MODELS = {"prn18": preact_resnet18, "small": small_cnn}
CIFAR10_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)  # mean, std of the training pixels in [0,1]


def make_model(name, num_classes, statistics=CIFAR10_STATISTICS, **settings):
    """A classifier of (N, 3, 32, 32) pixels in [0,1]: "prn18" (11,172,170 parameters at 10 classes) or "small".

    statistics  (mean, std), three channels each, in pixel units.   settings: width, the channels of the first layer.
    Raises ValueError for an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"model is {name!r}: expected one of {', '.join(MODELS)}")
    model = Classifier(MODELS[name](num_classes, **settings), *statistics)
    return model.to(memory_format=torch.channels_last)  # the layout that convolutions are fastest in


# ---------------------------------------------------------------------------------------------------------------
# 5. Data
# ---------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """A data set, whole and in memory. x: uint8 (N, 3, 32, 32); y: int64 (N,)."""
    x: torch.Tensor
    y: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    num_classes: int
    statistics: tuple   # (mean, std) of the training pixels in [0,1], by channel
    augment: bool       # whether a shifted or mirrored image still shows the same thing
    source: str         # what this is, in words


def to_pixels(x):
    """uint8 (N, C, H, W) -> float32 in [0,1]."""
    return x.float() / 255


def crop_and_flip(x, pad=4):
    """A random crop of each image with its border of `pad` pixels reflected, mirrored or not. (N, C, H, W) in and out.

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


# ---------------------------------------------------------------------------------------------------------------
# 6. The training loop, the same for every method
# ---------------------------------------------------------------------------------------------------------------


def make_optimizer(model, lr, epochs):
    """The papers' recipe: SGD, momentum 0.9, weight decay 5e-4; lr falls to a tenth after 75% of the epochs, and again
    after 90%.

    Returns the optimizer and its schedule; call schedule.step() after every epoch.
    """
    weights = list(model.parameters())
    fused = weights[0].device.type in ("cpu", "cuda")  # the whole update as one kernel, where there is one
    optimizer = torch.optim.SGD(weights, lr=lr, momentum=0.9, weight_decay=5e-4, fused=fused)
    milestones = [math.ceil(0.75 * epochs), math.ceil(0.9 * epochs)]
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)


def train(model, data, step, *, epochs, batch_size, lr, on_batch=lambda epoch, done, total: None):
    """Train in place with step(model, x, y, optimizer) -> (loss, logits), one of section 3 with its radius filled in.

    A generator: yields one row an epoch, {"epoch", "lr", "loss", "accuracy", "seconds"}, where loss and accuracy (in
    percent) are those of the training images as the step saw them. Randomness comes from torch's global generator.
    Raises Diverged when loss or weights are no longer finite.
    """
    optimizer, schedule = make_optimizer(model, lr, epochs)
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        model.train()
        loss_sum = correct = 0
        batches = torch.randperm(len(data.x), device=data.x.device).split(batch_size)
        for done, batch in enumerate(batches, 1):
            x, y = data.x[batch], data.y[batch]
            x = to_pixels(crop_and_flip(x) if data.augment else x)
            loss, logits = step(model, x, y, optimizer)
            loss_sum = loss_sum + loss * len(y)
            correct = correct + (logits.argmax(1) == y).sum()
            on_batch(epoch, done, len(batches))
        row = {"epoch": epoch, "lr": schedule.get_last_lr()[0], "loss": float(loss_sum) / len(data.x),
               "accuracy": 100 * int(correct) / len(data.x), "seconds": time.perf_counter() - start}
        if not math.isfinite(row["loss"]) or not nn.utils.get_total_norm(model.parameters()).isfinite():
            raise Diverged(f"training diverged in epoch {epoch}: loss {row['loss']:g}; try a smaller --lr")
        schedule.step()
        yield row


class Diverged(Exception):
    """Training left the finite numbers."""


# ---------------------------------------------------------------------------------------------------------------
# 7. Evaluation: accuracy on clean images and under attack
# ---------------------------------------------------------------------------------------------------------------

ATTACKS = "linf 1/255", "linf 2/255", "l2 16/255", "l2 32/255"  # the papers' four, each PGD-10 with step eps/4


def withstands(model, x, y, eps, *, steps, norm, generator=None):
    """Indices of the images that no iterate of PGD from a random start ever fooled.

    Robust accuracy asks only whether an image was ever fooled, so a fooled one is attacked no further.
    """
    standing = torch.arange(len(x), device=x.device)
    delta = clip(x, random_delta(x, eps, norm, generator))
    with frozen_weights(model):  # saves memory and a third of the time
        for _ in range(steps + 1):  # the last pass only looks at what the last step made
            delta, logits = pgd_step(model, x, y, delta, eps, eps / 4, norm)
            still = logits.argmax(1) == y
            x, y, delta, standing = x[still], y[still], delta[still], standing[still]
            if not len(standing):
                break
    return standing


def evaluate(model, data, attacks=ATTACKS, *, steps=10, batch_size=500, seed=0):
    """Accuracy in percent over the whole of data = (x, y): {"clean": .., "robust": {attack: .., ...}}.

    x        uint8 or float pixels in [0,1], (N, 3, 32, 32); attacks: names such as "linf 8/255" or "l2 0.5".
    An image counts as robust if it is classified right and stays so at every iterate of PGD with `steps` steps of
    eps/4 from a random start (seeded by `seed`). Runs in eval mode; puts the model's mode back. Raises ValueError
    for an empty set, an attack it does not know, or logits that are not finite.
    """
    images, labels = data
    if not len(images):
        raise ValueError("no images to evaluate on")
    attacks = {name: parse_attack(name) for name in attacks}
    generator = torch.Generator(images.device).manual_seed(seed)
    mode, clean, robust = model.training, 0, dict.fromkeys(attacks, 0)
    model.eval()
    try:
        for x, y in zip(images.split(batch_size), labels.split(batch_size)):
            x = to_pixels(x) if x.dtype == torch.uint8 else x
            with torch.no_grad():
                logits = model(x)
            if not logits.isfinite().all():
                raise ValueError("the model's logits are not finite")
            right = logits.argmax(1) == y
            clean += int(right.sum())
            x, y = x[right], y[right]  # what is wrong already needs no attack
            for name, (norm, eps) in attacks.items():
                robust[name] += len(withstands(model, x, y, eps, steps=steps, norm=norm, generator=generator))
    finally:
        model.train(mode)
    n = len(images)
    return {"clean": 100 * clean / n, "robust": {name: 100 * count / n for name, count in robust.items()}}


# ===============================================================================================================
# A first reading ends here.
# ===============================================================================================================

# ---------------------------------------------------------------------------------------------------------------
# 8. Where the data comes from
# ---------------------------------------------------------------------------------------------------------------


class BadInput(Exception):
    """Something the user gave cannot be used. The message is the one line that they see."""


def demo_data(n_train=4000, n_test=1000, *, classes=10, p=0.9, texture=(2 / 255, 4 / 255), coarse=0.075, noise=0.08,
              seed=0):
    """The simplified model of [2], drawn as images. It is built to contain both kinds of features: it can illustrate
    the claims, not prove them.

    Image of class y:  1/2 + coarse pattern of y (with probability 1-p of another class) + texture of y + noise.
    The robust feature is the coarse pattern: 4x4 colours stretched over the image, of root-mean-square `coarse`,
    too large for an attack of a few /255, but wrong in a share 1-p of the images.
    The non-robust features are the texture: each pixel of a class off by 2/255 to 4/255, up or down. It is right
    always, and an attack of its own size wipes it out. The noise is Gaussian, pixel by pixel.
    """
    rng = torch.Generator().manual_seed(seed)
    coarse_of = F.interpolate(torch.randn(classes, 3, 4, 4, generator=rng), size=32, mode="bilinear")
    coarse_of *= coarse / coarse_of.pow(2).mean((1, 2, 3), keepdim=True).sqrt()
    low, high = texture
    texture_of = torch.empty(classes, 3, 32, 32).uniform_(low, high, generator=rng)
    texture_of *= torch.randn(texture_of.shape, generator=rng).sign()
    n = n_train + n_test
    y = torch.randint(classes, (n,), generator=rng)
    other = (y + torch.randint(1, classes, (n,), generator=rng)) % classes
    shown = torch.where(torch.rand(n, generator=rng) < p, y, other)
    x = 0.5 + coarse_of[shown] + texture_of[y] + noise * torch.randn(n, 3, 32, 32, generator=rng)
    x = (x * 255).round().clamp(0, 255).byte()
    return Data(x[:n_train], y[:n_train], x[n_train:], y[n_train:], classes, statistics_of(x[:n_train]), False,
                f"embedded demo data ({n_train} training and {n_test} test images of {classes} classes, seed {seed})")


def statistics_of(x):
    """Mean and standard deviation by channel of uint8 images (N, 3, H, W), in pixel units: (mean, std)."""
    std, mean = torch.std_mean(x.float() / 255, dim=(0, 2, 3))
    return mean.tolist(), std.clamp_min(1e-3).tolist()  # a channel without contrast must not divide by zero


CIFAR100_STATISTICS = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


def load_cifar(name, directory):
    """"cifar10" or "cifar100" through torchvision, downloaded into `directory` if it is not there."""
    from torchvision import datasets
    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    existed = os.path.exists(directory)
    try:
        train, test = (dataset(directory, train=t, download=True) for t in (True, False))
    except Exception as error:  # no network, a broken archive, a read-only folder: torchvision has one class for each
        with suppress(OSError):
            if not existed:
                os.rmdir(directory)
        raise BadInput(f"{name} is not in {directory!r} and cannot be downloaded ({first_line(error)}); "
                       "point --data-dir at a copy, or try --preset demo") from None
    x, x_test = (torch.from_numpy(d.data).permute(0, 3, 1, 2).contiguous() for d in (train, test))
    y, y_test = (torch.tensor(d.targets) for d in (train, test))
    statistics = CIFAR10_STATISTICS if name == "cifar10" else CIFAR100_STATISTICS
    return Data(x, y, x_test, y_test, len(train.classes), statistics, True,
                f"{name} ({len(y)} training and {len(y_test)} test images)")


def load_folder(directory):
    """DIR/train/CLASS/*.png and DIR/test (or DIR/val) likewise, as torchvision's ImageFolder reads them, at 32x32."""
    directory = Path(directory)
    if not directory.is_dir():
        raise BadInput(f"{directory}: no such folder; --data-dir names one with train/CLASS/ and test/CLASS/ in it")
    test = "test" if (directory / "test").is_dir() else "val"
    x, y, classes = read_images(directory / "train")
    x_test, y_test, test_classes = read_images(directory / test)
    if test_classes != classes:
        odd = min(set(classes) ^ set(test_classes))
        raise BadInput(f"{directory}: train and {test} differ in their classes: {odd!r} is in one of them only")
    if len(classes) < 2:
        raise BadInput(f"{directory / 'train'} has one class, {classes[0]!r}: two are the least to tell apart")
    return Data(x, y, x_test, y_test, len(classes), statistics_of(x), True,
                f"{directory} ({len(y)} training and {len(y_test)} test images of {len(classes)} classes)")


def read_images(directory):
    """One ImageFolder as tensors: x uint8 (N, 3, 32, 32), y (N,), class names."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.v2 import functional as TF
    try:
        folder = ImageFolder(directory)
    except OSError as error:
        raise BadInput(f"{directory}: {first_line(error) if directory.is_dir() else 'no such folder'}") from None

    def read(path):
        try:
            image = folder.loader(path)
            return TF.pil_to_tensor(image if image.size == (32, 32) else TF.resize(image, [32, 32]))
        except Exception as error:  # PIL raises half a dozen classes for a bad file
            raise BadInput(f"{path}: not a readable image ({first_line(error)})") from None

    with ThreadPoolExecutor() as pool:
        x = torch.stack(list(pool.map(read, [path for path, _ in folder.samples])))
    return x, torch.tensor(folder.targets), folder.classes


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_data(name, directory):
    """The data set of that name: "demo", "cifar10", "cifar100" or "folder". Raises BadInput if it cannot be had."""
    if name == "demo":
        return demo_data()
    return load_folder(directory) if name == "folder" else load_cifar(name, directory)


# ---------------------------------------------------------------------------------------------------------------
# 9. What a step costs
#
#    In passes, with a forward pass F and a backward pass of twice that (F for the inputs, F for the weights):
#        SGD   3 F                SAM   6 F, twice SGD                AT   K (F + F) + 3 F, 1 + 2K/3 times SGD
# ---------------------------------------------------------------------------------------------------------------


def time_of(call, device, seconds=15, least=5, most=50):
    """Median wall time of call() in seconds, synchronised, after two calls to warm up."""
    times, sync = [], torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for i in range(2 + most):
        sync()
        start = time.perf_counter()
        call()
        sync()
        times.append(time.perf_counter() - start)
        if i >= 1 + least and sum(times) > seconds:
            break
    return median(times[2:])


def matmul_rate(device, dtype):
    """Floating-point operations a second of a large matrix product, measured."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n ** 3 / time_of(partial(torch.matmul, a, b), device, seconds=5)


def peak_mb(device, reset=False):
    """Peak memory since the last reset, in MB: CUDA's allocated tensors, or else the whole process."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: start counting anew
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def run_benchmark(s):
    """Time a step of each method (SGD always, for the ratio) on random pixels; print the table and return its rows."""
    from torch.utils.flop_counter import FlopCounterMode
    dtype = torch.bfloat16 if s.precision == "bf16" else torch.float32
    rate, rows = matmul_rate(s.device, dtype), []
    x, y = torch.rand(s.batch_size, 3, 32, 32, device=s.device), torch.randint(10, (s.batch_size,), device=s.device)
    x = x.contiguous(memory_format=torch.channels_last)
    print(f"{s.model}, batch {s.batch_size}, {device_name(s.device)}, {s.precision}, torch {torch.__version__}; "
          f"a matrix product runs at {rate / 1e12:.2f} TFLOP/s")
    for method in dict.fromkeys(["sgd", *s.method]):
        model, fast = build(s, 10, CIFAR10_STATISTICS)
        optimizer, _ = make_optimizer(model, s.lr, s.epochs)
        step = STEPS[method](s)
        with FlopCounterMode(display=False) as counter:
            step(model, x, y, optimizer)
        step(fast, x, y, optimizer)
        peak_mb(s.device, reset=True)
        seconds = time_of(partial(step, fast, x, y, optimizer), s.device)
        rows.append({"method": method, "step_s": seconds, "images_per_s": s.batch_size / seconds,
                     "ratio_to_sgd": seconds / rows[0]["step_s"] if rows else 1.0, "peak_mb": peak_mb(s.device),
                     "share_of_matmul_rate": counter.get_total_flops() / seconds / rate})
    passes = {"sgd": "3 F", "sam": "6 F", "at": f"{2 * s.attack_steps + 3} F"}
    print(align([["method", "passes", "step", "images/s", "x SGD", "peak MB", "of matmul rate"]] + [
        [r["method"], passes[r["method"]], f"{1000 * r['step_s']:.1f} ms", f"{r['images_per_s']:.0f}",
         f"{r['ratio_to_sgd']:.2f}", f"{r['peak_mb']:.0f}", f"{100 * r['share_of_matmul_rate']:.0f}%"] for r in rows]))
    return rows


def device_name(device):
    """What the device is called, such as the GPU's name or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name") or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


# ---------------------------------------------------------------------------------------------------------------
# 10. The command line
# ---------------------------------------------------------------------------------------------------------------

PRESETS = {  # every setting that differs between the two
    "demo": {"dataset": "demo", "model": "small", "epochs": 15, "eps": {"linf": 4 / 255, "l2": 128 / 255}},
    "paper": {"dataset": "cifar10", "model": "prn18", "epochs": 100, "eps": {"linf": 8 / 255, "l2": 128 / 255}},
}
STEPS = {  # method -> its step, with the radius filled in from the settings
    "sgd": lambda s: sgd_step,
    "sam": lambda s: partial(sam_step, rho=s.rho),
    "at": lambda s: partial(at_step, eps=s.eps, norm=s.norm, steps=s.attack_steps),
}


def parse_attack(name):
    """"linf 8/255" -> ("linf", 0.0314). Raises ValueError."""
    norm, _, radius = name.partition(" ")
    if norm not in ("linf", "l2"):
        raise ValueError(f"unknown attack {name!r}: expected a norm and a radius, such as 'linf 8/255' or 'l2 32/255'")
    return norm, parse_radius(radius)


def parse_radius(text):
    """A radius in pixel units, "8/255" or "0.03", as a float. Raises ValueError unless it lies in (0, 1)."""
    numerator, slash, denominator = text.partition("/")
    try:
        eps = float(numerator) / (float(denominator) if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"radius {text!r} is not a number: write it as 8/255 or 0.03") from None
    if not 0 < eps < 1:
        hint = f": pixels are in [0,1], so did you mean {text}/255?" if eps >= 1 and not slash else ""
        raise ValueError(f"radius {text} is outside (0, 1){hint}")
    return eps


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def number(kind, low, *, strict=False):
    """An argparse type: an int or float from `low` (above it, if strict) to what torch can take."""
    def parse(text):
        with suppress(ValueError):
            value = kind(text)
            if value < (2 ** 63 if kind is int else math.inf) and (value > low if strict else value >= low):
                return value
        what = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} {'>' if strict else '>='} {low}")
    return parse


def radius(text):
    """An argparse type: parse_radius, with its message."""
    try:
        return parse_radius(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def show_radius(eps):
    """0.0314 -> "8/255"; a radius that is no multiple of 1/255 as a decimal."""
    return f"{eps * 255:.0f}/255" if abs(eps * 255 - round(eps * 255)) < 1e-6 else f"{eps:g}"


def parse_args(argv):
    """The settings of a run: flags over preset. Raises BadInput."""
    parser = Parser(prog="sam_at.py", allow_abbrev=False,
                    description="Train with SGD, SAM and AT, and attack what came of it.")
    flag = parser.add_argument_group("what to run").add_argument
    flag("--preset", choices=list(PRESETS),
         help="demo: embedded data, small network, CPU; paper: CIFAR-10, PreActResNet-18, GPU; any other flag "
              "overrides its preset's value (default: paper where CUDA is there, otherwise demo)")
    flag("--method", nargs="+", choices=list(STEPS), default=list(STEPS), help="one or several (default: sgd sam at)")
    flag("--benchmark", action="store_true", help="time a step of each method instead: what SAM and AT cost here")
    flag("--seed", type=number(int, 0), default=0, help="of weights, batches and attacks (default: 0)")
    flag("--device", help="cpu, cuda, cuda:N or mps (default: cuda where it is there, otherwise cpu)")
    flag("--json", metavar="FILE", help="write the final table there, as a list of rows")
    flag = parser.add_argument_group("radii (pixels are in [0,1])").add_argument
    flag("--rho", type=number(float, 0), default=0.2, help="SAM's radius in weight space (default: 0.2)")
    flag("--eps", type=radius, help="AT's radius in input space, as 8/255 or 0.03 "
         "(default: preset demo: 4/255, paper: 8/255; 128/255 with --norm l2)")
    flag("--norm", choices=["linf", "l2"], default="linf", help="AT's norm (default: linf)")
    flag("--attack-steps", type=number(int, 1), default=5, help="AT's attack steps, each of eps/4 (default: 5)")
    flag = parser.add_argument_group("data and network").add_argument
    flag("--dataset", choices=["demo", "cifar10", "cifar100", "folder"],
         help="(default: preset demo: demo, paper: cifar10)")
    flag("--data-dir", metavar="DIR",
         help="where CIFAR is or goes (default: data); for folder, the one with train/CLASS/ and test/CLASS/")
    flag("--model", choices=list(MODELS), help="(default: preset demo: small, paper: prn18)")
    flag("--width", type=number(int, 1), help="channels of the first layer (default: small: 16, prn18: 64)")
    flag = parser.add_argument_group("training").add_argument
    flag("--epochs", type=number(int, 1), help="(default: preset demo: 15, paper: 100)")
    flag("--batch-size", type=number(int, 1), default=128, help="(default: 128)")
    flag("--precision", choices=["auto", "fp32", "bf16"], default="auto",
         help="of training; evaluation is always fp32 (default: auto, bf16 where the device multiplies in it)")
    flag("--compile", action=argparse.BooleanOptionalAction,
         help="torch.compile the network for training (default: on for CUDA and 20 epochs or more)")
    flag("--lr", type=number(float, 0, strict=True), default=0.1,
         help="learning rate; a tenth of it from 75%% of the epochs, a hundredth from 90%% (default: 0.1)")

    s = parser.parse_args(argv)
    s.preset_given = s.preset is not None
    s.preset = s.preset or ("paper" if torch.cuda.is_available() else "demo")
    for key, value in PRESETS[s.preset].items():
        if getattr(s, key) is None:
            setattr(s, key, value[s.norm] if key == "eps" else value)
    s.method = list(dict.fromkeys(s.method))
    s.device = parse_device(s.device)
    if s.dataset == "folder" and not s.data_dir:
        raise BadInput("--dataset folder needs --data-dir DIR")
    s.data_dir = s.data_dir or "data"
    if s.compile is None:  # compiling takes a minute or two; on the CPU it gained nothing (1.08 s a step either way)
        s.compile = s.device.type == "cuda" and s.epochs >= 20 and not s.benchmark
    if s.device.type == "cuda":  # torch's default, TF32, rounds the inputs of float32 convolutions to 10 bits
        torch.backends.cudnn.allow_tf32 = False
    s.precision = ("bf16" if has_bf16(s.device) else "fp32") if s.precision == "auto" else s.precision
    if s.json:
        check_json(Path(s.json))
    return s


def parse_device(name):
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device {name}: expected cpu, cuda, cuda:N or mps") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= count.get(device.type, 0):
        raise BadInput(f"--device {name}: not on this machine; leave it out, or use --device cpu")
    return device


def has_bf16(device):
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(cpu.get(name) for name in ("avx512_bf16", "amx_bf16"))


def check_json(path):
    """Refuse now what could not be written after hours of training, and what --json did not write."""
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
        raise BadInput(f"--json {path}: cannot write there")
    try:
        ours = not path.exists() or not path.read_text() or isinstance(json.loads(path.read_text()), list)
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise BadInput(f"--json {path}: this file is there, and --json did not write it; name another")


def write_whole(path, text):
    """Write a file whole or not at all."""
    part = Path(f"{path}.part")
    part.write_text(text)
    os.replace(part, path)


def build(s, num_classes, statistics):
    """The network that the settings name, on its device: (model, the same compiled if they say so)."""
    torch.manual_seed(s.seed)  # every method starts from the same weights and meets the same batches
    width = {} if s.width is None else {"width": s.width}
    model = make_model(s.model, num_classes, statistics, **width).to(s.device)
    model.bf16 = s.precision == "bf16"
    return model, torch.compile(model, dynamic=False) if s.compile else model


def run_method(method, s, data):
    """Train one network with one method and attack it; prints its progress, returns its row of the table."""
    model, fast = build(s, data.num_classes, data.statistics)
    label = method + {"sgd": "", "sam": f" rho {s.rho:g}", "at": f" {s.norm} {show_radius(s.eps)}"}[method]
    terminal, start = sys.stdout.isatty(), time.perf_counter()

    def on_batch(epoch, done, total):
        if terminal:
            print(f"{label}  epoch {epoch}/{s.epochs}  batch {done}/{total}", end="\r", flush=True)

    step = STEPS[method](s)
    for row in train(fast, data, step, epochs=s.epochs, batch_size=s.batch_size, lr=s.lr, on_batch=on_batch):
        left = (time.perf_counter() - start) / row["epoch"] * (s.epochs - row["epoch"])
        print(f"{label}  epoch {row['epoch']}/{s.epochs}  loss {row['loss']:.4f}  accuracy {row['accuracy']:5.1f}%  "
              f"{len(data.x) / row['seconds']:.0f} images/s  {show_time(left)} left", flush=True)
    seconds = time.perf_counter() - start
    result = evaluate(model, (data.x_test, data.y_test), seed=s.seed)  # not the compiled one: its batches shrink
    return {"method": method, **result, "seconds": seconds}


def show_time(seconds):
    m, s = divmod(round(seconds), 60)
    return f"{m // 60}h{m % 60:02d}m" if m >= 60 else f"{m}m{s:02d}s"


def show_table(rows):
    """Method, clean and robust accuracy, training time and its ratio to SGD's, as aligned text."""
    base = next((r["seconds"] for r in rows if r["method"] == "sgd"), None)
    cells = [["method", "clean", *rows[0]["robust"], "train time", "x SGD"]]
    for r in rows:
        ratio = f"{r['seconds'] / base:.1f}" if base else "-"
        accuracies = (f"{a:.1f}" for a in (r["clean"], *r["robust"].values()))
        cells.append([r["method"], *accuracies, f"{r['seconds']:.1f} s", ratio])
    return align(cells)


def align(cells):
    """Rows of cells as text, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells)


def run_training(s):
    """Train and attack every method asked for; print the table and return its rows."""
    other = "paper" if s.preset == "demo" else "demo"
    why = "as asked" if s.preset_given else f"CUDA is {'' if s.preset == 'paper' else 'not '}there"
    print(f"preset {s.preset} ({why}); for the other: --preset {other}", flush=True)
    data = load_data(s.dataset, s.data_dir)
    if s.batch_size > len(data.x):
        raise BadInput(f"--batch-size {s.batch_size} is larger than the {len(data.x)} training images")
    print(f"data: {data.source}; network: {s.model}; device: {s.device}, {s.precision}", flush=True)
    data = data._replace(**{k: getattr(data, k).to(s.device) for k in ("x", "y", "x_test", "y_test")})
    rows = [run_method(method, s, data) for method in s.method]
    print(f"\naccuracy in percent on {len(data.x_test)} test images, clean and under PGD-10\n" + show_table(rows))
    return rows


def main(argv=None):
    """The command line. Returns the exit code: 0, 2 after one line about bad input, 130 after Ctrl-C."""
    try:
        s = parse_args(argv)
        rows = run_benchmark(s) if s.benchmark else run_training(s)
        if s.json:
            write_whole(s.json, json.dumps(rows, indent=1) + "\n")
    except (BadInput, Diverged) as error:
        print(f"sam_at.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sam_at.py: interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # argparse, after --help
        return stop.code or 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
