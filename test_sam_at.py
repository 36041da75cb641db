"""The specification of sam_at.py and results/report.py as properties, on a CPU; hypothesis draws the cases.
It opens with six worked by hand. Then the sections follow the file's, numbered as there."""
import base64
import io
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from unittest.mock import Mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the specification is of the CPU's bits, wherever it runs

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from pytest import approx, fixture, mark, raises
from torch import nn

import sam_at
from sam_at import (BadInput, adaptive_ascent, ascent, at_step, batches, esam_step, evaluate, gradient,
                    layerwise_ascent, load_data, make_model, make_optimizer, parse_args, parse_attack, perturbed, pgd,
                    sam_step, sgd_step, steepest, write_whole)

settings.register_profile("repeatable", deadline=None, max_examples=20, derandomize=True,
                          suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("repeatable")
HERE = Path(__file__).resolve().parent
seeds = st.integers(0, 10_000)
norms = st.sampled_from(["linf", "l2"])
f64 = torch.float64

@fixture(autouse=True)
def own_folder(tmp_path_factory, monkeypatch):
    """Each test in an empty folder of its own: that is where runs/ goes."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))

class Scored(nn.Module):
    """Logits (0, f(x, w)): label 1 is right where f > 0."""
    def __init__(self, f, w=(0.0,)):
        super().__init__()
        self.f = f
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x):
        score = self.f(x, self.w)
        return torch.stack([torch.zeros_like(score), score], 1)

def linear(*w):
    """The score w.(x - 1/2)."""
    return Scored(lambda x, w: (x - 0.5).flatten(1) @ w, w)

def loss_of(f, w):
    """A model whose cross-entropy at label 0 is f(w), whatever the images: log(1 + e^z) = f for z = log(e^f - 1)."""
    return Scored(lambda x, w: f(w).expm1().log().expand(len(x)), w)

def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr, **options)

IMAGE = 1, 2, 3  # x.sum(IMAGE): of each image
ZERO, ONE = torch.arange(2).split(1)
GREY = torch.ones(1, 3, 2, 2) / 2

# == Six worked by hand ================================================================================
def test_sam_on_a_parabola():
    """Loss 1 + w^2/2 at w = 3: the gradient is 3, so rho 1 leads to 4; its gradient 4 is applied at 3."""
    model = loss_of(lambda w: 1 + w.square().sum() / 2, [3.0])
    sam_step(model, GREY, ZERO, sgd(model), rho=1.0)
    assert model.w.item() == approx(3 - 0.1 * 4)

@torch.no_grad()  # pgd takes its gradients there, too
def test_the_attack_on_a_linear_score():
    """The score 3 (x1 - 1/2) - 4 (x2 - 1/2) at label 1 falls fastest along (-3, 4)/5, and in linf to a corner. Four
    steps of eps/4 lead there."""
    x = torch.tensor([[0.5, 0.5]])
    model = linear(3.0, -4.0)
    attack = partial(pgd, model, x, ONE, 0.1, random_start=False)
    assert attack("l2").tolist()[0] == approx([0.5 - 0.06, 0.5 + 0.08])
    assert attack("l2", 2).tolist()[0] == approx([0.5 - 0.03, 0.5 + 0.04])
    assert attack("linf").tolist()[0] == approx([0.4, 0.6])
    assert attack("linf", 2).tolist()[0] == approx([0.45, 0.55])
    assert parse_attack("fgsm 0.1")(model, x, ONE).tolist()[0] == approx([0.4, 0.6])  # in one step

def test_a_pixel_at_the_border_stays_an_image():
    """The attack wants to darken a pixel of 0.02 by 0.1 and to brighten one of 0.95."""
    x = torch.tensor([[0.02, 0.95]])
    attack = partial(pgd, linear(1.0, -1.0), x, ONE, random_start=False)
    assert attack(0.1).tolist() == [[0.0, 1.0]]
    assert attack(0.06, "l2")[0, 1] == 1

def test_at_takes_the_gradient_at_the_attacked_image():
    """Score w x1 at w = 2, label 1, x1 = 1/2 + 0.3, eps 0.1: the attack goes to 0.2, where the loss log(1 + e^-z)
    has the gradient -0.2/(1 + e^z), z = 2 * 0.2."""
    model = linear(2.0)
    x = torch.tensor([[0.8]])
    at_step(model, x, ONE, sgd(model, 1.0), eps=0.1, steps=8)
    assert model.w.item() == approx(2 + 0.2 / (1 + math.exp(0.4)))

def test_running_statistics_see_each_batch_once():
    """Momentum 0.1 from 0: after one batch of mean 1/2 the running mean is 0.05, with SAM, too."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    sam_step(model, GREY, ZERO, sgd(model), rho=1.0)
    assert model[0].running_mean.mean() == approx(0.05)

def test_robust_accuracy_of_three_images():
    """Score x - 1/2 at label 1 for x = 0.4, 0.52, 0.6, a pixel each: two are right, and withstand linf up to
    2/255 = 0.008; l2 16/255 = 0.06 leaves one, 32/255 = 0.13 none."""
    x = torch.tensor([0.4, 0.52, 0.6]).view(3, 1, 1, 1)
    y = torch.ones(3).long()
    found = evaluate(linear(1.0), x, y)
    assert list(found.values()) == approx([200 / 3] * 3 + [100 / 3, 0])

# == Helpers ===========================================================================================
def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def uniform(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))

def batch(n, seed=0, classes=3):
    return uniform(seed, n, 3, 8, 8).double(), torch.arange(n) % classes

def tiny_net(seed=0, classes=3, norm=nn.BatchNorm2d):
    torch.manual_seed(seed)
    head = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, classes)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm(4), nn.Tanh(), *head)
    return sam_at.Classifier(net, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)).double()

def weights_of(model):
    return [w.detach().clone() for w in model.parameters()]

def all_of(model):
    """Weights, buffers, gradients, modes and requires_grad, as tensors."""
    weights = list(model.parameters())
    flags = [module.training for module in model.modules()]
    flags += [w.requires_grad for w in weights]
    tensors = weights + list(model.buffers()) + [torch.tensor(flags)]
    tensors += [w.grad for w in weights if w.grad is not None]
    return [t.detach().clone() for t in tensors]

def same_bits(a, b):
    """Whether two lists of tensors agree in every bit."""
    return all(s.numpy().tobytes() == t.numpy().tobytes() for s, t in zip(a, b, strict=True))

def after(step):
    """The weights and buffers of a network after three steps with momentum and weight decay, always the same ones."""
    model = tiny_net()
    optimizer = sgd(model, momentum=0.9, weight_decay=5e-4)
    for _ in range(3):
        step(model, *batch(6), optimizer)
    return weights_of(model) + list(model.buffers())

def length(tensors):
    return math.hypot(*[t.norm() for t in tensors])

def size_of(delta, norm):
    """|delta|_p of each image."""
    return delta.flatten(1).norm(dim=1, p=math.inf if norm == "linf" else 2)

def assert_close(a, b, atol=1e-9):
    """Two lists of tensors agree within atol."""
    for s, t in zip(a, b, strict=True):
        assert s.allclose(t, atol=atol)

# == 1. Input space ====================================================================================
@mark.parametrize("f", [
    lambda z: z,
    lambda z: math.nan * z,
    lambda z: (z - z.detach()).sqrt(),
])
@given(seeds, norms, st.floats(0.001, 0.3), st.booleans(), st.sampled_from([0, 1, 12]))
def test_pgd_stays_in_the_ball(f, seed, norm, eps, start, steps):
    """Whatever the gradients are."""
    x, y = batch(4, seed, 2)
    x = (3 * x - 1).clamp(0, 1).requires_grad_()  # many pixels on the border of [0,1]
    model = Scored(lambda x, w: f(x.mean(IMAGE)))
    x_adv = pgd(model, x, y, eps, norm, steps, random_start=start)
    assert size_of(x_adv - x, norm).max() <= eps + 1e-6
    assert x_adv.equal(x_adv.clamp(0, 1))
    assert not x_adv.requires_grad

@mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_fill_the_ball(norm):
    """linf: each pixel is uniform. l2: lengths are uniform in [0, eps]."""
    torch.manual_seed(0)
    x = torch.ones(400, 3, 4, 4) / 2
    delta = pgd(tiny_net(), x, torch.arange(400) % 3, 0.1, norm, steps=0) - x
    sizes = delta.abs() if norm == "linf" else size_of(delta, norm)
    quarters = torch.arange(1, 5) / 4
    assert sizes.flatten().quantile(quarters).allclose(0.1 * quarters, atol=0.01)
    assert abs(delta.mean()) < 0.005

