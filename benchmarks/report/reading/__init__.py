"""What a report reads: run folders, their records, and which of them may stand side by side.

Nothing here may draw or write.
"""
