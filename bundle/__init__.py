"""The folder `optimize` writes: manifest, hashes, atomic writing, safe reading. Torch-free."""

from .manifest import FORMAT_VERSION, Manifest
from .probe import Probe
from .reader import Bundle, read
from .tables import Tables
from .verify import verify
from .writer import check_out, write_manifest, write_probe, write_schedule, write_tables, writing

__all__ = [
    "FORMAT_VERSION",
    "Bundle",
    "Manifest",
    "Probe",
    "Tables",
    "check_out",
    "read",
    "verify",
    "write_manifest",
    "write_probe",
    "write_schedule",
    "write_tables",
    "writing",
]