@given(seeds, norms, st.floats(1e-30, 1e30))
def test_the_steepest_direction_has_length_one_whatever_the_gradients_size(seed, norm, scale):
    g = normal(seed, 4, 3, 5)
    step = steepest(torch.cat([scale * g[:1], g[1:]]), norm)
    assert size_of(step, norm).allclose(torch.ones(4))
    assert step.allclose(steepest(g, norm), rtol=1e-4)

def test_an_infinite_gradient_keeps_its_sign_and_nan_moves_nothing():
    g = torch.tensor([[math.inf, -math.inf, math.nan, -2.0]])
    assert steepest(g, "linf").tolist() == [[1, -1, 0, -1]]

@given(seeds, norms, st.booleans(), st.booleans())
def test_pgd_leaves_the_model_alone(seed, norm, training, fail):
    """Bit for bit, also when it raises. Each step is one pass in the model's own mode, for no weight's gradient."""
    def look(module, args, logits):
        seen.append(any(w.requires_grad for w in model.parameters()) or module.training != training)
        if fail and len(seen) == 2:
            raise KeyError
    model = tiny_net(seed).train(training)
    x, y = batch(4, seed)
    seen = []
    model.net[1].train(not training)  # a mode of its own
    model.net[0].weight.requires_grad_(False)
    F.cross_entropy(model(x), y).backward()
    before = all_of(model)
    model.register_forward_hook(look)
    with raises(KeyError) if fail else nullcontext():
        pgd(model, x, y, 0.1, norm, steps=3)
    assert same_bits(before, all_of(model))
    assert seen == [False] * (2 if fail else 3)

def test_restored_puts_back_buffers_that_changed_their_shape():
    """One changes it, and another comes into being, in the first pass."""
    def score(x, w):
        model.spikes = model.spikes.sum() + torch.ones(len(x))
        model.mask = torch.ones(1)
        return x.sum(IMAGE)
    model = Scored(score)
    model.register_buffer("spikes", torch.zeros(2))
    model.register_buffer("mask", None)
    pgd(model, *batch(5, classes=2), 0.1)
    assert model.spikes.tolist() == [0, 0]
    assert model.mask is None

def test_a_model_that_works_in_place_harms_no_image():
    model = Scored(lambda x, w: x.sub_(0.5).sum(IMAGE) + w)
    x, y = batch(4, classes=2)
    before = x.clone()
    pgd(model, x, y, 0.1)
    evaluate(model, x, y, ["fgsm 0.1"])
    sam_at.sharpness(model, x, y)
    esam_step(model, x, y, sgd(model), 0.1)
    assert x.equal(before)

IMAGES, LABELS = uniform(0, 3, 3, 8, 8), torch.arange(3)

@mark.parametrize("wrong", [
    {"norm": "l1"},
    {"eps": -0.1},
    {"eps": math.nan},
    {"eps": 1},
    {"eps": 8, "norm": "l2"},
    {"y": LABELS[:2]},
    {"y": LABELS.int()},
    {"x": IMAGES * math.nan},
    {"x": 1.01 * IMAGES},
    {"x": IMAGES.half()},
    {"x": IMAGES - 0.01},
])
def test_pgd_refuses_what_makes_no_sense(wrong):
    sound = {"x": IMAGES, "y": LABELS, "eps": 0.1}
    with raises(BadInput):
        pgd(tiny_net(), **(sound | wrong))

@given(st.floats(0.01, 0.1))
def test_robust_means_right_at_every_step(eps):
    """PGD climbs past the one place where the model is wrong. Who meets it stays there; the others go on."""
    def score(x, w):
        wrong = (x - 0.3).abs() < eps / 10
        return (x - x.detach() + wrong - 0.5).sum(IMAGE)
    k = torch.tensor([0, 1, 2, 3, 4, 5, 4.5], dtype=f64).view(7, 1, 1, 1)  # steps of eps/4 to that place
    x = 0.3 - k * eps / 4
    attack = parse_attack(f"linf {eps}")
    x_adv = attack(Scored(score), x, torch.zeros(7).long(), random_start=False)
    assert x_adv.allclose(x + k.where(k <= 4, 4) * eps / 4)

# == 2. Weight space ===================================================================================
@given(seeds, st.floats(0, 10), st.booleans())
def test_perturbed_restores_the_bits(seed, rho, fail):
    """After the block, and after an error in it, all is as before. A weight without a gradient stays."""
    model, idle = tiny_net(seed), nn.Parameter(torch.zeros(2))
    gradient(model, *batch(4, seed))
    before = all_of(model)
    with raises(KeyError) if fail else nullcontext(), perturbed([idle, *model.parameters()], rho):
        assert not idle.any()
        if fail:
            raise KeyError
    assert same_bits(before, all_of(model))

@given(seeds, st.floats(0.5, 5), st.sampled_from([0, 1e-30, 1e-9, 1e-6, 1, 1e15]))
def test_gradients_of_any_size_move_the_weights_by_rho(seed, rho, size):
    """But a gradient of 0 moves nothing, and a tiny one hardly."""
    grads = [size * normal(seed, n).sign() for n in (30, 3)]
    v = ascent(grads, grads, rho)
    assert length(v) == approx(rho if size > 1e-10 else 0, abs=1e-3)

@mark.parametrize("rho, weights", [
    (0.1, lambda model: []),
    (0.1, lambda model: model.net[0].weight.detach()),
    (-0.1, nn.Module.parameters),
    (math.nan, nn.Module.parameters),
    (math.inf, nn.Module.parameters),
])
def test_sam_that_would_be_sgd_is_an_error(rho, weights):
    """Or nonsense."""
    model = tiny_net()
    gradient(model, *batch(4))
    with raises(BadInput, match="gradient|rho"), perturbed(weights(model), rho):
        pass

@mark.parametrize("ascend", [ascent, lambda weights, *_: [weights[0].add_(1.0), torch.ones(7)]])
def test_an_update_inside_the_block_is_an_error(ascend):
    """As is the gradient of a loss at w, and an ascent that fails half way. The weights are restored all the same."""
    model = tiny_net()
    gradient(model, *batch(4))
    before = weights_of(model)
    for misuse in model(batch(4)[0]).sum().backward, sgd(model).step:
        with raises(RuntimeError), perturbed(model, 0.1, ascend):
            misuse()
    assert same_bits(before, weights_of(model))

def test_autocasts_copies_of_the_weights_do_not_hide_the_move():
    net = tiny_net(norm=nn.Identity).net.float()  # all its layers are cast
    x, y = uniform(0, 4, 3, 8, 8), torch.zeros(4).long()
    with torch.autocast("cpu", torch.bfloat16):
        gradient(net, x, y)
        at_w = net(x)
        with perturbed(net, 1.0):
            assert not net(x).equal(at_w)
        assert net(x).equal(at_w)

# == 3. The three training steps =======================================================================
SAM = partial(sam_step, rho=0.5)
AT = partial(at_step, eps=0.05)

@given(seeds, st.sampled_from([0, -1]))
def test_sam_is_its_formula(seed, first):
    """w - lr g(w + rho g/|g|). The ball is over the optimizer's weights alone: the others stay, for the passes, too.
    Gradients that lay around do not count."""
    model = tiny_net(seed)
    twin = tiny_net(seed)
    x, y = batch(6, seed)
    for w in model.parameters():
        w.grad = torch.ones_like(w)
    groups = [{"params": [w]} for w in model.net[first:].parameters()]
    sam_step(model, x, y, torch.optim.SGD(groups, 0.1), 0.3)
    gradient(twin, x, y)
    theirs = list(twin.net[first:].parameters())
    size = length(w.grad for w in theirs)
    v = [0.3 * w.grad / size for w in theirs]
    for w, move in zip(theirs, v):
        w.data += move
    gradient(twin, x, y)
    for w, move in zip(theirs, v):
        w.data -= move + 0.1 * w.grad
    assert_close(weights_of(model), weights_of(twin))

@mark.parametrize("norm, steps, step_size, step", [
    ("linf", 2, 0.025, SAM),
    ("l2", 1, 0.125, sgd_step),
])
def test_at_steps_on_attacked_images(norm, steps, step_size, step):
    """Steps of eps/4; one alone goes 1.25 eps."""
    def by_hand(model, x, y, optimizer):
        x_adv = pgd(model, x, y, 0.1, norm, steps, step_size)
        return step(model, x_adv, y, optimizer)
    ours = partial(at_step, eps=0.1, norm=norm, steps=steps, step=step)
    assert same_bits(after(ours), after(by_hand))

