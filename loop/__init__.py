"""The torch-free ground floor: the loop description, its recurrence, the folded table, the driver and the metrics.

Everything a deployed bundle needs to turn noise into samples lives here and depends on NumPy and pydantic only.
The dimension letters are declared in `stepfold.ir`; here the most used are B batch, S grid calls (steps of the
unfolded sampler), N evaluations of the denoiser, C channels.
"""
