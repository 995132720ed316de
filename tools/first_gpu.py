"""The first minutes on a GPU: is it right, then how fast, what is worth most first."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from support.runs import write
from support.training import prepare_torch

ROOT = Path(__file__).parent.parent
# each with its share of the time
TESTS = {"tests/kernel_checks.py": 0.3, "tests/test_fast.py": 0.15, "tests/test_training.py": 0.1}
START = "spawn"  # CUDA does not survive a fork


def command(*words: object) -> str:
    """Run a Python command; its warnings. Raises RuntimeError with its last line if it fails."""
    words, both = [sys.executable, *map(str, words)], {"stderr": subprocess.STDOUT}
    process = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, errors="replace", **both)
    last = (process.stdout.strip().splitlines() or [""])[-1]
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}: {last}")
    lines = process.stdout.splitlines()
    return "; ".join(line.partition("Warning: ")[2] for line in lines if "Warning: " in line)


def correctness(tests: str, log: Path, device: torch.device, seconds: float) -> dict:
    """The checks of the kernels, or a file's tests that have a GPU or compare with it. `log` gets
    what pytest says; the result is its last line, and what fails."""
    words = [sys.executable, "-m", "pytest", "-v", "-rfE", "-p", "no:cacheprovider", tests]
    kernels = "kernel_checks" in tests
    words += [] if kernels else ["-k", "gpu or cuda or graph or captured"]
    words += ["-n", "8"] if kernels and find_spec("xdist") else []  # their time is compilation
    environment = os.environ | {"COLUMNS": "250"}  # else pytest cuts the reasons
    environment["TRITON_INTERPRET"] = "1" if kernels and device.type == "cpu" else "0"
    with open(log, "ab") as file:
        begin, both = file.tell(), {"stdout": file, "stderr": subprocess.STDOUT}
        try:
            process = subprocess.run(words, cwd=ROOT, env=environment, timeout=seconds, **both)
            regular = process.returncode in (0, 1, 5)  # passed, failed, nothing to do
            end = "" if regular else f"exit status {process.returncode}: "
        except subprocess.TimeoutExpired:
            end = f"longer than {seconds:.0f} s: "
    lines = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines() or ["nothing"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]  # with reasons
    failed = failed or [line for line in lines if " FAILED" in line or " ERROR" in line]
    return {tests: end + "; ".join([lines[-1], *(line[:200] for line in failed[:9])])}


def training(recipe: str, device: torch.device) -> dict:
    """2,000 steps of a recipe on the demo set, and their evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        run, start = Path(folder) / "run", time.time()
        options = "--steps", 2000, "--recipe", recipe, "--device", device
        warned = command("train.py", *options, "--out", run)  # of a graph that failed
        seconds = time.time() - start
        command("evaluate.py", "--run", run, "--device", device)
        results = json.loads((run / "results.json").read_text())
    keys = ("image_auroc", "au_spro", "false_alarms")
    found = {"2,000 steps with calibration, seconds": seconds, "warnings": warned or "none"}
    found |= {f"{key}, %": 100 * results[key] for key in keys if key in results}
    return {f"demo, recipe {recipe}, {key}": value for key, value in found.items()}


def parts(
    log: Path, sections: dict[str, Callable], scope, device: torch.device, minutes: float
) -> Iterator[tuple]:
    """(name, function that measures it) in order of worth; what compiles for minutes is last."""
    compiled = [row for row in scope.rows if "compile" in row]
    quick = scope._replace(rows=tuple(row for row in scope.rows if row not in compiled))
    slow = scope._replace(rows=(scope.rows[0], *compiled, "ours"))  # × is against the first

    def each(scope, words: str = "") -> Iterator[tuple]:
        for batch in scope.batches:
            one = scope._replace(batches=(batch,))
            yield f"kernels, batch {batch}{words}", partial(sections["kernels"], one, device)
        for model, batch in itertools.product(scope.models, scope.batches):
            one = scope._replace(models=(model,), batches=(batch,))
            yield f"{model}, batch {batch}{words}", partial(sections["inference"], one, device)

    for tests, share in TESTS.items():
        yield tests, partial(correctness, tests, log, device, 60 * minutes * share)
    yield from each(quick)
    yield "training steps", partial(sections["training"], scope, device)
    for recipe in ("paper", "short"):
        yield f"training, recipe {recipe}", partial(training, recipe, device)
    yield from each(slow, ", with torch.compile")


def save(path: Path, known: dict) -> None:
    write(path, json.dumps(known, indent=1, ensure_ascii=False) + "\n")


def work(begun, path: Path, *about) -> None:
    """Measure the parts behind number `begun`, of shared memory, in a process group of its own. The
    process ends after a part that fails: a GPU may be of no use afterwards."""
    os.setsid()
    prepare_torch(0)
    known = json.loads(path.read_text())
    for name, measure in itertools.islice(parts(*about), begun.value + 1, None):
        begun.value += 1
        save(path, {**known, name: "cut short"})
        try:
            found = measure()
        except Exception as error:  # a compiler's or a driver's
            known[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            return save(path, known)
        for key, value in found.items():
            known[key] = known.get(key, []) + value if isinstance(value, list) else value
        save(path, known)


def first_gpu(path: Path, *about) -> dict:
    """Measure part by part until the time is over; `path` holds what is known so far, and NAME.log
    beside it what the tests say. A part that fails or is cut short says so under its name. `about`:
    the last arguments of `parts`."""
    context, end = multiprocessing.get_context(START), time.time() + 60 * about[-1]
    log = path.with_name(f"{path.name}.log")
    log.unlink(missing_ok=True)
    names = [name for name, _ in parts(log, *about)]
    begun = context.RawValue("i", -1)
    while begun.value < len(names) - 1 and time.time() < end:
        before = begun.value
        worker = context.Process(target=work, args=(begun, path, log, *about), daemon=True)
        worker.start()
        try:
            worker.join(max(0.01, end - time.time()))
        finally:
            alive = worker.exitcode is None
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)  # what it has started too
        worker.kill()
        worker.join()
        if worker.exitcode and not alive:
            begun.value = max(begun.value, before + 1)
            known = json.loads(path.read_text())
            save(path, {**known, names[begun.value]: f"exit status {worker.exitcode}"})
    return json.loads(path.read_text())
