"""Data sets that are made of another one."""