@mark.parametrize("step, passes, first", [
    (sgd_step, 6, 0),
    (SAM, 12, 0),
    (partial(esam_step, rho=0.5), 15, 0),
    (AT, 36, 5),
    (partial(AT, step=SAM), 42, 5),
])
def test_a_step_takes_its_passes_and_returns_the_loss_and_logits_of_its_first_gradient(step, passes, first):
    """A pass of all six images each; ESAM's third has half of them."""
    model, seen = tiny_net(), []
    x, y = batch(6)
    model.register_forward_hook(lambda module, args, logits: seen.append(logits.detach()))
    loss, logits = step(model, x, y, sgd(model))
    assert len(torch.cat(seen)) == passes
    assert model.net[1].num_batches_tracked == 1
    assert logits.equal(seen[first])
    assert loss.allclose(F.cross_entropy(logits, y))
    assert not (logits.requires_grad or loss.requires_grad)

def test_at_trains_a_segmentation_network():
    """Logits (N, C, H, W) and labels (N, H, W): which pixels are bright?"""
    x = uniform(0, 8, 3, 6, 6)
    y = (x.mean(1) > 0.5).long()
    torch.manual_seed(0)
    model = nn.Conv2d(3, 2, 1)
    for _ in range(60):
        at_step(model, x, y, sgd(model, 1.0), 0.01)
    x_adv = pgd(model, x, y, 0.3, stop_when_fooled=True)
    right, robust = [(model(images).argmax(1) == y).float().mean() for images in (x, x_adv)]
    assert right > 0.9
    assert robust < 0.3

# == 4. The networks ===================================================================================
@mark.parametrize("name, parameters", [
    ("prn18", 11_172_170),
    ("wrn28_10", 36_479_194),
    ("deit_ti", 5_392_714),
    ("small", 33_946),
])
def test_the_networks_have_their_papers_size(name, parameters):
    """DeiT-Ti: 12 layers of 444,864, patches 2,496, class token 192, 257 positions 49,344, norm 384, head 1,930."""
    with torch.device("meta"):
        model = sam_at.MODELS[name](10)
    assert sum(w.numel() for w in model.parameters()) == parameters

@mark.parametrize("c_in, c_out, stride", [(3, 3, 1), (3, 5, 2), (4, 4, 2)])
def test_a_preactivation_block_is_its_formula(c_in, c_out, stride):
    torch.manual_seed(0)
    block = sam_at.PreActBlock(c_in, c_out, stride)
    x = normal(0, 2, c_in, 8, 8)
    h = F.relu(block.bn1(x))
    branch = F.conv2d(h, block.conv1.weight, stride=stride, padding=1)
    branch = F.conv2d(F.relu(block.bn2(branch)), block.conv2.weight, padding=1)
    skip = x if stride == 1 else F.conv2d(h, block.shortcut.weight, stride=stride)
    assert block(x).allclose(skip + branch, atol=1e-5)

def test_normalisation_is_inside_and_bf16_for_training_alone():
    mean = uniform(0, 3, 1, 1)
    std = 0.1 + uniform(1, 3, 1, 1)
    x = uniform(2, 2, 3, 32, 32)
    model = make_model("small", 3, (mean, std), width=4).eval()
    exact = model(x)
    assert exact.allclose(model.net((x - mean) / std), atol=1e-4)
    assert str(model).count("ReLU") == 3
    model.bf16 = True
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).equal(exact)
    rounded = model.train()(x)
    assert rounded.equal(rounded.bfloat16().float())

def test_deit_tiny_has_its_heads_and_initial_values():
    model = make_model("deit_ti", 10, width=48)
    assert model.net.encoder.layers[0].self_attention.num_heads == 3
    assert model.net.heads.head.weight.std().item() == approx(0.02, rel=0.2)
    assert model.net.conv_proj.weight.std().item() == approx(1 / 6, rel=0.1)  # uniform within 1/sqrt 12

def test_prn18_halves_the_image_three_times_and_ends_with_a_mean():
    net = make_model("prn18", 10, width=4).net
    h = net[:9](uniform(0, 2, 3, 32, 32))
    assert h.shape == (2, 32, 4, 4)
    assert net[9:](h).allclose(net[-1](F.relu(net[9](h)).mean((2, 3))), atol=1e-5)

# == 5. Data ===========================================================================================
def tiny_data(n, size=32):
    """Random images, each with a label. Test images are others than the training images."""
    x = (255 * uniform(0, 2 * n, 3, size, size)).byte()
    y = torch.arange(2 * n) % 3
    return sam_at.Data(x[:n], y[:n], x[n:], y[n:], 3, "tiny", augment=False)

