"""References for a user's own checkpoint: the bundled implementation on the CPU in float32, block by block.

What they judge is never what made them, but for targets that are the bundled implementation itself: those are labelled
calibration.
"""
