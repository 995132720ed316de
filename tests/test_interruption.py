"""kill -9 at random moments, and two processes on one run folder."""

import fcntl
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, TINY, assert_refused, files, same
from PIL import Image

import evaluate
import train
from support.checkpoints import read_checkpoint
from support.runs import Log
from tools import distill

KILLS = int(os.environ.get("KILLS", 3))  # of each kind; KILLS=50 looks harder


@pytest.fixture
def start(monkeypatch):
    """start(train.main, *arguments, kill_after=None) -> exit status; −9 if it was killed so many
    seconds later. Each process is a fork of one that has imported torch."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evaluate", "train", "tools.distill"])

    def run(main, *arguments, kill_after=None) -> int:
        process = context.Process(target=main, args=([*map(str, arguments)],))
        process.start()
        process.join(kill_after)
        process.kill()
        process.join()
        return process.exitcode

    run(print, "the process that is forked has started")
    return run


def check_whole(folder: Path) -> None:
    """Whatever has a final name is whole."""
    for path in folder.rglob("*.p*"):
        if path.suffix == ".pt":
            read_checkpoint(path)
        elif path.suffix == ".png":
            Image.open(path).load()


def test_training_survives_kill_9(start, tmp_path, tiny_demo):
    options = ("--data", tiny_demo, "--steps", 3, *TINY)
    options += ("--checkpoint-every", 0, "--out")
    began, whole, cut = time.time(), tmp_path / "whole", tmp_path / "cut"
    assert start(train.main, *options, whole) == 0
    duration, kills = time.time() - began, 0
    while True:
        resume = ("--resume", cut) if (cut / "resume.pt").exists() else (*options, cut)
        kill_after = duration * np.random.random() if kills < KILLS else None
        status = start(train.main, *resume, kill_after=kill_after)
        kills += status == -9
        assert status in (0, -9)
        check_whole(cut)
        if (cut / "model.pt").exists() and not (cut / "resume.pt").exists():
            a, b = (read_checkpoint(folder / "model.pt") for folder in (whole, cut))
            assert same(a["state"], b["state"]) and a["training"] == b["training"]
            assert (whole / "log.jsonl").read_text() == (cut / "log.jsonl").read_text()
            if status == 0 and kills >= KILLS:
                break
            shutil.rmtree(cut)
    assert sorted(p.name for p in cut.iterdir()) == [".lock", "log.jsonl", "model.pt"]


def test_evaluation_survives_kill_9(start, own):
    command = (evaluate.main, "--run", own, *CPU)
    began = time.time()
    assert start(*command) == 0
    duration, kills, expected = time.time() - began, 0, files(own)
    while kills < KILLS:
        (own / "results.json").unlink(missing_ok=True)
        status = start(*command, kill_after=duration * np.random.random())
        kills += status == -9
        assert status in (0, -9)
        check_whole(own)
        if (own / "results.json").exists():
            assert (own / "results.json").read_bytes() == expected["results.json"]
    (own / "overlays/left.png.unfinished1").write_bytes(b"half")
    assert start(*command) == 0
    assert files(own) == expected


def test_distillation_survives_kill_9(start, photos, tmp_path):
    options = (*photos, "--steps", 4, "--checkpoint-every", 1, "--resume", "--out")
    began, whole, cut = time.time(), tmp_path / "out/whole.pt", tmp_path / "out/cut.pt"
    assert start(distill.main, *options, whole) == 0
    duration, kills, status = time.time() - began, 0, -9
    while kills < KILLS or status != 0:
        for path in cut.parent.glob("cut.pt*") if cut.exists() else ():
            path.unlink()
        kill_after = duration * np.random.random() if kills < KILLS else None
        status = start(distill.main, *options, cut, kill_after=kill_after)
        kills += status == -9
        assert status in (0, -9) and (not cut.exists() or same(whole, cut))
    names = {path.name for path in cut.parent.glob("[!.]*")}
    assert names == {"cut.jsonl", "cut.pt", "whole.jsonl", "whole.pt"}


def test_a_second_process_is_refused(run_script, tmp_path, tiny_demo, own, resnet18):
    """Training, resuming, evaluating, scoring and distilling, while another process holds the
    folder; not after its kill -9."""
    for name in ("begun", "new"):
        (tmp_path / name).mkdir()
    options = {"device": "cpu", "data": str(tiny_demo), "image_size": [128, 128]}
    torch.save({"format": "run", "options": options}, tmp_path / "begun/resume.pt")
    backbone = ("--backbone", "resnet18", "--backbone-weights", resnet18)
    evaluation = ("evaluate.py", "--run", "own", *CPU)
    commands = [
        ("train.py", "--resume", "begun"),
        ("train.py", "--data", tiny_demo, *TINY, "--out", "new"),
        evaluation,
        (*evaluation, "--images", tiny_demo / "test"),
        ("tools.distill", "--images", tiny_demo, *backbone, "--out", "own/t.pt"),
    ]
    ready, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        for name in ("begun/.lock", "new/.lock", "own/.lock", "own/.t.pt.lock"):
            fcntl.lockf(os.open(tmp_path / name, os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)
        os.write(write_end, b"1")
        time.sleep(600)
        os._exit(0)
    os.read(ready, 1)
    try:
        before = files(tmp_path)
        for command in commands:
            assert_refused(run_script(*command), "in use by another process")
        assert files(tmp_path) == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert run_script(*evaluation)[0] == 0


def test_killed_before_anything_was_saved(run_script, tmp_path, tiny_demo):
    (tmp_path / "early").mkdir()
    (tmp_path / "early/resume.pt.unfinished77").write_bytes(b"half")
    (tmp_path / "early/.lock").touch()
    result = run_script("train.py", "--resume", "early")
    remedy = "interrupted before anything was saved; start it again, with --out early"
    assert_refused(result, remedy)
    options = (*TINY, "--steps", 1, "--out", "early")
    assert run_script("train.py", "--data", tiny_demo, *options)[0] == 0
    names = sorted(p.name for p in (tmp_path / "early").iterdir())
    assert names == [".lock", "log.jsonl", "model.pt"]


def test_log_goes_on_where_the_run_does(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 10}\n{"step": 20}\n{"ste')
    Log(path, 15).add({"step": 19})
    assert path.read_text() == '{"step": 0}\n{"step": 10}\n{"step": 19}\n'
    log = Log(path, 0)
    assert path.read_text() == ""
    log.file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(OSError, match="/dev/full"):
        log.add({"step": 0})
