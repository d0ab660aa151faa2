"""The conformance suite over every registered objective: registering is enrolling.

What the claims are, and what makes them fail, is in benchmarks/conformance; the variants are the
settings of the zoo's own objectives that change which mathematics is at work.
"""

from __future__ import annotations

from functools import partial

import pytest
from objective_cases import watch

from benchmarks.conformance import fixed_point, mutations
from benchmarks.conformance.report import SLOW, claims_for, subject_of
from benchmarks.conformance.results import run_claim
from benchmarks.conformance.subject import STEPS, Subject
from benchmarks.conformance.verdicts import verdict
from registry import objectives
from zoo.couplings import MinibatchOT
from zoo.objectives.consistency import Consistency
from zoo.objectives.decm import DECM
from zoo.objectives.decoupled_mean_flow import DecoupledMeanFlow
from zoo.objectives.drifting import Drifting
from zoo.objectives.dumo import DuMo
from zoo.objectives.facm import FACM
from zoo.objectives.flow_matching import FlowMatching
from zoo.objectives.mean_flow import MeanFlow
from zoo.objectives.moment_matching import MomentMatching
from zoo.objectives.self_distillation import SelfDistillation
from zoo.objectives.shortcut import Shortcut
from zoo.objectives.trig_consistency import TrigConsistency
from zoo.paths import Linear, TrigFlow
from zoo.points.velocities import FromTeacher, Own, PlugIn
from zoo.residuals import Exact
from zoo.teachers import EmaTeacher, Frozen
from zoo.times import BetaPair, LogitNormal, Progressive, UniformPair
from zoo.weighting import Adaptive, LearnedLogvar, PseudoHuber, Unweighted

