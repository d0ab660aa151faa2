"""The mathematics: paths, time laws, derivatives, objectives and samplers. Importing it registers all."""

from zoo import derivatives, objectives, paths, samplers, teachers, times, weighting

__all__ = ["derivatives", "objectives", "paths", "samplers", "teachers", "times", "weighting"]
