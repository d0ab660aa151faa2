"""Claims about a network, seen from outside: those that backbones and heads share."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.conformance.parts.networks.built import NUM_CLASSES, Built, together
from benchmarks.conformance.parts.part import F32, F64, check_untouched, distance
from benchmarks.conformance.results import Broken, ClaimResult, compared, declared, held
from registry.protocols import NULL_LABEL

ROWS = NUM_CLASSES + 1
MATTERS = 1e-6  # the least change, relative to the outputs, that counts as one


def outputs(built: Built) -> ClaimResult:
    """Each output has the shape of the data, or one number a row, and the dtype of x."""
    net = built.awake()
    for n in (ROWS, 1):
        for dtype in (F32, F64):
            x, t, r, cond = built.inputs(n, dtype)
            for key, found in built.outputs(net, x, t, r, cond).items():
                shapes = [tuple(x.shape)] + [(n,)] * (key not in built.of_states)
                if not isinstance(found, Tensor) or tuple(found.shape) not in shapes:
                    given = list(getattr(found, "shape", ())) or type(found).__name__
                    raise Broken(
                        f"{key!r} is {given} for x {list(x.shape)}",
                        f"give {' or '.join(str(list(shape)) for shape in shapes)}",
                    )
                if found.dtype != dtype:
                    raise Broken(
                        f"{key!r} is {found.dtype} for x in {dtype}",
                        "outputs have the dtype of x, whichever that of the weights is",
                    )
    return held(", ".join(built.keys))


def starts_at_zero(built: Built) -> ClaimResult:
    """Every output of a new network is zero."""
    out = built.outputs(built.fresh(), *built.inputs(ROWS))
    largest = {key: float(value.abs().max()) for key, value in out.items()}
    key = max(largest, key=lambda k: largest[k])
    return compared(
        "|output|",
        largest[key],
        1e-6,
        f"a new network does not start at zero: {key!r}",
        "the last layer of each readout has zero weight and bias (backbones.embeddings.zero_)",
    )


def finite(built: Built) -> ClaimResult:
    """Outputs and their slopes are finite at the ends of time, at x = 0 and at large x."""
    net = built.awake()
    x, _, _, cond = built.inputs(4)
    t, r = torch.tensor([0.0, 1.0, 1.0, 1e-4]), torch.tensor([0.0, 0.0, 1.0, 0.0])
    for scale in (0.0, 1.0, 30.0):
        given = (scale * x).requires_grad_()
        out = net(given, t, r, cond)
        values = together({key: out[key] for key in built.keys})
        slopes = [torch.zeros(())]
        if values.requires_grad:
            slopes = list(
                torch.autograd.grad(values.sum(), [given, *_trained(net)], allow_unused=True)
            )
        for what, figures in (("outputs", [values]), ("gradients", slopes)):
            if not all(figure.isfinite().all() for figure in figures if figure is not None):
                raise Broken(
                    f"{what} are not finite at times 0 and 1 with x of size {scale:g}",
                    "no division by t, r or t - r, and an epsilon in every norm",
                )
    return held("t and r in {0, 1}, |x| from 0 to 30")


def rows(built: Built) -> ClaimResult:
    """In evaluation mode an output depends on its own row alone."""
    if getattr(built.own(built.awake()), "couples_rows", False):
        return declared("couples_rows")
    net, dtype = built.precise()
    x, t, r, cond = built.inputs(ROWS, dtype)
    other, t2, r2, _ = built.inputs(ROWS, dtype, seed=1)
    other[1], t2[1], r2[1] = x[1], t[1], r[1]
    whole = together(built.outputs(net, x, t, r, cond))[1]
    alone = tuple(value[1:2] for value in (x, t, r))
    label = cond["label"]
    found = (
        together(
            built.outputs(
                net,
                other,
                t2,
                r2,
                {"label": label.roll(1).index_fill(0, torch.tensor([1]), int(label[1]))},
            )
        )[1],
        together(built.outputs(net, *alone, {"label": label[1:2]}))[0],
    )
    change = max(distance(one, whole) for one in found) / float(whole.abs().max().clamp_min(1e-12))
    return compared(
        "change",
        change,
        1e-9 if dtype == F64 else 1e-4,
        "outputs of a row change with the other rows",
        "normalise within each row (layer_norm, group_norm), or declare couples_rows = True",
    )


def deterministic(built: Built) -> ClaimResult:
    """In evaluation mode the same inputs give the same outputs, and nothing is drawn."""
    net, inputs = built.awake(), built.inputs(ROWS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = together(built.outputs(net, *inputs))
        torch.manual_seed(1)
        again = together(built.outputs(net, *inputs))
    if not torch.equal(first, again):
        raise Broken(
            f"two calls in evaluation mode differ by {distance(first, again):.2g}",
            "dropout and noise are for self.training alone; keep no running state",
        )
    check_untouched("the network in evaluation mode", lambda: built.outputs(net, *inputs))
    return held("bit-equal")


def autocast(built: Built) -> ClaimResult:
    """Under autocast to bfloat16 the outputs are finite, in the dtype of x, and near to float32."""
    net, inputs = built.awake(), built.inputs(ROWS)
    plain = together(built.outputs(net, *inputs))
    with torch.autocast("cpu", torch.bfloat16):
        out = built.outputs(net, *inputs)
    for key, value in out.items():
        if value.dtype != F32:
            raise Broken(f"{key!r} is {value.dtype} under autocast", "outputs have the dtype of x")
    return compared(
        "change",
        distance(together(out), plain) / float(plain.abs().max().clamp_min(1e-12)),
        0.25,
        "outputs under autocast to bfloat16 are far from those in float32, or not finite",
        "compute times, norms and exponentials in float32 (backbones.embeddings.full_precision)",
    )


def parameters_are_trained(built: Built) -> ClaimResult:
    """A gradient reaches every parameter."""
    net = built.awake()
    out = net(*built.inputs(2 * ROWS))
    own = dict(built.own(net).named_parameters())
    trained = {name: p for name, p in own.items() if p.requires_grad}
    total = sum(out[key].square().sum() for key in built.keys)
    if not (isinstance(total, Tensor) and total.requires_grad):
        raise Broken("the outputs have no gradient", "no .detach() and no torch.no_grad() inside")
    found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    dead = [
        name
        for name, gradient in zip(trained, found, strict=True)
        if gradient is None or not gradient.abs().sum() > 0
    ]
    if dead:
        raise Broken(
            f"no gradient reaches {len(dead)} of {len(trained)} parameters: {', '.join(dead[:4])}"
            + ", ..." * (len(dead) > 4),
            "use each parameter, make it where it is used, or freeze it by requires_grad_(False)",
        )
    return held(f"{len(trained)} tensors, {sum(p.numel() for p in trained.values()):,} numbers")


def labels(built: Built) -> ClaimResult:
    """Labels matter where there are classes, the null label is one more; none are accepted too."""
    net = built.awake()
    x, t, r, _ = built.inputs(1)

    def at(label: int) -> Tensor:
        return together(built.outputs(net, x, t, r, {"label": torch.tensor([label])}))

    found = {label: at(label) for label in (NULL_LABEL, *range(NUM_CLASSES))}
    size = max(float(value.abs().max()) for value in found.values())
    closest = min(
        (distance(found[one], found[other]) / max(size, 1e-12), one, other)
        for one in found
        for other in found
        if one < other
    )
    gap, one, other = closest
    names = [
        "the null label" if label == NULL_LABEL else f"label {label}" for label in (one, other)
    ]
    if not gap > MATTERS:
        raise Broken(
            f"outputs for {names[0]} and {names[1]} are the same, with {NUM_CLASSES} classes",
            "embed cond['label'], and NULL_LABEL = -1 as a row of its own: "
            "backbones.embeddings.LabelEmbedding does both",
        )
    without = built.awake(num_classes=0)
    for cond in (None, {}, {"label": torch.tensor([1]), "unknown": torch.zeros(1, 2)}):
        built.outputs(net, x, t, r, cond)
        same = distance(
            together(built.outputs(without, x, t, r, cond)),
            together(built.outputs(without, x, t, r, None)),
        )
        if not same < MATTERS:
            raise Broken(
                "without classes the outputs change with conditions",
                "a network ignores the conditions that it does not take",
            )
    return held(f"outputs differ by {gap:.2g} and more")


def change_with(built: Built, which: str, keys: tuple[str, ...] = ()) -> float:
    """How much the outputs of the awake network change with x, t or r, relative to their size."""
    net = built.awake(keys=keys)
    x, t, r, cond = built.inputs(ROWS)
    moved = {"x": (x.flip(0), t, r), "t": (x, 0.5 * (t + 1), r), "r": (x, t, 0.3 * r)}[which]
    with torch.no_grad():
        one, other = (together(net(*given, cond)) for given in ((x, t, r), moved))
    return distance(one, other) / max(float(one.abs().max()), 1e-12)


def _trained(net: torch.nn.Module) -> list[Tensor]:
    return [p for p in net.parameters() if p.requires_grad]