def test_crop_and_flip_takes_every_crop_of_the_reflected_image_equally():
    """324 outcomes (2 images, 81 shifts, mirrored or not), 40,000 draws: about 123 of each."""
    torch.manual_seed(0)
    x = torch.arange(2 * 3 * 11 * 12.0).view(2, 3, 11, 12)
    out = sam_at.crop_and_flip(x.repeat(20_000, 1, 1, 1))
    found, counts = out.unique(dim=0, return_counts=True)
    crops = []
    for image in F.pad(x, (4, 4, 4, 4), mode="reflect"):
        for i in range(81):
            crop = image[:, i // 9:, i % 9:][:, :11, :12]
            crops += [crop, crop.flip(2)]
    assert found.equal(torch.stack(crops).unique(dim=0))
    assert out[0].min() < 396 <= out[1].min()  # each image in its place
    assert counts.min() > 80

@given(seeds, st.integers(1, 30), st.integers(1, 9), st.sampled_from([1, 2, 3]))
def test_an_epoch_meets_every_image_once(monkeypatch, seed, n, batch_size, world):
    """Processes share each batch equally, and what cannot be shared is left out."""
    data, met = tiny_data(n, size=4), []
    data.y = torch.arange(n)
    monkeypatch.setattr(sam_at, "WORLD", world)
    for rank in range(world):
        monkeypatch.setattr(sam_at, "RANK", rank)
        torch.manual_seed(seed)
        for x, y in batches(data, batch_size):
            assert x.equal(data.x[y] / 255)
            met += y.tolist()
    whole, rest = divmod(n, batch_size)
    shared = whole * (batch_size // world) + rest // world
    assert len(met) == len(set(met)) == shared * world

def test_images_are_shuffled_and_augmented_where_that_is_asked_for():
    data = tiny_data(50, size=8)
    data.y = last = torch.arange(50)
    for data.augment in False, True:
        (x, y), = batches(data, 50)
        kept = (x == data.x[y] / 255).flatten(1).all(1)
        assert not y.equal(last)
        last = y
        assert kept.sum() < 9 if data.augment else kept.all()

# == 6. The training loop ==============================================================================
def test_a_row_of_training_holds_averages_over_images(monkeypatch):
    """One of two processes has 4, 4 and 1 images of each epoch's batches; a stand-in whose loss is that number times
    the epochs before, and which errs where it is 1. The third epoch: 2 * (16 + 16 + 1) for 9 images."""
    def step(model, x, y, optimizer):
        assert model.training
        assert optimizer.param_groups[0]["lr"] == 0.1
        optimizer.step()
        return torch.tensor(float(len(rows) * len(y))), F.one_hot(y, 3) * (len(y) - 2)
    monkeypatch.setattr(sam_at, "WORLD", 2)
    monkeypatch.setattr("time.perf_counter", Mock(side_effect=range(6)))
    model = tiny_net()
    optimizer, schedule = make_optimizer(model, 0.1, 3)
    rows = []
    for row in sam_at.train(model, tiny_data(20, size=4), step, optimizer, schedule, 3, 9):
        rows.append(row)
        model.eval()
    assert optimizer.param_groups[0]["lr"] == approx(0.001)
    assert row == dict(epoch=3, loss=66 / 9, accuracy=800 / 9, seconds=1)

# == 7. Evaluation =====================================================================================
@given(seeds, norms, st.floats(0.001, 0.1), st.integers(1, 70))
def test_robust_accuracy_of_a_linear_model_is_the_closed_form(seed, norm, eps, batch_size):
    """An image withstands eps if its margin exceeds eps * |w|_q, q dual to p. The next attack begins anew."""
    w = normal(seed, 12).double()
    x = 0.5 + 0.05 * normal(seed, 60, 3, 2, 2).double().clamp(-3, 3)
    score = (x - 0.5).flatten(1) @ w
    y = (score + 0.1 * normal(seed, 60) > 0).long()  # some are wrong
    margin = score * (2 * y - 1)
    threshold = eps * float(w.abs().sum() if norm == "linf" else w.norm())
    assume((margin - threshold).abs().min() > 1e-4)
    attacks = [f"{norm} {eps}", f"{norm} 0"]
    found = evaluate(linear(*w), x, y, attacks, steps=40, batch_size=batch_size)
    wanted = [100 * float((margin > least).double().mean()) for least in (0, threshold, 0)]
    assert list(found.values()) == approx(wanted)

def test_every_attack_has_each_of_its_starts():
    """A third of the ball is wrong, and no gradient leads there. A third start takes 4/9 - 8/27, or 15%."""
    def score(x, w):
        wrong = x.mean(IMAGE) > 0.5 + 0.02 / 3
        return wrong.double() - 0.5 + 0 * x.sum(IMAGE)
    x = torch.ones(400, 1, 1, 1) / 2
    y = torch.zeros(400).long()
    for restarts in 1, 4:
        found = evaluate(Scored(score), x, y, ["linf 0.02"], restarts=restarts)
        assert found["linf 0.02"] == approx(100 * (2 / 3) ** restarts, abs=10)
    torch.manual_seed(3)
    taken = sam_at.doubts(Scored(score), x, y, ["linf 0.02"], 70, 2)
    assert taken["more fall to linf 0.02, 70 steps, another start"] == approx(15, abs=6)

def test_an_attack_may_take_gradients_and_leave_the_model_in_training_mode():
    def attack(model, x, y):
        x.requires_grad_().sum().backward()
        assert len(x) < 9
        assert not model.training
        model.train()
        return x.double() * 1.000001 - 5e-7  # a little below 0 and above 1
    model, (x, y) = tiny_net().float(), batch(40)
    model.net[1].eval()
    before = all_of(model)
    with torch.inference_mode():
        figures = evaluate(model, (x * 2).byte() * 255, y, {"a": attack, "b": attack}, batch_size=15)
    assert len(set(figures.values())) == 1
    assert same_bits(before, all_of(model))

def further(model, x, y, eps, norm="linf"):
    """In place; a linf radius of eps is too far in l2."""
    return x.add_(1.05 * eps if norm == "linf" else eps).clamp_(0, 1)

@mark.parametrize("wrong", [
    {"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), "labels": 0 * LABELS},
    {"model": nn.Conv2d(3, 2, 1)},
    {"labels": LABELS + 1},
    {"labels": LABELS - 1},
    {"labels": LABELS[:2], "batch_size": 1},
    {"labels": LABELS[:, None]},
    {"labels": LABELS[:0], "images": IMAGES[:0]},
    {"images": IMAGES - 0.5},
    {"restarts": 0},
    {"steps": 0},
    {"attacks": {"clean": sam_at.fgsm}},
    {"attacks": {"mine": lambda model, x, y: x + 1}},
    {"attacks": {"mine": partial(further, eps=0.001)}},
    {"attacks": {"mine": partial(further, eps=0.001, norm="l2")}},
])
def test_evaluate_refuses_what_makes_no_sense(wrong):
    model = tiny_net().eval()
    labels = model(IMAGES).argmax(1)  # all are right, so all are attacked
    sound = {"model": model, "images": IMAGES, "labels": labels, "attacks": ()}
    with raises(BadInput):
        evaluate(**(sound | wrong))

@mark.parametrize("f", [lambda z: -1 / z, lambda z: (0.1 - z).log()])
def test_logits_that_are_not_finite_are_an_error(f):
    """On clean images or under attack alone: argmax would call them class 0."""
    model = Scored(lambda x, w: f((x - 0.5).abs().sum(IMAGE)))
    with raises(FloatingPointError, match="finite"):
        evaluate(model, GREY, ZERO, ["linf 0.1"])

# == 8. Where the data comes from ======================================================================
def save(path, colour, size=(32, 32), mode="RGB"):
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)

def make_folder(root, size=(32, 32)):
    """Two images of each of two classes in each part; blue tells the parts apart."""
    for c, name in enumerate(["cat", "dog"]):
        for i in range(2):
            save(root / "train" / name / f"{i}.png", (80 * c, 60, 20 * i), size)
            save(root / "test" / name / f"{i}.png", (80 * c, 60, 100 + 20 * i), size)
    return root / "train" / ".."

def test_a_folder_is_read_class_by_class(tmp_path):
    place = make_folder(tmp_path / "pets", size=(20, 50))
    data = load_data("folder", place)
    assert [*data.y, *data.y_test] == [0, 0, 1, 1] * 2
    assert data.x[1, :, 5, 5].tolist() == [0, 60, 20]
    assert data.x_test[2, :, 5, 5].tolist() == [80, 60, 100]
    assert (data.classes, data.source, data.augment) == (2, "pets", True)
    assert cli(*QUICK, "--dataset=folder", f"--data-dir={place}")[0] == 0  # a channel is constant

@mark.parametrize("spoil, says", [
    (lambda root: (root / "train").rename(root / "gone"), "--data-dir"),
    (lambda root: (root / "test" / "cat").rename(root / "test" / "cow"), "cow"),
    (lambda root: [save(root / part / ".hidden" / "0.png", 0) for part in ("train", "test")], "hidden"),
    (lambda root: [(root / part / "dog").rename(root / part / "cat" / "dog") for part in ("train", "test")], "two"),
    (lambda root: (root / "train" / "dog" / "1.png").write_bytes(b"no image"), "1.png"),
    (lambda root: save(root / "test" / "dog" / "1.png", 40_000, mode="I;16"), "8 bits"),
    (lambda root: save(root / "test" / "dog" / "1.tiff", 0.5, mode="F"), "8 bits"),
])
def test_a_folder_that_cannot_be_used_is_refused_by_name(spoil, says, tmp_path):
    spoil(make_folder(tmp_path))
    with raises(BadInput, match=says):
        load_data("folder", tmp_path)

def test_tiny_imagenet_as_it_unpacks(tmp_path):
    for i, (wnid, grey) in enumerate([("n02", 200), ("n01", 100)]):
        save(tmp_path / "train" / wnid / "images" / f"{wnid}_0.png", grey, (64, 64), "L")
        save(tmp_path / "val" / "images" / f"val_{i}.png", grey + 5, (64, 64), "L")
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.png\tn02\t0\t0\nval_1.png\tn01\t0\t0\n")
    data = load_data("tiny-imagenet", tmp_path)
    assert [*data.y, *data.y_test] == [0, 1, 1, 0]
    assert [*data.x[:, 2, 0, 0], *data.x_test[:, 2, 0, 0]] == [100, 200, 205, 105]

@mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_torchvisions(name, monkeypatch):
    """A stand-in for its data set: images (N, 32, 32, 3), and labels in a list."""
    def load(directory, train, download):
        if directory == "nowhere" or not download:
            raise OSError("no network")
        return Namespace(data=images[int(train)].numpy(), targets=[int(train)] * 4, classes="abc")
    images = torch.randint(255, (2, 4, 32, 32, 3)).byte()
    monkeypatch.setattr("torchvision.datasets." + name.upper(), load)
    data = load_data(name, "data")
    assert data.x.movedim(1, 3).equal(images[1])
    assert data.x_test.movedim(1, 3).equal(images[0])
    assert [*data.y, *data.y_test] == [1] * 4 + [0] * 4
    assert (data.classes, data.source, data.augment) == (3, name, True)
    with raises(BadInput, match=f"{name}.*--dataset demo.*no network"):
        load_data(name, "nowhere")

def test_the_demos_classes_can_be_told_and_its_test_images_are_others():
    """Most are nearest to the mean image of their class. Its random numbers are its own."""
    before = torch.get_rng_state()
    data = sam_at.demo_data()
    assert before.equal(torch.get_rng_state())
    assert not data.augment
    assert len(torch.cat([data.x, data.x_test]).unique(dim=0)) == 5000
    x, x_test = data.x.flatten(1).float(), data.x_test.flatten(1).float()
    means = torch.stack([x[data.y == c].mean(0) for c in range(10)])
    found = torch.cdist(x_test, means).argmin(1)
    assert (found == data.y_test).float().mean() > 0.8

@mark.parametrize("error", [ImportError, RuntimeError])
def test_a_missing_library_is_named_with_its_pip_command(error, monkeypatch):
    monkeypatch.setattr("importlib.import_module", Mock(side_effect=error))
    with raises(BadInput, match="^pip install pyautoattack"):
        parse_attack("autoattack linf 8/255")

# == 9. Attacks by name ================================================================================
@mark.parametrize("text", ["linf", "l2 8", "fgsm 8", "margin 1/255"])
def test_an_attack_that_no_name_fits_is_refused(text):
    with raises(BadInput):
        parse_attack(text)

def test_the_margin_attacks_where_softmax_is_exactly_one():
    logits = torch.tensor([[1.0, 3, 2], [9, 4, 2]])
    assert sam_at.negative_margin(logits, torch.tensor([2, 0])) == (3 - 2) + (4 - 9)
    model = Scored(lambda x, w: 1e5 * (x.mean(IMAGE) - 0.5))
    found = evaluate(model, GREY - 0.02, ZERO, iter(["linf 0.05", "margin linf 0.05", "margin l2 0.2"]))
    assert list(found.values()) == [100, 100, 0, 0]

@mark.parametrize("norm, eps", [("linf", 0.03), ("l2", 0.15)])
def test_autoattack_is_never_above_pgd(norm, eps):
    pytest.importorskip("pyautoattack")
    model = tiny_net(classes=10).eval().float()
    x = uniform(0, 30, 3, 5, 5)
    name = f"{norm} {eps}"
    found = evaluate(model, x, model(x).argmax(1), [f"autoattack {name}", name])
    assert found[f"autoattack {name}"] <= found[name] < 100
    with raises(BadInput, match="ten classes"):
        evaluate(tiny_net(), *batch(8), [f"autoattack {name}"])

def honest(x):
    return x.neg_().mean(IMAGE) + 0.45

@mark.parametrize("f, reason, points", [
    (honest, "two gradients disagree", 0),
    (lambda x: 3e4 * (0.48 - x.mean(IMAGE)), "more fall to margin linf 8/255, 4 steps, another start", 6),
    (lambda x: 0.49 - x.amax(IMAGE), "more fall to l2 0.1, 50 steps, another start", 8),
    (lambda x: honest(x).clamp(min=0), "the gradient is zero or NaN", 6),
    (lambda x: honest(x) + x.mean() ** 4, "the logits depend on the batch", 100),
    (lambda x: honest(x) + (torch.randn_like(x) * (x - x.detach())).sum(IMAGE), "two gradients disagree", 100),
])
def test_an_evaluation_that_is_not_to_be_trusted_is_called_so(f, reason, points):
    """By 200 images, evenly spaced, of which 6% are near the other class. The first model is sound."""
    def score(x, w):
        assert len(x) < 201
        assert not model.training
        return f(x) * (1 + torch.rand(()) / 9999)
    model = Scored(score)
    x = 0.5 + 0.002 * normal(0, 500, 3, 2, 2)
    x[:470] -= 0.1
    y = (torch.arange(500) < 470).long()
    found = sam_at.doubts(model, x, y, ["linf 8/255", "l2 0.1", "margin l2 1/2"], 4, 2)
    assert found[reason] == approx(points, abs=3.5)
    assert (max(found.values()) > 1) == (points > 0)
    assert points != 8 or not found["the gradient is zero or NaN"]  # zero in most pixels, but not in all
    assert len(found) == 7
    assert model.training

# == 10. Variants ======================================================================================
def test_asam_and_awp_are_their_formulas():
    """ASAM: v = rho T^2 g/|T g|, T = |w| + 0.01. AWP: a layer moves by rho |w| along its gradient."""
    model = tiny_net()
    gradient(model, *batch(6))
    weights = weights_of(model)
    grads = [w.grad for w in model.parameters()]
    T = [w.abs() + 0.01 if w.ndim > 1 else torch.ones_like(w) for w in weights]
    size = length(t * g for t, g in zip(T, grads))
    asam = [0.3 * t * t * g / size for t, g in zip(T, grads)]
    awp = [(w.ndim > 1) * 0.3 * w.norm() * g / g.norm() for w, g in zip(weights, grads)]
    assert_close(adaptive_ascent(weights, grads, 0.3), asam)
    assert_close(layerwise_ascent(weights, grads, 0.3), awp)

@given(seeds, st.floats(0.05, 1), st.integers(1, 9), st.floats(0.01, 0.3))
def test_esam_descends_for_those_who_suffer(seed, gamma, n, rho):
    """Here all weights climb. The share gamma of images counts whose loss rose most there."""
    model = tiny_net(seed, norm=nn.Identity)
    twin = tiny_net(seed, norm=nn.Identity)
    x, y = batch(n, seed)
    esam_step(model, x, y, sgd(model), rho, 1.0, gamma)
    losses = partial(F.cross_entropy, target=y, reduction="none")
    _, logits = gradient(twin, x, y)
    with perturbed(twin, rho):
        rise = losses(twin(x)) - losses(logits)
        hard = rise.argsort()[-math.ceil(gamma * n):]
        gradient(twin, x[hard], y[hard])
    sgd(twin).step()
    assert_close(weights_of(model), weights_of(twin))

def test_esam_is_for_half_the_weights():
    """A frozen weight never climbs; if none of the other three is drawn, one does. They move rho/beta in all."""
    model, seen, climbs = tiny_net(norm=nn.Identity), [], 0
    model.net[0].weight.requires_grad_(False)
    before = weights_of(model)
    model.register_forward_pre_hook(lambda module, args: seen.append(weights_of(model)))
    for _ in range(400):
        esam_step(model, *batch(4), sgd(model, 0.0), 0.01)
    for there in seen[1::3]:
        v = [w - old for w, old in zip(there, before)]
        assert length(v) == approx(0.01 / 0.5, rel=1e-3)
        climbs += sum(bool(move.any()) for move in v)
    assert climbs / 1200 == approx(13 / 24, abs=0.04)

# == 11. The simplified model ==========================================================================
GRID = torch.linspace(0, 30, 300_001, dtype=f64)

def accuracy(w, p, eta, n):
    """A(w), w a tensor."""
    Phi = torch.special.ndtr
    return p * Phi((w + eta * n) / n ** 0.5) + (1 - p) * Phi((eta * n - w) / n ** 0.5)

def searched(p, eta, n, rho=0.0):
    """The w whose worst accuracy within rho is best."""
    worst = torch.minimum(accuracy(GRID - rho, p, eta, n), accuracy(GRID + rho, p, eta, n))
    return float(GRID[worst.argmax()])

@given(st.floats(0.6, 0.9), st.floats(0.3, 0.6), st.integers(4, 12), st.floats(0, 0.5))
def test_the_closed_forms_of_the_simplified_model(p, eta, n, share):
    """Standard training ln(p/(1-p))/(2 eta); AT the same with eta - eps, so first order in eps;
    SAM w (1 + rho^2/(3n)), so second order in rho."""
    w = math.log(p / (1 - p)) / (2 * eta)
    assert searched(p, eta * (1 - share), n) == approx(w / (1 - share), abs=2e-4)
    for z in 0.4, 0.8:  # rho/sqrt n
        sam = searched(p, eta, n, z * n ** 0.5)
        assert sam == approx(w * (1 + z ** 2 / 3), abs=0.1 * w * z ** 4 + 2e-4)

def to_the_worse(weights, grads, rho):
    """SAM's exact maximum for a single weight: the worse of w - rho and w + rho."""
    w = weights[0]
    down = accuracy(w - rho, 0.9, 0.5, 10) < accuracy(w + rho, 0.9, 0.5, 10)
    return [torch.full_like(w, -rho if down else rho)]

def one_weight(x, w):
    """The score of that classifier, p 0.9 and n 10, as a network. Its image holds the mean values of the n features,
    eta each, as pixels 1/2 + eta/40, and its cross-entropy at label 0 is 2 - A(w)."""
    eta = 40 * (x - 0.5).mean(1)
    return (2 - accuracy(w, 0.9, eta, 10)).expm1().log()

@mark.parametrize("step, end", [
    (sgd_step, searched(0.9, 0.5, 10)),
    (partial(at_step, eps=0.05 / 40, steps=8), searched(0.9, 0.45, 10)),
    (partial(sam_step, rho=1.0, ascend=to_the_worse), searched(0.9, 0.5, 10, 1.0)),
    (partial(sam_step, rho=1.0), searched(0.9, 0.5, 10)),  # along the gradient it climbs the wrong side
])
def test_the_steps_train_the_one_weight_to_the_same_place(step, end):
    model = Scored(one_weight, [2.7])
    x = torch.full((1, 10), 0.5 + 0.5 / 40, dtype=f64)
    for k in range(200):
        step(model, x, ZERO, sgd(model, 30 / (1 + k / 3)))
    assert model.w.item() == approx(end, rel=0.01)

# == 12. The duality, measured =========================================================================
def test_rises_are_those_of_the_ascent_and_of_pgd():
    """To first order: rho |dL/dw|, and eps |dL/dx| in the dual norm, image by image."""
    model = tiny_net()
    x, y = batch(8)
    model.net[-1].weight.data /= 30  # so that the loss is nearly linear
    rises = sam_at.sharpness(model, x, y)
    assert model.training
    gradient(model.eval(), x.requires_grad_(), y)
    steepness = length(w.grad for w in model.parameters())
    g = x.grad.flatten(1)
    assert list(rises) == ["rho 0.05", "rho 0.1", "rho 0.2", *sam_at.ATTACKS]
    assert rises["rho 0.05"] == approx(0.05 * steepness, rel=0.15)
    assert rises["rho 0.2"] > 3 * rises["rho 0.05"]
    for k in 1, 2:
        assert rises[f"linf {k}/255"] == approx(k / 255 * float(g.abs().sum()), rel=0.1)
        assert rises[f"l2 {16 * k}/255"] == approx(16 * k / 255 * float(g.norm(dim=1).sum()), rel=0.1)

# == 13. The command line ==============================================================================
def cli(*argv):
    """main() in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = sam_at.main([*map(str, argv)])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()

QUICK = "--method=sgd,--width=2,--epochs=2,--batch-size=16,--no-bf16,--eval-steps=1,--attacks=linf 2/255".split(",")

@fixture
def quick(monkeypatch):
    monkeypatch.setattr(sam_at, "demo_data", partial(sam_at.demo_data, n_train=64, n_test=1041))
    monkeypatch.setattr(sam_at, "doubts", lambda *_: {"the moon is full": 1.5, "the sun": 1.0})

@fixture
def seen(monkeypatch):
    """Calls of data, training and evaluation: a random number, and what is given. Nothing is trained or measured."""
    row = {"loss": 1.0, "accuracy": 50.0, "seconds": 1.0}
    right = torch.tensor([True, False])
    results = {"load_data": tiny_data(200), "train": [row], "right_images": right, "doubts": {}}
    calls = {name: [] for name in results}
    def stand_in(name, *given):
        calls[name].append((float(torch.rand(())), *given))
        return results[name]
    for name in results:
        monkeypatch.setattr(sam_at, name, partial(stand_in, name))
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: nn.Sequential(model))
    return Namespace(**calls)

def test_every_flag_arrives(seen):
    """Those of the methods are in the next test."""
    flags = """--method sgd --dataset tiny-imagenet --data-dir pics --bf16 --model prn18 --width 5 --epochs 30
        --batch-size 6 --compile --seed 11 --eval-steps 13 --restarts 3 --images 9 --runs elsewhere --device cpu"""
    assert "  loss 1.0000  accuracy 50.0%  1.0 s, 29 s left" in cli(
        *flags.split(), "--attacks", "fgsm 1/255", "margin l2 0.5")[1]
    assert seen.load_data[0][1:] == ("tiny-imagenet", "pics")
    assert "bfloat16, compiled; 9 test images" in record_of("elsewhere")["table"]
    assert not torch.backends.cudnn.allow_tf32
    _, compiled, data, _, optimizer, schedule, *sizes = seen.train[0]
    model, = compiled
    assert model.bf16
    assert model.net[0].out_channels == 5
    assert model.net[-1].out_features == 3
    assert model.mean.flatten().allclose((data.x / 255).mean((0, 2, 3)))
    assert model.std.flatten().allclose((data.x / 255).std((0, 2, 3)))
    assert set(schedule.milestones) == {23, 27}
    assert sizes == [30, 6]
    for drawn, tested, images, labels, _, restarts in seen.right_images:
        assert drawn == float(uniform(11, 1))
        assert tested is model
        assert restarts == 3
        chosen = torch.arange(9) * 200 // 9  # evenly spaced
        assert images.equal(data.x_test[chosen])
        assert labels.equal(data.y_test[chosen])
    margin = seen.right_images[2][4].keywords
    assert margin.items() >= dict(eps=0.5, steps=13, stop_when_fooled=True).items()
    assert seen.doubts[0][1:] == (model, images, labels, ["fgsm 1/255", "margin l2 0.5"], 13, 3)

def test_every_method_is_the_step_of_its_name_with_all_its_settings(seen):
    sam = partial(sam_step, rho=0.2)
    at = partial(at_step, eps=7.8, norm="l2", steps=3)
    wanted = {
        "sgd": sgd_step,
        "sam rho 0.2": sam,
        "asam rho 0.2": partial(sam, ascend=adaptive_ascent),
        "esam rho 0.2": partial(esam_step, rho=0.2),
        "at l2 1989_255 steps 3": at,
        "sam+at rho 0.2 l2 1989_255 steps 3": partial(at, step=sam),
        "awp rho 0.2 l2 1989_255 steps 3": partial(at, step=partial(sam, ascend=layerwise_ascent)),
    }
    cli("--method", *[label.split()[0] for label in wanted],
        *"--rho 0.2 --eps 7.8 --norm l2 --attack-steps 3".split())
    for (drawn, _, _, ours, *_), (label, step) in zip(seen.train, wanted.items(), strict=True):
        assert same_bits(after(ours), after(step))
        assert drawn == seen.train[0][0]
        assert any(Path("runs").glob(f"tiny small {label} seed 0 *"))

@mark.parametrize("name, wanted", [
    ("small", dict(lr=0.1, weight_decay=5e-4, momentum=0.9, nesterov=False)),
    ("deit_ti", dict(lr=0.001, weight_decay=0.05, decoupled_weight_decay=True)),
])
def test_defaults(name, wanted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    s = parse_args(["--model", name])
    labels = [sam_at.make_step(method, s)[0] for method in s.method]
    assert labels == ["sgd", "sam rho 0.15", "at linf 1/255 steps 5"]
    model, _, optimizer, _ = sam_at.build(s, 10)
    assert same_bits(weights_of(model), weights_of(sam_at.build(s, 10)[0]))  # all methods start alike
    group, = optimizer.param_groups
    assert group.items() >= wanted.items()
    assert not s.bf16
    assert (s.batch_size, s.epochs, s.eval_steps, s.data_dir) == (128, 10, 10, "data")
    assert (10, s.attacks, 10, 1, 500, 10) == (
        pgd.__defaults__[1:2] + evaluate.__defaults__ + parse_attack.__defaults__)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert parse_args([]).bf16
    assert not parse_args(["--no-bf16"]).bf16

BAD = """
--eps 8 > below 1
--eps x > radius
--eps 1/0 > radius
--attacks linf > attack
--dataset mnist > invalid choice
--method sma > sma
--roh 1 > roh
--epoch 1 > epoch
--rho -0.1 > rho
--rho nan > rho
--rho inf > rho
--epochs 0 > epochs
--batch-size 0 > batch-size
--images -1 > images
--seed 99999999999999999999 > seed
--width 900000000 > width
--model deit_ti --width 4 > width
--device cuda > no GPU found
--dataset folder > --data-dir
--runs /dev/null > /dev/null
""".strip().splitlines()  # arguments > words of the message

@mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_exit_code_2(case, quick):
    argv, says = case.split(" > ")
    code, out, err = cli(*QUICK, *argv.split())
    assert code == 2
    assert says in err.splitlines()[-1]
    assert "epoch" not in out

# == 14. More than one device ==========================================================================
def finish(body, *argv, command=("script.py",), **environment):
    """What a script prints that has imported sam_at, made the demo's data small, and ends well."""
    Path("script.py").write_text(f"""
import os, random, signal, sys, time
sys.path[:0] = [{str(HERE)!r}]
import sam_at
sam_at.demo_data = sam_at.partial(sam_at.demo_data, n_train=64, n_test=1041)
sam_at.doubts = lambda *_: {{}}
{body}""", encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *command, *map(str, argv)], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return done.stdout.decode()

def only(pattern, runs="runs"):
    """The one file of that name among the runs."""
    path, = Path(runs).glob(f"*/{pattern}")
    return path

def state_of(runs="runs"):
    return torch.load(only("*.pt", runs), weights_only=True)["model"]

def record_of(runs="runs"):
    return json.loads(only("*.json", runs).read_text())

def test_two_processes_train_as_one_but_each_share_has_its_own_v(quick):
    """Only the first writes and speaks."""
    flags = [*QUICK, "--method=sam", "--rho=0.3"]
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 script.py"
    out = finish("""
import test_sam_at as suite
sam_at.make_model = lambda *_: suite.tiny_net(suite.torch.initial_seed(), classes=10, norm=suite.nn.Identity)
sys.exit(sam_at.main())""", *flags, command=torchrun.split())
    assert out.count("epoch 1/2") == 1
    assert "batch 16, 2 processes; " in record_of()["table"]
    data = sam_at.demo_data()
    model = tiny_net(classes=10, norm=nn.Identity)
    optimizer, _ = make_optimizer(model, 0.1, 100)
    for x, y in [*batches(data, 16), *batches(data, 16)]:
        shares = []
        for i in 0, 1:
            sam_step(model, x[i::2], y[i::2], sgd(model, 0.0), rho=0.3)
            shares.append([w.grad for w in model.parameters()])
        for w, a, b in zip(model.parameters(), *shares):
            w.grad = (a + b) / 2
        optimizer.step()
    assert_close(model.state_dict().values(), state_of().values(), 1e-5)
    assert "epoch 1/2" in cli(*flags)[1]  # by one process it is another run

def test_processes_count_only_where_torchrun_started_them_and_threads_soon_sleep():
    """RANK is a sweep's own variable, too. What the caller has set stays."""
    assert subprocess.run([sys.executable, HERE / "sam_at.py", "--eps=8"]).returncode == 2
    body = "print(sam_at.RANK, sam_at.WORLD, os.environ['GOMP_SPINCOUNT'])"
    assert finish(body, RANK="2", WORLD_SIZE="9").split() == ["0", "1", "2000"]
    assert finish(body, RANK="", GOMP_SPINCOUNT="7").split() == ["0", "1", "7"]

def test_the_first_process_writes_and_a_file_is_replaced_as_a_whole(monkeypatch):
    """Whoever has the old one still sees all of it."""
    path = Path("file")
    path.write_bytes(b"old")
    os.link(path, "same")
    write_whole(path, b"new")
    monkeypatch.setattr(sam_at, "RANK", 1)
    write_whole(path, b"another process's")
    assert path.read_bytes() + Path("same").read_bytes() == b"newold"
    assert sorted(os.listdir()) == ["file", "same"]

# == 15. Runs ==========================================================================================
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been():
    out = finish("""
begin = time.time()
sam_at.main([*sys.argv[1:], "--runs=whole"])
epoch = (time.time() - begin) / 40
saved = lambda: [path.stat() for path in sam_at.Path("runs").glob("*/checkpoint.pt")]
for kill in range(10):
    before = saved()
    child = os.fork()
    if not child:
        os._exit(sam_at.main())
    while saved() == before and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)
    time.sleep(random.uniform(0, 1) * epoch)
    os.kill(child, signal.SIGKILL)
    os.wait()
sys.exit(sam_at.main())""", *QUICK, "--method=sam+at", "--epochs=40")
    assert "is trained up to epoch" in out
    assert same_bits(state_of("whole").values(), state_of().values())
    assert record_of("whole")["figures"] == record_of()["figures"]
    assert len(record_of()["log"]) == 40

DECIDES = """--seed 1;--batch-size 9;--epochs 3;--bf16;--compile;--width 3;--model deit_ti;--lr 0.2;
--dataset cifar100;--rho 0.15000001;--eps 1.0000001/255;--norm l2;--attack-steps 3;--method awp""".split(";")

def test_what_decides_the_weights_and_nothing_else_makes_another_run(seen, monkeypatch):
    def runs_after(*argv):
        assert cli(*argv)[0] == 0
        return len(os.listdir("runs"))
    given = "--method sam+at --no-bf16".split()
    for n, flag in enumerate(["", *DECIDES], 1):
        given += flag.split()
        assert runs_after(*given) == n, flag
    assert seen.train[0][0] != seen.train[1][0]  # another seed, other random numbers
    runs = runs_after("--method=sgd")
    assert runs_after(*"--method sgd --rho 0.3 --eps 0.2 --norm l2 --attack-steps 2".split()) == runs
    for n, part in enumerate("x y x_test y_test".split(), 1):
        other = tiny_data(200)
        setattr(other, part, getattr(other, part).roll(1, 0))
        monkeypatch.setattr(sam_at, "load_data", lambda *_: other)
        assert runs_after("--method=sgd") == runs + n

def test_a_finished_run_is_reported_and_another_measurement_is_another_record(quick, monkeypatch):
    def table(*more):
        return cli(*QUICK, *more)[1].split("\n\n")[1]
    table("--bf16", "--sharpness", "--images=9999")
    table("--lr=0.1001")
    first = table()
    monkeypatch.setattr(sam_at, "sgd_step", None)  # no step can be made
    with monkeypatch.context() as patch:
        patch.setattr(sam_at, "write_whole", None)  # nothing can be written
        assert table() == first
    assert table("--sharpness")[-5] == "."  # three decimals
    others = ["--attacks=l2 0.5", "--eval-steps=2", "--restarts=2", "--images=7"]
    for other in others + others:
        table(other)
    records = [json.loads(path.read_text()) for path in Path("runs").glob("*/*.json")]
    assert len({record["table"] for record in records}) == 8
    assert sorted(record["images"] for record in records) == [7, 1000] + 6 * [1041]

def test_a_record_names_its_row_and_table_and_what_it_takes_to_repeat_it(quick):
    out = cli(*QUICK, *"--method sam --seed 3 --epochs 3 --bf16".split(), "--attacks=l2 1")[1]
    record = record_of()
    assert record["settings"].items() >= dict(label="sam rho 0.15", method="sam", rho=0.15, seed=3).items()
    assert record["table"] == (
        f"demo ({record['settings']['data']}), small width 2, 3 epochs, lr 0.1, batch 16, bfloat16; "
        "1041 test images, l2 1, 1 steps, 1 starts")
    assert record.keys() >= {"torch", "threads", "machine"}
    assert record["log"][2]["code"] == record["code"] == sam_at.sha256((HERE / "sam_at.py").read_bytes())
    data = sam_at.demo_data()
    model = make_model("small", 10, [[math.nan] * 3] * 2, 2)
    model.load_state_dict(state_of())
    torch.manual_seed(3)
    assert record["figures"] == evaluate(model, data.x_test, data.y_test, ["l2 1"], steps=1)
    right = model.eval()(data.x_test / 255).argmax(1) == data.y_test
    assert report.columns_of(record)["clean"].tolist() == (100 * right).tolist()
    header, row, warning = out.split("\n\n")[1].splitlines()
    assert row.split()[:4] == ["sam", "rho", "0.15", f"{record['figures']['clean']:.1f}"]
    assert "sam rho 0.15: the moon is full: 1.5% of images" in warning

@mark.parametrize("name", ["checkpoint.pt", "*.json"])
def test_a_damaged_file_is_named_and_kept(name, quick):
    """Cut off, empty, or with a bit changed in a key or a value."""
    cli(*QUICK)
    path = only(name)
    whole = path.read_bytes()
    contents = [b"", whole[:-100]]
    if name == "checkpoint.pt":
        only("*.json").unlink()
        for i in whole.index(b"net.0.weight"), len(whole) // 2:
            contents.append(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1:])
        torch.save(torch.load(path) | {"": Namespace()}, path)  # another program's
        contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        code, out, err = cli(*QUICK)
        assert code == 2
        assert err.count("\n") == 1
        assert f"{path}" in err
        assert "epoch 2" not in out
        assert path.read_bytes() == content

def test_no_room_divergence_and_ctrl_c_are_one_line_and_the_run_goes_on(quick, monkeypatch):
    def no_room(path, content):
        path.write_text("half of it")
        raise OSError("no room\nat all")
    def interrupt(*_):
        raise KeyboardInterrupt
    def diverge(model, x, y, optimizer):
        optimizer.step()
        return torch.tensor(math.nan), model(x)
    for place, name, fail, wanted in (
            (sam_at, "sgd_step", diverge, 2),
            (Path, "write_bytes", no_room, 2),
            (sam_at, "load_data", Mock(side_effect=RuntimeError("can't allocate")), 2),
            (sam_at, "load_data", Mock(side_effect=MemoryError), 2),
            (sam_at, "right_images", interrupt, 130)):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail)
            code, out, err = cli(*QUICK)
        assert code == wanted
        assert err.count("\n") == 1
        assert ("epoch 1/2" in out) == (code == 130)
    out = cli(*QUICK)[1]
    assert "is trained up to epoch 2/2" in out
    assert "epoch 1/2" not in out

