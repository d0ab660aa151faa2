"""objective-zoo evaluate, and sample: numbers and pictures of a finished run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.commands.arguments import (
    Commands,
    add_bindings,
    add_trust,
    add_weights,
    import_given,
)
from benchmarks.launchers.slurm import take_place


def add_to(commands: Commands) -> None:
    _add_evaluate(commands.add_parser("evaluate", help="FID and similar metrics of a finished run"))

    sample = commands.add_parser("sample", help="draw samples from a finished run")
    sample.add_argument("run", type=Path, help="the folder of a finished run")
    sample.add_argument(
        "--nfe", type=int, nargs="+", default=[], help="network evaluations; default: 1 2 4"
    )
    sample.add_argument("--num", type=int, default=64, help="samples per NFE")
    sample.add_argument("--seed", type=int, default=0, help="seed of the noise")
    sample.add_argument("--sampler", help="a registered sampler; default the run's own")
    sample.add_argument("--out", type=Path, default=Path("grid.png"), help="the picture to write")
    add_weights(sample)
    add_bindings(sample, "euler.shift = 2.0")
    add_trust(sample)
    sample.set_defaults(command=_sample)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--num", type=int, default=50_000, help="samples per NFE")
    parser.add_argument("--nfe", type=int, nargs="+", default=[], help="default: the run's own")
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        help="registered metrics; default: frechet kid precision_recall",
    )
    parser.add_argument(
        "--features",
        nargs="+",
        default=[],
        help="registered extractors; default: the best one here",
    )
    parser.add_argument(
        "--reference",
        help="a folder of pictures, an .npz of ADM's layout, cleanfid:NAME_SPLIT_SIZE; default: "
        "the run's own data",
    )
    parser.add_argument(
        "--labels", choices=("balanced", "data"), default="balanced",
        help="the same number of samples for each class, or the frequencies of the data",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of noise and draws")
    parser.add_argument("--batch-size", type=int, default=256, help="rows of one network call")
    parser.add_argument("--ranks", type=int, default=1, help="processes, such as one for each GPU")
    parser.add_argument(
        "--save-images", type=Path, metavar="DIR", help="also write every sample as a PNG"
    )
    parser.add_argument("--out", type=Path, help="default: RUN/evaluation")
    parser.add_argument("--cache", type=Path, help="where features of references are kept")
    add_weights(parser)
    add_bindings(parser, "euler.shift = 2.0")
    add_trust(parser)
    parser.set_defaults(command=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from trainers import ranks

    take_place(os.environ)
    if arguments.ranks > 1 and not ranks.launched():
        from benchmarks.launchers.ranks import start

        again = "Run the same command again: it keeps the blocks that are done"
        if status := start(arguments.words[1:], arguments.ranks, again=again):
            raise SystemExit(status)
        return
    from benchmarks.evaluation.protocol import evaluate_run, table
    from benchmarks.evaluation.request import EvaluationRequest

    import_given(arguments)
    request = EvaluationRequest(
        num=arguments.num,
        nfe=tuple(arguments.nfe),
        metrics=tuple(arguments.metrics),
        features=tuple(arguments.features),
        reference=arguments.reference,
        labels=arguments.labels,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        bindings=tuple(arguments.bindings),
        save_images=arguments.save_images,
        weights=arguments.weights,
        cache=arguments.cache,
        trust_code=arguments.trust_code,
    )
    if values := evaluate_run(arguments.run, request, arguments.out):
        print(table(values))


def _sample(arguments: argparse.Namespace) -> None:
    from benchmarks.runs.finished import sample_run
    from registry.folders import check_output

    check_output(arguments.out, "--out")
    import_given(arguments)
    where, nfe = sample_run(
        arguments.run,
        nfe=tuple(arguments.nfe),
        num=arguments.num,
        seed=arguments.seed,
        sampler=arguments.sampler,
        out=arguments.out,
        weights=arguments.weights,
        bindings=tuple(arguments.bindings),
        trust_code=arguments.trust_code,
    )
    print(f"{arguments.num} samples at NFE {', '.join(map(str, nfe))}: {where}")
