"""The Python door: compare objectives, open and evaluate their runs, from Python or a notebook.

    import objective_zoo as oz

    c = oz.run("experiments/digits.gin", arms=["mean_flow", "dumo"], set={"run.steps": 50})
    c.table()                                  # a pandas DataFrame
    c.runs["dumo"].show(nfe=(1, 2, 4))         # pictures from the same noise

Importing it is light: the rest of the package, and torch, come at the first call. Every call reads
its configuration anew and leaves gin as it was. Numbers are those of the command line with the same
seeds. Calls are silent, apart from warnings and from the traceback of a run that fails, on stderr;
`progress=True` shows bars and notes there. docs/python.md has an example of every call.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from objective_zoo.own_packages import put_first

if TYPE_CHECKING:
    import pandas as pd

    from backbones.network import FlowNetwork
    from benchmarks.conformance import ConformanceReport
    from benchmarks.grids.outcome import CellsFailed as CellsFailed
    from objective_zoo.comparing import Comparison as Comparison
    from objective_zoo.comparing import PlannedRun as PlannedRun
    from objective_zoo.runs import Run as Run
    from zoo import objectives as objectives

__all__ = [
    "CellsFailed", "Comparison", "PlannedRun", "Run", "check", "experiment", "grid", "load",
    "load_network", "objectives", "parts", "report", "run",
]  # fmt: skip
_LAZY = {
    "CellsFailed": "benchmarks.grids.outcome",
    "Comparison": "objective_zoo.comparing",
    "PlannedRun": "objective_zoo.comparing",
    "Run": "objective_zoo.runs",
    "objectives": "zoo",
}


def run(
    file: str | Path,
    *,
    arms: Sequence[str] = (),
    set: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    fork: str | Path | None = None,
    rehearsal: bool = True,
    progress: bool = False,
) -> Comparison:
    """Train, sample and measure the arms of a gin file, or its one run; as `objective-zoo run`.

    `arms` picks some of the file's arms; `set` binds more, such as {"run.steps": 50}. Its values
    are Python data, parts, or gin references as texts ("@dumo()"). `out` is a new folder, by
    default runs/NAME-DATE-TIME; with `resume` what is in it goes on. With `fork`, the folder of
    earlier runs, new runs start from their newest checkpoints, with other settings. ValueError is
    raised before any training for whatever does not fit together, or fails in a rehearsal at the
    smallest size, which `rehearsal=False` leaves out. CellsFailed, at the end, names the arms that
    failed and carries the outcome of the others.

    >>> c = run("experiments/digits.gin", arms=["mean_flow"], set=TINY, out="x")
    >>> list(c.runs), c.failed
    (['mean_flow'], {})
    """
    from objective_zoo import comparing

    folder = Path(out or Path("runs") / f"{Path(file).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    return comparing.compare(
        file, arms, set or {}, folder,
        resume=resume, fork=fork, rehearsal=rehearsal, progress=progress,
    )  # fmt: skip


def grid(
    file: str | Path,
    *,
    arms: Sequence[str] = (),
    set: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    workers: int | None = None,
    retry_failed: bool = False,
    rehearsal: bool = True,
    progress: bool = False,
) -> Comparison:
    """Run every cell of a gin file's arms, axes and seeds; as `objective-zoo grid`.

    Cells that have finished in `out`, by default runs/NAME, are not run again. With `workers` so
    many run at a time, each in a process of its own. The rest is as in `run`.

    >>> grid("my_grid.gin", set=TINY, out="g").table(by="power").index.tolist()
    [0.5, 1.0]
    """
    from objective_zoo import comparing

    return comparing.grid(
        file, arms, set or {}, Path(out or Path("runs") / Path(file).stem),
        workers=workers, retry_failed=retry_failed, rehearsal=rehearsal, progress=progress,
    )  # fmt: skip


def experiment(
    *, objective: Any, backbone: Any, dataset: Any, set: Mapping[str, Any] | None = None, **run: Any
) -> PlannedRun:
    """One run without a gin file: `.run(out)` trains, measures and records it like any other.

    Parts are registered instances (`objectives.MeanFlow()`) or names ("dit", "digits"); more
    keywords are the arguments of `run` in gin files, such as steps, batch_size, seed, nfe, sampler;
    `set` binds what is not in an instance, such as {"dit.dim": 64}.

    >>> e = experiment(objective=objectives.MeanFlow(), backbone="dit", dataset="digits", steps=4)
    >>> print(e.config)
    run.objective = @mean_flow()
    run.backbone = @dit
    run.dataset = @digits()
    run.steps = 4
    """
    from objective_zoo import comparing

    return comparing.experiment(
        {"objective": objective, "backbone": backbone, "dataset": dataset, **run}, set or {}
    )


def load(folder: str | Path, *, trust_code: bool = False) -> Run:
    """The finished run in a folder; ValueError, with the runs that are in it, if it is none.

    A run's configuration may import Python code of its own, which may do anything. It is executed,
    when the network is needed, only with `trust_code`; modules that you have imported are used.

    >>> load("x/mean_flow").result.objective
    'mean_flow'
    """
    from objective_zoo.runs import Run

    return Run(Path(folder), trust_code=trust_code)


def load_network(folder: str | Path) -> FlowNetwork:
    """The network in a folder that `objective-zoo export` wrote, in evaluation mode on the CPU.

    >>> load_network("exported").keys
    ('u',)
    """
    from backbones.pretrained.exported import load_exported

    return load_exported(folder)


def parts(kind: str) -> pd.DataFrame:
    """What is registered of a kind, such as "objective" or "sampler": summary and paper by name.

    For objectives it has what they train, for samplers what they need: they meet by that.

    >>> parts("objective").loc["mean_flow", "arxiv"]
    '2505.13447'
    """
    import pandas as pd

    from registry.catalogue import kind_named, meeting, reference_of
    from registry.core import summary
    from registry.plugins import load_plugins

    load_plugins()
    found = {name: kind_named(kind).get(name) for name in kind_named(kind).names()}
    met = {name: meeting(kind_named(kind), cls) for name, cls in found.items()}
    papers = {name: reference_of(cls) for name, cls in found.items()}
    columns = {
        "summary": {name: summary(cls) for name, cls in found.items()},
        "arxiv": {name: paper.arxiv if paper else "" for name, paper in papers.items()},
    }
    for word in dict.fromkeys(word for words in met.values() for word in words):
        columns[word] = {name: words.get(word, "") for name, words in met.items()}
    return pd.DataFrame(columns).rename_axis(index=kind)


def check(
    name: str, file: str | Path | None = None, *, set: Mapping[str, Any] | None = None
) -> ConformanceReport:
    """Test an objective against closed forms, or another part against its contract.

    `.problems()` names the claims that fail. `file` is a Python file of one's own, imported first.
    `set` makes a variant, which the report names, with values like those of `run`.

    >>> check("flow_matching").problems()
    ()
    >>> check("beta_pair", set={"beta_pair.r_law": "zero"}).problems()
    ()
    """
    from benchmarks.conformance import check as conformance
    from objective_zoo.calls import isolated_call
    from registry.configuration.gin_text import bindings_of_values

    with isolated_call():
        bindings = bindings_of_values(set or {})
        return conformance(name, Path(file) if file else None, bindings=bindings)


def report(
    runs: Sequence[str | Path], *, out: str | Path, baseline: str = "", force: bool = False
) -> Path:
    """Write recorded runs as one page, tables and figures into `out`; the page's path.

    >>> report(["x"], out="r").name
    'report.html'
    """
    from benchmarks.report import write_report
    from objective_zoo.calls import isolated_call, listed

    with isolated_call():
        write_report(listed("runs", runs), Path(out), baseline=baseline, force=force)
    return Path(out) / "report.html"


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'objective_zoo' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


put_first()
importlib.import_module("benchmarks.threads").choose_threads()
