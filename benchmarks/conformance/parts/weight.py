"""Claims about a weight, which makes the loss of a row from its squared error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from backbones.mlp import MLP
from backbones.network import build_network
from benchmarks.conformance.parts.part import (
    F32,
    F64,
    Claims,
    Part,
    check_tensor,
    check_unchanged,
    check_untouched,
    generator,
    normal,
)
from benchmarks.conformance.results import Broken, ClaimResult, compared, declared, held
from trainers.derivative_probe import perturbed

ERRORS = (0.0, 1e-8, 1e-4, 1e-2, 0.1, 0.5, 1.0, 3.0, 10.0, 100.0)
SIZE = 3
ROWS = "the loss of a row is made of its own error and its own outputs: no mean over rows"


class Outputs(Mapping[str, Tensor]):
    """A network's outputs, which remembers what was read."""

    def __init__(self, values: Mapping[str, Tensor]):
        self.values_by_key, self.read = values, set[str]()

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return self.values_by_key[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_key)

    def __len__(self) -> int:
        return len(self.values_by_key)


def one_loss_per_row(part: Part) -> ClaimResult:
    """The loss is one finite number for each row, in the precision of the error."""
    for dtype in (F32, F64):
        for n in (1, 2, len(ERRORS)):
            error = _errors(dtype)[-n:]
            loss = part.make()(error, _outputs(part, n, dtype))
            check_tensor(f"the loss of {n} rows", loss, (n,), dtype)
            if not loss.isfinite().all():
                raise Broken(
                    f"for errors {error.tolist()} the loss is {loss.tolist()}",
                    "look for 0/0, the logarithm of 0, and a spread over one row",
                )
    return held(f"errors from 0 to {ERRORS[-1]:g}")


def reads_its_heads(part: Part) -> ClaimResult:
    """It reads the outputs that it names in `heads`, and no others."""
    weight = part.make()
    heads = type(weight).heads
    out = Outputs(_outputs(part, len(ERRORS), F64))
    try:
        weight(_errors(), out)
    except KeyError as error:
        raise Broken(
            f"it reads the output {error.args[0]!r}, and heads is {heads}",
            "name every output that it reads: heads: ClassVar = ('logvar',)",
        ) from error
    if unread := [key for key in heads if key not in out.read]:
        raise Broken(
            f"it names {', '.join(map(repr, unread))} in heads and does not read it",
            "a network would get an output that nothing trains: leave it out of heads",
        )
    return held(", ".join(heads) or "none")


def rows(part: Part) -> ClaimResult:
    """A row's loss depends on its own error and outputs alone."""
    weight = part.make()
    if getattr(weight, "couples_rows", False):
        return declared("couples_rows")
    n = len(ERRORS)
    error, out = _errors(), _outputs(part, n, F64)
    whole, change = weight(error, out), 0.0
    for row in range(n):
        others = torch.arange(n) != row
        moved = torch.where(others, error + 0.3, error)
        mixed = {key: torch.where(_mask(others, v), v + 0.3, v) for key, v in out.items()}
        alone = weight(error[row : row + 1], {key: v[row : row + 1] for key, v in out.items()})
        for found in (weight(moved, mixed)[row], alone[0]):
            change = max(change, float((found - whole[row]).abs() / (whole[row].abs() + 1e-3)))
    return compared(
        "change",
        change,
        1e-9,
        "a row's loss depends on the other rows",
        f"{ROWS}; declare couples_rows = True if it is meant",
    )


def pulls_errors_down(part: Part) -> ClaimResult:
    """The loss grows with the error: its slope is positive and finite, at zero too."""
    least, most = float("inf"), 0.0
    error = _errors().requires_grad_()
    loss = part.make()(error, _outputs(part, len(ERRORS), F64))
    if not loss.requires_grad:
        raise Broken(
            "the loss has no gradient in the error",
            "detach the factor alone: error / (error.detach() + offset)",
        )
    (slopes,) = torch.autograd.grad(loss.sum(), error)
    for value, found in zip(ERRORS, slopes.tolist(), strict=True):
        if not 0 < found < float("inf"):
            raise Broken(
                f"the slope of the loss in the error is {found:.3g} where the error is {value:g}",
                "sqrt and powers below 1 have no slope at 0 (add an offset); a slope of 0 trains "
                "nothing, and a negative one makes errors larger",
            )
        least, most = min(least, found), max(most, found)
    return held(f"slopes from {least:.3g} to {most:.3g}")


def draws_nothing(part: Part) -> ClaimResult:
    """The same error gives the same loss; nothing is drawn and nothing is changed in place."""
    weight, error, out = part.make(), _errors(), _outputs(part, len(ERRORS), F64)
    given = {"the error": error, **{f"the output {key!r}": value for key, value in out.items()}}
    before = {name: value.clone() for name, value in given.items()}
    first, again = weight(error, out).clone(), weight(error, out)
    check_unchanged("the weight", before, given)
    if not torch.equal(first, again):
        raise Broken("two calls differ", "keep no counter or running mean in the weight")
    check_untouched("the weight", lambda: weight(error, out))
    return held("bit-equal")


CLAIMS: Claims = {
    "reads the outputs in heads": reads_its_heads,
    "one loss per row": one_loss_per_row,
    "draws and changes nothing": draws_nothing,
    "rows are independent": rows,
    "larger errors cost more": pulls_errors_down,
}


def _errors(dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(ERRORS, dtype=dtype)


def _outputs(part: Part, n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The outputs that the weight names, of a random network."""
    heads: tuple[str, ...] = type(part.make()).heads
    if not heads:
        return {}

    def trunk(**given: Any) -> MLP:
        return MLP(dim=16, depth=1, **given)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = perturbed(build_network(trunk, (SIZE,), 0, heads), torch.device("cpu"))
    t = torch.rand(n, generator=generator())
    with torch.no_grad():
        out = net(normal(n, SIZE, dtype=F32), t, t / 2, None)
    return {key: out[key].to(dtype) for key in heads}


def _mask(rows: Tensor, value: Tensor) -> Tensor:
    return rows.reshape(-1, *[1] * (value.ndim - 1))
