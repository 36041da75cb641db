"""Sharpness-aware minimization (SAM) and adversarial training (AT), side by side in one file.
Is a network whose loss is flat around its *weights* also flat around its *inputs*, and so harder to attack?
  [1] Sharpness-Aware Minimization Alone can Improve Adversarial Robustness, arXiv 2305.05392
  [2] On the Duality Between Sharpness-Aware Minimization and Adversarial Training, arXiv 2402.15152

    SGD   min_w                          L(w; x, y)          L: the mean cross-entropy of a batch
    SAM   min_w  max_{|v|_2 <= rho}      L(w + v; x, y)      the worst weights near w: one v for the batch
    AT    min_w  max_{|delta|_p <= eps}  L(w; x + delta, y)  the worst inputs near x: a delta for each image
[1] and [2] claim that SAM alone gains robustness and keeps clean accuracy, and that AT gains more and loses some;
RESULTS.md says what came of that here. To train with SGD, SAM and AT, attack all three and print one table:
    python sam_at.py                     on synthetic data, in a minute
    python sam_at.py --method sam        one of them
    python sam_at.py --help              everything else
Units: pixels are in [0,1], eps and delta in the same unit (8/255, not 8), rho in the unit of the weights.
x: float images (N, C, H, W).  y: int64 labels (N,).  logits: (N, classes).
"""
import argparse
import atexit
import base64
import copy
import hashlib
import importlib
import io
import json
import math
import os
import sys
import time
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # waiting threads soon sleep, or two programs stall each other

import numpy
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

RANK, WORLD = 0, 1  # which of how many processes this is
if distributed.is_torchelastic_launched():  # that is, by torchrun
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

class BadInput(ValueError):
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
    g = torch.nan_to_num(g)  # NaN moves nothing; an infinite gradient keeps its sign
    if norm == "linf":
        return g.sign()
    largest = g.abs().amax(tuple(range(1, g.ndim)), keepdim=True)
    g = g / largest.clamp_min(1e-37)  # otherwise the squares of a tiny g would be 0
    return g / l2_norm(g).clamp_min(1e-37)

def project(delta, eps, norm):
    """The nearest point of the ball |delta|_p <= eps, per image."""
    if norm == "linf":
        return delta.clamp(-eps, eps)
    return delta * (eps / l2_norm(delta).clamp_min(1e-37)).clamp_max(1)

def random_delta(x, eps, norm):
    """A random start in the ball: uniform for linf; a uniform direction times a uniform length for l2."""
    if norm == "linf":
        return eps * (2 * torch.rand_like(x) - 1)
    return eps * torch.rand_like(l2_norm(x)) * steepest(torch.randn_like(x), "l2")

def summed_cross_entropy(logits, y):  # a sum: gradients do not shrink as batches grow
    return F.cross_entropy(logits, y, reduction="sum")

