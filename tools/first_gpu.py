"""The first minutes on a GPU: is it right, then how fast, what is worth most first."""

import itertools
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from support.data import DataError
from support.runs import write
from tools.benchmark_tables import section

ROOT = Path(__file__).parent.parent
TESTS = ("tests/test_kernels.py", "tests/test_fast.py", "tests/test_training.py")
BEGIN, END = "<!-- begin of what --readme writes -->", "<!-- end -->"


def command(*words: object) -> str:
    """The last line that a Python command prints."""
    words = [sys.executable, *map(str, words)]
    process = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return (process.stdout.strip().splitlines() or [f"exit status {process.returncode}"])[-1]


def correctness(device: torch.device) -> dict:
    """Kernels, graphs and precision: the tests that have a GPU or compare with it."""
    options = "-q", "-k", "gpu or cuda or graph or captured", "-p", "no:cacheprovider"
    return {"tests on the GPU": command("-m", "pytest", *TESTS, *options)}


def training(device: torch.device) -> dict:
    """2,000 steps of the paper's recipe on the demo set, and their evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        run, start = Path(folder) / "run", time.time()
        options = "--steps", 2000, "--recipe", "paper", "--device", device
        command("train.py", *options, "--out", run)
        seconds = time.time() - start
        command("evaluate.py", "--run", run, "--device", device)
        path = run / "results.json"
        results = json.loads(path.read_text()) if path.exists() else {}
    keys = ("image_auroc", "au_spro", "false_alarms")
    figures = {f"demo, {key}, %": 100 * results[key] for key in keys if key in results}
    return {"2,000 steps with calibration, seconds": seconds, **figures}


def parts(sections: dict[str, Callable], scope, device: torch.device) -> Iterator[tuple]:
    """(name, function that measures it) in order of worth; what compiles for minutes is last."""
    quick = scope._replace(rows=tuple(row for row in scope.rows if "compile" not in row))
    slow = scope._replace(
        rows=tuple(row for row in scope.rows if "compile" in row or row == "ours")
    )

    def each(scope, words: str = "") -> Iterator[tuple]:
        for batch in scope.batches:
            one = scope._replace(batches=(batch,))
            yield f"kernels, batch {batch}{words}", partial(sections["kernels"], one, device)
        for model, batch in itertools.product(scope.models, scope.batches):
            one = scope._replace(models=(model,), batches=(batch,))
            yield f"{model}, batch {batch}{words}", partial(sections["inference"], one, device)

    yield "correctness", partial(correctness, device)
    yield from each(quick)
    yield "training steps", partial(sections["training"], scope, device)
    yield "training", partial(training, device)
    yield from each(slow, ", with torch.compile")


class TimeOver(BaseException):
    """Raised by the clock; no `except Exception` holds it up."""


def first_gpu(sections: dict, scope, device: torch.device, minutes: float, path: Path) -> dict:
    """Measure part by part until the time is over; `path` holds what is known so far. A part that
    fails or is cut short says so under its name."""

    def stop(*_) -> None:
        raise TimeOver

    known, previous = json.loads(path.read_text()), signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        for name, measure in parts(sections, scope, device):
            known[name] = "cut short"
            try:
                found = measure()
                del known[name]
            except Exception as error:  # a compiler's or a driver's
                found = {name: f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            for key, value in found.items():
                known[key] = known.get(key, []) + value if isinstance(value, list) else value
            write(path, json.dumps(known, indent=1, ensure_ascii=False) + "\n")
    except TimeOver:
        write(path, json.dumps(known, indent=1, ensure_ascii=False) + "\n")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return known


def put_in_place(path: Path, root: Path = ROOT) -> None:
    """Write the figures of a file that --json wrote into docs/speed.md, and what is measured into
    README.md's status line. Raises DataError for another file."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        text, device = section(results), str(results["device"])
    except (ValueError, TypeError, AttributeError, KeyError):
        raise DataError(f"{path}: --readme takes a file that --json wrote") from None
    speed, readme = root / "docs/speed.md", root / "README.md"
    page = speed.read_text(encoding="utf-8")
    place = re.escape(BEGIN) + ".*?" + re.escape(END)
    replaced = f"{BEGIN}\n\n{text}\n\n{END}"
    write(speed, re.sub(place, lambda _: replaced, page, flags=re.DOTALL))
    status = f"Speed is measured on {device} too: [figures](docs/speed.md#on-a-gpu)."
    page = readme.read_text(encoding="utf-8")
    write(
        readme, re.sub(r"Nothing has run on a GPU yet\.|Speed is measured on .*?\)\.", status, page)
    )
