"""torch.compile of models with packed sequences against eager PyTorch: one graph, results, gradients, what was called.

Most tests compile for a backend that rewrites and runs what AOTAutograd makes of it, as Inductor would get it; compiling C++
takes ten times as long, so only some do.
"""

import copy

import pytest
import torch
from problems import assert_same, tensors, value_and_grads
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    unpack_sequence,
    unpad_sequence,
)

import torch_gru_fuse
from torch_gru_fuse.backend import gru_fuse
from torch_gru_fuse.ops import packed_path
from torch_gru_fuse.passes.rewrite import rewrite

pytestmark = pytest.mark.versions

# float32 against float64: sums of at most 100 terms of order 1
TOLERANCE = 5e-5
SORTED = pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])


class Tagger(nn.Module):
    """Linear -> GRU over the sequences -> Linear, as most models that pack."""

    def __init__(self, enforce_sorted=True, rnn=None, **options):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.rnn = nn.GRU(8, 6, **options) if rnn is None else rnn
        self.out = nn.Linear(6 * (2 if self.rnn.bidirectional else 1), 3)
        self.enforce_sorted = enforce_sorted

    def encode(self, x, lengths, h=None):
        x = torch.relu(self.embed(x))
        packed = pack_padded_sequence(x, lengths, self.rnn.batch_first, enforce_sorted=self.enforce_sorted)
        return self.rnn(packed, h)

    def forward(self, x, lengths, h=None, total_length=None):
        packed, h = self.encode(x, lengths, h)
        out, lengths = pad_packed_sequence(packed, self.rnn.batch_first, total_length=total_length)
        return self.out(out), h, lengths


