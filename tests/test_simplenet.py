"""SimpleNet: the definition, the file, and the real scripts, run tiny with a random backbone."""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import runs
import train
from backbone import ARCHITECTURES, PatchFeatures, ResNet, fold_batch_norms
from efficientad import ModelError
from report import heat_scale, overlay, summarize_runs
from simplenet import CachedFeatures, SimpleNet, crop_size, truncated_l1_losses

SIZE = (80, 96)  # crop 64×80 (70.0 and 84.0 before rounding), layer 2's grid 8×10


def images(n: int, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8)


def small(**options) -> SimpleNet:
    """A model whose batch norms have seen something, so that folding them has an effect."""
    model = SimpleNet(**{"backbone": "resnet18", "image_size": SIZE, **options})
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.normal_(module.running_mean, 0, 0.2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
    return model.eval()


# ------------------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("backbone", ARCHITECTURES)
def test_shapes_with_every_trunk(backbone):
    with torch.device("meta"):  # no arithmetic, so the large ones cost nothing
        model = SimpleNet(backbone=backbone)
        assert model.features(torch.empty(2, 3, 329, 329, dtype=torch.uint8)).shape == (2, 1536, 36, 36)
        anomaly_map, score = model.eval()(torch.empty(2, 3, 329, 329, dtype=torch.uint8))
    assert anomaly_map.shape == (2, 1, 329, 329) and score.shape == (2,) and anomaly_map.dtype == torch.float32
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 1536 * 1536 + 1536 + 1536 * 1024 + 1024 + 2 * 1024 + 1024


def test_defaults_are_the_papers():
    with torch.device("meta"):
        model = SimpleNet()
    assert model.config == {"backbone": "wide_resnet50_2", "image_size": (329, 329), "layers": (2, 3), "adaptor": True,
                            "noise": 0.015}  # fmt: skip
    assert crop_size((329, 329)) == (288, 288) and crop_size((256, 512)) == (224, 448)
    adaptor, discriminator = model.parameter_groups()
    assert (adaptor["lr"], discriminator["lr"]) == (1e-4, 2e-4) and len(adaptor["params"]) == 2
    assert len(discriminator["params"]) == 5  # linear, batch norm, and a linear layer without bias


@pytest.mark.parametrize("layers", [(2, 3), (2,), (1, 2, 3), (3,)])
def test_features_are_the_definition(layers):
    """Against unfold and adaptive pooling, step by step; 1152 numbers of ResNet-18's layer 2 are pooled *up* to 1536."""
    model, x = small(layers=layers), images(2)
    crop = x[:, :, 8:72, 8:88].float() / 255
    crop = (crop - model.mean) / model.std
    with torch.no_grad():
        outputs, stacked = model.patch_features.trunk.layers(crop), []
        for i in layers:
            n, c, h, w = outputs[i - 1].shape
            patches = F.unfold(outputs[i - 1], 3, padding=1).reshape(n, c * 9, h, w)
            pooled = F.adaptive_avg_pool1d(patches.permute(0, 2, 3, 1).reshape(-1, 1, c * 9), 1536)
            pooled = pooled.reshape(n, h, w, 1536).permute(0, 3, 1, 2)
            stacked.append(F.interpolate(pooled, stacked[0].shape[-2:], mode="bilinear") if stacked else pooled)
        n, _, h, w = stacked[0].shape
        rows = torch.cat(stacked, 1).permute(0, 2, 3, 1).reshape(-1, 1, 1536 * len(layers))
        expected = F.adaptive_avg_pool1d(rows, 1536).reshape(n, h, w, 1536).permute(0, 3, 1, 2)
        y = model.features(x)
    assert y.shape == expected.shape and (y - expected).norm() / expected.norm() < 1e-5


def test_impossible_options():
    for options, message in (({"layers": (3, 2)}, "in this order"), ({"layers": ()}, "some of 1, 2, 3"),
                             ({"image_size": (63, 200)}, "at least 64"), ({"backbone": "vgg"}, "unknown backbone")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            small(**options)
    with pytest.raises(ValueError, match="multiple of the number of layers"):
        PatchFeatures(ResNet("resnet18"), 383)
    model = small()
    with pytest.raises(ValueError, match="N×3×80×96"):
        model(images(1, (96, 80)))
    with pytest.raises(TypeError, match="uint8"):
        model(images(1).int())


def test_trunk_is_frozen_while_training():
    model = small().train()
    before = {k: v.clone() for k, v in model.patch_features.state_dict().items()}
    model.losses(model.features(images(2)))["real"].backward()
    assert model.discriminator.training and not any(m.training for m in model.patch_features.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.patch_features.state_dict().items())
    assert all(p.grad is None for p in model.patch_features.parameters())


def test_map_and_score():
    model = small()
    with torch.no_grad():
        raw = model.raw_map(images(2))
        anomaly_map, score = model(images(2))
        assert raw.shape == (2, 1, 8, 10) and anomaly_map.shape == (2, 1, *SIZE)
        assert (score >= anomaly_map.amax((1, 2, 3))).all()  # before resizing and blurring
        assert torch.allclose(model.resize(torch.full((1, 1, 8, 10), -0.3)), torch.full((1, 1, *SIZE), -0.3), atol=1e-6)

        # The same map by scipy, and its edges repeated.
        from scipy.ndimage import gaussian_filter

        crop = F.interpolate(raw, (64, 80), mode="bilinear")[0, 0].numpy()
        padded = np.pad(crop, 8 + 20, mode="edge")
        expected = gaussian_filter(padded, 4, truncate=4)[20:-20, 20:-20]
        assert np.abs(model.resize(raw)[0, 0].numpy() - expected).max() < 1e-5


def test_score_is_the_discriminators():
    model, x = small(), images(2)
    with torch.no_grad():
        features = model.features(x).permute(0, 2, 3, 1).reshape(-1, 1536)
        d = model.discriminator(model.adaptor(features)).reshape(2, -1)
        assert torch.allclose(model(x)[1], -d.min(1).values, atol=1e-5)
        assert torch.allclose(model(x.float() / 255)[1], model(x)[1], atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------ losses


def test_loss_by_hand():
    real, fake = torch.tensor([0.7, 0.5, 0.1, -1.0]), torch.tensor([-0.9, -0.5, 0.0, 2.0])
    losses = truncated_l1_losses(real, fake)
    assert losses["real"].item() == pytest.approx((0 + 0 + 0.4 + 1.5) / 4)
    assert losses["fake"].item() == pytest.approx((0 + 0 + 0.5 + 2.5) / 4)


@pytest.mark.parametrize("adaptor", [True, False])
def test_losses_and_gradients_are_the_definitions(adaptor):
    """Adapt, add noise, discriminate both together; the model computes it with half the arithmetic."""
    model = small(adaptor=adaptor).train()
    features = torch.randn(2, 1536, 3, 4)
    torch.manual_seed(1)
    losses = model.losses(features)
    sum(losses.values()).backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()

    torch.manual_seed(1)
    real = features.permute(0, 2, 3, 1).reshape(-1, 1536)
    noise = 0.015 * torch.randn(real.shape)
    real = model.adaptor(real) if adaptor else real
    d_real, d_fake = model.discriminator(torch.cat([real, real + noise])).chunk(2)
    expected = {"real": (0.5 - d_real).clamp(min=0).mean(), "fake": (0.5 + d_fake).clamp(min=0).mean()}
    sum(expected.values()).backward()
    assert all(losses[k].item() == pytest.approx(expected[k].item(), abs=1e-5) for k in expected)
    for k, p in model.named_parameters():
        if p.requires_grad and k not in ("adaptor.bias", "discriminator.0.bias"):  # the batch norm removes them: both ≈ 0
            assert (gradients[k] - p.grad).norm() < 1e-3 * p.grad.norm(), k


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_only_noise_can_be_separated(noise):
    """σ = 0: fake equals real, so max(0, 0.5 − d) + max(0, 0.5 + d) >= 1 whatever the discriminator says. σ = 1: it learns."""
    model = small(noise=noise, adaptor=False).train()
    optimizer, losses = torch.optim.Adam(model.parameter_groups(), weight_decay=1e-5), []
    for _ in range(26):
        loss = sum(model.losses(0.1 * torch.randn(1, 1536, 8, 8)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) < 0.8 if noise else min(losses) >= 1 - 1e-6


# -------------------------------------------------------------------------------------------------------------------- file


def test_backbone_file_is_not_needed_again(tmp_path):
    """A trained model computes the same after save and load, with the weight file gone; the backbone is there in half precision."""
    torch.save(small().patch_features.trunk.state_dict(), tmp_path / "resnet18.pth")
    model = small(layers=(1, 2), noise=0.1)
    model.load_backbone(str(tmp_path / "resnet18.pth"))
    (tmp_path / "resnet18.pth").unlink()
    with pytest.raises(ModelError, match="resnet18.pth: no such file"):
        model.load_backbone(str(tmp_path / "resnet18.pth"))
    scores = model.calibrate([images(1), images(2)])
    assert model.threshold == scores.max() and len(scores) == 3 and model.floor < model.threshold
    model.training_info = {"category": "bottle", "steps": 3}
    model.save(str(tmp_path / "model.pt"))
    loaded = SimpleNet.load(str(tmp_path / "model.pt"))
    assert loaded.config == model.config and loaded.training_info == model.training_info and not loaded.training
    x = images(2)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(x), loaded(x)))
    state = torch.load(tmp_path / "model.pt", weights_only=True)["state"]
    assert state["patch_features.trunk.conv1.weight"].dtype == torch.float16
    assert state["patch_features.trunk.bn1.running_var"].dtype == state["adaptor.weight"].dtype == torch.float32
    assert not [k for k in state if "pooling" in k or k == "blur"]  # functions of the config
    assert (tmp_path / "model.pt").stat().st_size < 2 * 2.8e6 + 4 * 4e6


def test_files_that_cannot_be_loaded(tmp_path):
    path, model = tmp_path / "x.pt", small()
    torch.save(ResNet("resnet34").state_dict(), path)
    with pytest.raises(ModelError, match="x.pt: not the weights of resnet18"):
        model.load_backbone(str(path))
    state = model.patch_features.trunk.state_dict()
    torch.save(state | {"conv1.weight": state["conv1.weight"] * 1e9}, path)
    with pytest.raises(ModelError, match="not finite in half precision"):
        small().load_backbone(str(path))
    with pytest.raises(ModelError, match="not a SimpleNet"):
        SimpleNet.load(str(path))
    torch.save({"format": "simplenet", "config": {"backbone": "vgg"}}, path)
    with pytest.raises(ModelError, match="damaged"):
        SimpleNet.load(str(path))
    model.discriminator[-1].weight.data.zero_()
    with pytest.raises(ModelError, match="constant or not a number"):
        model.calibrate([images(2)])
    with pytest.raises(ValueError, match="at least one image"):
        model.calibrate([])


@pytest.mark.parametrize("precision, error, options", [
    ("fp32", 1e-5, {}), ("bf16", 0.05, {}), ("fp16", 0.01, {}), ("fp32", 1e-5, {"backbone": "resnet50", "adaptor": False}),
])  # fmt: skip
def test_optimized_computes_the_same(precision, error, options):
    model, x = small(**options), images(2)
    model.calibrate([x])
    fast = model.optimize(precision)
    with torch.no_grad():
        expected, y = model(x), fast(x)
    assert y[0].dtype == y[1].dtype == torch.float32 and fast.threshold == model.threshold
    for a, b in zip(y, expected):
        assert (a - b).norm() <= error * b.norm()
    assert not [m for m in fast.modules() if isinstance(m, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)]
    assert [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)]  # the model itself is untouched
    with pytest.raises(ValueError, match="precision must be one of"):
        model.optimize("int4")


def test_folded_trunk_outside_simplenet():
    trunk, x = small().patch_features.trunk, torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = trunk(x)
        fold_batch_norms(trunk)
        assert all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(trunk(x), expected))


