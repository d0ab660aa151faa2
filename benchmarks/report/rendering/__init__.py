"""What a report writes: figures, pages, Markdown and CSV.

Nothing here may read the folders of runs.
"""
