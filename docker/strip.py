"""Take out of the environment what no score needs, and then prove it by running torch as the service does.

torch carries headers for compiling against it, its own tests and their binaries; sympy and networkx are there for the
compiler of `torch.compile`, which nothing here calls.
"""

import io
import shutil
import sys
import sysconfig
import warnings
from pathlib import Path

UNUSED = (
    "torch/include",
    "torch/share",
    "torch/test",
    "sympy",
    "isympy.py",
    "mpmath",
    "networkx",
    "functorch",
)
packages = Path(sysconfig.get_path("purelib"))
for name in UNUSED:
    path = packages / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
for path in (packages / "torch/bin").iterdir():
    if path.name != "torch_shm_manager":  # importing torch looks for it
        shutil.rmtree(path) if path.is_dir() else path.unlink()
for pattern in ("torch/lib/*_test.so", "torch/lib/*.a", "numpy/**/tests", "**/*.pyi"):
    for path in packages.glob(pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()

import torch  # noqa: E402

module = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.ConvTranspose2d(4, 1, 3))
saved = io.BytesIO()
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.jit.save(torch.jit.script(module.eval()), saved)
    saved.seek(0)
    loaded = torch.jit.freeze(torch.jit.load(saved).eval())
with torch.inference_mode():
    for _ in range(3):
        loaded(torch.zeros(8, 1, 28, 28))
total = sum(path.stat().st_size for path in packages.rglob("*") if path.is_file())
sys.stdout.write(f"environment: {total / 1e6:.0f} MB\n")
