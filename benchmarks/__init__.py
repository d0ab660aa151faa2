"""Everything that measures: data, metrics, experiments, grids, records, reports, commands.

Nothing else in the project may import from here.
"""
