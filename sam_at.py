"""Sharpness-aware minimization (SAM) and adversarial training (AT), side by side in one file.

Is a network whose loss is flat around its *weights* also flat around its *inputs*, and so harder to attack?
  [1] Sharpness-Aware Minimization Alone can Improve Adversarial Robustness, arXiv 2305.05392
  [2] On the Duality Between Sharpness-Aware Minimization and Adversarial Training, arXiv 2402.15152

    SGD   min_w                          L(w; x, y)          L: the mean cross-entropy of a batch
    SAM   min_w  max_{|v|_2 <= rho}      L(w + v; x, y)      the worst weights near w: one v for the batch
    AT    min_w  max_{|delta|_p <= eps}  L(w; x + delta, y)  the worst inputs near x: a delta for each image

[1] and [2] claim that SAM alone gains robustness and keeps clean accuracy; AT gains more and loses some.
Points against SGD here (CIFAR-10 as JPEG): SAM, rho 0.2, +2 to +9, clean -0.4; AT, 1/255, +6 to +41, -1.2.

    python sam_at.py                     train with SGD, SAM and AT, attack all three, print one table
    python sam_at.py --method sam        one of them
    python sam_at.py --preset paper      the papers' CIFAR-10 recipe (needs a GPU)
    python sam_at.py --help              everything else

Units: pixels are in [0,1], eps and delta in the same unit (8/255, not 8), rho in the unit of the weights.
x: float images (N, C, H, W).  y: int64 labels (N,).  logits: (N, classes).
"""
import argparse
import atexit
import copy
import hashlib
import io
import json
import math
import os
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.utils._pytree import tree_leaves

RANK = int(os.environ.get("RANK", 0))  # torchrun sets both
WORLD = int(os.environ.get("WORLD_SIZE", 1))

class BadInput(ValueError, argparse.ArgumentTypeError):
    """Something given cannot be used. The message is the one line that a user of the command line sees."""

# == 1. Input space: the attacks ==========================================================================
#    An attacker may add any delta with |delta|_p <= eps, as long as x + delta is still an image in [0,1].
#    To first order L(x + delta) = L(x) + <g, delta> with g = dL/dx. In the l2 ball that grows fastest along g
#    (Cauchy-Schwarz); in the linf ball each pixel moves on its own, and sign(g) is best.
def l2_norm(t):
    """One l2 norm per image: (N, ...) -> (N, 1, ..., 1)."""
    return torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim)), keepdim=True)

def steepest(g, norm):
    """The s with |s|_p <= 1 that maximises <g, s>, per image: sign(g) for linf, g/|g|_2 for l2."""
    g = torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0)  # a broken model breaks no image
    if norm == "linf":
        return g.sign()
    largest = g.abs().amax(tuple(range(1, g.ndim)), keepdim=True)
    g = g / largest.clamp_min(1e-38)  # squares must not underflow
    return g / l2_norm(g).clamp_min(1e-38)

def project(delta, eps, norm):
    """The nearest point of the ball |delta|_p <= eps, per image."""
    if norm == "linf":
        return delta.clamp(-eps, eps)
    return delta * (eps / l2_norm(delta).clamp_min(1e-38)).clamp_max(1)

def random_delta(x, eps, norm):
    """A random start in the ball: uniform for linf; a uniform direction times a uniform length for l2."""
    if norm == "linf":
        return eps * (2 * torch.rand_like(x) - 1)
    return eps * torch.rand_like(l2_norm(x)) * steepest(torch.randn_like(x), "l2")

cross_entropy = partial(F.cross_entropy, reduction="sum")  # a sum: batch size does not matter

def input_gradient(model, x, y, loss):
    """g = dL/dx, shaped like x, and the images that the model gets wrong: (N,) bool."""
    with torch.inference_mode(False), torch.enable_grad():
        x, y = x.detach().clone().requires_grad_(), y.clone()  # no inference tensors
        logits = model(x)
        g, = torch.autograd.grad(loss(logits, y), x)
    return g, logits.detach().argmax(1) != y

@contextmanager
def restored(model):
    """After the block the model's buffers, modes and requires_grad are what they were before, bit for bit:
    BatchNorm's running statistics describe w and finished images, not w + v nor an attack under way."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(w, w.requires_grad) for w in model.parameters()]
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.data.copy_(buffers.get(name, buffer))
        for module, mode in modes:
            module.training = mode
        for w, wants in wanted:
            w.requires_grad_(wants)

def check(x, y, look=True):
    """Raise BadInput unless x are float pixels in [0,1] and y their labels."""
    if x.dtype not in (torch.float32, torch.float64):
        raise BadInput(f"images are {x.dtype}: expected float32 or float64 pixels in [0,1]")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise BadInput(f"labels are {y.dtype}, {[*y.shape]}: expected int64, {[len(x)]}")
    if look and len(x) and not (x.min() >= -1e-6 and x.max() <= 1 + 1e-6):
        raise BadInput(f"pixels reach from {x.min():.3g} to {x.max():.3g}, not from 0 to 1: "
                         "scale them, and normalise inside the model")

def pgd(model, x, y, eps, norm="linf", steps=10, step_size=None, random_start=True,
        loss=cross_entropy, stop_when_fooled=False):
    """Projected gradient ascent to images of high loss within eps of x (Madry et al. 2018, section 2.1).
    x: pixels in [0,1] (unchecked in GPU training), (N, ...).  eps: pixels.  step_size: eps/4, as in [1, 2].
    stop_when_fooled: an image that the model gets wrong is left as it is, so what is right at the end was
    right at every step. Returns x_adv, shaped like x; the model and its .grad stay as they were."""
    limit = {"linf": 1.0, "l2": math.sqrt(math.prod(x.shape[1:]))}
    if norm not in limit or not 0 <= eps <= limit[norm] or steps < 0:
        raise BadInput(f"norm {norm!r}, eps {eps}, steps {steps}: expected 'linf' or 'l2', "
                         "eps in the unit of the pixels (8/255, not 8), steps >= 0")
    check(x, y, look=not (model.training and x.is_cuda))  # no waiting for the GPU
    x = x.detach()
    step_size = eps / 4 if step_size is None else step_size
    delta = random_delta(x, eps, norm) if random_start else torch.zeros_like(x)
    x_adv = (x + delta).clamp(0, 1)
    left = torch.arange(len(x), device=x.device)  # the images that are still attacked
    with restored(model):
        model.requires_grad_(False)  # or torch.compile makes their gradients too
        for _ in range(steps):
            g, fooled = input_gradient(model, x_adv[left], y[left], loss)
            if stop_when_fooled:
                left, g = left[~fooled], g[~fooled]
            if not len(left):
                break
            delta = project(x_adv[left] - x[left] + step_size * steepest(g, norm), eps, norm)
            x_adv[left] = (x[left] + delta).clamp(0, 1)  # towards x: delta stays in the ball
    return x_adv

# == 2. Weight space: SAM's ascent ========================================================================
#    The same maximum over the weights: L(w + v) = L(w) + <g, v> with g = dL/dw is largest at v = rho g/|g|_2.
#        AT    delta <- P(delta + step * steepest(g)),  g = dL/dx:  one norm an image, several steps
#        SAM   v     =  rho * g/|g|_2,                  g = dL/dw:  one norm over all weights, one step
#    'Dual' means: one maximum, over either factor of w.x. On a linear score both maxima are exact and lower
#    the margin: delta (l2) by eps|w| for each image, v by rho|x|, more for far images; by the same where
#    rho|x| = eps|w|. In a dense first layer z = Wx an attack delta does what the move V = (W delta) x^T/|x|^2
#    of the weights does, and V what the attack W^+ V x does (pseudoinverse; W of full row rank): flat in the
#    weights is, for one image, flat against those attacks. But one v serves all images (a maximum of means is
#    at most the mean of maxima), and its one step spreads rho over all layers: SAM is weaker.
def ascent(weights, grads, rho):
    """v = rho * g/|g|_2, one norm over all weights (Foret et al. 2021, eq. 2); where g is 0, so is v."""
    scale = rho / nn.utils.get_total_norm(grads).clamp_min(1e-12)
    return [scale * g for g in grads]

@contextmanager
def perturbed(model, rho, ascend=ascent):
    """Run the block at w + v, where v = ascend(w, g, rho) and g is the .grad that lies on w; then restore w.
    model: a network or an iterable of weights. Raises BadInput unless rho is finite and >= 0."""
    if not 0 <= rho < math.inf:
        raise BadInput(f"rho is {rho}: expected a finite number >= 0")
    weights = model.parameters() if isinstance(model, nn.Module) else model
    weights = [w for w in weights if w.grad is not None]
    before = [w.data for w in weights]
    wide = lambda t: t.to(torch.promote_types(t.dtype, torch.float32))  # float16 norms overflow
    moves = ascend([*map(wide, before)], [wide(w.grad) for w in weights], rho) if weights else []
    try:
        for w, v in zip(weights, moves):
            w.data = w.data.clone().add_(v)  # in w's memory layout
        torch.clear_autocast_cache()  # autocast keeps copies of w
        yield
    finally:
        for w, w_before in zip(weights, before):
            w.data = w_before
        torch.clear_autocast_cache()

# == 3. The three training steps ==========================================================================
#    Each updates the weights once on one batch; they differ in where the gradient is taken. None of them
#    differentiates through v or delta, though both depend on w. At a unique maximiser that is right: the
#    gradient of a maximum is the gradient there (Danskin's theorem). PGD comes near; SAM's one step less so.
#    Each returns the loss and the logits of its first gradient in w, detached.
def gradient(model, x, y):
    """Put dL/dw on the weights, in place of what lay there; return loss and logits."""
    model.zero_grad()
    torch.clear_autocast_cache()
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    return loss.detach(), logits.detach()

def trained_weights(optimizer):
    return [w for group in optimizer.param_groups for w in group["params"]]

def sgd_step(model, x, y, optimizer):
    """Standard training: the gradient at (w, x).  1 gradient a step."""
    loss, logits = gradient(model, x, y)
    optimizer.step()
    return loss, logits

def sam_step(model, x, y, optimizer, rho, ascend=ascent):
    """SAM: the gradient at (w + v, x), applied at w (Foret et al. 2021, algorithm 1).  2 gradients a step."""
    loss, logits = gradient(model, x, y)
    with perturbed(trained_weights(optimizer), rho, ascend), restored(model):
        gradient(model, x, y)
    optimizer.step()
    return loss, logits

def at_step(model, x, y, optimizer, eps, norm="linf", steps=5, step=sgd_step):
    """AT: the gradient at (w, x + delta) (Madry et al. 2018, eq. 2.1).  steps + 1 gradients a step.
    With step = partial(sam_step, rho=rho) the two combine: the gradient at (w + v, x + delta)."""
    x_adv = pgd(model, x, y, eps, norm, steps)
    return step(model, x_adv, y, optimizer)

# == 4. The network =======================================================================================
class PreActBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))); for another shape, a 1x1 convolution of relu(bn(x)) for x."""
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.stride, self.shortcut = stride, None
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x):
        h = F.relu(self.bn1(x))
        if self.shortcut is not None:  # a strided 1x1 can corrupt memory (oneDNN issue 6035)
            x = self.shortcut(F.avg_pool2d(h, 1, self.stride))
        return x + self.conv2(F.relu(self.bn2(self.conv1(h))))

