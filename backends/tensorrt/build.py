"""From an ONNX file to a plan."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ...loop.errors import UsageError
from ...loop.ports import Port
from .cuda import gpus
from .description import Batch, Layer
from .network import error_lines, layers, parse, ports
from .options import TensorrtOptions
from .provider import Message, Provider, collected, logger
from .timings import keep_timings, use_timings

MIB = 1 << 20
MEMORY = re.compile(r"out of memory|outofmemory|insufficient (memory|workspace)|memory pool", re.IGNORECASE)


@dataclass(frozen=True)
class Plan:
    """A built engine and what is known of it.

    Attributes:
        engine: the raw bytes.
        capability: compute capability it is for.
        batch: its profile; None where no input has a batch.
        inputs: inputs of the network.
        outputs: outputs of the network.
        layers: layers of the network.
        log: what was logged while it was built.
    """

    engine: bytes
    capability: str
    batch: Batch | None
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    layers: tuple[Layer, ...]
    log: tuple[Message, ...]


class BuildFailure(Exception):
    """TensorRT parsed a network and could not build it; the text is what it said."""

    def __init__(self, messages: list[Message]):
        super().__init__(" ".join(error_lines(messages)[:2]) or "it gives no reason")
        self.log = tuple(messages)

    @property
    def for_memory(self) -> bool:
        """Whether memory ran out."""
        return bool(MEMORY.search(str(self)))


def build(provider: Provider, model: Path | bytes, options: TensorrtOptions) -> Plan:
    """Build an engine from an ONNX file.

    Raises:
        UsageError: the provider cannot be used here, or not for this compute capability.
        ParserRefusal: the parser refuses a node.
        BuildFailure: the network cannot be built.
    """
    tensorrt = provider.load()
    with collected(tensorrt) as messages:
        builder, network = _network(tensorrt, provider)
        parse(tensorrt, network, logger(tensorrt), model)
        inputs, outputs = ports(network)
        config = builder.create_builder_config()
        capability = _set_capability(tensorrt, config, provider, options.capability)
        batch = _set_profile(builder, config, inputs, options)
        if options.workspace_mib is not None:
            config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, options.workspace_mib * MIB)
        use_timings(config, provider, options.timing_cache, messages)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise BuildFailure(messages)
        keep_timings(config, provider, options.timing_cache)
        found = layers(network)
    return Plan(bytes(engine), capability, batch, inputs, outputs, found, tuple(messages))


def check(provider: Provider, model: bytes) -> None:
    """Parse an ONNX file without building it; raises ParserRefusal where `build` would."""
    tensorrt = provider.load()
    with collected(tensorrt):
        _, network = _network(tensorrt, provider)
        parse(tensorrt, network, logger(tensorrt), model)


def _network(tensorrt: ModuleType, provider: Provider) -> tuple[Any, Any]:
    """A builder and an empty network whose values have the types the ONNX file gives them."""
    builder = tensorrt.Builder(logger(tensorrt))
    if builder is None:
        raise UsageError(f"{provider.name} cannot start here; it needs a working NVIDIA driver.")
    return builder, builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def _set_capability(tensorrt: ModuleType, config: Any, provider: Provider, wanted: str | None) -> str:
    """Choose the GPU to build for and return its compute capability."""
    if not provider.builds_anywhere or wanted is None:
        found, reason = gpus()
        if not found:
            raise UsageError(f"tensorrt.capability: {reason}; name the compute capability to build for, such as SM89.")
        wanted = found[0].capability
    if provider.builds_anywhere:
        config.num_compute_capabilities = 1
        member = getattr(tensorrt.ComputeCapability, wanted, None)
        if member is None or not config.set_compute_capability(member, 0):
            raise UsageError(f"tensorrt.capability: {provider.name} here does not build for {wanted}; upgrade it.")
    return wanted


def _set_profile(builder: Any, config: Any, inputs: tuple[Port, ...], options: TensorrtOptions) -> Batch | None:
    """One optimization profile for every input with a batch."""
    batched = [port for port in inputs if None in port.shape]
    if not batched:
        return None
    batch = Batch(min=options.min_batch, opt=options.opt_batch, max=options.max_batch)
    profile = builder.create_optimization_profile()
    for port in batched:
        shapes = [tuple(n if size is None else size for size in port.shape) for n in (batch.min, batch.opt, batch.max)]
        profile.set_shape(port.name, *shapes)
    config.add_optimization_profile(profile)
    return batch
