"""Reports of evaluations.

``report`` collects parts (``section``), ``html`` and ``markdown`` write, ``plots`` draws, ``summary`` puts scores
beside published ones, ``compare`` two evaluations row by row.
"""

from unime_st.evaluation.report.report import Report

__all__ = ["Report"]
