"""The mathematics of weight quantization as pure functions on tensors; passes put the results into graphs."""