def input_gradient(model, x, y, loss):
    """g = dL/dx, shaped like x, and which images the model gets wrong, (N,) bool."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x.clone())  # a copy, here and below: some models work in place
        g, = torch.autograd.grad(loss(logits, y), x)
    wrong = logits.detach().argmax(1) != y
    return g, wrong.view(len(y), -1).all(1)  # in segmentation: wrong everywhere

@contextmanager
def restored(model):
    """After the block the model's buffers, modes and requires_grad have their old values, bit for bit: BatchNorm's
    running statistics are of w and of finished images, not of w + v nor of an attack under way."""
    modules = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    wanted = [(w, w.requires_grad) for w in model.parameters()]
    try:
        yield
    finally:
        for w, wants in wanted:
            w.requires_grad_(wants)
        for module, mode, its_buffers in modules:
            module.training = mode
            module._buffers.update(its_buffers)  # forward() may have put others in their place
        for buffer, before in buffers:
            buffer.data.copy_(before)

LIMITS = {"linf": 1, "l2": 8}  # eps stays below: 8 instead of 8/255 is a slip

def check_radius(eps, norm):
    if norm not in LIMITS or not 0 <= eps < LIMITS[norm]:
        raise BadInput(f"{norm} {eps}: expected linf and a radius below 1, or l2 and one below 8 (8/255, not 8)")

def check(x, y):
    """Raise BadInput unless x are float pixels in [0,1] and y their labels."""
    if x.dtype not in (torch.float32, torch.float64) or y.dtype != torch.int64 or x.shape[:1] != y.shape[:1]:
        raise BadInput(f"images {x.dtype} {[*x.shape]}, labels {y.dtype} {[*y.shape]}: expected float32 or 64, int64")
    if not (x.min() >= -1e-6 and x.max() <= 1.000001):
        raise BadInput(f"pixels from {x.min():.3g} to {x.max():.3g}, not 0 to 1: normalise inside the model")

def pgd(model, x, y, eps, norm="linf", steps=10, step_size=None, random_start=True,
        loss=summed_cross_entropy, stop_when_fooled=False):
    """Projected gradient ascent to images of high loss within eps of x (Madry et al. 2018, section 2.1).
    x: pixels in [0,1], (N, ...).  eps, step_size: in the same unit; a step is eps/4 unless given, as in [2].
    stop_when_fooled: an image stays where the model first gets it wrong; what is right at the end was right at every
    step. Returns x_adv, shaped like x; the model and its .grad stay as they were. Raises BadInput."""
    check_radius(eps, norm)
    check(x, y)
    if step_size is None:
        step_size = eps / 4
    x = x.detach()
    delta = random_delta(x, eps, norm) if random_start else 0
    x_adv = (x + delta).clamp(0, 1)
    with restored(model):
        model.requires_grad_(False)  # the attack needs no gradient of the weights
        for _ in range(steps):
            g, fooled = input_gradient(model, x_adv, y, loss)
            delta = project(x_adv - x + step_size * steepest(g, norm), eps, norm)
            moved = (x + delta).clamp(0, 1)  # clipping moves a pixel towards x, so delta stays in the ball
            if stop_when_fooled:
                moved[fooled] = x_adv[fooled]
            x_adv = moved
    return x_adv

# == 2. Weight space: SAM's ascent ========================================================================
#    The same maximum over the weights: L(w + v) = L(w) + <g, v> with g = dL/dw is largest at v = rho g/|g|_2.
#        AT    delta <- P(delta + step * steepest(g)),  g = dL/dx:  one norm an image, several steps
#        SAM   v     =  rho * g/|g|_2,                  g = dL/dw:  one norm over all weights, one step
#    'Dual': a score w.x changes alike when either factor moves. On a linear score of one image both maxima are exact
#    and lower the margin: delta (l2) by eps|w|, v by rho|x|, more where x is far from 0. In a dense first layer
#    z = Wx the attack delta and the weights' move V = (W delta) x^T/|x|^2 change z alike; so do V and the attack
#    W^+ V x, if W has a right inverse W^+. As |V| = |W delta|/|x|, a loss of one image that is flat for
#    |V| <= rho is so for |W delta| <= rho|x|. SAM promises that to no image: one v serves all images and layers.
def ascent(weights, grads, rho):
    """v = rho * g/|g|_2, one norm over all weights (Foret et al. 2021, eq. 2); where g is 0, so is v."""
    scale = rho / nn.utils.get_total_norm(grads).clamp_min(1e-12)
    return [scale * g for g in grads]

def refuse_update(*_):
    raise RuntimeError("optimizer.step() inside perturbed() would update w + v: call it after the block")

@contextmanager
def perturbed(model, rho, ascend=ascent):
    """Run the block at w + v, where v = ascend(w, g, rho) and g is the .grad that lies on w; then restore w.
    model: a network or a list of its weights; those without .grad stay. Raises BadInput unless rho is finite and >= 0
    and a weight has a gradient; RuntimeError if an optimizer steps in the block."""
    if not 0 <= rho < math.inf:
        raise BadInput(f"rho is {rho}: expected a finite number >= 0")
    weights = list(model.parameters() if isinstance(model, nn.Module) else model)
    moved = [w for w in weights if w.grad is not None]
    if not moved:
        raise BadInput(f"none of {len(weights)} weights has a gradient: backward() first, then a network or a list")
    before = [w.detach().clone() for w in moved]
    guard = register_optimizer_step_pre_hook(refuse_update)
    try:
        with torch.no_grad():
            moves = ascend(moved, [w.grad for w in moved], rho)
            for w, v in zip(moved, moves):
                w.add_(v)  # in place, so that torch refuses a graph that was made at w
        torch.clear_autocast_cache()  # autocast may hold copies of w
        yield
    finally:
        guard.remove()
        with torch.no_grad():
            for w, w_before in zip(moved, before):
                w.copy_(w_before)
        torch.clear_autocast_cache()

# == 3. The three training steps ==========================================================================
#    They differ in where the gradient is taken. None differentiates through v or delta, though both depend on w: the
#    gradient of a maximum is the gradient at its maximiser, where that is unique (Danskin's theorem). PGD need not
#    find it, nor need SAM's one step. Each returns the loss and the logits of its first gradient in w, detached.
def gradient(model, x, y):
    """Put dL/dw on the weights, in place of what lay there; return loss and logits."""
    model.zero_grad()
    logits = model(x.clone())
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
    """AT: the gradient at (w, x + delta), applied at w (Madry et al. 2018, eq. 2.1).  steps + 1 gradients a step.
    With step = partial(sam_step, rho=rho) the two combine: the gradient at (w + v, x + delta)."""
    step_size = 1.25 * eps if steps == 1 else eps / 4  # one step, linf: as Wong et al. 2020
    x_adv = pgd(model, x, y, eps, norm, steps, step_size)
    return step(model, x_adv, y, optimizer)

# == 4. The network =======================================================================================
class PreActBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))). Where the shape changes, x becomes a 1x1 convolution of relu(bn(x))."""
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
        if self.shortcut is not None:  # avg_pool2d of size 1 takes every stride-th pixel. A strided 1x1
            # convolution of fewer than 16 channels, channels_last on x86, can corrupt memory (oneDNN issue 6035)
            x = self.shortcut(F.avg_pool2d(h, 1, self.stride))
        return x + self.conv2(F.relu(self.bn2(self.conv1(h))))

def preact_resnet(classes, width=64, stages=(1, 2, 4, 8), blocks=2):
    """PreActResNet-18 (He et al. 2016): a convolution, then stages of blocks, each but the first at half the size."""
    layers, c_in = [nn.Conv2d(3, width, 3, padding=1, bias=False)], width
    for i, stage in enumerate(stages):
        for j in range(blocks):
            stride = 2 if i > 0 and j == 0 else 1
            layers.append(PreActBlock(c_in, stage * width, stride))
            c_in = stage * width
    return nn.Sequential(*layers, nn.BatchNorm2d(c_in), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(c_in, classes))

class Classifier(nn.Module):
    """logits = net((x - mean) / std): the normalisation is inside, so x, delta and eps are always pixels.
    With bf16 = True it multiplies in bfloat16 in training, never in evaluation, whatever autocast it is called in."""
    def __init__(self, net, mean, std):
        super().__init__()
        self.net, self.bf16 = net, False
        self.register_buffer("mean", torch.as_tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.as_tensor(std).view(3, 1, 1))

    def forward(self, x):
        x = (x - self.mean) / self.std
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16 and self.training):
            return self.net(x).to(x.dtype)

