"""The contracts between the parts; see each class for shapes, units and ranges.

    methods        a method of training: an objective and its parts, a sampler
    derivatives    a derivative of the network
    networks       a network, and the backbone, the heads and the parametrisation that make it
    batches        what an objective is given and what it returns
    data           data sets, and the VAEs whose latents are data
    runs           what surrounds a run: engine, optimizer, metric, recorder, launcher, pruner
    capabilities   what a part of a run may declare beside its contract, and the defaults
    parts          any part: its source, and the parts inside it

Time runs from t=0 (data) to t=1 (noise); `0 <= r <= t <= 1`, float32, shape [b]. `v` is the
velocity dx/dt at t, `u` the average velocity over [r, t]: `x_r = x_t - (t - r) u`.

People import from here; the modules of this folder import each other directly.
"""

from __future__ import annotations

from registry.differentiation import differentiated_by, trains_derivative
from registry.protocols.batches import (
    NULL_LABEL,
    Batch,
    Cond,
    LossOutput,
    Share,
    rows_of,
    to_device,
)
from registry.protocols.capabilities import (
    better_of,
    check_batch,
    groups_by_label,
    has_whole_weights,
    is_serial,
    keeps_records,
    provider_files,
    runs_in_several_processes,
    scaled_by,
    store_of,
)
from registry.protocols.data import Coded, Dataset, Shareable, Vae
from registry.protocols.derivatives import (
    Derivative,
    DifferentiableDerivative,
    JointDerivative,
)
from registry.protocols.methods import (
    Coupling,
    Draw,
    Features,
    GuidanceLaw,
    Objective,
    Path,
    PathSample,
    Residual,
    Sampler,
    Teacher,
    TimeLaw,
    TransparentTeacher,
    VelocityEstimator,
    Weight,
)
from registry.protocols.networks import (
    BranchingTrunk,
    Call,
    Head,
    Network,
    Parametrisation,
    Preconditioning,
    Trunk,
)
from registry.protocols.parts import (
    Reference,
    couples_rows,
    group_of,
    parts,
    required_heads,
)
from registry.protocols.rows import check_groups, check_reference, is_picture, read_share
from registry.protocols.runs import (
    Ended,
    Engine,
    Extractor,
    IntermediateValue,
    Job,
    Launcher,
    Metric,
    Optimizer,
    Pruner,
    Recorder,
    RecordStore,
    RunCell,
    RunRecord,
    Schedule,
    StoredRun,
)

__all__ = [
    "NULL_LABEL",
    "Batch",
    "BranchingTrunk",
    "Call",
    "Coded",
    "Cond",
    "Coupling",
    "Dataset",
    "Derivative",
    "DifferentiableDerivative",
    "Draw",
    "Ended",
    "Engine",
    "Extractor",
    "Features",
    "GuidanceLaw",
    "Head",
    "IntermediateValue",
    "Job",
    "JointDerivative",
    "Launcher",
    "LossOutput",
    "Metric",
    "Network",
    "Objective",
    "Optimizer",
    "Parametrisation",
    "Path",
    "PathSample",
    "Preconditioning",
    "Pruner",
    "RecordStore",
    "Recorder",
    "Reference",
    "Residual",
    "RunCell",
    "RunRecord",
    "Sampler",
    "Schedule",
    "Share",
    "Shareable",
    "StoredRun",
    "Teacher",
    "TimeLaw",
    "TransparentTeacher",
    "Trunk",
    "Vae",
    "VelocityEstimator",
    "Weight",
    "better_of",
    "check_batch",
    "check_groups",
    "check_reference",
    "couples_rows",
    "differentiated_by",
    "group_of",
    "groups_by_label",
    "has_whole_weights",
    "is_picture",
    "is_serial",
    "keeps_records",
    "parts",
    "provider_files",
    "read_share",
    "required_heads",
    "rows_of",
    "runs_in_several_processes",
    "scaled_by",
    "store_of",
    "to_device",
    "trains_derivative",
]