VARIANTS = {
    "flow_matching_logvar": lambda: FlowMatching(weight=LearnedLogvar(), times=LogitNormal()),
    "flow_matching_ot": lambda: FlowMatching(coupling=MinibatchOT()),
    "flow_matching_trigflow": lambda: FlowMatching(path=TrigFlow()),
    "mean_flow_trigflow": lambda: MeanFlow(path=TrigFlow(), weight=Unweighted()),
    "mean_flow_huber": lambda: MeanFlow(weight=PseudoHuber(), times=UniformPair()),
    "mean_flow_own": lambda: MeanFlow(velocity=Own()),
    "mean_flow_distilled": lambda: MeanFlow(velocity=FromTeacher(), teacher=Frozen()),
    "mean_flow_progressive": lambda: MeanFlow(times=Progressive()),
    "mean_flow_plug_in": lambda: MeanFlow(velocity=PlugIn()),
    "shortcut_adaptive": lambda: Shortcut(weight=Adaptive(), bootstrap_fraction=0.5),
    "dumo_exact": lambda: DuMo(residual=Exact(), clip_by="rms", weight_u=Adaptive()),
    "dumo_zero": lambda: DuMo(times=BetaPair(r_law="zero"), weight_v=LearnedLogvar()),
    "dumo_distilled": lambda: DuMo(
        velocity=FromTeacher(), teacher=Frozen(), direction="guided", residual=Exact()
    ),
    "consistency_distilled": lambda: Consistency(
        velocity=FromTeacher(), teacher=Frozen(), target=EmaTeacher(), heun=True
    ),
    "trig_consistency_distilled": lambda: TrigConsistency(
        velocity=FromTeacher(), teacher=Frozen(), path=Linear(), times=LogitNormal(mean=-1, std=1.4)
    ),
    "decoupled_mean_flow_own": lambda: DecoupledMeanFlow(velocity=Own(), weight=Unweighted()),
    "decoupled_mean_flow_distilled": lambda: DecoupledMeanFlow(
        velocity=FromTeacher(), teacher=Frozen()
    ),
    "decm_distilled": lambda: DECM(teacher=Frozen(), cosine_weight=1.0),
    "facm_distilled": lambda: FACM(velocity=FromTeacher(), teacher=Frozen()),
    "facm_own": lambda: FACM(velocity=Own()),
    "decm_ema": lambda: DECM(teacher=EmaTeacher(), n2n_every=1, start_decay_steps=0),
    "self_distillation_esd": lambda: SelfDistillation(kind="esd"),
    "self_distillation_psd": lambda: SelfDistillation(kind="psd"),
    "self_distillation_full": lambda: SelfDistillation(gradient="full"),
    "self_distillation_esd_full": lambda: SelfDistillation(kind="esd", gradient="full"),
    "self_distillation_psd_full": lambda: SelfDistillation(
        kind="psd", gradient="full", split="midpoint"
    ),
    "moment_matching_labelled": lambda: MomentMatching(label_dropout=0.0, path=TrigFlow()),
    "drifting_one_softmax": lambda: Drifting(group=32, over_samples=False),
}
SLOW_VARIANTS = {name for name in VARIANTS if name.startswith(("self_distillation", "facm"))}
SUBJECTS = {name: subject_of(name) for name in objectives.names()}
SUBJECTS |= {name: Subject(objectives.name_of(make()), make) for name, make in VARIANTS.items()}
# What a claim is excused from, so that nothing can stop being tested unnoticed.
COUPLED = {
    "rows are independent",
    "fixed point at a Gaussian",
    "fixed point at a skewed mixture",
    "shift of the defaults",
    "errors are pulled back",
    "samplers reach the data",
    "loss floor",
}
OTHER_VELOCITY = {"loss floor", "flow matching at r = t"}
NO_DERIVATIVE = {"derivatives agree"}
EXCUSED = {
    "flow_matching": NO_DERIVATIVE,
    "flow_matching_logvar": NO_DERIVATIVE,
    "flow_matching_ot": COUPLED | NO_DERIVATIVE,
    "flow_matching_trigflow": NO_DERIVATIVE | {"loss floor"},
    "mean_flow_trigflow": {"loss floor"},
    "mean_flow_own": OTHER_VELOCITY,
    "mean_flow_distilled": OTHER_VELOCITY,
    "mean_flow_plug_in": COUPLED | OTHER_VELOCITY,
    "dumo_distilled": {"rcgm tends to the derivative", "order changes nothing at the truth"},
    "dumo_exact": {"rcgm tends to the derivative", "order changes nothing at the truth"},
    "self_distillation_psd": NO_DERIVATIVE,
    "self_distillation_psd_full": NO_DERIVATIVE,
    "shortcut": NO_DERIVATIVE,
    "so_flow": NO_DERIVATIVE,
    "consistency": NO_DERIVATIVE,
    "consistency_distilled": NO_DERIVATIVE,
    "shortcut_adaptive": NO_DERIVATIVE,
    "moment_matching": NO_DERIVATIVE | {"rows are independent"},
    "moment_matching_labelled": NO_DERIVATIVE,
    "drifting": NO_DERIVATIVE,
    "drifting_one_softmax": NO_DERIVATIVE,
}
TANGENTS = {
    "tangents (v, 0, 1)",
    "tangents (v, 1, 1)",
    "tangents (v, 0, 0)",
    "tangents (0, 1, 0)",
    "derivative with the other sign",
}
GAP, LEAK, TEACHER = "t - r fed where r is expected", "no stop-gradient", "teacher at swapped times"
LATER = "later steps of a teacher at its first t"
CLAMP, RECOMBINED = "finite difference with the wrong clamp", mutations.RECOMBINED
PLANTED = {
    "flow_matching": set(),
    "mean_flow": {*TANGENTS, GAP, LEAK, RECOMBINED, TEACHER, LATER},
    "improved_mean_flow": {*TANGENTS, GAP, LEAK, RECOMBINED},
    "self_distillation": {*TANGENTS, GAP, LEAK, TEACHER, LATER, RECOMBINED},
    "shortcut": {GAP, LEAK, TEACHER, LATER},
    "so_flow": {GAP, LEAK, TEACHER, LATER, RECOMBINED},
    "consistency": {GAP, LEAK, TEACHER, LATER, RECOMBINED},
    "trig_consistency": {*TANGENTS, GAP, LEAK, TEACHER, LATER, RECOMBINED},
    "decoupled_mean_flow": {*TANGENTS, GAP, LEAK, RECOMBINED, TEACHER, LATER},
    "pixel_mean_flow": {*TANGENTS, GAP, LEAK, RECOMBINED},
    "terminal_velocity": {*TANGENTS, GAP, LEAK, TEACHER, LATER, RECOMBINED},
    "alpha_flow": {*TANGENTS, GAP, LEAK, TEACHER, LATER, RECOMBINED},
    "facm": {*TANGENTS, GAP, LEAK, TEACHER, LATER, RECOMBINED},
    "moment_matching": {GAP, LEAK, TEACHER, LATER, RECOMBINED},
    "drifting": {GAP},
    "dumo": {*TANGENTS, GAP, LEAK, TEACHER, LATER, CLAMP, RECOMBINED},
    "recursive_consistency": {*TANGENTS, GAP, LEAK, TEACHER, LATER, CLAMP, RECOMBINED},
    "twin_flow": {*TANGENTS, GAP, LEAK, TEACHER, LATER, CLAMP, RECOMBINED},
    "decm": {
        *TANGENTS,
        GAP,
        LEAK,
        TEACHER,
        LATER,
        RECOMBINED,
        "lam and gamma swapped in the tangents",
    },
}
# Asked for velocities alone, at r = t, or once; and MeanFlow and DMF ask for nothing.
# Of the tangents (0, 0, 1) one mistake leaves what they are.
ALONG_R = {TEACHER, LATER, "tangents (0, 1, 0)"}
NO_EFFECT = {
    "alpha_flow": {TEACHER, LATER},
    "decm": {TEACHER},
    "facm": {TEACHER, LATER},
    "decoupled_mean_flow": {TEACHER, LATER},
    "mean_flow": {TEACHER, LATER},
    "self_distillation": ALONG_R,
    "so_flow": {LATER},
    "terminal_velocity": ALONG_R,
    "consistency": {LATER},
    "trig_consistency": {TEACHER, LATER},
    "moment_matching": {LATER},
}
KILLERS = {
    LEAK: "no gradient through targets",
    TEACHER: "calls within 0 <= r <= t <= 1",
    CLAMP: "rcgm tends to the derivative",
    RECOMBINED: "samplers reach the data",
}


