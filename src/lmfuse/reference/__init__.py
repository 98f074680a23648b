"""What every op computes, in plain torch: the truth that tests and benchmarks compare with.

The formulas keep the dtype of their arguments, so float64 in gives a float64 reference.
"""
