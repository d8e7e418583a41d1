"""Building blocks that run inside a compiled graph; they know nothing of methods or plans."""
