"""A finished run, opened from its folder."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.runs.result import Result, finished_run
from objective_zoo.calls import isolated_call, listed

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image
    from torch import Tensor

    from backbones.network import FlowNetwork
    from benchmarks.experiments.experiment import Experiment as Built


_LISTS = ("nfe", "metrics", "features")  # among the options of an evaluation


class Run:
    """A finished run: its configuration, figures and records; its network, to draw and measure."""

    def __init__(self, folder: Path, *, trust_code: bool = False):
        finished_run(folder)
        self.folder = folder
        self._trust_code = trust_code

    def __repr__(self) -> str:
        values = ", ".join(f"{name} = {value:.4g}" for name, value in self.result.values.items())
        return f"Run({str(self.folder)!r}): {values}"

    @property
    def config(self) -> str:
        """The gin text that does the same again."""
        return (self.folder / "config.gin").read_text()

    @cached_property
    def result(self) -> Result:
        """Values by name ("nfe1/fd_..."), steps, images, seconds, parameters."""
        return Result.load(self.folder)

    @property
    def net(self) -> FlowNetwork:
        """The network with the weights that were measured, in evaluation mode."""
        return self._opened[1]

    def history(self, *names: str) -> pd.DataFrame:
        """What was recorded by step, such as "loss"; every metric without a name.

        Steps are the index, names the columns; a metric that was not recorded at a step is NaN.
        KeyError, with the names that there are, for another name.
        """
        import pandas as pd

        from benchmarks.records.jsonl import read_record
        from registry.core import did_you_mean

        found = read_record(self.folder).metrics
        for name in names:
            if not (isinstance(name, str) and name in found):
                raise KeyError(
                    f"nothing was recorded as {name!r}.{did_you_mean(str(name), found)} "
                    f"Recorded: {', '.join(sorted(found))}"
                )
        columns = {
            name: pd.Series(found[name].values, index=found[name].steps) for name in names or found
        }
        return pd.DataFrame(columns).rename_axis(index="step")

    def sample(
        self,
        nfe: int = 1,
        num: int = 16,
        *,
        labels: int | Sequence[int] | None = None,
        seed: int = 0,
    ) -> Tensor:
        """`num` samples [num *shape] at this number of network evaluations, as people see them.

        Pictures are in [-1, 1]. `labels` is the class of all, or one for each; without it classes
        have the frequencies of the data. The same seed gives the same noise at every nfe.
        ValueError for an nfe that the sampler cannot have, and for labels that the data lack.
        """
        return self._drawn((nfe,), num, labels, seed)[nfe]

    def show(
        self,
        nfe: Sequence[int] = (),
        num: int = 16,
        *,
        labels: int | Sequence[int] | None = None,
        seed: int = 0,
    ) -> Image.Image:
        """Samples as a picture, one line for each nfe, from the same noise; a notebook displays it.

        Without `nfe` they are 1, 2 and 4, or the run's own where its sampler cannot have these.
        ValueError for data that are neither pictures nor points.
        """
        from PIL import Image

        from benchmarks.data.pictures import picture
        from benchmarks.runs.finished import usual_nfe

        shown = listed("nfe", nfe) or usual_nfe(self._opened[0])
        rows = {f"NFE {n}": x for n, x in self._drawn(shown, num, labels, seed).items()}
        with tempfile.TemporaryDirectory() as folder:
            path = picture(rows, Path(folder) / "samples.png")
            if path is None:
                shape = tuple(next(iter(rows.values())).shape[1:])
                raise ValueError(f"samples of shape {shape} are neither pictures nor points")
            with Image.open(path) as drawn:
                return drawn.copy()

    def evaluate(
        self,
        num: int = 50_000,
        *,
        nfe: Sequence[int] = (),
        progress: bool = False,
        **options: Any,
    ) -> dict[str, float]:
        """FID and similar metrics from `num` samples, by name; as `objective-zoo evaluate`.

        They are also written into the run's folder, under evaluation/. `options` are those of the
        command: metrics, features, reference, labels, seed, batch_size, weights.
        """
        from benchmarks.evaluation.protocol import evaluate_run
        from benchmarks.evaluation.request import EvaluationRequest

        lists = {k: v for k, v in {"nfe": nfe, **options}.items() if k in _LISTS}
        given = {**options, **{name: listed(name, value) for name, value in lists.items()}}
        request = EvaluationRequest(num=num, trust_code=self._trust_code, **given)
        with isolated_call(progress):
            return evaluate_run(self.folder, request)

    @cached_property
    def _opened(self) -> tuple[Built, FlowNetwork]:
        from benchmarks.runs.finished import open_run

        with isolated_call():
            return open_run(self.folder, trust_code=self._trust_code)

    def _drawn(
        self, nfe: tuple[int, ...], num: int, labels: int | Sequence[int] | None, seed: int
    ) -> dict[int, Tensor]:
        from benchmarks.runs.samples import draw_samples

        if not (isinstance(num, int) and num >= 1):
            raise ValueError(f"the number of samples is {num!r}; give a whole number, 1 or more")
        experiment, net = self._opened
        return draw_samples(experiment, net, nfe, num, seed, labels)
