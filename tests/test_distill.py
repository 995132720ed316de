"""tools/distill.py: the teacher, its views, resuming, refusals, several processes."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_refused, files, log_of, put, random_norms, same
from PIL import Image

from support.backbone import PatchFeatures, load_weights, make_trunk
from support.checkpoints import read_checkpoint
from support.images import list_images
from tools import distill, neighbours
from tools.distill import Options, Views


def test_teacher(photos, run_script, tmp_path, tiny_demo):
    more = ("--statistics-images", 99, "--steps", 40, "--schedule", "cosine", "--out", "teacher.pt")
    status, out, err = run_script("tools.distill", *photos, *more)
    assert status == 0 and "wrote teacher.pt" in out and "20/20" in err, err  # 2 of 42 held out
    state = read_checkpoint(tmp_path / "teacher.pt")
    assert all(tensor.dtype == torch.float16 for tensor in state.values())
    first, middle, last, result = log_of(tmp_path / "teacher.jsonl")
    assert first["loss"] == pytest.approx(1, abs=0.3)  # an untrained network, targets of variance 1
    assert last["loss"] < 0.8 and 0.1 < result["held_out_loss"] < 0.8
    cosine = [5e-4, *(5e-4 * (1 + math.cos(math.pi * step / 38)) for step in (18, 37))]
    assert [entry["lr"] for entry in (first, middle, last)] == pytest.approx(cosine)
    assert_refused(run_script("tools.distill", *photos, *more), "teacher.pt: exists")
    command = ("train.py", "--data", tiny_demo, "--steps", 1, *TINY, "--teacher", "teacher.pt")
    assert run_script(*command)[0] == 0
    more = ("--statistics-images", 99, "--steps", 1, "--start", "teacher.pt", "--out", "next.pt")
    assert run_script("tools.distill", *photos, *more)[0] == 0
    assert log_of(tmp_path / "next.jsonl")[0]["loss"] < 0.8
    more = (*more[:-1], "third.pt", "--resume")  # interrupted before it had saved anything
    assert run_script("tools.distill", *photos, *more)[0] == 0
    assert log_of(tmp_path / "third.jsonl")[0]["loss"] < 0.8
    more = (*more[:-2], "medium.pt", "--size", "medium")
    assert_refused(run_script("tools.distill", *photos, *more), "teacher.pt: not a medium teacher")


def test_neighbours(tiny_demo, run_script, tmp_path, monkeypatch):
    """Scores by definition on a small case; the command's table."""
    train, test = torch.rand(5, 6, 4), torch.rand(3, 6, 4)
    monkeypatch.setattr(neighbours, "IMAGES", 4)
    monkeypatch.setattr(neighbours, "VECTORS", 24)  # all of four images
    chosen = np.concatenate([train[i] for i in np.random.default_rng(7).permutation(5)[:4]])
    scale = chosen.std(0, ddof=1)
    distances = [np.linalg.norm((x[:, None] - chosen) / scale, axis=2) for x in test.numpy()]
    expected = [d.min(1).max() for d in distances]
    assert neighbours.scores_of([*test], [*train], 7) == pytest.approx(expected, rel=1e-5)
    status, out, err = run_script("tools.neighbours", "--data", tiny_demo, "--device", "cpu")
    figures = [float(word) for word in out.splitlines()[-1].split("|")[2:-1]]
    assert status == 0 and figures[0] == pytest.approx(sum(figures[1:]) / 3, abs=0.1), err
    put(tmp_path / "plain/a.png", Image.new("RGB", (40, 40)))
    refused = run_script("tools.neighbours", "--data", "plain")
    assert_refused(refused, "plain: needs good and defective test images")


INTERIOR = ("--interior", "--image-size", 64, "--optimizer", "muon")


