"""From a checkpoint to a Program: load, capture, roles, rates, sites, frozen dimensions."""
