"""DeepSpeed's ZeRO: the engine, its checkpoints, and derivatives through sharded weights.

It and `trainers/sharding.py` import DeepSpeed only inside functions, when a run needs it.
"""
