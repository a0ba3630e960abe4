"""Speed and memory against named peers, in one run. Not part of the package.

A case (`cases`) is a list of shapes, a contestant (`contestants`) something that takes a step over arrays of them. A
suite (`cpu`) builds the contestants, checks what they compute (`check`), times them (`timing`) and measures their
memory (`memory`); `results`, `table` and `plot` are what remains of it.
"""
