"""Measure bundles beside baselines, compare reports, and write the page a person reads.

`bench.bench` measures, `compare.compare` sets reports side by side, `page` writes HTML, `images` writes PNG.
"""
