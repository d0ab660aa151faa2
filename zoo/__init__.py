"""The mathematics: paths, time laws, derivatives, objectives and samplers. Importing it registers all."""

from zoo import paths

__all__ = ["paths"]