# == 5. Data: all images in memory ========================================================================
@dataclass
class Data:
    """A data set. x: images (N, 3, 32, 32), uint8 or floats in [0,1]; y: int64 labels (N,); then the test images."""
    x: torch.Tensor
    y: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    classes: int
    source: str  # its name in records
    augment: bool = True

def crop_and_flip(x, pad=4):
    """Reflect-pad each image, crop it at random to its size, mirror half of them."""
    n, _, h, w = x.shape
    down, right = torch.randint(2 * pad + 1, (2, n))
    mirrored = torch.rand(n) < 0.5
    crops = F.pad(x, [pad] * 4, mode="reflect").unfold(2, h, 1).unfold(3, w, 1)  # a view
    x = crops[torch.arange(n), :, down, right]  # (N, C, 9, 9, H, W) -> (N, C, H, W)
    x = x.contiguous(memory_format=torch.channels_last)  # which convolutions like best
    x[mirrored] = x[mirrored].flip(3)
    return x

def pixels(images):
    """uint8 images as floats in [0,1]; floats as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images

def batches(data, batch_size):
    """An epoch of shuffled batches (x, y); under torchrun, this process's equal share of each."""
    for batch in torch.randperm(len(data.x)).split(batch_size):
        x, y = pixels(data.x[batch]), data.y[batch]
        if data.augment:
            x = crop_and_flip(x)
        if len(y) >= WORLD:
            share = slice(RANK, len(y) // WORLD * WORLD, WORLD)
            yield x[share], y[share]

# == 6. The training loop, the same for every method ======================================================
def make_optimizer(model, lr, epochs, adamw=False):
    """The papers' optimizer, and its schedule: lr/10 from 75% of the epochs on, lr/100 from 90%."""
    if adamw:  # for transformers
        optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05, fused=True)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, fused=True)
    milestones = [math.ceil(0.75 * epochs), math.ceil(0.9 * epochs)]
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)

def train(model, data, step, optimizer, schedule, epochs, batch_size):
    """Train on from the schedule's epoch with step(model, x, y, optimizer), one of section 3; yield after each epoch
    its figures, of the images that (this process's) steps saw. Raises FloatingPointError if training diverges."""
    for epoch in range(schedule.last_epoch + 1, epochs + 1):
        start = time.perf_counter()
        loss_sum = correct = images = 0
        model.train()
        for x, y in batches(data, batch_size):
            loss, logits = step(model, x, y, optimizer)
            loss_sum += loss * len(y)
            correct += (logits.argmax(1) == y).sum()
            images += len(y)
        schedule.step()
        mean_loss = float(loss_sum) / images
        if not math.isfinite(mean_loss):
            raise FloatingPointError(f"training diverged in epoch {epoch}: try a smaller --lr")
        yield {"epoch": epoch, "loss": mean_loss, "accuracy": 100 * int(correct) / images,
               "seconds": time.perf_counter() - start}

# == 7. Evaluation: which images are right, clean and under attack ========================================
def is_right(model, x, y):
    """Which images get their label, (N,) bool. Raises unless logits are finite and (N, classes), y among them."""
    logits = model(x.clone())
    if logits.ndim != 2 or logits.shape[1] < 2 or logits.shape[:1] != y.shape:
        raise BadInput(f"logits are {[*logits.shape]}, labels {[*y.shape]}: expected (N, classes), (N,)")
    if y.min() < 0 or y.max() >= logits.shape[1]:
        raise BadInput(f"labels reach from {y.min()} to {y.max()}, but there are {logits.shape[1]} classes")
    if not logits.isfinite().all():
        raise FloatingPointError("logits are not finite")
    return logits.argmax(1) == y

@torch.inference_mode(False)
def right_images(model, images, labels, attack=None, restarts=1, batch_size=500):
    """Which images are right, (N,) bool, and stay so under attack(model, x, y) -> x_adv, from each of its starts.
    images: uint8, or float pixels in [0,1], (N, C, H, W)."""
    parts = []
    with torch.no_grad(), restored(model):
        model.eval()
        for x, y in zip(images.split(batch_size), labels.split(batch_size)):
            x = pixels(x)
            check(x, y)
            right = is_right(model, x, y)
            for _ in range(restarts if attack else 0):
                left = right.nonzero().flatten()  # no start has fooled the model on these yet
                if len(left):
                    with torch.enable_grad():
                        x_adv = attack(model, x[left], y[left])
                    model.eval()  # some attacks leave a model in training mode
                    right[left] = is_right(model, x_adv, y[left])
            parts.append(right)
    return torch.cat(parts)

# A first reading ends here.
# == 8. Where the data comes from =========================================================================
@contextmanager
def as_bad_input(what):
    """What goes wrong in the block is BadInput: what, and the error's first line."""
    try:
        yield
    except Exception as error:
        raise BadInput(f"{what} ({(str(error) or repr(error)).splitlines()[0]})") from error