def preact_resnet(classes, width=64, stages=(1, 2, 4, 8), blocks=2):
    """PreActResNet-18 (He et al. 2016): a stem, stages of blocks, each but the first at half the size."""
    layers, c_in = [nn.Conv2d(3, width, 3, padding=1, bias=False)], width
    for i, stage in enumerate(stages):
        for j in range(blocks):
            stride = 2 if i > 0 and j == 0 else 1
            layers.append(PreActBlock(c_in, stage * width, stride))
            c_in = stage * width
    layers += [nn.BatchNorm2d(c_in), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(c_in, classes))

class Classifier(nn.Module):
    """logits = net((x - mean) / std): the normalisation is inside, so x, delta and eps are always pixels.
    With bf16 = True it multiplies in bfloat16 in training, never in evaluation."""
    def __init__(self, net, mean, std):
        super().__init__()
        self.net, self.bf16 = net, False
        self.register_buffer("mean", torch.as_tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.as_tensor(std).view(3, 1, 1))

    def forward(self, x):
        x = (x - self.mean) / self.std
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16 and self.training):
            return self.net(x).to(x.dtype)

# == 5. Data: uint8 images x (N, 3, 32, 32) and labels y (N,), all of them in memory ======================
def crop_and_flip(x, pad=4):
    """Reflect-pad each image, crop it at random to its size, mirror half of them, in one gather."""
    n, _, h, w = x.shape
    down, right = torch.randint(2 * pad + 1, (2, n, 1, 1), device=x.device)
    mirrored = torch.rand(n, 1, 1, device=x.device) < 0.5
    i = torch.arange(h, device=x.device).view(1, h, 1) + down
    j = torch.arange(w, device=x.device).view(1, 1, w)
    j = torch.where(mirrored, w - 1 - j, j) + right
    image = torch.arange(n, device=x.device).view(n, 1, 1)
    x = F.pad(x, (pad, pad, pad, pad), mode="reflect")
    return x[image, :, i, j].permute(0, 3, 1, 2)

def batches(data, batch_size):
    """An epoch of shuffled, augmented batches (x, y); under torchrun, this process's equal share of each."""
    for batch in torch.randperm(len(data.x), device=data.x.device).split(batch_size):
        x, y = data.x[batch].float() / 255, data.y[batch]
        x = crop_and_flip(x) if data.augment else x
        share = slice(RANK, len(y) // WORLD * WORLD, WORLD)
        if len(y[share]):
            yield x[share], y[share]

# == 6. The training loop, the same for every method ======================================================
def make_optimizer(model, lr, epochs, kind=partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)):
    """The papers' recipe: an optimizer and its schedule, lr/10 from 75% of the epochs and lr/100 from 90%."""
    optimizer = kind(model.parameters(), lr, fused=True)
    milestones = [math.ceil(0.75 * epochs), math.ceil(0.9 * epochs)]
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)

def train(model, data, step, optimizer, schedule, epochs, batch_size):
    """Train with step(model, x, y, optimizer), one of section 3; yield a row of figures after each epoch,
    of the images as the step saw them. Raises FloatingPointError if training diverges."""
    for epoch in range(schedule.last_epoch + 1, epochs + 1):
        start, loss_sum, correct, images = time.perf_counter(), 0, 0, 0
        model.train()
        for x, y in batches(data, batch_size):
            loss, logits = step(model, x, y, optimizer)
            loss_sum += loss * len(y)
            correct += (logits.argmax(1) == y).sum()
            images += len(y)
        schedule.step()
        row = {"epoch": epoch, "loss": float(loss_sum) / images, "accuracy": 100 * int(correct) / images}
        row["seconds"] = time.perf_counter() - start
        if not math.isfinite(row["loss"] + nn.utils.get_total_norm(model.parameters())):
            raise FloatingPointError(f"training diverged in epoch {epoch}: try a smaller --lr")
        yield row

# == 7. Evaluation: accuracy on clean images and under attack =============================================
#    An attack is a function attack(model, x, y) -> x_adv. A string such as "linf 8/255" names one.
ATTACKS = ("linf 1/255", "linf 2/255", "l2 16/255", "l2 32/255")  # PGD-10, as in [1, 2]

