"""The policies, budgets and attention in NumPy, one module per paper, written from the papers' equations.

The native code equals them cell by cell (unit/test_selection.py), so nothing in here reads its fields or calls it: what a
policy is called with are the paper's parameters. A policy takes a cache, as lists over layers of lists over kv heads of
arrays [cells], with ascending positions and the mean attention of the observation window, and returns the cells that
stay in the same shape.

Sums are in float64 and run in the order in which the arrays list their elements; of equal scores the earlier cell is
the better one. ``published`` in a module is what the code does that the paper's authors released (data/README.md).
"""
