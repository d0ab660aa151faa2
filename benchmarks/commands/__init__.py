"""The command line, about one module for each command: the only code that prints and exits.

Nothing may import from here but the command line itself.
"""