def radius(text):
    """"8/255" or "0.03" -> eps. Raises BadInput unless it lies in (0, 1)."""
    numerator, _, denominator = text.partition("/")
    with suppress(ValueError, ArithmeticError):
        eps = float(numerator) / float(denominator or 1)
        if 0 < eps < 1:
            return eps
    raise BadInput(f"radius {text!r}: expected one in (0, 1), with pixels in [0,1]; 8/255 or 0.03")

def named_pgd(norm, steps, eps):
    return partial(pgd, eps=radius(eps), norm=norm, steps=steps, stop_when_fooled=True)

KINDS = {norm: partial(named_pgd, norm) for norm in ("linf", "l2")}  # by first word

def parse_attack(text, steps=10):
    """"linf 8/255" or "l2 0.5" -> attack; section 8 knows more names. Raises BadInput."""
    kind, *words = text.split() or [""]
    try:
        return KINDS[kind](steps, *words)
    except (KeyError, TypeError):
        raise BadInput(f"attack {text!r}: expected 'linf 8/255' or so, {', '.join(KINDS)}") from None

@torch.no_grad()
def evaluate(model, images, labels, attacks=ATTACKS, steps=10, restarts=1, batch_size=500):
    """Accuracy in percent: {"clean": .., name of an attack: .., ...}.  attacks: names, or {name: function}.
    images: uint8, or float pixels in [0,1], (N, 3, H, W), on the model's device.
    An image is robust if it is right and stays so at every step of PGD from each of `restarts` starts."""
    if images.ndim != 4 or not len(images) or len(images) != len(labels):
        raise BadInput(f"images {[*images.shape]}, labels {[*labels.shape]}: expected (N, 3, H, W), (N,)")
    if not isinstance(attacks, dict):
        attacks = {name: parse_attack(name, steps) for name in attacks}
    right = dict.fromkeys(["clean", *attacks], 0)
    with restored(model):
        model.eval()
        for x, y in zip(images.split(batch_size), labels.split(batch_size)):
            x = x.float() / 255 if x.dtype == torch.uint8 else x
            check(x, y)
            logits = model(x)
            if not logits.isfinite().all():
                raise FloatingPointError("logits are not finite")
            is_right = logits.argmax(1) == y
            right["clean"] += int(is_right.sum())
            for name, attack in attacks.items():
                x_left, y_left = x[is_right], y[is_right]  # what is wrong needs no attack
                for _ in range(restarts if getattr(attack, "func", None) is pgd else 1):
                    if len(x_left):
                        x_adv = torch.enable_grad()(attack)(model, x_left, y_left)
                        stands = model(x_adv).argmax(1) == y_left
                        x_left, y_left = x_left[stands], y_left[stands]
                right[name] += len(x_left)
    return {name: 100 * count / len(images) for name, count in right.items()}

# A first reading ends here.

# == 8. Variants: more ascents, networks and attacks ======================================================
def adaptive_ascent(weights, grads, rho, eta=0.01):
    """ASAM: v = rho * T^2 g/|T g|_2, T = |w| + eta; T = 1 on biases and BatchNorm (Kwon et al. 2021, alg. 1).
    With eta = 0 and no biases, rescaled weights have a rescaled v. Takes about ten times SAM's rho."""
    T = [w.abs() + eta if w.ndim > 1 else torch.ones_like(w) for w in weights]
    v = ascent(weights, [t * g for t, g in zip(T, grads)], rho)
    return [t * a for t, a in zip(T, v)]

def layerwise_ascent(weights, grads, gamma):
    """AWP: v = gamma * |w| * g/|g| for each tensor; biases and BatchNorm stay (Wu et al. 2020, section 4).
    AWP is sam_step on attacked images with this ascent."""
    climb = lambda w, g: ascent([w], [g], gamma * w.norm())[0] if w.ndim > 1 else 0 * g
    return [*map(climb, weights, grads)]

def esam_step(model, x, y, optimizer, rho, beta=0.5, gamma=0.5):
    """ESAM (Du et al. 2022, algorithm 1). Each weight tensor climbs with probability beta, one at least, by
    rho/beta in all; then the share gamma of images counts whose loss rose most. At beta = gamma = 1 SAM."""
    weights = [w for w in trained_weights(optimizer) if w.requires_grad]
    draws = torch.rand(len(weights))
    climbing = [w for w, draw in zip(weights, draws) if draw < beta or draw == draws.min()]
    torch.clear_autocast_cache()
    logits = model(x)
    losses = F.cross_entropy(logits, y, reduction="none")
    for w, g in zip(climbing, torch.autograd.grad(losses.mean(), climbing, allow_unused=True)):
        w.grad = g
    with perturbed(climbing, rho / beta), restored(model):
        with torch.no_grad():
            rise = F.cross_entropy(model(x), y, reduction="none") - losses
        hard = rise.topk(math.ceil(gamma * len(x))).indices.sort().values
        gradient(model, x[hard], y[hard])
    optimizer.step()
    return losses.mean().detach(), logits.detach()

def deit_tiny(classes, width=192):
    """DeiT-Ti on patches of 2x2, with its authors' initial values (Touvron et al. 2021)."""
    from torchvision.models import VisionTransformer
    net = VisionTransformer(32, 2, 12, 3, width, 4 * width, num_classes=classes)
    for w in net.parameters():
        if w.ndim > 1:
            nn.init.trunc_normal_(w, std=0.02)
    net.conv_proj.reset_parameters()
    return net

def small_cnn(classes, width=16):
    """Three convolutions and a linear layer, for the demo and the tests."""
    layers = []
    for c_in, c_out in (3, width), (width, 2 * width), (2 * width, 4 * width):
        layers += [nn.Conv2d(c_in, c_out, 3, 2, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * width, classes))

MODELS = {"prn18": preact_resnet, "deit_ti": deit_tiny, "small": small_cnn,
          "wrn28_10": partial(preact_resnet, width=16, stages=(10, 20, 40), blocks=4)}
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)  # mean and std of its pixels

def make_model(name, classes, mean_std=CIFAR10, width=None):
    """One of MODELS, for images (N, 3, 32, 32). width: channels of the first layer, if not the usual ones."""
    if name not in MODELS:
        raise BadInput(f"model is {name!r}: expected one of {', '.join(MODELS)}")
    net = MODELS[name](classes, **({"width": width} if width else {}))
    return Classifier(net, *mean_std).to(memory_format=torch.channels_last)  # the fastest

def fgsm(model, x, y, eps):
    """The fast gradient sign method: one linf step of full size (Goodfellow et al. 2015)."""
    return pgd(model, x, y, eps, steps=1, step_size=eps, random_start=False)

def margin(logits, y):
    """max_{j != y} z_j - z_y, the margin negated (Carlini, Wagner 2017): steep where the network is sure."""
    others = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return (others - logits.gather(1, y[:, None])[:, 0]).sum()

def autoattack(steps, norm, eps):
    """The words of "autoattack linf 8/255" -> attack (Croce and Hein 2020)."""
    with refused("autoattack wants pip install pyautoattack"):
        from pyautoattack import AutoAttack
    given = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": radius(eps), "seed": 0}
    def attack(model, x, y):
        plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        auto, others = AutoAttack(plain, device=x.device, **given), model(x[:1]).shape[1] - 1
        auto.apgd_targeted.n_target_classes = auto.fab.n_target_classes = min(9, others)
        if others < 3:  # its loss wants four logits
            auto.attacks_to_run.remove("apgd-t")
        with torch.random.fork_rng([x.device] * x.is_cuda):
            return auto.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))[0]
    return attack

KINDS |= {
    "fgsm": lambda steps, eps: partial(fgsm, eps=radius(eps)),
    "margin": lambda steps, norm, eps, pgds=dict(KINDS): partial(pgds[norm](steps, eps), loss=margin),
    "autoattack": autoattack,
}

