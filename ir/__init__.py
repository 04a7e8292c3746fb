"""The program: stages, loop, schedule and pass records, always executable in PyTorch.

Dimension letters, used in every shape comment of this repository:

| letter | dimension |
|---|---|
| B | batch |
| T | tokens |
| D | width |
| H | heads |
| K | head width |
| C | channels |
| S | steps: calls of the unfolded sampler |
| N | out features; of a table, its evaluations |
| M | in features |
| R | rank; in the driver, distinct condition rows |
"""
