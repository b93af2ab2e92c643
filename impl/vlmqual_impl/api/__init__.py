"""The documented classes, signatures and files: thin shells over processors, models and generation."""