def imported(name):
    """A module that may be missing. Then BadInput says how to get it."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision beside a torch of another version
        raise BadInput(f"pip install {name.split('.')[0]} ({error})") from None

def demo_data(n_train=4000, n_test=1000, classes=10):
    """Synthetic images, made to show the effect: section 11's model as pictures. Three features, the smaller the more
    reliable: coarse colours of rms 0.075, another class's in 6% of images, out of reach of a few /255; a tile of
    +-4/255, wrong in 1.5%; a tile of +-0.75/255, never wrong, which 1/255 erases. Strengths vary, so robustness falls
    by degrees. SGD leans on all three, SAM less on the smallest, AT on what its eps leaves."""
    n = n_train + n_test
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        y = torch.randint(classes, (n,))
        coarse = F.interpolate(torch.randn(classes, 3, 4, 4), size=32, mode="bilinear")
        medium, fine = torch.randn(2, classes, 3, 8, 8).sign().repeat(1, 1, 1, 4, 4)
        x = 0.5 + 0.025 * torch.randn(n, 3, 32, 32)
        for feature, rms, p in (coarse, 0.075, 0.94), (medium, 4 / 255, 0.985), (fine, 0.75 / 255, 1):
            feature *= rms / feature.pow(2).mean((1, 2, 3), keepdim=True).sqrt()
            other = (y + torch.randint(1, classes, (n,))) % classes
            shown = torch.where(torch.rand(n) < p, y, other)
            x += (0.4 + 1.2 * torch.rand(n, 1, 1, 1)) * feature[shown]  # of varying strength
    x = (x * 255).round().clamp(0, 255).byte()
    return Data(x[:n_train], y[:n_train], x[n_train:], y[n_train:], classes, "demo", augment=False)

def load_cifar(name, directory):
    """cifar10 or cifar100; torchvision downloads it if it is not there."""
    datasets = imported("torchvision.datasets")
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    tensors = []
    with as_bad_input(f"{name} is not in {directory} and cannot be downloaded; --dataset demo needs none"):
        for train in True, False:
            part = kind(directory, train, download=True)
            tensors.append(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous())
            tensors.append(torch.tensor(part.targets))
    return Data(*tensors, len(part.classes), name)

def open_image(path):
    with imported("PIL.Image").open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{path} has more than 8 bits a channel")
        return image.convert("RGB")

def load_folder(directory):
    """DIR/train/CLASS/IMAGE and DIR/test/CLASS/IMAGE, resized to 32x32; or Tiny-ImageNet as it unpacks."""
    datasets, transforms = imported("torchvision.datasets"), imported("torchvision.transforms")
    to_pixels = transforms.Compose([open_image, transforms.Resize((32, 32)), transforms.PILToTensor()])
    place = Path(directory).resolve()
    listed = place / "val" / "val_annotations.txt"
    with as_bad_input(f"--data-dir {directory}: expected train/CLASS/IMAGE and test/CLASS/IMAGE"):
        train = datasets.ImageFolder(place / "train")
        test = datasets.ImageFolder(place / ("val" if listed.exists() else "test"))
        if listed.exists():  # Tiny-ImageNet: one folder of images, and a list of their classes
            wnids = dict(line.split("\t")[:2] for line in listed.read_text("utf-8").splitlines())
            test.targets = [train.class_to_idx[wnids[Path(path).name]] for path, _ in test.samples]
        elif train.classes != test.classes or len(train.classes) < 2 or train.classes[0].startswith("."):
            raise ValueError(f"train has {train.classes}, test {test.classes}: the same, two or more, none hidden")
        tensors = []
        for part in train, test:
            tensors.append(torch.stack([to_pixels(path) for path, _ in part.samples]))
            tensors.append(torch.tensor(part.targets))
    print(f"{directory}: images are resized to 32x32, and in training cropped and mirrored")
    return Data(*tensors, len(train.classes), place.name)

def load_data(name, directory):
    if name == "demo":
        return demo_data()
    return load_cifar(name, directory) if "cifar" in name else load_folder(directory)

# == 9. Attacks by name, and what to think of them ========================================================
ATTACKS = ("linf 1/255", "linf 2/255", "l2 16/255", "l2 32/255")  # PGD-10, as in [1, 2]

def radius(text):
    """"8/255" or "0.03" -> eps."""
    numerator, _, denominator = text.partition("/")
    with as_bad_input(f"radius {text!r}: expected 8/255 or 0.03"):
        return float(numerator) / float(denominator or 1)

def fgsm(model, x, y, eps, norm="linf"):
    """The fast gradient sign method: one linf step of full size (Goodfellow et al. 2015)."""
    return pgd(model, x, y, eps, norm, steps=1, step_size=eps, random_start=False)

def negative_margin(logits, y):
    """max_{j != y} z_j - z_y, summed: steep even where the network is sure (Carlini and Wagner 2017)."""
    others = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return others.sum() - logits.gather(1, y[:, None]).sum()

def autoattack(model, x, y, eps, norm):
    """AutoAttack, its authors' own (Croce and Hein 2020)."""
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # it wants .view()
    attack = imported("pyautoattack").AutoAttack(plain, norm=norm.capitalize(), eps=eps, seed=0, device=x.device)
    own_random = torch.random.fork_rng([x.device] * x.is_cuda)
    with own_random, as_bad_input("autoattack failed; it wants ten classes or more"):
        x_adv, _ = attack.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))
    print(f"  autoattack {norm}: {len(x)} images done")
    return x_adv

def parse_attack(text, steps=10):
    """The attack that a text names: a function (model, x, y) -> x_adv. Raises BadInput."""
    named_pgd = partial(pgd, steps=steps, stop_when_fooled=True)
    match text.split():
        case ["fgsm", eps]:
            norm, attack = "linf", fgsm
        case ["margin", norm, eps]:
            attack = partial(named_pgd, loss=negative_margin)
        case ["autoattack", norm, eps]:
            imported("pyautoattack")
            attack = autoattack
        case [norm, eps]:
            attack = named_pgd
        case _:
            raise BadInput(f"attack {text!r}: 'linf 8/255', 'margin l2 0.5', 'fgsm 8/255', 'autoattack l2 1'")
    check_radius(radius(eps), norm)
    return partial(attack, eps=radius(eps), norm=norm)

