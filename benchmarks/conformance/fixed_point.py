"""The exact solution must be a fixed point that errors are pulled back to, in expectation.

Both are tested in every form that `exact_with` gives and at every stage of a schedule: the mean
gradient at the exact solution is zero (expected/moments.py), and beside it the loss falls towards
it (expected/pulls.py). At the exact solution for other data the mean gradient is not zero, as it
would be for a map that must only agree with itself. Where the fixed point is that of a law alone,
the exact map is still one of those that have the law, and an error in all calls is pulled back.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.conformance.expected.kinds import ALL
from benchmarks.conformance.expected.moments import (
    EPS,
    Bias,
    at_other_solution,
    largest,
    moments,
)
from benchmarks.conformance.expected.moments import measure as measure
from benchmarks.conformance.expected.pulls import (
    LIMIT,
    Pull,
    pulls,
    pulls_of_a_law,
    pulls_of_all_calls,
)
from benchmarks.conformance.results import Broken, ClaimResult, declared, held, note
from benchmarks.conformance.subject import GAUSSIAN, MIXTURE, Subject
from registry import samplers
from registry.sampling import MAP, MAPS, VELOCITY, needed_by, trained_by
from zoo.oracles import Oracle
from zoo.samplers import valid_samplers

NOT_FIXED = (
    "see which term is wrong with a sign or tangent changed (t=0 data, t=1 noise, x_r = x_t - "
    "(t-r) u). If a weight, clip or finite step biases it by design, name the fields that make it "
    "exact in exact_with; if it holds for distributions alone, set fixed_point"
)
NOT_FIXED_LAW = (
    "the mean over batches of the gradient is zero where samples and data have one law: leave out "
    "the pairs of a row with itself, and give attraction and repulsion the same weight"
)


def at_gaussian(subject: Subject) -> ClaimResult:
    return _fixed(subject, GAUSSIAN)


def at_mixture(subject: Subject) -> ClaimResult:
    """The same at a law that is skewed given x_t, and with labels."""
    return _fixed(subject, MIXTURE)


def with_defaults(subject: Subject) -> ClaimResult:
    """For the record: how far the default fields move the optimum."""
    if reason := inapplicable(subject):
        return declared(reason)
    if not subject.exact_with():
        return note("as above: the defaults are exact")
    found = largest(moments(subject, MIXTURE, exact=False, times=0.5))
    size = f"shift {found.shift:.1g} +- {found.error:.1g}"
    exact = ";".join(form.with_changes() for form in subject.forms())
    return note(f"z {found.z:.1f}: {size}, exact{exact}", found.z)


def pulled_back(subject: Subject) -> ClaimResult:
    """A prediction that is off by +-eps is pushed back, while its targets are exact.

    Where the fixed point is that of a law, all predictions are off. Where it is that of every row,
    the velocity is also trained at r = t if it is declared, a solution that is right for other data
    is no fixed point, and an error that targets have too is not pushed away.
    """
    if reason := inapplicable(subject):
        return declared(reason)
    of_a_law = subject.fixed_point == "distribution"
    by_form = {f: [*(pulls_of_a_law if of_a_law else pulls)(f)] for f in subject.forms()}
    found = [pull for pulls_of_form in by_form.values() for pull in pulls_of_form]
    for key in subject.exact_outputs:
        if not any(pull.key == key for pull in found):
            raise Broken(f"an error in {key!r} changes no gradient", "train it in every batch")
    _check_signs(found)
    if not of_a_law:
        _check_maps(subject, found)
        _check_velocity(subject, found)
        _check_anchor(subject)
        _check_all_calls(by_form)
    weakest = min(pull.z for pull in found if not of_a_law or pull.kind == ALL)
    num = sum(pull.kind == ALL for pull in found)
    return held(f"{num} predictions, z {weakest:.0f} > {LIMIT:.0f}", weakest, LIMIT)


def inapplicable(subject: Subject) -> str:
    """Why there is no fixed point to test; "" where there is one."""
    if subject.fixed_point == "none":
        return "fixed_point = 'none'"
    if subject.changes_coupling:
        return "a part couples data and noise, which changes the velocity"
    if unknown := set(subject.make().heads) - set(subject.exact_outputs):
        return f"no exact {', '.join(sorted(unknown))} is known: say it in exact_outputs"
    return ""


def _fixed(subject: Subject, law: Oracle) -> ClaimResult:
    if reason := inapplicable(subject):
        return declared(reason)
    by_form = {form: _largest_in(form, law) for form in subject.forms()}
    found = largest(by_form.values())
    failing = [form for form, bias in by_form.items() if bias is found and not bias.z < LIMIT]
    forms = (form.with_changes() for form in failing or by_form)
    changes = ";".join(text for text in dict.fromkeys(forms) if text)
    size = f"shift {found.shift:.1g} +- {found.error:.1g}{',' if changes else ''}{changes}"
    if not failing:
        return held(f"z {found.z:.1f} < {LIMIT:.0f}: {size}", found.z, LIMIT)
    return ClaimResult(
        status="FAIL",
        figure=f"z {found.z:.1f} >= {LIMIT:.0f}: {size}",
        value=found.z,
        limit=LIMIT,
        reason=f"the exact solution is no fixed point: {found.output!r} is pulled off by about "
        f"{found.shift:.2g}{_within(found.kind, found.step)}",
        hint=NOT_FIXED_LAW if subject.fixed_point == "distribution" else NOT_FIXED,
    )


def _largest_in(subject: Subject, law: Oracle) -> Bias:
    """The largest bias of one form; one that may be chance is drawn again, with more rows."""
    found = moments(subject, law)
    suspects = {bias.name for bias in found if not bias.z < LIMIT}
    if suspects and largest(found).z < 2 * LIMIT:
        again = moments(subject, law, times=2, seed=1000)
        found = [bias for bias in again if bias.name in suspects] or found
    return largest(found)


def _check_signs(found: list[Pull]) -> None:
    """Every prediction is pushed back. Of a law, it is all rows together that are.

    Its rows of one kind may say too little, but they must not say the opposite.
    """
    for pull in found:
        least = -LIMIT if pull.diagonal is None and pull.kind != ALL else LIMIT
        if not pull.z > least:
            side = {None: "", True: " at r = t", False: " at r < t"}[pull.diagonal]
            raise Broken(
                f"an error of {EPS} in {pull.key!r}{side}{_within(pull.kind, pull.step)} is not "
                f"pushed back: z {pull.z:.1f}",
                "the loss must fall towards the target: || prediction - sg target ||^2",
            )


def _check_maps(subject: Subject, found: list[Pull]) -> None:
    valid = valid_samplers(subject.make())
    needs_map = [n for n in valid if {*needed_by(samplers.get(n))} & {*MAPS}]
    if needs_map and not any(pull.key == "u" and not pull.diagonal for pull in found):
        raise Broken(
            f"u is trained at r = t alone, but the sampler {needs_map[0]!r} needs r < t",
            'train u at r < t, or declare trains = ("velocity",)',
        )


def _check_velocity(subject: Subject, found: list[Pull]) -> None:
    """Where u gives the velocity, it is trained at r = t, or as the map at every r < t."""
    objective = subject.make()
    trained = trained_by(objective)
    if VELOCITY not in trained or MAP in trained or "v" in objective.heads:
        return
    if not any(pull.key == "u" and pull.diagonal for pull in found):
        raise Broken(
            "`trains` names the velocity, and an error of u at r = t changes no gradient",
            "train u at r = t, as by || u(x_t, t, t) - v ||^2, or leave 'velocity' out of `trains`",
        )


def _check_anchor(subject: Subject) -> None:
    """Targets come from the data: the exact solution for other data is no fixed point."""
    found = (bias for form in subject.forms() for bias in at_other_solution(form))
    if not any(bias.z > LIMIT for bias in found):
        raise Broken(
            "the exact solution for other data is a fixed point too: the loss does not pull it to "
            "these data",
            "anchor it: some target must hold the velocity of the data, x1 - x0, or that of a "
            "trained teacher",
        )


def _check_all_calls(by_form: Mapping[Subject, list[Pull]]) -> None:
    for form, found in by_form.items():
        for pull in pulls_of_all_calls(form, found):
            if pull.z < -LIMIT:
                raise Broken(
                    f"an error of {EPS} in {pull.key!r} that its targets have too"
                    f"{_within(pull.kind, pull.step)} is pushed away: z {pull.z:.1f}",
                    "a target must be nearer to the data than its prediction: at a time m < t",
                )


def _within(kind: str, step: int) -> str:
    return ("" if kind == ALL else f", in {kind}") + (f", at step {step}" if step else "")
