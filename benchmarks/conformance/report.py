"""Running the claims, and the report: one line for each, and what to do about a failure."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

import registry
from benchmarks.conformance import claims as general
from benchmarks.conformance import fixed_point, gradients, isolation
from benchmarks.conformance.expected.sampling import samplers_reach_the_data
from benchmarks.conformance.limits import SPECIAL
from benchmarks.conformance.networks import VELOCITIES
from benchmarks.conformance.parts import kinds as part_kinds
from benchmarks.conformance.reached import not_reached
from benchmarks.conformance.results import Claim, ClaimResult, run_claim
from benchmarks.conformance.subject import Subject
from benchmarks.conformance.verdicts import Verdict, verdicts
from registry import gin_setup
from registry.core import Registry
from registry.plugins import import_file, load_plugins

FIRST = "one loss per row"
FIXED_POINTS = ("pointwise", "distribution", "none")
SLOW = ("fixed point at a skewed mixture", "shift of the defaults")  # planted mistakes are larger

CLAIMS: dict[str, Claim] = {
    FIRST: general.one_loss_per_row,
    "shapes and dtypes": general.shapes_and_dtypes,
    "few rows": general.few_rows,
    "labels": general.labels,
    "finite": general.finite,
    "calls within 0 <= r <= t <= 1": general.calls_within_times,
    "batch left alone": isolation.batch_left_alone,
    "determined by rng": isolation.deterministic,
    "global generators untouched": isolation.global_generators_untouched,
    "rows are independent": isolation.rows_are_independent,
    "shares of a batch": isolation.share_of_a_batch,
    "derivatives agree": general.derivatives_agree,
    "gradient reaches every head": gradients.reaches_every_head,
    "no gradient through targets": gradients.not_through_targets,
    "fixed point at a Gaussian": fixed_point.at_gaussian,
    "fixed point at a skewed mixture": fixed_point.at_mixture,
    "shift of the defaults": fixed_point.with_defaults,
    "errors are pulled back": fixed_point.pulled_back,
    "samplers reach the data": samplers_reach_the_data,
}
LAST: dict[str, Claim] = {"not reached by these": not_reached}


@dataclass(frozen=True)
class ConformanceReport:
    """The results of the claims on one part, and of mistakes planted in an objective.

    `objective` is the name of what was checked, of whichever kind it is.
    """

    objective: str
    results: tuple[ClaimResult, ...] = ()
    verdicts: tuple[Verdict, ...] = ()

    def problems(self) -> tuple[str, ...]:
        """The claims that fail and the mistakes that nothing rejects."""
        failed = [result.claim for result in self.results if result.status == "FAIL"]
        return (*failed, *(verdict.mutation for verdict in self.verdicts if verdict.survived))

    def json(self) -> str:
        """The report in strict JSON, which has no number for what is not finite.

        Such a `value` or `limit` is one of the strings "nan", "inf" and "-inf"; null means that
        nothing was measured.
        """
        report = {"passed": not self.problems(), **asdict(self)}
        for result in report["results"]:
            for name in ("value", "limit"):
                if result[name] is not None and not math.isfinite(result[name]):
                    result[name] = str(float(result[name]))
        return json.dumps(report, indent=2, allow_nan=False)


def check(
    name: str,
    file: Path | None = None,
    *,
    kind: str | None = None,
    bindings: Sequence[str] = (),
    mutations: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> ConformanceReport:
    """Check every claim on the part of this name, or plant every mistake in an objective.

    `bindings` in gin's syntax, such as "dumo.omega = 0.5", make it a variant, which the report
    names. `tell` gets the lines of the report. `file` is a Python file that is imported first.
    `kind` says which part is meant where the name is that of several.
    """
    load_plugins()
    if file is not None:
        import_file(file)
    found_kind = part_kinds.kind_of(name, kind)
    if found_kind is not registry.objectives:
        return _check_part(found_kind, name, bindings, mutations, tell)
    shown = f"{name} with {', '.join(bindings)}" if bindings else name
    with variant(name, bindings) as subject, warnings.catch_warnings(), _one_thread():
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        claims = claims_for(name)
        if mutations:
            quick = {name: claim for name, claim in claims.items() if name not in SLOW}
            found = []
            for verdict in verdicts(subject, quick):
                tell(_verdict_line(verdict))
                found.append(verdict)
            if not found:
                tell(f"{shown} has no part that a mistake could be planted in")
            return _closed(ConformanceReport(shown, verdicts=tuple(found)), tell)
        results = []
        for result in run(subject, claims):
            tell(_result_lines(result))
            results.append(result)
        return _closed(ConformanceReport(shown, results=tuple(results)), tell)


@contextmanager
def variant(name: str, bindings: Sequence[str]) -> Iterator[Subject]:
    """The objective of this name under bindings, in force inside the `with` block.

    ValueError for bindings that are wrong, or that change nothing of the objective.
    """
    if not bindings:
        yield subject_of(name)
        return
    with _bound(bindings):
        subject = subject_of(name, lambda: registry.objectives.build(name))
        _check_inert(registry.objectives, name, bindings)
        yield subject


@contextmanager
def _bound(bindings: Sequence[str]) -> Iterator[None]:
    """Bindings in force inside the `with` block."""
    for binding in bindings:
        if "=" not in binding:
            raise ValueError(f"{binding!r} is no binding; write one such as NAME.field = 0.5")
    with gin_setup.isolated() if bindings else nullcontext():
        if bindings:
            gin_setup.parse([], bindings)
        yield


def _check_inert(kind: Registry, name: str, bindings: Sequence[str]) -> None:
    """ValueError for bindings that change nothing of the part, which was made under them."""
    if bindings and (idle := gin_setup.inert_bindings()):
        raise ValueError(
            f"{', '.join(idle)} changes nothing of the {kind.kind} {name!r}. Bind a field of it, "
            f"such as {name}.field = VALUE, or of a part that is bound to a field"
        )


def _check_part(
    kind: Registry,
    name: str,
    bindings: Sequence[str],
    mutations: bool,
    tell: Callable[[str], None],
) -> ConformanceReport:
    if mutations:
        raise ValueError(
            f"mistakes are planted in objectives, and {name!r} is a {kind.kind}; leave out "
            "--mutations"
        )
    shown, results = f"{name} with {', '.join(bindings)}" if bindings else name, []
    with _bound(bindings), _one_thread():
        subject = part_kinds.subject_of(kind, name)
        _check_inert(kind, name, bindings)
        for result in part_kinds.results_of(kind, subject):
            tell(_result_lines(result))
            results.append(result)
    return _closed(ConformanceReport(shown, tuple(results)), tell)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread. Tensors are small here, so a second one would take a core for nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def claims_for(name: str) -> dict[str, Claim]:
    """Every claim for the objective of this name; a note on what they do not reach comes last."""
    return CLAIMS | SPECIAL.get(name, {}) | LAST


def subject_of(name: str, make: Callable[[], Any] | None = None) -> Subject:
    """The registered objective, by default with its defaults.

    ValueError if it declares something unknown.
    """
    cls = registry.objectives.get(name)
    try:
        objective = (make or cls)()
    except TypeError as error:
        raise ValueError(
            f"objective {name!r} cannot be made without arguments ({error}); "
            "give every field a default, which gin may then override"
        ) from error
    subject = Subject(name, make or cls)
    _check_declarations(name, objective, subject)
    return replace(subject, needs_labels=make is not None and _refuses_no_labels(subject))


def _check_declarations(name: str, objective: Any, subject: Subject) -> None:
    if subject.fixed_point not in FIXED_POINTS:
        raise ValueError(
            f"objective {name!r} declares fixed_point = {subject.fixed_point!r}; "
            f"allowed: {', '.join(FIXED_POINTS)}"
        )
    declared: Any = getattr(objective, "exact_with", {})
    several = declared if isinstance(declared, tuple | list) else (declared,)
    if not several or not all(isinstance(changes, Mapping) for changes in several):
        raise ValueError(
            f"objective {name!r} declares exact_with = {declared!r}; it needs a mapping such as "
            '{"clip": math.inf}, or a tuple of several, each of which makes it exact'
        )
    known = [f.name for f in fields(objective)] if is_dataclass(objective) else []
    unknown = {field for form in subject.forms() for field in form.exact_with()} - set(known)
    if unknown:
        raise ValueError(
            f"objective {name!r} names {', '.join(sorted(unknown))} in exact_with; "
            f"its fields are {', '.join(known) or 'none'}"
        )
    for key, value in getattr(objective, "exact_outputs", {}).items():
        if value not in VELOCITIES or key not in objective.heads or key in VELOCITIES:
            others = [head for head in objective.heads if head not in VELOCITIES]
            raise ValueError(
                f"objective {name!r} declares exact_outputs = {{{key!r}: {value!r}}}; it says of "
                f"its outputs beside u and v ({', '.join(others) or 'there are none'}) whether "
                'their exact value is "u" or "v"'
            )


def _refuses_no_labels(subject: Subject) -> bool:
    """Whether it takes labelled data alone, as with guidance on; a variant may be so."""
    try:
        subject.on_toy()(subject.batch(labels="none"))
    except ValueError as refusal:
        return "label" in str(refusal)
    return False


def run(subject: Subject, claims: dict[str, Claim]) -> Iterator[ClaimResult]:
    """All results, in order; where the first claim fails, nothing else can be tested."""
    first = run_claim(FIRST, claims[FIRST], subject)
    yield first
    if first.status != "FAIL":
        for name, claim in claims.items():
            if name != FIRST:
                yield run_claim(name, claim, subject)


def _closed(report: ConformanceReport, tell: Callable[[str], None]) -> ConformanceReport:
    """The same report. Without problems it gets a last line; the command names problems."""
    applied = [result for result in report.results if result.status == "ok"]
    if applied and not report.problems():
        seconds = sum(result.seconds for result in report.results)
        tell(f"{report.objective} meets {len(applied)} claims, in {seconds:.0f} s")
    return report


def _result_lines(result: ClaimResult) -> str:
    lines = [f"{result.status:<9} {result.claim:<36} {result.figure or result.reason}"]
    if result.status == "FAIL":
        lines += [f"{'':<10}reason: {result.reason}", f"{'':<10}hint:   {result.hint}"]
    return "\n".join(lines)


def _verdict_line(verdict: Verdict) -> str:
    if verdict.no_effect:
        return f"{'no effect':<9} {verdict.mutation}"
    status = "SURVIVED" if verdict.survived else "rejected"
    return f"{status:<9} {verdict.mutation:<42} {', '.join(verdict.killed_by)}"