# == 16. The program ===================================================================================
def test_the_benchmark_times_each_method_in_both_precisions(monkeypatch):
    """A stand-in for the clock: bfloat16 takes half as long."""
    def step(model, x, y, optimizer, rho):
        seen.append(len(x) / (1 + model._orig_mod.bf16))
    def clock(timer):
        timer.timeit(1)
        return Namespace(median=seen[-1])
    seen = []
    monkeypatch.setattr(sam_at, "sam_step", step)
    monkeypatch.setattr("torch.utils.benchmark.Timer.adaptive_autorange", clock)
    out = cli(*"--benchmark --compile --method sam --width 2 --batch-size 6".split())[1]
    assert f"{'sam rho 0.15':40}float32 6.0000 s, bfloat16 3.0000 s: 2.00 times as fast" in out

def test_the_replication_is_156_commands():
    out = subprocess.run([HERE / "run_all.sh", "--dry-run"], capture_output=True, text=True).stdout
    commands = set(out.splitlines())
    assert len(commands) == 156
    assert out.count("--norm l2") == 24
    for command in commands:
        parse_args(command.split()[2:])

# == 17. results/report.py =============================================================================
sys.path.append(str(HERE / "results"))
import report

def column(*seeds):
    """Who is right with each seed: "1" or "0" for each image; "." where a seed was not run."""
    points = {"1": 100, "0": 0, ".": math.nan}
    return numpy.array([[points[c] for c in seed] for seed in seeds])

