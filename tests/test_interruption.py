"""kill -9 at random moments, and two processes on one run folder; distillation's is in
test_distill.py."""

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_refused
from PIL import Image

from efficientad import EfficientAD
from support.backbone import ResNet
from support.checkpoints import read_checkpoint
from support.runs import Log

# Imports once, then forks for each job: its process id, then its exit status. So a start costs
# milliseconds.
SERVER = """
import json, os, sys, traceback
import torch
import evaluate, train
torch.set_num_threads(1)
for line in sys.stdin:
    script, arguments, log = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
        try:
            globals()[script].main(arguments)
        except BaseException as error:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(error.code if isinstance(error, SystemExit) else 1)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("interruption")


@pytest.fixture(scope="module")
def start(folder):
    """start("train", *arguments, kill_after=None) -> exit status, in `folder`; -9 if it was killed
    so many seconds later."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    command = [sys.executable, "-c", SERVER]
    server = subprocess.Popen(command, cwd=folder, env=environment, **pipes)

    def run(script, *arguments, kill_after=None):
        server.stdin.write(json.dumps([script, list(map(str, arguments)), "job.log"]) + "\n")
        pid = int(server.stdout.readline())
        running = kill_after is not None
        if running and not select.select([server.stdout], [], [], kill_after)[0]:
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(pid, signal.SIGKILL)
        return int(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait()


def log_of(folder) -> str:
    return (folder / "job.log").read_text(errors="replace")


def check_whole(folder) -> None:
    """Whatever has a final name is whole."""
    for path in folder.rglob("*"):
        if path.suffix in (".pt", ".resume"):
            read_checkpoint(path)
        elif path.suffix == ".png":
            Image.open(path).load()


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_training_survives_kill_9(start, folder, tiny_demo, teacher):
    options = ("--data", tiny_demo, "--steps", 3, *TINY, "--teacher", teacher)
    options += ("--checkpoint-every", 0)
    began, whole, cut = time.time(), folder / "whole", folder / "cut"
    assert start("train", *options, "--out", whole) == 0, log_of(folder)
    duration, rng, kills = time.time() - began, np.random.default_rng(), 0
    while True:
        resume = ("--resume", cut) if (cut / "resume.pt").exists() else (*options, "--out", cut)
        status = start("train", *resume, kill_after=rng.uniform(0, duration) if kills < 6 else None)
        kills += status == -9
        assert status in (0, -9), log_of(folder)
        check_whole(cut)
        if (cut / "model.pt").exists() and not (cut / "resume.pt").exists():
            a, b = (read_checkpoint(f / "model.pt") for f in (whole, cut))
            assert equal(a["state"], b["state"]) and equal(a["training"], b["training"])
            assert (whole / "log.jsonl").read_text() == (cut / "log.jsonl").read_text()
            if status == 0 and kills >= 6:
                break
            shutil.rmtree(cut)
    assert sorted(p.name for p in cut.iterdir()) == [".lock", "log.jsonl", "model.pt"]


def test_evaluation_survives_kill_9(start, folder, tiny_demo):
    run = folder / "evaluated"
    run.mkdir()
    model = EfficientAD(image_size=(128, 128))
    model.fit_teacher_statistics([torch.rand(2, 3, 128, 128)])
    model.calibrate([torch.rand(2, 3, 128, 128)])
    model.training_info = {"data": str(tiny_demo), "size": "small"}
    model.save(str(run / "model.pt"))
    began = time.time()
    assert start("evaluate", "--run", run, "--device", "cpu") == 0, log_of(folder)
    duration, rng, kills = time.time() - began, np.random.default_rng(), 0
    expected = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    while kills < 6:
        (run / "results.json").unlink(missing_ok=True)
        status = start(
            "evaluate", "--run", run, "--device", "cpu", kill_after=rng.uniform(0, duration)
        )
        kills += status == -9
        assert status in (0, -9), log_of(folder)
        check_whole(run)
        if (run / "results.json").exists():
            assert (run / "results.json").read_bytes() == expected[Path("results.json")]
    (run / "overlays/left.png.tmp1").write_bytes(b"half")
    assert start("evaluate", "--run", run, "--device", "cpu") == 0
    found = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert found == expected


def test_a_second_process_is_refused(run_script, tmp_path, tiny_demo, teacher):
    """Training, resuming, evaluating, scoring and distilling, while another process holds the
    folder; not after its kill -9."""
    model = EfficientAD(image_size=(128, 128))
    model.threshold.fill_(1.0)
    model.training_info = {"data": str(tiny_demo)}
    for name in ("begun", "done", "new"):
        (tmp_path / name).mkdir()
    model.save(str(tmp_path / "done/model.pt"))
    options = {"device": "cpu", "data": str(tiny_demo), "image_size": [128, 128]}
    torch.save({"format": "run", "options": options}, tmp_path / "begun/resume.pt")
    torch.save(ResNet("resnet18").state_dict(), tmp_path / "resnet18.pth")
    backbone = ("--backbone", "resnet18", "--backbone-weights", "resnet18.pth")
    commands = [
        ("train.py", "--resume", "begun"),
        ("train.py", "--data", tiny_demo, "--teacher", teacher, *TINY, "--out", "new"),
        ("evaluate.py", "--run", "done", "--device", "cpu"),
        ("evaluate.py", "--run", "done", "--images", tiny_demo / "test", "--device", "cpu"),
        ("tools.distill", "--images", tiny_demo, *backbone, "--out", "done/t.pt"),
    ]
    ready, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        for name in ("begun/.lock", "new/.lock", "done/.lock", "done/.t.pt.lock"):
            fcntl.lockf(os.open(tmp_path / name, os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)
        os.write(write_end, b"1")
        time.sleep(600)
        os._exit(0)
    os.read(ready, 1)
    try:
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        for command in commands:
            assert_refused(run_script(*command), "in use by another process")
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert run_script(*commands[2])[0] == 0


def test_killed_before_anything_was_saved(run_script, tmp_path, tiny_demo, teacher):
    (tmp_path / "early").mkdir()
    (tmp_path / "early/resume.pt.tmp77").write_bytes(b"half")
    (tmp_path / "early/.lock").touch()
    result = run_script("train.py", "--resume", "early")
    assert_refused(
        result, "interrupted before anything was saved; start it again, with --out early"
    )
    options = (*TINY, "--steps", 1, "--teacher", teacher)
    assert run_script("train.py", "--data", tiny_demo, *options, "--out", "early")[0] == 0
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