# What a claim costs is paid for every objective and every variant of one. By default what is a mean
# over many batches is taken at one stage of each schedule, and of a variant in few blocks; a
# mixture, whose map takes a solver, and what variants share with their objective have witnesses
# alone. The slow tests leave out the mixture of variants and nothing else.
MEANS = ("fixed point at a Gaussian", "errors are pulled back")
OF_OBJECTIVES = ("errors are pulled back", "samplers reach the data", "not reached by these")
WITNESSES = {
    ("flow_matching", "fixed point at a skewed mixture"),
    ("flow_matching", "shift of the defaults"),
    ("flow_matching_trigflow", "samplers reach the data"),
}
FEW_BLOCKS = 1 / 3  # of the usual ones
MIDST = STEPS[2]  # of the schedules: what begins with a run has begun, and what ends goes on


def by_default(name, claim):
    dear = claim in SLOW or (name in VARIANTS and claim in OF_OBJECTIVES)
    return not dear or (name, claim) in WITNESSES


def cases(*, whole):
    for name, subject in SUBJECTS.items():
        for claim in claims_for(subject.name):
            reduced = claim in MEANS or not by_default(name, claim) or claim in SLOW
            mixture_of_a_variant = name in VARIANTS and claim in SLOW
            if (reduced and not mixture_of_a_variant) if whole else by_default(name, claim):
                marks = [pytest.mark.slow] if name in SLOW_VARIANTS else []
                yield pytest.param(name, claim, id=f"{name}-{claim.replace(' ', '_')}", marks=marks)


@pytest.mark.parametrize(("name", "claim"), cases(whole=False))
def test_objective_meets_claim(name, claim, monkeypatch):
    if claim in MEANS:
        monkeypatch.setattr(Subject, "stages", lambda self, *, exact: (MIDST,))
    if claim in SLOW or name in VARIANTS:
        few = partial(fixed_point.moments, times=FEW_BLOCKS)
        monkeypatch.setattr(fixed_point, "moments", few)
    check_claim(name, claim)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "claim"), cases(whole=True))
def test_objective_meets_claim_at_every_stage_and_in_all_blocks(name, claim):
    check_claim(name, claim)


def check_claim(name, claim):
    subject = SUBJECTS[name]
    result = run_claim(claim, claims_for(subject.name)[claim], subject)
    assert result.status != "FAIL", f"{result.figure}\n{result.reason}\n{result.hint}"
    assert (result.status == "declared") == (claim in EXCUSED.get(name, ())), result.reason


@pytest.mark.parametrize("name", objectives.names())
def test_times_of_the_rows_are_reported(name):
    """So that a loss that is not finite can name its rows."""
    seen = watch(objectives.get(name)(), n=12)
    call, n = seen.trained(), len(seen.batch)
    clusters = zip(call.t.split(n), call.r.split(n), strict=True)
    assert any(seen.out.t.equal(t) and seen.out.r.equal(r) for t, r in clusters)


def claim_against(name, mutation):
    """The claim that must reject the mistake, by its name."""
    killer = KILLERS.get(mutation, "fixed point at a Gaussian")
    # The exact form of these takes no teacher's steps.
    if name in ("dumo", "recursive_consistency", "twin_flow") and mutation == LATER:
        killer = "order changes nothing at the truth"
    if name == "drifting" and mutation == GAP:
        killer = "fixed point at a skewed mixture"  # all samples at the mean, which is a law
    return {killer: claims_for(name)[killer]}


def covering():
    """For each objective one or two mistakes that it is to reject; all are in somebody's list."""
    able = {n: PLANTED[n] - NO_EFFECT.get(n, set()) for n in objectives.names()}
    chosen = {name: [] for name in able}
    for mistake in [mutation.name for mutation in mutations.MUTATIONS]:
        least = min((n for n in able if mistake in able[n]), key=lambda n: len(chosen[n]))
        chosen[least].append(mistake)
    return {name: mistakes or sorted(able[name])[:1] for name, mistakes in chosen.items()}


def plant(name, rejecting):
    """Plant every mistake, and see the claims reject these."""
    planted = set()
    for mutation in mutations.MUTATIONS:
        wanted = mutation.name in rejecting
        claims = claim_against(name, mutation.name) if wanted else {}
        found = verdict(mutation, SUBJECTS[name], claims)
        if found is not None:
            planted.add(mutation.name)
            assert found.no_effect == (mutation.name in NO_EFFECT.get(name, ())), found
            assert not (wanted and found.survived), found
    assert planted == PLANTED[name]


@pytest.mark.parametrize("name", objectives.names())
def test_planted_mistakes_have_an_effect_and_some_are_rejected_by_their_claims(name, monkeypatch):
    monkeypatch.setattr(Subject, "stages", lambda self, *, exact: (MIDST,))
    plant(name, covering()[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", objectives.names())
def test_every_planted_mistake_is_rejected_by_its_claim(name):
    plant(name, PLANTED[name])
