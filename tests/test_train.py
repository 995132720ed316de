"""train.py, the real script, run tiny."""

import contextlib
import math
import resource

import pytest
import torch
from conftest import PHOTO, TINY, assert_refused, log_of, put, same

import train
from efficientad import PDN, EfficientAD, ModelError, quantile
from support import training
from support.checkpoints import all_finite, load_model, read_checkpoint, write_checkpoint
from support.data import load_normal_images
from support.images import Images
from support.runs import write
from support.training import permutation


def equal_states(a, b) -> bool:
    return same(*(read_checkpoint(path)["state"] for path in (a, b)))


@pytest.fixture
def command(tmp_path):
    """Trains on three images in part/, into o/."""
    for i in range(3):
        put(tmp_path / f"part/train/good/{i}.png", PHOTO.rotate(90 * i))
    options = ("--data", "part", *TINY, "--precision", "fp32", "--out", "o")
    return ("train.py", *options)


def test_run_folder_and_log(command, run_script, tmp_path):
    """Without --out; the same seed gives the same model, another seed another one."""
    for seed in (5, 5, 6):
        status, out, err = run_script(*command[:-2], "--steps", 5, "--lr", 1e-5, "--seed", seed)
        assert status == 0 and "wrote" in out and "expect at most 50 % false alarms" in out, err
    names = ["part-small", "part-small-2", "part-small-3"]
    first, second, third = (tmp_path / "runs" / name for name in names)
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == names
    assert equal_states(first / "model.pt", second / "model.pt")
    assert not equal_states(first / "model.pt", third / "model.pt")
    assert sorted(p.name for p in first.iterdir()) == [".lock", "log.jsonl", "model.pt"]
    model = load_model(first / "model.pt", EfficientAD)
    info = model.training_info
    assert info["steps"] == 5 and info["validation_images"] == 1 == len(info["scores"])
    assert len(info["appearance"]["trained_on"]) == info["training_images"]
    log = log_of(first)
    assert log[0].keys() == {"step", "lr", "hard", "autoencoder", "student_autoencoder"}
    rates = {entry["step"]: entry["lr"] for entry in log}  # half a cosine
    assert rates == {0: 1e-5, 4: pytest.approx(5e-6 * (1 + math.cos(0.75 * math.pi)))}
    assert model.shared_stem and torch.equal(model.student[3].weight, model.teacher[3].weight)
    start = model.teacher[6].weight  # of the student's third convolution; Adam moves it by about lr
    assert 1e-6 < (model.student[6].weight - start).abs().max() < 1e-3


def test_recipe_paper(command, run_script, tmp_path):
    quantiles = ("--a", 0.5, "--b", 0.9)
    assert run_script(*command, "--steps", 1, "--recipe", "paper", *quantiles)[0] == 0
    assert [entry["lr"] for entry in log_of(tmp_path / "o")] == [1e-5]  # the drop is its only step
    long = train.Options(steps=100, recipe="paper", device="cpu")
    factors = [train.rate_factor(step, long) for step in range(100)]
    assert factors == [1] * 95 + [0.1] * 5  # section 3.3
    model = load_model(tmp_path / "o/model.pt", EfficientAD)
    assert not model.shared_stem and model.student[0].weight.ne(model.teacher[0].weight).any()
    image = load_normal_images("part", (128, 128), 0, False).validation[0]
    with torch.no_grad():
        raw = model.raw_maps(torch.from_numpy(image)[None])
    expected = [[quantile(m, q).item() for q in (0.5, 0.9)] for m in raw]
    assert model.quantiles.tolist() == [pytest.approx(values, rel=1e-4) for values in expected]


@pytest.mark.parametrize("recipe, steps", [("short", 3), ("paper", 1)])
def test_minutes_choose_the_steps(recipe, steps, command, run_script, tmp_path, monkeypatch):
    """The same number of steps gives the same model. Recipe paper's case has fewer steps than
    images: T(I) is not kept."""
    monkeypatch.setattr("support.training.steps_until", lambda *_: steps)
    command = (*command[:-2], "--precision", "bf16", "--recipe", recipe, "--out")
    status, _, err = run_script(*command, "o", "--minutes", 0.2)
    assert status == 0 and f"recipe {recipe}: {steps} steps of 1" in err
    assert run_script(*command, "p", "--steps", steps)[0] == 0
    assert equal_states(tmp_path / "o/model.pt", tmp_path / "p/model.pt")
    for options in ((0,), (1, "--steps", 5), ("nan",), ("inf",)) if recipe == "short" else ():
        result = run_script(*command, "q", "--minutes", *options)
        assert_refused(result, "--minutes takes a number above 0, without --steps")