def test_a_gain_and_its_error_of_six_images():
    """Differences of one seed 1 0 0 0 0 1, of the other 1 0 0 0 -1 0. Over images 1 0 0 0 -1/2 1/2, of mean 1/6 and
    variance 4/15; over seeds 1/3 and 0, of variance 1/18. A third seed has no partner."""
    a = column("110011", "110001", "000000")
    b = column("010010", "010011", "......")
    assert report.gain(a, b) == approx((100 / 6, 100 * math.sqrt(4 / 15 / 6 + 1 / 18 / 2)))
    assert report.gain(a[:1], b[:1]) == approx((100 / 3, 100 * math.sqrt(4 / 15 / 6)))

def three(label, clean, robust, **settings):
    """Records of three seeds, 4,000 images: so many percent right, clean and under two attacks; under b one more with
    each seed."""
    records = []
    for seed in 0, 1, 2:
        points = {"clean": clean, "a": robust, "b": robust + seed}
        right = {name: base64.b64encode(numpy.packbits(torch.arange(4000) < 40 * p)).decode()
                 for name, p in points.items()}
        now = dict(label=label, method=label.split()[0], seed=seed, attacks="ab", norm="linf", attack_steps=5, eps=0,
                   rho=1) | settings
        records.append(dict(label=label, table="two pets (1)", images=4000, figures={}, right=right, settings=now))
    return records

