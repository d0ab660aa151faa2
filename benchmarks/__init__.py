"""Everything that measures: experiments, data sets, metrics, records, grids and the command line."""