def batch(enforce_sorted=True, B=4, T=7, batch_first=False, seed=0):
    """x and lengths; the longest sequence has all T steps."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T, (B,), generator=generator)
    lengths[B // 2] = T
    if enforce_sorted:
        lengths = lengths.sort(descending=True)[0]
    return torch.randn(*((B, T) if batch_first else (T, B)), 5, generator=generator), lengths


def double(arg):
    return arg.double() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg


def rewriting(gm, inputs):
    rewrite(gm)
    return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)


rewriting.rewrites_gru = True


def parity(model, *calls, graphs=1, tolerance=TOLERANCE, backend=rewriting, **options):
    """One graph, which calls the op once, gives what eager gives in float64, results and gradients; `calls` of arguments."""
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend=backend, **options)
    exact = copy.deepcopy(model).double()
    for args in calls:
        expected = value_and_grads(exact, [double(a) for a in args], [*exact.parameters()])
        actual, counts = counted(lambda args=args: value_and_grads(compiled, args, [*model.parameters()]))
        assert [a.dtype for a in actual] == [torch.float32 if e.dtype == torch.float64 else e.dtype for e in expected]
        assert_same([a.to(e.dtype) for a, e in zip(actual, expected, strict=True)], expected, tolerance)
        assert counts == {"gru_forward": 1, "gru_backward": 1}, counts
    assert counters["stats"]["unique_graphs"] == graphs
    return compiled


def counted(function):
    """The results of `function()`, and how often packed sequences ran."""
    counts = {}

    def counting(name):
        run = getattr(packed_path, name)

        def call(*args):
            counts[name] = counts.get(name, 0) + 1
            return run(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("gru_forward", "gru_backward"):
            patch.setattr(packed_path, name, counting(name))
        return function(), counts


def breaks(model, *args, **options):
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, fullgraph=True, **options)(*args)
    torch._dynamo.reset()
    return True


@pytest.fixture
def enabled():
    with torch_gru_fuse.enable():
        yield


VARIANTS = [
    ({}, False),
    ({"num_layers": 2, "bidirectional": True}, True),
    ({"bias": False, "batch_first": True, "num_layers": 2}, False),
]


def check_module_in_a_model(options, given_state, enforce_sorted, backend):
    model = Tagger(enforce_sorted, **options)
    args = batch(enforce_sorted, batch_first=model.rnn.batch_first)
    if given_state:
        args = (*args, torch.randn(model.rnn.num_layers * (2 if model.rnn.bidirectional else 1), 4, 6))
    parity(model, args, backend=backend)
    [record] = torch_gru_fuse.rewrites()
    assert str(record) == "torch.gru in rnn (GRU) -> torch_gru_fuse.gru_packed"


@SORTED
@pytest.mark.parametrize(("options", "given_state"), VARIANTS, ids=str)
def test_module_in_a_model(enabled, options, given_state, enforce_sorted):
    check_module_in_a_model(options, given_state, enforce_sorted, rewriting)


@pytest.mark.parametrize(("variant", "enforce_sorted"), [(0, True), (1, False)])
def test_module_in_a_model_that_inductor_compiles(enabled, variant, enforce_sorted):
    check_module_in_a_model(*VARIANTS[variant], enforce_sorted, "inductor")


@SORTED
def test_lengths_and_sizes_change_without_recompiling(enabled, enforce_sorted):
    model = Tagger(enforce_sorted, bidirectional=True)
    same_size = [batch(enforce_sorted, seed=seed) for seed in range(3)]  # other lengths: the same graph
    others = [batch(enforce_sorted, B, T, seed=T) for B, T in ((5, 9), (3, 6), (8, 15))]  # one more, for any size
    parity(model, *same_size, *others, graphs=2)


@SORTED
def test_dynamic_from_the_first_call(enabled, enforce_sorted):
    model, calls = Tagger(enforce_sorted), [batch(enforce_sorted, B, T) for B, T in ((4, 7), (5, 9))]
    parity(model, *calls, dynamic=True)
    if enforce_sorted:
        torch._dynamo.reset()
        parity(model, *calls, dynamic=True, backend="inductor")


@pytest.mark.parametrize(("kind", "enforce_sorted"), [(list, True), (tuple, False)])
def test_lengths_in_a_list(enabled, kind, enforce_sorted):
    model = Tagger(enforce_sorted)
    several = [(8, 6, 4, 2), (9, 7, 5, 3), (10, 6, 5, 4), (7, 5, 3, 2), (12, 11, 9, 4)]
    x = torch.randn(12, 4, 5)
    calls = [(x, kind(lengths if enforce_sorted else reversed(lengths))) for lengths in several]
    parity(model, *calls, graphs=2)  # as numbers that a graph was made with, then as any


@pytest.mark.parametrize("lengths", [
    torch.tensor([7, 5, 3, 2], dtype=torch.int32),
    [torch.tensor(7), torch.tensor(5), torch.tensor(3), torch.tensor(2)],
], ids=["int32", "list of tensors"])  # fmt: skip
def test_other_kinds_of_lengths(enabled, lengths):
    parity(Tagger(), (batch()[0], lengths))


class Sequences(Tagger):
    """Sequences of their own sizes, as a data set has them."""

    def forward(self, *sequences):
        embedded = [torch.relu(self.embed(sequence)) for sequence in sequences]
        packed, h = self.rnn(pack_sequence(embedded, self.enforce_sorted))
        out, lengths = pad_packed_sequence(packed)
        return self.out(out), h, lengths


@SORTED
def test_sequences_of_their_own_sizes(enabled, enforce_sorted):
    generator = torch.Generator().manual_seed(0)

    def sequences(*lengths):
        return [torch.randn(n, 5, generator=generator) for n in lengths]

    given = [(7, 5, 5, 2), (9, 8, 3, 2)] if enforce_sorted else [(5, 7, 2, 5), (3, 9, 2, 8)]
    parity(Sequences(enforce_sorted, bidirectional=True), *(sequences(*n) for n in given), graphs=2)
    if enforce_sorted:
        with pytest.raises(RuntimeError, match="lengths"):
            torch.compile(Sequences(), fullgraph=True, backend=rewriting)(*sequences(2, 5))


@pytest.mark.parametrize("batch_first", [False, True])
def test_total_length(enabled, batch_first):
    model = Tagger(batch_first=batch_first)
    x, lengths = batch(batch_first=batch_first)
    parity(model, (x, lengths, None, 7), (x, lengths, None, 9), (x, lengths, None, 12), graphs=2)
    with pytest.raises(ValueError, match="total_length=5 and max sequence length being 7"):
        torch.compile(model, fullgraph=True, backend=rewriting)(x, lengths, None, 5)


class Unpacked(Tagger):
    """A list of sequences of their own lengths comes out."""

    def forward(self, x, lengths):
        packed, h = self.encode(x, lengths)
        return *[self.out(sequence) for sequence in unpack_sequence(packed)], h


class Unpadded(Tagger):
    """The same by way of what is padded, with the batch first."""

    def forward(self, x, lengths):
        packed, h = self.encode(x, lengths)
        padded, lengths = pad_packed_sequence(packed, batch_first=True)
        return *unpad_sequence(self.out(padded), lengths, batch_first=True), h


@SORTED
@pytest.mark.parametrize("kind", [Unpacked, Unpadded])
def test_sequences_come_out(enabled, kind, enforce_sorted):
    model = kind(enforce_sorted, bidirectional=True)
    parity(model, *(batch(enforce_sorted, seed=seed) for seed in range(3)))  # lengths change without recompiling
    others = [batch(enforce_sorted, B, T, seed=T) for B, T in ((5, 9), (5, 6), (5, 4), (3, 6), (3, 8))]
    torch._dynamo.reset()
    parity(model, *others, graphs=3)  # one for 9 steps, one for any; one for 3 sequences, over which Python unrolls


@pytest.mark.parametrize("kind", [Unpacked, Unpadded])
def test_sequences_come_out_of_what_inductor_compiles(enabled, kind):
    parity(kind(False), batch(False), backend="inductor")


@SORTED
def test_sequences_in_and_out(enabled, enforce_sorted):
    class InAndOut(Sequences):
        def forward(self, *sequences):
            packed, h = self.rnn(pack_sequence([self.embed(sequence) for sequence in sequences], self.enforce_sorted))
            return *[self.out(sequence) for sequence in unpack_sequence(packed)], h

    generator = torch.Generator().manual_seed(0)
    lengths = (7, 5, 5, 2) if enforce_sorted else (5, 7, 2, 5)
    parity(InAndOut(enforce_sorted), [torch.randn(n, 5, generator=generator) for n in lengths])


@SORTED
@pytest.mark.parametrize("given_state", [False, True], ids=["no h0", "h0"])
def test_packed_outside_of_the_compiled_module(enabled, enforce_sorted, given_state):
    rnn = nn.GRU(5, 6, 2, bidirectional=True)
    calls = []
    for B, T in ((4, 7), (5, 9), (3, 4)):
        packed = pack_padded_sequence(*batch(enforce_sorted, B, T), enforce_sorted=enforce_sorted)
        calls.append((packed, torch.randn(4, B, 6)) if given_state else (packed,))
    parity_of_packed(rnn, *calls)
    [result, _], [expected, _] = torch.compile(rnn, fullgraph=True, backend=rewriting)(*calls[0]), rnn(*calls[0])
    assert type(result) is PackedSequence
    for a, e in zip(result[1:], expected[1:], strict=True):
        assert a is e is None or torch.equal(a, e)


def parity_of_packed(rnn, *calls):
    compiled = torch.compile(rnn, fullgraph=True, backend=rewriting)
    counters.clear()
    for args in calls:
        expected = value_and_grads(rnn, args, [*rnn.parameters()])
        actual, counts = counted(lambda args=args: value_and_grads(compiled, args, [*rnn.parameters()]))
        assert_same(actual, expected, TOLERANCE)
        assert counts == {"gru_forward": 1, "gru_backward": 1}
    assert counters["stats"]["unique_graphs"] == 2


@SORTED
def test_results_have_the_sizes_of_the_inputs(enabled, enforce_sorted):
    """What follows may join results with other inputs of the model; T with total_length alone."""

    class Classifier(Tagger):
        def forward(self, x, lengths, features, targets):
            packed, h = self.encode(x, lengths)
            out, lengths = pad_packed_sequence(packed, total_length=x.size(0))
            mask = torch.arange(x.size(0))[:, None] < lengths
            pooled = (self.out(out) * mask.unsqueeze(-1)).sum(0) / lengths[:, None]
            loss = nn.functional.cross_entropy(self.out(out).view(-1, 3), targets.view(-1), ignore_index=-100)
            return torch.cat((h[-1], features), 1), pooled + features, torch.cat((out, x), -1), loss

    calls = []
    for B, T in ((4, 7), (5, 9)):
        x, lengths = batch(enforce_sorted, B, T)
        calls.append((x, lengths, torch.randn(B, 3), torch.randint(3, (T, B))))
    parity(Classifier(enforce_sorted), *calls, graphs=2)


def test_dropout(enabled):
    model = Tagger(num_layers=3, dropout=0.4)
    parity(model.eval(), batch())
    torch._dynamo.reset()
    model.train()
    compiled = torch.compile(model, fullgraph=True, options={"fallback_random": True})
    results = []
    for run in (model, compiled):
        torch.manual_seed(7)
        results.append(value_and_grads(run, batch(), [*model.parameters()]))
    assert_same(results[1], results[0], TOLERANCE)


def test_two_modules_one_after_the_other(enabled):
    class Stacked(Tagger):
        def __init__(self):
            super().__init__()
            self.other = nn.GRU(6, 6, bidirectional=False)

        def encode(self, x, lengths, h=None):
            packed, h = super().encode(x, lengths, h)
            packed = PackedSequence(packed.data.relu(), packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
            return self.other(packed, h)

    model, args = Stacked(), batch()
    expected = value_and_grads(model, args, [*model.parameters()])
    compiled = torch.compile(model, fullgraph=True, backend=rewriting)
    actual, counts = counted(lambda: value_and_grads(compiled, args, [*model.parameters()]))
    assert_same(actual, expected, TOLERANCE)
    assert counts == {"gru_forward": 2, "gru_backward": 2}


def test_other_ways_to_call_the_module(enabled):
    class Subclass(nn.GRU):
        def forward(self, packed, h=None):
            packed, h = super().forward(input=packed, hx=h)
            return packed, h * 2

    hooked, normed = nn.GRU(8, 6), nn.GRU(8, 6)
    hooked.register_forward_hook(lambda module, args, result: (result[0], result[1] + 1))
    nn.utils.parametrizations.weight_norm(normed, "weight_hh_l0")
    for rnn in (Subclass(8, 6), hooked, normed):
        torch._dynamo.reset()
        model, args = Tagger(False, rnn), batch(False)
        with torch.no_grad():
            result, counts = counted(lambda: torch.compile(model, fullgraph=True, backend=rewriting)(*args))  # noqa: B023
            assert_same(tensors(result), tensors(model(*args)), TOLERANCE)
        assert counts == {"gru_forward": 1}


def test_functional_call(enabled):
    packed = pack_padded_sequence(*batch())
    rnn, h = nn.GRU(5, 6), torch.randn(1, 4, 6)

    def function(data, sizes, h, *params):
        return torch.gru(data, batch_sizes=sizes, hx=h, params=params, has_biases=True, num_layers=1, dropout=0.0, train=False,
                         bidirectional=False)  # fmt: skip

    args = (packed.data, packed.batch_sizes, h, *[p.detach() for p in rnn.parameters()])
    result, counts = counted(lambda: torch.compile(function, fullgraph=True)(*args))
    assert_same(result, function(*args), TOLERANCE)
    assert counts == {"gru_forward": 1}


def test_activation_checkpointing(enabled):
    class Checkpointed(Tagger):
        def forward(self, x, lengths):
            return torch.utils.checkpoint.checkpoint(super().forward, x, lengths, use_reentrant=False)

    model, args = Checkpointed(False), batch(False)
    compiled = torch.compile(model, fullgraph=True, backend=rewriting)
    expected = value_and_grads(model, args, [*model.parameters()])
    assert_same(value_and_grads(compiled, args, [*model.parameters()]), expected, TOLERANCE)


def test_what_is_known_inside_of_a_checkpoint_stays_there(enabled):
    """The number of sequences comes from h0, of which there is one inside; outside packed data comes without."""
    rnn = nn.GRU(5, 6)

    def function(packed, h):
        def inside(data, sizes, h):
            result, h = rnn(PackedSequence(data, sizes), h)
            return result.data, h

        data, h = torch.utils.checkpoint.checkpoint(inside, packed.data, packed.batch_sizes, h, use_reentrant=False)
        return pad_packed_sequence(PackedSequence(data, packed.batch_sizes)), h

    args = pack_padded_sequence(*batch()), torch.randn(1, 4, 6)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=rewriting)
    params = [*rnn.parameters()]
    assert_same(value_and_grads(compiled, args, params), value_and_grads(function, args, params), TOLERANCE)


def test_recompute():
    with torch_gru_fuse.enable(recompute=True):
        model, args = Tagger(num_layers=2), batch()
        expected = value_and_grads(model, args, [*model.parameters()])
        compiled = torch.compile(model, fullgraph=True)
        actual, counts = counted(lambda: value_and_grads(compiled, args, [*model.parameters()]))
        assert_same(actual, expected, TOLERANCE)
        assert counts == {"gru_forward": 2, "gru_backward": 1}


@pytest.mark.once
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes(enabled, dtype):
    model = Tagger(bidirectional=True).to(dtype)
    x, lengths = batch()
    args = (x.to(dtype), lengths)
    with torch.no_grad():
        result = torch.compile(model, fullgraph=True)(*args)
        assert_same(tensors(result), tensors(model(*args)), 1e-13 if dtype == torch.float64 else 0.05)  # 2^-8 a rounding


def test_own_backend():
    model, args = Tagger(), batch()
    with torch.no_grad():
        result, counts = counted(lambda: torch.compile(model, backend=gru_fuse, fullgraph=True)(*args))
        assert_same(tensors(result), tensors(model(*args)), TOLERANCE)
    assert counts == {"gru_forward": 1}
    assert not torch_gru_fuse.is_enabled() and breaks(model, *args)


# ---- errors -------------------------------------------------------------------------------------------------------------


def test_wrong_lengths_are_errors(enabled):
    compiled = torch.compile(Tagger(), fullgraph=True)
    x, _ = batch()
    compiled(x, torch.tensor([7, 5, 3, 2]))
    for lengths, message in (([5, 7, 3, 2], "sorted in decreasing order"), ([7, 5, 3, 0], "greater than 0"),
                             ([9, 5, 3, 2], "maximum of 9, but input has 7 time steps")):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            compiled(x, torch.tensor(lengths))
    compiled(x, torch.tensor([7, 7, 1, 1]))


def test_wrong_state_is_an_error(enabled):
    packed = pack_padded_sequence(*batch())
    with pytest.raises(RuntimeError, match="hx has batch size 3, but batch_sizes begins with 4 sequences"):
        torch.compile(nn.GRU(5, 6), fullgraph=True)(packed, torch.zeros(1, 3, 6))


# ---- what stays as it is ------------------------------------------------------------------------------------------------


def test_disabled_and_other_backends_run_as_without_the_package():
    model, args = Tagger(), batch()
    packed = pack_padded_sequence(*args)
    assert breaks(model, *args) and breaks(nn.GRU(5, 6), packed)
    with torch_gru_fuse.enable():
        assert breaks(model, *args, backend="aot_eager") and breaks(nn.GRU(5, 6), packed, backend="aot_eager")
        result = torch.compile(model, backend="aot_eager")(*args)
    assert_same(tensors(result), tensors(model(*args)), TOLERANCE)
    torch._dynamo.reset()
    result, counts = counted(lambda: torch.compile(model)(*args))
    assert_same(tensors(result), tensors(model(*args)), TOLERANCE)
    assert counts == {} and torch_gru_fuse.rewrites() == []


@pytest.mark.parametrize("kind", [nn.LSTM, nn.RNN])
def test_other_modules_between_the_functions(enabled, kind):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(5, 6)

        def forward(self, x, lengths):
            return pad_packed_sequence(self.rnn(pack_padded_sequence(x, lengths))[0])

    model, args = Packed(), batch()
    assert breaks(model, *args)
    expected = value_and_grads(model, args, [*model.parameters()])
    assert_same(value_and_grads(torch.compile(model), args, [*model.parameters()]), expected, TOLERANCE)


def test_no_cuda_graph_holds_ops_that_read_sizes():
    ops = torch.ops.torch_gru_fuse
    for name in ("gru_packed_forward", "gru_packed_backward", "pack_padded", "pad_packed", "unpad", "packed_zeros"):
        assert torch.Tag.cudagraph_unsafe in getattr(ops, name).default.tags
