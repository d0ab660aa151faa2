"""Features: their values, the gradient to the input alone, and weights by seed."""

from __future__ import annotations

import pytest
import torch

from registry import features
from registry.protocols import Features
from zoo.features import RandomConvolutions, RawValues
from zoo.teachers import EmaTeacher, Frozen, Online

x = torch.randn(4, 3, 9, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", features.names())
def test_features_keep_the_contract(name):
    made = features.build(name)
    assert isinstance(made, Features)
    value = x.clone().requires_grad_()
    found = made(value)
    assert found.shape == (4, found.shape[1])
    assert found.dtype == torch.float32
    (gradient,) = torch.autograd.grad(found.square().sum(), value)
    assert (gradient.flatten(1).abs().sum(1) > 0).all()
    net = made.feature_net
    if net is not None:
        assert not net.training
        assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("teacher", [Online(), EmaTeacher(), Frozen()])
def test_teachers_are_not_taken_for_features(teacher):
    assert not isinstance(teacher, Features)


def test_raw_values_are_the_values():
    assert RawValues()(x).equal(x.flatten(1))
    assert RawValues()(x[:, 0, 0]).equal(x[:, 0, 0])


def test_random_convolutions_are_a_function_of_the_seed():
    one, same, other = (RandomConvolutions(seed=seed)(x) for seed in (0, 0, 1))
    assert one.equal(same)
    assert not torch.allclose(one, other, atol=0.01)
    before = torch.get_rng_state()
    RandomConvolutions(seed=2)(x)
    assert torch.get_rng_state().equal(before)


def test_every_layer_says_something_and_rows_do_not_meet():
    made = RandomConvolutions(widths=(4, 6), cells=2)
    found = made(x)
    assert found.shape == (4, 4 * (4 + 6))
    for part in found.split([16, 24], dim=1):
        assert 0.02 < part.std(0).mean() < 5
    torch.testing.assert_close(made(x[2:3]), found[2:3])


def test_pictures_smaller_than_the_cells_have_fewer():
    assert RandomConvolutions(channels=1, widths=(4, 4, 4))(torch.randn(2, 1, 2, 2)).shape[0] == 2


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3)], ids=str)
def test_other_data_are_refused_with_their_shape(shape):
    with pytest.raises(ValueError, match=r"random_convolutions.channels = 3, and the data have"):
        RandomConvolutions()(torch.zeros(shape))


def test_no_width_is_refused():
    with pytest.raises(ValueError, match=r"random_convolutions.widths = \(\)"):
        RandomConvolutions(widths=())