def verdicts_of(*records):
    """{claim: its verdict alone}."""
    found = report.verdicts(*report.table_of(records))
    return {claim: text.split("*")[2] for claim, text in found.items()}

SGD = three("sgd", 80, 30)
AT5 = three("at 1", 75, 60, eps=1)

@mark.parametrize("clean, robust, word", [
    (80, 30.15, "yes"),
    (79.7, 35, "yes"),
    (79.65, 40, "no"),
    (82, 30.05, "no"),
])
@mark.parametrize("variant", ["asam 1", "esam 1"])
def test_c1_and_c5_want_a_gain_under_every_attack_for_half_a_point_with_two_errors_to_spare(
        clean, robust, word, variant):
    sam = three("sam 1", clean, robust)
    other = three(variant, clean, robust)
    assert verdicts_of(*SGD, *sam, *other) == {"C1": word, "C5": word}
    assert verdicts_of(*SGD, *sam[:2]) == verdicts_of(*SGD[:2], *sam) == {"C1": f"open, so far {word}"}
    sam[0]["right"]["b"] = SGD[0]["right"]["b"]  # no gain under this attack
    assert verdicts_of(*SGD, *sam) == {"C1": "no"}

def test_c1_is_judged_for_each_radius():
    table = report.table_of([*three("sam 2", 79, 35, rho=2), *three("sam 1", 80, 35), *SGD])
    assert report.verdicts(*table)["C1"] == "**yes** (sam 1); **no** (sam 2)"