def checked(attack):
    """The same attack, which raises BadInput unless it makes images, within its radius if it is given one."""
    def attack_and_check(model, x, y):
        x_adv = attack(model, x.clone(), y).to(x)
        check(x_adv, y)
        given = getattr(attack, "keywords", {})  # those of a partial
        nearest = x + project(x_adv - x, given.get("eps", math.inf), "l2" if given.get("norm") == "l2" else "linf")
        if not x_adv.allclose(nearest, atol=1e-5):
            raise BadInput(f"an attack of radius {given['eps']} went further")
        return x_adv
    return attack_and_check

def percent(flags):
    return 100 * int(flags.sum()) / len(flags)

def evaluate(model, images, labels, attacks=ATTACKS, steps=10, restarts=1, batch_size=500):
    """Accuracy in percent: {"clean": .., name of an attack: .., ...}.  attacks: names, or {name: function}.
    images: uint8, or float pixels in [0,1], (N, 3, H, W), on the model's device; labels: (N,). An image is robust if
    it is right and stays so at every step of PGD from each of its starts. Raises BadInput, or FloatingPointError."""
    if not isinstance(attacks, dict):
        attacks = {name: parse_attack(name, steps) for name in attacks}
    if not 0 < len(images) == len(labels) or restarts < 1 or steps < 1 or "clean" in attacks:
        raise BadInput(f"{len(images)} images, {len(labels)} labels, {restarts} x {steps} steps, {[*attacks]}")
    figures = {"clean": percent(right_images(model, images, labels, batch_size=batch_size))}
    for name, attack in attacks.items():
        figures[name] = percent(right_images(model, images, labels, checked(attack), restarts, batch_size))
    return figures

def evenly_spaced(n, images, labels):
    """n of the images, with their labels; all of them if there are no more."""
    n = min(n, len(images))
    chosen = torch.arange(n) * len(images) // n
    return images[chosen], labels[chosen]

@torch.no_grad()
def doubts(model, images, labels, names, steps=10, restarts=1):
    """Reasons to doubt an evaluation (Carlini et al. 2019), in percent of 200 images: faults; what more PGD takes."""
    x, y = evenly_spaced(200, pixels(images), labels)
    with restored(model):
        model.eval()
        logits = model(x.clone())
        halves = torch.cat([model(half.clone()) for half in x.chunk(2)])
        g, _ = input_gradient(model, x, y, summed_cross_entropy)
        again, _ = input_gradient(model, x, y, summed_cross_entropy)
    found = {
        "the gradient is zero or NaN": percent(l2_norm(steepest(g, "linf")) == 0),
        "two gradients disagree": percent(l2_norm(g - again) > 0.1 * l2_norm(g)),
        "the logits depend on the batch": percent((logits - halves).abs().amax(1) > 1e-3 * logits.abs().amax()),
    }
    for name in names:
        if name.startswith(("linf", "l2")):
            usual = evaluate(model, x, y, [name], steps, restarts)[name]
            for other, more in (name, max(50, steps)), (f"margin {name}", steps):
                left = evaluate(model, x, y, [other], more, restarts + 1)[other]
                found[f"more fall to {other}, {more} steps, another start"] = usual - left
    return found

# == 10. Variants: more ascents and networks ==============================================================
def adaptive_ascent(weights, grads, rho, eta=0.01):
    """ASAM: v = rho * T^2 g/|T g|_2, T = |w| + eta (Kwon et al. 2021, alg. 1); T = 1 on biases and BatchNorm.
    With eta = 0 and T = |w| for all, rescaled weights have a rescaled v. Takes about ten times SAM's rho."""
    T = [w.abs() + eta if w.ndim > 1 else torch.ones_like(w) for w in weights]
    v = ascent(weights, [t * g for t, g in zip(T, grads)], rho)
    return [t * a for t, a in zip(T, v)]

def layerwise_ascent(weights, grads, gamma):
    """AWP: v = gamma * |w|_2 * g/|g|_2 for each tensor; biases and BatchNorm stay (Wu et al. 2020, section 4).
    AWP is sam_step on attacked images with this ascent."""
    moves = []
    for w, g in zip(weights, grads):
        moves += ascent([w], [g], gamma * w.norm() if w.ndim > 1 else 0)
    return moves

def esam_step(model, x, y, optimizer, rho, beta=0.5, gamma=0.5):
    """ESAM (Du et al. 2022, algorithm 1). Each weight tensor climbs with probability beta, one at least, together by
    rho/beta; then the share gamma of images counts whose loss rose most. At beta = gamma = 1 SAM."""
    loss, logits = gradient(model, x, y)
    weights = [w for w in trained_weights(optimizer) if w.grad is not None]
    draws = torch.rand(len(weights))
    climbing = [w for w, draw in zip(weights, draws) if draw < beta or draw == draws.min()]
    with perturbed(climbing, rho / beta), restored(model):
        with torch.no_grad():
            logits_there = model(x.clone())
        rise = F.cross_entropy(logits_there, y, reduction="none") - F.cross_entropy(logits, y, reduction="none")
        hard = rise.topk(math.ceil(gamma * len(x))).indices
        gradient(model, x[hard], y[hard])
    optimizer.step()
    return loss, logits

def deit_tiny(classes, width=192):
    """DeiT-Ti on patches of 2x2, with its authors' initial values (Touvron et al. 2021)."""
    net = imported("torchvision.models").VisionTransformer(32, 2, 12, 3, width, 4 * width, num_classes=classes)
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

