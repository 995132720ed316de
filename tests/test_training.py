"""support/training.py: order of the batches, augmentation, the step over fixed buffers."""

import copy
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import DEMO_SIZE, ROOT
from PIL import Image, ImageEnhance
from torch import nn

import support.training
import train
from efficientad import EfficientAD, ModelError, autoencoder_loss
from support.optimizers import Muon, make_adam, make_optimizers, matrices_of, orthogonal, set_rate
from support.training import (
    Step,
    augment,
    draw,
    extra_losses,
    keep_teacher_outputs,
    luma,
    quarters,
    shuffled,
    steps_until,
    teacher_outputs,
    turn_gray,
)

GPU = torch.cuda.is_available()


def test_every_epoch_visits_every_image_once():
    images = [np.full((3, 1, 1), i, np.uint8) for i in range(5)]
    order = [int(shuffled(images, step, 1, 0)[0, 0, 0, 0]) for step in range(20)]
    epochs = [order[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(e) == [0, 1, 2, 3, 4] for e in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert shuffled(images, 1, 2, 0)[:, 0, 0, 0].tolist() == order[2:4]


@pytest.mark.parametrize("kind, name", [(0, "Brightness"), (1, "Contrast"), (2, "Color")])
@pytest.mark.parametrize("factor", [0.8, 1.0, 1.2])
def test_augmentation_is_pillows(kind, name, factor):
    """Up to Pillow's rounding to integers: of the gray image, of its mean and of the result."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    expected = np.asarray(getattr(ImageEnhance, name)(image).enhance(factor), np.float32)
    images = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None]
    arguments = (torch.full((1, 1, 1, 1), value) for value in (factor, float(kind)))
    found = 255 * augment(images, *arguments)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() < 1.3


def test_what_is_drawn():
    torch.manual_seed(0)
    gray, factor, kind = (x.flatten() for x in draw(3000))
    assert set(gray.tolist()) == {0, 1} and 0.27 < gray.mean() < 0.33
    assert 0.8 <= factor.min() < 0.81 and 1.19 < factor.max() <= 1.2
    assert abs(factor.mean() - 1) < 0.01
    plain = draw(3000, unchanged=0.5)[1] == 1  # recipe short
    assert 0.46 < plain.float().mean() < 0.54 and not (factor == 1).any()
    assert kind.unique(return_counts=True)[1].min() > 900 and set(kind.tolist()) == {0, 1, 2}
    photos = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    turned = turn_gray(photos, torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))
    assert torch.equal(turned[1], photos[1] / 255)
    assert torch.equal(turned[0], luma(photos[:1] / 255)[0].expand(3, 4, 4))


def test_step_over_buffers_is_the_plain_step(demo_images, trained):
    """In fp32: buffers that held something else, the teacher's outputs known; against
    `EfficientAD.losses`."""
    model, x, photos = trained(0).eval(), demo_images[:2], demo_images[5:7]
    plain = EfficientAD(image_size=DEMO_SIZE).eval()  # eval: no dropout, so that both agree
    plain.load_state_dict(model.state_dict())
    batch = {"images": x, "photos": photos, "draws": draw(2)}
    batch["teacher"] = teacher_outputs(model, x[:, None], "fp32")
    learned = [*model.student.parameters(), *model.autoencoder.parameters()]
    optimizers = [make_adam([{"params": learned, "lr": 1e-4}], x.device)]
    step = Step(partial(train.losses_of, model=model, p_hard=0.99), optimizers, x.device, "fp32")
    step.buffers = {name: torch.full_like(tensor, 7) for name, tensor in batch.items()}
    losses = step(batch)

    gray, factor, kind = batch["draws"]
    expected = plain.losses(x, augment(x, factor, kind), turn_gray(photos, gray), 0.99)
    sum(expected.values()).backward()
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name].detach(), rtol=1e-5, atol=0)
    for a, b in zip(model.student.parameters(), plain.student.parameters()):
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm()
    set_rate(optimizers, 0.1)
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-5)


def test_teacher_outputs_are_kept_if_there_is_room(demo_images, trained, monkeypatch):
    """Recipe paper's losses with and without; fp32, where keeping rounds nothing. The step's seed
    makes dropout the same."""
    options = train.Options(device="cpu", steps=9, precision="fp32", recipe="paper")
    model, losses = trained(0), []
    for room in (1 << 30, 0):
        monkeypatch.setattr(support.training, "KEPT_BYTES", room)
        data = {"images": demo_images[:5], "photos": None}
        keep_teacher_outputs(model, data, "fp32")
        assert ("teacher" in data) == bool(room)
        copied = copy.deepcopy(model)
        take_step = train.make_step(copied, train.optimizers_of(copied, options), options, data)
        losses.append(take_step(3))
    assert losses[0] == {k: pytest.approx(v.item(), rel=1e-5) for k, v in losses[1].items()}


def test_recipe_shorts_step(demo_images, trained, monkeypatch):
    """The autoencoder takes another step, on images whose teacher outputs are kept: here there is
    room for two of five. It learns without dropout."""
    model = trained(0, shared_stem=True)
    monkeypatch.setattr(support.training, "KEPT_BYTES", 2 * 384 * 24 * 24 * 4)
    data, fitted = {"images": demo_images[:5], "photos": None}, trained(0, shared_stem=True)
    for precision, one in (("bf16", {**data}), ("fp32", data)):
        keep_teacher_outputs(fitted, same := {"images": data["images"]}, precision, fit=True)
        keep_teacher_outputs(fitted, one, precision)  # as a resumed run does
        assert torch.equal(same["extra_teacher"], one["extra_teacher"])
    model.fit_teacher_statistics(demo_images[:5].split(1))
    assert torch.equal(fitted.teacher_std, model.teacher_std)
    assert torch.equal(data["extra"], demo_images[[0, 3]])
    x = model.normalize(data["extra"])
    expected = autoencoder_loss(model.teacher_features(x), model.eval().autoencoder(x))
    torch.testing.assert_close(extra_losses(data, model)["autoencoder"], expected)

    options = train.Options(device="cpu", steps=9, precision="fp32")
    adam, muon = train.optimizers_of(model, options)
    losses = train.make_step(model, [adam, muon], options, data)(4)
    assert losses.keys() == {"hard", "autoencoder", "student_autoencoder"}
    steps = (adam.state[network[-1].bias]["step"] for network in (model.student, model.autoencoder))
    assert [int(step) for step in steps] == [1, 2]
    dropout = [layer.training for layer in model.autoencoder if isinstance(layer, nn.Dropout)]
    assert model.student.training and len(dropout) == 6 and not any(dropout)
    plain = train.make_step(model, [adam, muon], replace(options, p_hard=0), data)(4)["hard"]
    assert plain < 0.5 * losses["hard"]  # the mean of all, not of the hardest


def test_quarters_are_random_parts():
    images = torch.arange(2 * 3 * 8 * 6).reshape(2, 3, 8, 6)
    parts = list(quarters(iter([images] * 200), range(5, 205), 0))
    corners = {tuple(divmod(part[0, 0, 0, 0].item(), 6)) for part in parts}
    assert corners == {(top, left) for top in range(5) for left in range(4)}
    for part in parts:
        top, left = divmod(part[0, 0, 0, 0].item(), 6)
        assert torch.equal(part, images[:, :, top : top + 4, left : left + 3])
    assert torch.equal(next(quarters(iter([images]), range(9, 10), 0)), parts[4])  # by the step


def test_muon_steps_are_orthogonal(monkeypatch):
    """The update of a matrix has singular values near rate · 0.2 · √(longer side), whatever those
    of the gradient; torch.optim.Muon agrees, momentum and all."""
    torch.manual_seed(0)
    for shape in ((12, 5, 2, 2), (6, 10, 3, 3)):
        weight, matrix = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape[0], 1))
        matrix.data = torch.zeros(shape).flatten(1)
        muon = Muon([{"params": [weight], "lr": 0.01}])
        reference = torch.optim.Muon(
            [matrix], lr=0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw"
        )
        for _ in range(3):
            weight.grad = torch.randn(shape)
            matrix.grad = weight.grad.flatten(1)
            muon.step()
            reference.step()
        difference = (weight.flatten(1) - matrix).norm() / matrix.norm()
        assert difference < 5e-2, difference  # bf16
    for bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("support.optimizers.has_bf16", lambda _, bf16=bf16: bf16)
        matrix = orthogonal(torch.randn(20, 8) * torch.logspace(0, 1, 8))
        values = torch.linalg.svdvals(matrix.float())
        assert matrix.dtype == dtype and 0.6 < values.min() and values.max() < 1.3


def test_optimizers_learn_all_but_the_shared_stem():
    model = EfficientAD(image_size=(128, 128), shared_stem=True)
    options = train.Options(device="cpu", steps=5)
    adam, muon = train.optimizers_of(model, options)
    learned = [id(w) for part in (adam, muon) for g in part.param_groups for w in g["params"]]
    names = {id(weight): name for name, weight in model.named_parameters()}
    expected = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(learned) == len(set(learned)) and {names[i] for i in learned} == expected
    assert not expected & {"student.0.weight", "student.3.bias", "teacher.0.weight"}
    found = {names[id(w)] for w in muon.param_groups[0]["params"]}
    kernels = {n for n in expected if n.startswith("autoencoder") and n.endswith("weight")}
    assert found == kernels - {"autoencoder.0.weight"}
    assert (adam.param_groups[0]["lr"], muon.param_groups[0]["lr"]) == (2e-3, 1e-3)
    options = train.Options(device="cpu", steps=5, recipe="paper")
    assert len(train.optimizers_of(EfficientAD(), options)) == 1


def test_steps_until(monkeypatch):
    """As many as fit into the time that is left after measuring and before calibration. A step
    takes one second. A pass of the model takes two; calibration makes three passes an image."""
    model, image, now = EfficientAD(image_size=(128, 128)), np.zeros((3, 128, 128), np.uint8), [0]
    monkeypatch.setattr(time, "time", lambda: now[0])

    def take(seconds: int, result: object) -> object:
        now[0] += seconds
        return result

    def take_step(_: int) -> dict:
        return take(1, {"hard": torch.zeros(())})

    model.raw_maps = lambda _: take(2, (torch.zeros(1),))
    for end, images, steps in ((500, 1, 500 - 6 - 23), (500, 9, 500 - 54 - 23)):
        now[0] = 0  # 23 seconds: 15 steps, and four passes of the model
        assert steps_until(end, take_step, model, [image] * images) == steps
    with pytest.raises(ModelError, match="leave time for 41 steps; give more --minutes"):
        steps_until(now[0] + 70, take_step, model, [image])
    with pytest.raises(ModelError, match="leave time for 0 steps; give more --minutes"):
        steps_until(now[0] - 1, None, model, [image])  # without measuring


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("short, precision", [(False, "fp32"), (True, "bf16")])
def test_a_captured_step_learns_what_an_eager_one_does(short, precision, demo_images, trained):
    """Adam turns gradients at the noise level into whole steps: norms are compared. Recipe short
    has Muon and two graphs."""
    norms, device = [], torch.device("cuda")
    for warm_up in (3, 100):  # a graph from the fourth step on, or never
        model = trained(0, shared_stem=short).to(device)
        start = [p.detach().clone() for p in model.student.parameters()]
        learned = [*model.student.parameters(), *model.autoencoder.parameters()]
        matrices = matrices_of(model.autoencoder) if short else []
        optimizers = make_optimizers(learned, 1e-4, matrices, 1e-4)
        losses_of = partial(train.losses_of, model=model, p_hard=0.999)
        step = Step(losses_of, optimizers, device, precision)
        extra = Step(partial(extra_losses, model=model), optimizers, device, precision)
        step.graph.WARM_UP = extra.graph.WARM_UP = warm_up
        for i in range(8):
            torch.manual_seed(i)
            set_rate(optimizers, 1 / (i + 1))
            if short:
                outputs = torch.randn(1, *model.map_size, 384).half()
                extra({"extra": demo_images[i][None], "extra_teacher": outputs})
            batch = {"images": demo_images[i % 5][None], "photos": demo_images[i][None]}
            losses = step({**batch, "draws": draw(1)})
        graphs = [step.graph.graph, extra.graph.graph][: 1 + short]
        assert [graph is not None for graph in graphs] == [warm_up == 3] * len(graphs)
        moved = [(q - p).norm() for p, q in zip(start, model.student.parameters())]
        norms.append(torch.stack([losses["hard"], *moved]))
    torch.testing.assert_close(*norms, rtol=5e-2 if short else 1e-2, atol=1e-4)


def test_when_the_process_began():
    """Before its imports, and after what a shell did that then became this process."""
    program = "from support import training; print(training.process_start())"
    shell = f"sleep 1; exec {shlex.quote(sys.executable)} -c '{program}'"
    before = time.time()
    result = subprocess.run(["sh", "-c", shell], cwd=ROOT, capture_output=True)
    assert before + 0.5 < float(result.stdout) < time.time() - 0.2, result.stderr
