"""A page for each method, made from its code and from what was measured.

measured    what was measured: the claims of check, results of runs, the cost of a step
page        the page of one method
index       the page that lists them
"""