def test_cache_is_bounded_and_changes_nothing():
    model, data, computed = small(), [x.numpy() for x in images(5)], []
    features = model.features
    model.features = lambda x: computed.append(1) or features(x)
    one = 2 * 1536 * 8 * 10
    for room, count in ((4 * 2**30, 5), (3 * one, 7), (0, 10)):
        computed.clear()
        cache = CachedFeatures(model, data, room)
        first, second = [cache[i] for i in range(5)], [cache[i] for i in range(5)]
        assert len(computed) == count and len(cache) == 5 and sum(f.nbytes for f in cache.kept.values()) <= room
        assert all(torch.equal(a, b) for a, b in zip(first, second)) and first[0].dtype == torch.float16
        expected = features(torch.from_numpy(data[3])[None])[0].permute(1, 2, 0)
        assert first[3].shape == (8, 10, 1536) and first[3].is_contiguous() and torch.equal(first[3], expected.half())


# ----------------------------------------------------------------------------------------------------------------- scripts


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(ResNet("resnet18").state_dict(), path)
    return path


@pytest.fixture
def options(weights, tiny_demo):
    return ("--model", "simplenet", "--backbone", "resnet18", "--backbone-weights", weights, "--data", tiny_demo,
            "--image-size", 64, "--batch-size", 2, "--device", "cpu")  # fmt: skip


