"""AOTInductor: stages as native code for this processor, compiled by PyTorch's own compiler."""