def spaced(n, *tensors):
    """n rows of each tensor, evenly spaced; all of them if there are no more, or for n = None."""
    n = min(n or len(tensors[0]), len(tensors[0]))
    return [t[torch.arange(n, device=t.device) * len(t) // n] for t in tensors]

@torch.no_grad()
def doubts(model, images, labels, names, steps=10, restarts=1, seed=0):
    """Reasons to doubt an evaluation, as sentences, from 200 of its images (Carlini et al. 2019)."""
    x, y = spaced(200, images, labels)
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    names = sorted((n for n in names if n.startswith(("linf ", "l2 "))), key=lambda n: radius(n.split()[1]))
    accuracy = lambda name, *how: evaluate(model, x, y, [name], *how)[name]
    with torch.random.fork_rng([x.device] * x.is_cuda), restored(model):
        torch.manual_seed(seed)
        model.eval()
        logits, (g, _) = model(x), input_gradient(model, x, y, cross_entropy)
        zero = 100 * float((steepest(g, "linf").flatten(1) == 0).all(1).float().mean())
        found = ["two passes disagree: the model is random"] * (not logits.allclose(model(x), 0, 1e-3))
        if logits.min() >= 0 and (logits.sum(1) - 1).abs().max() < 1e-3:
            found.append("the outputs are probabilities, not logits")
        if zero > 1:
            found.append(f"the gradient is zero or NaN for {zero:.0f}% of images")
        for norm, name in {name.split()[0]: name for name in names}.items():  # the largest
            weak = accuracy(name, steps, restarts)
            others = [name, f"margin {name}", f"fgsm {name.split()[1]}"][:3 if norm == "linf" else 2]
            for other, more in zip(others, (max(50, steps), steps, 1)):
                drop = weak - accuracy(other, more, restarts + 1)
                if drop > 1:
                    how = f"{other}, {more} steps, {restarts + 1} starts"
                    found.append(f"{name}: {how}, takes another {drop:.1f}")
    return found

# == 9. Where the data comes from =========================================================================
@dataclass
class Data:
    """A data set, all of it in memory. x: uint8 (N, 3, 32, 32); y: int64 (N,)."""
    x: torch.Tensor
    y: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    classes: list   # their names
    source: str     # what this is
    note: str = ""  # what it can show and what not
    augment: bool = True

@contextmanager
def refused(what):
    """Inside the block whatever goes wrong is BadInput: what, and the error's first line in brackets."""
    try:
        yield
    except Exception as error:  # libraries raise a dozen classes
        raise BadInput(f"{what} ({(str(error) or repr(error)).splitlines()[0]})") from None

def demo_data(n_train=4000, n_test=1000, classes=10, seed=0):
    """Section 10's model as images, to illustrate. Three features, the smaller the more reliable: coarse
    colours of rms 0.075, another class's in 6%, out of reach of a few /255; a tile of +-4/255, wrong in 1.5%,
    which AT erases; one of +-0.75/255, never wrong, which 1/255 erases. Strengths vary, so robustness falls
    by degrees. SGD leans on all, SAM less on what small moves of the weights upset, AT on the coarse."""
    rng = torch.Generator().manual_seed(seed)
    n = n_train + n_test
    y = torch.randint(classes, (n,), generator=rng)
    coarse = F.interpolate(torch.randn(classes, 3, 4, 4, generator=rng), size=32, mode="bilinear")
    medium, fine = torch.randn(2, classes, 3, 8, 8, generator=rng).sign().repeat(1, 1, 1, 4, 4)
    x = 0.5 + 0.025 * torch.randn(n, 3, 32, 32, generator=rng)
    for feature, rms, p in (coarse, 0.075, 0.94), (medium, 4 / 255, 0.985), (fine, 0.75 / 255, 1):
        feature *= rms / feature.pow(2).mean((1, 2, 3), keepdim=True).sqrt()
        other = (y + torch.randint(1, classes, (n,), generator=rng)) % classes
        shown = torch.where(torch.rand(n, generator=rng) < p, y, other)
        x += (0.4 + 1.2 * torch.rand(n, 1, 1, 1, generator=rng)) * feature[shown]
    x = (x * 255).round().clamp(0, 255).byte()
    parts = x[:n_train], y[:n_train], x[n_train:], y[n_train:]
    return Data(*parts, [*range(classes)], "demo data", "Drawn to show the effect.", augment=False)

def read_image(path):
    """uint8 (3, 32, 32), upright."""
    from PIL import Image, ImageOps
    from torchvision.transforms.v2.functional import pil_to_tensor, resize
    with refused(f"{path}: not an image that can be read"), Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode}, expected 8 bits a channel")
        return pil_to_tensor(resize(ImageOps.exif_transpose(image).convert("RGB"), [32, 32]))

def load_folder(directory):
    """DIR/train/CLASS/*.png and DIR/test (or val, valid) likewise, at 32x32; or Tiny-ImageNet as it unpacks.
    SOURCE.txt in DIR may say in its first line what the images are, in the others what they can show."""
    from torchvision.datasets import ImageFolder
    place = Path(directory).resolve()
    listed = place / "val" / "val_annotations.txt"
    with refused(f"{directory}: expected train/CLASS/IMAGE, and test/ (val/, valid/) likewise"):
        train = ImageFolder(place / "train")
        if listed.exists():
            rows = [line.split("\t") for line in listed.read_text("utf-8").splitlines()]
            tests = [(listed.parent / "images" / row[0], train.class_to_idx[row[1]]) for row in rows]
        else:
            name = next((name for name in ("test", "val", "valid") if (place / name).is_dir()), "test")
            test = ImageFolder(place / name)
            if len(train.classes) < 2 or train.classes != test.classes:
                raise ValueError(f"train has {train.classes}, {name} {test.classes}: the same, two or more")
            tests = test.samples
    tensors = []
    for part in train.samples, tests:
        paths, labels = zip(*part)
        tensors += [torch.stack([*map(read_image, paths)]), torch.tensor(labels)]
    about = place / "SOURCE.txt"
    lines = about.read_text("utf-8", "replace").splitlines() if about.exists() else []
    name, *note = lines or [place.name]
    return Data(*tensors, train.classes, name, " ".join(note))

def load_data(name, directory):
    """One of --dataset's choices; torchvision downloads CIFAR if it is not there."""
    if "cifar" not in name:
        return load_folder(directory) if name != "demo" else demo_data()
    from torchvision import datasets
    tensors = []
    with refused(f"{name} is not in {directory} and cannot be downloaded; --dataset demo needs none"):
        for train in True, False:
            part = getattr(datasets, name.upper())(directory, train, download=True)
            x = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
            tensors += [x, torch.tensor(part.targets)]
    return Data(*tensors, part.classes, name)

# == 10. Why it works: the simplified model of [2] ========================================================
#    y is +1 or -1. One robust feature, x_1 = y with probability p, else -y; n others, Normal(eta y, 1), eta
#    small. The classifier sign(w x_1 + x_2 + .. + x_{n+1}) has one weight, its trust in the robust feature.
#        standard   max_w A(w)                         w = ln(p/(1-p)) / (2 eta)
#        AT         the same with eta - eps for eta    w = ln(p/(1-p)) / (2 (eta - eps))    first order in eps
#        SAM        max_w min(A(w - rho), A(w + rho))  w = w_standard (1 + rho^2/(3n))    second order in rho
#    A' = 0 where p phi((w + eta n)/sqrt n) = (1-p) phi((eta n - w)/sqrt n); its logarithm is linear in w.
#    AT moves each of the n features by eps < eta against y; x_1 is out of its reach. For SAM expand
#    A(w + rho) = A(w - rho) at w_0 = w_standard: A'' (w - w_0) + A''' rho^2/6 = 0, A'''/A'' = -2 w_0/n.
def simple_accuracy(w, p, eta, n):
    """A(w) = p Phi((w + eta n)/sqrt n) + (1-p) Phi((eta n - w)/sqrt n), w a tensor."""
    Phi, root = torch.special.ndtr, math.sqrt(n)
    return p * Phi((w + eta * n) / root) + (1 - p) * Phi((eta * n - w) / root)

def w_standard(p, eta):
    """The maximiser of A; also AT's, at eta - eps."""
    return math.log(p / (1 - p)) / (2 * eta)

def w_sam(p, eta, n, rho):
    """The maximiser of min(A(w - rho), A(w + rho)), to second order in rho."""
    return w_standard(p, eta) * (1 + rho ** 2 / (3 * n))

class OneWeight(nn.Module):
    """That classifier as a network. Its "image" holds the mean values of the n features, eta each, as pixels
    1/2 + eta/40 (40 keeps them in [0,1]); its cross-entropy at label 0 is 2 - A(w)."""
    def __init__(self, p, n, w):
        super().__init__()
        self.p, self.n, self.w = p, n, nn.Parameter(torch.tensor([w], dtype=torch.float64))

    def forward(self, x):
        loss = 2 - simple_accuracy(self.w, self.p, 40 * (x - 0.5).mean(1), self.n)
        return torch.stack([torch.zeros_like(loss), loss.expm1().log()], 1)  # log(1 + e^z) = loss

def trained_w(step, p, eta, n, updates=200):
    """Where the weight ends when step, one of section 3, trains it."""
    w = w_standard(p, eta)
    curvature = 2 * p * eta / math.sqrt(2 * math.pi * n) * math.exp(-(w + eta * n) ** 2 / (2 * n))
    model = OneWeight(p, n, w + 0.5)
    x, y = torch.full((1, n), 0.5 + eta / 40, dtype=torch.float64), torch.tensor([0])
    for k in range(updates):
        step(model, x, y, torch.optim.SGD(model.parameters(), lr=1 / curvature / (1 + k / 3)))
    return model.w.item()

def theory(p=0.9, eta=0.5, n=10, rhos=(0.5, 1.0, 2.0)):
    """The weight by closed form, by search, and as section 3 trains it: rows. "sam" ascends to the worst w;
    along the gradient, between w_standard and w_sam, it climbs the wrong side."""
    A = partial(simple_accuracy, p=p, eta=eta, n=n)
    worst = lambda weights, grads, rho: [
        torch.full_like(weights[0], min(rho, -rho, key=lambda v: A(weights[0] + v)))]
    cases = [("sgd", 0.0, w_standard(p, eta), A, sgd_step)]
    for eps in (eta / (1 + 3 * n / rho ** 2) for rho in rhos):  # AT's w is SAM's
        step = partial(at_step, eps=eps / 40, steps=8)
        cases.append(("at", eps, w_standard(p, eta - eps), partial(A, eta=eta - eps), step))
    for rho in rhos:
        lowest = lambda w, rho=rho: torch.minimum(A(w - rho), A(w + rho))
        cases.append(("sam", rho, w_sam(p, eta, n, rho), lowest, partial(sam_step, rho=rho, ascend=worst)))
    cases.append(("sam, its gradient", rhos[-1], w_standard(p, eta), A, partial(sam_step, rho=rhos[-1])))
    grid = torch.linspace(0, 20, 200_001, dtype=torch.float64)
    return [{"training": training, "radius": radius, "closed_form": closed,
             "numerical": grid[gain(grid).argmax()].item(), "trained": trained_w(step, p, eta, n)}
            for training, radius, closed, gain, step in cases]

# == 11. The duality, measured: does flat around the weights go with flat around the inputs? ==============
def sharpness(model, x, y, rhos=(0.05, 0.1, 0.2), attacks=ATTACKS):
    """How far the mean loss on pixels x rises at SAM's ascent of length rho, and under PGD-10, in eval mode:
    {"rho 0.1": nats, .., "linf 1/255": nats, ..}."""
    rises = {}
    with restored(model):
        model.eval()
        loss, _ = gradient(model, x, y)
        rise = torch.no_grad()(lambda x: float(F.cross_entropy(model(x), y) - loss))
        for rho in rhos:
            with perturbed(model, rho):
                rises[f"rho {rho}"] = rise(x)
        model.zero_grad()
        for norm, eps in map(str.split, attacks):
            rises[f"{norm} {eps}"] = rise(pgd(model, x, y, radius(eps), norm))
    return rises

# == 12. Settings and the command line ====================================================================
AT = ("norm", "eps", "attack_steps")
METHODS = {  # name -> (the settings that belong to it, settings -> its step)
    "sgd": ((), lambda s: sgd_step),
    "sam": (("rho",), lambda s: partial(sam_step, rho=s.rho)),
    "asam": (("rho",), lambda s: partial(sam_step, rho=s.rho, ascend=adaptive_ascent)),
    "esam": (("rho",), lambda s: partial(esam_step, rho=s.rho)),
    "at": (AT, lambda s: attacked(s, sgd_step)),
    "sam+at": (("rho", *AT), lambda s: attacked(s, partial(sam_step, rho=s.rho))),
    "awp": (("awp_gamma", *AT),
            lambda s: attacked(s, partial(sam_step, rho=s.awp_gamma, ascend=layerwise_ascent))),
}

def attacked(s, step):
    return partial(at_step, eps=s.eps, norm=s.norm, steps=s.attack_steps, step=step)

def setting(default, text, *choices, **options):
    options |= {"choices": choices} if choices else {}
    return field(default=default, metadata={"help": text, **options})

CUDA, CPU = torch.cuda.is_available(), torch.cpu.get_capabilities()
BF16 = {"cuda": CUDA and torch.cuda.is_bf16_supported(False), "cpu": CPU.get("avx512_bf16", False)}

@dataclass
class Settings:
    """All that can be said on the command line. --preset paper changes some defaults."""
    method: str = setting(("sgd", "sam", "at"), "what to train", *METHODS, nargs="+")
    preset: str = setting("demo", "embedded data; or the papers' recipe", "demo", "paper")
    rho: float = setting(0.15, "SAM's radius; asam wants ten times as much")
    awp_gamma: float = setting(0.005, "awp's radius over a layer's norm")
    eps: float = setting(None, "AT's radius (default: demo 4/255, paper 8/255, l2 128/255)", type=radius)
    norm: str = setting("linf", "AT's norm", "linf", "l2")
    attack_steps: int = setting(5, "AT's steps, each of eps/4")
    dataset: str = setting("demo", "", "demo", "cifar10", "cifar100", "tiny-imagenet", "folder")
    data_dir: str = setting(None, "its place; of your own images: train/CLASS/, test/CLASS/")
    model: str = setting("small", "the network", *MODELS)
    width: int = setting(None, "channels of its first layer, if not the usual ones")
    epochs: int = setting(10, "passes over the training images")
    batch_size: int = setting(128, "images a step, over all devices")
    lr: float = setting(None, "learning rate (default: 0.1; deit_ti: AdamW, 0.001)")
    bf16: bool = setting(None, "train in bfloat16 (default: if the device can)")
    compile: bool = setting(False, "torch.compile the network for training")
    seed: int = setting(0, "of weights, batches and attacks")
    device: str = setting("cuda" if CUDA else "cpu", "", "cpu", *["cuda"] * CUDA)
    runs: str = setting("runs", "a folder of runs: checkpoint and records")
    attacks: str = setting(ATTACKS, "see sections 7 and 8", nargs="+")
    eval_steps: int = setting(10, "PGD's steps, each of eps/4")
    restarts: int = setting(1, "PGD's random starts, all to withstand")
    images: int = setting(None, "test images, evenly spaced (default: all)")
    sharpness: bool = setting(False, "no attacks: the loss's rise around weights and inputs")
    json: str = setting(None, "new file for the final table")
    theory: bool = setting(False, "just the simplified model: solved, searched, trained")
    benchmark: bool = setting(False, "just time the methods' steps")
    report: str = setting(None, "folder for RESULTS.md, made from its results/ and --runs")
    pictures: str = setting(None, "the same for results/*.png (matplotlib)")

def parse_args(argv=None):
    """Settings from flags over the preset. Input that makes no sense ends the program, with code 2."""
    parser = argparse.ArgumentParser(usage="sam_at.py [--FLAG VALUE ...]", allow_abbrev=False)
    for f in fields(Settings):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        options = {"default": f.default, **kind, **f.metadata}
        options["help"] += "" if f.default in (None, False) else " (default: %(default)s)"
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    if parser.parse_known_args(argv)[0].preset == "paper":
        parser.set_defaults(dataset="cifar10", model="prn18", epochs=100, rho=0.2, compile=CUDA)
    s = Settings(**vars(parser.parse_args(argv)))
    s.method, s.attacks = [*dict.fromkeys(s.method)], [*dict.fromkeys(s.attacks)]
    s.eps = s.eps or (128 if s.norm == "l2" else 8 if s.preset == "paper" else 4) / 255
    s.lr = s.lr if s.lr is not None else 1e-3 if s.model == "deit_ti" else 0.1
    s.bf16 = BF16[s.device] if s.bf16 is None else s.bf16
    for name in s.attacks:
        parse_attack(name)  # raises BadInput
    for f in fields(Settings):
        value, least = getattr(s, f.name), 0 if f.name in ("rho", "awp_gamma", "seed") else 1e-15
        if f.type in (int, float) and value is not None and not least <= value < 1e9:
            raise BadInput(f"--{f.name.replace('_', '-')} {value} makes no sense")
    for wrong, message in (
            ("" in (s.runs, s.data_dir, s.report, s.pictures, s.json), "a name is empty"),
            (s.dataset in ("tiny-imagenet", "folder") and not s.data_dir, "--dataset wants --data-dir DIR"),
            (s.dataset == "demo" and s.data_dir, "--data-dir wants its --dataset"),
            (s.batch_size % WORLD, f"--batch-size: {WORLD} processes cannot share {s.batch_size}"),
            (s.json and os.path.lexists(s.json), f"--json {s.json} exists")):
        if wrong:
            raise BadInput(message)
    return s

def main(argv=None):
    """The command line. Returns the exit code: 0; 2 after a line on what cannot be done; 130 after Ctrl-C."""
    with suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a name's letter
    try:
        s = parse_args(argv)
        rows = perform(s)
        if s.json:
            write_whole(Path(s.json), (json.dumps(rows, indent=1) + "\n").encode())
        return 0
    except (BadInput, FloatingPointError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        code, message = 2, (str(error).splitlines() or ["out of memory"])[0]
    except KeyboardInterrupt:
        code, message = 130, "interrupted; the same command goes on"
    if RANK == 0 or "out of memory" in message:
        print(f"sam_at.py: {message}", file=sys.stderr)
    return code

def perform(s):
    """Do what the settings say; returns rows, for --json."""
    torch.backends.cudnn.allow_tf32 = False  # attacks want all 23 bits
    modes = [mode for mode in (report, pictures, benchmark) if getattr(s, mode.__name__)]
    if modes:
        return [mode(s) for mode in modes][-1]
    if s.theory:
        print(align(rows := theory()))
        return rows
    start_processes(s)
    data = load_data(s.dataset, s.data_dir or "data")
    print(f"{data.source}, {len(data.x)} and {len(data.x_test)} images; {s.model} on {s.device}")
    tensors = {key: t.to(s.device) for key, t in vars(data).items() if isinstance(t, torch.Tensor)}
    return show([run(method, s, replace(data, **tensors)) for method in s.method])

# == 13. Runs: a folder each, with checkpoint.pt, replaced after each epoch, and results.jsonl =============
SHARED = ("dataset", "model", "width", "epochs", "batch_size", "lr", "bf16", "seed", "device", "compile")

def sha256(thing):
    """Checksum of the values, in order and bit for bit: tensors, numbers, texts in dicts and lists."""
    digest = hashlib.sha256()
    for leaf in tree_leaves(thing):
        if isinstance(leaf, torch.Tensor):
            leaf = leaf.detach().cpu().contiguous().numpy().tobytes()
        digest.update(leaf if isinstance(leaf, bytes) else repr(leaf).encode())
    return digest.hexdigest()

def label_of(run):
    """"sgd", "sam rho 0.2" or "at linf 8/255"."""
    words = [run["method"]]
    for key in METHODS[run["method"]][0]:
        if key == "eps":
            words.append(f"{run['norm']} {255 * run['eps']:g}/255")
        elif key != "norm" and (key, run[key]) != ("attack_steps", 5):
            words.append(f"{key.split('_')[-1]} {run[key]}")
    return " ".join(words)

def write_whole(path, content):
    """Write bytes whole or not at all; the first process does."""
    if RANK:
        return
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(content)
    os.replace(part, path)

def read_records(path):
    """The records of a file, a line each. Raises BadInput, which names the file, unless they are whole."""
    with refused(f"{path}: not records of this program; move it away"):
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for r in records:  # all that the report makes of them
            title_of(r), label_of(r["run"]), table_of({"": [r]}), r["images"] + 1, r["machine"] + r["note"]
    return records

def build(s, classes, mean_std):
    """The network on its device, the same for training (compiled or not), its optimizer and schedule."""
    torch.manual_seed(s.seed)  # one start for all; the same batches for SGD and SAM
    with refused(f"--model {s.model} --width {s.width}: cannot be built"):
        model = make_model(s.model, classes, mean_std, s.width).to(s.device)
    model.bf16 = s.bf16
    adamw = [partial(torch.optim.AdamW, weight_decay=0.05)] * (s.model == "deit_ti")
    fast = torch.compile(model, dynamic=False) if s.compile else model
    return model, fast, *make_optimizer(model, s.lr, s.epochs, *adamw)

def run(method, s, data):
    """Train one network, or go on where it stopped, and measure it. Returns its record."""
    this = {"method": method, "data_sha256": sha256([data.x, data.y, data.x_test, data.y_test])}
    this |= {key: getattr(s, key) for key in METHODS[method][0] + SHARED}  # decides the weights
    this["device"] += f" x {WORLD}" if WORLD > 1 else ""  # so do shares
    how = {key: getattr(s, key) for key in ("attacks", "eval_steps", "restarts", "images")}
    how = {"sharpness": True, "images": s.images or 1000} if s.sharpness else how
    label, log = label_of(this), []
    name = f"{s.dataset}-{s.model}-{label}-seed{s.seed}-{sha256(json.dumps(this))[:8]}"
    folder = Path(s.runs, name.replace(" ", "-").replace("/", "_"))
    results, checkpoint = folder / "results.jsonl", folder / "checkpoint.pt"
    for record in read_records(results) if results.exists() else []:
        if record["how"] == how:
            print(f"{label}  reported from {results}", flush=True)
            return record
    std, mean = torch.std_mean(data.x.float() / 255, dim=(0, 2, 3))
    model, fast, optimizer, schedule = build(s, len(data.classes), (mean, std.clamp_min(1e-3)))
    folder.mkdir(parents=True, exist_ok=True)
    results.open("a").close()  # fails now, not later
    rng = torch.cuda if s.device == "cuda" else torch
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if checkpoint.exists():
        with refused(f"{checkpoint}: damaged, or another run's; move it away"):
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            if state.pop("sha256") != sha256(state) or state["run"] != this:
                raise ValueError("wrong checksum")
            for name, part in parts.items():
                part.load_state_dict(state[name])
            for place, random in zip((torch, rng), state["random"]):
                place.set_rng_state(random)
            log = state["log"]
        print(f"{label}  goes on after epoch {len(log)}/{s.epochs}", flush=True)
    optimizer.register_step_pre_hook(average_gradients)
    for row in train(fast, data, METHODS[method][1](s), optimizer, schedule, s.epochs, s.batch_size):
        log.append(row)
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"run": this, "log": log, "random": [torch.get_rng_state(), rng.get_rng_state()]}
        torch.save(state | {"sha256": sha256(state)}, buffer := io.BytesIO())
        write_whole(checkpoint, buffer.getvalue())
        left = fmean(row["seconds"] for row in log) * (s.epochs - len(log))
        print(f"{label}  epoch {len(log)}/{s.epochs}  loss {row['loss']:.4f}  accuracy {row['accuracy']:.1f}%"
              f"  {row['seconds']:.1f} s, {left:.0f} s left", flush=True)
    torch.manual_seed(s.seed)
    x, y = spaced(how["images"], data.x_test, data.y_test)
    if s.sharpness:
        figures, found = sharpness(model, x.float() / 255, y), []
    else:
        figures = {}
        for attack in s.attacks:
            torch.manual_seed(s.seed)
            figures |= evaluate(model, x, y, [attack], s.eval_steps, s.restarts)
            print(f"{label}  {attack}: {figures[attack]:.1f}%", flush=True)
        found = doubts(model, x, y, s.attacks, s.eval_steps, s.restarts, s.seed)
    machine = torch.cuda.get_device_name() if s.device == "cuda" else CPU.get("cpu_name", "CPU")
    record = {"run": this, "how": how, "figures": figures, "doubts": found, "images": len(x),
              "seconds": s.epochs * min(row["seconds"] for row in log), "train_accuracy": log[-1]["accuracy"],
              "data": data.source, "note": data.note, "machine": machine, "torch": torch.__version__,
              "date": time.strftime("%Y-%m-%d"), "code": sha256(Path(__file__).read_bytes())[:12]}
    write_whole(results, results.read_bytes() + (json.dumps(record) + "\n").encode())
    return record

# == 14. More than one device =============================================================================
#    Processes with the same weights and random numbers take their shares of the same batches. The gradients
#    are averaged before the update; SAM's v is each share's own (m-sharpness, Foret et al. 2021, section 4).
def start_processes(s):
    """Join the other processes, if torchrun started this one; all but the first print nothing."""
    if WORLD > 1:
        if s.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if s.device == "cuda" else "gloo")
        atexit.register(distributed.destroy_process_group)
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout

