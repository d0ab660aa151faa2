"""What the start-up probe of derivatives is made of (trainers/derivative_probe.py)."""