def test_images_beyond_the_limit_are_decoded_as_they_come(
    command, run_script, tmp_path, monkeypatch
):
    """The model is the same as from images that are kept on the device."""
    keep, found = training.keep_on_device, []

    def beyond(images, device):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "KEPT_BYTES", 3 * 128 * 128 * len(images) - 1)
            found.append(keep(images, device))
        return found[-1]

    assert run_script(*command, "--steps", 3)[0] == 0
    monkeypatch.setattr(training, "keep_on_device", beyond)
    assert run_script(*command[:-1], "p", "--steps", 3)[0] == 0
    assert isinstance(found[0], Images)
    assert equal_states(tmp_path / "o/model.pt", tmp_path / "p/model.pt")


def test_every_option_reaches_the_model(command, run_script, tmp_path):
    torch.save({k: v.half() for k, v in PDN("medium").state_dict().items()}, tmp_path / "m.pt")
    options = ("--size", "medium", "--padding", "--map-normalization", "gaussian")
    shape = ("--image-size", 128, 160, "--steps", 1, "--batch-size", 2, "--teacher", "m.pt")
    assert run_script(*command, *options, *shape)[0] == 0
    model = load_model(tmp_path / "o/model.pt", EfficientAD)
    config = {"size": "medium", "image_size": (128, 160), "padding": True, "shared_stem": True}
    assert model.config == config
    values = {"batch_size": 2, "map_normalization": "gaussian"}
    assert (values | {"image_size": [128, 160]}).items() <= model.training_info.items()
    for weight, expected in zip(model.teacher.state_dict().values(), torch.load("m.pt").values()):
        assert torch.equal(weight, expected.float())


def test_a_command_for_several_runs_names_the_sweeps(command, run_script, tmp_path, monkeypatch):
    put(tmp_path / "many/a/train/good/0.png")
    for options in (("--seeds", "0,1"), ("--ablation",), ("--data", "many"), ("--seeds=0,1",)):
        result = run_script(*command, *options)
        assert_refused(result, "Use: python -m tools.sweep --data part", *options)
    result = run_script("baselines.simplenet", "--data", "many")
    assert_refused(result, "Use: python -m tools.sweep --model simplenet --data many")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(run_script(*command), "this is one run")


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_fits_a_screen(script, run_script):
    status, out, _ = run_script(script, "--help")
    assert status == 0 and len(out.splitlines()) <= 45 and max(map(len, out.splitlines())) <= 100


def test_photos_that_change_while_a_run_is_interrupted(command, run_script, tmp_path, interrupt_at):
    """The junk is the first photo seen, and is seen no more after the interruption. The resumed run
    ends as an uninterrupted one."""
    order = permutation(4, 0, 1, 0).tolist()  # of epoch 0
    for i in range(4):
        put(tmp_path / f"photos/{i}.png", b"junk" if i == order[0] else PHOTO)
    command = (*command, "--steps", 4, "--pretraining-images", "photos", "--skip-bad-images")
    assert run_script(*command, "--out", "whole")[0] == 0
    with interrupt_at(6):
        status, _, err = run_script(*command)
    assert status == 130 and "--resume o" in err
    assert read_checkpoint(tmp_path / "o/resume.pt")["step"] == 3
    (tmp_path / "photos/0.png").rename(tmp_path / "photos/9.png")
    result = run_script("train.py", "--resume", "o")
    assert_refused(result, "photos: has other images than when the run began; put them back")
    (tmp_path / "photos/9.png").rename(tmp_path / "photos/0.png")
    (tmp_path / "photos").rename(tmp_path / "moved")
    resume = ("train.py", "--resume", "o", "--pretraining-images")
    assert_refused(run_script(*resume, "none"), "none: has other images than when the run began")
    assert run_script(*resume, "moved")[0] == 0
    assert f"photos/{order[0]}.png" in (tmp_path / "o/skipped.txt").read_text()
    assert equal_states(tmp_path / "whole/model.pt", tmp_path / "o/model.pt")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "o")
    assert not (tmp_path / "o/resume.pt").exists()


