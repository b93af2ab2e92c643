"""The bundled implementation made wrong on purpose, one named fault at a time, and honest variants beside them.

What the suite is worth is what it catches here, and what it leaves in peace.
"""