def average_gradients(optimizer, *_):
    """A hook in front of optimizer.step(): one all-reduce for all weights."""
    if WORLD > 1:
        grads = [w.grad for w in trained_weights(optimizer) if w.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        distributed.all_reduce(flat)
        for g, mean in zip(grads, (flat / WORLD).split([g.numel() for g in grads])):
            g.copy_(mean.view_as(g))

# == 15. What a step costs ================================================================================
def benchmark(s):
    """Time a step of each method on random pixels, SGD's first; print and return the rows."""
    from torch.utils.benchmark import Timer
    x = torch.rand(s.batch_size, 32, 32, 3, device=s.device).permute(0, 3, 1, 2)  # as in batches()
    y = torch.arange(s.batch_size, device=s.device) % 10
    rows = []
    for method in dict.fromkeys(["sgd", *s.method]):
        _, fast, optimizer, _ = build(s, 10, CIFAR10)
        step = partial(METHODS[method][1](s), fast, x, y, optimizer)
        timer = Timer("step()", globals=locals(), num_threads=torch.get_num_threads())
        seconds = timer.adaptive_autorange(threshold=0.2, min_run_time=1, max_run_time=20).median
        rows.append({"method": method, "step_s": seconds})
        rows[-1]["ratio_to_sgd"] = seconds / rows[0]["step_s"]
    print(f"a step of {s.model}, batch {s.batch_size}, on {s.device}\n{align(rows)}")
    return rows

# == 16. What came of it: tables, verdicts, pictures ======================================================
CLAIMS = {  # of [1] and [2], and when they hold here
    "C1": "SAM alone makes more robust, for free: some rho gains on SGD and loses at most 0.5 clean",
    "C2": "AT makes most robust, at a price: the best gains on SGD and all SAM, loses over 0.5 clean",
    "C3": "SAM is gentler: the best SAM is, on average, between SGD and the best AT, and loses less",
    "C4": "A simplified model shows why: formula, search and training agree within 3%",
    "C5": "Its variants do the same: every row of ASAM and ESAM fulfils C1",
    "C6": "SAM is cheap: fewer gradients a step than AT",
}

def align(rows):
    """Rows of cells, or dicts, as text: the first column to the left, the others to the right."""
    if isinstance(rows[0], dict):
        rows = [[*rows[0]]] + [[c if isinstance(c, str) else f"{c:.3f}" for c in r.values()] for r in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]) for r in rows)

