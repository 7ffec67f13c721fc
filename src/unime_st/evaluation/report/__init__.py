"""Reports of evaluations.

``report`` collects the parts of ``section``; ``html`` and ``markdown`` write them, ``plots`` draws; ``summary`` adds
our scores beside published ones, ``compare`` compares two evaluations row by row.
"""
