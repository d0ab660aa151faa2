"""What `run` refuses of its single arguments, before anything is built or trained."""

from __future__ import annotations

import pytest
from tiny_runs import DIGITS, FILE_ONLY, sets, zoo

import benchmarks.builtin_parts  # noqa: F401  registers every part
from benchmarks.experiments.build import run
from registry import gin_setup


def refused(*bindings: str) -> str:
    """Why this tiny run of MeanFlow is refused."""
    more = ("run.engine = @torch_engine()", "mean_flow.weight = @adaptive()")

    def built():
        gin_setup.parse([DIGITS], [*FILE_ONLY, *more, *bindings])
        with gin_setup.arm("mean_flow"):
            run()

    with pytest.raises(ValueError) as caught:
        built()
    return str(caught.value)


@pytest.mark.parametrize("seed", ["-1", "0.5", "'1'", "True", "4294967296"])
def test_seed_that_some_library_would_refuse_later_is_refused_at_once(seed):
    assert f"run.seed = {seed} must be a whole number" in refused(f"run.seed = {seed}")


@pytest.mark.parametrize(
    ("binding", "what"),
    [
        ("run.steps = 3.5", "run.steps = 3.5 must be a whole number"),
        ("run.steps = '10'", "Write run.steps = 10"),
        ("run.steps = 0", "run.steps = 0 must be a positive whole number"),
        ("run.nfe = (1, 0)", r"run.nfe = (1, 0) must be a tuple of positive whole numbers"),
        ("run.nfe = (1.5,)", "run.nfe = (1.5,) must be a tuple in which each is a whole number"),
        ("run.batch_size = True", "run.batch_size = True must be"),
    ],
)
def test_counts_are_whole_numbers(binding, what):
    assert what in refused(binding)


@pytest.mark.parametrize(
    "binding",
    [
        *("run.objective = @flow_matching", "run.dataset = @digits", "run.sampler = @flow_map"),
        *("run.optimizer = @adamw", "run.schedule = @cosine", "run.engine = @torch_engine"),
        *("run.metric = @feature_metrics", "run.recorder = @jsonl", "mean_flow.weight = @adaptive"),
        "feature_metrics.metrics = [@kid(), @mmd]",
    ],
)
def test_part_without_brackets_is_refused_by_its_key(binding):
    key, _, value = binding.partition(" = ")
    name = value.split("@")[-1].rstrip("]")
    where = f"mean_flow/{binding}" if key == "run.objective" else binding
    assert f"{key} = @{name} lacks brackets: write @{name}()" in refused(where)


def test_batch_that_the_engine_cannot_cut_is_refused_before_another_cell_trains(tmp_path):
    file = tmp_path / "g.gin"
    file.write_text(
        f"include '{DIGITS}'\nGrid.arms = ('flow_matching',)\n"
        "Grid.axes = {'torch_engine.gradient_accumulation_steps': [1, 3]}\n"
    )
    done = zoo("grid", file, "--out", tmp_path / "out", *sets(*FILE_ONLY))
    assert done.status == 2
    assert "gradient_accumulation_steps = 3" in done.err
    assert not list(tmp_path.glob("out/*/checkpoints"))