def title_of(record):
    """What the records of one table share: data, images, and the flags that differ from the defaults."""
    usual = {f.name: f.default for f in fields(Settings)} | {"lr": 0.1, "nproc_per_node": ""}
    same = {key: record["run"][key] for key in SHARED[:7]} | record["how"] | {"attacks": ATTACKS}
    same["nproc_per_node"] = record["run"]["device"].partition(" x ")[2]
    flags = [f"--{k.replace('_', '-')} {v}" for k, v in same.items() if v != usual[k]]
    flags = " ".join(flags).replace(" True", "").replace("--bf16 False", "--no-bf16")
    return f"{record['data']}, {record['images']} test images: {flags}"

def mean_and_error(records, keys):
    """Mean over seeds (of the keys' mean) and its standard error, the larger of seeds' and images'."""
    values = [fmean(r["figures"][key] for key in keys) for r in records]
    a, spread = fmean(values), stdev(values) if len(values) > 1 else 0.0
    return a, max(spread / math.sqrt(len(values)), math.sqrt(a * (100 - a) / records[0]["images"]))

def gain(records, others, *keys):
    """How much more accurate the one are than the others, and the standard error of that."""
    (a, error), (b, other) = mean_and_error(records, keys), mean_and_error(others, keys)
    return a - b, math.hypot(error, other)

