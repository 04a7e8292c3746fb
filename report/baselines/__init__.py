"""What a careful user assembles from public tools: a whole denoiser on an engine, a sampler, fewer steps.

Nothing here uses a pass or the shared emission of stepfold: models are exported, converted and quantized by the tools
themselves. Only the sampler's table and the loop driver are shared, so that rows differ in the engine alone.
"""
