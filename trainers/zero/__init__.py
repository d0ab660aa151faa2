"""DeepSpeed's ZeRO: the engine, its checkpoints, and derivatives through sharded weights.

DeepSpeed is imported nowhere else.
"""