def rank_correlation(a, b, shuffles=9999):
    """Spearman's, and its p value: the share of random orders of b that go with a, or against it, as far."""
    a, b = (torch.tensor(t).argsort().argsort() - (len(t) - 1) / 2 for t in (a, b))
    rng = torch.Generator().manual_seed(0)
    orders = torch.rand(shuffles, len(b), generator=rng).argsort(1)
    r = torch.cat([b[None], b[orders]]) @ a / (a @ a)
    return r[0].item(), (r.abs() >= r[0].abs() - 1e-6).float().mean().item()

def verdicts(rows):
    """{claim: its verdict, with figures against SGD} from the rows of a table, by the rules of CLAIMS."""
    keys = [key for key in next(iter(rows.values()))[0]["figures"] if key != "clean"]
    of = lambda *methods: [label for label in rows if label.split()[0] in methods]
    robust = lambda a: mean_and_error(rows[a], keys)[0]
    lost = lambda a: -gain(rows[a], rows["sgd"], "clean")[0]
    wins = lambda a, b="sgd": sum(d > 2 * e for d, e in (gain(rows[a], rows[b], key) for key in keys))
    free = lambda a: wins(a) == len(keys) and lost(a) <= 0.5

    def verdict(holds, *labels):
        seeds = min(len(rows[a]) for a in ["sgd", *labels])
        text = ("yes" if holds else "no") + f", seeds: {seeds}"
        for a in labels:
            (d, e), (clean, error) = gain(rows[a], rows["sgd"], *keys), gain(rows[a], rows["sgd"], "clean")
            text += f"; {a} {d:+.1f} ± {e:.1f}, clear under {wins(a)}/{len(keys)}"
            text += f", clean {clean:+.1f} ± {error:.1f}"
        return text

    found, sam, at, variants = {}, of("sam"), of("at"), of("asam", "esam")
    if of("sgd") and sam:
        nearest = max(sam, key=lambda a: (free(a), lost(a) <= 0.5, robust(a)))
        found["C1"] = verdict(free(nearest), nearest)
    if of("sgd") and variants:
        found["C5"] = verdict(all(map(free, variants)), *variants)
    if of("sgd") and sam and at:
        best, gentle = max(at, key=robust), max(sam, key=robust)
        ahead = all(wins(best, a) == len(keys) for a in ["sgd", *sam])
        between = robust("sgd") < robust(gentle) < robust(best)
        found["C2"] = verdict(ahead and lost(best) > 0.5, best)
        found["C3"] = verdict(between and lost(gentle) < lost(best), gentle, best)
    return found

