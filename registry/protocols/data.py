"""Data sets, what they may add (reading a share, decoding codes), and the VAEs behind codes.

rows.py says what the rows must be, and reads them.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from registry.protocols.batches import Cond, Share


class Dataset(Protocol):
    """Training batches by step, and a fixed reference to measure against.

    `shape` is that of one sample. `num_classes` is 0 for data without labels. `size` is the number
    of samples, 0 for data that are drawn without end. `identity` says which data these are, by
    name, count and a hash of the content. `batch` gives the n rows of a step. `reference` gives n
    rows that are the same at every step. `sample_labels` gives the conditions for n generated
    samples, with the frequencies of the data.

    Two things it may declare beside that (capabilities.py). With `groups_by_label = True`, `batch`
    takes `same_label=k` too, and each k rows in turn have one label: objectives that declare a
    `group` need it of data with labels. With `scaled_by`, its rows are those that people and
    metrics see, times this number.
    """

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def size(self) -> int: ...
    def identity(self) -> str: ...
    def batch(self, step: int, n: int, seed: int) -> tuple[Tensor, Cond | None]: ...
    def reference(self, n: int, seed: int) -> tuple[Tensor, Cond | None]: ...
    def sample_labels(self, n: int) -> Cond | None: ...


@runtime_checkable
class Shareable(Protocol):
    """A data set that can read one share of a batch, so that each process reads its rows alone."""

    def batch_share(self, step: int, n: int, seed: int, share: Share) -> tuple[Tensor, Cond | None]:
        """As `batch`, with x0 of the share's rows alone. The conditions are those of all rows.

        The rows of each `share.group` have one label, as those of `same_label`.
        """
        ...


@runtime_checkable
class Coded(Protocol):
    """A data set of codes, such as a VAE's latents. People and metrics see the decoded pixels."""

    def decode(self, codes: Tensor) -> Tensor:
        """[n *shape] -> pixels [n c h w] in [-1, 1], on the device of the codes."""
        ...


class Vae(Protocol):
    """Frozen weights between pixels in [-1, 1] [n c h w] and latents [n k h' w'].

    `encode` gives the posterior's mean and log-variance, which is None for a deterministic encoder.
    Neither `encode` nor `decode` scales or shifts. `constants` gives the scale and the shift of
    each channel, to be applied as (latent - shift) scale.
    """

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def provenance(self) -> dict[str, str]: ...
    def constants(self, channels: int) -> tuple[list[float], list[float]]: ...