@mark.parametrize("clean, robust, other, c2, c3a", [
    (80, 35, 36, "yes", "yes"),
    (80, 35, 61, "no", "yes"),
    (80, 60, 36, "no", "no"),
    (79, 35, 20, "yes", "no"),
])
def test_c2_and_c3a_are_about_place(clean, robust, other, c2, c3a):
    """C2 is about every SAM, C3a about the best of those that are free."""
    sam = three("sam 1", clean, robust)
    others = three("sam 2", 70, other) + three("at 2", 77, 20, eps=2) + three("sam+at 1", 0, 90)
    found = verdicts_of(*SGD, *AT5, *sam, *others)
    assert (found["C2"], found["C3a"]) == (c2, c3a)
    found = verdicts_of(*SGD, *three("at 1", 79.95, 70, eps=1, norm="l2"), *sam)  # no clear price
    assert found["C2"] == found["C3a"] == "no"
    sam[0]["right"]["b"] = AT5[0]["right"]["b"]  # no gain on SAM under this attack
    found = verdicts_of(*SGD, *AT5, *sam[:2])
    assert found["C2"] == "open, so far no"
    assert "open" in found["C3b"]

@mark.parametrize("clean, robust, word", [
    (78, 44.5, "above the curve: +2.5 ± 1.1"),
    (78, 43.7, "on the curve: "),
    (78, 40.3, "on the curve: "),
    (78, 39.5, "below the curve: -2.5"),
    (60, 70, "above the curve: +4.0 ± 0.2"),
    (90, 40, "above sgd: +10.0"),
    (40, 72, "above at 2: +2.0"),
])
@mark.parametrize("claim, steps", [("C3b", 5), ("C6", 1)])
def test_c3b_and_c6_are_about_price(clean, robust, word, claim, steps):
    """A curve from SGD (80, 30) over (75, 60) to (50, 70), so at 42 where 78 are clean, and at 66 for 60; beyond its
    ends the nearest row counts. Each claim has its own number of steps. Its SAM is the most robust one. A row
    has another seed, so all is open."""
    at = three("at 2", 50, 70, eps=2, attack_steps=steps) + three("at 1", 75, 60, eps=1, attack_steps=steps)
    l2 = three("at l2", 79, 20, eps=0.5, attack_steps=steps, norm="l2")  # not on it
    at[0]["settings"]["seed"] = 3
    found = verdicts_of(*SGD, *three("sam 0", clean, robust - 9), *three("sam 1", clean, robust), *at, *l2)
    assert found[claim].startswith("open, so far " + word)
    assert str(found).count("open") == 3  # C1 is not
    assert len(found) == 4

def report_of(*records):
    """RESULTS.md of records, one of them in runs."""
    first, *lines = map(json.dumps, records)
    Path("results").mkdir()
    Path("runs/one").mkdir(parents=True)
    Path("results/records.jsonl").write_text("\n".join(lines) + "\n")
    Path("runs/one/x.json").write_text(first)
    report.main()
    assert sorted(Path("results/records.jsonl").read_text().splitlines()) == sorted({first, *lines})  # each once
    return Path("RESULTS.md").read_text("utf-8")

def test_the_report_has_a_verdict_a_table_and_a_picture_for_each_data_set(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("matplotlib.axes.Axes.errorbar", drawn := Mock())
    pets = [*SGD, *AT5, *three("sam 1", 80, 35.125)]
    cars = [{**record, "table": "cars (1)", "images": 5000} for record in SGD + AT5]
    check = [{**record, "table": "two pets (1) check", "images": 8} for record in pets[1:]]
    vans = [{**record, "table": "vans (1)"} for record in AT5]
    text = report_of(*check, *cars, *pets, *vans, SGD[1])
    order = [
        "|  | two pets | cars |\n| --- | --- | --- |",
        "| C1", "**yes** (sam 1) | open |",
        "results/two pets.png",
        "## Main result: two pets\n\ntwo pets (1)\n\n",
        "|  | seeds | clean | a | b | under attack | clean gain | under attack gain |", "| sgd",
        "| sam 1 | 3 | 80 | 35.12 | 36.12 | 35.62 | +0.0 ± 0.0 | +5.1 ± 0.3 |", "| at 1",
        "## Main result: cars",
        "## Check: vans",
        "## Check: two pets", "| sgd | 2 | 100 |",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    sgd, sam, at, _, cars_at = drawn.call_args_list
    assert sam.args[:3] == ((35.625,), (80,), (0,))  # its clean gain is without error
    assert at.kwargs == cars_at.kwargs != sgd.kwargs  # a family has its colour
    assert Path("results/two pets.png").exists()

def test_rises_have_their_rank_correlation_with_and_without_at():
    """Ranks 1 2 3 4 5 and 3 4 5 2 1."""
    records = []
    for label, w, x in ("sgd", 1, 4), ("sam 1", 2, 5), ("sam 2", 3, 60), ("awp 1", 9, 1), ("sam+at 1", 10, 0.5):
        rises = {"rho 0.1": w, "linf 1/255": x}
        records.append(three(label, 0, 0)[0] | dict(right={}, figures=rises))
    text = report_of(*records)
    assert "rise-of-the-loss.png" in text
    assert "## Flatness: two pets\n\ntwo pets (1)\n\nCorrelation of the ranks: -0.60; without AT +1.00.\n\n|" in text
    Path("runs/one/x.json").write_text("half")
    with raises(ValueError):
        report.main()
    assert "half" not in Path("results/records.jsonl").read_text()
