"""Where a number comes from: the commit of this code, the versions of packages, the machine."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.threads import num_cores

PACKAGES = (
    "objective-zoo",
    "torch",
    "torchvision",
    "timm",
    "einops",
    "gin-config",
    "numpy",
    "scipy",
    "mlflow",
    "clean-fid",
    "deepspeed",
)
ROOT = Path(__file__).resolve().parents[2]
CODE = ("registry", "zoo", "backbones", "trainers", "benchmarks", "objective_zoo", "gin")


def provenance() -> dict[str, str]:
    """Tags of a run: "commit" and "dirty", "version.NAME", "platform", "cpus" and "gpus".

    "dirty" is "true" if the code or the gin files differ from the commit, or if there are new files
    among them.
    """
    facts = checkout(ROOT)
    facts["version.python"] = platform.python_version()
    facts |= {f"version.{name}": version_of(name) for name in PACKAGES}
    facts["platform"] = platform.platform()
    facts["cpus"] = str(num_cores())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["gpus"] = ", ".join(gpus) or "none"
    return facts


def commit() -> str:
    """The commit of this code, or a text that says why it is not known."""
    return checkout(ROOT)["commit"]


def checkout(root: Path) -> dict[str, str]:
    """The commit and the dirty flag of the git checkout at `root`.

    A checkout of a folder above `root` does not count. It belongs to another project, into which
    this package was installed.
    """
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != root.resolve():
            return {"commit": "not a checkout", "dirty": "unknown"}
        folders = [name for name in CODE if (root / name).exists()]
        changes = _git(root, "status", "--porcelain", "--", *folders)
        return {
            "commit": _git(root, "rev-parse", "HEAD"),
            "dirty": "true" if changes else "false",
        }
    except subprocess.CalledProcessError:
        return {"commit": "not a checkout", "dirty": "unknown"}
    except FileNotFoundError:
        return {"commit": "unknown: git is not installed", "dirty": "unknown"}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
