"""The claims about parts: paths, time laws, guidance laws, weights, couplings, samplers, networks
and data sets. Each module has the claims of one kind; kinds.py finds the kind of a name.
"""