MODELS = {
    "prn18": preact_resnet, "deit_ti": deit_tiny, "small": small_cnn,
    "wrn28_10": partial(preact_resnet, width=16, stages=(10, 20, 40), blocks=4),  # Zagoruyko and Komodakis 2016
}
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)  # mean and std of its pixels

def make_model(name, classes, mean_std=CIFAR10, width=None):
    """One of MODELS, for images (N, 3, 32, 32). width: channels of the first layer, if not the usual ones."""
    net = MODELS[name](classes, width=width) if width else MODELS[name](classes)
    return Classifier(net, *mean_std).to(memory_format=torch.channels_last)  # the fastest

# == 11. The simplified model of [2] ======================================================================
#    y is +1 or -1. One robust feature, x_1 = y with probability p, else -y; n others, Normal(eta y, 1), eta
#    small. The classifier sign(w x_1 + x_2 + .. + x_{n+1}) has one weight, its trust in the robust feature.
#        A(w) = p Phi((w + eta n)/sqrt n) + (1-p) Phi((eta n - w)/sqrt n)      accuracy; Phi: the normal distribution
#        standard   max_w A(w)                         w = ln(p/(1-p)) / (2 eta)
#        AT         the same with eta - eps for eta    w = ln(p/(1-p)) / (2 (eta - eps))    exact
#        SAM        max_w min(A(w - rho), A(w + rho))  w = w_standard (1 + rho^2/(3n))    up to rho^4
#    A' = 0 where p phi((w + eta n)/sqrt n) = (1-p) phi((eta n - w)/sqrt n); its logarithm is linear in w. AT moves
#    each of the n features by eps < eta against y; x_1 = +-1 counts as out of its reach. For SAM expand A(w + rho) =
#    A(w - rho) at w_0 = w_standard: A'' (w - w_0) + A''' rho^2/6 = 0, A'''/A'' = -2 w_0/n. Section 3's steps end
#    there, too (see the tests), SAM's with v at the worst end; its ascent may pick the other, and ends at w_standard.
# == 12. The duality, measured: does flat around the weights go with flat around the inputs? ==============
def sharpness(model, x, y):
    """How far the mean loss rises at SAM's ascent of length rho, and under PGD-10, in eval mode:
    {"rho 0.1": nats, .., "linf 1/255": nats, ..}.  x: float pixels. Leaves gradients on the weights. Rescaling
    those in front of BatchNorm changes the rises around w, not the network (Dinh et al. 2017)."""
    def rise(x):
        with torch.no_grad():
            return float(F.cross_entropy(model(x.clone()), y) - loss)
    rises = {}
    with restored(model):
        model.eval()
        loss, _ = gradient(model, x, y)
        for rho in 0.05, 0.1, 0.2:
            with perturbed(model, rho):
                rises[f"rho {rho}"] = rise(x)
        for name in ATTACKS:
            norm, eps = name.split()
            rises[name] = rise(pgd(model, x, y, radius(eps), norm))
    return rises

# == 13. The command line =================================================================================
def make_step(method, s):
    """The label of --method in a table, which names its settings, and its step, one of section 3."""
    rho, ball = f"rho {s.rho:.9g}", f"{s.norm} {255 * s.eps:.9g}/255 steps {s.attack_steps}"
    sam = partial(sam_step, rho=s.rho)
    at = partial(at_step, eps=s.eps, norm=s.norm, steps=s.attack_steps)
    return {
        "sgd": ("sgd", sgd_step),
        "sam": (f"sam {rho}", sam),
        "asam": (f"asam {rho}", partial(sam, ascend=adaptive_ascent)),
        "esam": (f"esam {rho}", partial(esam_step, rho=s.rho)),
        "at": (f"at {ball}", at),
        "sam+at": (f"sam+at {rho} {ball}", partial(at, step=sam)),
        "awp": (f"awp {rho} {ball}", partial(at, step=partial(sam, ascend=layerwise_ascent))),
    }[method]

ABOUT = """Train networks with SGD, SAM or adversarial training (AT), attack them, and print one table.
  sam_at.py                                                          the three on synthetic data, in a minute
  sam_at.py --method sam --rho 0.1                                   one of them
  sam_at.py --dataset cifar10 --model prn18 --width 16 --epochs 30   on CIFAR-10, which is downloaded"""
CUDA = torch.cuda.is_available()
SETTINGS = {  # name: (default, meaning)
    "method": (("sgd", "sam", "at"), "what to train"),
    "rho": (0.15, "SAM's radius; asam wants ten times as much, awp 0.005"),
    "eps": ("1/255", "AT's radius; for l2 rather 32/255"),
    "norm": ("linf", "AT's norm"),
    "attack_steps": (5, "AT's steps, of eps/4 each; 1 is one of 1.25 eps, at SAM's price"),
    "dataset": ("demo", "what to train on and to attack"),
    "data_dir": ("data", "its place; of your own images: train/CLASS/IMAGE, test/CLASS/IMAGE"),
    "model": ("small", "the network"),
    "width": (0, "channels of its first layer; 0: the usual ones"),
    "epochs": (10, "passes over the training images"),
    "batch_size": (128, "images a step, over all devices"),
    "lr": (0.0, "learning rate; 0: 0.1, or 0.001 for deit_ti, which takes AdamW"),
    "bf16": (None, "train in bfloat16; if not said, where the GPU or CPU (AMX) is made for it"),
    "compile": (False, "torch.compile the network for training"),
    "seed": (0, "of weights, batches and attacks"),
    "device": ("cuda" if CUDA else "cpu", "where to run"),
    "runs": ("runs", "folder of runs: checkpoints and records"),
    "attacks": (ATTACKS, "also 'margin linf 8/255', 'fgsm 8/255', 'autoattack linf 8/255'"),
    "eval_steps": (10, "PGD's steps, of eps/4 each"),
    "restarts": (1, "PGD's random starts, all to withstand"),
    "images": (0, "test images, evenly spaced; 0: all, but 1000 with --sharpness"),
    "sharpness": (False, "no attacks: how far the loss rises around weights and inputs"),
    "benchmark": (False, "just time the methods' steps"),
}
CHOICES = {"method": ["sgd", "sam", "asam", "esam", "at", "sam+at", "awp"], "norm": LIMITS, "model": MODELS,
           "dataset": ["demo", "cifar10", "cifar100", "tiny-imagenet", "folder"], "device": ["cpu", "cuda"]}

