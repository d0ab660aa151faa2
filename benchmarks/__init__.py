"""Everything that measures: experiments, data sets, metrics, records and the command line."""
