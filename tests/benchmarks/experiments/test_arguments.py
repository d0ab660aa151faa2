"""What `run` refuses of its single arguments, before anything is built or trained."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_runs import DIGITS, FILE_ONLY, sets, zoo

import benchmarks.builtin_parts  # noqa: F401  registers every part
from benchmarks.experiments import network_size
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


@pytest.mark.parametrize(
    ("binding", "what"),
    [
        ("dit.dim = 1000000", "parameters: 3 copies of them (to train them) take"),
        ("dit.dim = 4611686018427387904", "more elements than any memory can hold"),
        ("dit.depth = 1000000000", "more than 300 weight tensors"),
    ],
)
def test_network_that_no_memory_holds_is_refused_before_it_is_made(binding, what, monkeypatch):
    monkeypatch.setattr(network_size, "MOST_TENSORS", 300)  # as many as one second makes
    found = refused(binding)
    assert what in found
    assert "Lower its" in found


def test_network_is_compared_with_the_memory_of_this_machine(monkeypatch):
    size = 4 * 1000 * 500

    def check(copies: int, memory: int | None):
        monkeypatch.setattr(network_size, "machine_memory", lambda: memory)
        make = partial(torch.nn.Linear, 1000, 500, bias=False)
        network_size.check_size(make, copies, torch.device("cpu"))

    check(3, 3 * size)
    check(3, None)
    with pytest.raises(ValueError, match=r"500,000 parameters: 3 copies of them"):
        check(3, 3 * size - 1)
    check(1, 3 * size - 1)


def test_network_that_cannot_be_made_without_memory_is_left_to_its_making():
    def made():
        return torch.nn.Linear(int(torch.ones(1).item()), 1)

    network_size.check_size(made, 1, torch.device("cpu"))
