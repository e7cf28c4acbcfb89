"""Slow, obvious references of the operators: plain loops in float64, sharing no code with the library.

Floating results are float64 *before* the final cast to the output dtype, with every intermediate rounding that the
operator prescribes already applied; where the output dtype is not that of the first argument they are a `Float`.
Floating results of another dtype are exact. Integer results are exact and have their final dtype, or are `Codes`.
Arguments are trusted: nothing is validated here. Rows that no group covers are zero.
"""
