"""The address of `load_exported` that the cards of exported networks have named so far."""

from backbones.pretrained.exported import load_exported as load_exported