def test_a_model_that_is_not_finite_is_not_loaded(tmp_path):
    model = SimpleNet(backbone="resnet18", image_size=(64, 64))
    model.discriminator[0].bias.data[3] = torch.nan
    model.save(str(tmp_path / "model.pt"))
    with pytest.raises(ModelError, match="not a number"):
        SimpleNet.load(str(tmp_path / "model.pt"))


def test_train_evaluate_score(options, run_script, tmp_path):
    status, out, err = run_script("train.py", *options, "--epochs", 2)
    assert status == 0 and "wrote runs/tiny-simplenet/model.pt" in out, err
    run = tmp_path / "runs/tiny-simplenet"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log] == [0, 4] and log[0].keys() == {"step", "lr", "real", "fake"}  # 2 epochs of 5 images
    model = SimpleNet.load(str(run / "model.pt"))
    assert model.training_info["epochs"] == 2 and model.training_info["steps"] == 5 and "p_hard" not in model.training_info

    status, out, err = run_script("evaluate.py", "--device", "cpu")
    assert status == 0 and "local" not in out and "AU-sPRO" in out, err
    results = json.loads((run / "results.json").read_text())
    assert results["training"]["model"] == "simplenet" and not [k for k in results if "local" in k or "global" in k]
    rows = list(csv.DictReader((run / "scores.csv").open()))
    assert list(rows[0]) == ["image", "defect", "score", "anomalous"] and len(rows) == 9
    image = np.asarray(Image.open(options[7] / "test/good/001.png").resize((64, 64), Image.Resampling.BILINEAR))
    with torch.no_grad():
        score = model(torch.from_numpy(image.transpose(2, 0, 1).copy())[None])[1]
    row = next(r for r in rows if r["image"] == "good/001")
    assert float(row["score"]) == pytest.approx(score.item(), abs=1e-5) and int(row["anomalous"]) == int(score > model.threshold)
    assert Image.open(run / "overlays/logical_anomalies/002.png").size == (3 * 260 - 4, 274)  # input, mask, map
    html = (run / "report.html").read_text(encoding="utf-8")
    content = json.loads(html.split('<script id="data" type="application/json">')[1].split("</script>")[0])
    assert content["model"] == "SimpleNet (resnet18)" and content["maps"] == ["anomaly"] and "local" not in content["images"][0]
    assert content["floor"] == pytest.approx(model.floor.item()) and content["floor"] < content["threshold"]

    status, out, err = run_script("evaluate.py", "--run", run, "--images", options[7] / "test/good", "--device", "cpu")
    assert status == 0, err
    assert list(csv.DictReader((run / "images/scores.csv").open()))[0].keys() == {"image", "score", "anomalous", "unlike_training"}