def table_of(rows):
    """A heading of two lines, a line a label: mean±deviation over seeds, or all seeds if far apart."""
    keys = [*next(iter(rows.values()))[0]["figures"]]
    digits = 1 if "clean" in keys else 2
    names = ["method", "seeds", *keys, "stronger", "train %", "train s"]
    cells = [*zip(*(name.rpartition(" ")[::2] for name in names))]
    for label, runs in rows.items():
        figures = []
        for seeds in ([r["figures"][key] for r in runs] for key in keys):
            apart = stdev(seeds) if len(seeds) > 1 else 0
            text = f"{fmean(seeds):.{digits}f}" + f"±{apart:.{digits}f}" * (len(seeds) > 1)
            figures.append(text if apart < 5 else " ".join(f"{a:.0f}" for a in seeds))
        doubts = [doubt for r in runs for doubt in r["doubts"]]
        drops = [float(doubt.split()[-1]) for doubt in doubts if "another" in doubt]
        stronger = f"-{max(drops):.1f}" if drops else "?" * bool(doubts)
        last = fmean(r["train_accuracy"] for r in runs), min(r["seconds"] for r in runs)
        cells.append([label, str(len(runs)), *figures, stronger, *map("{:.1f}".format, last)])
    return cells

def show(records):
    """Print what runs end with: figures, doubts, and what clearly differs from SGD. Returns rows."""
    rows = {label_of(r["run"]): [r] for r in records}
    print(f"\n{title_of(records[0])}\n{align(table_of(rows))}")
    sgd = rows.get("sgd")
    for label, [r] in rows.items():
        print("".join(f"warning: {label}: {doubt}\n" for doubt in r["doubts"]), end="")
        if sgd and label != "sgd" and "attacks" in r["how"]:
            changes = {key: gain([r], sgd, key) for key in r["figures"]}
            clear = [f"{d:+.1f} {key}" for key, (d, e) in changes.items() if abs(d) > 2 * e]
            print(f"{label} against sgd: {', '.join(clear) or 'no clear difference'}")
    return [{"method": r["run"]["method"], "seconds": r["seconds"], "clean": r["figures"].get("clean"),
             "robust": {key: a for key, a in r["figures"].items() if key != "clean"}} for r in records]

def tables_of(place, runs):
    """The records in place/results/ and runs/: ({(title, data, columns): {label: records}}, all as lines)."""
    files = [*Path(place, "results").glob("records.jsonl"), *sorted(Path(runs).glob("*/results.jsonl"))]
    key = lambda r: repr([title_of(r), r["run"] | {"device": 0, "compile": 0}, r["how"]])
    lines = {key(r): json.dumps(r) for f in files for r in read_records(f)}
    if not lines:
        raise BadInput(f"no records in {place}/results nor in {runs}")
    order = lambda r: (-r["images"], title_of(r), [*METHODS].index(r["run"]["method"]), label_of(r["run"]))
    tables = {}
    for r in sorted(map(json.loads, lines.values()), key=order):
        table = tables.setdefault((title_of(r), r["run"]["data_sha256"], *r["figures"]), {})
        table.setdefault(label_of(r["run"]), []).append(r)
    return tables, [*lines.values()]

def report(s):
    """Write RESULTS.md, and results/records.jsonl that it came from."""
    tables, lines = tables_of(s.report, s.runs)
    solved, block = theory(), "```\n{}\n```\n".format
    apart = max(abs(r[way] / r["closed_form"] - 1) for r in solved for way in ("numerical", "trained"))
    found, parts = {claim: [] for claim in CLAIMS} | {"C6": ["yes; 2, AT 6"]}, []
    found["C4"] = [f"{'yes' if apart < 0.03 else 'no'}; within {apart:.1%}"]
    for number, ((title, _, *keys), rows) in enumerate(tables.items(), 1):
        every = [r for runs in rows.values() for r in runs]
        machines = ", ".join(sorted({r["machine"] for r in every}))
        data, flags = title.rsplit(": ", 1)
        parts += [f"## {number}. {data}\n", f"`{flags}`, on {machines}. {every[0]['note']}\n"]
        parts.append(block(align(table_of(rows))))
        if "clean" not in keys and len(rows) > 3:
            weights, inputs = ([fmean(r["figures"][key] for r in runs for key in side)
                                for runs in rows.values()] for side in (keys[:3], keys[3:]))
            r, p = rank_correlation(weights, inputs)
            parts.append(f"Rank correlation of the rises around weights and inputs: {r:+.2f}, p = {p:.2g}.\n")
        if keys == ["clean", *ATTACKS]:
            for claim, text in verdicts(rows).items():
                found[claim].append(f"table {number}: {text}")
    head = ["# Results\n", "Written by `--report .`. To repeat a row, give the table's flags, `--data-dir`,",
            "`--seed`, the row's, and the columns as `--attacks`.\n", "| claim | does it hold? |\n|---|---|"]
    head += [f"| {c}. {CLAIMS[c]}. | {'<br>'.join(found[c]) or 'open'} |" for c in CLAIMS]
    head += ["\nTo gain: by over two standard errors (clear; of one seed, the images') under every attack.",
             "31 29: seeds apart. Stronger: what other attacks took. Train s: epochs x the fastest.\n"]
    parts += ["## The weight on the robust feature (C4)\n", block(align(solved))]
    write_whole(Path(s.report, "results", "records.jsonl"), "\n".join([*lines, ""]).encode())
    write_whole(Path(s.report, "RESULTS.md"), "\n".join([*head, *parts]).encode(errors="replace"))
    print(f"RESULTS.md: {len(lines)} records")
    return []

def pictures(s):
    """A picture a table, a dot a run: clean accuracy against the mean under attack, or the loss's rises."""
    with refused("pictures want pip install matplotlib"):
        from matplotlib.figure import Figure
    tables, _ = tables_of(s.pictures, s.runs)
    (place := Path(s.pictures, "results")).mkdir(parents=True, exist_ok=True)
    for (title, data, *keys), rows in tables.items():
        axes = Figure().subplots()
        up = [key for key in keys if key == "clean" or key.startswith("rho")]
        right = [key for key in keys if key not in up]
        for i, (label, runs) in enumerate(rows.items()):
            x, y = ([fmean(r["figures"][key] for key in part) for r in runs] for part in (right, up))
            axes.plot(x, y, "osv^D<>p*XP"[i % 11], color=f"C{i % 10}", mfc="none", label=label)
        axes.set(xlabel="mean of " + ", ".join(right), ylabel=", ".join(up))
        axes.set_title(title.replace(": ", "\n"), fontsize=9)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        axes.figure.savefig(place / f"{sha256([title, data, keys])[:6]}.png", bbox_inches="tight")
    return []

if __name__ == "__main__":
    sys.exit(main())