@pytest.mark.parametrize("more", [INTERIOR, ("--crops", 0.2, 0.9, "--precision", "bf16")])
def test_resumed_equals_uninterrupted(more, photos, run_script, tmp_path, interrupt_at):
    command = ("tools.distill", *photos, *more)
    assert run_script(*command, "--out", "whole.pt", "--checkpoint-every", 3)[0] == 0
    resume = (*command, "--out", "cut.pt", "--resume")
    with interrupt_at(5):
        status, _, err = run_script(*resume)
    assert status == 130 and "nothing saved yet" in err and "after 5 steps; go on with" in err
    state = read_checkpoint(tmp_path / "cut.pt.resume")
    torch.save(state | {"seconds": state["seconds"] + 1000}, tmp_path / "cut.pt.resume")
    before = (tmp_path / "cut.pt.resume").read_bytes()
    assert_refused(run_script(*resume[:-1]), "cut.pt.resume: an interrupted distillation; go on")
    assert (tmp_path / "cut.pt.resume").read_bytes() == before
    assert not (tmp_path / "cut.pt").exists()
    optimizers = read_checkpoint(tmp_path / "cut.pt.resume")["optimizers"]  # Adam and, or not, Muon
    assert {o["param_groups"][0]["full_lr"] for o in optimizers} == {1e-3}
    assert_refused(run_script(*resume, "--seed", 1), "cut.pt.resume: made with other options")
    whole = files(tmp_path / "photos")
    for name in whole:
        put(tmp_path / "photos" / name, b"")
    result = run_script(*resume)
    assert_refused(result, "not an image", "--resume, put a readable photo of this name there")
    for name, content in whole.items():
        put(tmp_path / "photos" / name, content)
    put(tmp_path / "photos/new.png")
    assert_refused(run_script(*resume), "photos: other photos than when the run began; put them")
    # as a killed process leaves it
    (tmp_path / "photos/new.png").rename(tmp_path / "cut.pt.unfinished1")
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert run_script(*resume, "--images", "moved")[0] == 0
    assert same(tmp_path / "whole.pt", tmp_path / "cut.pt")
    assert log_of(tmp_path / "cut.jsonl")[-1]["seconds"] > 1000  # of all steps
    assert not list(tmp_path.glob("cut.pt.*"))


def test_two_backbones_share_the_channels(photos, resnet18, tmp_path):
    """Half of the channels for each; in the interior, on the grid of a PDN without padding."""
    lite = random_norms(make_trunk("efficientnet_lite0"))
    torch.save(lite.state_dict(), tmp_path / "lite0.pth")
    names, files = ["resnet18", "efficientnet_lite0"], [str(resnet18), str(tmp_path / "lite0.pth")]
    options = {"backbone": names, "backbone_weights": files, "image_size": 64, "interior": True}
    options |= {"device": "cpu", "precision": "fp32", "out": str(tmp_path / "o/t.pt")}
    run = distill.Distillation(Options(images=[str(tmp_path / "photos")], **options))
    run.mean, run.std, expected = torch.zeros(1), torch.ones(1), []
    small, large = next(iter(run.views.batches(range(16), "views")))
    for name, file in zip(names, files):
        trunk = make_trunk(name)
        load_weights(trunk, file)
        expected.append(PatchFeatures(trunk, 192)(run.normalize(large)))
    target, output = run.target(large), run.pdn(run.normalize(small))
    assert target.shape == output.shape == (16, 384, 8, 8)
    assert (target - torch.cat(expected, 1)[:, :, 4:12, 4:12]).norm() < 1e-4 * target.norm()


def test_refusals(photos, run_script, tmp_path):
    for name in ("bad/a.png", "mine", "cut.pt.resume"):
        put(tmp_path / name, b"junk")
    refusals = {
        "bad/a.png: not an image": ("--images", "bad"),
        "0 < MIN <= MAX <= 1": ("--crops", 0.5, 0.2),
        "--lr > 0": ("--lr", "inf"),
        "--seed >= 0 and < 2**32": ("--seed", 2**32),
        "multiple of 32": ("--image-size", 100),
        "at least 1": ("--steps", 0),
        "--interior needs --image-size 64": ("--interior",),
        "more files than --backbone": ("--backbone-weights", "a.pth", "b.pth"),
        "--backbone takes 1, 2, 3, 4 or 6": ("--backbone", *["resnet18"] * 5),
        "'mine'": ("--out", "mine/teacher.pt"),
        "cut.pt.resume: not a readable checkpoint": ("--out", "cut.pt", "--resume"),
    }
    for words, options in refusals.items():
        assert_refused(run_script("tools.distill", *photos, "--out", "o/t.pt", *options), words)


