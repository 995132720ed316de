import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import demo  # noqa: E402


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference values and data that lie beside the checkout; not part of the project."""
    path = Path(os.environ.get("EFFICIENTAD_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"reference data {path} is not here")
    return path


@pytest.fixture(scope="session")
def teacher() -> str:
    return str(ROOT / "weights/teacher_small.pt")


@pytest.fixture(scope="session")
def tiny_demo(tmp_path_factory) -> Path:
    """The demo set with very few images."""
    counts = {"train/good": 5, "validation/good": 2, "test/good": 3, "test/logical_anomalies": 3, "test/structural_anomalies": 3}
    root = tmp_path_factory.mktemp("sets") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "DEMO_SPLITS", counts)
        demo.make_demo(root)
    return root


@pytest.fixture
def run_script(tmp_path, monkeypatch, capfd):
    """run_script("train.py", "--steps", 2) runs the real script in an empty folder -> (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(script: str, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capfd.readouterr()
        status = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as exit:
            status = exit.code
        return (status or 0, *capfd.readouterr())

    return run


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