def test_resumed_equals_uninterrupted(options, run_script, tmp_path, interrupt_at):
    assert run_script("train.py", *options, "--steps", 6, "--out", "whole")[0] == 0
    with interrupt_at(3):
        status, _, err = run_script("train.py", *options, "--steps", 6, "--out", "cut")
    assert status == 130 and "--resume cut" in err
    status, _, err = run_script("train.py", "--resume", "cut")
    assert status == 0, err
    a, b = (torch.load(tmp_path / name / "model.pt", weights_only=True)["state"] for name in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_bad_options_get_one_line(options, weights, run_script, tmp_path):
    torch.save(ResNet("resnet34").state_dict(), tmp_path / "resnet34.pth")
    bare = options[:2] + options[6:]
    cases = [
        (bare, "needs --backbone-weights FILE: torchvision's weight file of wide_resnet50_2 (wide_resnet50_2-95faca4d.pth)"),
        ((*bare, "--backbone-weights", "none.pth"), "none.pth: no such file; --backbone-weights takes torchvision's"),
        ((*options, "--backbone-weights", "resnet34.pth"), "resnet34.pth: not the weights of resnet18"),
        ((*options, "--p-hard", 0), "--p-hard is no option of --model simplenet"),
        (("--noise", 0.1), "--noise is no option of --model efficientad"),
        ((*options, "--layers", "3,2"), "--layers takes some of 1,2,3"),
        ((*options, "--noise", -1), "--noise >= 0"),
        ((*options, "--epochs", 1, "--steps", 1), "--steps or --epochs"),
        ((*options, "--epochs", 0), "--epochs >= 1"),
        ((*options, "--steps", 0), "--steps >= 1"),
        ((*options, "--image-size", 40), "at least 64"),
        ((*options, "--ablation", "--no-adaptor"), "--ablation chooses --noise"),
    ]
    for case, message in cases:
        status, _, err = run_script("train.py", *case)
        assert status == 2 and message in err and "Traceback" not in err, (case, err)
        if "usage" not in err:
            assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["resnet34.pth"]


def test_ablation(options, run_script, tmp_path, monkeypatch):
    """Trainings reach their rows."""
    names = ("default", "no-adaptor", "layers-3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "SIMPLENET_ABLATION", {name: runs.SIMPLENET_ABLATION[name] for name in names})
    folder = train.main([*map(str, options), "--steps", "1", "--ablation"])
    assert str(folder) == "runs/tiny-simplenet-ablation"
    status, out, err = run_script("evaluate.py", "--run", folder, "--device", "cpu")
    assert status == 0, err
    tables = json.loads((folder / "summary.json").read_text())["tables"]
    assert {title: [row["row"] for row in rows] for title, rows in tables.items()} == {
        "SimpleNet, noise": ["noise 0.015 (default)"],
        "SimpleNet, adaptor": ["adaptor false", "adaptor true (default)"],
        "SimpleNet, layers": ["layers [2, 3] (default)", "layers [3]"],
    }
    auroc = json.loads((folder / "no-adaptor/results.json").read_text())["image_auroc"]
    assert tables["SimpleNet, adaptor"][0]["image_auroc"]["mean"] == pytest.approx(100 * auroc)
    model = SimpleNet.load(str(folder / "layers-3/model.pt"))
    assert model.config["layers"] == (3,) and model.raw_map(images(1, (64, 64))).shape[2:] == (4, 4)
    assert "| adaptor false " in out and "AU-sPRO" in out and "paper" not in out


def test_ablation_varies_one_option_at_a_time():
    model = {"noise": 0.015, "no_adaptor": False, "layers": [2, 3]}
    assert runs.SIMPLENET_ABLATION["default"] == {}
    for changed in list(runs.SIMPLENET_ABLATION.values())[1:]:
        ((option, value),) = changed.items()
        assert value != model[option]


def test_both_models_in_one_table():
    def result(category, auroc, **training):
        return {"category": category, "image_auroc": auroc, "types": {}, "training": {"seed": 0, **training}}

    simplenet = {"model": "simplenet", "backbone": "resnet18", "epochs": 40}
    runs = [result("bottle", 0.9, size="small", steps=70000), result("screw", 0.8, size="small", steps=70000),
            result("bottle", 0.7, steps=940, **simplenet), result("screw", 0.6, steps=1440, **simplenet)]  # fmt: skip
    content, sections = summarize_runs(runs)
    ((title, rows),) = sections.items()
    assert title == "Collection, EfficientAD-S, 70000 steps; SimpleNet (resnet18), 40 epochs"
    assert rows[0][:5] == ["percent", "model", "runs", "image AU-ROC", "paper"]
    assert [row[:5] for row in rows[1:]] == [
        ["bottle", "EfficientAD-S, 70000 steps", "1", "90.0", "99.9"],
        ["bottle", "SimpleNet (resnet18), 40 epochs", "1", "70.0", "–"],
        ["screw", "EfficientAD-S, 70000 steps", "1", "80.0", "97.9"],
        ["screw", "SimpleNet (resnet18), 40 epochs", "1", "60.0", "–"],
        ["mean of these 2", "EfficientAD-S, 70000 steps", "1", "85.0", "–"],
        ["mean of these 2", "SimpleNet (resnet18), 40 epochs", "1", "65.0", "–"],
    ]
    assert [c["size"] for c in content["collections"]] == ["small", "simplenet"]
    names = "candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 pipe_fryum".split()
    _, sections = summarize_runs([result(name, 0.5, steps=1, **simplenet) for name in names])
    assert sections["VisA, SimpleNet (resnet18), 40 epochs"][-1] == ["mean of VisA", "1", "50.0", "87.9"]


def test_heat_scale_of_negative_scores():
    """Scores are −D and may all be negative: the ordinary value is black, the threshold in the middle all the same."""
    values = heat_scale(np.array([-0.5, -0.4, -0.1, 0.2]), (-0.4, -0.1))
    assert values.tolist() == pytest.approx([-1 / 6, 0, 0.5, 1])
    image, m = Image.new("RGB", (20, 10)), np.full((5, 5), -0.1)
    sheet = np.asarray(overlay(image, None, {"anomaly": m}, -0.05, (-0.4, -0.1)))
    assert sheet.shape == (128 + 18, 2 * 260 - 4, 3)
    assert sheet[100, 400].tolist() == pytest.approx([160, 32, 48], abs=1)  # 0.8 of the colour in the middle