def test_a_loss_that_is_not_finite(photos, run_script, tmp_path):
    command = ("tools.distill", *photos, "--out", "t.pt", "--lr", 1e30)
    assert_refused(run_script(*command), "t.pt: step", "the loss is not finite; lower --lr")
    state = read_checkpoint(tmp_path / "t.pt.resume")
    assert state["step"] == 0 and all(tensor.isfinite().all() for tensor in state["pdn"].values())


def views_of(folder, **options) -> Views:
    options = {"batch_size": 4, "image_size": 32, "device": "cpu", **options}
    return Views(list_images(folder)[:6], Options([str(folder)], "x", **options))


def test_views(photos, tmp_path):
    """A view is a function of its index, whatever thread makes it, whatever is kept."""
    kept, read = (views_of(tmp_path / "photos", crops=[0.2, 0.9], cache_gib=g) for g in (8.0, 0.0))
    in_turn = [kept[i] for i in range(12)]
    assert len(kept.decoded) == 6 and not read.decoded
    once = views_of(tmp_path / "photos", steps=1)  # each photo is seen once
    assert len([once[i] for i in range(4)]) == 4 and not once.decoded
    batches = list(read.batches(range(12), "views", slice(1, None, 2)))
    assert [len(small) for small, _ in batches] == [2, 2, 2]  # every second one of each 4
    by_threads = [view for batch in batches for view in zip(*batch)]
    for (small, large), view in zip(by_threads, in_turn[1::2], strict=True):
        assert np.array_equal(small, view[0]) and np.array_equal(large, view[1])
        half = large.double().unflatten(1, (32, 2)).unflatten(3, (32, 2)).mean((2, 4))
        assert small.dtype == torch.uint8 and (half - small).abs().mean() < 8  # the same part


def test_photos_held_out_are_spread():
    for n, count, last in ((39, 0, 0), (42, 2, 40), (2638, 64, 2520), (5060, 64, 63 * 79)):
        found = distill.held_out_of(list(range(n)))
        assert len(found) == count and found[-1:] == [last] * (count > 0)


def test_epochs(photos, tmp_path):
    """Each photo once an epoch, one time in ten in gray. Half of the crops are flipped."""
    whole = views_of(tmp_path / "photos")
    views = [whole[i][0] for i in range(300)]
    distinct = [{view.tobytes() for view in views[i : i + 6]} for i in range(0, 300, 6)]
    assert all(len(epoch) == 6 for epoch in distinct) and len(set.union(*distinct)) == 12
    assert 0.05 < np.mean([(view[0] == view[2]).all() for view in views]) < 0.15
    ramp = np.broadcast_to(np.arange(80, dtype=np.uint8)[:, None], (60, 80, 3))
    put(tmp_path / "ramp/a.png", Image.fromarray(ramp))
    crops = views_of(tmp_path / "ramp", crops=[0.2, 0.9])
    rises = [np.diff(crops[i][0][0, 0].astype(int)).sum() for i in range(300)]
    assert 0.4 < np.mean(np.array(rises) < 0) < 0.6


def test_two_processes_learn_what_one_does(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = [*map(str, photos), "--steps", "3", "--batch-size", "4"]
    distill.main([*options, "--out", "one.v1"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", "-m", "tools.distill", *options]
    result = subprocess.run([*command, "--out", "two.pt"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count("wrote two.pt") == 1, result.stderr
    one, two = (read_checkpoint(name) for name in ("one.v1", "two.pt"))
    one, two = (torch.cat([w.flatten().float() for w in state.values()]) for state in (one, two))
    assert (one - two).norm() < 2e-3 * one.norm()
    logs = [log_of(Path(f"{name}.jsonl")) for name in ("one.v1", "two")]
    numbers = [[entry.get("loss", entry.get("held_out_loss")) for entry in log] for log in logs]
    assert len(numbers[0]) == 3 and numbers[0] == pytest.approx(numbers[1], rel=1e-3)
