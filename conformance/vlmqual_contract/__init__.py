"""The contract between what is judged and what judges: plain data, protocols, processes, results.

Nothing here imports torch or any implementation; the only third-party import is numpy.
"""