def parse_args(argv=None):
    """The settings. Input that makes no sense ends the program with code 2, or raises BadInput."""
    parser = argparse.ArgumentParser(usage="sam_at.py [--FLAG VALUE ...]", description=ABOUT, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, meaning) in SETTINGS.items():
        options = {"default": default, "help": f"{meaning} (default: {default})"}
        if default is None:
            options["action"] = argparse.BooleanOptionalAction
        elif default is False:
            options["action"] = "store_true"
        else:
            kind = {"nargs": "+"} if type(default) is tuple else {"type": type(default)}
            options.update(kind, choices=CHOICES.get(name))
        parser.add_argument("--" + name.replace("_", "-"), **options)
    s = parser.parse_args(argv)
    for name, value in vars(s).items():
        least = WORLD if name == "batch_size" else int(type(value) is int and SETTINGS[name][0] > 0)
        if type(value) in (int, float) and not least <= value < 1e9:
            raise BadInput(f"--{name.replace('_', '-')} {value}: expected a number from {least} to 1e9")
    s.eps = radius(s.eps)
    check_radius(s.eps, s.norm)
    for name in s.attacks:
        parse_attack(name)
    if s.lr == 0:
        s.lr = 0.001 if s.model == "deit_ti" else 0.1
    if s.device == "cuda" and not CUDA:
        raise BadInput("--device cuda: no GPU found")
    if s.bf16 is None:
        amx = torch.cpu.get_capabilities().get("amx_bf16", False)
        s.bf16 = torch.cuda.is_bf16_supported(False) if s.device == "cuda" else amx
    return s

# == 14. More than one device: torchrun starts a process for each =========================================
#    From the same weights and random numbers, each takes its share of the same batches. Gradients are averaged for
#    the update. BatchNorm's statistics and SAM's v are of a share (m-sharpness, Foret et al. 2021, section 4).
def average_gradients(optimizer, *_):
    for w in trained_weights(optimizer):
        if w.grad is not None:
            distributed.all_reduce(w.grad)
            w.grad /= WORLD

