"""FLOPs and bytes on numbers worked out by hand, and against PyTorch's own counter."""

from dataclasses import replace

import pytest
import torch
from programs import component
from torch import fx
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stepfold.ir.cost import program_flops, stage_flops
from stepfold.ir.edit import add_buffer, copy_graph, finish
from stepfold.ir.operators import RECORDS
from stepfold.ir.program import Program, slots_of
from stepfold.loop.ports import Rate

X = torch.randn(2, 3, 4)
IMAGE = torch.randn(2, 4, 6, 6)


def counted(module: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """FLOPs by PyTorch's counter, which sees attention on the CPU only when it is written out."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()


class Weighted(torch.nn.Module):
    """A function of x and a weight."""

    def __init__(self, function, *shape: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(shape))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight)


def heads(x: torch.Tensor, count: int, width: int) -> torch.Tensor:
    return x.new_ones(1, count, 1, width) * x[:, None, :, :1]


CASES = {
    "linear": (lambda x, w: F.linear(x, w), (5, 4), X, 2 * 3 * 4 * 5),  # T x M x N
    "matmul": (lambda x, w: x @ w, (4, 5), X, 2 * 3 * 4 * 5),
    "bmm": (lambda x, w: torch.bmm(x, x.transpose(1, 2)) + w, (1,), X, 2 * 3 * 4 * 3),
    "mm": (lambda x, w: torch.mm(x.flatten(1), w), (12, 5), X, 2 * 12 * 5),
    "addmm": (lambda x, w: torch.addmm(w[0], x.flatten(1), w), (12, 5), X, 2 * 12 * 5),
    "baddbmm": (lambda x, w: torch.baddbmm(w, x, x.transpose(1, 2)), (1,), X, 2 * 3 * 4 * 3),
    "conv1d": (lambda x, w: F.conv1d(x.transpose(1, 2), w), (5, 4, 2), X, 2 * 2 * 5 * 4 * 2),  # 2 places of kernel 2
    "conv2d": (lambda x, w: F.conv2d(x, w, padding=1), (8, 4, 3, 3), IMAGE, 2 * 36 * 8 * 4 * 9),
    "conv2d strided": (lambda x, w: F.conv2d(x, w, stride=2), (8, 4, 2, 2), IMAGE, 2 * 9 * 8 * 4 * 4),
    "conv2d grouped": (lambda x, w: F.conv2d(x, w, groups=4, padding=1), (8, 1, 3, 3), IMAGE, 2 * 36 * 8 * 1 * 9),
    "conv3d": (lambda x, w: F.conv3d(x[:, None], w), (5, 1, 2, 3, 3), IMAGE, 2 * 3 * 16 * 5 * 18),  # 3 x 4 x 4 places
    "conv_transpose2d": (lambda x, w: F.conv_transpose2d(x, w, stride=2), (4, 5, 2, 2), IMAGE, 2 * 36 * 4 * 5 * 4),
    "attention": (  # H = 2, T = 3, K = 4: logits T x K x T and T x T x K for each head
        lambda x, w: F.scaled_dot_product_attention(heads(x, 2, 4), heads(x, 2, 4), heads(x, 2, 4)) + w,
        (1,),
        X,
        2 * (2 * 3 * 4 * 3) + 2 * (2 * 3 * 3 * 4),
    ),
    "cross attention": (  # 3 queries, 2 keys, K = 4, value width 6
        lambda x, w: F.scaled_dot_product_attention(heads(x, 2, 4), heads(x[:, :2], 2, 4), heads(x[:, :2], 2, 6)) + w,
        (1,),
        X,
        2 * (2 * 3 * 4 * 2) + 2 * (2 * 3 * 2 * 6),
    ),
    "nothing": (lambda x, w: x.softmax(-1) + w, (1,), X, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_flops_of_one_sample(name: str) -> None:
    function, shape, example, expected = CASES[name]
    model = Weighted(function, *shape)
    program = component(model, example)
    assert program_flops(program) == expected
    assert counted(model, example) == 2 * expected, "PyTorch's counter, of a batch of two, counts otherwise"


def with_operator(program: Program, operator, arguments) -> Program:
    """The program with its last value replaced by one call of an operator."""
    graph = copy_graph(program.step)
    output = graph.graph.output_node()
    (last,) = output.args[0]  # type: ignore[misc]
    with graph.graph.inserting_before(output):
        output.args = ((graph.graph.call_function(operator, arguments(graph, last)),),)
    return program.with_stage(finish(program.step, graph))


def test_qlinear_counts_as_the_linear_it_replaces() -> None:
    values = (
        torch.zeros(2, 3, 4, dtype=torch.uint8),  # q
        torch.ones(()),
        torch.zeros((), dtype=torch.uint8),
        torch.zeros(4, 5, dtype=torch.int8),  # weight
        torch.ones(5),
    )

    def arguments(graph: fx.GraphModule, x: fx.Node) -> tuple:
        return (*(graph.graph.get_attr(add_buffer(graph, "value", value)) for value in values), None)

    program = component(lambda x: x.relu(), X)
    quantized = with_operator(program, torch.ops.stepfold.qlinear.default, arguments)
    assert program_flops(quantized) == 2 * 3 * 4 * 5


def test_blocked_linear_counts_as_the_linear_it_replaces() -> None:
    blocks, scales = torch.zeros(5, 1, 8, dtype=torch.uint8), torch.ones(5, 1)

    def arguments(graph: fx.GraphModule, x: fx.Node) -> tuple:
        held = [graph.graph.get_attr(add_buffer(graph, "value", value)) for value in (blocks, scales)]
        return (x, *held, None, None, 4, 16, True)

    program = component(lambda x: x.relu(), X)
    quantized = with_operator(program, torch.ops.stepfold.blocked_linear.default, arguments)
    assert program_flops(quantized) == 2 * 3 * 4 * 5


def test_fused_attention_counts_as_the_attention_it_replaces() -> None:
    program = component(lambda x: x.relu(), torch.randn(2, 3, 8))
    fused = with_operator(program, torch.ops.stepfold.attention.default, lambda graph, x: (x, x, x, 2, 0.5))
    assert program_flops(fused) == 2 * (2 * 3 * 4 * 3) + 2 * (2 * 3 * 3 * 4)  # as "attention" above


def test_operators_that_multiply_matrices_have_a_formula() -> None:
    counted = {overload for overload, record in RECORDS.items() if record.flops is not None}
    stepfold = torch.ops.stepfold
    layers = {stepfold.qlinear.default, stepfold.group_qlinear.default, stepfold.blocked_linear.default}
    assert counted == {*layers, stepfold.attention.default, stepfold.block_sparse_attention.default}


def test_tiny_dit_counts_as_pytorch_does(tiny_program: Program) -> None:
    (stage,) = tiny_program.stages
    total = counted(stage.graph, *(tiny_program.example[port.name] for port in stage.inputs))
    rows = len(next(iter(tiny_program.example.values())))
    assert stage_flops(stage) * rows == total > 0


def test_program_flops_are_those_of_the_computing_slots(tiny_program: Program) -> None:
    step = tiny_program.step
    for rate, times in ((Rate.ONCE, 1), (Rate.STEP, 2)):
        extra = replace(step, name="other", rate=rate, outputs=())
        assert program_flops(replace(tiny_program, slots=slots_of(extra, step))) == times * stage_flops(step)