def test_resume_from_another_folder_after_the_data_moved(
    command, run_script, tmp_path, interrupt_at, monkeypatch, request
):
    with interrupt_at(4):
        assert run_script(*command, "--steps", 3)[0] == 130
    state = read_checkpoint("o/resume.pt")
    assert state["options"]["data"] == str(tmp_path / "part")
    threads, other = torch.get_num_threads(), 1 if torch.get_num_threads() > 1 else 2
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.save(state | {"threads": other}, "o/resume.pt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "part").rename(tmp_path / "elsewhere/moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_refused(run_script("train.py", "--resume", "../o"), "part: no such folder")
    status, out, err = run_script("train.py", "--resume", "../o", "--data", "moved")
    assert status == 0 and "python evaluate.py --run ../o" in out, err
    info = read_checkpoint("../o/model.pt")["training"]  # sums depend on the number of threads
    assert torch.get_num_threads() == other == info["threads"]


# --------------------------------------------------------------------------- NaN, and a full disk


def test_a_loss_that_is_not_finite_stops_training(command, run_script, tmp_path, monkeypatch):
    losses_of, calls = training.short_losses, []

    def spoiled(*args):
        calls.append(1)
        nan = {"penalty": torch.tensor(torch.nan, requires_grad=True)}
        return losses_of(*args) | (nan if len(calls) == 4 else {})

    monkeypatch.setattr("support.training.short_losses", spoiled)
    result = run_script(*command, "--steps", 9)
    assert_refused(result, "o: step 3: the loss is not finite; lower --lr")
    state = read_checkpoint(tmp_path / "o/resume.pt")
    assert state["step"] == 0 and not (tmp_path / "o/model.pt").exists()
    assert all_finite(v for k, v in state["model"].items() if k != "threshold")


def test_weights_that_are_not_finite_are_never_saved(command, run_script, tmp_path, monkeypatch):
    step, calls = torch.optim.Adam.step, []

    def spoil(self, *args, **kwargs):
        calls.append(1)
        result = step(self, *args, **kwargs)
        if len(calls) == 4:  # in the second step
            with torch.no_grad():
                self.param_groups[0]["params"][0][0] = torch.inf
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", spoil)
    result = run_script(*command, "--steps", 9, "--checkpoint-every", 0)
    assert_refused(result, "o: step 1: it left weights that are not finite")
    assert read_checkpoint(tmp_path / "o/resume.pt")["step"] == 1


@contextlib.contextmanager
def file_limit(size: int):
    """No file may grow beyond so many bytes: to the writer like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(command, run, run_script, tmp_path, model):
    with file_limit(2**20):
        result = run_script(*command, "--steps", 1)
        assert_refused(result, "o/resume.pt: cannot be written (File too large)")
    assert {p.name for p in (tmp_path / "o").iterdir()} == {".lock"}  # no half file
    assert run_script(*command, "--steps", 1)[0] == 0
    put(tmp_path / "o/model.pt", b"earlier")
    with file_limit(2**20), pytest.raises(ModelError, match="what it held before is untouched"):
        write_checkpoint(model.checkpoint(), tmp_path / "o/model.pt")
    assert (tmp_path / "o/model.pt").read_bytes() == b"earlier"
    with pytest.raises(ModelError, match="gone/m.pt: cannot be written .No such file or directory"):
        write_checkpoint({}, tmp_path / "gone/m.pt")
    path = tmp_path / "caf\udce9.pt"  # a name that is not UTF-8
    write_checkpoint({"data": "caf\udce9"}, path)
    assert read_checkpoint(path) == {"data": "caf\udce9"}

    put(tmp_path / "in/a.png")
    put(tmp_path / "run/images/scores.csv", b"earlier")
    with file_limit(2**12):
        result = run_script("evaluate.py", "--run", run, "--images", "in", "--device", "cpu")
        assert_refused(result, "File too large", "a.png.png")
        result = run_script("tools.export", "--run", run, "m.pt2")
        assert_refused(result, "File too large", "m.pt2")
    assert (run / "images/scores.csv").read_bytes() == b"earlier"
    assert not (tmp_path / "m.pt2").exists()
    assert not [p for p in tmp_path.rglob("*") if ".tmp" in p.name or ".unfinished" in p.name]
    write(tmp_path / ("long" * 60 + ".txt"), "a name of 244 bytes")
    write(tmp_path / "whole.txt", "first")
    with file_limit(2), pytest.raises(OSError, match="whole.txt"):
        write(tmp_path / "whole.txt", "second")
    assert (tmp_path / "whole.txt").read_text() == "first"