def start_processes(device):
    """Join the other processes. Only the first prints more than errors."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    atexit.register(distributed.destroy_process_group)
    register_optimizer_step_pre_hook(average_gradients)
    if RANK:
        sys.stdout = open(os.devnull, "w")

# == 15. Runs: a folder each, with checkpoint.pt and a record (.json) for each way of measuring it =========
def sha256(content):
    return hashlib.sha256(content).hexdigest()[:12]

CODE = sha256(Path(__file__).read_bytes()) if "__file__" in globals() else ""  # now, before somebody edits it

def write_whole(path, content):
    """Write bytes whole or not at all; the first process does."""
    if RANK == 0:
        part = path.with_suffix(".part")
        part.write_bytes(content)
        part.replace(path)

def build(s, classes, mean_std=CIFAR10):
    """The network, the same compiled if that is asked for, its optimizer and schedule. All methods start alike."""
    torch.manual_seed(s.seed)
    with as_bad_input(f"--model {s.model} --width {s.width} cannot be built"):
        model = make_model(s.model, classes, mean_std, s.width).to(s.device)
    model.bf16 = s.bf16
    compiled = torch.compile(model, dynamic=False) if s.compile else model
    return model, compiled, *make_optimizer(model, s.lr, s.epochs, s.model == "deit_ti")

def train_or_resume(s, data, label, step, checkpoint):
    """The trained network and its log, a row an epoch. Goes on from the checkpoint, which each epoch replaces."""
    std, mean = torch.std_mean(pixels(data.x), dim=(0, 2, 3))
    model, compiled, optimizer, schedule = build(s, data.classes, (mean, std.clamp_min(1e-3)))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    generator = torch.cuda if s.device == "cuda" else torch  # of the other random numbers
    log = []
    if checkpoint.exists():
        with as_bad_input(f"{checkpoint} cannot be read; if it is damaged, or another program's, move it away"):
            if zipfile.ZipFile(checkpoint).testzip():
                raise ValueError("a checksum is wrong")
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            torch.set_rng_state(state["random"])
            generator.set_rng_state(state["device_random"])
            log = state["log"]
        print(f"{label}  is trained up to epoch {len(log)}/{s.epochs}")
    for row in train(compiled, data, step, optimizer, schedule, s.epochs, s.batch_size):
        log.append({**row, "code": CODE})
        state = {name: part.state_dict() for name, part in parts.items()}
        state.update(log=log, random=torch.get_rng_state(), device_random=generator.get_rng_state())
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(checkpoint, buffer.getvalue())
        print(f"{label}  epoch {len(log)}/{s.epochs}  loss {row['loss']:.4f}  accuracy {row['accuracy']:.1f}%"
              f"  {row['seconds']:.1f} s, {row['seconds'] * (s.epochs - len(log)):.0f} s left")
    return model, log

def measure(s, model, images, labels):
    """What a record says of the network: figures; which images were right, eight a byte, in base64; doubts."""
    if s.sharpness:
        return {"figures": sharpness(model, pixels(images), labels), "right": {}, "stronger": {}}
    figures, right = {}, {}
    for name in ("clean", *s.attacks):
        torch.manual_seed(s.seed)  # an attack draws the same numbers, whatever was before it
        attack = None if name == "clean" else parse_attack(name, s.eval_steps)
        flags = right_images(model, images, labels, attack, s.restarts)
        figures[name] = percent(flags)
        right[name] = base64.b64encode(numpy.packbits(flags.cpu())).decode()
        print(f"  {name}: {figures[name]:.1f}%")
    print("  checking with stronger attacks")
    return {"figures": figures, "right": right,
            "stronger": doubts(model, images, labels, s.attacks, s.eval_steps, s.restarts)}

TRAINING = ("dataset", "model", "width", "epochs", "batch_size", "lr", "bf16", "compile", "seed", "device")

def run(method, s, data):
    """Train and measure a network, each unless that is done. Returns its record: figures, and what decides them."""
    label, step = make_step(method, s)
    content = b"".join(t.cpu().numpy().tobytes() for t in (data.x, data.y, data.x_test, data.y_test))
    training = {"label": label, "processes": WORLD, "data": sha256(content)}  # what decides the weights
    for key in TRAINING:
        training[key] = getattr(s, key)
    count = s.images or (1000 if s.sharpness else len(data.x_test))
    images, labels = evenly_spaced(count, data.x_test, data.y_test)
    what = "rise of the loss" if s.sharpness else f"{', '.join(s.attacks)}, {s.eval_steps} steps, {s.restarts} starts"
    title = (f"{data.source} ({training['data']}), {s.model} width {s.width or 'as usual'}, {s.epochs} epochs, "
             f"lr {s.lr:g}, batch {s.batch_size}{', bfloat16' * s.bf16}{f', {WORLD} processes' * (WORLD > 1)}"
             f"{', compiled' * s.compile}{', cuda' * (s.device == 'cuda')}; {len(images)} test images, {what}")
    name = f"{data.source} {s.model} {label} seed {s.seed} {sha256(json.dumps(training).encode())}".replace("/", "_")
    folder = Path(s.runs, name)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{sha256(title.encode())}.json"
    if path.exists():
        print(f"{label}  reported from {path}; to train anew, delete its folder")
        with as_bad_input(f"{path} is damaged: move it away"):
            return json.loads(path.read_bytes())
    model, log = train_or_resume(s, data, label, step, folder / "checkpoint.pt")
    machine = torch.cuda.get_device_name() if s.device == "cuda" else dict(torch.cpu.get_capabilities())
    record = {
        "label": label, "table": title, **measure(s, model, images, labels), "images": len(images),
        "settings": {**vars(s), **training, "method": method}, "log": log, "code": CODE,
        "torch": torch.__version__, "machine": machine, "threads": torch.get_num_threads(),
    }
    write_whole(path, json.dumps(record).encode())
    return record

# == 16. The program ======================================================================================
def benchmark(s):
    """Print what a step of each method takes, in both precisions."""
    from torch.utils.benchmark import Timer
    x = torch.rand(s.batch_size, 3, 32, 32, device=s.device)
    y = torch.arange(s.batch_size, device=s.device) % 10
    for method in s.method:
        label, step = make_step(method, s)
        took = []
        for s.bf16 in False, True:
            _, compiled, optimizer, _ = build(s, 10)
            timer = Timer("step(compiled, x, y, optimizer)", globals=locals(), num_threads=torch.get_num_threads())
            took.append(timer.adaptive_autorange().median)
        print(f"{label:38}  float32 {took[0]:.4f} s, bfloat16 {took[1]:.4f} s: {took[0] / took[1]:.2f} times as fast")

def show(records):
    """Print the table that a program ends with, and the reasons to doubt it."""
    print(f"\n{'method':38}" + "".join(f"  {name}" for name in records[0]["figures"]))
    for r in records:
        cells = [f"{value:{len(name) + 2}.{1 if r['right'] else 3}f}" for name, value in r["figures"].items()]
        print(f"{r['label']:38}" + "".join(cells))
    for r in records:
        for reason, points in r["stronger"].items():
            if points > 1:
                print(f"warning: {r['label']}: {reason}: {points:.1f}% of images")

def perform(s):
    torch.backends.cudnn.allow_tf32 = False  # attacks want all 23 bits
    if s.benchmark:
        benchmark(s)
    else:
        if WORLD > 1:
            start_processes(s.device)
        data = load_data(s.dataset, s.data_dir)
        print(f"{data.source}: {len(data.x)} and {len(data.x_test)} images; {s.model} on {s.device}")
        for name in "x", "y", "x_test", "y_test":
            setattr(data, name, getattr(data, name).to(s.device))
        show([run(method, s, data) for method in s.method])

def main(argv=None):
    """The command line. Returns the exit code: 0; 2 after a line on what cannot be done; 130 after Ctrl-C."""
    try:
        perform(parse_args(argv))
        return 0
    except (BadInput, ArithmeticError, OSError, MemoryError, RuntimeError) as error:
        no_memory = "allocate" in str(error) or "out of memory" in str(error)
        if isinstance(error, RuntimeError) and not no_memory:
            raise
        message, code = str(error).partition("\n")[0] or "out of memory", 2
    except KeyboardInterrupt:
        message, code = "interrupted; the same command goes on", 130
    print(f"sam_at.py: {message}", file=sys.stderr)
    return code

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    sys.exit(main())
